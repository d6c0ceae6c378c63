"""A prompt that is computed once for both answers gives what separate rows give, or is not shared."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from mlx.utils import tree_flatten
from run_cli import run, succeeds
from tiers import by_default
from tiny_steps import adapted

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.data.batch import EMPTY
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.table import assumed, training_kernels
from mlx_lora.losses.check import choose_loss, probe
from mlx_lora.losses.cross_entropy import PLAIN, token_arrays
from mlx_lora.models.prefix_attention import SharedPrefix, rotate_by_token, unshareable
from mlx_lora.objectives import prefix_sharing
from mlx_lora.objectives.preference import batch_sums
from mlx_lora.objectives.prefix_sharing import joined, saved_share, shared_tokens, sharing_problem
from mlx_lora.objectives.reference import row_log_probabilities
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

SHARING = ("llama", "gemma3_text", "gemma4_text", "gpt_oss", "phi3", "cohere2", "deepseek_v3")
SEPARATE = {"qwen3_5": "ArraysCache", "falcon_h1": "CacheList", "llama4": "ChunkedKVCache", "mistral3": "fails"}


@pytest.fixture(autouse=True)
def uncompiled():
    mx.disable_compile()
    yield
    mx.enable_compile()


def pairs(count: int = 5, seed: int = 0, longest: int = 12, vocabulary: int = 200) -> EncodedSet:
    """Return random pairs; within one, both answers have the prompt before them."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = random.integers(1, vocabulary, int(random.integers(2, longest)))
        for _side in range(2):
            answer = random.integers(1, vocabulary, int(random.integers(1, longest)))
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            rows.append((tokens, np.arange(len(tokens)) >= len(prompt)))
    return EncodedSet.from_rows(rows).grouped(2, np.arange(2.0 * count))


def test_a_row_holds_the_prompt_once():
    rows = EncodedSet.from_rows(
        [
            (np.array([1, 2, 3, 8, 9], np.int32), np.array([0, 0, 0, 1, 1], bool)),
            (np.array([1, 2, 3, 7], np.int32), np.array([0, 0, 0, 1], bool)),
            (np.array([5, 6, 4], np.int32), np.array([0, 1, 1], bool)),  # both answers begin with 6: not shared
            (np.array([5, 6, 6], np.int32), np.array([0, 1, 1], bool)),
            (np.array([1, 2, 8], np.int32), np.array([0, 0, 1], bool)),  # prompts of two templates
            (np.array([3, 2, 7], np.int32), np.array([0, 0, 1], bool)),
        ]
    ).grouped(2, np.arange(6.0))
    together = joined(replace(rows, reference=-np.arange(6, dtype=np.float32)))
    assert [together.row(i)[0].tolist() for i in range(3)] == [
        [1, 2, 3, 8, 9, 3, 7], [5, 6, 4, 5, 6, 6], [1, 2, 8, 3, 2, 7]
    ]  # fmt: skip
    assert [together.row(i)[1].astype(int).tolist() for i in range(3)] == [
        [0, 0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 1]
    ]  # fmt: skip
    assert together.starts.tolist() == [[2, 5], [0, 3], [0, 3]]
    assert together.labels.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert together.reference.tolist() == [[0, -1], [-2, -3], [-4, -5]]
    assert shared_tokens(rows).tolist() == [2, 0, 0]
    assert saved_share(rows) == 2 / 15
    assert saved_share(replace(rows, group=1)) == 0


def test_positions_and_mask_are_those_of_separate_texts():
    layout = SharedPrefix.of(mx.array([[2, 4], [0, 0]]), 6)
    assert layout.positions[0].tolist() == [0, 1, 2, 3, 2, 3]
    assert layout.answers[0].tolist() == [0, 0, 1, 1, 2, 2]
    seen = layout.make_mask(6)[0, 0].astype(mx.int32).tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    windowed = layout.make_mask(6, window_size=2)[0, 0].astype(mx.int32).tolist()
    assert windowed[4] == [0, 1, 0, 0, 1, 0]  # the prompt's last token is one position away
    assert windowed[5] == [0, 0, 0, 0, 1, 1]
    assert layout.make_mask(6)[1, 0].all(axis=1).tolist() == [False] * 5 + [True]  # a row of padding is one text


