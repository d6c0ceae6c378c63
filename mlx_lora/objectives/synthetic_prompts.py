r"""Prepare prompts that a teacher answers first: those of data without answers, or those that the base writes itself.

A chat model has seen so many conversations that it continues the template's text before the user's turn with a question, as
a user would ask it. Source: Magpie, arXiv:2406.08464, section 2.

    <|im_start|>system\nYou are ...<|im_end|>\n<|im_start|>user\nWhat can I cook with leeks?<|im_end|>
    `----------------- given to the model ------------------'`------ the model writes ------'

Only usable turns are kept, each once. They are stored for later runs.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.config.settings import DataSettings, TrainSettings
from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.data_sets import find_sets
from mlx_lora.data.load import chat_day
from mlx_lora.data.prompts import Prompt
from mlx_lora.data.read import SplitRows, check_speaker, file_records, parse_rows, read_rows
from mlx_lora.data.sandbox import render_chat
from mlx_lora.models.folder import model_sample
from mlx_lora.models.generator import SamplingOptions, answer_keys, write_texts
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, one_at_a_time, replace_text, sha256_of
from mlx_lora.utils.progress import LongTask, long_task
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.data.examples import Fields
    from mlx_lora.models.load import Base

log = logging.getLogger(__name__)

# Prompts of the data

PEEKED = 100  # records of each file that are read to tell whether data has answers
PROMPTS = "prompts"
# Settings for records as the user has them; written ones have our names.
RECORD_SETTINGS = ("data_format", "prompt_column", "completion_column", "system_column", "chat_column", "text_column",
    "turn_names", "speaker", "conversation_gap")  # fmt: skip


def has_unanswered(settings: DataSettings) -> bool:
    """Return whether some of the first training records of --data are prompts without an answer.

    Raises:
        InputError: there is no such data.
    """
    rows = SplitRows()
    for one in find_sets(settings.data or ""):
        for file in one.splits.get("train", ()):
            own = file.reading(settings)
            parse_rows(islice(file_records(file, own, rows), PEEKED), file.name, own, PROMPTS, rows)
    return any(isinstance(entry, Prompt) and not entry.answered for entry in rows.entries)


def read_prompts(settings: DataSettings) -> dict[str, SplitRows]:
    """Return the records of each split of --data as prompts; those that have an answer keep it.

    Raises:
        InputError: a set has a weight, or no usable record; with --strict, an unusable record.
    """
    sets = find_sets(settings.data or "")
    for one in sets:
        if one.weight != 1:
            raise InputError(
                f"--data {one.name}={one.weight:g}: a weight of prompts that the teacher answers; leave it out, or "
                "train on the answers of an earlier run with it"
            )
    names = [name for name in ("train", "valid", "test") if any(name in one.splits for one in sets)]
    found = {
        name: read_rows([file for one in sets for file in one.splits.get(name, ())], settings, PROMPTS)
        for name in names
    }
    check_speaker(found.values(), settings)
    for name, rows in found.items():
        dropped = rows.dropped[0] if rows.dropped else None
        if dropped and (settings.strict or not rows.entries):
            raise InputError(f"--data, {name}: no prompt in {dropped.location} ({dropped.why}); fix or remove it")
    return found


def write_records(file: Path, records: Iterable[Fields]) -> None:
    """Write records as JSON lines that a person can read and edit."""
    replace_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def written_data(settings: DataSettings, data: Path) -> DataSettings:
    """Return settings for data that `write_records` wrote; rephrased records have the names that the user's have."""
    names = RECORD_SETTINGS if settings.rephrase is None else ("speaker", "conversation_gap")
    defaults: Mapping[str, Any] = {name: getattr(DataSettings(), name) for name in names}
    return replace(settings, data=str(data), **defaults)


# Prompts that the base writes

VERSION = 1  # of what is written; a higher one leaves older files unused
DEFAULT_PROMPTS = 200
MOST_PROMPT_TOKENS = 96  # of a usable prompt
ROUND = 256  # the most prompts that are written before the usable ones are counted
TRIES = 6  # how many are written in all, for each that is wanted
LEAST_SHARE = 0.25  # of the wanted ones, below which a run does not begin
HOPELESS = 64  # tries without a usable one, after which no more are made
STREAM = 2 << 40  # the numbers of the random streams start here


