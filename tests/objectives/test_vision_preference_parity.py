"""Preferences about pictures against TRL's losses on transformers' models: tokens, masks, log-probabilities, loss and gradients.

One batch has a pair with one picture, one without, and one with two, of odd sizes.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from mlx.utils import tree_flatten
from tiers import by_default
from tiny_vision import MAKERS, write_model
from vision_judge import ALPHA, RANK, Judge, judge_inputs, judge_processor
from vision_rows import PAIR_PICTURES, PAIRS, picture, read_rows, write_pairs

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.data.batch import collate
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.objectives.reference import row_log_probabilities
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.step import differentiation

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
BAR = 1e-4
BETA = 0.3
SIDES = ("chosen", "rejected")
OBJECTIVES = {
    "dpo": {},
    "dpo ipo": {"loss_type": "ipo"},
    "orpo": {},
    "simpo": {},
    "cpo": {},
    "kto": {},
}
CASES = by_default(
    [(family, name) for family in sorted(MAKERS) for name in OBJECTIVES if (family[:4], name) != ("pali", "orpo")],
    *((family, "dpo") for family in ("qwen2_5_vl", "smolvlm", "gemma3", "paligemma")), ("idefics3", "orpo"),
    ("qwen2_5_vl", "kto"), ("gemma3", "simpo"), ("qwen3_vl", "dpo ipo"), ("gemma4", "cpo"), ("qwen3_5", "kto"),
)  # fmt: skip


class Model:
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


def expected(settings, model, batch, reference):
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


@pytest.mark.parametrize(("family", "name"), CASES)
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
    for path, value in untrained.items():
        if path.endswith("lora_b"):
            draw = 0.05 * mx.random.normal(value.shape, key=mx.random.key(len(path)))
            model.load_weights([(path, draw)], strict=False)
    policy = row_log_probabilities(model, sums, rows.rows, 2048)

    judge = Judge(folder, untrained)
    theirs = Model(judge, judge_processor(folder), rows)
    check_rows(rows, theirs)
    for found, state in ((reference, untrained), (policy, adapter_parameters(model))):
        put(judge, state)
        for number in range(len(rows.rows)):
            assert found[number] == pytest.approx(log_probability(theirs, number), rel=BAR)
    assert np.abs(policy - reference).max() > 0.1

    if own.options.row.reference:
        rows.rows = replace(rows.rows, reference=reference)
    batch = collate(rows.rows, np.arange(rows.rows.examples), int(rows.rows.lengths.max()) - 1, int(rows.rows.mask.sum()))  # fmt: skip
    total = expected(ObjectiveSettings(objective=objective, **asked), theirs, batch, reference)
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


def put(judge, state) -> None:
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
