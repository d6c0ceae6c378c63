"""Faults put into real runs: what is lost, what is said, and that `--resume` goes on. docs/development/faults.md has the table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from resumed_runs import metrics
from run_cli import holds, refused, run, succeeds
from tiers import by_default

from mlx_lora.data.batch import Batch, split_rows
from mlx_lora.trainer.checkpoint import locked, read_checkpoint
from mlx_lora.trainer.guards import MemoryGuard, Position, interrupt_flag
from mlx_lora.trainer.step import Step
from mlx_lora.utils import device, supervise
from mlx_lora.utils.console import describe_error

POISON = "Q"


def command(model, data, folder, *extra) -> tuple:
    return (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", 12, "--batch-tokens", 384,
        "--learning-rate", 5e-3, "--rank", 4, "--steps-per-report", 1, "--steps-per-eval", 0, "--save-every", 2,
        "--keep", 0, "--sample-tokens", 0, *extra,
    )  # fmt: skip


def start(*words, **options) -> subprocess.Popen:
    line = [sys.executable, "-m", "mlx_lora", *supervise.last_given([str(word) for word in words])]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, **options)


def wait_for(process: subprocess.Popen, words: str) -> None:
    """Read the process's lines until one starts with `words`."""
    for line in process.stderr:
        if line.startswith(words):
            return
    pytest.fail(f"ended without {words!r}")


def weights(folder) -> dict[str, mx.array]:
    return mx.load(str(folder / "adapters.safetensors"))


