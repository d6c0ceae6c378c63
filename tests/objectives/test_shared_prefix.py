"""A prompt that is computed once for its answers, of pairs or sampled ones, gives what separate rows give, or is not shared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from bound import bind
from comparing import by_dtype
from mlx.utils import tree_flatten
from resumed_runs import metrics
from run_cli import run, succeeds
from tiers import by_default
from tiny_steps import adapted

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.batch import EMPTY, Batch, split_rows
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import assumed, training_kernels
from mlx_lora.losses.agree import choose_loss, probe
from mlx_lora.losses.cross_entropy import PLAIN, plain, token_arrays
from mlx_lora.losses.grpo import RATIO_OF
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import model_shape
from mlx_lora.models.prefix_attention import SharedPrefix, rotate_by_token, unshareable
from mlx_lora.objectives import prefix_sharing
from mlx_lora.objectives.policy_arrays import ADVANTAGES, LENGTHS, OLD, REFERENCE, TRUNCATED, at_temperature
from mlx_lora.objectives.prefix_sharing import (
    Joining,
    apart,
    joined,
    joined_batch,
    saved_share,
    shared_tokens,
    sharing_problem,
    slots_of,
    sums_of_answers,
    work_of,
)
from mlx_lora.objectives.reference import batch_sums, row_log_probabilities
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.rollouts.environment import MultiTurnEnv, SingleTurnEnv
from mlx_lora.rollouts.rewards import Reward, TrainerState, no_function
from mlx_lora.rollouts.rollout import Rollouts
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

pytestmark = pytest.mark.usefixtures("uncompiled")
SHARING = ("llama", "gemma3_text", "gemma4_text", "gpt_oss", "phi3", "cohere2", "deepseek_v3")
SEPARATE = {"qwen3_5": "ArraysCache", "falcon_h1": "CacheList", "llama4": "ChunkedKVCache", "mistral3": "fails"}


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


def distance(one: np.ndarray, other: np.ndarray) -> float:
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
    assert distance(found, wanted) < 1e-5
    for part, value in gradients.items():
        if np.linalg.norm(value) > 1e-6:
            assert distance(shared_gradients[part], value) < 1e-4, part
    wrong, _ = measured(model, loss, replace(joined(rows), starts=joined(rows).starts + 1), kernels)
    assert distance(wrong, wanted) > 1e-4


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
    assert distance(found, wanted) < 1e-6
    assert max(distance(checkpointed[name], value) for name, value in gradients.items()) < 1e-5
    assert distance(wanted, measured(model, PLAIN, pairs(seed=1), True, mode)[0]) > 1e-3


def test_the_reference_of_joined_rows_is_that_of_separate_ones():
    rows = pairs()
    model = adapted()
    rotate_by_token(model)
    wanted = row_log_probabilities(model, batch_sums(PLAIN.tokens), rows, 256)
    found = row_log_probabilities(model, batch_sums(PLAIN.tokens), joined(rows), 128)
    assert found.shape == wanted.shape == (10,)
    assert distance(found, wanted) < 1e-5
    assert distance(found[::-1], wanted) > 1e-2


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


def run_on_pairs(folder, model, data, *more: object):
    ran = succeeds(
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--objective", "dpo", *QUICK, *more
    )
    return ran.err, metrics(folder)


@pytest.mark.float32("the runs part by rounding, which four steps of this rate multiply")
@pytest.mark.parametrize("objective", by_default(["dpo", "orpo", "reward"], "dpo"))
def test_a_run_takes_the_same_steps_with_fewer_positions(objective, tiny_folder, data, tmp_path):
    more = ("--objective", objective, "--batch-size", 100)  # one batch: its rows are dealt by their lengths
    text, shared = run_on_pairs(tmp_path / "auto", tiny_folder, data, *more)
    other, separate = run_on_pairs(tmp_path / "off", tiny_folder, data, *more, "--shared-prefix", "off")
    assert "prompts shared" in text
    assert "separate rows for both answers (--shared-prefix off)" in other
    for name in ("loss", "val_loss", "margin", "chosen_rewards"):
        ours = [line[name] for line in shared if line[name] is not None]
        assert ours == pytest.approx([line[name] for line in separate if line[name] is not None], rel=2e-4, abs=2e-5)
    assert len({line["loss"] for line in shared}) > 2
    assert (tmp_path / "auto/run.yaml").read_text().count("shared_prefix: 'on'") == 1


def test_a_resumed_run_keeps_its_layout(tiny_folder, data, tmp_path):
    run_on_pairs(tmp_path / "a", tiny_folder, data, "--save-every", 2, "--shared-prefix", "off")
    text, _ = run_on_pairs(tmp_path / "a", tiny_folder, data, "--save-every", 2, "--resume", "--iters", 6)
    assert "separate rows for both answers" in text
    ran = run(
        "train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", "--objective", "dpo",
        *QUICK, "--resume", "--shared-prefix", "on",
    )  # fmt: skip
    assert ran.code == 2
    assert "--shared-prefix on" in ran.err


@pytest.mark.long
def test_little_to_share_is_not_shared_unless_asked(tiny_folder, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "?", "chosen": f"{n} " * 90, "rejected": f"{n}, " * 80} for n in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text, _ = run_on_pairs(tmp_path / "auto", tiny_folder, file)
    assert "separate rows" in text
    text, _ = run_on_pairs(tmp_path / "on", tiny_folder, file, "--shared-prefix", "on")
    assert "prompts shared" in text


GROUP, LONGEST = 4, 9
LOSSES = [(name, beta) for name in RATIO_OF for beta in (0.0, 0.3)]


def prompts(count: int = 3, seed: int = 0, room: int = LONGEST) -> EncodedSet:
    """Return random prompts, with facts for rewards and room for answers."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = random.integers(3, 250, int(random.integers(1, 20))).astype(np.int32)
        rows.append((tokens, np.zeros(len(tokens), bool)))
    facts = [{"chat": False, "columns": {}, "prompt": str(n), "example": Completion(str(n), "")} for n in range(count)]
    return EncodedSet.from_rows(rows).with_facts(facts).with_room(GROUP, room)


