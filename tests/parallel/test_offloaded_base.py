"""--offload-base: the run in memory, with less of it, its tables in slices too; files that change or fail are noticed; one line for what cannot be."""

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
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from comparing import by_dtype
from conftest import quantized, tiny_model, write_folder
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, llama, qwen2
from resumed_runs import STEPS, WIDE, base_of_blocks, command, stopped_after, weights
from run_cli import run, succeeds

from mlx_lora.config.load import train_settings
from mlx_lora.kernels.measure import NO_NUMBER, SWITCH, Figures, keep_figures, read_figures
from mlx_lora.losses.agree import check_arrays
from mlx_lora.losses.cross_entropy import PLAIN, TILES, Arrays
from mlx_lora.losses.fused import head_loss
from mlx_lora.models.folder import stored_tensors
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel import offloaded_base
from mlx_lora.parallel import offloaded_base as base_reader
from mlx_lora.parallel import offloaded_base as stored_tables
from mlx_lora.parallel.offloaded_base import BaseFiles, Mode, OffloadedBase, StoredEmbedding, StoredLinear, StoredTable
from mlx_lora.planner.memory import MAX_SLICE
from mlx_lora.trainer import fit as trainer_fit
from mlx_lora.trainer.adapter import adapt
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.files import read_store, write_store

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
    ran = succeeds(*command(folder, chats, out, "--steps-per-report", 1, *extra))
    return ran


@pytest.mark.long
def test_it_learns_what_the_run_in_memory_learns(folder, chats, tmp_path):
    trained(folder, chats, tmp_path / "on", "--offload-base", "--iters", 6)
    trained(folder, chats, tmp_path / "off", "--offload-base", "off", "--grad-checkpoint", "block", "--iters", 6)
    on, off = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert len(on) == 6
    assert on == pytest.approx(off, rel=by_dtype(1e-3, 1e-2))
    assert on[0] == pytest.approx(off[0], rel=by_dtype(1e-5, 1e-3))
    assert on[-1] < on[0]


@pytest.mark.long
def test_a_slow_disk_makes_open_batches_larger_and_leaves_given_ones(tiny_folder, chats, tmp_path, monkeypatch):
    def most_tokens(bytes_per_s, *extra):
        monkeypatch.setattr(offloaded_base, "read_rate", lambda tensors: bytes_per_s)
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        succeeds("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, "--iters", 1, "--sample-tokens", 0,
                  "--offload-base", *extra)  # fmt: skip
        return yaml.safe_load((out / "run.yaml").read_text())["batch_tokens"]

    usual = most_tokens(1e15)
    assert most_tokens(1e3) > usual
    assert most_tokens(1e3, "--batch-tokens", usual) == usual


@pytest.mark.long
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
    tiny_4bit_folder, chats, tmp_path, monkeypatch, own_cache
):
    """Losses are those of a run that computes all blocks; another base's output is not used."""
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


@pytest.mark.long
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


@pytest.mark.long
def test_mlps_in_chunks_of_positions(tiny_4bit_folder, chats, tmp_path, monkeypatch):
    trained(tiny_4bit_folder, chats, tmp_path / "whole", "--offload-base", "--iters", 2)
    for home in ("planner.memory", "trainer.gradient_checkpointing"):
        monkeypatch.setattr(f"mlx_lora.{home}.CHUNKED_FROM_BYTES", 10_000)
    ran = trained(tiny_4bit_folder, chats, tmp_path / "chunks", "--offload-base", "--iters", 2)
    assert "in chunks" in ran.err
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.long
def test_a_head_that_is_not_at_hand_is_not_measured(chats, tmp_path, monkeypatch, own_cache):
    large = {"vocab_size": MAX_SLICE + 1}  # so that the head has two slices
    model = tiny_model(**large)
    quantized(model)
    folder = write_folder(tmp_path / "base", model, large | {"quantization": {"group_size": 32, "bits": 4}})
    monkeypatch.setenv(SWITCH, "1")
    succeeds(*command(folder, chats, tmp_path / "run", "--offload-base", "--kernels", "auto", "--iters", 1))
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


@pytest.mark.long
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


