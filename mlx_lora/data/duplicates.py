"""Find rows that repeat, or nearly repeat, each other.

They must not be on both sides of the split. And a right answer to a row that the run trained on shows that the model
remembers it, and not that it can do the same with other questions, so an evaluation counts such rows.

Two rows are near duplicates if both their prompts and their answers are: at least 70% of the runs of three words that
either has are in both (Jaccard similarity). Upper and lower case, punctuation and spaces do not count. Copies with a typo,
an added greeting or another date are found. These are not, because each is worth measuring:

- two phrasings of one question with the same answer: their prompts share few runs of three words;
- rows of one template (`Translate X to German`): runs of words that occur in more than a few rows are left out before;
- several answers to one prompt: the answers differ.

The threshold is low for near duplicates (0.8 in arXiv:2107.06499, which deduplicates training text), because a wrong match
costs little here: a row changes its side.

Because runs of a template are left out, few rows share any of those that remain. So all pairs are counted exactly, where
MinHash would estimate (docs/decisions.md).

Shapes: R rows, W words of all rows together, P pairs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import spoken_turns
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Example
from mlx_lora.data.mix import joined_groups, prompt_key
from mlx_lora.data.read import SplitRows, answers_of
from mlx_lora.data.report import MAX_LISTED, Location, NearDuplicates
from mlx_lora.data.tokenize import Encoded
from mlx_lora.utils.text import counted

SIMILAR = 0.7
WORDS = 3  # in a run
# A run in more rows than this (a tenth of them, from 3 to 10) is a template's.
FEW_ROWS, MOST_ROWS, SHARE_OF_ROWS = 3, 10, 10
MOST_RUNS = 8_000_000  # of a side that are compared; of more, every second, third ... by their hash
_IDEOGRAM = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces, so that each is a word
WORD = re.compile(rf"[{_IDEOGRAM}]|[^\W_{_IDEOGRAM}]+")
# Odd numbers of 64 bits, which mix the words of a run into a hash (from SplitMix64 and MurmurHash3).
FACTORS, MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB), 0xFF51AFD7ED558CCD
PAD = 0  # the number of no word, after a text of one or two
MOST_TOGETHER = 0.5  # of the rows; if more nearly repeat each other, they are split row by row
NAMED = 3  # pairs of lines that a note names
TRAIN, VALID = "train", "valid"
MOST_SHOWN = 60  # characters of a row that stands for the others


# Pairs of similar rows


@dataclass(frozen=True)
class NearPairs:
    """Pairs of rows that nearly repeat each other.

    Attributes:
        first, second: (P,) int64, the rows of each pair, first < second, ordered.
        sampled: 1 if all runs of words were compared; n: one in n.
    """

    first: np.ndarray
    second: np.ndarray
    sampled: int = 1


def near_pairs(examples: Sequence[Example]) -> NearPairs:
    """Return the pairs of examples that nearly repeat each other; equal ones are pairs too.

    Args:
        examples: One per row; those with equal content are better given once, because all their pairs are returned.
    """
    count = len(examples)
    sides = [_numbered(texts) for texts in zip(*map(_sides, examples), strict=True)] if count else []
    if not sides:
        return NearPairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    most = max(FEW_ROWS, min(MOST_ROWS, count // SHARE_OF_ROWS))
    sampled = max(1, -(-max(len(words) for words, _, _ in sides) // MOST_RUNS))
    same = [whole for _, _, whole in sides]
    similar = [_similar(words, offsets, most, sampled) for words, offsets, _ in sides]
    found = [_equal_pairs(same[0], same[1])]
    for own, other in ((0, 1), (1, 0)):
        first, second = np.divmod(similar[own], count)
        both = np.isin(similar[own], similar[other]) | (same[other][first] == same[other][second])
        found.append(similar[own][both])
    first, second = np.divmod(np.unique(np.concatenate(found)), count)
    return NearPairs(first, second, sampled)


def _sides(example: Example) -> tuple[str, str]:
    """Return what is asked and what is answered in an example; a system prompt, which many rows share, is neither."""
    if isinstance(example, Completion):
        return example.prompt, example.completion
    if not isinstance(example, Conversation):
        return "", example.text
    asked = [m["content"] for m in example.messages if m["role"] in ("user", "tool")]
    answered = [_answer(m) for m in example.messages if m["role"] == "assistant"]
    return "\n".join(asked), "\n".join(answered)


def _answer(message: dict[str, Any]) -> str:
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return f"{message.get('reasoning_content', '')}\n{message['content']}\n{calls}"


def _numbered(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the words of texts as numbers, where each text begins, and a hash of all its words.

    Returns:
        (W,) uint64 numbers from 1, and PAD after texts of fewer than WORDS words; (R + 1,) int64 offsets; (R,) int64 hashes.
    """

    class Numbers(dict[str, int]):
        def __missing__(self, word: str) -> int:
            number = self[word] = len(self) + 1
            return number

    numbers = Numbers()
    parts, lengths, whole = [np.zeros(0, np.uint64)], [], []
    for text in texts:
        words = tuple(map(numbers.__getitem__, WORD.findall(text.casefold())))
        whole.append(hash(words))  # of whole numbers, which is the same in every process
        if words and len(words) < WORDS:
            words += (PAD,) * (WORDS - len(words))
        parts.append(np.array(words, np.uint64))
        lengths.append(len(words))
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.array(whole, np.int64)


