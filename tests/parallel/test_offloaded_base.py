"""--offload-base: the run in memory, with less of it; files that change or fail are noticed; one line for what cannot be."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
import yaml
from comparing import by_dtype
from conftest import quantized, tiny_model, write_folder
from resumed_runs import STEPS, WIDE, base_of_blocks, command, stopped_after, weights
from run_cli import run

from mlx_lora.config.load import train_settings
from mlx_lora.kernels.measure import NO_NUMBER, SWITCH, Figures, keep_figures, read_figures, read_store, write_store
from mlx_lora.models.folder import stored_tensors
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel import offloaded_base
from mlx_lora.parallel import offloaded_base as base_reader
from mlx_lora.parallel.offloaded_base import BaseFiles, OffloadedBase
from mlx_lora.planner.memory import MAX_SLICE
from mlx_lora.trainer import choose_strategy
from mlx_lora.trainer.adapter import adapt
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError

OTHERS = [pytest.param(one, marks=pytest.mark.slow) for one in ("mixture", "gemma2", "float", "mxfp4")]


@pytest.fixture(scope="module", params=["affine", *OTHERS])
def folder(request, tmp_path_factory):
    return base_of_blocks(request.param, tmp_path_factory.mktemp(request.param) / "base")


def losses(path) -> list[float]:
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["loss"] for row in rows if row["loss"] is not None]


def wait_until(happened, seconds=120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def trained(folder, chats, out, *extra):
    ran = run(*command(folder, chats, out, "--steps-per-report", 1, *extra))
    assert ran.code == 0, ran.err
    return ran


def test_it_learns_what_the_run_in_memory_learns(folder, chats, tmp_path):
    trained(folder, chats, tmp_path / "on", "--offload-base", "--iters", 6)
    trained(folder, chats, tmp_path / "off", "--offload-base", "off", "--grad-checkpoint", "block", "--iters", 6)
    on, off = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert len(on) == 6
    assert on == pytest.approx(off, rel=by_dtype(1e-3, 1e-2))
    assert on[0] == pytest.approx(off[0], rel=by_dtype(1e-5, 1e-3))
    assert on[-1] < on[0]


def test_a_slow_disk_makes_open_batches_larger_and_leaves_given_ones(tiny_folder, chats, tmp_path, monkeypatch):
    def most_tokens(bytes_per_s, *extra):
        monkeypatch.setattr(offloaded_base, "read_rate", lambda tensors: bytes_per_s)
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        ran = run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, "--iters", 1, "--sample-tokens", 0,
                  "--offload-base", *extra)  # fmt: skip
        assert ran.code == 0, ran.err
        return yaml.safe_load((out / "run.yaml").read_text())["batch_tokens"]

    usual = most_tokens(1e15)
    assert most_tokens(1e3) > usual
    assert most_tokens(1e3, "--batch-tokens", usual) == usual


@pytest.mark.float32("a loss near 0 is compared within float32's rounding")
@pytest.mark.parametrize(
    "own",
    [
        pytest.param(False, id="a teacher's files"),
        pytest.param(True, id="the base with a prompt", marks=pytest.mark.slow),
    ],
)
def test_a_teacher_is_read_from_its_files_too(own, tiny_4bit_folder, tiny_folder, chats, tmp_path, monkeypatch):
    """Its table has what a teacher in memory says, and the student learns the same."""
    (tmp_path / "prompt.txt").write_text("Answer as a pirate.\n")
    teacher = ("--teacher-prompt", tmp_path / "prompt.txt") if own else ("--teacher", tiny_folder)
    found = {}
    for way in ("on", "off"):
        monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / f"cache-{way}"))
        more = ("--grad-checkpoint", "block") if way == "off" else ()
        asked = ("--objective", "distill", *teacher, "--offload-base", way, "--iters", 4, *more)
        trained(tiny_4bit_folder, chats, tmp_path / way, *asked)
        found[way] = losses(tmp_path / way)
    assert found["on"] == pytest.approx(found["off"], rel=1e-3)
    assert found["on"][1:] != pytest.approx(found["off"][:-1], rel=1e-3)


@pytest.mark.slow
def test_the_output_of_frozen_blocks_is_kept_and_later_epochs_read_the_others_alone(
    tiny_4bit_folder, chats, tmp_path, monkeypatch
):
    """Losses are those of a run that computes all blocks; another base's output is not used."""
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    real, units = base_reader.BaseReader._fill, []

    def counted(self, unit):
        units.append(unit)
        real(self, unit)

    monkeypatch.setattr(base_reader.BaseReader, "_fill", counted)

    def run_of(base, name, kept):
        units.clear()
        trained(
            base, chats, tmp_path / name, "--offload-base", "--num-layers", 1, "--cache-trunk", kept, "--val-batches", 0
        )
        return losses(tmp_path / name), len(units)

    whole, kept, again = (run_of(tiny_4bit_folder, name, name[:3].strip()) for name in ("off", "on", "on again"))
    assert kept[0][0] == pytest.approx(whole[0][0], rel=1e-3)
    assert again[0] == kept[0]
    assert again[1] < kept[1] < whole[1]
    config = json.loads((tiny_4bit_folder / "config.json").read_text())
    other = write_folder(tmp_path / "other", quantized(tiny_model(seed=5)), config)
    apart, own = run_of(other, "off other", "off")[0], run_of(other, "on other", "on")[0]
    assert own[0] == pytest.approx(apart[0], rel=1e-3)
    assert own[0] != pytest.approx(kept[0][0], rel=1e-3)