@pytest.mark.long
def test_what_does_not_fit_is_read_from_the_disk_by_itself(chats, tmp_path):
    wide = {**WIDE, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = write_folder(tmp_path / "base", tiny_model(**wide), wide)
    needed = []
    for choice in ("off", "on"):
        asked = ("--dry-run", "--offload-base", choice, "--batch-size", 1, "--grad-checkpoint", "block")
        plan = succeeds(*command(folder, chats, tmp_path / "p", *asked))
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
    monkeypatch.setattr(trainer_fit, "check_base_fits", lambda settings: None)  # as a short row would
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
    ran = succeeds("train", *asked, *more)
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


@pytest.mark.long
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


@pytest.mark.long
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


VOCABULARY = 4003
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
}  # fmt: skip
FAMILIES = {
    "tied": (llama, {"model_type": "llama", "tie_word_embeddings": True}),
    "untied": (qwen2, {"model_type": "qwen2", "tie_word_embeddings": False}),
    "capped": (gemma2, {"model_type": "gemma2", "head_dim": 32, "final_logit_softcapping": 5.0}),
}
LAYOUTS = {"float": {}, "4-bit": {"group_size": 32, "bits": 4}, "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}


def written(folder, family: str, layout: str):
    module, own = FAMILIES[family]
    config = {**SMALL, **own}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    if LAYOUTS[layout]:
        nn.quantize(model, **LAYOUTS[layout])
        config["quantization"] = LAYOUTS[layout]
    return write_folder(folder, model, config)


def opened(folder, offload: bool, **more) -> tuple[Base, OffloadedBase | None]:
    """Return an adapted model, whose B is not zero, in memory or in its files."""
    settings = train_settings({"model": str(folder), "data": "x", "sample_tokens": 0, "rank": 4, **more})
    base = load_base(settings.model, read=not offload)
    adapt(settings, base, objective_of(settings.objective), None)
    strategy = OffloadedBase() if offload else None
    if strategy is not None:
        strategy.divide(base, settings)
    mx.random.seed(1)
    for path, module in base.model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path))) * 0.05
    return base, strategy