def _similar(words: np.ndarray, offsets: np.ndarray, most: int, sampled: int) -> np.ndarray:
    """Return the pairs of texts that share enough runs of words, as first * R + second, ordered."""
    count = len(offsets) - 1
    bits = np.uint64(count.bit_length())
    # A run's hash, then its text's number: sorted, texts with the same run are side by side. A run counts once in a text.
    found = np.sort(_runs(words, offsets, sampled, bits))  # np.unique, which takes a hash table, is ten times slower
    found = found[np.concatenate([np.ones(min(1, len(found)), bool), found[1:] != found[:-1]])]
    runs, row = found >> bits, (found & np.uint64((1 << int(bits)) - 1)).astype(np.int64)
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(runs)), bool), runs[1:] != runs[:-1]]))
    sizes = np.diff(np.concatenate([starts, [len(runs)]]))
    size_of = np.bincount(row[np.repeat(sizes <= most, sizes)], minlength=count)
    codes = [np.zeros(0, np.int64)]
    for size in range(2, most + 1):
        group = row[starts[sizes == size][:, None] + np.arange(size)]  # (groups, size), rows ascending
        codes += [group[:, i] * count + group[:, j] for i in range(size) for j in range(i + 1, size)]
    pairs, shared = np.unique(np.concatenate(codes), return_counts=True)
    first, second = np.divmod(pairs, count)
    return pairs[shared >= SIMILAR * (size_of[first] + size_of[second] - shared)]


def _runs(words: np.ndarray, offsets: np.ndarray, sampled: int, bits: np.uint64) -> np.ndarray:
    """Return each run of words that does not reach into the next text: a hash, and in the last `bits` its text's number."""
    row = np.repeat(np.arange(len(offsets) - 1, dtype=np.uint64), np.diff(offsets))
    if len(words) < WORDS:
        return np.zeros(0, np.uint64)
    count = len(words) - WORDS + 1
    hashes = np.zeros(count, np.uint64)
    for place, factor in enumerate(FACTORS):
        hashes += words[place : count + place] * np.uint64(factor)
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(MIX)
    hashes ^= hashes >> np.uint64(32)
    inside = row[:count] == row[WORDS - 1 :]
    if sampled > 1:
        inside &= hashes % np.uint64(sampled) == 0
    return ((hashes[inside] >> bits) << bits) | row[:count][inside]


