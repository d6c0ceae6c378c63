"""Encode the answers of each record, one or several, and keep them together.

example   one row
pair      two rows: the chosen answer, then the rejected one; their label is the margin
prompt    one row, in which nothing is trained; its answers are sampled during the run
rated     two rows: the answer, then the answer to another prompt after the same prompt, which tells how far the policy
          is from the reference (KTO, arXiv 2402.01306, section 4.2); the label is 1 for a good answer and 0 for a bad one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Example
from mlx_lora.data.preferences import Pair, Rated
from mlx_lora.data.prompts import Prompt, encode_prompts, with_teacher_rows
from mlx_lora.data.tokenize import Encoded, Encoder

Entry = Example | Pair | Rated | Prompt
"""The content of one record in canonical form."""


def answers_of(entry: Entry) -> list[Example]:
    """Return the examples of an entry, each of which becomes a row."""
    if isinstance(entry, Pair):
        return [entry.chosen, entry.rejected]
    if isinstance(entry, Prompt):
        return [entry.example]
    return [entry.answer] if isinstance(entry, Rated) else [entry]


def encode_entries(
    encoder: Encoder,
    entries: Sequence[Entry],
    on_rows: Callable[[int], None] = lambda done: None,
    teacher_prompt: str | None = None,
) -> Encoded:
    """Encode entries of one kind.

    Args:
        encoder: how.
        entries: all examples, all pairs, all rated answers or all prompts.
        on_rows: as in `Encoder.encode`.
        teacher_prompt: a text that only a teacher sees; the rows of examples and prompts then have its rows beside them.

    Returns:
        As `Encoder.encode`, with numbers of entries. A pair is dropped if one of its answers gave no row.
    """
    prompts = [entry for entry in entries if isinstance(entry, Prompt)]
    if prompts:
        return encode_prompts(encoder, prompts, teacher_prompt)
    pairs = [entry for entry in entries if isinstance(entry, Pair)]
    rated = [entry for entry in entries if isinstance(entry, Rated)]
    size = 2 if pairs else 1
    answers = [answer for entry in entries for answer in answers_of(entry)]
    encoded = encoder.encode(answers, lambda done: on_rows(done // size))
    if teacher_prompt is not None:
        return with_teacher_rows(encoded, answers, teacher_prompt, encoder)
    return _as_pairs(encoded, pairs) if pairs else _as_rated(encoded, rated) if rated else encoded


def _as_pairs(encoded: Encoded, pairs: Sequence[Pair]) -> Encoded:
    """Put the two rows of each pair side by side, and number the results by pairs instead of answers."""
    rows_of: dict[int, list[int]] = {}
    for row, answer in enumerate(encoded.source.tolist()):
        rows_of.setdefault(answer, []).append(row)
    dropped = {}
    for answer, why in sorted(
        encoded.dropped.items(), reverse=True
    ):  # if both are dropped, the chosen answer's reason counts
        dropped[answer // 2] = f"{'rejected' if answer % 2 else 'chosen'} answer: {why}"
    rows, source, equal = [], [], []
    for pair in range(len(pairs)):
        both = [rows_of.get(2 * pair + side, []) for side in range(2)]
        if pair in dropped or not all(both):
            continue
        found = [encoded.rows.row(side[-1]) for side in both]  # its last row: earlier ones show the prompt's turns
        if np.array_equal(found[0][0], found[1][0]):
            equal.append(pair)  # equal within --max-seq-length
            continue
        rows += found
        source.append(pair)
    dropped |= dict.fromkeys(equal, "the answers are equal after the cut at --max-seq-length")
    margins = np.array([value for pair in source for value in (pairs[pair].margin, 0.0)], np.float32)
    return _numbered(encoded, EncodedSet.from_rows(rows).grouped(2, margins), source, dropped, 2)


def _as_rated(encoded: Encoded, rated: Sequence[Rated]) -> Encoded:
    """Add a row after each answer: the answer of the next record with another prompt, after this record's prompt."""
    last = {answer: row for row, answer in enumerate(encoded.source.tolist())}
    source = sorted(last)
    rows = [encoded.rows.row(last[number]) for number in source]
    starts = [int(np.argmax(mask)) for _, mask in rows]  # the first token of each answer
    following = _next_others([tokens[:start].tobytes() for (tokens, _), start in zip(rows, starts, strict=True)])
    joined = []
    for i, (tokens, mask) in enumerate(rows):
        joined.append((tokens, mask))
        other_tokens, other_mask = rows[following[i]]
        other = starts[following[i]]
        together = np.concatenate([tokens[: starts[i]], other_tokens[other:]])
        trained = np.concatenate([np.zeros(starts[i], bool), other_mask[other:]])
        joined.append((together, trained))
    labels = np.array([value for number in source for value in (float(rated[number].good), 0.0)], np.float32)
    return _numbered(
        encoded, EncodedSet.from_rows(joined).grouped(2, labels, trained_rows=1), source, dict(encoded.dropped), 1
    )


def _next_others(prompts: Sequence[bytes]) -> list[int]:
    """Return for each prompt the number of the next one that differs, in a circle; if none does, of the next one."""
    count = len(prompts)
    found = [(number + 1) % count for number in range(count)]
    if len(set(prompts)) > 1:
        for number in reversed(range(2 * count)):  # twice around, so that the last ones know the first ones' next
            after = (number + 1) % count
            if prompts[after] == prompts[number % count]:
                found[number % count] = found[after]
    return found


def _numbered(encoded: Encoded, rows: EncodedSet, source: list[int], dropped: dict[int, str], size: int) -> Encoded:
    """Return the result with numbers of entries instead of answers, `size` answers per entry."""
    return replace(
        encoded,
        rows=rows,
        source=np.array(source, np.int64),
        dropped=dict(sorted(dropped.items())),
        truncated=sorted({number // size for number in encoded.truncated}),
        unshown={name: sorted({n // size for n in numbers}) for name, numbers in encoded.unshown.items()},
        divided=sorted({number // size for number in encoded.divided}),
        controls={name: sorted({n // size for n in numbers}) for name, numbers in encoded.controls.items()},
    )
