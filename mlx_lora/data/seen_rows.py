"""Count the measured rows that repeat, or nearly repeat, rows that a run trained on.

A right answer to such a row shows that the model remembers it, and not that it can do the same with other questions. What
nearly repeats is decided as in data/near_duplicates.py, on the rows' own texts: what is read, and what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mlx_lora.data.encoded_set import EncodedSet
from mlx_lora.data.examples import Completion
from mlx_lora.data.near_duplicates import near_pairs
from mlx_lora.data.spoken import spoken_turns

MOST_SHOWN = 60  # characters of a row that stands for the others


@dataclass(frozen=True)
class SeenRows:
    """How many of the measured rows the run has seen.

    Attributes:
        rows: that repeat or nearly repeat a row that the run trained on.
        exact: how many of these are equal to one.
        of_rows: how many rows were compared.
        example: the question of one of them, or its beginning; empty if there is none.
    """

    rows: int
    exact: int
    of_rows: int
    example: str = ""

    def words(self) -> str:
        """Return one sentence; empty if no row was seen."""
        if not self.rows:
            return ""
        verb = "nearly repeat" if not self.exact else "repeat" if self.exact == self.rows else "repeat or nearly repeat"
        return (
            f"{self.rows:,} of {self.of_rows:,} rows {verb} rows that the run trained on, such as “{self.example}”: right "
            "answers to those show memory, not skill"
        )


def seen_rows(measured: EncodedSet, trained: EncodedSet, tokenizer: PreTrainedTokenizerBase) -> SeenRows:
    """Compare rows that are measured with the rows of the run that made the adapter.

    Args:
        measured, trained: encoded by the same template.
        tokenizer: that encoded them.
    """
    numbers: dict[tuple[str, str], int] = {}
    known = {numbers.setdefault(sides, len(numbers)) for sides in _sides(trained, tokenizer)}
    asked = [numbers.setdefault(sides, len(numbers)) for sides in _sides(measured, tokenizer)]
    pairs = near_pairs([Completion(*sides) for sides in numbers])
    near = set(known)
    for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        near.update((one, other) if one in known or other in known else ())
    found = [row for row, text in enumerate(asked) if text in near]
    exact = sum(text in known for text in asked)
    return SeenRows(len(found), exact, len(asked), _question(measured, found[0], tokenizer) if found else "")


def _sides(rows: EncodedSet, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield what is read and what is trained of each row, without control tokens."""
    for number in range(len(rows)):
        tokens, mask = rows.row(number)
        read, trained = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[~mask], tokens[mask]))
        yield str(read), str(trained)


def _question(rows: EncodedSet, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the last thing that a row reads before its answer, or the beginning of a plain text, on one line."""
    tokens, mask = rows.row(number)
    start = int(mask.argmax())
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    turns = spoken_turns(str(tokenizer.decode(tokens[:start] if start > 1 else tokens)), specials)
    text = " ".join(turns[-1][1].split()) if turns else ""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN].rstrip()} …"