def _equal_pairs(prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return the pairs of neighbors among the rows whose words are all equal, as first * R + second."""
    count = len(prompts)
    order = np.lexsort((np.arange(count), answers, prompts))
    equal = (prompts[order][1:] == prompts[order][:-1]) & (answers[order][1:] == answers[order][:-1])
    return order[:-1][equal] * count + order[1:][equal]


# Repeats across the split


@dataclass(frozen=True)
class Repeats:
    """Which records repeat each other.

    Attributes:
        groups: An id for each training record that gave rows; those with the same one must be on one side.
        records: Split -> numbers of the records that gave rows.
        texts: Split -> the number of each record's content; equal contents have one.
        locations: Split -> where each of these records is.
        near: Number of a content -> those that nearly repeat it.
        together: How many training records nearly repeat another.
        too_many: How many do, if that is so many that they are not kept together; 0 otherwise.
        sampled: As in `NearDuplicates`.
    """

    groups: Sequence[int]
    records: dict[str, list[int]]
    texts: dict[str, list[int]] = field(default_factory=dict)
    locations: dict[str, list[Location]] = field(default_factory=dict)
    near: dict[int, list[int]] = field(default_factory=dict)
    together: int = 0
    too_many: int = 0
    sampled: int = 1

    def across(self, held_out: Collection[int]) -> NearDuplicates:
        """Return which rows of the validation set repeat training rows.

        Args:
            held_out: Numbers of the training records that are held out.
        """
        if not self.texts:
            return NearDuplicates()
        held, trained, validated = set(held_out), dict[int, Location](), list[tuple[int, Location]]()
        for record, text, place in zip(self.records[TRAIN], self.texts[TRAIN], self.locations[TRAIN], strict=True):
            if record in held:
                validated.append((text, place))
            else:
                trained.setdefault(text, place)
        validated += zip(self.texts.get(VALID, []), self.locations.get(VALID, []), strict=True)
        found = [
            (place, trained[same], same == text)
            for text, place in validated
            if (same := next((one for one in (text, *self.near.get(text, ())) if one in trained), None)) is not None
        ]
        found.sort(key=lambda one: one[2])  # those that are only similar first
        return NearDuplicates(
            held_out_rows=len(found),
            exact=sum(equal for *_, equal in found),
            of_rows=len(validated),
            examples=[(place, other) for place, other, _ in found[:MAX_LISTED]],
            kept_together=0 if self.too_many else self.together,
            sampled=self.sampled,
        )


def find_repeats(
    parts: dict[str, SplitRows], encoded: dict[str, Encoded], keys: dict[str, list[str]], fraction: float
) -> Repeats:
    """Return which records repeat each other, of all splits together.

    Args:
        parts, encoded: `train`, `valid`, `test` -> what was read, and the same encoded.
        keys: Of the content of each record that gave rows.
        fraction: The share of training records to hold out; 0 without a validation set: nothing is compared.
    """
    records = {name: list(dict.fromkeys(encoded[name].source.tolist())) for name in (TRAIN, VALID) if name in encoded}
    train = parts[TRAIN]
    prompts = [prompt_key(answers_of(train.entries[number])[0]) for number in records[TRAIN]]
    if VALID not in records and not fraction:
        return Repeats(joined_groups(prompts).tolist(), records)
    numbers: dict[str, int] = {}
    texts = {name: [numbers.setdefault(key, len(numbers)) for key in keys[name]] for name in records}
    examples = {}
    for name, own in records.items():
        for number, text in zip(own, texts[name], strict=True):
            examples.setdefault(text, answers_of(parts[name].entries[number])[0])
    pairs = near_pairs([examples[text] for text in range(len(numbers))])
    near: dict[int, list[int]] = {}
    for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        near.setdefault(one, []).append(other)
        near.setdefault(other, []).append(one)
    alike = _connected(len(numbers), near)
    sizes = Counter(alike[text] for text in texts[TRAIN])
    contents = {text: alike[text] for text in set(texts[TRAIN])}
    several = {group for group, count in Counter(contents.values()).items() if count > 1}
    together = sum(sizes[group] for group in several)
    too_many = max((sizes[group] for group in several), default=0)
    too_many = too_many if too_many > MOST_TOGETHER * len(prompts) else 0
    reasons = [prompts] if too_many else [prompts, [alike[text] for text in texts[TRAIN]]]
    places = {name: [parts[name].locations[number] for number in own] for name, own in records.items()}
    groups = joined_groups(*reasons).tolist()
    return Repeats(groups, records, texts, places, near, together, too_many, pairs.sampled)


def _connected(count: int, near: dict[int, list[int]]) -> list[int]:
    """Return a group for each content: that of all it is connected with, through others too."""
    group = list(range(count))
    seen: set[int] = set()
    for start in near:
        waiting = [] if start in seen else [start]
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                group[one] = start
                waiting += near[one]
    return group


def repeat_notes(near: NearDuplicates, too_many: int, holds_out: bool) -> list[str]:
    """Return notes on rows that nearly repeat others.

    Args:
        near: What was found.
        too_many: As in `Repeats`.
        holds_out: Whether rows of the training data are held out.
    """
    notes = []
    if almost := near.held_out_rows - near.exact:
        pairs = [f"{_place(one)} and {_place(other)}" for one, other in near.examples[:NAMED]]
        verb = "repeats" if almost == 1 else "repeat"
        notes.append(
            f"{counted(almost, 'held-out row')} nearly {verb} a training row ({'; '.join(pairs)}); the held-out loss will be too low"
        )
    if too_many and holds_out:
        notes.append(
            f"{too_many:,} rows nearly repeat each other, more than half of all; they are split row by row, so the held-out "
            "loss will be too low"
        )
    elif near.kept_together and holds_out:
        notes.append(
            f"{near.kept_together:,} rows nearly repeat another row; such rows are either all trained or all held out"
        )
    if near.sampled > 1:
        notes.append(f"near duplicates were searched by one run of words in {near.sampled}, because the data is large")
    return notes


def _place(location: Location) -> str:
    return f"{location.file} {location.unit} {location.line}"


# Measured rows that the run has seen


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
    known = {numbers.setdefault(sides, len(numbers)) for sides in _row_sides(trained, tokenizer)}
    asked = [numbers.setdefault(sides, len(numbers)) for sides in _row_sides(measured, tokenizer)]
    pairs = near_pairs([Completion(*sides) for sides in numbers])
    near = set(known)
    for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        near.update((one, other) if one in known or other in known else ())
    found = [row for row, text in enumerate(asked) if text in near]
    exact = sum(text in known for text in asked)
    return SeenRows(len(found), exact, len(asked), _question(measured, found[0], tokenizer) if found else "")


def _row_sides(rows: EncodedSet, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
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