def some_reward(prompts, completions, completion_ids, **columns):
    return [None if ids[0] % 7 == 0 else float(sum(ids) % 11) for ids in completion_ids]


@pytest.fixture(scope="module")
def base(tiny_folder):
    """An adapted base whose adapter is not zero, and whose answers end anywhere."""
    base = load_base(ModelSettings(model=str(tiny_folder)))
    base.tokenizer.eos_token_ids = range(0, 288, 10)
    adapt_model(base.model, AdapterSettings(rank=4), seed=1)
    rotate_by_token(base.model)
    return base


def moved(base, seed: int) -> None:
    random = np.random.default_rng(seed)
    factors = adapter_parameters(base.model)
    new = [(n, mx.array(random.normal(0, 0.05, v.shape).astype(np.float32))) for n, v in factors.items()]
    base.model.load_weights(new, strict=False)


def settings_of(base, name: str, beta: float = 0.0, **more: object):
    loss = {} if name == "rloo" else {"grpo_loss": name}
    objective = "rloo" if name == "rloo" else "grpo"
    return train_settings(
        {"model": base.model_id, "data": "d", "objective": objective, "reward": "length:4", "group_size": GROUP,
         "max_new_tokens": LONGEST, "kl_beta": beta, "epsilon": 0.1, **loss, **more}
    )  # fmt: skip


def sampled_batches(
    base, settings, rows: EncodedSet, shared: EncodedSet | None = None, env=None
) -> tuple[Batch, Batch]:
    """Return the same rollout, apart and joined; the adapter has moved since it was the reference.

    Args:
        base, settings: of the run.
        rows: planned apart.
        shared: what the joined batch is planned on; None: the same rows.
        env: of the episodes; None: one answer and `reward`.
    """
    env = env or SingleTurnEnv([Reward("r", some_reward)], settings, base.hf_tokenizer)
    loss = at_temperature(choose_loss(base.model, base.config), base.model, base.config, settings.objective.temp)
    joining = Joining(work_of(model_shape(base.model, base.config)), True)
    found = []
    for how, planned in ((None, rows), (joining, shared or rows)):
        moved(base, 1)
        answering = Rollouts(base, settings, env, loss, base.model.trainable_parameters(), joining=how)
        moved(base, 2)
        batch = BatchPlan(planned, batch_tokens=10**6, batch_size=4, seed=0).batch(0, 0)
        found += answering.answer([batch], planned, 5, TrainerState())
    return found[0], found[1]