def measured(model, loss, rows: EncodedSet, kernels: bool, mode: str = "none"):
    """Return each answer's log-probability and the gradient of a weighted sum of them."""
    plan = BatchPlan(rows, batch_tokens=128, batch_size=None, seed=0)
    tape = apply_checkpointing(model, mode)
    found, gradients = {}, {}
    for number in range(len(plan)):
        batch = plan.batch(0, number)
        arrays = token_arrays(batch)
        first = batch.positions // batch.inputs.shape[1]
        if batch.starts is not None:
            first = 2 * first + (batch.positions % batch.inputs.shape[1] >= batch.starts[first][:, 1])
            owners = np.where(batch.numbers[:, None] == EMPTY, EMPTY, 2 * batch.numbers[:, None] + [0, 1]).ravel()[
                first
            ]
        else:
            owners = batch.numbers[first]
        scale = mx.array(1.0 + np.maximum(owners, 0))

        def losses(model, arrays=arrays, scale=scale):
            return loss.tokens(model, arrays) * scale

        if kernels:
            with training_kernels(model, tape.attend if tape else attend, assumed):
                got = probe(model, losses)
        else:
            got = probe(model, losses)
        for owner, value, weight in zip(owners, np.array(got.losses), batch.weights, strict=True):
            if weight:
                found[owner] = found.get(owner, 0.0) + value
        for name, value in got.gradients.items():
            gradients[name] = gradients.get(name, 0) + np.array(value)
    return np.array([found[i] for i in sorted(found)]), gradients


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("kernels", by_default([True, False], True), ids=["ours", "mlx"])
def test_a_family_gives_the_numbers_of_separate_rows(name, kernels):
    """Rows are longer than every window of these models."""
    config = tiny_config(name)
    model = tiny_architecture(name)
    adapt_model(model, AdapterSettings(rank=4), 0)
    random = np.random.default_rng(3)
    moved = {n: mx.array(random.normal(0, 0.05, p.shape).astype(np.float32)) for n, p in
             tree_flatten(model.trainable_parameters())}  # fmt: skip
    model.load_weights(list(moved.items()), strict=False)
    loss = choose_loss(model, config, "ours" if kernels else "mlx")
    assert unshareable(model) is None
    assert sharing_problem(model, config, loss, assumed if kernels else None) is None
    rows = pairs(count=3, longest=40, vocabulary=60)
    wanted, gradients = measured(model, loss, rows, kernels)
    found, shared_gradients = measured(model, loss, joined(rows), kernels)
    assert apart(found, wanted) < 1e-5
    for part, value in gradients.items():
        if np.linalg.norm(value) > 1e-6:
            assert apart(shared_gradients[part], value) < 1e-4, part
    wrong, _ = measured(model, loss, replace(joined(rows), starts=joined(rows).starts + 1), kernels)
    assert apart(wrong, wanted) > 1e-4


@pytest.mark.parametrize("name", SEPARATE)
def test_a_model_that_cannot_share_keeps_separate_rows(name):
    model, config = tiny_architecture(name), tiny_config(name)
    adapt_model(model, AdapterSettings(rank=4), 0)
    problem = unshareable(model) or sharing_problem(model, config, choose_loss(model, config, "ours"), assumed)
    assert SEPARATE[name] in problem


@pytest.mark.parametrize("mode", ["block", "selective", "2"])
def test_checkpointed_blocks_share_too(mode):
    rows = pairs()
    model = adapted()
    rotate_by_token(model)
    wanted, gradients = measured(model, PLAIN, joined(rows), True)
    found, checkpointed = measured(model, PLAIN, joined(rows), True, mode)
    assert apart(found, wanted) < 1e-6
    assert max(apart(checkpointed[name], value) for name, value in gradients.items()) < 1e-5
    assert apart(wanted, measured(model, PLAIN, pairs(seed=1), True, mode)[0]) > 1e-3


