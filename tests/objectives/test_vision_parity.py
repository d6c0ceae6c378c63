"""Vision-language models against transformers, PEFT and TRL on torch: tokens, masks, logits, losses, every gradient, and curves.

One batch has a chat of two turns (or a pair) with one picture, one without, and one with two, of odd sizes. The templates of the
conversations that are masked are those that models are published with, as TRL has them. What is right to train is what TRL's marked
copies of them say ({% generation %}), which transformers turns into a mask, less what a template writes after the end of a turn."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from byte_tokenizer import byte_tokenizer
from mlx.utils import tree_flatten
from PIL import Image
from resumed_runs import metrics
from run_cli import succeeds
from tiers import by_default
from tiny_vision import MAKERS, vision_files, write_model
from transformers import ProcessorMixin
from vision_judge import ALPHA, RANK, Judge, judge_inputs, judge_processor, put_second_factors
from vision_rows import (
    PAIR_PICTURES,
    PAIRS,
    chats_of,
    conversation,
    picture,
    preference,
    read_rows,
    write_pairs,
    write_rows,
)

from mlx_lora.adapters.inject import adapt_model, adapter_parameters, inject, select_targets
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, DataSettings, TrainSettings
from mlx_lora.data.batch import Batch, collate
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable
from mlx_lora.data.load import Seen, load_eval_set
from mlx_lora.data.sampler import BatchPlan, ShapePrice
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.folder import of_connector, of_tower
from mlx_lora.models.generator import SamplingOptions, TokenSteps, answer_keys, sample_groups
from mlx_lora.models.image_inputs import positions_of, prepare_rotation, with_images
from mlx_lora.models.load import load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.policy_arrays import ADVANTAGES, OLD, REFERENCE, at_temperature, token_logps
from mlx_lora.objectives.reference import row_log_probabilities
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.rollouts.rollout import PromptsWithPictures
from mlx_lora.trainer.adapter import adapt
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils.errors import InputError

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
BAR = 1e-4


@pytest.fixture(params=sorted(MAKERS))
def compared(request, tmp_path):
    """Our rows on an adapted model, its folder, and the conversations."""
    folder, chats = write_model(request.param, tmp_path / "model"), chats_of(request.param)
    rows = read_rows(folder, write_rows(tmp_path / "data", chats))
    model = rows.base.model
    inject(model, select_targets(model).paths, rank=RANK, scale=ALPHA / RANK, seed=1)
    put_second_factors(model)
    return rows, folder, chats


def test_tokens_logits_loss_and_gradients_are_those_of_transformers(compared):
    rows, folder, chats = compared
    model = rows.base.model
    judge = Judge(folder, {name: np.array(value) for name, value in adapter_parameters(model).items()})
    processor = judge_processor(folder)
    given = [judge_inputs(processor, turns, [picture(n) for n in numbers]) for turns, numbers in chats]
    for number, row in enumerate(given):
        assert rows.rows.row(number)[0].tolist() == row["input_ids"][0].tolist()
    masks = [rows.rows.row(number)[1] for number in range(len(given))]
    logits, total, gradients = judge.run(given, masks)
    arrays = rows.arrays()

    bound = bind(rows.objective, PLAIN, model)
    with with_images(model, rows.pictures.vision.spec, arrays["pictures"]):
        found = np.array(model(arrays["inputs"]))
    for number, expected in enumerate(logits):
        own = found[number, : len(expected) - 1]
        assert np.abs(own - expected[:-1]).max() <= BAR * np.abs(expected).max()

    for loss in (PLAIN, choose_loss(model, rows.base.config, "ours")):
        bound = bind(rows.objective, loss, model)
        loss_sum, count, _, own = differentiation(model, bound.loss.train)(arrays)
        assert loss_sum.item() == pytest.approx(total, rel=BAR)
        assert count.item() == sum(mask[1:].sum() for mask in masks)
        own = dict(tree_flatten(own))
        assert own.keys() == gradients.keys()
        largest = max(np.abs(value).max() for value in gradients.values())
        for name, expected in gradients.items():
            assert np.abs(np.array(own[name]) - expected).max() <= BAR * largest, name


@pytest.mark.parametrize(
    "ways",
    [("full", "full"), ("lora", "lora"), ("full", None)],
    ids=lambda ways: f"connector {ways[0]}, tower {ways[1]}",
)
@pytest.mark.parametrize("family", sorted(MAKERS))
def test_gradients_of_tower_and_connector_are_those_of_transformers(family, ways, tmp_path):
    connector, tower = ways
    folder, asked = write_model(family, tmp_path / "model"), {"train_connector": connector, "train_vision": tower}
    if family == "gemma3" and connector == "lora":
        with pytest.raises(InputError, match="--train-connector full"):
            read_rows(folder, write_rows(tmp_path / "data"), **asked)
        asked["train_connector"] = "full"
    chats = chats_of(family)
    rows = read_rows(folder, write_rows(tmp_path / "data", chats), **asked)
    model = rows.base.model
    adapt_model(model, rows.pictures.adapted(AdapterSettings(rank=RANK, alpha=ALPHA)), 1)
    put_second_factors(model)
    trained = {name: np.array(value) for name, value in adapter_parameters(model).items()}
    for part, way in ((of_connector, asked["train_connector"]), (lambda name: not of_connector(name), tower)):
        found = [name for name in trained if of_tower(name) and part(name)]
        assert bool(found) == (way is not None)
        assert {".lora_" in name for name in found} == ({way == "lora"} if way else set())
    judge, processor = Judge(folder, trained), judge_processor(folder)
    given = [judge_inputs(processor, turns, [picture(n) for n in numbers]) for turns, numbers in chats]
    _, total, gradients = judge.run(given, [rows.rows.row(number)[1] for number in range(len(given))])
    loss_sum, _, _, own = differentiation(model, bind(rows.objective, PLAIN, model).loss.train)(rows.arrays())
    assert loss_sum.item() == pytest.approx(total, rel=BAR)
    own = dict(tree_flatten(own))
    assert own.keys() == gradients.keys()
    of_towers = [name for name in gradients if of_tower(name)]
    for names in (of_towers, gradients.keys() - set(of_towers)):
        largest = max(np.abs(gradients[name]).max() for name in names)
        for name in names:
            assert np.abs(np.array(own[name]) - gradients[name]).max() <= BAR * largest, name
    reached = [name for name in of_towers if np.abs(gradients[name]).max() > 0]
    assert len(reached) >= 0.5 * len(of_towers)  # LLaVA does not use the tower's last block


def test_without_its_picture_a_row_has_another_loss(compared):
    rows, *_ = compared
    model = rows.base.model
    arrays = rows.arrays()
    bound = bind(rows.objective, PLAIN, model)
    right = bound.loss.measure(model, arrays)[0].item()
    for number, name in enumerate(rows.pictures.vision.spec.names):
        given = arrays["pictures"][number]
        if name == "pictures":
            changed = mx.zeros_like(given)
        elif name == "positions":
            changed = mx.broadcast_to(mx.arange(given.shape[-1]), given.shape)
        elif name == "places":
            changed = mx.where(given > 1, given - 1, given)
        else:
            changed = given[..., ::-1]
        seen = [changed if place == number else one for place, one in enumerate(arrays["pictures"])]
        assert abs(bound.loss.measure(model, arrays | {"pictures": seen})[0].item() - right) > 5 * BAR * right, name


BETA = 0.3
SIDES = ("chosen", "rejected")
OBJECTIVES = {"dpo": {}, "dpo ipo": {"loss_type": "ipo"}, "orpo": {}, "simpo": {}, "cpo": {}, "kto": {}}
PREFERENCES = by_default(
    [(family, name) for family in sorted(MAKERS) for name in OBJECTIVES if (family[:4], name) != ("pali", "orpo")],
    *((family, "dpo") for family in ("qwen2_5_vl", "smolvlm", "gemma3", "paligemma")), ("idefics3", "orpo"),
    ("qwen2_5_vl", "kto"), ("gemma3", "simpo"), ("qwen3_vl", "dpo ipo"), ("gemma4", "cpo"), ("qwen3_5", "kto"),
)  # fmt: skip


class JudgeOfRows:
    """The judge's model for rows of ours: what it takes of pictures is transformers' own."""

    def __init__(self, judge, processor, rows):
        """Process each pair's two conversations; `rows` are ours, in the order of pairs."""
        self.judge, self.rows, self.given = judge, rows.rows, []
        self.token, self.of_prompt = rows.pictures.vision.tower.token, rows.pictures.vision.spec.prompt
        each = len(self.rows) // len(PAIRS)  # rows of a pair
        for record, numbers in zip(PAIRS, PAIR_PICTURES, strict=True):
            pictures = [picture(number) for number in numbers]
            two = [judge_inputs(processor, [*record["prompt"], *record[name]], pictures) for name in SIDES]
            self.given += [two[side * 2 // each] for side in range(each)]

    def of(self, number: int, tokens=None):
        """Return the logits (T, V) of a row of ours, or of its beginning."""
        import torch

        whole, mask = self.rows.row(number)
        tokens = whole if tokens is None else tokens
        is_picture, answers = tokens == self.token, np.arange(len(tokens)) >= np.argmax(mask)
        given = {**self.given[number], "input_ids": torch.tensor(tokens[None].astype(np.int64))}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in given:
                given[name] = torch.tensor((answers if self.of_prompt else is_picture)[None].astype(np.int64))
        given.pop("attention_mask", None)
        return self.judge.model(**given).logits[0].float()


def loss_of_trl(settings, model, batch, reference):
    """Return TRL's loss of a batch."""
    import torch
    from trl_judge import preference_loss

    kept = np.flatnonzero(batch.numbers >= 0)
    order = batch.numbers[np.concatenate([kept[0::2], kept[1::2]])]

    def called(inputs):
        logits = [model.of(number, model.rows.row(number)[0][:-1]) for number in order]
        pads = [inputs.shape[1] - len(one) for one in logits]
        found = [torch.nn.functional.pad(one, (0, 0, 0, pad)) for one, pad in zip(logits, pads, strict=True)]
        return SimpleNamespace(logits=torch.stack(found))

    return preference_loss(settings, called, batch, reference)[0]


@pytest.mark.parametrize(("family", "name"), PREFERENCES)
def test_loss_log_probabilities_and_gradients_are_those_of_trl(family, name, tmp_path):
    pytest.importorskip("trl")
    folder, data = write_model(family, tmp_path / "model"), write_pairs(tmp_path / "data")
    objective = name.split()[0]
    asked = {"images": True, "beta": BETA, **OBJECTIVES[name]}
    rows = read_rows(folder, data, objective=objective, **asked)
    model, own = rows.base.model, rows.objective
    adapt_model(model, own.pictures.adapted(AdapterSettings(rank=RANK, alpha=ALPHA)), 1)
    untrained = {path: np.array(value) for path, value in adapter_parameters(model).items()}
    loss = choose_loss(model, rows.base.config, "ours")
    sums = own.sums_of(loss.measure_tokens or loss.tokens)
    reference = row_log_probabilities(model, sums, rows.rows, 2048)
    put_second_factors(model)
    policy = row_log_probabilities(model, sums, rows.rows, 2048)

    judge = Judge(folder, untrained)
    theirs = JudgeOfRows(judge, judge_processor(folder), rows)
    check_rows(rows, theirs)
    for found, state in ((reference, untrained), (policy, adapter_parameters(model))):
        put_factors(judge, state)
        for number in range(len(rows.rows)):
            assert found[number] == pytest.approx(log_probability(theirs, number), rel=BAR)
    assert np.abs(policy - reference).max() > 0.1

    if own.options.row.reference:
        rows.rows = replace(rows.rows, reference=reference)
    batch = collate(rows.rows, np.arange(rows.rows.examples), int(rows.rows.lengths.max()) - 1, int(rows.rows.mask.sum()))  # fmt: skip
    total = loss_of_trl(ObjectiveSettings(objective=objective, **asked), theirs, batch, reference)
    total.backward()
    gradients = {path: parameter.grad.numpy().T for path, parameter in judge.trained.items()}
    largest = max(np.abs(value).max() for value in gradients.values())
    for one in (PLAIN, loss):
        bound = bind(own, one, model)
        [ready] = bound.prepare([batch], SINGLE_DEVICE)
        loss_sum, count, _, found = differentiation(model, bound.loss.train)(bound.arrays_of(ready))
        assert loss_sum.item() / count.item() == pytest.approx(float(total.detach()), rel=BAR)
        found = dict(tree_flatten(found))
        assert found.keys() == gradients.keys()
        for path, wanted in gradients.items():
            assert np.abs(np.array(found[path]) / count.item() - wanted).max() <= BAR * largest, path


def put_factors(judge, state) -> None:
    """Give the judge's factors these values."""
    import torch

    for path, parameter in judge.trained.items():
        parameter.data = torch.tensor(np.array(state[path]).T.copy())


def log_probability(theirs, number: int) -> float:
    import torch

    tokens, _ = theirs.rows.row(number)
    with torch.no_grad():
        logps = torch.log_softmax(theirs.of(number), dim=-1)
    return sum(logps[at - 1, tokens[at]].item() for at in np.flatnonzero(answer_mask(theirs.rows, number)))


def answer_mask(rows, number: int) -> np.ndarray:
    return rows.row(number)[1] if rows.answers is None else rows.answers[slice(*rows.offsets[number : number + 2])]


def check_rows(rows, theirs) -> None:
    """Compare tokens with transformers' processor, and the trained ones with the answers."""
    ours, each = rows.rows, len(rows.rows) // len(PAIRS)
    for number in range(0, len(ours), each // 2):
        record = PAIRS[number // each][SIDES[number % each * 2 // each]]
        tokens, mask = ours.row(number)
        assert tokens.tolist() == theirs.given[number]["input_ids"][0].tolist()
        text = rows.base.hf_tokenizer.decode(tokens[answer_mask(ours, number)])
        assert text.strip().startswith(record[0]["content"][0]["text"])
        assert not (mask & (tokens == theirs.token)).any()


WRITING = by_default([name for name in sorted(MAKERS) if "pali" not in name], "smolvlm", "qwen2_5_vl", "gemma3")
PICTURES = ((0,), (), (1, 3))
GROUP, NEW, TEMPERATURE = 3, 5, 0.8
ORDINARY = 256  # ids of bytes are below; a model on torch refuses an image token without a picture


@pytest.mark.parametrize("family", WRITING)
def test_log_probabilities_policy_loss_and_gradients_are_those_of_trl(family, tmp_path):
    pytest.importorskip("trl")
    records = [preference("What is it?", numbers, "", "") for numbers in PICTURES]
    data = write_pairs(tmp_path / "data", [{name: one[name] for name in ("images", "prompt")} for one in records])
    folder = write_model(family, tmp_path / "model")
    asked = {"group_size": GROUP, "max_new_tokens": NEW, "temp": TEMPERATURE, "kl_beta": 0.2}
    read = read_rows(folder, data, objective="grpo", images=True, reward="exact_match", **asked)
    model, objective, vision = read.base.model, read.objective, read.pictures.vision
    adapt_model(model, objective.pictures.adapted(AdapterSettings(rank=RANK, alpha=ALPHA)), 1)
    put_second_factors(model)
    prepare_rotation(model, vision.spec)
    batch, sampled = answered(read)
    loss = at_temperature(choose_loss(model, read.base.config, "ours"), model, read.base.config, TEMPERATURE)
    with objective.pictures.shown(model, batch):
        own = token_logps(model, loss, batch)

    judge = Judge(folder, {path: np.array(value) for path, value in adapter_parameters(model).items()})
    logps = on_torch(judge, judge_processor(folder), records, read, batch)
    theirs = logps.detach().numpy()[batch.mask]
    np.testing.assert_allclose(own[batch.mask], theirs, atol=BAR * np.abs(theirs).max())
    np.testing.assert_allclose(sampled, theirs, atol=2 * BAR * np.abs(theirs).max())  # token by token

    random = np.random.default_rng(9)
    old = own + random.normal(0, 0.2, own.shape).astype(np.float32) * batch.mask
    reference = old + random.normal(0, 0.3, own.shape).astype(np.float32) * batch.mask
    advantages = random.normal(0, 1, len(batch.inputs)).astype(np.float32)
    batch = batch.with_columns(**{OLD: old, REFERENCE: reference, ADVANTAGES: advantages})
    wanted = policy_loss_of_trl(logps, batch)
    wanted.backward()
    bound = bind(objective, choose_loss(model, read.base.config, "ours"), read.base)
    [ready] = bound.prepare([batch], SINGLE_DEVICE)
    total, count, _, found = differentiation(model, bound.loss.train)(bound.arrays_of(ready))
    assert total.item() / count.item() == pytest.approx(float(wanted.detach()), rel=BAR, abs=1e-5)
    gradients = {path: parameter.grad.numpy().T for path, parameter in judge.trained.items()}
    largest, found = max(np.abs(value).max() for value in gradients.values()), dict(tree_flatten(found))
    assert found.keys() == gradients.keys()
    for path, value in gradients.items():
        assert np.abs(np.array(found[path]) / count.item() - value).max() <= BAR * largest, path


def answered(read) -> tuple[Batch, np.ndarray]:
    """Return a batch of sampled answers, and the log-probabilities that the sampler had of their tokens."""
    model, objective = read.base.model, read.objective
    prompts = [read.rows.row(GROUP * number)[0][:-NEW].tolist() for number in range(len(PICTURES))]
    digests = objective.pictures.table.of_numbers(read.rows.pictures[::GROUP], len(PICTURES))
    model.eval()
    kept = PromptsWithPictures(vision=objective.pictures.vision, digests=digests, group=GROUP)
    options, keys = SamplingOptions(GROUP, NEW, temperature=TEMPERATURE), answer_keys(0, 0, GROUP * len(PICTURES))
    answers, logps = sample_groups(TokenSteps(model), prompts, options, frozenset(), keys, kept=kept)  # pyright: ignore[reportArgumentType]
    wide = max(map(len, prompts)) + NEW - 1
    inputs, targets = np.zeros((len(answers), wide), np.int32), np.zeros((len(answers), wide), np.int32)
    mask, sampled = np.zeros(inputs.shape, bool), []
    for number, answer in enumerate(answers):
        # Up to the first token that stands for something else than a byte.
        kept_tokens = next((at for at, token in enumerate(answer) if token >= ORDINARY), NEW)
        tokens = [*prompts[number // GROUP], *answer[:kept_tokens]]
        inputs[number, : len(tokens) - 1], targets[number, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        mask[number, len(tokens) - 1 - kept_tokens : len(tokens) - 1] = True
        sampled += logps[number][:kept_tokens]
    assert mask.sum() > GROUP * len(PICTURES)
    return Batch.of(inputs, targets, mask, group=GROUP, pictures=read.rows.pictures), np.array(sampled)


def on_torch(judge, processor, records, read, batch):
    """Return transformers' log-probabilities of a batch's targets at the temperature, (B, T), with their graph."""
    import torch

    token, found = read.pictures.vision.tower.token, []
    for row in range(len(batch.inputs)):
        number = row // GROUP
        given = judge_inputs(processor, records[number]["prompt"], [picture(one) for one in PICTURES[number]])
        begun = given["input_ids"][0].tolist()
        tokens = batch.inputs[row]
        # Then comes what the template writes before an answer; an input that is only a target is not there.
        assert tokens[: len(begun) - 1].tolist() == begun[:-1]
        own = {**given, "input_ids": torch.tensor(tokens[None].astype(np.int64))}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in own:
                own[name] = torch.tensor((tokens == token)[None].astype(np.int64))
        own.pop("attention_mask", None)
        logits = judge.model(**own).logits[0].float() / TEMPERATURE
        targets = torch.tensor(batch.targets[row].astype(np.int64))
        found.append(torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0])
    return torch.stack(found)


def policy_loss_of_trl(logps, batch):
    import torch
    from trl_policy_judge import policy_objective

    sampled = batch.columns
    others = [torch.tensor(values) for values in (sampled[OLD], sampled[REFERENCE], batch.mask, sampled[ADVANTAGES])]
    return policy_objective(logps, *others, "dapo", beta=0.2, low=0.2, high=0.2, longest=NEW)[0]


STEPS, BATCH, CURVE_RATE, CURVE_BAR = 30, 3, "2e-3", 1e-3
ANSWERS = ("A red one.", "No.", "Two of them, left and right.", "It is 7.", "Yes, a cat.", "None")
# A question's number, and the pictures that it shows.
CHATS = [
    (conversation(f"What is it, {number}?", numbers, ANSWERS[number % 5 : number % 5 + 1 + number % 2]), numbers)
    for number, numbers in enumerate([(0,), (), (1, 3), (2,), (3,), (5, 0), (1,), (), (6,), (2, 4), (7,), (0,)])
]


def trained_here(model: Path, data: Path, folder: Path) -> tuple[list[float], TrainSettings]:
    """Return the losses of a run of the command, and its settings."""
    succeeds("train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", STEPS,
              "--batch-size", BATCH, "--rank", RANK, "--alpha", ALPHA, "--learning-rate", CURVE_RATE, "--lr-schedule", "constant",
              "--warmup", 0, "--dtype", "float32", "--kernels", "ours", "--steps-per-report", 1, "--valid-fraction", 0,
              "--save-every", 0)  # fmt: skip
    records = metrics(folder)
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    assert len(losses) == STEPS
    return losses, train_settings({}, read_settings(str(folder / "run.yaml"), {}))


def beginnings(settings: TrainSettings) -> tuple[EncodedSet, list[Batch], dict[str, np.ndarray]]:
    """Return a run's rows, its batches in order, and its initial factors, which follow from its settings."""
    base, objective = load_base(settings.model), objective_of(settings.objective)
    ctx = RunContext(settings, objective, base)
    objective.open(ctx)
    rows = objective.read_data(ctx, settings.data).train
    loop = settings.loop
    plan = BatchPlan(
        rows, batch_tokens=loop.batch_tokens, batch_size=loop.batch_size, seed=loop.seed, price=ShapePrice(epochs=1.0)
    )
    adapt(settings, base, objective, base.hf_tokenizer.chat_template)
    factors = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    return rows, [plan.batch(*divmod(step, len(plan))) for step in range(STEPS)], factors


def trained_there(
    judge: Judge, batches: list[list[tuple[dict[str, Any], np.ndarray]]], settings: TrainSettings
) -> list[float]:
    """Return the losses of the same steps on torch."""
    import torch

    trained, asked = list(judge.trained.values()), settings.optimizer
    assert isinstance(asked.learning_rate, float)
    optimizer = torch.optim.AdamW(trained, lr=asked.learning_rate, weight_decay=asked.weight_decay)
    losses = []
    for rows in batches:
        optimizer.zero_grad()
        count = sum(int(mask[1:].sum()) for _, mask in rows)
        total = 0.0
        for given, mask in rows:
            logits = judge.model(**given).logits[0, :-1].float()
            each = torch.nn.functional.cross_entropy(logits, given["input_ids"][0, 1:], reduction="none")
            loss = each[torch.tensor(mask[1:])].sum() / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, asked.max_grad_norm)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
def test_thirty_steps_are_those_of_transformers(family, tmp_path):
    model, data = write_model(family, tmp_path / "model"), write_rows(tmp_path / "data", CHATS)
    ours, settings = trained_here(model, data, tmp_path / "run")
    rows, planned, factors = beginnings(settings)
    processor = judge_processor(model)
    given = [judge_inputs(processor, turns, [picture(n) for n in numbers]) for turns, numbers in CHATS]
    by_tokens = {tuple(one["input_ids"][0].tolist()): one for one in given}
    assert len(by_tokens) == len(CHATS)

    def there(batch: Batch) -> list[tuple[dict[str, Any], np.ndarray]]:
        found = [rows.row(int(number)) for number in batch.numbers if number >= 0]
        return [(by_tokens[tuple(tokens.tolist())], mask) for tokens, mask in found]

    theirs = trained_there(Judge(model, factors), [there(batch) for batch in planned], settings)
    apart = np.abs(np.subtract(ours, theirs)) / np.abs(theirs)
    print(
        f"{family}: loss {ours[0]:.4f} to {ours[-1]:.4f}, at most {apart.max():.1e} apart (step {apart.argmax() + 1})"
    )
    assert apart.max() < CURVE_BAR
    assert min(ours[-4:]) < 0.8 * ours[0]
    # The same rows in another order have other losses: the bar tells them apart.
    others = trained_there(Judge(model, factors), [there(batch) for batch in planned[1:4]], settings)
    assert np.abs(np.divide(others, ours[:3]) - 1).max() > 10 * CURVE_BAR


CONVERSATIONS = 40
WORDS = ("cat", "Größe", "is", "the", "left", "two\nlines", "猫", "7.5", "?", "{}", "a  b")
# Tiny model -> published template, and the end of its turns.
TEMPLATES = {
    "qwen2_5_vl": ("qwen2_5_vl", "<|im_end|>"),
    "smolvlm": ("smolvlm", "<end_of_utterance>"),
    "gemma3": ("gemma3", "<end_of_turn>"),
    "llava": ("llava_next", "</s>"),
}


def trl_template(name: str) -> str:
    """Return one of TRL's templates."""
    found = find_spec("trl")
    if (
        found is None
        or found.origin is None
        or not (file := Path(found.origin).parent / f"chat_templates/{name}.jinja").is_file()
    ):
        pytest.skip("TRL has no such template")
    return file.read_text(encoding="utf-8")


def write_files(family: str, folder: Path) -> dict[str, Any]:
    """Write a tiny model's files with a published template, and return its config."""
    config = vision_files(family, folder)
    if family == "llava":  # the template of another LLaVA, with other special tokens
        tokenizer = byte_tokenizer(None, eos="</s>", special_tokens=["</s>", "<s>", "<image>"])
        tokenizer.save_pretrained(folder)
        config |= dict.fromkeys(("image_token_index", "image_token_id"), tokenizer.convert_tokens_to_ids("<image>"))
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(trl_template(TEMPLATES[family][0]), encoding="utf-8")
    return config


@cache
def drawn(number: int) -> Image.Image:
    """Return a picture of a size of its own."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(15, 125, 2))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def conversations() -> list[list[dict[str, Any]]]:
    """Return seeded conversations of 1 to 4 turns, with up to 3 pictures somewhere in their questions."""
    rng, found, number = random.Random(3), [], 0

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    for at in range(CONVERSATIONS):
        turns = rng.randint(1, 4)
        pictures = [rng.randrange(turns) for _ in range(at % 4)]
        messages: list[dict[str, Any]] = []
        for turn in range(turns):
            parts: list[dict[str, Any]] = [{"type": "text", "text": words()}]
            for _ in range(pictures.count(turn)):
                parts.insert(rng.randint(0, len(parts)), {"type": "image", "path": f"{number}.png"})
                number += 1
            if rng.random() < 0.3 and parts[-1]["type"] == "image":
                parts.append({"type": "text", "text": words()})
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": words()}]})
        found.append(messages)
    return found


def pictures_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    paths = [part["path"] for one in messages for part in one["content"] if part["type"] == "image"]
    return [drawn(int(path.removesuffix(".png"))) for path in paths]


def expected_mask(
    processor: Any, messages: list[dict[str, Any]], marked: str, end: int
) -> tuple[list[int], list[bool], dict]:
    """Return the token ids and what is trained of them, as transformers has it, and what else it returns."""
    shown = [
        {**one, "content": [{**part, "image": drawn(int(part["path"].removesuffix(".png")))} if part["type"] == "image" else part
                            for part in one["content"]]} for one in messages
    ]  # fmt: skip
    for one in shown:
        for part in one["content"]:
            part.pop("path", None)
    out = ProcessorMixin.apply_chat_template(
        processor, shown, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        processor_kwargs={"return_tensors": None, "return_mm_token_type_ids": True, "add_special_tokens": False},
    )  # fmt: skip
    ids, mask = (list(out[name][0]) for name in ("input_ids", "assistant_masks"))
    after = False  # the end of the turn
    for at, trained in enumerate(mask):
        mask[at] = bool(trained) and not after
        after = bool(trained) and (after or ids[at] == end)
    return [int(token) for token in ids], mask, dict(out)


@pytest.mark.parametrize("family", TEMPLATES)
def test_rows_are_those_of_transformers(family, tmp_path):
    config, (name, end) = write_files(family, tmp_path / "model"), TEMPLATES[family]
    processor, marked = judge_processor(tmp_path / "model"), trl_template(f"{name}_training")
    tokenizer, chats = processor.tokenizer, conversations()
    image = tokenizer.convert_tokens_to_ids(
        {"qwen2_5_vl": "<|image_pad|>", "gemma3": "<image_soft_token>"}.get(family, "<image>")
    )
    if not hasattr(processor, "video_processor"):  # its own `__init__` sets these, which asks for torchvision
        vars(processor).update(chat_template=None, video_processor=None, image_token_id=image)
    for number in range(sum(len(pictures_of(messages)) for messages in chats)):
        drawn(number).save(tmp_path / f"{number}.png")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in chats), encoding="utf-8")
    table = ImageTable.empty()
    reader = ImageReader(ImageProcessor(tmp_path / "model", config), [tmp_path], table, image)
    settings = DataSettings(max_seq_length=100_000)
    rows = load_eval_set(str(file), settings, tokenizer, seen=Seen(pictures=reader))
    assert len(rows) == len(chats)
    positions = reference_positions(config) if family == "qwen2_5_vl" else None
    for number, messages in enumerate(chats):
        ids, mask, out = expected_mask(processor, messages, marked, tokenizer.convert_tokens_to_ids(end))
        found, trained = rows.row(number)
        assert found.tolist() == ids
        assert trained.tolist() == mask
        assert any(mask)
        kinds = np.array((out.get("mm_token_type_ids") or out["token_type_ids"])[0])
        assert (found == image).tolist() == (kinds == 1).tolist()
        digests = table.of_numbers(rows.labels, len(rows))[number]
        sizes = [table.pictures[digest].size for digest in digests]
        assert sizes == [one.size for one in pictures_of(messages)]
        assert sum(table.shown[digest].tokens for digest in digests) == int((found == image).sum())
        if positions:
            own = positions_of(found == image, [table.shown[digest].grid for digest in digests])
            assert np.array_equal(own, positions(ids, kinds, out.get("image_grid_thw")))


def reference_positions(config: dict[str, Any]) -> Any:
    """Return what computes Qwen2.5-VL's three positions as transformers does."""
    import torch
    import transformers

    model = transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(**config))

    def positions(ids: list[int], kinds: np.ndarray, grids: Any) -> np.ndarray:
        given = None if grids is None else torch.tensor(np.array(grids))
        found, _ = model.get_rope_index(
            torch.tensor([ids]), mm_token_type_ids=torch.tensor(kinds[None]), image_grid_thw=given
        )
        return found[:, 0].numpy()

    return positions
