"""Say what a person should know about the data before training, in addition to the counts of the report.

Among the notes are two on what the data teaches: plain text teaches no answering, and a template may not show tools.

Another is on placeholders that were left in the data: `{{name}}`, `<insert ...>`, and `{name}` in prose. Data about
templates, and code, have such braces on purpose, so text between code fences or backticks does not count, and `{name}`
does not where its line has other signs of code. It is a note, and never an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import spoken_turns
from mlx_lora.data.data_sets import TINY_SHAKESPEARE
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation, Example, Text
from mlx_lora.data.mix import Mixed, joined_groups, prompt_key
from mlx_lora.data.preferences import Rated
from mlx_lora.data.read import SplitRows, answers_of
from mlx_lora.data.render import ADVICE
from mlx_lora.data.report import MAX_LISTED, Location, NearDuplicates, reasons, where
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

MAX_CONTROLS = 5  # control tokens that get a note of their own
MAX_NAMED = 3  # placeholders that a note names
LOOKED_AT = 1000  # records
# A text that was rendered with a template before: it has turns, and teaches answering.
RENDERED = re.compile(
    r"### ?(?:Response|Assistant)\b|\[/INST\]|<\|?(?:im_start|start_of_turn|turn|assistant|start_header_id)\b"
)
OUR_TEMPLATE = "--chat-template chatml"
# Placeholders, and code, in which they are none.
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Not after what makes it LaTeX (\frac{{a}}{{b}}), HTML or a longer run of braces.
DOUBLE = re.compile(r"(?<![\\{$>\w}^])\{\{ ?[A-Za-z][\w .-]{1,40}\}\}(?![}<{])")
INSERT = re.compile(r"(?i)[<\[]insert (?:your |the |an? )?[\w' -]{2,60}[>\]]")
SINGLE = re.compile(r"(?<![\\{$\w}^])\{[a-z][a-z_]{2,30}\}(?![\w{}^])")
CODE_LINE = re.compile(r"""["=;$\\<>|&#]|(?<!\w)'|\bf'|[({\[]\s*$""")


def data_notes(
    parts: dict[str, SplitRows],
    encoded: dict[str, Encoded],
    keys: dict[str, list[str]],
    encoder: Encoder,
    day: date | None,
) -> list[str]:
    """Return notes on a run's data, a sentence each.

    Args:
        parts: `train`, `valid`, `test` -> what was read.
        encoded: The same, encoded.
        keys: Of the content of each record that gave rows.
        encoder: Encoded them.
        day: The day that the chat template shows; None if it shows none.
    """
    notes = [chat.words for rows in parts.values() for chat in rows.chats]
    notes += [note for rows in parts.values() for note in rows.transcripts]
    notes += placeholder_notes(parts) + _left_out(parts)
    for name in ("valid", "test"):
        shared = len(set(keys.get(name, [])) & set(keys["train"]))
        if shared:
            also = "row is also a training row" if shared == 1 else "rows are also training rows"
            notes.append(f"{shared:,} {name} {also}; the {name} loss will be too low")
    train = parts["train"].entries
    ratings = {train[i].good for i in encoded["train"].source.tolist() if isinstance(train[i], Rated)}
    if len(ratings) == 1:
        kind = "bad" if ratings == {True} else "good"
        notes.append(f"no answer is rated {kind}, so the run has nothing to compare with; add {kind} answers")
    kept = [
        answer
        for name, part in encoded.items()
        for i in set(part.source.tolist())
        for answer in answers_of(parts[name].entries[i])
    ]
    chats = [example for example in kept if isinstance(example, Conversation)]
    with_tools = [chat for chat in chats if chat.tools]
    if with_tools and not encoder.shows_tools(with_tools[0]):
        notes.append(
            f"the chat template does not show the tools of {counted(len(with_tools), 'row')} to the model; "
            "--chat-template chatml does"
        )
    unshown: Counter[str] = Counter()
    for part in encoded.values():
        unshown.update({name: len(numbers) for name, numbers in part.unshown.items()})
    for name, count in sorted(unshown.items()):
        have = "has" if count == 1 else "have"
        notes.append(f"{counted(count, 'row')} {have} {name}, which the chat template does not show; it is not trained")
    notes += _control_notes(parts, encoded, encoder.allow_special_tokens)
    unread = Counter(name for chat in chats for name in chat.unread)
    if unread:
        named = ", ".join(f"{name} ({counted(count, 'row')})" for name, count in unread.most_common(8))
        notes.append(f"fields of messages that are not read: {named}")
    divided = sum(len(part.divided) for part in encoded.values())
    if divided:
        notes.append(
            f"{counted(divided, 'chat')} {'gives' if divided == 1 else 'give'} several rows: the chat template hides "
            "thinking or tools of earlier turns, and each turn is trained as the model writes it"
        )
    if day and chats:
        notes.append(f"the chat template shows a date: {day.isoformat()}, kept for --resume (--chat-date)")
    return notes