def test_the_reference_of_joined_rows_is_that_of_separate_ones():
    rows = pairs()
    model = adapted()
    rotate_by_token(model)
    wanted = row_log_probabilities(model, batch_sums(PLAIN.tokens), rows, 256)
    found = row_log_probabilities(model, batch_sums(PLAIN.tokens), joined(rows), 128)
    assert found.shape == wanted.shape == (10,)
    assert apart(found, wanted) < 1e-5
    assert apart(found[::-1], wanted) > 1e-2


def test_a_layout_that_a_model_ignores_is_found(monkeypatch):
    """Without the rotation by token the second answer stands too far from its prompt."""
    model = adapted()
    config = {"model_type": "llama", "vocab_size": 288}
    assert sharing_problem(model, config, PLAIN) is None
    model = adapted()
    monkeypatch.setattr(prefix_sharing, "rotate_by_token", lambda model: None)
    assert "fails" in sharing_problem(model, config, PLAIN)
    monkeypatch.setattr(SharedPrefix, "offset", 0)
    assert "differs" in sharing_problem(model, config, PLAIN)


QUICK = ("--iters", 4, "--learning-rate", "5e-3", "--batch-size", 4, "--sample-tokens", 0, "--kernels", "ours",
         "--val-batches", 1, "--steps-per-report", 1, "--rank", 4)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("shared") / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {n} and nothing else?", "chosen": f"It is {n}.", "rejected": "No idea" + "!" * (n % 5)}
        for n in range(24)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def trained(folder, model, data, *more: object):
    ran = succeeds(
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--objective", "dpo", *QUICK, *more
    )
    return ran.err, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.float32("the runs part by rounding, which four steps of this rate multiply")
@pytest.mark.parametrize("objective", by_default(["dpo", "orpo", "reward"], "dpo"))
def test_a_run_takes_the_same_steps_with_fewer_positions(objective, tiny_folder, data, tmp_path):
    more = ("--objective", objective, "--batch-size", 100)  # one batch: its rows are dealt by their lengths
    text, shared = trained(tmp_path / "auto", tiny_folder, data, *more)
    other, separate = trained(tmp_path / "off", tiny_folder, data, *more, "--shared-prefix", "off")
    assert "prompts shared" in text
    assert "separate rows for both answers (--shared-prefix off)" in other
    for name in ("loss", "val_loss", "margin", "chosen_rewards"):
        ours = [line[name] for line in shared if line[name] is not None]
        assert ours == pytest.approx([line[name] for line in separate if line[name] is not None], rel=2e-4, abs=2e-5)
    assert len({line["loss"] for line in shared}) > 2
    assert (tmp_path / "auto/run.yaml").read_text().count("shared_prefix: 'on'") == 1


def test_a_resumed_run_keeps_its_layout(tiny_folder, data, tmp_path):
    trained(tmp_path / "a", tiny_folder, data, "--save-every", 2, "--shared-prefix", "off")
    text, _ = trained(tmp_path / "a", tiny_folder, data, "--save-every", 2, "--resume", "--iters", 6)
    assert "separate rows for both answers" in text
    ran = run(
        "train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", "--objective", "dpo",
        *QUICK, "--resume", "--shared-prefix", "on",
    )  # fmt: skip
    assert ran.code == 2
    assert "--shared-prefix on" in ran.err


def test_little_to_share_is_not_shared_unless_asked(tiny_folder, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "?", "chosen": f"{n} " * 90, "rejected": f"{n}, " * 80} for n in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text, _ = trained(tmp_path / "auto", tiny_folder, file)
    assert "separate rows" in text
    text, _ = trained(tmp_path / "on", tiny_folder, file, "--shared-prefix", "on")
    assert "prompts shared" in text