def own_prompts(settings: TrainSettings, base: Base, today: date | None) -> Path:
    """Return a file of prompts that the base wrote, now or for an earlier run.

    Args:
        settings: of the run.
        base: without an adapter.
        today: the day for templates that show the date.

    Raises:
        InputError: the model or its template does not permit it, or too few of the prompts are usable.
    """
    day = chat_day(settings.data, base.hf_tokenizer, today)
    ends = frozenset(base.tokenizer.eos_token_ids)
    turn = user_turn(base.hf_tokenizer, settings.data.chat_template, day, ends)
    wanted = settings.objective.own_prompts or DEFAULT_PROMPTS
    options = sampling_options(settings, MOST_PROMPT_TOKENS)
    facts = [
        VERSION,
        base.fingerprint,
        model_sample(base.folder),
        base.describe(),
        str(device.compute_dtype(settings.model.dtype)),
    ]
    key = sha256_of(json.dumps([*facts, turn.before, sorted(turn.ends), repr(options), settings.loop.seed, wanted]))
    file = cache_dir("prompts") / key[:32] / "train.jsonl"
    with one_at_a_time(file):
        if file.exists():
            count = file.read_text(encoding="utf-8").count("\n")
            log.info(f"Prompts: {count:,} that the model wrote for an earlier run")
            return file
        start = time.perf_counter()
        with long_task("Writing prompts", wanted, "prompts") as task:
            found = _write_prompts(base, turn, options, wanted, settings.loop.seed, task)
        if len(found.kept) < LEAST_SHARE * wanted:
            reasons = ", ".join(f"{count:,} {why}" for why, count in found.left_out.most_common(3))
            raise InputError(
                f"no --data: of the prompts that the model wrote itself, {counted(len(found.kept), 'is', 'are')} usable and "
                f"{wanted:,} are wanted ({reasons}); {ADVICE}"
            )
        write_records(file, ({"prompt": text} for text in found.kept))
    reasons = ", ".join(f"{count:,} {why}" for why, count in found.left_out.most_common())
    fewer = f", and {wanted:,} were wanted" if len(found.kept) < wanted else ""
    left_out = f"; left out: {reasons}" if reasons else ""
    log.info(
        f"Prompts: {len(found.kept):,} written by the model in {time.perf_counter() - start:.1f} s{fewer}{left_out}"
    )
    return file


def sampling_options(settings: TrainSettings, max_new_tokens: int) -> SamplingOptions:
    """Return how texts are sampled for a run, one to a prompt."""
    asked = settings.objective
    return SamplingOptions(1, max_new_tokens, asked.temp, asked.top_p, asked.min_p)


def _write_prompts(
    base: Base, turn: UserTurn, options: SamplingOptions, wanted: int, seed: int, task: LongTask
) -> TurnFilter:
    """Write prompts until enough are usable, or too many were tried."""
    found, tried, number = TurnFilter(), 0, 0
    while len(found.kept) < wanted and tried < TRIES * wanted and (found.kept or tried < HOPELESS):
        usable = max(LEAST_SHARE, len(found.kept) / tried) if tried else 1.0
        count = min(ROUND, TRIES * wanted - tried, math.ceil((wanted - len(found.kept)) / usable))

        def take(batch: list[int], texts: list[list[int]]) -> None:
            for tokens in texts:
                found.take(*turn.read(tokens, base.hf_tokenizer))
            task.reach(min(wanted, len(found.kept)))

        keys = answer_keys(seed, STREAM + number, count)
        write_texts(base, [turn.before] * count, range(count), options, turn.ends, keys, take)
        tried, number = tried + count, number + 1
    del found.kept[wanted:]
    return found


# A user's turn