@pytest.mark.slow
def test_without_compiling_the_losses_are_equal(tiny_4bit_folder, chats, tmp_path):
    with device.uncompiled():
        trained(tiny_4bit_folder, chats, tmp_path / "on", "--offload-base")
        trained(tiny_4bit_folder, chats, tmp_path / "off", "--offload-base", "off", "--grad-checkpoint", "block")
    on, off = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert len(on) == STEPS
    assert on == pytest.approx(off, rel=1e-6)
    assert on[1:] != pytest.approx(off[:-1], rel=1e-6)


def test_blocks_take_no_memory_between_their_uses(chats, tmp_path):
    folder = write_folder(tmp_path / "base", tiny_model(**WIDE), dict(WIDE))
    settings = train_settings({"model": str(folder), "data": str(chats), "offload_base": "on", "sample_tokens": 0})
    base = load_base(settings.model, read=False)
    before = mx.get_active_memory()
    adapt(settings, base, objective_of(settings.objective), None)
    strategy = OffloadedBase()
    strategy.divide(base, settings)
    blocks = sum(
        int(np.prod(p.shape)) * 4
        for name, p in mx.load(str(folder / "model.safetensors")).items()
        if ".layers." in name
    )
    assert mx.get_active_memory() - before < blocks / 2
    mx.eval(base.model(mx.array([[1, 2, 3]])))
    assert mx.get_active_memory() - before < blocks / 2
    whole = load_base(settings.model)
    adapt(settings, whole, objective_of(settings.objective), None)
    ids = mx.array([[5, 6, 7, 8]])
    assert mx.allclose(base.model(ids), whole.model(ids), atol=1e-4)


@pytest.mark.slow  # as test_activation_files.py does by default
def test_a_killed_run_resumes_to_the_same_bytes(tiny_4bit_folder, chats, tmp_path):
    asked = ("--offload-base", "--save-every", 4)
    trained(tiny_4bit_folder, chats, tmp_path / "whole", *asked)
    copy = stopped_after(tmp_path / "whole", tmp_path / "copy", 4)
    trained(tiny_4bit_folder, chats, copy, *asked, "--resume", "auto")
    assert weights(copy) == weights(tmp_path / "whole")


def test_a_file_that_was_replaced_stops_the_run(tiny_4bit_folder, chats, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_4bit_folder, tmp_path / "base")
    check, steps = BaseFiles.check, []

    def replaced(self):
        steps.append(1)
        if len(steps) == 6:
            os.utime(folder / "model.safetensors", (1, 1))
        check(self)

    monkeypatch.setattr(BaseFiles, "check", replaced)
    ran = run(*command(folder, chats, tmp_path / "run", "--offload-base"))
    assert ran.code == 1
    assert "model.safetensors" in ran.lines[-1]
    assert "--offload-base" in ran.lines[-1]
    assert (tmp_path / "run" / "adapters.safetensors").exists()