def mean_and_gradients(base, settings, batch: Batch):
    """Return mean loss, mean reports and mean gradients."""
    task = bind(objective_of(settings.objective), choose_loss(base.model, base.config), base)
    [ready] = task.prepare([batch], SINGLE_DEVICE)
    (total, count, reports), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(ready))
    means = {name: (value / count).item() for name, value in reports.items()}
    return (total / count).item(), means, {name: np.array(value / count) for name, value in tree_flatten(grads)}


def assert_same(one, other) -> None:
    loss, reports, gradients = one
    assert other[0] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert other[1] == pytest.approx(reports, rel=1e-5, abs=1e-6)
    limit = by_dtype(1e-5, 2e-2)
    for name, value in gradients.items():
        assert np.linalg.norm(other[2][name] - value) <= limit * np.linalg.norm(value) + 1e-9, name


def lengths_of(batch: Batch) -> list[int]:
    return batch.columns[LENGTHS].ravel().astype(int).tolist()


@pytest.mark.parametrize(("name", "beta"), by_default(LOSSES, *(case for case in LOSSES if case[1])))
@pytest.mark.parametrize("updates", by_default([1, 2], 2))
def test_loss_and_gradients_are_those_of_separate_rows(name, beta, updates, base):
    settings = settings_of(base, name, beta, updates_per_rollout=updates, iters=2)
    separate, together = sampled_batches(base, settings, prompts())
    assert separate.inputs.shape[0] == GROUP * together.inputs.shape[0]
    assert together.starts.shape == (3, GROUP)
    assert lengths_of(separate) == lengths_of(together)
    assert len(set(lengths_of(separate))) > 3
    if updates > 1:
        moved(base, 3)  # the policy has moved since it sampled: the ratio is not 1
    known = mean_and_gradients(base, settings, separate)
    assert np.linalg.norm(np.concatenate([g.ravel() for g in known[2].values()])) > 0
    assert_same(known, mean_and_gradients(base, settings, together))
    wrong = mean_and_gradients(base, settings, together.with_columns(starts=together.starts + 1))
    assert wrong[0] != pytest.approx(known[0], rel=1e-4)
    assert any(np.linalg.norm(wrong[2][name] - value) > 0.1 * np.linalg.norm(value) for name, value in known[2].items())


def test_rows_that_are_planned_joined_give_the_same_batch(base):
    rows, settings = prompts(1), settings_of(base, "rloo", 0.1)
    _, together = sampled_batches(base, settings, rows)
    separate, planned = sampled_batches(base, settings, rows, joined(rows))
    for name in ("inputs", "targets", "mask", "starts", "weights", "positions", "real"):
        assert np.array_equal(getattr(planned, name), getattr(together, name)), name
    assert planned.columns.keys() == together.columns.keys() == separate.columns.keys() | {"starts"}
    for name, value in together.columns.items():
        np.testing.assert_array_equal(planned.columns[name], value)


@pytest.mark.parametrize("temp", [1.0, 0.7])
def test_cut_answers_and_the_temperature(temp, base):
    settings = settings_of(base, "dapo", 0.1, mask_truncated=True, temp=temp)
    separate, together = sampled_batches(base, settings, prompts())
    cut = separate.columns[TRUNCATED].astype(bool)
    assert 0 < cut.sum() < len(cut)
    assert not separate.mask[cut].any()
    assert together.supervised_tokens == separate.supervised_tokens == separate.columns[LENGTHS][~cut].sum()
    known = mean_and_gradients(base, settings, separate)
    assert_same(known, mean_and_gradients(base, settings, together))
    whole = settings_of(base, "dapo", 0.1, temp=temp)
    assert mean_and_gradients(base, whole, sampled_batches(base, whole, prompts())[1])[0] != pytest.approx(
        known[0], rel=1e-4
    )


