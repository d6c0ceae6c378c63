"""Tell data sets whose answers repeat their prompt (full texts, as some sets have them) from answers that begin like it.

    prompt "The sky is"    chosen "The sky is blue."          in every row: full texts, and the answer is " blue."
    prompt "Hi"            chosen "Hi! How can I help you?"   here and there: an answer that greets back

One row does not show which of the two it is, so the whole set decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_lora.data.data_report import MAX_LISTED, Location, where
from mlx_lora.data.examples import Completion
from mlx_lora.data.preferences import Answer, Pair, Rated
from mlx_lora.data.reading import Rows
from mlx_lora.system.units import counted

NEARLY_ALL = 0.95  # of a set's pairs with a text as the prompt; then the few others are taken for mistakes


@dataclass(frozen=True)
class Repeated:
    """The rows of a set whose two answers begin with their prompt.

    Attributes:
        places: Where each is from.
        of: The number of rows with two answers to a text.
        cut: Whether the prompt was cut from these answers.
    """

    places: tuple[Location, ...]
    of: int
    cut: bool


def cut_repeated_prompts(parts: Sequence[tuple[Rows, int]]) -> Repeated:
    """Cut the prompt from the answers of one data set if nearly all of its pairs repeat it; change `parts` in place.

    Args:
        parts: The rows of each split, and the number of the set's first entry in it.
    """
    told = {
        place: entry.repeats
        for rows, first in parts
        for entry, place in zip(rows.entries[first:], rows.locations[first:], strict=True)
        if isinstance(entry, Pair | Rated) and entry.repeats is not None
    }
    places = tuple(place for place, repeats in told.items() if repeats)
    cut = bool(places) and len(places) >= NEARLY_ALL * len(told)
    if cut:
        for rows, first in parts:
            rows.entries[first:] = [
                _cut(entry) if isinstance(entry, Pair | Rated) and entry.repeats else entry
                for entry in rows.entries[first:]
            ]
    return Repeated(places, len(told), cut)


def repeated_notes(sets: Sequence[Repeated]) -> list[str]:
    """Return what the report says on answers that begin with their prompt: what was done, and to how many rows."""
    notes = []
    for cut in (True, False):
        chosen = [one for one in sets if one.places and one.cut == cut]
        places = [place for one in chosen for place in one.places]
        if not places:
            continue
        of = sum(one.of for one in chosen)
        found = f"both answers begin with the prompt in {len(places):,} of {counted(of, 'row')}"
        if cut:
            notes.append(f"{found}, so the set has full texts, and the prompt was cut from these answers")
        else:
            listed = where(places[:MAX_LISTED], len(places))
            notes.append(f"{found}, too few for a set of full texts; these answers are trained whole: {listed}")
    return notes


def _cut(entry: Pair | Rated) -> Pair | Rated:
    if isinstance(entry, Pair):
        return replace(entry, chosen=_without_prompt(entry.chosen), rejected=_without_prompt(entry.rejected))
    return replace(entry, answer=_without_prompt(entry.answer))


def _without_prompt(answer: Answer) -> Answer:
    if isinstance(answer, Completion):
        return replace(answer, completion=answer.completion.removeprefix(answer.prompt))
    return answer