def test_mlps_in_chunks_of_positions(tiny_4bit_folder, chats, tmp_path, monkeypatch):
    trained(tiny_4bit_folder, chats, tmp_path / "whole", "--offload-base", "--iters", 2)
    for home in ("planner.memory", "trainer.position_chunks"):
        monkeypatch.setattr(f"mlx_lora.{home}.CHUNKED_FROM_BYTES", 10_000)
    ran = trained(tiny_4bit_folder, chats, tmp_path / "chunks", "--offload-base", "--iters", 2)
    assert "in chunks" in ran.err
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_head_that_is_not_at_hand_is_not_measured(chats, tmp_path, monkeypatch):
    large = {"vocab_size": MAX_SLICE + 1}  # so that the head has two slices
    model = tiny_model(**large)
    quantized(model)
    folder = write_folder(tmp_path / "base", model, large | {"quantization": {"group_size": 32, "bits": 4}})
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    ran = run(*command(folder, chats, tmp_path / "run", "--offload-base", "--kernels", "auto", "--iters", 1))
    assert ran.code == 0, ran.err
    assert "plain cross-entropy" not in json.loads((tmp_path / "run" / "report.json").read_text())["step"]
    kept = read_store("kernels")
    assert all(any(one["error"] < NO_NUMBER for one in figures.values()) for figures in kept.values())
    poisoned = {name: Figures(1.0, 1, 1, 1, NO_NUMBER, 1e-4) for name in ("a", "b")}
    keep_figures("key", poisoned)
    assert read_store("kernels") == kept
    write_store(
        "kernels", {**kept, "key": {name: asdict(one) for name, one in poisoned.items()}}
    )  # by an earlier version
    assert read_figures("key") is None


def test_a_reader_that_is_gone_leaves_no_file_open(tiny_4bit_folder):
    reader = base_reader.BaseReader("--offload-base")
    number = reader.add(list(stored_tensors(tiny_4bit_folder).values())[:2])
    reader.fetch(number, lambda contents: None)
    [descriptor] = reader._files.values()
    os.fstat(descriptor)
    del reader
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_reads_resumes_to_the_same_bytes(folder, chats, tmp_path):
    asked = ("--offload-base", "--save-every", 2, "--steps-per-report", 1)
    trained(folder, chats, tmp_path / "whole", *asked)
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "mlx_lora", *command(folder, chats, out, *asked)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(losses(out)) >= 5)
    process.kill()
    process.wait()
    assert not (out / "adapters.safetensors").exists() or weights(out) != weights(tmp_path / "whole")
    trained(folder, chats, out, *asked, "--resume", "auto")
    assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.parametrize("failing", ["error", "end"])
def test_a_disk_that_fails_is_one_line_and_the_adapter_is_saved(
    failing, tiny_4bit_folder, chats, tmp_path, monkeypatch
):
    read, check, steps = base_reader.system_read, BaseFiles.check, []

    def broken(descriptor, into, offset):
        if len(steps) < 6:
            return read(descriptor, into, offset)
        if failing == "error":
            raise OSError(5, "Input/output error")
        return 0

    def counted(self):
        steps.append(1)
        check(self)

    monkeypatch.setattr(base_reader, "system_read", broken)
    monkeypatch.setattr(BaseFiles, "check", counted)
    ran = run(*command(tiny_4bit_folder, chats, tmp_path / "run", "--offload-base", "--steps-per-report", 1))
    assert ran.code == 1
    assert "model.safetensors" in ran.lines[-1]
    assert "--offload-base" in ran.lines[-1]
    assert losses(tmp_path / "run")
    assert (tmp_path / "run" / "adapters.safetensors").exists()