def test_the_models_own_logits_share_too(base):
    """Without a fused loss, at a temperature: the loss that is least alike."""
    settings = settings_of(base, "grpo", 0.2, temp=0.8)
    separate, together = sampled_batches(base, settings, prompts())
    found = []
    for batch in (separate, together):
        task = bind(objective_of(settings.objective), plain("own logits"), base)
        [ready] = task.prepare([batch], SINGLE_DEVICE)
        found.append((task.loss.train(base.model, task.arrays_of(ready))[0]).item())
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_log_probabilities_before_the_update_are_those_of_the_same_tokens(base):
    settings = settings_of(base, "rloo", 0.2, updates_per_rollout=2, iters=2)
    separate, together = sampled_batches(base, settings, prompts())
    for name in (OLD, REFERENCE):
        sums = [sums_of_answers(batch, batch.columns[name]) for batch in (separate, together)]
        np.testing.assert_allclose(*sums, rtol=1e-5)
        assert (sums[0][: 3 * GROUP] < 0).all()
    assert not np.allclose(separate.columns[OLD].sum(), separate.columns[REFERENCE].sum(), rtol=1e-3)
    np.testing.assert_allclose(separate.columns[ADVANTAGES], together.columns[ADVANTAGES].ravel(), atol=1e-4)


class Talk:
    """Asks back once; the reward is of both answers."""

    def reset(self, seed, **columns):
        return None

    def step(self, completion):
        return "And?", float(len(completion) % 5), False


def test_episodes_of_two_turns_share_a_row_and_train_the_models_tokens_alone(base):
    """The second turn sees the first and the observation; log-probabilities are the model's own at its tokens, and 0 elsewhere."""
    more = {"environment": "talk.py:Talk", "reward": None, "max_turns": 2, "max_new_tokens": 90}
    settings = settings_of(base, "grpo", 0.2, updates_per_rollout=2, iters=2, **more)
    env = MultiTurnEnv([Reward("Talk", no_function)], settings, base.hf_tokenizer, make=Talk)
    separate, together = sampled_batches(base, settings, prompts(room=90), env=env)
    episodes = separate.columns[LENGTHS][separate.real]
    last = [int(np.flatnonzero(mask)[-1]) for mask in separate.mask[separate.real]]
    inside = [mask[: end + 1].sum() for mask, end in zip(separate.mask[separate.real], last, strict=True)]
    assert episodes.tolist() == inside  # `length` counts the tokens that are trained
    begins = separate.mask.argmax(axis=1)[separate.real]
    assert any(end - begin + 1 > length for begin, end, length in zip(begins, last, episodes, strict=True))
    logits = base.model(mx.array(separate.inputs)).astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = np.array(mx.take_along_axis(logps, mx.array(separate.targets)[..., None], axis=-1).squeeze(-1))
    within = by_dtype(1e-4, 3e-2)
    np.testing.assert_allclose(separate.columns[OLD], np.where(separate.mask, own, 0), rtol=within, atol=within)
    assert together.supervised_tokens == separate.supervised_tokens
    assert_same(mean_and_gradients(base, settings, separate), mean_and_gradients(base, settings, together))
    begin, end = int(begins[0]), last[0]
    between = np.flatnonzero(~separate.mask[0, begin:end]) + begin
    other = replace(separate, mask=separate.mask.copy())
    other.mask[0, between] = True  # an observation that is trained is another loss
    other = replace(other, slots=other.slots + len(between))
    assert mean_and_gradients(base, settings, other)[0] != pytest.approx(
        mean_and_gradients(base, settings, separate)[0], rel=1e-4
    )


