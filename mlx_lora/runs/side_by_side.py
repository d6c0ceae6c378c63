"""Measure a base and its adapter on the same rows, and put their answers side by side.

Both models see a batch before either sees the next, so a measurement that is stopped compares them on the same rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np

from mlx_lora.artifacts.evaluation_page import MODELS, SHORT_WORDS
from mlx_lora.artifacts.run_report import Sample
from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.load import Base
from mlx_lora.objectives.objective import Objective
from mlx_lora.settings.config import LoopSettings
from mlx_lora.system.console import perplexity
from mlx_lora.system.errors import InputError
from mlx_lora.system.long_task import tracked
from mlx_lora.training.held_out import held_out_plan
from mlx_lora.training.held_out_rows import RowLosses, paired_change
from mlx_lora.training.losses import choose_loss
from mlx_lora.training.objective_loss import task_of
from mlx_lora.training.samples import before_answer, greedy_text, row_answer
from mlx_lora.training.trainer import mean_loss

BASE, ADAPTER = MODELS
USUAL = 5  # questions, where nobody says how many
MOST_TOKENS = 64  # of a text
MORE_TOKENS = 8  # than the expected answer has, which a text may take to end
MOST_PROMPT_TOKENS = 1024


def never() -> bool:
    """Say that nobody asked to stop."""
    return False


def without_adapter(base: Base) -> Base:
    """Return the same model for an adapter to be put on, or to stay without one; the arrays are shared."""
    return replace(base, model=copy.deepcopy(base.model))  # copies modules, not their arrays


@dataclass(frozen=True)
class Compared:
    """The losses of models on the same rows, and their answers to some of them.

    Attributes:
        rows: model -> its row losses: `base`, and `adapter` if there is one.
        whole: whether all rows were measured, and all that were asked answered.
        examples: what was asked; see `ask`.
    """

    rows: dict[str, RowLosses]
    whole: bool
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: those of the model that was asked for by their own names, those of the base with `base_`."""
        found: dict[str, Any] = {}
        last = list(self.rows)[-1] if self.rows else None
        for name, rows in self.rows.items():
            prefix = "" if name == last else f"{name}_"
            found |= {f"{prefix}loss": rows.loss, f"{prefix}perplexity": perplexity(rows.loss)}
        if len(self.rows) == 2:
            found["change"] = asdict(paired_change(self.rows[BASE], self.rows[ADAPTER]))
        for name in self.rows if self.examples else ():
            exact = [one["exact"][name] for one in self.examples if one["exact"] is not None]
            found[f"{'' if name == last else f'{name}_'}exact_match"] = sum(exact) / len(exact) if exact else None
        return found | ({"examples": self.examples} if self.examples else {}) | {"partial": not self.whole}


def measure_rows(
    models: Mapping[str, Base],
    rows: EncodedSet,
    loop: LoopSettings,
    objective: Objective,
    say: Callable[[str], None],
    stopped: Callable[[], bool] = never,
) -> tuple[dict[str, RowLosses], bool]:
    """Return the losses of the rows for each model, and whether all rows were measured.

    Args:
        models: name -> model.
        rows: to measure.
        loop: how rows are put into batches.
        objective: whose loss is a mean over tokens.
        say: takes lines of progress where there is no bar.
        stopped: asked before each batch whether to end.
    """
    tasks = {
        name: task_of(objective, choose_loss(one.model, one.config, loop.kernels), one.model)
        for name, one in models.items()
    }
    plan = held_out_plan(rows, loop)
    found: dict[str, list[RowLosses]] = {name: [] for name in models}
    batches = takewhile(lambda _: not stopped(), plan.batches())
    for batch in tracked(batches, "Measuring", len(plan), "batches", say):
        for name, one in models.items():
            measured = mean_loss(one.model, tasks[name], [batch]).rows
            if measured is not None:
                found[name].append(measured)
    done = sum(len(one.tokens) for one in next(iter(found.values())))
    joined = {name: _joined(parts) for name, parts in found.items() if parts}
    return joined, done == int((rows.supervised_counts > 0).sum())


def _joined(parts: Iterable[RowLosses]) -> RowLosses:
    parts = list(parts)
    return RowLosses(np.concatenate([p.sums for p in parts]), np.concatenate([p.tokens for p in parts]))


def questions_of(rows: EncodedSet, most: int | None) -> list[int]:
    """Return the numbers of the rows whose questions are asked, spaced evenly over all.

    Args:
        rows: of prompts and answers; rows of plain text ask nothing.
        most: how many to ask; None: a few, or none if no row has a prompt.

    Raises:
        InputError: no row has a prompt.
    """
    if most == 0:
        return []
    asked = [number for number in range(0, len(rows), rows.group) if row_answer(rows, number)]
    if not asked and most is not None:
        raise InputError("--show: the rows are plain text without questions; leave it out, or give --show 0")
    most = USUAL if most is None else most
    return [asked[(2 * i + 1) * len(asked) // (2 * most)] for i in range(most)] if most < len(asked) else asked


def ask(
    models: Mapping[str, Base],
    rows: EncodedSet,
    chosen: Sequence[int],
    say: Callable[[str], None],
    stopped: Callable[[], bool] = never,
) -> tuple[list[dict[str, Any]], bool]:
    """Ask each model the questions of some rows, and return question, expected answer and texts, and whether all were asked.

    Args:
        models: name -> model.
        rows: of prompts and answers.
        chosen: numbers of the rows; see `questions_of`.
        say: takes lines of progress where there is no bar.
        stopped: asked before each question whether to end.

    Returns:
        For each row `question`, `expected`, the text of each model by its name, and `exact`: name -> whether the text is
        the expected one but for case, space and punctuation; None where more than 8 words are expected.
    """
    found = []
    pending = takewhile(lambda _: not stopped(), chosen)
    for number in tracked(pending, "Asking", len(chosen), "questions", say):
        found.append(_answers(models, rows, number))
    return found, len(found) == len(chosen)


def _answers(models: Mapping[str, Base], rows: EncodedSet, number: int) -> dict[str, Any]:
    tokenizer = next(iter(models.values())).hf_tokenizer
    prompt, answer = before_answer(rows, number), row_answer(rows, number)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    most = min(MOST_TOKENS, len(answer) + MORE_TOKENS)
    shown = Sample(str(tokenizer.decode(prompt)), "", specials=specials)
    texts = {
        name: shown.said(greedy_text(one, prompt[-MOST_PROMPT_TOKENS:], most)).strip() for name, one in models.items()
    }
    expected = shown.said(str(tokenizer.decode(answer))).strip()
    question = shown.turns[-1][1] if shown.turns else shown.prompt
    short = len(expected.split()) <= SHORT_WORDS
    exact = {name: normalized(text) == normalized(expected) for name, text in texts.items()} if short else None
    return {"question": question, "expected": expected, **texts, "exact": exact}


def normalized(text: str) -> str:
    """Return a text for an exact match: lower case, without punctuation at the ends of words, with single spaces."""
    words = (re.sub(r"^\W+|\W+$", "", word) for word in text.lower().split())
    return " ".join(filter(None, words))
