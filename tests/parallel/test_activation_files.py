"""--offload-activations: the same bytes as without it, in less memory; files that are left or cannot be written."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import tiny_model, write_folder
from mlx.utils import tree_flatten
from resumed_runs import WIDE, base_of_blocks, command, stopped_after, weights
from run_cli import run, succeeds

from mlx_lora.config.load import train_settings
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel import offloaded_base
from mlx_lora.parallel.offloaded_base import ActivationFiles, OffloadedBase
from mlx_lora.planner.memory import OFFLOADED_ENDS
from mlx_lora.trainer.adapter import adapt
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.utils.errors import RunError

ON = ("--offload-base", "--offload-activations", "--steps-per-report", 1)


OTHERS = [pytest.param(one, marks=pytest.mark.slow) for one in ("mixture", "gemma2")]


@pytest.fixture(scope="module", params=["affine", *OTHERS])
def folder(request, tmp_path_factory):
    return base_of_blocks(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(autouse=True)
def small_arrays_too(monkeypatch):
    monkeypatch.setattr(offloaded_base, "LEAST_BYTES", 1)


def trained(model, chats, out, *extra):
    succeeds(*command(model, chats, out, *ON, *extra))


@pytest.mark.long
def test_a_run_learns_the_same_bytes_and_resumes_to_them(folder, chats, tmp_path, monkeypatch):
    written, put = [], ActivationFiles.put

    def noted(self, array):
        written.append(array.nbytes)
        return put(self, array)

    monkeypatch.setattr(ActivationFiles, "put", noted)
    trained(folder, chats, tmp_path / "disk", "--save-every", 2, "--iters", 4)
    assert sum(written) > 0
    succeeds(*command(folder, chats, tmp_path / "memory", "--offload-base", "--steps-per-report", 1, "--iters", 4))
    assert weights(tmp_path / "disk") == weights(tmp_path / "memory")
    assert not (tmp_path / "disk" / offloaded_base.FOLDER).exists()
    copy = stopped_after(tmp_path / "disk", tmp_path / "copy", 2)
    left = copy / offloaded_base.FOLDER / "0.safetensors"  # by a run that was killed
    left.parent.mkdir()
    left.touch()
    trained(folder, chats, copy, "--save-every", 2, "--iters", 4, "--resume", "auto")
    assert weights(copy) == weights(tmp_path / "disk")
    assert not left.exists()


def most_kept(model_folder, tmp_path, activations, monkeypatch) -> tuple[int, dict]:
    """Return the most memory between the blocks of a step of one long row, and its gradients."""
    settings = train_settings({"model": str(model_folder), "data": "none", "rank": 4, "offload_base": "on"})
    base = load_base(settings.model, read=False)
    adapt(settings, base, objective_of(settings.objective), None)
    strategy = OffloadedBase(activations=tmp_path if activations else None)
    strategy.divide(base, settings)
    apply_checkpointing(base.model, "block")
    most, ids = 0, mx.random.randint(0, 256, (1, 1024), key=mx.random.key(0))
    computed, before = offloaded_base.Walk.computed, mx.get_active_memory()

    def watched(self, segment):
        nonlocal most
        made = computed(self, segment)
        most = max(most, mx.get_active_memory() - before)
        return made

    def loss(model, ids):
        return model(ids).square().mean()

    with monkeypatch.context() as patch:
        patch.setattr(offloaded_base.Walk, "computed", watched)
        _, gradients = strategy.value_and_grad(base.model, lambda ids: loss(base.model, ids))(ids)
    return most, gradients


@pytest.mark.slow
def test_what_blocks_keep_does_not_add_up(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "base", tiny_model(**WIDE), dict(WIDE))
    row = 1024 * WIDE["hidden_size"] * 4
    in_memory, wanted = most_kept(folder, tmp_path, False, monkeypatch)
    on_disk, found = most_kept(folder, tmp_path, True, monkeypatch)
    assert in_memory > WIDE["num_hidden_layers"] * row
    assert on_disk < in_memory - (WIDE["num_hidden_layers"] - OFFLOADED_ENDS) * row
    for (name, one), (_, other) in zip(tree_flatten(wanted), tree_flatten(found), strict=True):
        assert mx.array_equal(one, other), name


@pytest.mark.long
def test_a_full_disk_is_one_line_and_the_adapter_is_saved(folder, chats, tmp_path, monkeypatch):
    save, calls = mx.save_safetensors, []

    def full(path, arrays, **more):
        if offloaded_base.FOLDER in str(path):
            calls.append(path)
            if len(calls) > 100:
                raise RuntimeError("[write] Unable to write 4096 bytes to file.")
        return save(path, arrays, **more)

    monkeypatch.setattr(mx, "save_safetensors", full)
    ran = run(*command(folder, chats, tmp_path / "run", *ON))
    assert ran.code == 1
    assert "--offload-activations" in ran.lines[-1]
    assert (tmp_path / "run" / "adapters.safetensors").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line)["loss"] for line in lines)
    assert not (tmp_path / "run" / offloaded_base.FOLDER).exists()


def test_a_file_that_ends_early_is_noticed(tmp_path, monkeypatch):
    files = ActivationFiles(tmp_path)
    monkeypatch.setattr(mx, "save_safetensors", lambda path, arrays, metadata: open(path, "w").close())
    with pytest.raises(RunError):
        files.put(mx.zeros(8))


def test_what_one_block_returns_and_the_next_one_gets_is_one_file(tmp_path):
    files = ActivationFiles(tmp_path)
    walk = offloaded_base.Walk(files=files)
    x, z, mask = mx.arange(2048.0), mx.arange(2048.0) + 1, mx.zeros((64, 64))

    def segment(given: list, output: mx.array) -> SimpleNamespace:
        return SimpleNamespace(
            given=given, primals=given, forward=lambda primals: ([output], []), give=given.__init__, result=lambda z: z
        )

    (first,) = walk.computed(segment([x, mask], z))
    assert files.bytes == x.nbytes + z.nbytes
    walk.computed(segment([z, mask], z * 2))
    assert files.bytes == x.nbytes + 2 * z.nbytes
    own, shared = walk.calls[1].places
    assert shared() is mask
    assert mx.array_equal(own(), z)
    assert mx.array_equal(first, z)
    walk.end()
    assert not (tmp_path / offloaded_base.FOLDER).exists()


def test_it_requires_a_base_that_is_read_from_its_files(tiny_4bit_folder, chats, tmp_path):
    ran = run(
        "train", "--model", tiny_4bit_folder, "--data", chats, "--adapter-path", tmp_path / "a", "--offload-activations"
    )
    assert ran.code == 2
    assert "--offload-base" in ran.err


@pytest.mark.long
def test_the_plan_counts_what_is_on_the_disk(folder, chats):
    asked = ("plan", "--model", folder, "--max-seq-length", 4096, "--batch-size", 1, "--offload-base", "--json")
    memory, disk = (json.loads(run(*asked, *more).out) for more in ((), ("--offload-activations",)))
    assert disk["parts"]["activations"] < memory["parts"]["activations"]
    assert disk["predicted"]["reading"]["activation_bytes"] > 0
    assert memory["predicted"]["reading"]["activation_bytes"] == 0
    assert disk["predicted"]["step_s"] > memory["predicted"]["step_s"]