def filled() -> tuple[Batch, np.ndarray, np.ndarray]:
    """Return two prompts, of 3 tokens and 1, with answers of 2, 1 and 1, 3 tokens, and a prompt of padding; where answers begin and end."""
    inputs = np.array(
        [[7, 8, 9, 1, 0, 0], [7, 8, 9, 0, 0, 0], [5, 0, 0, 0, 0, 0], [5, 4, 3, 0, 0, 0], [0] * 6, [0] * 6]
    )
    targets = np.array(
        [[8, 9, 1, 2, 0, 0], [8, 9, 6, 0, 0, 0], [2, 0, 0, 0, 0, 0], [4, 3, 2, 0, 0, 0], [0] * 6, [0] * 6]
    )
    begins = np.array([2, 2, 0, 0, 0, 0])
    lengths = np.array([2, 1, 1, 3, 0, 0], np.float32)
    columns = np.arange(6)
    mask = (columns >= begins[:, None]) & (columns < begins[:, None] + lengths[:, None])
    numbers = np.array([6, 7, 2, 3, EMPTY, EMPTY])
    per_token = np.where(mask, targets, 0).astype(np.float32)
    batch = Batch.of(
        inputs.astype(np.int32), targets.astype(np.int32), mask, 16, 2, numbers,
        **{LENGTHS: lengths, "per token": per_token},
    )  # fmt: skip
    return batch, begins, begins + lengths.astype(int)


def test_a_row_has_its_prompt_once_and_its_answers_behind():
    batch, *places = filled()
    together = joined_batch(batch, *places)
    assert together.inputs.shape == (3, 64)
    assert together.inputs[:, :6].tolist() == [[7, 8, 9, 1, 9, 0], [5, 5, 4, 3, 0, 0], [0] * 6]
    assert together.targets[:, :6].tolist() == [[8, 9, 1, 2, 6, 0], [2, 4, 3, 2, 0, 0], [0] * 6]
    assert together.mask[:, :6].astype(int).tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert not together.mask[:, 6:].any()
    assert together.starts.tolist() == [[2, 4], [0, 1], [0, 0]]
    assert together.numbers.tolist() == [3, 1, EMPTY]
    assert together.columns[LENGTHS].tolist() == [[2, 1], [1, 3], [0, 0]]
    assert together.real_tokens == 9
    assert together.examples == batch.examples == 2
    sums = [sums_of_answers(one, one.columns["per token"]) for one in (batch, together)]
    assert sums[0].tolist() == sums[1].tolist() == [3, 6, 2, 9, 0, 0]
    [first, second] = split_rows(together, 2)
    assert first.starts.tolist() == [[2, 4], [0, 1]]
    assert second.columns[LENGTHS].tolist() == [[0, 0], [0, 0]]


def test_what_is_not_trained_within_an_answer_stays_in_its_place():
    """The second of the last answer's three tokens is an observation."""
    batch, *places = filled()
    mask = batch.mask.copy()
    mask[3, 1] = False
    observed = replace(batch, mask=mask).with_columns(**{LENGTHS: np.array([2, 1, 1, 2, 0, 0], np.float32)})
    together, known = joined_batch(observed, *places), joined_batch(batch, *places)
    for name in ("inputs", "targets", "starts"):
        assert np.array_equal(getattr(together, name), getattr(known, name))
    assert together.mask[1, :6].astype(int).tolist() == [1, 1, 0, 1, 0, 0]
    assert not np.array_equal(together.mask, known.mask)


def test_planned_rows_come_apart_again():
    rows = prompts(5)
    for batch_size in (2, 5):
        whole = BatchPlan(rows, batch_tokens=10**6, batch_size=batch_size, seed=3)
        shared = BatchPlan(joined(rows), batch_tokens=10**6, batch_size=batch_size, seed=3)
        assert len(whole) == len(shared)
        separate = {int(b.numbers[i]): b for b in whole.batches() for i in range(0, len(b.inputs), GROUP)}
        for batch in map(apart, shared.batches()):
            for row in range(0, len(batch.inputs), GROUP):
                number = int(batch.numbers[row])
                assert batch.numbers[row : row + GROUP].tolist() == (
                    [EMPTY] * GROUP if number == EMPTY else list(range(number, number + GROUP))
                )
                if number == EMPTY:
                    assert not batch.mask[row : row + GROUP].any()
                    continue
                known = separate[number]
                [place] = np.flatnonzero(known.numbers == number)
                width = int(rows.lengths[number]) - 1
                for name in ("inputs", "targets", "mask"):
                    theirs, ours = getattr(known, name)[place], getattr(batch, name)[row]
                    assert (theirs[:width] == ours[:width]).all()
                    assert not ours[width:].any()
            assert len(batch.positions) >= batch.mask.sum()
    assert apart(separate[0]) is separate[0]


