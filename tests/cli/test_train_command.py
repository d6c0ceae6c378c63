"""The train command end to end on a tiny model: what it writes, prints, and does when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import mlx.core as mx
import pytest
import yaml
from conftest import tiny_model, write_folder
from run_cli import run, succeeds
from tiers import by_default

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import LoopSettings
from mlx_lora.trainer.guards import interrupt_flag
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.trainer import Outcome, report_interval
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

QUICK = (
    "--iters",
    12,
    "--learning-rate",
    "5e-3",
    "--batch-tokens",
    256,
    "--max-seq-length",
    128,
    "--steps-per-report",
    4,
)


@pytest.fixture(scope="module")
def trained(tiny_folder, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "adapter"
    ran = succeeds("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, *QUICK, "--save-every", 5)
    return out, ran


def test_run_folder_is_complete(trained):
    out, _ = trained
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapters.safetensors", "checkpoints", "held_out_rows.jsonl", "metrics.jsonl",
        "report.html", "report.json", "run.yaml",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000005", "step-000010", "step-000012"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if line["loss"] is not None]
    assert [line["step"] for line in reports] == [4, 8, 12]
    assert reports[-1]["loss"] < reports[0]["loss"]
    assert [line["step"] for line in lines if line["val_loss"] is not None] == [0, 12]
    for key in (
        "epoch",
        "learning_rate",
        "grad_norm",
        "supervised_tokens_per_s",
        "tokens_per_s",
        "examples",
        "supervised_tokens",
        "real_tokens",
        "positions",
        "shapes",
        "padding_fraction",
        "peak_memory_bytes",
        "elapsed_s",
    ):
        assert key in reports[0]


@pytest.mark.long
def test_counts_of_the_lines_add_up_to_the_run(tiny_folder, chats, tmp_path):
    def lines(name: str, *more: object) -> list[dict]:
        succeeds(
            "train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / name, *QUICK[2:6],
            "--max-seq-length", 128, "--iters", 7, *more,
        )  # fmt: skip
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    # A validation at every second step falls into the middle of a report's window of three.
    few = lines("few", "--steps-per-report", 3, "--steps-per-eval", 2)
    each = lines("each", "--steps-per-report", 1, "--val-batches", 0)
    assert [line["step"] for line in few if line["val_loss"] is None] == [3, 6, 7]
    assert len(each) == 7
    for key in ("examples", "supervised_tokens", "real_tokens", "positions"):
        assert sum(line[key] for line in few) == sum(line[key] for line in each) > 0, key
        assert all(line[key] == 0 for line in few if line["val_loss"] is not None), key
    assert {name for line in few for name in line["shapes"]} == {name for line in each for name in line["shapes"]}
    for line in each:
        (shape,) = line["shapes"]
        rows, width = map(int, shape.split("x"))
        assert 0 < line["examples"] <= rows
        assert 0 < line["supervised_tokens"] < line["real_tokens"] <= line["positions"] == rows * width
        assert line["padding_fraction"] == pytest.approx(1 - line["real_tokens"] / line["positions"])
    assert few[-1]["shapes"] == []


def test_what_is_printed_before_and_during_the_run(trained):
    _, ran = trained
    assert ran.out == ""
    for part in ("trainable parameters", " MB", "rank 16", "step 12/12", "⟦", "held-out loss"):
        assert part in ran.err, part


@pytest.mark.long
def test_run_yaml_repeats_the_run(trained, tmp_path):
    out, _ = trained
    again = tmp_path / "again"
    succeeds("train", "--config", out / "run.yaml", "--adapter-path", again)
    assert yaml.safe_load((again / "run.yaml").read_text())["batch_tokens"] == 256
    first, second = (mx.load(str(f / "adapters.safetensors")) for f in (out, again))
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    other = tmp_path / "other"
    assert run("train", "--config", out / "run.yaml", "--adapter-path", other, "--seed", 1).code == 0
    third = mx.load(str(other / "adapters.safetensors"))
    assert not all(mx.array_equal(first[name], third[name]) for name in first)


@pytest.mark.long
def test_python_trains_to_the_same_bytes_as_the_command_and_prints_nothing(
    trained, tiny_folder, chats, tmp_path, capfd, monkeypatch
):
    for name in ("init", "all_sum", "all_gather"):  # a single process builds no collective
        monkeypatch.setattr(mx.distributed, name, None)
    flags = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(QUICK[::2], QUICK[1::2], strict=True)
    }
    flags |= {"model": str(tiny_folder), "data": str(chats), "save_every": 5}

    def train(name: str, **more) -> tuple[Outcome, bytes]:
        outcome = train_run(train_settings({**flags, "adapter_path": str(tmp_path / name), **more}))
        return outcome, (tmp_path / name / "adapters.safetensors").read_bytes()

    outcome, same = train("same")
    assert capfd.readouterr() == ("", "")
    expected = trained[0]
    records = [json.loads(line) for line in (expected / "metrics.jsonl").read_text().splitlines()]
    assert outcome == Outcome(12, records[-1]["val_loss"], interrupted=False)
    assert same == (expected / "adapters.safetensors").read_bytes()
    settings = [yaml.safe_load((folder / "run.yaml").read_text()) for folder in (expected, tmp_path / "same")]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"adapter_path"}
    lines: list[str] = []
    with console.log_to(lines.append):
        _, other = train("other", seed=1, val_batches=0)
    assert other != same
    assert any(line.startswith("12 steps done") for line in lines)
    with pytest.raises(InputError, match="already holds an adapter"):
        train("same")


def test_evaluate_and_generate_with_and_without_the_adapter(trained, tiny_folder, chats):
    out, _ = trained
    base = json.loads(run("evaluate", "--model", tiny_folder, "--data", chats, "--json").out)
    tuned = json.loads(run("evaluate", "--model", tiny_folder, "--adapter-path", out, "--data", chats, "--json").out)
    assert tuned["loss"] < base["loss"] * 0.9
    assert tuned["supervised_tokens"] == base["supervised_tokens"] > 0
    ran = run(
        "generate", "--model", tiny_folder, "--adapter-path", out, "--prompt", "Say 1.", "--max-tokens", 5, "--json"
    )
    assert {"text", "tokens", "tokens_per_s"} <= set(json.loads(ran.out))


@pytest.mark.long
def test_qlora_on_a_4bit_base_lowers_the_loss(tiny_4bit_folder, chats, tmp_path):
    succeeds("train", "--model", tiny_4bit_folder, "--data", chats, "--adapter-path", tmp_path / "q", *QUICK)
    vals = [json.loads(x)["val_loss"] for x in (tmp_path / "q/metrics.jsonl").read_text().splitlines()]
    vals = [v for v in vals if v is not None]
    assert vals[-1] < vals[0] * 0.95


def test_test_flag_measures_as_mlx_lm_does(trained, tiny_folder, chats, tmp_path):
    out, _ = trained
    folder = tmp_path / "data"
    folder.mkdir()
    rows = chats.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:30]))
    (folder / "test.jsonl").write_text("".join(rows[30:]))
    ran = succeeds("train", "--model", tiny_folder, "--data", folder, "--adapter-path", out, "--test")
    assert "Test loss" in ran.err
    assert "step 1" not in ran.err  # --test alone does not train
    ran = run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, "--test")
    assert ran.code == 2
    assert "no test split" in ran.err


@pytest.mark.long
def test_epochs_accumulation_checkpointing_and_rows(tiny_folder, chats, tmp_path):
    succeeds(
        "train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", "--epochs", 2, "--batch-size", 4,
        "--grad-accumulation-steps", 2, "--grad-checkpoint", "--fine-tune-type", "rslora", "--dropout", 0.1, "--num-layers", 1,
        "--target-modules", "q_proj,v_proj", "--optimizer", "adam",
    )  # fmt: skip
    last = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 10  # 38 training rows, 10 batches an epoch, 2 a step, 2 epochs
    assert last["epoch"] == 2.0
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == pytest.approx(32 / 4)  # alpha / sqrt(16)


@pytest.mark.long
def test_resume_adapter_file_starts_from_its_factors(trained, tiny_folder, chats, tmp_path):
    out, _ = trained
    args = ("--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "more", *QUICK[2:], "--iters", 1)
    assert run("train", *args, "--resume-adapter-file", out / "adapters.safetensors").code == 0
    peft = tmp_path / "peft"
    base = ("--model", tiny_folder, "--adapter-path", out)
    assert run("export", *base, "--to", "peft", "--out", peft).code == 0
    for number, source in enumerate((out, peft, peft / "adapter_model.safetensors")):
        again = (*args[:4], "--adapter-path", tmp_path / f"again{number}", *args[6:])
        ran = succeeds("train", *again, "--resume-adapter-file", source)
        losses = [json.loads((tmp_path / f / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
                  for f in ("more", f"again{number}")]  # fmt: skip
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    ran = run("train", *args[:4], "--adapter-path", tmp_path / "b", "--rank", 3, "--resume-adapter-file", peft)
    assert (ran.code, "--rank" in ran.lines[-1]) == (2, True)
    (tmp_path / "empty").mkdir()
    ran = run("train", *args, "--force", "--resume-adapter-file", tmp_path / "empty")
    assert (ran.code, "adapter_model.safetensors" in ran.lines[-1]) == (2, True)
    records = [json.loads(x) for x in (tmp_path / "more/metrics.jsonl").read_text().splitlines()]
    before = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["val_loss"] == pytest.approx(before[-1]["val_loss"], rel=1e-4)
    assert records[0]["val_loss"] < before[0]["val_loss"] * 0.95


@pytest.mark.long
@pytest.mark.parametrize("signal_number", by_default([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_interrupt_saves_and_exits_130(tiny_folder, chats, tmp_path, signal_number):
    out = tmp_path / "a"
    command = [sys.executable, "-m", "mlx_lora.train", "--model", tiny_folder, "--data", chats, "--adapter-path", out]
    with subprocess.Popen(
        [
            str(c)
            for c in (*command, "--iters", 100000, "--steps-per-report", 5, "--save-every", 0, "--steps-per-eval", 0)
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        deadline = time.monotonic() + 60
        for line in process.stderr:
            if line.startswith("step 5/") or time.monotonic() > deadline:
                break
        process.send_signal(signal_number)
        rest = process.stderr.read()
        assert process.wait(30) == 130, rest
    assert "Interrupted after" in rest
    assert "Traceback" not in rest
    assert "held-out loss" not in rest  # the one from before the first step is not this adapter's
    assert "To continue" not in rest  # with --save-every 0 there is no checkpoint
    assert (out / "adapters.safetensors").exists()
    assert run("generate", "--model", tiny_folder, "--adapter-path", out, "--prompt", "x", "--max-tokens", 1).code == 0


def test_second_interrupt_ends_at_once():
    def interrupt_twice():
        with interrupt_flag() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupted()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    # A third finds the system's own handler: no Python runs in it, so it leaves no traceback behind.
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_evaluate_says_what_it_left_out_each_time(tiny_folder, tmp_path):
    rows = [{"prompt": "p" * 10, "completion": "c" * 10}, {"id": 7}, {"prompt": "p" * 10, "completion": "c" * 200}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("evaluate", "--model", tiny_folder, "--data", data, "--max-seq-length", 100, "--json")
    for _ in range(2):  # the second time from the cache
        ran = run(*command)
        assert "rows.jsonl line 2" in ran.err
        assert "1 row cut" in ran.err
        assert json.loads(ran.out)["rows"] == 2


def test_force_does_not_leave_an_earlier_runs_checkpoints(tiny_folder, chats, tmp_path):
    old = tmp_path / "a/checkpoints/step-000099"
    old.mkdir(parents=True)
    assert (
        run(
            "train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", "--iters", 1, "--force"
        ).code
        == 0
    )
    assert not old.exists()


@pytest.mark.long
def test_only_a_verbose_header_names_loss_shapes_and_matmul_path(tiny_4bit_folder, chats, tmp_path):
    words = ("train", "--model", tiny_4bit_folder, "--data", chats, "--iters", 1, "--adapter-path")
    plain, verbose = run(*words, tmp_path / "a"), run(*words, tmp_path / "b", "--verbose")
    for ran, shown in ((plain, False), (verbose, True)):
        found = [line for line in ran.lines if line.startswith("Step: ")]
        assert len(found) == shown
        assert "; planned peak " in next(line for line in ran.lines if line.startswith("Run: "))
    (line,) = found
    assert "fused cross-entropy" in line
    assert "batch shape" in line
    assert "dense product from" in line
    # Whoever did not ask finds it in the report.
    assert "fused cross-entropy" in (tmp_path / "a" / "report.html").read_text()


def test_resume_file_of_another_base_is_refused(trained, chats, tmp_path):
    out, _ = trained
    other = write_folder(tmp_path / "other", tiny_model(seed=9))
    ran = run(
        "train",
        "--model",
        other,
        "--data",
        chats,
        "--adapter-path",
        tmp_path / "a",
        "--resume-adapter-file",
        out / "adapters.safetensors",
    )
    assert ran.code == 2
    assert "a different base" in ran.lines[-1]


def contents(folder) -> dict:
    """Every file of a folder, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_forced_run_that_is_interrupted_before_its_first_step_leaves_the_earlier_one(
    tiny_folder, chats, tmp_path, monkeypatch
):
    out = tmp_path / "adapter"
    arguments = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, *QUICK[2:-2], "--iters", 2)
    assert run(*arguments, "--save-every", 1).code == 0
    reported = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in reported if line["loss"] is not None] == [1, 2]
    before = contents(out)

    with monkeypatch.context() as at_once:
        at_once.setattr("mlx_lora.trainer.run.interrupt_flag", lambda: nullcontext(lambda: True))
        interrupted = run(*arguments, "--seed", 1, "--force")
    assert interrupted.code == 130
    assert contents(out) == before
    assert f"adapter in {out} is unchanged" in interrupted.err
    assert "0 steps done; nothing to save" in interrupted.err

    # What a killed run left aside is the next one's to put back, or to replace.
    (out / "earlier-run").mkdir()
    (out / "adapters.safetensors").rename(out / "earlier-run" / "adapters.safetensors")
    succeeds(*arguments, "--seed", 1, "--force")
    after = contents(out)
    assert not [name for name in after if name.startswith("earlier-run")]
    assert sorted(name for name in after if "/" not in name) == sorted(name for name in before if "/" not in name)
    assert after["adapters.safetensors"] != before["adapters.safetensors"]
    assert not [name for name in after if "step-000001" in name]  # of the run before


def test_a_run_of_any_length_reports_about_twenty_times_unless_told_how_often():
    intervals = {total: report_interval(total, LoopSettings()) for total in (1, 6, 39, 40, 200, 500, 10_000)}
    assert intervals == {1: 1, 6: 1, 39: 1, 40: 2, 200: 10, 500: 25, 10_000: 25}
    assert report_interval(6, LoopSettings(steps_per_report=10)) == 10
