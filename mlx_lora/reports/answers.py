"""Count the right answers of a run: to trained questions, and to questions in new words.

An answer is a mapping, as trainer/ask.py makes it and report.json keeps it: `question`, `expected`, `base` and `adapter` (the
models' texts), `base_right` and `right` (None: nobody can tell, see data/right.py). A run's answers also have `new_words`, and
`ticked`: what a person said of the adapter's answer, which counts more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lora.utils.text import counted

# What became of a run

LEARNED, TOO_FEW_STEPS, OVER_FITTED = "learned", "too few steps", "overfitted"
MEMORIZED, UNCHANGED, WORSE, UNKNOWN = "memorized", "nothing changed", "worse", "not measured"
YOUR_WORDS, LITTLE, AS_BASE = "your words only", "little", "as the base"
# How a headline about answers begins, where not by the name itself.
HEADS = {YOUR_WORDS: "Knows mostly your wording", LITTLE: "Learned little", AS_BASE: "No better than the base"}

MODELS = ("base", "adapter")
HALF = 0.5  # share of right answers from which a run has learned
CLEAR = 0.1  # of all answers, by so many more than the base's: 17 of 32 instead of 16 are no skill
CHANCE = 0.05

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Count:
    """How many of some questions are answered right.

    Attributes:
        right: by the adapter.
        of: questions whose answers can be checked.
        base: by the base; None: it was not asked.
        fell: whether the adapter answers fewer than the base by more than chance (one-sided sign test over the questions
            that one of the two alone answers right; five lost and none gained are the fewest).
    """

    right: int
    of: int
    base: int | None = None
    fell: bool = False

    @property
    def half(self) -> bool:
        """Whether at least half of the answers are right."""
        return self.right >= HALF * self.of

    @property
    def gain(self) -> int:
        """How many more are right than the base's."""
        return self.right - (self.base or 0)

    @classmethod
    def over(cls, answers: Iterable[Answer]) -> Count | None:
        """Count some answers; None: none of them can be checked."""
        pairs = [(judged(one), one.get("base_right")) for one in answers if judged(one) is not None]
        if not pairs:
            return None
        asked = any(base is not None for _, base in pairs)
        lost, gained = (sum(pair == one for pair in pairs) for one in ((False, True), (True, False)))
        chance = sum(math.comb(lost + gained, n) for n in range(lost, lost + gained + 1)) / 2 ** (lost + gained)
        base = sum(base is True for _, base in pairs) if asked else None
        return cls(sum(right is True for right, _ in pairs), len(pairs), base, lost > gained and chance < CHANCE)


def judged(answer: Answer) -> bool | None:
    """Return whether an adapter's answer is right: as a person said, or else as the expected answer tells."""
    return answer.get("right") if answer.get("ticked") is None else answer["ticked"]


def counts_of(
    answers: Iterable[Answer], evaluation: Mapping[str, Any] | None = None
) -> tuple[Count | None, Count | None]:
    """Return the counts of right answers in the words of the training rows, and in new words.

    Args:
        answers: of a run.
        evaluation: what `evaluate` measured later; its questions count instead of the run's own in new words, unless they are
            the run's own held-out rows, or most of them repeat training rows.
    """
    own, new = (Count.over(one for one in answers if one["new_words"] is is_new) for is_new in (False, True))
    if evaluation and not evaluation.get("held_out"):
        seen = evaluation.get("near_training") or {"rows": 0, "of_rows": 1}
        if 2 * seen["rows"] <= seen["of_rows"]:
            new = Count.over(evaluation.get("examples") or ()) or new
    return own, new


def named_by(counts: Sequence[Count], begun: bool, fell: bool) -> str:
    """Return what became of a run by its right answers.

    Args:
        counts: in the words of the training rows, in new words, or both.
        begun: whether it has only begun: it took few steps, or the training loss still falls.
        fell: whether the training loss fell. With not one more right, the form of the answers may have been learned.
    """
    main = counts[-1]
    if any(count.fell for count in counts):
        own_rose = len(counts) == 2 and not counts[0].fell and counts[0].gain > 0
        return OVER_FITTED if own_rose and not main.half else WORSE
    if any(count.half for count in counts):
        clear = any(count.gain >= CLEAR * count.of for count in counts)
        return AS_BASE if not clear else LEARNED if main.half else YOUR_WORDS
    if begun:
        return TOO_FEW_STEPS
    return LITTLE if fell or any(count.gain > 0 for count in counts) else UNCHANGED


def counts_words(own: Count | None, new: Count | None) -> str:
    """Return two counts as words: `30 of 32 right in your words, 14 of 20 in new words (the base: 0 and 1)`."""
    named = [(own, "in your words"), (new, "in new words")]
    counts = [(count, where) for count, where in named if count is not None]
    words = [f"{count.right} of {count.of}{'' if n else ' right'} {where}" for n, (count, where) in enumerate(counts)]
    bases = [str(count.base) for count, _ in counts if count.base is not None]
    base = f" (the base: {' and '.join(bases)})" if bases else ""
    return f"{', '.join(words)}{base}{'' if new else ', not tried in new words'}"


def shown_rows(examples: Sequence[Answer]) -> dict[str, Any]:
    """Return what pages show of questions and answers: `models`, the names of those that were asked, and `rows`.

    A row has `question`, `expected`, and `said`: the text of each model, and whether it is right, or None where nobody can tell.
    """
    models = [name for name in MODELS if examples and name in examples[0]]
    rows = [
        {
            "question": str(one["question"]),
            "expected": str(one["expected"]),
            "said": [(str(one[name]), one["base_right"] if name == MODELS[0] else judged(one)) for name in models],
        }
        for one in examples
    ]
    return {"models": models, "rows": rows}


def right_words(examples: Sequence[Answer]) -> str:
    """Return how many answers of each model are right; empty if none can be checked."""
    said = [row["said"] for row in shown_rows(examples)["rows"]]
    checked = [[right for _, right in one] for one in said if any(right is not None for _, right in one)]
    if not checked:
        return ""
    counts = ", ".join(
        f"{name} {sum(map(bool, column))}" for name, column in zip(MODELS, zip(*checked, strict=True), strict=False)
    )
    return f"right answers to the {counted(len(checked), 'question')} that can be checked: {counts}"