def test_slots_have_few_sizes():
    sizes = {slots_of(n, 480, 10**6) for n in range(481)}
    assert sorted(sizes) == [64, 120, 184, 240, 304, 360, 424, 480]
    assert all(slots_of(n, 480, 10**6) >= n for n in range(481))
    assert slots_of(400, 480, 410) == 410


def test_a_batch_is_joined_where_that_saves_work():
    weights, per_score = 1000.0, 10.0

    def work(positions: np.ndarray) -> float:
        return float((weights * positions + per_score * positions**2 / 2).sum())

    batch, *places = filled()
    assert Joining(work, False)(batch, *places) is batch  # 64 columns for a few tokens
    assert Joining(work, True)(batch, *places).starts is not None
    long = np.zeros((8, 320), np.int32)
    lengths = np.full(8, 20, np.float32)
    mask = (np.arange(320) >= 290) & (np.arange(320) < 310) & (long == 0)
    much = Batch.of(long, long, mask, 160, 8, **{LENGTHS: lengths})
    together = Joining(work, False)(much, np.full(8, 290), np.full(8, 310))
    assert together.inputs.shape == (1, 512)
    assert Joining(work, False).saved(much, together) == pytest.approx(
        1 - (weights * 512 + per_score * 512**2 / 2) / (8 * (weights * 320 + per_score * 320**2 / 2))
    )
    # Where prompts are short beside the answers, their scores cost more than the prompts.
    lengths[:] = 60
    mask = (np.arange(320) >= 4) & (np.arange(320) < 64) & (long == 0)
    short = Batch.of(long[:, :64], long[:, :64], mask[:, :64], 480, 8, **{LENGTHS: lengths})
    assert joined_batch(short, np.full(8, 4), np.full(8, 64)).inputs.size == short.inputs.size
    assert Joining(work, False)(short, np.full(8, 4), np.full(8, 64)) is short


LONG_ANSWERS = ("--max-new-tokens", 60, "--group-size", 6)
SAMPLING = ("--learning-rate", "1e-2", "--batch-size", 2, "--group-size", 4, "--max-new-tokens", 6, "--sample-tokens", 0,
         "--kernels", "ours", "--val-batches", 1, "--steps-per-report", 1, "--rank", 4, "--reward", "regex:[A-Z0-9]",
         "--valid-fraction", 0.2)  # fmt: skip
LONG = "Here is a long question about nothing much, and it goes on for quite a while: {}?"


