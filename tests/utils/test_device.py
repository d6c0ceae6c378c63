"""The device, its units and its wired memory."""

from __future__ import annotations

import hashlib
import os
import sys

import mlx.core as mx
import numpy as np
import pytest
from run_cli import succeeds
from tiny_steps import adapted, batch, factors, make_step

from mlx_lora.losses.cross_entropy import PLAIN, plain_loss
from mlx_lora.objectives.base import BoundObjective
from mlx_lora.parallel.ranks import SeveralRanks
from mlx_lora.parallel.strategy import DataParallel
from mlx_lora.trainer.evaluate import mean_loss
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device
from mlx_lora.utils.files import sha256_of
from mlx_lora.utils.text import counted


@pytest.fixture
def restarts(monkeypatch):
    """What a restart would have run: program, arguments, environment."""
    seen = []
    monkeypatch.setattr(os, "execve", lambda *call: seen.append(call))
    for name in device.SHORT_BUFFERS:
        monkeypatch.delenv(name, raising=False)
    return seen


def test_short_buffers_start_the_program_anew_on_metal_alone(restarts, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    device.restart_with_short_buffers()
    assert restarts == []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")  # the user's own choice stays
    device.restart_with_short_buffers()
    [(program, arguments, environment)] = restarts
    assert (program, arguments[1:]) == (sys.executable, sys.orig_argv[1:])
    assert environment["MLX_MAX_OPS_PER_BUFFER"] == "7"
    assert environment["MLX_MAX_MB_PER_BUFFER"] == device.SHORT_BUFFERS["MLX_MAX_MB_PER_BUFFER"]
    assert environment.items() > device.SHORT_BUFFERS.items() - {("MLX_MAX_OPS_PER_BUFFER", "4")}
    # Started anew, everything is set, and it goes on.
    for name in device.SHORT_BUFFERS:
        monkeypatch.setenv(name, "1")
    device.restart_with_short_buffers()
    assert len(restarts) == 1


def test_waiting_leaves_nothing_under_way_and_the_same_factors(monkeypatch):
    submitted = []
    real = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (submitted.append(arrays), real(*arrays)))
    plain, waiting = adapted(), adapted()
    step = make_step(plain)
    patient = Step(waiting, make_step(waiting).optimizer, plain_loss, 1.0, StepOptions(wait=True))
    batches = [batch(2, 9, seed) for seed in range(2)]
    patient(batches)
    assert not submitted
    step(batches)
    assert len(submitted) == 3  # each micro-batch, and the update
    assert (factors(plain) == factors(waiting)).all()


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_reaches_the_step_and_the_header(flag, tiny_folder, chats, tmp_path, monkeypatch):
    waits = []
    real = Step.__init__
    monkeypatch.setattr(Step, "__init__", lambda self, *a, **k: (waits.append(a[4].wait), real(self, *a, **k))[1])
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    arguments = ["--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "out", "--iters", 1]
    ran = succeeds("train", *arguments, "--short-buffers" if flag else "--no-short-buffers")
    assert waits == [flag]
    assert any("a pause after each micro-batch" in line for line in ran.lines) is flag


def test_sigmoid_is_the_definition_to_float32s_rounding():
    x = np.concatenate([np.linspace(-30, 30, 4001), [-1e30, 1e30]]).astype(np.float32)
    expected = 0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))
    assert np.abs(np.array(device.sigmoid(mx.array(x))) - expected).max() <= 1.2e-7
    assert np.abs(np.array(mx.tanh(mx.array(x))) - expected).max() > 0.1
    half = mx.array(x).astype(mx.bfloat16)
    assert (device.sigmoid(half) == mx.sigmoid(half)).all()


def test_nothing_is_wired_with_the_cpu_as_the_device_of_a_mac(monkeypatch):
    wired = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(device, "current_device", lambda: device.Device("metal", "M9", 16, 12, ""))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    device.wire_working_set()
    assert wired == []
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    device.wire_working_set()
    assert wired == [12]


@pytest.mark.parametrize("waits", [True, False])
def test_a_validations_sum_over_ranks_is_waited_for_by_the_host_alone(waits, monkeypatch):
    done = []
    real = mx.eval
    monkeypatch.setattr(device, "host_waits_for_peers", lambda: waits)
    monkeypatch.setattr(mx, "eval", lambda *arrays: (done.append("computed"), real(*arrays)))
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, group, stream: (done.append("sent"), 2 * array)[1])

    class Two:
        rank, size = (lambda self: 0), (lambda self: 2)

    monkeypatch.setattr(SeveralRanks, "everyone", lambda self, value: [value, value])
    task = BoundObjective(PLAIN)
    found = mean_loss(adapted(), task, [batch(2, 9, 0)], DataParallel(SeveralRanks(Two())))
    assert done == (["computed", "computed", "sent", "computed"] if waits else ["computed", "sent"])
    alone = mean_loss(adapted(), task, [batch(2, 9, 0)])
    assert (found.loss, found.count) == (pytest.approx(alone.loss), 2 * alone.count)


@pytest.mark.parametrize(("gpu", "steps", "wanted"), [(False, 10, "off"), (False, 1000, "on"), (True, 10, "on")])
def test_a_short_run_on_a_cpu_does_without_the_compiler(gpu, steps, wanted, monkeypatch):
    said = []
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    monkeypatch.setattr(mx, "enable_compile", lambda: said.append("on"))
    monkeypatch.setattr(mx, "disable_compile", lambda: said.append("off"))
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    device.compile_for(steps)
    assert said == [wanted]
    with device.uncompiled():
        assert said[-1] == "off"
    assert said[1:] == (["off"] if wanted == "off" else ["off", "on"])
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    device.compile_for(steps)
    assert said[-1] == "off"


def test_a_containers_limit_bounds_its_memory(tmp_path):
    v2, v1 = tmp_path / "v2", tmp_path / "v1" / "memory"
    for folder in (v2, v1):
        folder.mkdir(parents=True)
    (v2 / "memory.current").write_text("700\n")
    (v2 / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    (v2 / "memory.max").write_text("1000\n")
    assert device.container_memory(v2) == (1000, 550)
    (v2 / "memory.max").write_text("max\n")
    unlimited = device.container_memory(v2)
    assert min(unlimited) > 10**15
    (v1 / "memory.limit_in_bytes").write_text("2000\n")
    (v1 / "memory.usage_in_bytes").write_text("2100\n")
    (v1 / "memory.stat").write_text("inactive_file 10\ntotal_inactive_file 50\n")
    assert device.container_memory(v1.parent) == (2000, 0)
    assert device.container_memory(tmp_path / "none") == unlimited


@pytest.mark.parametrize(
    ("number", "several", "words"),
    [(0, None, "0 batchs"), (1, "batches", "1 batch"), (2, "batches", "2 batches"), (12345, None, "12,345 batchs")],
)
def test_counts_are_words(number, several, words):
    assert counted(number, "batch", several) == words


def test_a_text_and_the_file_that_holds_it_have_one_digest(tmp_path):
    text = "Añ 😀" * 99_999
    (tmp_path / "text").write_text(text, encoding="utf-8")
    assert sha256_of(tmp_path / "text") == sha256_of(text) == hashlib.sha256(text.encode()).hexdigest()
    assert sha256_of(text + " ") != sha256_of(text)
    assert sha256_of(str(tmp_path / "text")) != sha256_of(tmp_path / "text")
    assert len(sha256_of("\ud800")) == 64  # half a character, which JSON and YAML may spell
