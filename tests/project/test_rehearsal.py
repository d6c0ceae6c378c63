"""The rehearsal of Metal finds a planted fault of each kind, and lets pass what a Mac can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta
from rehearsal import kernels

SITE = Path(__file__).parents[1] / "rehearsal" / "site"
# A program of ours on a Mac: each function is one fault, or its right form.
PLANTED = """
import multiprocessing
import os
import resource
from pathlib import Path

import mlx.core as mx


def float64_on_the_gpu(folder):
    return mx.zeros((2,), dtype=mx.float64)


def float64_on_the_cpu(folder):
    with mx.stream(mx.cpu):
        return mx.zeros((2,), dtype=mx.float64).sum().item()


def svd_without_a_stream(folder):
    return mx.linalg.svd(mx.eye(3))


def svd_on_the_gpu_inside_a_cpu_block(folder):
    with mx.stream(mx.cpu):
        return mx.linalg.svd(mx.eye(3), stream=mx.gpu)


def svd_on_the_cpu(folder):
    return mx.linalg.svd(mx.eye(3), stream=mx.cpu)[1].sum().item()


def a_fork(folder):
    if os.fork() == 0:
        os._exit(0)


def a_process_read(folder):
    return Path("/proc/meminfo").read_text()


def a_process_listed(folder):
    return os.listdir("/proc")


def affinity(folder):
    return os.sched_getaffinity(0)


def fadvise(folder):
    os.posix_fadvise(0, 0, 0, os.POSIX_FADV_DONTNEED)


def another_case(folder):
    (folder / "Adapter.json").write_text("1")
    (folder / "adapter.json").write_text("2")


def another_normal_form(folder):
    (folder / "M\\u00fcller").mkdir()
    (folder / "Mu\\u0308ller").mkdir()


def renamed_into_another_case(folder):
    (folder / "one").write_text("1")
    (folder / "ONE").mkdir()


def the_same_name_again(folder):
    for _ in range(2):
        (folder / "adapter.json").write_text("2")
    (folder / "adapter.json").rename(folder / "Adapter.json")  # APFS renames to another case


def experts_in_16_bits(folder):
    x, w = mx.ones((2, 1, 8), dtype=mx.bfloat16), mx.ones((4, 8, 8), dtype=mx.bfloat16)
    product = mx.gather_mm(x, w, rhs_indices=mx.array([0, 1]))
    assert product.dtype == mx.bfloat16
    return product.sum().item()


def packed_in_16_bits(folder):
    packed = mx.quantize(mx.ones((32, 512)), 32, 4)
    packed = [one.astype(mx.bfloat16) if one.dtype == mx.float32 else one for one in packed]
    product = mx.quantized_matmul(mx.ones((1, 512), dtype=mx.bfloat16), *packed, group_size=32, bits=4)
    assert product.dtype == mx.bfloat16
    return product.max().item()  # bfloat16 counts in ones to 256, and no further


def wired_more_than_the_working_set(folder):
    from mlx_lora.utils import device

    device.mx.set_wired_limit(device.current_device().working_set_bytes + 1)


def the_device(folder):
    from mlx_lora.utils import device, text

    here = device.current_device()
    device.wire_working_set()
    assert 10**7 < text.peak_bytes() < 10**11, "bytes, not KiB"
    assert text.start_mark(os.getpid())
    with mx.stream(mx.cpu):
        assert not device.on_gpu()
    assert device.on_gpu()
    return [here.backend, str(device.compute_dtype()), multiprocessing.get_start_method()]


def evaluated_by_another_thread(folder):
    from threading import Thread

    found, lazy = [], mx.ones(3) + 1

    def evaluate():
        try:
            mx.eval(lazy)
        except RuntimeError as error:
            found.append(error)

    thread = Thread(target=evaluate)
    thread.start()
    thread.join()
    raise found[0]
"""
RUN = """
import importlib.util, json, sys, tempfile
from pathlib import Path
import mlx_lora.utils.device, mlx_lora.utils.text
spec = importlib.util.spec_from_file_location("mlx_lora.planted", sys.argv[1])
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)
found = {}
for name, function in vars(planted).items():
    if getattr(function, "__module__", "") == "mlx_lora.planted":
        try:
            found[name] = ["passed", function(Path(tempfile.mkdtemp(dir=sys.argv[2])))]
        except Exception as error:
            found[name] = ["refused", f"{type(error).__name__}: {error}"]
print(json.dumps(found, default=str))
"""
REFUSED = {
    "float64_on_the_gpu", "svd_without_a_stream", "svd_on_the_gpu_inside_a_cpu_block", "a_fork", "a_process_read",
    "a_process_listed", "affinity", "fadvise", "another_case", "another_normal_form", "renamed_into_another_case",
    "wired_more_than_the_working_set", "evaluated_by_another_thread",
}  # fmt: skip


def rehearsed(code: str, *words: object, **variables: str) -> str:
    """Run a program of a rehearsed test, and return what it prints; it does not know whether this process is in float32."""
    own = {name: value for name, value in os.environ.items() if name != "MLX_LORA_REHEARSE_FLOAT32"}
    paths = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])
    environment = {**own, "MLX_LORA_REHEARSE": "1", "PYTHONPATH": paths, **variables}
    command = [sys.executable, "-c", code, *words]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    file = folder / "mlx_lora" / "planted.py"
    file.parent.mkdir()
    file.write_text(PLANTED)
    return json.loads(rehearsed(RUN, file, folder))


def test_every_planted_fault_is_found(planted):
    assert {name for name, (outcome, _) in planted.items() if outcome == "refused"} == REFUSED, planted


def test_a_program_of_a_rehearsed_test_believes_that_it_runs_on_a_mac(planted):
    assert planted["the_device"] == ["passed", ["metal", "mlx.core.bfloat16", "spawn"]]
    assert "no attribute 'sched_getaffinity'" in planted["affinity"][1]
    assert planted["svd_on_the_cpu"] == ["passed", 3.0]
    assert planted["experts_in_16_bits"] == ["passed", 128.0]
    assert planted["packed_in_16_bits"] == ["passed", 512.0]


def test_a_test_of_exact_equality_computes_in_float32_and_so_do_its_programs():
    program = "from mlx_lora.utils import device; print(*map(device.compute_dtype, ('auto', 'bfloat16')))"
    assert rehearsed(program).split() == ["mlx.core.bfloat16", "mlx.core.bfloat16"]
    assert rehearsed(program, MLX_LORA_REHEARSE_FLOAT32="1").split() == ["mlx.core.float32", "mlx.core.bfloat16"]


def test_a_metal_kernel_of_mlx_lm_has_no_gradient():
    q, k, v = (mx.random.normal((1, 5, 2, 32), key=mx.random.key(seed)) for seed in range(3))
    gates = [mx.random.normal((1, 5, 2), key=mx.random.key(9)), mx.random.normal((1, 5, 2), key=mx.random.key(8))]
    constants = [mx.zeros((2,)), mx.zeros((2,))]

    def total(q, use_kernel):
        return gated_delta.gated_delta_update(q, k, v, *gates, *constants, use_kernel=use_kernel)[0].sum()

    kernels.install()
    try:
        assert total(q, True).item() == pytest.approx(total(q, False).item(), rel=1e-4)
        mx.eval(mx.grad(lambda q: total(q, False))(q))
        with pytest.raises(ValueError, match="CustomKernel"):
            mx.eval(mx.grad(lambda q: total(q, True))(q))
    finally:
        kernels.remove()