@pytest.fixture(scope="module")
def asked_long(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    for name, text in (("long", LONG), ("short", "{}")):
        rows = [{"prompt": text.format(n)} for n in range(10, 26)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "one").mkdir()
    for name, numbers in (("train", range(1)), ("valid", range(10, 13))):  # plans of other widths have other orders
        rows = [{"prompt": LONG.format(n)} for n in numbers]
        (folder / "one" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def sampled_run(folder: Path, model: Path, asked_long: Path, *more: object):
    ran = succeeds(
        "train", "--model", model, "--data", asked_long, "--adapter-path", folder, "--objective", "grpo", *SAMPLING,
        *more,
    )  # fmt: skip
    return ran.err, metrics(folder)


@pytest.mark.long
@pytest.mark.float32("an update that rounds otherwise samples other answers in the next step")
@pytest.mark.parametrize("more", [(), ("--updates-per-rollout", 2, "--kl-beta", 0.1)])
def test_a_run_of_joined_answers_takes_the_same_steps(more, tiny_folder, asked_long, tmp_path):
    asked = ("--iters", 4, "--save-every", 4, *more)
    text, shared = sampled_run(tmp_path / "auto", tiny_folder, asked_long / "one", *asked)
    other, separate = sampled_run(tmp_path / "off", tiny_folder, asked_long / "one", *asked, "--shared-prefix", "off")
    assert "shared by its 4 answers" in text
    assert "a row for each answer (--shared-prefix off)" in other
    for name in ("loss", "val_loss", "reward", "length", "truncated", "kl", "clipped", "grad_norm"):
        ours, theirs = ([line[name] for line in lines if line.get(name) is not None] for lines in (shared, separate))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
    assert len({line["grad_norm"] for line in shared}) > 2
    assert "shared_prefix: 'on'" in (tmp_path / "auto" / "run.yaml").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", ["long", pytest.param("short", marks=pytest.mark.slow)])
def test_a_killed_run_of_joined_answers_resumes_to_the_same_bytes(name, tiny_folder, asked_long, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    asked = ("--iters", 6, "--save-every", 3, "--kl-beta", 0.1, *LONG_ANSWERS * (name == "short"))
    sampled_run(whole, tiny_folder, asked_long / f"{name}.jsonl", *asked)
    shutil.copytree(whole, rest)
    shutil.rmtree(rest / "checkpoints" / "step-000006")
    sampled_run(rest, tiny_folder, asked_long / f"{name}.jsonl", *asked, "--resume")
    weights = [(folder / "adapters.safetensors").read_bytes() for folder in (whole, rest)]
    assert weights[0] == weights[1]
    ran = run(
        "train", "--model", tiny_folder, "--data", asked_long / f"{name}.jsonl", "--adapter-path", rest, "--objective", "grpo",
        *SAMPLING, *asked, "--resume", "--shared-prefix", "off",
    )  # fmt: skip
    assert ran.code == 2
    assert "--shared-prefix off: the run that you resume has it " + ("on" if name == "long" else "auto") in ran.err


@pytest.mark.long
def test_short_prompts_are_shared_where_that_saves_work_or_if_asked(tiny_folder, asked_long, tmp_path):
    asked = ("--iters", 2, *LONG_ANSWERS)
    text, _ = sampled_run(tmp_path / "auto", tiny_folder, asked_long / "short.jsonl", *asked)
    assert "save 0% of the work" in text
    text, _ = sampled_run(tmp_path / "on", tiny_folder, asked_long / "short.jsonl", *asked, "--shared-prefix", "on")
    assert "shared by its 6 answers" in text


@pytest.mark.long
def test_a_plan_counts_joined_rows(tiny_folder, asked_long):
    flags = ("--model", tiny_folder, "--data", asked_long / "long.jsonl", "--objective", "grpo", *SAMPLING[2:8], "--json",
             "--reward", "length:3", "--valid-fraction", 0)  # fmt: skip
    plans = [json.loads(run("plan", *flags, *more).out) for more in ((), ("--shared-prefix", "off"))]
    shared, separate = plans
    prompt = max(len(LONG.format(10)), 1)
    assert shared["data"]["rows"] * 4 == separate["data"]["rows"] == 64
    assert shared["settings"]["rows"] * 4 == separate["settings"]["rows"] == 8
    assert shared["data"]["longest"] - 4 * 7 == separate["data"]["longest"] - 7 >= prompt - 1
    assert shared["phases"]["loss"] < 0.7 * separate["phases"]["loss"]
    assert shared["phases"]["rollout"] == separate["phases"]["rollout"] > 0
    assert "4 answers are sampled to a prompt, one row for all of them" in run("plan", *flags[:-5], *flags[-4:]).out


def test_a_model_that_cannot_share_says_so(tiny_folder, asked_long, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_lora.objectives.prefix_sharing.unshareable", lambda model: "a layer of it cannot")
    text, _ = sampled_run(tmp_path / "auto", tiny_folder, asked_long / "long.jsonl", "--iters", 1)
    assert "(a layer of it cannot)" in text
    ran = run(
        "train", "--model", tiny_folder, "--data", asked_long / "long.jsonl", "--adapter-path", tmp_path / "on",
        "--objective", "grpo", *SAMPLING, "--iters", 1, "--shared-prefix", "on",
    )  # fmt: skip
    assert ran.code == 2
    assert "--shared-prefix on: a layer of it cannot" in ran.err


def test_the_rows_of_an_example():
    assert ObjectiveSettings("grpo", group_size=5).rows_per_example == 5
    assert ObjectiveSettings("grpo", group_size=5, shared_prefix="on").rows_per_example == 1
    assert ObjectiveSettings("sft", shared_prefix="on").rows_per_example == 1
    assert ObjectiveSettings("dpo").rows_per_example == 2