MARK = "qzx wvw"  # stands for what the user says
FEWEST_WORDS, FEWEST_CHARACTERS = 3, 6  # of a usable turn; the second in scripts that write no spaces
LEAST_LETTERS = 0.7  # share of letters and spaces among all characters
REPEATED_WORDS = 0.5  # share of different words below which a longer turn goes round in circles
UNUSABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")  # control characters, and bytes that are no character
OTHER_TURN = re.compile(r"^\W*(assistant|user|system|ai|answer|response)\s*:", re.IGNORECASE | re.MULTILINE)
ADVICE = "give prompts with --data, such as --data persona-distill"


@dataclass(frozen=True)
class UserTurn:
    """Where a user's turn begins and ends.

    Attributes:
        before: the tokens that come before it.
        ends: the tokens that end it.
        specials: all special tokens; any other than an end begins another turn.
    """

    before: list[int]
    ends: frozenset[int]
    specials: frozenset[int]

    def read(self, tokens: list[int], tokenizer: Any) -> tuple[str, bool]:
        """Return a turn that the model wrote as text, and whether the model ended it; empty if it is not a single turn."""
        ended = bool(tokens) and tokens[-1] in self.ends
        said = tokens[:-1] if ended else tokens
        return ("" if self.specials.intersection(said) else str(tokenizer.decode(said))), ended


def user_turn(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, day: date | None, ends: frozenset[int]
) -> UserTurn:
    """Return where the first user's turn of a chat begins and ends.

    Args:
        tokenizer: of the model, not mlx-lm's wrapper.
        chat_template: as --chat-template gives it.
        day: the day that the template shows.
        ends: the model's end tokens.

    Raises:
        InputError: the model has no chat template, or the template marks no user's turn by tokens of its own.
    """
    if not (tokenizer.chat_template or chat_template):
        raise InputError(f"no --data: a model without a chat template cannot write prompts itself; {ADVICE}")
    template, _ = resolve_template(chat_template, tokenizer)
    try:
        text = render_chat(
            tokenizer, [{"role": "user", "content": MARK}], template, None, add_generation_prompt=True, day=day
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"no --data: the chat template refuses a chat that begins with a user ({error}); {ADVICE}"
        ) from error
    opening, found, closing = text.partition(MARK)
    specials = frozenset(number for number, token in _added(tokenizer).items() if token.special)
    before = _encoded(tokenizer, opening)
    after = _encoded(tokenizer, closing.lstrip())
    if not found or specials.isdisjoint(before) or not after or after[0] not in specials:
        raise InputError(
            "no --data: the chat template has no special token at the beginning and the end of a user's turn, so the model "
            f"cannot write prompts itself; {ADVICE}"
        )
    return UserTurn(before, ends | {after[0]}, specials)


def _added(tokenizer: Any) -> dict[int, Any]:
    return tokenizer.added_tokens_decoder


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@dataclass
class TurnFilter:
    """Keeps the usable turns of those that a model wrote, each once.

    Attributes:
        kept: the usable ones, in order.
        left_out: why others were left out -> how many.
    """

    kept: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)

    def take(self, text: str, ended: bool) -> None:
        """Keep a turn if it is usable.

        Args:
            text: without its end token.
            ended: whether the model ended it, within the tokens that it had.
        """
        text = text.strip()
        same = re.sub(r"\W+", " ", text.casefold()).strip()
        reason = "too long" if not ended else _turn_problem(text) or ("twice" if same in self._seen else None)
        if reason:
            self.left_out[reason] += 1
            return
        self._seen.add(same)
        self.kept.append(text)


def _turn_problem(text: str) -> str | None:
    """Return why a text is not a user's turn; None if it may be one."""
    words = re.findall(r"\w+", text.casefold())
    if not words:
        return "empty"
    if len(words) < FEWEST_WORDS and (text.isascii() or len(text) < FEWEST_CHARACTERS):
        return "too short"
    plain = sum(letter.isalpha() or letter.isspace() for letter in text)
    if UNUSABLE.search(text) or plain < LEAST_LETTERS * len(text):
        return "no text"
    if OTHER_TURN.search(text):
        return "several turns"
    if len(words) >= 12 and len(set(words)) < REPEATED_WORDS * len(words):
        return "repetitive"
    return None
