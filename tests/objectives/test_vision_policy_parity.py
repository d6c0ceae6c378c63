"""Sampled answers about pictures: log-probabilities, GRPO's loss and every gradient against TRL's on transformers' models."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from mlx.utils import tree_flatten
from tiers import by_default
from tiny_vision import MAKERS, write_model
from vision_judge import ALPHA, RANK, Judge, judge_inputs, judge_processor
from vision_rows import picture, preference, read_rows, write_pairs

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.data.batch import Batch
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.generator import SamplingOptions, TokenSteps, answer_keys, sample_groups
from mlx_lora.models.image_inputs import prepare_rotation
from mlx_lora.objectives.policy_arrays import ADVANTAGES, OLD, REFERENCE, at_temperature, token_logps
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.rollouts.rollout import PromptsWithPictures
from mlx_lora.trainer.step import differentiation

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
FAMILIES = by_default([name for name in sorted(MAKERS) if "pali" not in name], "smolvlm", "qwen2_5_vl", "gemma3")
BAR = 1e-4
PICTURES = ((0,), (), (1, 3))
GROUP, NEW, TEMPERATURE = 3, 5, 0.8
ORDINARY = 256  # ids of bytes are below; a model on torch refuses an image token without a picture


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_loss_and_gradients_are_those_of_trl(family, tmp_path):
    pytest.importorskip("trl")
    records = [preference("What is it?", numbers, "", "") for numbers in PICTURES]
    data = write_pairs(tmp_path / "data", [{name: one[name] for name in ("images", "prompt")} for one in records])
    folder = write_model(family, tmp_path / "model")
    asked = {"group_size": GROUP, "max_new_tokens": NEW, "temp": TEMPERATURE, "kl_beta": 0.2}
    read = read_rows(folder, data, objective="grpo", images=True, reward="exact_match", **asked)
    model, objective, vision = read.base.model, read.objective, read.pictures.vision
    adapt_model(model, objective.pictures.adapted(AdapterSettings(rank=RANK, alpha=ALPHA)), 1)
    for path, value in adapter_parameters(model).items():
        if path.endswith("lora_b"):
            model.load_weights(
                [(path, 0.05 * mx.random.normal(value.shape, key=mx.random.key(len(path))))], strict=False
            )
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
    batch = Batch.of(inputs, targets, mask, group=GROUP, pictures=read.rows.pictures)
    return batch, np.array(sampled)


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
