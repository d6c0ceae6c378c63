"""Rows of token ids with a mask of what is trained, in flat arrays.

`TeacherTable` has the values that a teacher gives their positions.

Shapes: N tokens of all rows together, R rows.
"""

from __future__ import annotations

import errno
import hashlib
import os
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.utils.errors import RunError


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


# Keep values that are expensive to compute on disk, a record for each position, such as a teacher's probabilities.
#
#     <cache>/trunk/<key>/values.bin      the records of all rows, one row after another; rows not written yet take no space
#                         marks.bin       for each row, 0 or 1 << 32 | the CRC-32 of its records
#
# Whoever writes a row computes the same bytes for it, so several runs may share a folder. A row that was only partly
# written (a crash, a power failure) or damaged fails its check sum and counts as absent.
#
# A teacher has a record of 16-bit numbers for each trained token:
#
#     top k       [k ids: uint16, uint32 beyond 65,536 tokens] [k + 1 log-probabilities: float16]
#     everything  [V log-probabilities: float16]
#
# The log-probabilities are relative to that of the likeliest token, where float16 is finest; the last one of a top k is that
# of all other tokens together. What rounding leaves of their sum is divided out when they are used, so each record is a
# distribution again.
#
# Shapes: R rows, P positions, W bytes of a record, n trained tokens of a row, k likeliest tokens, N = k + 1 bins (N = V for
# everything).

VALUES_FILE, MARKS_FILE = "values.bin", "marks.bin"
PRESENT = 1 << 32


class RowStore:
    """The records of an encoded set's rows."""

    def __init__(self, folder: Path, positions: np.ndarray, record_bytes: int):
        """Open a folder, or create it.

        Args:
            folder: of these rows and records alone; its name is a key of everything that decides the bytes.
            positions: (R,) the number of records of each row.
            record_bytes: W.

        Raises:
            OSError: there is no space or no permission.
        """
        self._starts = record_bytes * np.concatenate([[0], np.cumsum(positions, dtype=np.int64)])
        self._record_bytes = record_bytes
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # the folders that were used longest ago are removed first
        # Read and written by position, not mapped into memory: mapped pages would count as the process's memory, and on a
        # full disk a write to them ends the process instead of raising an error.
        self._files = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in (VALUES_FILE, MARKS_FILE)]
        for file in self._files:
            weakref.finalize(self, os.close, file)
        stored = np.frombuffer(os.pread(self._files[1], 8 * len(positions), 0), np.uint8)
        self._marks = np.zeros(len(positions), np.uint64)
        self._marks.view(np.uint8)[: len(stored)] = stored
        self._checked = np.zeros(len(positions), bool)

    def read(self, row: int) -> np.ndarray | None:
        """Return a row's records, (positions, W) uint8; None: they are absent or damaged."""
        mark, start = int(self._marks[row]), int(self._starts[row])
        if not mark & PRESENT:
            return None
        size = int(self._starts[row + 1]) - start
        content = os.pread(self._files[0], size, start)
        if len(content) < size or not (self._checked[row] or mark == PRESENT | zlib.crc32(content)):
            return None
        self._checked[row] = True
        return np.frombuffer(content, np.uint8).reshape(-1, self._record_bytes)

    def write(self, row: int, values: np.ndarray) -> None:
        """Write a row's records.

        Args:
            row: its number.
            values: (positions, W) uint8.

        Raises:
            OSError: there is no space.
        """
        content = values.tobytes()
        if os.pwrite(self._files[0], content, int(self._starts[row])) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._marks[row] = PRESENT | zlib.crc32(content)
        os.pwrite(self._files[1], self._marks[row].tobytes(), 8 * row)
        self._checked[row] = True


# Rows on disk
LOWEST = -6e4  # of float16, whose exponential is 0 in any case
SMALL_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class TableFormat:
    """What a record holds.

    Attributes:
        vocabulary: the number of tokens, V.
        top_k: k; 0: every token has its own probability.
    """

    vocabulary: int
    top_k: int

    @classmethod
    def of(cls, vocabulary: int, asked: int) -> TableFormat:
        """Return the format for --teacher-top-k: everything, where that is no more than k and a rest."""
        return cls(vocabulary, asked if 0 < asked < vocabulary - 1 else 0)

    @property
    def id_type(self) -> np.dtype:
        """The type of an id, which is the smallest that holds all of them."""
        return np.dtype("<u2" if self.vocabulary <= SMALL_VOCABULARY else "<u4")

    @property
    def bins(self) -> int:
        """The number of log-probabilities of a record, N."""
        return self.top_k + 1 if self.top_k else self.vocabulary

    @property
    def record_bytes(self) -> int:
        """The bytes of a record."""
        return self.top_k * self.id_type.itemsize + 2 * self.bins

    def pack(self, logps: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
        """Return records, (n, W) uint8.

        Args:
            logps: (n, N) float.
            ids: (n, k) int; None: every token.
        """
        relative = np.maximum(logps - logps[:, : self.top_k or None].max(axis=1, keepdims=True), LOWEST)
        parts = [np.ascontiguousarray(relative, "<f2").view(np.uint8)]
        if ids is not None:
            parts.insert(0, np.ascontiguousarray(ids, self.id_type).view(np.uint8))
        return np.concatenate(parts, axis=1)

    def unpack(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the relative log-probabilities (n, N) float16 and the ids (n, k) int32 of records (n, W) uint8."""
        at = self.top_k * self.id_type.itemsize
        relative = np.ascontiguousarray(records[:, at:]).view("<f2")
        if not self.top_k:
            return relative, None
        return relative, np.ascontiguousarray(records[:, :at]).view(self.id_type).astype(np.int32)


@dataclass(frozen=True)
class TeacherTable:
    """The records of a set's rows, one for each trained token in order.

    Attributes:
        store: on disk.
        form: of the records.
        numbers: (R,) int64, the number in the store of each row.
    """

    store: RowStore
    form: TableFormat
    numbers: np.ndarray

    def select(self, rows: np.ndarray) -> TeacherTable:
        """Return the table of these rows, in this order."""
        return replace(self, numbers=self.numbers[rows])

    def read(self, rows: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the relative log-probabilities (P, N) float16 and ids (P, k) int32 of rows, one after another.

        Args:
            rows: numbers of rows.
            positions: P, at least their trained tokens; what is left of it gets zeros.

        Raises:
            RunError: a record is gone or damaged.
        """
        found = np.zeros((positions, self.form.record_bytes), np.uint8)
        start = 0
        for row in rows:
            values = self.store.read(int(self.numbers[row]))
            if values is None:
                raise RunError(
                    "the teacher's probabilities in the cache were removed or damaged while the run read them; start it "
                    "again with --resume, and they are computed again"
                )
            found[start : start + len(values)] = values
            start += len(values)
        return self.form.unpack(found)