def _control_notes(parts: dict[str, SplitRows], encoded: dict[str, Encoded], allowed: bool) -> list[str]:
    """Return notes on control tokens that messages spell, one for each token."""
    places: dict[str, list[Location]] = {}
    for name, part in encoded.items():
        for token, numbers in part.controls.items():
            places.setdefault(token, []).extend(parts[name].locations[number] for number in numbers)
    done = (
        "it is a control token there, as --allow-special-tokens asks"
        if allowed
        else "it is encoded as ordinary text there; remove it, or make it a control token with --allow-special-tokens"
    )
    notes = []
    for token, found in sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_CONTROLS]:
        found = list(dict.fromkeys(found))
        lines = where(found[:MAX_LISTED], len(found))
        notes.append(f"{token} in messages of {counted(len(found), 'row')} ({lines}): {done}")
    if len(places) > MAX_CONTROLS:
        notes.append(f"{len(places) - MAX_CONTROLS} more control tokens in messages")
    return notes


def _left_out(parts: dict[str, SplitRows]) -> list[str]:
    """Return notes on what the records have that is not trained."""
    notes = []
    ignored = sum((rows.ignored for rows in parts.values()), Counter())
    if ignored:
        named = ", ".join(f"{name} ({counted(count, 'row')})" for name, count in ignored.most_common(8))
        more = f" and {len(ignored) - 8} more" if len(ignored) > 8 else ""
        notes.append(f"columns that are not read: {named}{more}")
    unasked = [
        location
        for rows in parts.values()
        for entry, location in zip(rows.entries, rows.locations, strict=True)
        if isinstance(entry, Completion) and not entry.prompt.strip()
    ]
    if unasked:
        first, have = where(unasked[:MAX_LISTED], len(unasked)), "has" if len(unasked) == 1 else "have"
        notes.append(f"{counted(len(unasked), 'row')} {have} an empty prompt, and only the answer is trained: {first}")
    for what, count in sum((rows.without for rows in parts.values()), Counter()).items():
        notes.append(f"{what} of {counted(count, 'file')} is left out, and not trained")
    return notes


def evaluation_notes(rows: SplitRows, encoded: Encoded) -> list[str]:
    """Return notes on what an evaluation left out or cut, because that changes the loss."""
    notes = [chat.words for chat in rows.chats]
    if rows.dropped:
        notes.append(f"{counted(len(rows.dropped), 'unusable row')} left out: {reasons(rows.dropped)}")
    if encoded.truncated:
        notes.append(f"{counted(len(encoded.truncated), 'row')} cut at --max-seq-length")
    return notes


# Rows that are held out


def split_notes(mixed: Mixed, train: SplitRows, valid: EncodedSet | None, fraction: float) -> list[str]:
    """Return notes on the rows that are held out.

    Args:
        mixed: The training data, split.
        train: What was read of it.
        valid: All rows to validate on.
        fraction: The share to hold out that was asked for.
    """
    rows, held, notes = mixed.train.examples, mixed.held.examples if mixed.held else 0, []
    if fraction and not valid:
        notes.append("no row is held out, because that requires two different rows; this run has no held-out loss")
    elif held and held > 2 * fraction * (rows + held):
        is_held = "rows is" if held == 1 else "rows are"
        notes.append(
            f"{held:,} of {rows + held:,} {is_held} held out to measure the loss, the least that is possible: one row "
            "with its duplicates and those of its prompt; --valid-fraction 0 trains on all rows"
        )
    if divided := [train.locations[number] for number in mixed.divided]:
        notes.append(
            f"{len(divided):,} rows share their prompt with so many others that they are held out one by one, not by prompt "
            f"({where(divided[:MAX_LISTED], len(divided))}); the held-out loss is of known prompts with new answers"
        )
    return notes


# What the data teaches