@pytest.fixture(scope="module")
def finished(tiny_folder, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "a"
    assert run(*command(tiny_folder, chats, folder, "--save-every", 0)).code == 0
    return folder


def is_finite(folder) -> bool:
    return all(mx.isfinite(value).all().item() for value in weights(folder).values())


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Return, for NaN and infinity, a model whose embedding of one letter is that, and rows of which some have the letter."""
    root = tmp_path_factory.mktemp("poisoned")
    token = byte_tokenizer().encode(POISON, add_special_tokens=False)[0]
    rows = [{"prompt": f"say {n}", "completion": (POISON if n % 8 == 0 else "b") * 5} for n in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {}
    for name in ("nan", "inf"):
        model = tiny_model(tie_word_embeddings=False)
        model.model.embed_tokens.weight[token] = float(name)
        folders[name] = write_folder(root / name, model, {"tie_word_embeddings": False})
    return folders, root / "rows.jsonl"


@pytest.mark.long
@pytest.mark.parametrize("kind", by_default(["nan", "inf"], "nan"))
def test_batches_that_are_not_finite_are_skipped_and_the_others_learn(kind, poisoned, tmp_path):
    folders, data = poisoned
    succeeds(*command(folders[kind], data, tmp_path / "a", "--batch-size", 4, "--iters", 20, "--val-batches", 0))
    skipped = [record["skipped_steps"] for record in metrics(tmp_path / "a")]
    assert 0 < skipped[-1] < 20
    assert skipped == sorted(skipped)
    assert is_finite(tmp_path / "a")
    assert any(mx.abs(value).max().item() > 0 for name, value in weights(tmp_path / "a").items() if "lora_b" in name)


@pytest.mark.long
def test_a_divergence_puts_the_last_good_checkpoint_back(poisoned, tmp_path):
    folders, data = poisoned
    rows = data.read_text().splitlines()
    bad = [row for row in rows if POISON in row]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(rows[1:5] + [row.replace("say", f"say {n}") for n in range(9) for row in bad])
    )
    words = command(
        folders["nan"], tmp_path / "rows.jsonl", tmp_path / "a", "--batch-size", 1, "--iters", 60, "--val-batches", 0
    )
    ran = run(*words, "--save-every", 1)
    assert ran.code == 1
    holds(ran.lines[-1], "not finite 10 times in a row", "is restored", "--learning-rate")
    left = sorted((tmp_path / "a" / "checkpoints").iterdir())
    assert read_checkpoint(left[-1]).position.skipped_in_a_row == 0
    assert is_finite(tmp_path / "a")
    assert (left[-1] / "adapters.safetensors").read_bytes() == (tmp_path / "a" / "adapters.safetensors").read_bytes()
    # Without a checkpoint: what the factors were before.
    ran = run(*words, "--adapter-path", tmp_path / "b", "--save-every", 0)
    assert (ran.code, "from before these steps is saved" in ran.err) == (1, True)
    assert is_finite(tmp_path / "b")


def test_factors_that_are_not_finite_are_never_saved(finished, tiny_folder, chats, tmp_path):
    broken = {name: value * float("nan") for name, value in weights(finished).items()}
    (tmp_path / "broken").mkdir()
    mx.save_safetensors(str(tmp_path / "broken" / "adapters.safetensors"), broken)
    file = tmp_path / "broken" / "adapters.safetensors"
    ran = run(*command(tiny_folder, chats, tmp_path / "a", "--resume-adapter-file", file))
    assert ran.code == 1
    assert "no adapter is saved" in ran.lines[-1]
    assert not list(tmp_path.glob("a/**/*.safetensors"))


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.long
@pytest.mark.parametrize("writing", by_default(["a checkpoint", "a report"], "a checkpoint"))
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(writing, disk, tiny_folder, chats):
    words = ("--iters", 60, "--keep", 1, "--steps-per-eval", 0)
    # Steps are quick: only the long run is sure to be in its middle still when the disk is full.
    endless = command(
        tiny_folder, chats, disk / "a", *words, "--lr-schedule", "constant", "--warmup", 5, "--iters", 10**6
    )
    every = 10**6 if writing == "a checkpoint" else 1
    with start(*endless, "--steps-per-report", every) as process:
        while process.poll() is None and not list(disk.glob("a/checkpoints/step-*")):
            time.sleep(0.01)
        with (disk / "filler").open("wb", buffering=0) as filler:
            while process.poll() is None:
                try:
                    filler.write(bytes(4096))
                except OSError:
                    time.sleep(0.001)
        rest = process.stderr.read()
        assert process.wait(60) == 1, rest
    assert "Traceback" not in rest
    assert "--resume" in rest.splitlines()[-1]
    (disk / "filler").unlink()
    for checkpoint in (disk / "a" / "checkpoints").glob("step-*"):
        read_checkpoint(checkpoint)
    taken = max(int(path.name[5:]) for path in (disk / "a" / "checkpoints").glob("step-*"))
    assert f"Resuming from step {taken}" in succeeds(*endless, "--resume", "--iters", taken + 3).err


@pytest.mark.slow
def test_a_data_file_that_goes_away_is_missed_only_by_the_next_run(tiny_folder, chats, tmp_path):
    data = Path(shutil.copy(chats, tmp_path / "rows.jsonl"))
    with start(*command(tiny_folder, data, tmp_path / "a", "--iters", 60)) as process:
        wait_for(process, "step 3/")
        data.unlink()
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
    ran = run(*command(tiny_folder, data, tmp_path / "a", "--iters", 80, "--resume"))
    assert (ran.code, len(ran.lines)) == (2, 1)
    assert "rows.jsonl" in ran.err


@pytest.mark.slow
def test_a_storm_of_signals_leaves_nothing_half_written(tiny_folder, chats, tmp_path):
    succeeds(*command(tiny_folder, chats, tmp_path / "whole", "--iters", 300, "--save-every", 5, "--keep", 2))
    storm = command(tiny_folder, chats, tmp_path / "a", "--iters", 300, "--save-every", 5, "--keep", 2)
    with start(*storm) as process:
        wait_for(process, "step 7/")
        for _ in range(50):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        rest = process.stderr.read()
        assert process.wait(30) in (130, -signal.SIGTERM), rest
    assert "Traceback" not in rest
    for checkpoint in (tmp_path / "a" / "checkpoints").glob("step-*"):
        read_checkpoint(checkpoint)
    succeeds(*storm, "--resume")
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapters.safetensors"
    ).read_bytes()


def test_a_second_run_in_a_folder_is_refused(tiny_folder, chats, tmp_path):
    with locked(tmp_path / "a"):
        refused(run(*command(tiny_folder, chats, tmp_path / "a", "--resume")), "another run is writing to it")


SPARED = """
import os, pathlib, subprocess, sys
from mlx_lora.trainer.guards import interrupt_flag
slow = pathlib.Path(sys.argv[1])
slow.joinpath("g++").write_text("#!/bin/sh\\necho ready\\nsleep 1\\necho done $1\\n")
slow.joinpath("g++").chmod(0o755)
os.environ["PATH"] = path = f"{slow}:{os.environ['PATH']}"
with interrupt_flag() as interrupted:
    subprocess.call("g++ 'a b' 2>&1", shell=True)  # as MLX does
    print(interrupted(), flush=True)
assert os.environ["PATH"] == path
try:
    subprocess.call("g++ 'a b' 2>&1", shell=True)
except KeyboardInterrupt:
    print("ended", flush=True)
"""


@pytest.mark.cpu("mlx compiles kernels with g++ for a CPU only, and only Linux's drops a signal mask")
def test_ctrl_c_spares_the_compiler_that_a_step_waits_for(tmp_path):
    """A terminal's Ctrl-C reaches the whole process group, and MLX's g++ is in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", SPARED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for expected in (["done a b", "True"], ["ended"]):
            assert process.stdout.readline().strip() == "ready"
            os.killpg(process.pid, signal.SIGINT)
            assert [process.stdout.readline().strip() for _ in expected] == expected
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("signalled", [True, False])
def test_a_compilation_that_a_signal_ended_is_an_interruption(signalled):
    def fail(words):
        with interrupt_flag():
            if signalled:
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError(words)

    with pytest.raises(KeyboardInterrupt if signalled else RuntimeError):
        fail("Could not load C++ shared library /tmp/a.so: No such file or directory")
    with pytest.raises(RuntimeError):
        fail("another")


@pytest.mark.slow
def test_ctrl_c_while_kernels_are_compiled_saves_and_ends(tiny_folder, chats, tmp_path):
    """An empty folder for kernels, a compiler that takes its time, and Ctrl-C while the first step waits for it."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "g++"
    slow.write_text(f'#!/bin/sh\necho "$$" >> {tmp_path}/compiles\nsleep 0.3\nexec {shutil.which("g++")} "$@"\n')
    slow.chmod(0o755)
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    out = tmp_path / "adapter"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lora.train", "--model", str(tiny_folder), "--data", str(chats), "--adapter-path", str(out),
         "--iters", "50", "--max-seq-length", "64", "--val-batches", "0", "--sample-tokens", "0"],
        stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stderr:
            if line.startswith("Run: "):  # the loop begins
                break
        before = (tmp_path / "compiles").read_text()
        while (tmp_path / "compiles").read_text() == before:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert "Interrupted after 1 step; the adapter is saved" in rest
    assert (out / "adapters.safetensors").is_file()


def test_a_closed_terminal_is_an_interruption_unless_nohup_says_otherwise():
    def hang_up() -> bool:
        with interrupt_flag() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            return interrupted()

    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert hang_up()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert not hang_up()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


# Validation


def test_early_stopping_ends_at_the_first_failures_and_the_best_is_kept(tiny_folder, chats, tmp_path):
    # A rate at which the held-out loss falls, then rises.
    words = command(tiny_folder, chats, tmp_path / "a", "--iters", 200, "--learning-rate", 3e-2, "--steps-per-eval", 5)
    ran = succeeds(*words, "--early-stopping-patience", 2, "--keep-best", "--keep", 1, "--valid-fraction", 0.4)
    validations = [(r["step"], r["val_loss"]) for r in metrics(tmp_path / "a") if r["val_loss"] is not None]
    best_step, _ = min(validations, key=lambda pair: pair[1])
    assert validations[-1][0] < 200, "it never got worse"
    assert [step for step, _ in validations[-3:]] == [best_step, best_step + 5, best_step + 10]
    assert "ended early" in ran.err
    kept = tmp_path / "a" / "checkpoints" / f"step-{best_step:06d}" / "adapters.safetensors"
    assert kept.read_bytes() == (tmp_path / "a" / "adapters.safetensors").read_bytes()
    # A run that goes on stands where it ended, and ends at once.
    again = run(*words, "--early-stopping-patience", 2, "--keep-best", "--keep", 1, "--valid-fraction", 0.4, "--resume")
    assert (again.code, "ended early" in again.err) == (0, True)
    assert kept.read_bytes() == (tmp_path / "a" / "adapters.safetensors").read_bytes()


def test_the_threshold_is_what_counts_as_better():
    at = Position()
    assert [at.validated(loss, 0.1) for loss in (1.0, 0.95, 0.8, float("nan"), 0.79)] == [True, True, True, False, True]
    assert (at.worse, at.best_loss) == (2, 0.79)
    at = Position()
    assert not at.validated(float("nan"))
    assert at.best_loss is None


def test_a_score_that_is_no_number_is_never_the_best():
    at = Position()
    scores = (float("nan"), 0.2, float("nan"), 0.9, 0.5)
    assert [at.validated(2.0, metric="task", score=score) for score in scores] == [False, True, False, True, False]
    assert (at.best_score, at.worse) == (0.9, 1)


# Memory


def a_batch(rows: int, width: int) -> Batch:
    random = np.random.default_rng(rows)
    tokens = random.integers(1, 200, (rows, width + 1)).astype(np.int32)
    return Batch.of(tokens[:, :-1], tokens[:, 1:], random.random((rows, width)) < 0.6)


@pytest.mark.parametrize(
    ("rows", "parts", "shapes"), [(5, 2, [3, 3]), (7, 3, [3, 3, 3]), (1, 4, [1]), (4, 9, [1] * 4), (6, 1, [6])]
)
def test_parts_hold_the_batch(rows, parts, shapes):
    whole = a_batch(rows, 11)
    cut = split_rows(whole, parts)
    assert [len(part.inputs) for part in cut] == shapes
    assert len({(part.inputs.shape, part.positions.shape) for part in cut}) == 1
    assert np.array_equal(np.concatenate([part.targets for part in cut])[:rows], whole.targets)
    assert np.array_equal(np.concatenate([part.targets[part.mask] for part in cut]), whole.targets[whole.mask])
    assert sum(part.real_tokens for part in cut) == whole.real_tokens
    for part in cut:
        assert part.weights.sum() == part.mask.sum()


@pytest.mark.long
@pytest.mark.float32("the parts' sums round otherwise than the batch's, and each step multiplies the difference")
def test_parts_give_the_same_updates(tiny_folder, chats, tmp_path):
    for name, parts in (("whole", 1), ("parts", 3)):
        assert run(*command(tiny_folder, chats, tmp_path / name, "--batch-parts", parts)).code == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in one.items():
        assert mx.allclose(value, other[name], atol=1e-5, rtol=1e-4).item(), name
    losses = [[r["loss"] for r in metrics(tmp_path / name) if r["loss"]] for name in ("whole", "parts")]
    assert np.allclose(*losses, rtol=1e-5)
    shapes = [{s for r in metrics(tmp_path / name) for s in r["shapes"]} for name in ("whole", "parts")]
    assert shapes[0] != shapes[1]


def test_over_its_limit_the_guard_doubles_the_parts_until_rows_are_single(logged):
    at = Position(taken=3)
    guard = MemoryGuard(at, 1)
    ballast = mx.ones(1000)
    mx.eval(ballast)
    guard.watch(rows=8)
    assert (at.parts, "same updates" in logged[0]) == (2, True)
    peak = guard.peak_bytes
    mx.eval(mx.ones(1001))
    guard.watch(rows=1)
    guard.watch(rows=1)
    assert (at.parts, len(logged)) == (2, 2)
    assert "--grad-checkpoint block" in logged[1]
    assert guard.peak_bytes >= peak > 0
    guard = MemoryGuard(at, device.current_device().working_set_bytes)
    guard.watch(rows=8)
    assert (at.parts, len(logged)) == (2, 2)
    MemoryGuard(at, 1, sorts="aot").watch(rows=8)
    assert (at.parts, "same updates" in logged[2]) == (4, False)


# Deaths

DYING = """
import os, signal, sys
from pathlib import Path
calls = Path(sys.argv[1])
calls.open("a").write(" ".join(sys.argv[2:]) + "\\n")
if len(calls.read_text().splitlines()) <= int(os.environ["DEATHS"]):
    by = os.environ["BY"]
    sys.exit(int(by)) if by.isdigit() else os.kill(os.getpid(), getattr(signal, by))
sys.exit(int(os.environ.get("CODE", 0)))
"""
FATES = {  # deaths, by which signal, the code it would end with -> code, processes
    "never": (0, "SIGSEGV", 0, 0, 1),
    "once": (1, "SIGABRT", 0, 0, 2),
    "twice": (2, "SIGKILL", 0, 0, 3),
    "too often": (9, "SIGSEGV", 0, 1, 3),
    "an error of its own": (0, "SIGSEGV", 2, 2, 1),
    "the GPU's memory, twice": (2, str(supervise.OUT_OF_MEMORY), 0, 0, 3),
    "the GPU's time": (1, str(supervise.OUT_OF_TIME), 0, 0, 2),
    "ended by somebody": (9, "SIGTERM", 0, 128 + signal.SIGTERM, 1),
}


@pytest.mark.parametrize("fate", FATES)
def test_the_supervisor_goes_on_after_deaths_alone(fate, tmp_path):
    deaths, by, code, expected, processes = FATES[fate]
    (tmp_path / "dying.py").write_text(DYING)
    environment = {**os.environ, "DEATHS": str(deaths), "BY": by, "CODE": str(code)}
    line = [
        sys.executable,
        supervise.__file__,
        "2",
        sys.executable,
        tmp_path / "dying.py",
        tmp_path / "calls",
        "--iters",
        "5",
    ]
    ran = subprocess.run([str(word) for word in line], env=environment, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (ran.returncode, len(calls)) == (expected, processes)
    assert "Traceback" not in ran.stderr
    added = ["", " --resume --batch-parts 2", " --resume --batch-parts 2 --grad-checkpoint block"]
    if by == str(supervise.OUT_OF_TIME):
        added[1] = " --resume --short-buffers"
    assert calls == [f"--iters 5{extra}" for extra in added[:processes]]


OF_METAL = "[METAL] Command buffer execution failed: {}."
GPU_FAILURES = {
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": supervise.OUT_OF_MEMORY,
    "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)": supervise.OUT_OF_TIME,
    "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)": supervise.OUT_OF_TIME,
}


@pytest.mark.parametrize("told", by_default(GPU_FAILURES, *list(GPU_FAILURES)[:2]))
def test_a_gpu_that_gives_up_is_one_line_and_the_run_goes_on(tiny_folder, chats, tmp_path, monkeypatch, told):
    words = [
        "--model",
        tiny_folder,
        "--data",
        chats,
        "--adapter-path",
        tmp_path / "a",
        "--iters",
        8,
        "--save-every",
        2,
        "--sample-tokens",
        0,
    ]
    plain = Step.__call__

    def failing(self, *args, **named):
        if self.taken == 5:
            raise RuntimeError(OF_METAL.format(told))
        return plain(self, *args, **named)

    monkeypatch.setattr(Step, "__call__", failing)
    ran = run("train", *words)
    assert (ran.code, "--resume" in ran.lines[-1]) == (GPU_FAILURES[told], True), ran.err
    assert told in ran.lines[-1]
    monkeypatch.setattr(Step, "__call__", plain)
    assert "Resuming from step 4" in succeeds("train", *words, "--resume").err


def test_another_error_of_mlx_stays_a_traceback():
    assert describe_error(RuntimeError(OF_METAL.format("Invalid Resource (00000009)"))) is None
    assert describe_error(RuntimeError("Insufficient Memory")) is None
    longest = "[metal::malloc] Attempting to allocate 9000000000 bytes which is greater than the maximum allowed buffer size of 1 bytes."
    assert describe_error(RuntimeError(longest))[1] == supervise.OUT_OF_MEMORY


@pytest.mark.slow
def test_a_supervised_run_dies_and_goes_on(tiny_folder, chats, tmp_path):
    words = command(tiny_folder, chats, tmp_path / "a", "--iters", 400, "--max-restarts", 2)
    with start(*words) as process:
        wait_for(process, "step 9/")
        subprocess.run(["pkill", "-SEGV", "-P", str(process.pid)], check=True)
        wait_for(process, "The training process died (SIGSEGV)")
        wait_for(process, "Resuming from step")
        wait_for(process, "step ")
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130, rest
    assert "Interrupted after" in rest
    assert read_checkpoint(max((tmp_path / "a" / "checkpoints").glob("step-*"))).position.parts == 2


@pytest.mark.slow
def test_without_its_supervisor_a_run_saves_and_ends(tiny_folder, chats, tmp_path):
    words = command(tiny_folder, chats, tmp_path / "a", "--iters", 1000000, "--max-restarts", 2, "--save-every", 0)
    with start(*words) as process:
        wait_for(process, "step 3/")
        process.kill()
        timer = threading.Timer(30, process.stderr.close)
        timer.start()
        rest = process.stderr.read()  # ends when the run, which holds the other end, does
        timer.cancel()
    assert "Interrupted after" in rest
    assert (tmp_path / "a" / "adapters.safetensors").exists()