def test_what_does_not_fit_is_read_from_the_disk_by_itself(chats, tmp_path):
    wide = {**WIDE, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = write_folder(tmp_path / "base", tiny_model(**wide), wide)
    needed = []
    for choice in ("off", "on"):
        asked = ("--dry-run", "--offload-base", choice, "--batch-size", 1, "--grad-checkpoint", "block")
        plan = run(*command(folder, chats, tmp_path / "p", *asked))
        assert plan.code == 0, plan.err
        needed.append(float(re.search(r"(\S+) GB  = peak", plan.out)[1]))
    assert needed[1] < 0.7 * needed[0]
    budget = ("--memory-budget", 16 / 15 * sum(needed) / 2, "--batch-size", 1)  # of which a part is for MLX's cache
    budget += ("--iters", 1)
    one = run(*command(folder, chats, tmp_path / "off", *budget, "--offload-base", "off"))
    assert (one.code, "--memory-budget" in one.lines[-1]) == (2, True)
    ran = trained(folder, chats, tmp_path / "auto", *budget)
    assert "base read from its files" in ran.err
    assert "base read from its files" not in trained(folder, chats, tmp_path / "room", "--iters", 1).err


@pytest.mark.slow
def test_rows_that_do_not_fit_beside_the_base_are_trained_with_a_base_that_is_read(chats, tmp_path, monkeypatch):
    """What is known only of the data counts for `train` as for `plan`: its batches."""
    wide = {**WIDE, "num_hidden_layers": 8}
    folder = write_folder(tmp_path / "base", tiny_model(**wide), wide)
    asked = ("--model", folder, "--data", chats, "--batch-size", 2)
    whole = run("plan", *asked, "--grad-checkpoint", "block", "--offload-base", "off", "--json")
    asked = (*asked, "--memory-budget", 0.9 * json.loads(whole.out)["peak_bytes"] / 1e9)
    assert json.loads(run("plan", *asked, "--json").out)["predicted"]["reading"]
    monkeypatch.setattr(choose_strategy, "check_base_fits", lambda settings: None)  # as a short row would
    more = (
        "--iters",
        1,
        "--val-batches",
        0,
        "--sample-tokens",
        0,
        "--kernels",
        "mlx",
        "--adapter-path",
        tmp_path / "a",
    )
    ran = run("train", *asked, *more)
    assert ran.code == 0, ran.err
    assert ran.err.count("rows read") == 1
    assert yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["offload_base"] == "on"
    refused = run("train", *asked, *more, "--adapter-path", tmp_path / "b", "--offload-base", "off")
    assert (refused.code, "--memory-budget" in refused.lines[-1]) == (2, True)


def test_a_file_that_is_gone_is_named(tmp_path):
    folder = write_folder(tmp_path / "base", tiny_model())
    base = load_base(train_settings({"model": str(folder)}).model, read=False)
    files = BaseFiles(base.model, base.stored)
    files.check()
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model\.safetensors"):
        files.check()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": "abc" * (n % 3 + 1), "rejected": "xyz"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("extra", [
    ("--method", "dora"),
    *(pytest.param(one, marks=pytest.mark.slow) for one in (
        ("--objective", "dpo"), ("--method", "qa-lora"), ("--method", "adalora"), ("--method", "rslora"), ("--method", "lora-plus"), ("--objective", "simpo"), ("--objective", "orpo"), ("--objective", "kto"),
        ("--objective", "reward"), ("--dropout", "0.1"), ("--num-layers", "1"), ("--grad-checkpoint", "selective"),
    )),
], ids="=".join)  # fmt: skip
def test_methods_and_objectives(extra, tiny_4bit_folder, chats, pairs, tmp_path):
    data = pairs if "--objective" in extra else chats
    trained(tiny_4bit_folder, data, tmp_path / "on", "--offload-base", "--iters", 2, *extra)
    checkpointing = () if "--grad-checkpoint" in extra else ("--grad-checkpoint", "block")
    trained(tiny_4bit_folder, data, tmp_path / "off", "--offload-base", "off", *checkpointing, "--iters", 2, *extra)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-2)


def test_evaluate_and_generate(tiny_4bit_folder, chats, tmp_path):
    trained(tiny_4bit_folder, chats, tmp_path / "a", "--iters", 2, "--val-batches", 0)
    found = {}
    for choice in ("on", "off"):
        given = ("--model", tiny_4bit_folder, "--adapter-path", tmp_path / "a", "--offload-base", choice, "--json")
        measured = run("evaluate", *given, "--data", chats)
        said = run("generate", *given, "--prompt", "Say 3.", "--max-tokens", 8, "--temp", 0)
        assert (measured.code, said.code) == (0, 0), measured.err + said.err
        found[choice] = json.loads(measured.out)["loss"], json.loads(said.out)["text"]
    assert found["on"][0] == pytest.approx(found["off"][0], rel=by_dtype(1e-4, 2e-3))
    assert found["on"][1] == found["off"][1]


@pytest.mark.slow
def test_steps_of_several_shapes_where_steps_are_compiled(tiny_4bit_folder, chats, tmp_path, monkeypatch):
    """A compiled step would keep the arrays of another trace, which units wait for."""
    monkeypatch.setattr(device, "COMPILE_FROM_STEPS", 1)
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["instruction"] += " please" * (number % 9)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained(tiny_4bit_folder, tmp_path / "rows.jsonl", tmp_path / "on", "--offload-base")
    off = ("--offload-base", "off", "--grad-checkpoint", "block")
    trained(tiny_4bit_folder, tmp_path / "rows.jsonl", tmp_path / "off", *off)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-2)
