"""Find rows that nearly repeat each other, so that they are not on both sides of the split.

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
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_lora.data.examples import Completion, Conversation, Example

SIMILAR = 0.7
WORDS = 3  # in a run
FEW_ROWS, MOST_ROWS, SHARE_OF_ROWS = (
    3,
    10,
    10,
)  # a run in more rows than this (a tenth of them, from 3 to 10) is a template's
MOST_RUNS = 8_000_000  # of a side that are compared; of more, every second, third ... by their hash
_IDEOGRAM = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces, so that each is a word
WORD = re.compile(rf"[{_IDEOGRAM}]|[^\W_{_IDEOGRAM}]+")
# Odd numbers of 64 bits, which mix the words of a run into a hash (from SplitMix64 and MurmurHash3).
FACTORS, MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB), 0xFF51AFD7ED558CCD
PAD = 0  # the number of no word, after a text of one or two


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
