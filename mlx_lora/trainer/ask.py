"""Ask a model the questions of rows, several at once, and choose the questions that a run is asked at its end.

A held-out loss tells whether the form of the answers was learned. Facts that stand in no held-out row do not show in it: a
run over a catalog can halve its held-out loss and know nothing of the catalog. So a run of short answers ends with questions:

    in your words    trained questions
    in new words     those of --ask, or held-out questions with the answer of a training row
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.adapters.inject import full_parameters, without_adapters
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.data.right import is_right, normalized
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.generator import SamplingOptions, answer_keys, write_texts
from mlx_lora.reports.run_report import MODELS, MOST_ALIKE, Sample
from mlx_lora.trainer.callbacks import before_answer, greedy_text, row_answer, whole_words
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.progress import tracked

if TYPE_CHECKING:
    from mlx_lora.data.load import DataSplits
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.base import RunContext

AT_ONCE = 32  # questions
MOST_TOKENS = 64  # of an answer
MORE_TOKENS = 8  # than the expected answer has, which an answer may take to end
MOST_PROMPT_TOKENS = 1024
BASE, ADAPTER = MODELS


def never() -> bool:
    """Say that nobody asked to stop."""
    return False


def ask(
    models: Mapping[str, Base], rows: EncodedSet, chosen: Sequence[int], stopped: Callable[[], bool] = never
) -> tuple[list[dict[str, Any]], bool]:
    """Ask each model the questions of some rows, and return what each said, and whether all were asked.

    Args:
        models: `base`, `adapter` or both -> the model.
        rows: of prompts and answers.
        chosen: numbers of the rows.
        stopped: asked before each batch of questions whether to end.

    Returns:
        For each row `question`, `expected`, the text of each model by its name, and `base_right` and `right` of those that were
        asked: None where nobody can tell (data/right.py).
    """
    found: list[dict[str, Any]] = []
    batches = [chosen[at : at + AT_ONCE] for at in range(0, len(chosen), AT_ONCE)]
    for batch in tracked(takewhile(lambda _: not stopped(), batches), "Asking", len(batches), "batches"):
        asked = [question_of(next(iter(models.values())), rows, number) for number in batch]
        for name, base in models.items():
            for one, text in zip(asked, _texts(base, rows, batch), strict=True):
                one[name] = text
                one["base_right" if name == BASE else "right"] = is_right(one["expected"], text, one["question"])
        found += asked
    return found, len(found) == len(chosen)


def question_of(base: Base, rows: EncodedSet, number: int) -> dict[str, Any]:
    """Return the question and the expected answer of a row, without the template's markers."""
    shown = _shown(base, before_answer(rows, number))
    expected = shown.said(str(base.hf_tokenizer.decode(row_answer(rows, number)))).strip()
    return {"question": shown.turns[-1][1] if shown.turns else shown.prompt, "expected": expected}


def _shown(base: Base, prompt: list[int]) -> Sample:
    tokens = base.hf_tokenizer.added_tokens_decoder.values()
    return Sample(str(base.hf_tokenizer.decode(prompt)), "", specials=[one.content for one in tokens if one.special])


def _texts(base: Base, rows: EncodedSet, chosen: Sequence[int]) -> list[str]:
    """Return a model's greedy answer to each of some rows' prompts."""
    prompts = [before_answer(rows, number)[-MOST_PROMPT_TOKENS:] for number in chosen]
    limits = [min(MOST_TOKENS, len(row_answer(rows, number)) + MORE_TOKENS) for number in chosen]
    found, ends = dict[int, str](), frozenset(base.tokenizer.eos_token_ids)

    def take(numbers: list[int], answers: list[list[int]]) -> None:
        for number, tokens in zip(numbers, answers, strict=True):
            own = tokens[: limits[number]]
            text = str(base.hf_tokenizer.decode([token for token in own if token not in ends]))
            found[number] = text if own[-1] in ends else whole_words(text)

    options, keys = SamplingOptions(1, max(limits), temperature=0), answer_keys(0, 0, len(prompts))
    try:
        write_texts(base, prompts, range(len(prompts)), options, ends, keys, take)
    except InputError:  # the keys and values of several rows cannot be held together
        found = {n: greedy_text(base, prompt, limits[n]) for n, prompt in enumerate(prompts)}
    return [_shown(base, []).said(found[number]).strip() for number in range(len(prompts))]