def tables_of(base: Base) -> list[StoredTable]:
    return [module for module in base.model.modules() if isinstance(module, StoredTable)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "layout"),
    [("tied", "4-bit"), ("untied", "float"), ("untied", "mxfp4"), ("capped", "float"), ("capped", "4-bit")],
)
def test_loss_and_gradients_are_those_of_the_model_in_memory(family, layout, tmp_path):
    folder = written(tmp_path / "base", family, layout)
    whole, (stored, strategy) = opened(folder, False)[0], opened(folder, True)
    assert strategy is not None
    assert sum(isinstance(table, StoredEmbedding) for table in tables_of(stored)) == 1
    assert sum(isinstance(table, StoredLinear) for table in tables_of(stored)) == (family == "untied")
    assert all(len(table.parts()) > 1 for table in tables_of(stored))
    assert not any(unit.kept_bytes for table in tables_of(stored) for unit in [one.unit for one in table._slices.every])
    ids = mx.random.randint(0, VOCABULARY, (2, 17), key=mx.random.key(1))
    ids[0, :3] = mx.array([VOCABULARY - 1, 0, VOCABULARY - 1])
    close = {"rtol": by_dtype(1e-4, 2e-2), "atol": by_dtype(1e-5, 2e-2)}
    assert mx.allclose(whole.model(ids), stored.model(ids), **close)
    arrays = check_arrays(VOCABULARY, 24)
    for plain in (False, True):
        loss = PLAIN if plain else head_loss(find_head(stored.model, stored.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
        ours = loss_and_gradients(stored, loss, arrays, strategy)
        loss = PLAIN if plain else head_loss(find_head(whole.model, whole.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
        theirs = loss_and_gradients(whole, loss, arrays, None)
        assert ours[0] == pytest.approx(theirs[0], rel=by_dtype(1e-5, 1e-2))
        assert ours[1].keys() == theirs[1].keys()
        for name, gradient in theirs[1].items():
            assert np.linalg.norm(ours[1][name] - gradient) <= by_dtype(1e-4, 5e-2) * np.linalg.norm(gradient), name


@pytest.mark.parametrize(
    ("family", "layout", "method"),
    [("tied", "float", "lora"), ("untied", "float", "dora"), ("tied", "4-bit", "qa-lora"), ("untied", "4-bit", "lora")],
)
def test_dropout_outside_of_blocks_is_that_of_the_forward_pass(family, layout, method, tmp_path):
    """What is between the blocks is planned once for each block; all of these plans belong to one forward pass."""
    folder = written(tmp_path / "base", family, layout)
    targets = "embed_tokens,lm_head,q_proj" if family == "untied" else "embed_tokens,q_proj"
    more = {"dropout": 0.5, "target_modules": targets, "method": method}
    found = []
    for offload, seed in ((False, 7), (True, 7), (True, 8)):
        base, strategy = opened(folder, offload, **more)
        base.model.train()
        mx.random.seed(seed)
        value, gradients = loss_and_gradients(base, PLAIN, check_arrays(VOCABULARY, 24), strategy)
        found.append((value, gradients, mx.random.state[0].tolist()))
    theirs, ours, others = found
    assert ours[0] == pytest.approx(theirs[0], rel=by_dtype(1e-5, 1e-2))
    assert ours[2] == theirs[2]  # and the next step goes on as in memory
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        size = np.linalg.norm(gradient)
        assert np.linalg.norm(ours[1][name] - gradient) <= by_dtype(1e-4, 5e-2) * size, name
        assert np.linalg.norm(others[1][name] - gradient) > 0.1 * size > 0, name


def loss_and_gradients(base: Base, loss, arrays: Arrays, strategy: OffloadedBase | None):
    def total(batch):
        return loss.train(base.model, batch)

    take = nn.value_and_grad(base.model, total) if strategy is None else strategy.value_and_grad(base.model, total)
    (value, _), gradients = take(arrays)
    mx.eval(value, gradients)
    return value.item(), {name: np.array(g.astype(mx.float32)) for name, g in tree_flatten(gradients)}


def test_a_step_reads_each_slice_of_the_head_once(tmp_path, monkeypatch):
    base, strategy = opened(written(tmp_path / "base", "untied", "4-bit"), True)
    assert strategy is not None
    [head] = [table for table in tables_of(base) if isinstance(table, StoredLinear)]
    loss = head_loss(find_head(base.model, base.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    used, own = [], [one.unit._number for one in head._slices.every]
    real = type(strategy._files.reader).used
    monkeypatch.setattr(type(strategy._files.reader), "used", lambda self, unit: (used.append(unit), real(self, unit)))
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    assert [unit for unit in used if unit in own] == own
    blocks = [unit for unit in used if unit not in own]
    assert blocks == [*range(3), *reversed(range(3))]
    assert strategy._walk is not None
    assert not strategy._walk.results
    assert strategy._walk.mode is Mode.AT_ONCE


def test_only_a_slice_is_in_memory(tmp_path):
    """A vocabulary that is most of the model takes no memory, before, during and after a step."""
    folder = written(tmp_path / "base", "tied", "float")
    table = VOCABULARY * 64 * 4
    before = mx.get_active_memory()
    base, strategy = opened(folder, True)
    assert strategy is not None
    held = mx.get_active_memory() - before
    assert held < table / 2
    [embedding] = tables_of(base)
    slices = len(embedding.parts())
    assert slices > 5
    loss = head_loss(find_head(base.model, base.config), TILES, 1 << 14)  # pyright: ignore[reportArgumentType]
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    mx.clear_cache()
    mx.reset_peak_memory()
    loss_and_gradients(base, loss, check_arrays(VOCABULARY, 24), strategy)
    assert mx.get_peak_memory() - before < held + table
    assert mx.get_active_memory() - before < held + table / 2


def test_rows_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    base, _ = opened(written(tmp_path / "base", "untied", "float"), True)
    base.model(mx.array([[1, 2]]))
    monkeypatch.setattr(stored_tables.os, "preadv", lambda *_: 0)
    with pytest.raises(RunError, match=r"model\.safetensors"):
        base.model(mx.array([[3, 4]]))


@pytest.mark.slow
def test_a_run_with_a_large_vocabulary_says_that_nothing_stays(tmp_path, chats):
    folder, out = written(tmp_path / "base", "untied", "4-bit"), tmp_path / "run"
    succeeds("train", "--model", folder, "--data", chats, "--adapter-path", out, "--offload-base", "--iters", 2, "--batch-size", 2,
              "--steps-per-report", 1, "--learning-rate", "1e-2", "--chat-template", "chatml")  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if line.get("loss") is not None]
    assert len(found) == 2
    assert found[1] < found[0]
    plan = json.loads(
        run("plan", "--model", folder, "--data", chats, "--offload-base", "--batch-size", 2, "--json").out
    )
    tables = 2 * VOCABULARY * (64 // 2 + 2 * 2 * 64 // 32)
    whole = json.loads(
        run("plan", "--model", folder, "--data", chats, "--offload-base", "off", "--batch-size", 2, "--json").out
    )
    assert whole["model"]["base_bytes"] - plan["model"]["base_bytes"] > tables / 2
    assert (out / "adapters.safetensors").exists()
