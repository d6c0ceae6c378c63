"""Rows of token ids with a mask of what is trained, in flat arrays.

Shapes: N tokens of all rows together, R rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlx_lora.data.teacher_table import TeacherTable


@dataclass(frozen=True)
class EncodedSet:
    """Encoded rows, one after another.

    Attributes:
        tokens: (N,) int32 token ids.
        mask: (N,) bool, True: this token is a target that is trained. A row's first token is never a target.
        offsets: (R + 1,) int64; row i is tokens[offsets[i]:offsets[i + 1]].
        group: Rows per example, K: the two answers of a pair are rows 2 i and 2 i + 1. Batches keep them together.
        trained_rows: How many rows of each example are trained, the first ones; the others are only measured. None: all.
        labels: (R,) float32, what the data says about a row in addition to its tokens; None: nothing. (R, K) with `starts`.
        answers: (N,) bool, the trained targets that belong to an answer; None: all of them.
        reference: (R,) float32, log-probability of each row's answer under the reference; None: not computed. It follows
            from the other arrays and the base, and is not part of the fingerprint. (R, K) with `starts`.
        facts: What rewards see of each example in addition to its tokens; None: nothing. They are not part of the fingerprint.
        starts: (R, K) int32, for rows with a prompt followed by K answers: where each answer starts (objectives/prefix_sharing.py);
            None: a row holds one text.
        teacher: The same rows as a teacher sees them, with another prompt before the same trained targets, or for
            prompts alone, another prompt; None: it sees these.
        table: What a teacher says about the trained targets of each row; None: nothing. Like `reference`, it follows from
            the other arrays and the teacher.
        pictures: (R,) int32, which pictures a row shows: their number in the run's table (data/image_tokens.py), 0 without
            any; None: there are none.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    group: int = 1
    labels: np.ndarray | None = None
    answers: np.ndarray | None = None
    reference: np.ndarray | None = None
    starts: np.ndarray | None = None
    trained_rows: int | None = None
    facts: tuple[dict[str, Any], ...] | None = None
    teacher: EncodedSet | None = None
    table: TeacherTable | None = None
    pictures: np.ndarray | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> EncodedSet:
        """Return the set of these (tokens, mask) rows."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(tokens) for tokens, _ in rows], out=offsets[1:])
        tokens = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in rows)])
        mask = np.concatenate([np.zeros(0, bool), *(mask for _, mask in rows)])
        return cls(tokens.astype(np.int32, copy=False), mask, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, (R,) int64."""
        return np.diff(self.offsets)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row i's tokens and mask, as views."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.mask[part]

    def select(self, examples: Sequence[int] | np.ndarray) -> EncodedSet:
        """Return the set of these examples, in this order."""
        rows = (np.asarray(examples, np.int64)[:, None] * self.group + np.arange(self.group)).ravel()
        at = np.concatenate([np.zeros(0, np.int64), *(np.arange(*self.offsets[i : i + 2]) for i in rows)])
        named = {"tokens": at, "mask": at, "answers": at}
        named |= dict.fromkeys(("labels", "reference", "starts", "pictures"), rows)
        arrays = {name: None if getattr(self, name) is None else getattr(self, name)[of] for name, of in named.items()}
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        seen = None if self.teacher is None else self.teacher.select(examples)
        table = None if self.table is None else self.table.select(rows)
        chosen = replace(self, offsets=offsets, teacher=seen, table=table, **arrays)
        return chosen.with_facts(None if self.facts is None else [self.facts[int(i)] for i in examples])

    @property
    def examples(self) -> int:
        """Number of examples, R / K."""
        return len(self) // self.group

    def grouped(self, group: int, labels: np.ndarray | None = None, trained_rows: int | None = None) -> EncodedSet:
        """Return the same rows as examples of `group` rows each, with labels (R,)."""
        labels = None if labels is None else labels.astype(np.float32)
        return replace(self, group=group, labels=labels, trained_rows=trained_rows)

    def with_facts(self, facts: Sequence[dict[str, Any]] | None) -> EncodedSet:
        """Return the same set with what rewards see of each example."""
        return replace(self, facts=None if facts is None else tuple(facts))

    def with_room(self, group: int, tokens: int) -> EncodedSet:
        """Return prompts as examples of `group` rows each, with room for answers: `tokens` targets after each prompt."""
        answer = np.zeros(tokens, np.int32), np.ones(tokens, bool)
        rows = []
        for number in range(len(self)):
            prompt = self.row(number)
            rows += [tuple(np.concatenate(parts) for parts in zip(prompt, answer, strict=True))] * group
        seen = None if self.teacher is None else self.teacher.with_room(group, tokens)
        pictures = None if self.pictures is None else np.repeat(self.pictures, group)
        roomy = EncodedSet.from_rows(rows).grouped(group).with_facts(self.facts)
        return replace(roomy, teacher=seen, pictures=pictures)

    def with_whole_rows(self) -> EncodedSet:
        """Return the same set with the prompt of each example's first row trained too; answers stay marked."""
        mask = self.mask.copy()
        for row in range(0, len(self), self.group):
            mask[self.offsets[row] + 1 : self.offsets[row + 1]] = True
        return replace(self, mask=mask, answers=self.mask)

    def with_end_scores(self) -> EncodedSet:
        """Return the same set with the last token of each row as its only position, for a score of the whole row.

        A position is that of a token before a trained target, so each row gets one more token, which is only a target:
        it is never an input, and no loss reads it.
        """
        ends = self.offsets[1:]
        tokens, mask = np.insert(self.tokens, ends, 0), np.insert(np.zeros_like(self.mask), ends, True)
        return replace(self, tokens=tokens, mask=mask, offsets=self.offsets + np.arange(len(self.offsets)))

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """The number of trained targets of each row, (R,) int64."""
        return np.add.reduceat(self.mask, self.offsets[:-1], dtype=np.int64) if len(self) else np.zeros(0, np.int64)

    @cached_property
    def supervised_tokens(self) -> int:
        """The number of trained targets, without those of rows that are only measured."""
        return int(self.supervised_counts[self.trained_numbers].sum())

    @property
    def trained_numbers(self) -> np.ndarray:
        """The numbers of the rows that are trained, int64."""
        return np.arange(len(self)).reshape(-1, self.group)[:, : self.trained_rows].ravel()

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the three arrays in hex, which identifies the data for --resume."""
        digest = hashlib.sha256()
        for array, kind in ((self.tokens, "<i4"), (self.mask, "?"), (self.offsets, "<i8")):
            digest.update(np.ascontiguousarray(array, kind).data)
        if self.group > 1 or self.labels is not None:
            labels = np.zeros(0) if self.labels is None else self.labels
            digest.update(str(self.group).encode() + np.ascontiguousarray(labels, "<f4").data)
        if self.answers is not None:
            digest.update(np.ascontiguousarray(self.answers, "?").data)
        if self.teacher is not None:
            digest.update(self.teacher.fingerprint.encode())
        if self.pictures is not None:
            digest.update(np.ascontiguousarray(self.pictures, "<i4").data)
        return digest.hexdigest()


def spaced_by_length(rows: EncodedSet, count: int) -> np.ndarray:
    """Return the numbers of `count` examples, spaced evenly in the order of their lengths; (count,) int64, ascending."""
    order = np.argsort(positions_by_example(rows), kind="stable")
    return np.sort(order[((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)])


def positions_by_example(rows: EncodedSet) -> np.ndarray:
    """Return the positions of each example, all its rows together; (E,) int64."""
    return (rows.lengths - 1).reshape(-1, rows.group).sum(axis=1)