# What a run is asked at its end

MOST_OWN, MOST_NEW, MOST_GIVEN = 32, 20, 100  # questions of the training rows, in new words, and of --ask
MOST_POSITIONS = 8192  # of all trained rows that are asked together
SHORT = 48  # trained tokens of a row, on average; longer answers are seldom meant to be repeated


def ask_run(ctx: RunContext, data: DataSplits) -> list[dict[str, Any]]:
    """Ask the trained model, and the base, what a sample of the training rows asks, and the same in new words.

    Args:
        ctx: of a run that ended, in one process.
        data: of the run.

    Returns:
        As of `ask`, each with `new_words` and `ticked`; empty where there is nothing to ask: another objective, plain text, long
        answers, answers of which nobody can tell whether they are right.
    """
    base, found = ctx.base, []
    asked = ctx.settings.objective
    if not asked.row.of_answers or asked.images:
        return []
    own = _trained(base, data.train) if ctx.settings.data.mask_prompt else []
    given = [n for n in range(len(data.asked)) if row_answer(data.asked, n)] if data.asked is not None else []
    new = _spaced(given, MOST_GIVEN) if given else _reworded(base, data) if own else []
    for rows, numbers, new_words in ((data.train, own, False), (data.asked or data.valid, new, True)):
        if not numbers or rows is None:
            continue
        try:
            answers, _ = ask({ADAPTER: base}, rows, numbers)
            if not full_parameters(base.model):
                with without_adapters(base.model):
                    before, _ = ask({BASE: base}, rows, numbers)
                answers = [one | other for one, other in zip(before, answers, strict=True)]
        except FOREIGN_ERRORS as error:  # a run must not end because of a missing text
            if not is_foreign(error):
                raise
            return []
        found += [one | {"new_words": new_words, "ticked": None} for one in answers]
    return found


def _trained(base: Base, rows: EncodedSet) -> list[int]:
    """Return a sample of the training rows; none if their answers are long, or most of them cannot be checked."""
    count = min(MOST_OWN, len(rows), max(1, int(MOST_POSITIONS / max(1.0, float(rows.lengths.mean())))))
    sample = spaced_by_length(rows, count).tolist() if count else []
    answers = [len(row_answer(rows, number)) for number in sample]
    if not sample or not all(answers) or sum(answers) > SHORT * len(answers):
        return []
    checked = _checkable(base, rows, sample)
    return checked if 2 * len(checked) >= len(sample) else []


def _checkable(base: Base, rows: EncodedSet, numbers: Sequence[int]) -> list[int]:
    questions = {number: question_of(base, rows, number) for number in numbers}
    return [n for n, one in questions.items() if is_right(one["expected"], "", one["question"]) is not None]


def _reworded(base: Base, data: DataSplits) -> list[int]:
    """Return held-out rows that ask in other words for the answer of a training row."""
    near, rows = data.report.near_duplicates, data.valid
    if rows is None or near.held_out_rows > MOST_ALIKE * len(rows):
        return []
    held = {number: tuple(answer) for number in range(len(rows)) if (answer := row_answer(rows, number))}
    wanted, asked = set(held.values()), set[str]()
    known = set[tuple[int, ...]]()
    for number in range(len(data.train)):
        if (answer := tuple(row_answer(data.train, number))) in wanted:
            known.add(answer)
            asked.add(normalized(question_of(base, data.train, number)["question"]))
    numbers = [
        n
        for n, answer in held.items()
        if answer in known and normalized(question_of(base, rows, n)["question"]) not in asked
    ]
    return _spaced(_checkable(base, rows, numbers), MOST_NEW)


def _spaced(numbers: Sequence[int], most: int) -> list[int]:
    """Return at most so many of some numbers, spaced evenly."""
    count = min(most, len(numbers))
    return [numbers[at] for at in ((np.arange(count) + 0.5) * len(numbers) / max(1, count)).astype(int).tolist()]
