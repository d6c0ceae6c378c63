"""Ask a model the questions of rows, several at once, and choose the questions that a run is asked at its end; `is_right` judges an answer.

A held-out loss tells whether the form of the answers was learned. Facts that stand in no held-out row do not show in it: a
run over a catalog can halve its held-out loss and know nothing of the catalog. So a run of short answers ends with questions:

    in your words    trained questions
    in new words     those of --ask, or held-out questions with the answer of a training row
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.adapters.inject import full_parameters, without_adapters
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.models.folder import FOREIGN_ERRORS, raise_if_ours
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
        asked: None where nobody can tell (`is_right`).
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
            raise_if_ours(error)
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


# Tell whether an answer is right, where its expected answer lets anybody tell: by its numbers and names, not by its wording.
#
#     JSON                                   the first JSON value in the answer is the expected one
#     numbers and names that the question    all of them are in the answer; "1,250" is 1250, "6:45 pm" is 18:45, "TH-4471" is th4471,
#     does not have                          and "twelve" is 12
#     at most eight words without any        the answer is the expected one but for case, space and punctuation
#     anything else                          nobody can tell: it may be as good in other words
#
# Names are words with a capital letter that do not begin a sentence. Scripts without capital letters have numbers only.

SHORT_WORDS = 8  # an expected answer of at most so many words without numbers and names has to be given exactly
YES, NO = frozenset(("yes", "true", "ja", "sí", "oui")), frozenset(("no", "false", "nein", "non"))
# Words with a capital letter that say what a number counts, so that nobody has to repeat them.
_UNITS = frozenset(
    re.findall(
        r"\w+",
        "i uhr euro euros eur usd gbp chf dollar franken kronen kc prozent grad kilo gramm liter meter kilometer stuck personen "
        "minute minuten stunde stunden tag tage tagen woche wochen monat monate monaten jahr jahre jahren",
    )
)
_SMALL = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen",
)
_TENS = {
    name: 10 * n
    for n, name in enumerate(("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 2)
}
_WORDS = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<more>{'|'.join(_SMALL[1:10])}))?|(?P<small>{'|'.join(_SMALL)}))?"
    r"(?P<hundred>(?<=\w) hundred|\bhundred)?\b",
    re.IGNORECASE,
)
_TIME = re.compile(
    r"(?<![\w.,:])(\d{1,2})(?:[:h]([0-5]\d)(?![\d:])|\.([0-5]\d)(?=\s*(?:uhr|h|[ap]\.?m)\b)|(?=\s*(?:uhr|o.clock|[ap]\.?m)\b))"
    r"\s*(?:(?:uhr|o.clock|h)\b)?(?:\s*([ap])\.?m\b\.?)?",
    re.IGNORECASE,
)
_CODE = re.compile(r"(?<![^\W_])[a-z]{1,8}-?\d[\da-z]*(?:-[\da-z]+)*", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![^\s(])[-\u2212])?\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+")
_OPENING = " \t\"'\u201c\u201e\u2018\u00ab([*\u2022-\u2013"


def is_right(expected: str, given: str, question: str) -> bool | None:
    """Return whether an answer is right; None: this expected answer does not let anybody tell."""
    with suppress(ValueError):
        if expected.lstrip()[:1] in ("{", "["):
            return json.loads(expected) == _first_json(given)
    first, begins = (normalized(text).split(" ")[0].rstrip(",.") for text in (expected, given))
    if (first in YES and begins in NO) or (first in NO and begins in YES):
        return False
    asked, said = (frozenset().union(*_facts(text)) for text in (question, given))
    plain = re.sub(r"\bone\b", "", expected, flags=re.IGNORECASE)  # more often a pronoun
    if facts := [fact for fact in _facts(plain, names=True) if not fact & asked]:
        squeezed = re.sub(r"[\s\u2013-]", "", _folded(given))
        return all(fact & said or any(_holds_code(squeezed, one) for one in fact) for fact in facts)
    if normalized(expected) in YES | NO:
        return first == begins
    # Chinese and Japanese have no spaces; a word is about two characters.
    unspaced = expected.lower() == expected.upper() and len(expected.split()) < 2
    if (len(expected) // 2 if unspaced else len(expected.split())) > SHORT_WORDS:
        return None
    return normalized(given) == normalized(expected)


def normalized(text: str) -> str:
    """Return a text for an exact match: lower case, without punctuation at the ends of words, with single spaces."""
    words = (re.sub(r"^\W+|\W+$", "", word) for word in text.lower().split())
    return " ".join(filter(None, words))


def _facts(text: str, names: bool = False) -> list[frozenset[str]]:
    """Return the numbers, times, codes and words of a text, each with all that it may be written as.

    Args:
        text: an answer or a question.
        names: only those words that are names.
    """
    text = re.sub(r"(?<=\d)[\u00a0\u202f'\u2019](?=\d{3}(?!\d))", "", text)  # 1 250 and 1'250
    text = _WORDS.sub(_digits, unicodedata.normalize("NFKC", text))
    found: list[frozenset[str]] = []

    def time(match: re.Match[str]) -> str:
        hour, minutes, half = int(match[1]), match[2] or match[3] or "00", (match[4] or "").lower()
        hour = hour % 12 + 12 * (half == "p") if half else hour
        whole = {str(hour)} if minutes == "00" and not half else set()  # "from 9 to 18"
        found.append(frozenset({f"{hour}:{minutes}", *whole}))
        return " "

    def code(match: re.Match[str]) -> str:
        found.append(frozenset({_folded(match[0]).replace("-", "")}))
        return " "

    text = _CODE.sub(code, _TIME.sub(time, text))
    for match in _NUMBER.finditer(text):
        found += _numbers(match[0].replace("\u2212", "-"))
    for match in _WORD.finditer(text):
        before, word = text[max(0, match.start() - 8) : match.start()].rstrip(_OPENING), _folded(match[0])
        named = match[0] != match[0].lower() and word not in _UNITS and before and before[-1] not in ".!?:\n"
        if named or not names:
            found.append(frozenset({word}))
    return found


def _digits(match: re.Match[str]) -> str:
    if not match[0]:
        return ""
    small = [*_SMALL, ""]
    low = small.index((match["more"] or match["small"] or "zero").lower())
    number = _TENS.get((match["tens"] or "").lower(), 0) + low
    return str((number or 1) * 100 if match["hundred"] else number)


def _numbers(text: str) -> list[frozenset[str]]:
    """Return the numbers that are written as one: the parts of a date are several, and 1.250 may be 1250 as well."""
    parts = re.split("[.,]", text)
    thousands = (
        all(len(part) == 3 for part in parts[1:]) and parts[0].lstrip("-") not in ("", "0") and len(parts[0]) < 5
    )
    may_be = ["".join(parts)] if len(parts) > 1 and thousands else []
    if len(parts) == 2 or (
        len(parts) > 2 and all(len(part) == 3 for part in parts[1:-1]) and "." in text and "," in text
    ):
        may_be.append(f"{''.join(parts[:-1])}.{parts[-1]}")
    if may_be:
        return [frozenset(_plain(one) for one in may_be)]
    return [frozenset({_plain(part)}) for part in parts]


def _plain(number: str) -> str:
    whole = len(number) > 2 and number[0] == "0" and number.isdigit()  # the beginning of a telephone number
    return number if whole else f"{Decimal(number).normalize():f}"


def _holds_code(squeezed: str, code: str) -> bool:
    """Return whether a text without spaces has a code of letters and digits, however it is divided there."""
    return bool(re.fullmatch(r"[a-z]+\d\w*", code) and re.search(rf"{code}(?!\d)", squeezed))


def _folded(text: str) -> str:
    """Return a text without case and accents."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return "".join(one for one in apart if not unicodedata.combining(one))


def _first_json(text: str) -> Any:
    """Return the first object or list in a text; None: there is none."""
    for match in re.finditer(r"[{\[]", text):
        with suppress(ValueError):
            return json.JSONDecoder().raw_decode(text, match.start())[0]
    return None
