"""What computes the answers that a run samples: float copies of frozen weights, the adapter as it is, and one form per run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from run_cli import passed, run, succeeds

from mlx_lora.adapters.inject import adapt_model, adapter_layers
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.kernels.quantized_matmul import DENSE
from mlx_lora.models import generator as sampling_form
from mlx_lora.models.generator import SamplingOptions, TokenSteps, answer_keys, sample_groups
from mlx_lora.models.load import load_base
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.planner.memory import MemoryPlan
from mlx_lora.rollouts.rollout import SamplingForm, choose_sampling
from mlx_lora.trainer.checkpoint import read_checkpoint
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

PLENTY = 1 << 40
PROMPTS = [[72, 101, 108, 108], [111, 33]]
QUICK = ("--learning-rate", "1e-2", "--batch-size", 2, "--group-size", 4, "--max-new-tokens", 8, "--sample-tokens", 0,
         "--kernels", "ours", "--val-batches", 0, "--steps-per-report", 1, "--rank", 4, "--warmup", 0, "--keep", 0)  # fmt: skip
pytestmark = pytest.mark.skipif(device.on_gpu(), reason="a GPU uses mlx's own kernels")


def base_of(folder: Path, form: str = "auto"):
    return load_base(ModelSettings(model=str(folder), decode_weights=form))


def adapted(folder: Path, targets: str = "all-linear"):
    """A 4-bit base with an adapter that changes what it says."""
    base = base_of(folder)
    adapt_model(base.model, AdapterSettings(rank=4, target_modules=targets), 0)
    for layer in adapter_layers(base.model).values():
        layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    base.model.eval()
    return base


def copies(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if DENSE in layer]


def sampled(base, form: SamplingForm):
    options, keys = SamplingOptions(4, 10), answer_keys(0, 0, 8)
    with form.model_of(base) as model:
        held = len(copies(base.model))
        return *sample_groups(model, PROMPTS, options, frozenset(), keys), held


def test_copies_are_of_frozen_weights_and_the_adapter_counts_as_it_is(tiny_4bit_folder):
    base = adapted(tiny_4bit_folder)
    forms = {name: choose_sampling(base, 8, PLENTY, ALONE, {"sampled_by": name}) for name in ("dense", "packed")}
    found = {name: sampled(base, form) for name, form in forms.items()}
    assert [found[name][2] > 0 for name in forms] == [True, False]
    assert not copies(base.model)
    answers, logps = sample_groups(base.model, PROMPTS, SamplingOptions(4, 10), frozenset(), answer_keys(0, 0, 8))
    for name in ("dense", "packed"):
        assert found[name][0] == answers
        for ours, theirs in zip(found[name][1], logps, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for layer in adapter_layers(base.model).values():
        layer.lora_b = 2 * layer.lora_b
    again = sampled(base, forms["dense"])
    changed = np.concatenate(again[1])[:4] - np.concatenate(logps)[:4]
    assert np.abs(changed).max() > 1e-2  # the adapter of now, not the one of the rollout before
    assert again[0] == sampled(base, forms["packed"])[0]


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_layers_beside_the_adapter_have_copies_under_checkpointing_too(mode, tiny_4bit_folder):
    base = adapted(tiny_4bit_folder, "q_proj")
    every = choose_sampling(base, 8, PLENTY, ALONE)
    apply_checkpointing(base.model, mode)
    copied = every.weights.copied_bytes
    with every.model_of(base):
        assert len(copies(base.model)) == 2 * 7 + 1
        assert sum(layer[DENSE].nbytes for layer in copies(base.model)) == copied


def test_an_error_leaves_no_copies(tiny_4bit_folder):
    base = adapted(tiny_4bit_folder)
    form = choose_sampling(base, 8, PLENTY, ALONE)
    with pytest.raises(IndexError), form.model_of(base) as model:  # noqa: PT012 (what is tested is its end)
        assert copies(base.model)
        sample_groups(model, [[]], SamplingOptions(2, 2), frozenset(), answer_keys(0, 0, 2))  # a prompt without a token
    assert not copies(base.model)


def test_the_form_is_chosen_by_memory_and_kept_by_the_checkpoint(tiny_4bit_folder, tiny_folder, monkeypatch, logged):
    base = base_of(tiny_4bit_folder)
    chosen = choose_sampling(base, 8, PLENTY, ALONE)
    assert chosen.identity == {"sampled_by": "dense"}
    assert "answers sampled by dense copies of" in chosen.describe()
    needed = chosen.copied_bytes
    assert choose_sampling(base, 8, 3 * needed - 3, ALONE).identity == {"sampled_by": "packed"}
    assert choose_sampling(base, 8, needed, ALONE, chosen.identity).identity == chosen.identity
    with pytest.raises(
        InputError, match=r"--resume: the run samples its answers by dense copies .* --decode-weights packed"
    ):
        choose_sampling(base, 8, needed - 1, ALONE, chosen.identity)
    other = choose_sampling(base_of(tiny_4bit_folder, "packed"), 8, PLENTY, ALONE, chosen.identity)
    assert (other.identity, len(logged)) == ({"sampled_by": "packed"}, 1)
    plain = choose_sampling(base_of(tiny_folder), 8, PLENTY, ALONE)
    assert (plain.identity, plain.describe(), plain.copied_bytes) == ({"sampled_by": "floats"}, "", 0)
    with plain.model_of(base) as short:
        assert isinstance(short, TokenSteps)


def test_all_ranks_sample_in_one_form(tiny_4bit_folder):
    base = base_of(tiny_4bit_folder)
    for others, form in ((["dense"], "dense"), (["packed"], "packed"), ([None], "packed")):
        ranks = SimpleNamespace(size=2, everyone=lambda own, others=others: [own, *others])
        assert choose_sampling(base, 8, PLENTY, ranks).identity == {"sampled_by": form}


def test_copies_count_in_the_plan():
    plan = MemoryPlan("loss", {"base": 10, "activations": 20}, {"loss": 30, "update": 12}, budget_bytes=100)
    less, more = (plan.with_phase("sampling", {"base": 10, "float copies": size}) for size in (5, 50))
    assert (less.phase, less.peak_bytes, less.phases["sampling"]) == ("loss", 30, 15)
    assert (more.phase, more.peak_bytes, more.parts["float copies"]) == ("sampling", 60, 50)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}+1="}) for n in range(16)))
    (folder / "mine.py").write_text(
        "def odd(completions, **columns):\n"
        "    return [sum(ord(c) % 2 for c in text) / max(1, len(text)) for text in completions]\n"
    )
    return folder


def command(model, data, folder, *more: object) -> tuple:
    return ("train", "--model", model, "--data", data / "prompts.jsonl", "--adapter-path", folder, "--objective", "grpo",
            "--reward", f"{data / 'mine.py'}:odd", *QUICK, "--iters", 6, "--save-every", 2, *more)  # fmt: skip


def kept(folder: Path, step: int) -> str | None:
    return read_checkpoint(folder / "checkpoints" / f"step-{step:06d}").identity.get("sampled_by")


@pytest.mark.slow
def test_a_run_says_and_keeps_its_form_and_a_resumed_one_has_it_too(tiny_4bit_folder, data, tmp_path, monkeypatch):
    ran = succeeds(*command(tiny_4bit_folder, data, tmp_path / "a"))
    assert "answers sampled by dense copies of" in ran.err
    assert kept(tmp_path / "a", 2) == "dense"
    packed = run(*command(tiny_4bit_folder, data, tmp_path / "p", "--decode-weights", "packed"))
    assert "answers sampled by packed (--decode-weights packed)" in packed.err
    rewards = [
        [json.loads(line)["reward"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ap"
    ]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-3)
    assert len(set(rewards[0])) > 2

    def again(name: str, *more: object):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        for path in (tmp_path / name / "checkpoints").iterdir():
            if path.name != "step-000002":
                shutil.rmtree(path)
        return run(*command(tiny_4bit_folder, data, tmp_path / name, "--resume", *more))

    def chosen_anew(*given):
        raise AssertionError("chosen anew")

    with monkeypatch.context() as patch:
        patch.setattr(sampling_form, "choose_weights", chosen_anew)
        ran = passed(again("b"))
    assert "dense copies of 0 MB (as the run began)" in ran.err
    assert kept(tmp_path / "b", 6) == "dense"
    one, two = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab")
    assert one == two
    ran = passed(again("c", "--decode-weights", "packed"))
    assert "not the form" in ran.err
    assert kept(tmp_path / "c", 6) == "packed"