def teaching_notes(parts: dict[str, SplitRows], settings: DataSettings, encoder: Encoder) -> list[str]:
    """Return notes on what a chat model will not learn from the data.

    Args:
        parts: `train`, `valid`, `test` -> what was read.
        settings: Of the data; who asks for a text by `--data-format` or a column knows that it is one.
        encoder: Of the rows; a model without a chat template is expected to continue text.
    """
    notes = []
    names_text = settings.data_format == "text" or settings.text_column or TINY_SHAKESPEARE in (settings.data or "")
    tokenizer: Any = encoder.tokenizer
    texts = [entry.text for entry in parts["train"].entries if isinstance(entry, Text)]
    plain = len(texts) == len(parts["train"].entries) and not any(map(RENDERED.search, texts[:LOOKED_AT]))
    if tokenizer.chat_template and not names_text and texts and plain:
        notes.append(
            "plain text teaches the model style and words, but not to answer questions about it; for answers, write rows of a "
            'prompt and a completion, or give a chat export with --speaker NAME (docs/data.md, "Text or answers")'
        )
    for name, rows in parts.items():
        if refused := refused_tools(rows):
            notes.append(
                f"{counted(refused, f'{name} row')} with tool calls left out, because the chat template does not show them; "
                f"{OUR_TEMPLATE} trains them"
            )
    return notes


def refused_tools(rows: SplitRows) -> int:
    """Return how many records were dropped because the chat template does not show their tool calls."""
    return sum(row.why.endswith(ADVICE) for row in rows.dropped)


def called_functions(rows: SplitRows) -> frozenset[str]:
    """Return the names of the functions that the first records call."""
    return frozenset(
        call["function"]["name"]
        for entry in islice(rows.entries, LOOKED_AT)
        for answer in answers_of(entry)
        if isinstance(answer, Conversation)
        for message in answer.messages
        for call in message.get("tool_calls", ())
    )


class ToolsNotShown(InputError):
    """All rows of a set were refused, some of them because the chat template does not show their tool calls.

    Attributes:
        rows: How many of them.
    """

    def __init__(self, message: str, rows: int):
        super().__init__(message)
        self.rows = rows


# Placeholders


def placeholder_notes(parts: dict[str, SplitRows]) -> list[str]:
    """Return a note on the rows with placeholders, with their locations; nothing if there are none."""
    found: dict[str, None] = {}
    locations: dict[Location, None] = {}
    for rows in parts.values():
        for entry, location in zip(rows.entries, rows.locations, strict=True):
            for text, is_prose in (one for answer in answers_of(entry) for one in _texts_of(answer)):
                for placeholder in _found(text, is_prose):
                    found[placeholder] = None
                    locations[location] = None
    if not locations:
        return []
    named = ", ".join(list(found)[:MAX_NAMED])
    have = "has a placeholder" if len(locations) == 1 else "have placeholders"
    first = where(list(locations)[:MAX_LISTED], len(locations))
    return [f"{counted(len(locations), 'row')} {have} such as {named}: {first}; fill them in, or remove the rows"]


def _texts_of(example: Example) -> list[tuple[str, bool]]:
    """Return the texts of an example, each with whether people talk in it."""
    if isinstance(example, Conversation):
        return [(one.get("content") or "", True) for one in example.messages if one["role"] != "tool"]
    if isinstance(example, Completion):
        return [(example.prompt, True), (example.completion, True)]
    return [(example.text, False)]


def _found(text: str, is_prose: bool) -> Iterator[str]:
    if "{" not in text and "insert" not in text.lower():
        return
    text = CODE.sub("", text)
    yield from DOUBLE.findall(text)
    yield from INSERT.findall(text)
    if is_prose:
        for line in text.splitlines():
            if "{" in line and not CODE_LINE.search(line):
                yield from SINGLE.findall(line)


# Find rows that repeat, or nearly repeat, each other.
#
# They must not be on both sides of the split. And a right answer to a row that the run trained on shows that the model
# remembers it, and not that it can do the same with other questions, so an evaluation counts such rows.
#
# Two rows are near duplicates if both their prompts and their answers are: at least 70% of the runs of three words that
# either has are in both (Jaccard similarity). Upper and lower case, punctuation and spaces do not count. Copies with a typo,
# an added greeting or another date are found. These are not, because each is worth measuring:
#
# - two phrasings of one question with the same answer: their prompts share few runs of three words;
# - rows of one template (`Translate X to German`): runs of words that occur in more than a few rows are left out before;
# - several answers to one prompt: the answers differ.
#
# The threshold is low for near duplicates (0.8 in arXiv:2107.06499, which deduplicates training text), because a wrong match
# costs little here: a row changes its side.
#
# Because runs of a template are left out, few rows share any of those that remain. So all pairs are counted exactly, where
# MinHash would estimate (docs/development/decisions.md).
#
# Shapes: R rows, W words of all rows together, P pairs.

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
