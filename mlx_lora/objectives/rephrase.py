"""Let a model write other wordings of the questions in --data, so that what is learned is found under other words too.

    <cache>/wordings/<key>.jsonl                  what the model wrote, a line for each round
                     <key>/train.jsonl ...        the records to train on; valid.jsonl has wordings that are never trained

In each round the model writes one wording of every question that lacks some; `Wordings` says which count. The writer
is the base without an adapter, another model, or a server with OpenAI's protocol (--rephrase-model). As with a teacher's
answers, the run's folder gets a copy as `written`, from which a resumed run reads.
"""

from __future__ import annotations

import json
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import DataFile, find_sets
from mlx_lora.data.downloads import download, is_on_web
from mlx_lora.data.examples import BadRow, Completion, Conversation, Fields, FormatError, Message, Record
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.load import DataSplits, prompt_encoder
from mlx_lora.data.prompts import STAND_IN
from mlx_lora.data.read import SplitRows, file_records, parse_rows
from mlx_lora.models.folder import model_sample
from mlx_lora.models.generator import SamplingOptions, answer_keys, write_texts
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import count_parameters
from mlx_lora.objectives.base import Objective, RunContext
from mlx_lora.objectives.synthetic_prompts import write_records, written_data
from mlx_lora.objectives.teacher import written_folder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, one_at_a_time, replace_text, sha256_of
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.progress import long_task

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.models.load import Base

log = logging.getLogger(__name__)

VERSION = 4  # of requests and rules; a higher one leaves older texts unused
STREAM = 3 << 40  # the number of the wordings' random streams
TRIES = 3  # texts for each wording that is wanted, at most
HELD_OUT = 20  # wordings that are never trained
SHOWN = 5
AROUND, AROUND_LETTERS = 8, 200  # questions of the data that tell the writer what it is about, and letters of each
SMALL = 0.9e9  # parameters; smaller models hardly ask the same thing in other words
OPTIONS = SamplingOptions(1, 64, 0.8, 0.95)
REPLY_S, REPLY_BYTES, REPLY_TOKENS, AT_A_TIME = 600.0, 1 << 20, 2000, 4  # of a server, which may think first
ABOUT = "README.md"
STYLES = (
    "in everyday words",
    "short, as typed on a phone",
    "politely, in a whole sentence",
    "without its most usual words",
    "as somebody who tells what happened, and then asks",
    "beginning with what the person wants to do",
)
RULES = """\
You get questions, and say each of them in other words. Ask for exactly the same, so that the same answer fits. Keep names, \
numbers and codes, add no others, and stay in the language of the question. Reply with the new question alone."""
AROUND_TEXT = "All questions from here on are asked in one place. Others asked there:"
# As turns of a chat: in one long request, a model of 1.5B mixes the examples into its answer. Hallwick and the A-40 are names,
# so that a wording that asks for them all the same brings a new name, and is dropped.
EXAMPLES = (
    ("What are the opening hours of Hallwick on Mondays?", "Until when can I come to Hallwick on a Monday?"),
    ("How do I reset the PIN of the A-40?", "forgot pin of my A-40, how to reset"),
    ("parking?", "Could you please tell me where I can park my car?"),
    ("Who is responsible for refunds?", "Whom do I ask to get my money back?"),
    ("Do you take back opened boxes?", "I opened my box yesterday and do not like it. Can I still send it back?"),
    (
        "What does a red light on the A-40 mean?",
        "I want to use my A-40, but it shows a red light. What is wrong with it?",
    ),
)

Writer = Callable[[Sequence[list[Message]], int], list[str]]
"""Takes chats that end with a request, and the number of the round, and returns a text for each."""
Scorer = Callable[[Sequence[tuple[str, str]]], list[float]]
"""Takes questions with answers, and returns the mean log-probability of each answer's tokens after its question."""


def read_rephrased(objective: Objective, ctx: RunContext) -> DataSplits:
    """Read the data of a run with other wordings of its questions, which are written first; see `Objective.load_data`."""
    folder = written_folder(ctx, lambda: _written(ctx.settings, ctx.plain_base))
    splits = objective.read_data(ctx, written_data(ctx.settings.data, folder))
    about = (folder / ABOUT).read_text(encoding="utf-8").splitlines() if (folder / ABOUT).is_file() else []
    report = replace(splits.report, data=f"{ctx.settings.data.data}, rephrased", rephrased=about)
    return replace(splits, report=report, written=folder)


def _written(settings: TrainSettings, base: Base) -> Path:
    """Return the folder of a run's records with other wordings of their questions."""
    data, seed = settings.data, settings.loop.seed
    sets = find_sets(data.data or "")
    if weighted := [f"{one.name}={one.weight:g}" for one in sets if one.weight != 1]:
        raise InputError(f"--rephrase {data.rephrase} with --data {weighted[0]}: a weight; leave it out")
    train, valid, test = (
        read_questions([file for one in sets for file in one.splits.get(name, ())], data)
        for name in ("train", "valid", "test")
    )
    # The default share is not held out: each fact is trained, and wordings of some are the test.
    share = 0.0 if valid or data.valid_fraction == DataSettings().valid_fraction else data.valid_fraction
    share = share / max(1, len(train)) if share >= 1 else share
    held = [one for one in train if int(sha256_of(f"{seed}:{one.text}")[:8], 16) < share * 16**8]
    asked = [one for one in train if one.text and one not in held]
    count = min(HELD_OUT, len(asked))
    tested = [asked[(seed + n * len(asked) // count) % len(asked)] for n in range(count)]
    about = rephrase(asked, [(data.rephrase or 0) + (one in tested) for one in asked], settings, base)
    # Others make up for those of which no wording counted.
    tested = [one for one in dict.fromkeys([*tested, *asked]) if one.wordings][:HELD_OUT]
    splits = {
        "train": [
            record for one in train if one not in held for record in one.records()[: -1 if one in tested else None]
        ],
        "valid": [*(one.record for one in [*valid, *held]), *(one.records()[-1] for one in tested)],
        "test": [one.record for one in test],
    }
    folder = cache_dir("wordings") / sha256_of(json.dumps(splits))[:32]
    for name in (name for name, records in splits.items() if records):
        write_records(folder / f"{name}.jsonl", splits[name])
    replace_text(folder / ABOUT, "\n".join(about) + "\n")
    return folder


def rephrase(
    questions: Sequence[Question], wanted: Sequence[int], settings: TrainSettings, base: Base | None
) -> list[str]:
    """Give questions other wordings, from the cache as far as they were written before, and return lines to report.

    Args:
        questions: those that have some text; they get the wordings.
        wanted: how many wordings of each.
        settings: the writer (--rephrase-model, else --model), the seed, and the data for messages.
        base: without an adapter, if --model is loaded.

    Raises:
        InputError: there is no question or no writer, or the server cannot be used.
    """
    if not questions:
        raise InputError(
            f"--data {settings.data.data}: no record has a question of its own (a prompt, one column, or the last turn of a "
            "user before an answer), so there is nothing to rephrase"
        )
    identity, write, score = _writer(settings, base)
    texts = [text for question in questions for text in (question.text, question.answer)]
    key = sha256_of(json.dumps([VERSION, identity, texts, list(wanted), settings.loop.seed]))
    file, rules, dropped = cache_dir("wordings") / f"{key[:32]}.jsonl", Wordings(questions), Counter[str]()
    known: dict[tuple[str, str], float] = {}
    around = [one.text[:AROUND_LETTERS] for one in questions[:: max(1, len(questions) // AROUND)][:AROUND]]
    with one_at_a_time(file), long_task("Rephrasing", sum(wanted), "wordings") as task:
        read = read_records(file) if file.exists() else ()  # but for a line that a kill left incomplete
        rounds = [record.value for record in read if isinstance(record, Record)]
        for number in range(TRIES * max(wanted)):
            asked = [place for place, one in enumerate(questions) if len(one.wordings) < wanted[place]]
            if not asked:
                break
            if number == len(rounds):
                styles = [STYLES[(number + place) % len(STYLES)] for place in asked]
                chats = [_request(questions[place].text, how, around) for place, how in zip(asked, styles, strict=True)]
                wordings = [cleaned(text) for text in write(chats, number)]
                near = (
                    _near_enough([questions[place] for place in asked], wordings, questions, score, known)
                    if score
                    else wordings
                )
                rounds.append({"wordings": wordings, "near": [bool(one) for one in near]})
                write_records(file, rounds)
            for place, wording, near in zip(asked, *rounds[number].values(), strict=True):
                if why := rules.take(questions[place], wording) if near else "off the subject":
                    dropped[why] += 1
            task.reach(sum(len(one.wordings) for one in questions))
    kept = sum(len(one.wordings) for one in questions)
    why = ", ".join(f"{count:,} {why}" for why, count in dropped.most_common())
    pairs = [f"{one.text} -> {one.wordings[0]}" for one in questions if one.wordings]
    return [
        f"{kept:,} of {kept + dropped.total():,} wordings kept{f' (dropped: {why})' if why else ''}",
        *pairs[:: max(1, len(pairs) // SHOWN)][:SHOWN],
    ]


def _request(question: str, style: str, around: Sequence[str]) -> list[Message]:
    """Return the turns of a chat that ends with the request to say a question in other words.

    Without other questions of the data (`around`), a writer takes a flat white for a shirt. They are the same in all requests,
    so that a server reads them once.
    """
    place = "\n".join((AROUND_TEXT, *(f"- {one}" for one in around)))
    asked = [(f"Say in other words, {how}: {text}", said) for how, (text, said) in zip(STYLES, EXAMPLES, strict=True)]
    first, *others = [*asked, (f"{place}\n\nSay in other words, {style}: {question}", STAND_IN)]
    return [
        {"role": role, "content": text}
        for pair in [(f"{RULES}\n\n{first[0]}", first[1]), *others]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _near_enough(
    asked: Sequence[Question],
    wordings: Sequence[str],
    questions: Sequence[Question],
    score: Scorer,
    known: dict[tuple[str, str], float],
) -> list[bool]:
    """Tell for each wording whether it makes its question's answer likelier than another question of the data does.

    It must bring at least half of what the question itself brings, in log-probability. `known` has the scores so far.
    """
    others = [questions[(questions.index(one) + len(questions) // 2) % len(questions)].text for one in asked]
    texts = [text for triple in zip(wordings, (one.text for one in asked), others, strict=True) for text in triple]
    pairs = [(text, asked[number // 3].answer) for number, text in enumerate(texts)]
    missing = list(dict.fromkeys(pair for pair in pairs if pair not in known))
    known |= zip(missing, score(missing), strict=True)
    found = [known[pair] for pair in pairs]
    return [
        new >= min(own, (own + other) / 2) for new, own, other in zip(found[::3], found[1::3], found[2::3], strict=True)
    ]


def _likelihoods(base: Base, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the mean log-probability of answers under a model, as a `Scorer` does."""
    examples = [Completion(question, answer) for question, answer in pairs]
    encoder = prompt_encoder(SplitRows(entries=[*examples]), DataSettings(), base.hf_tokenizer, None)
    encoded, found = encoder.encode(examples), [-math.inf] * len(pairs)
    for row, number in enumerate(encoded.source.tolist()):
        tokens, trained = encoded.rows.row(row)
        logps = nn.log_softmax(base.model(mx.array(tokens[None, :-1]))[0].astype(mx.float32), axis=-1)
        of_targets = mx.take_along_axis(logps, mx.array(tokens[1:, None]), axis=-1)[:, 0]
        found[number] = float(np.array(of_targets)[trained[1:]].mean())
    return found


def _writer(settings: TrainSettings, base: Base | None) -> tuple[list[Any], Writer, Scorer | None]:
    """Return what tells a writer apart from others, the writer, and what scores its wordings; a server gives no likelihoods."""
    other, model = settings.data.rephrase_model, settings.model
    if is_on_web(url := other or model.model or ""):
        name = _reply(url, "/models", ("data", 0, "id"))
        return [url, name], partial(_ask_server, url, name), None
    if other or base is None:  # its weights are read when it has to write
        base = load_base(replace(model, model=other, revision=None, bits=None) if other else model, read=False)
    writer = base

    def write(chats: Sequence[list[Message]], number: int) -> list[str]:
        if not number and count_parameters(writer.model) < SMALL:
            log.info(
                f"Note: {writer.model_id} has less than a billion parameters; so small a model can hardly ask the same thing in other "
                "words. Name a larger one, or the address of a server such as LM Studio's or Ollama's: --rephrase-model of train, "
                "--model of rephrase"
            )
        tokenizer = writer.hf_tokenizer
        examples = [Conversation(chat) for chat in chats]
        if not tokenizer.chat_template:  # a model that continues texts
            examples = [Completion("\n".join(turn["content"] for turn in chat[:-1]) + "\n", STAND_IN) for chat in chats]
        encoder = prompt_encoder(SplitRows(entries=[*examples]), DataSettings(), tokenizer, None)
        prompts = [encoder.prompt_tokens(example) for example in examples]
        texts, ends = [""] * len(chats), frozenset(writer.tokenizer.eos_token_ids)

        def take(batch: list[int], found: list[list[int]]) -> None:
            for place, tokens in zip(batch, found, strict=True):
                texts[place] = str(tokenizer.decode(tokens, skip_special_tokens=True))

        keys = answer_keys(settings.loop.seed, STREAM + number, len(chats))
        write_texts(writer, prompts, range(len(chats)), OPTIONS, ends, keys, take)
        return texts

    return [model_sample(writer.folder), writer.describe()], write, partial(_likelihoods, writer)


def _ask_server(url: str, model: str, chats: Sequence[list[Message]], number: int) -> list[str]:
    """Return a server's texts, as a `Writer` does."""
    how = {"model": model, "temperature": OPTIONS.temperature, "top_p": OPTIONS.top_p, "max_tokens": REPLY_TOKENS}
    reply = partial(_reply, url, "/chat/completions", ("choices", 0, "message", "content"))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(reply, [{**how, "messages": chat[:-1]} for chat in chats]))


def _reply(url: str, path: str, part: Sequence[str | int], asked: dict[str, Any] | None = None) -> str:
    """Return a part of what a server answers, by its keys and places.

    Raises:
        InputError: it cannot be reached, or answers otherwise.
    """
    try:
        body = None if asked is None else json.dumps(asked).encode()
        found = parse_json(download(url.rstrip("/") + path, most_bytes=REPLY_BYTES, seconds=REPLY_S, body=body))
        return str(reduce(getitem, part, found) or "")
    except FormatError as error:
        why = str(error)
    except (ValueError, LookupError, TypeError):
        why = "the answer is not that of a server with OpenAI's protocol"
    raise InputError(f"{url}{path}: {why}; give an address such as http://127.0.0.1:1234/v1")


# Put other wordings of a record's question in its place, and tell whether a wording may stand there.
#
# Small models answer the question instead, lose its numbers or invent
# others, so what they write counts only if a few rules hold that need no model and no list of words of a language. They are
# strict: a wording that is left out costs a moment, and one that asks for something else teaches a wrong answer.


@dataclass(eq=False)
class Question:
    """A record, its question and answer as text (empty: it has no question of its own), and the question's other wordings."""

    record: Fields
    text: str = ""
    answer: str = ""
    wordings: list[str] = field(default_factory=list)

    def records(self) -> list[Fields]:
        """Return the record, then itself with each wording as its question; everything else stays as it is."""
        return [self.record, *(_with_text(self.record, self.text, wording) for wording in self.wordings)]


def read_questions(files: Iterable[DataFile], settings: DataSettings) -> list[Question]:
    """Return the records of some files of one split, each with the last question that it answers.

    Raises:
        InputError: a file cannot be read.
    """
    found = []
    for file in files:
        for record in file_records(file, settings, SplitRows()):
            if isinstance(record, BadRow):
                log.info(f"Note: {file.name} {record.unit} {record.line} is left out: {record.why}")
                continue
            parse_rows([record], file.name, file.reading(settings), "examples", rows := SplitRows())
            question = Question(record.value)
            match rows.entries:
                case [Completion(asked, answer)] | [
                    Conversation([*_, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
                ]:
                    question = Question(record.value, asked, answer)
            # A question that was joined from several columns stands in none of them.
            whole = question.text.strip() and _with_text(record.value, question.text, "") is not record.value
            found.append(question if whole else Question(record.value))
    return found


def _with_text(value: Any, old: str, new: str) -> Any:
    """Return a value with the last text in it that equals `old` replaced; the value itself if there is none."""
    if not isinstance(value, dict | list):
        return new if value == old else value
    for key, part in reversed(list(value.items() if isinstance(value, dict) else enumerate(value))):
        if (changed := _with_text(part, old, new)) is not part:
            return {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1 :]]
    return value


# What a wording must keep

LONGER, SHORTER, MORE_WORDS = 3, 0.3, 5
CAPITALS = 0.2  # share of words inside sentences from which on a capital letter is no sign of a name, as in German
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
WORD = re.compile(r"\w[\w-]*")
INSIDE = re.compile(r"(?<=[\w,;] )\w[\w-]+")  # words that do not begin a sentence
MARKED = re.compile(
    r"\s*(?:[-*•>#]+|\d{1,2}[.)])\s+|[\w ]{0,30}(?:question|wording|words|version|rephrased)\s*:\s*", re.IGNORECASE
)
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
QUOTES = "\"'`*_“”„‘’«» \t"


def cleaned(text: str) -> str:
    """Return the wording in what a model wrote: its first line, without an introduction, marks of lists, and quotes."""
    lines = [line for line in THOUGHT.sub("", text).splitlines() if line.strip() and not line.rstrip().endswith(":")]
    return MARKED.sub("", lines[0].strip(QUOTES), count=1).strip(QUOTES) if lines else ""


def plain(text: str) -> str:
    """Return the words of a text in lower case, without marks between them."""
    return " ".join(word.casefold().replace("-", "") for word in WORD.findall(text))


class Wordings:
    """Tells which wordings count, by the questions and answers of the whole data."""

    def __init__(self, questions: Sequence[Question]):
        """Read the data's words: how often each is there, and which are always written with a capital letter."""
        texts = [text for question in questions for text in (question.text, question.answer)]
        inside = [word for text in texts for word in INSIDE.findall(text)]
        self._often = Counter(word for text in texts for word in plain(text).split())
        self._taken = {plain(question.text) for question in questions}
        self._names = _capitalized(texts) - {
            plain(word) for text in texts for word in WORD.findall(text) if word[0].islower()
        }
        if sum(word[0].isupper() for word in inside) > CAPITALS * len(inside):
            self._names = set()

    def take(self, question: Question, wording: str) -> str | None:
        """Add a wording from `cleaned` to a question; if it may not stand for it, return why."""
        asked, answer, found = (plain(text).split() for text in (question.text, question.answer, wording))
        given, numbers = set(NUMBER.findall(question.text)), set(NUMBER.findall(wording))
        # Words of the answer that are rare in the data: one may be chance, two hardly are.
        rare = {word for word in answer if len(word) > 3 and self._often[word] <= 2 + len(self._taken) // 20}
        told = rare.intersection(found).difference(asked)
        # A language is known by what the other records have of it.
        own = Counter(asked + answer)
        known = {word for word in found if self._often[word] > own[word] and not word.isdigit()} - self._names
        checks = {
            "empty": not found,
            "the same": plain(wording) in self._taken,
            "too long or short": not SHORTER * len(asked) <= len(found) <= LONGER * len(asked) + MORE_WORDS,
            "another language": not _scripts(wording) <= _scripts(question.text + question.answer)
            or (len(found) > 3 and not known),
            "gave the answer away": len(told) > 1 or told & self._names or (numbers - given).intersection(NUMBER.findall(question.answer)),
            "lost a number or name": given - numbers or not all(_mentions(found, name) for name in self._names.intersection(asked)),
            "new number or name": numbers - given or not all(_mentions(asked, name) for name in _capitalized([wording])),
        }  # fmt: skip
        why = next((why for why, fails in checks.items() if fails), None)
        if why is None:
            question.wordings.append(wording)
            self._taken.add(plain(wording))
        return why


def _capitalized(texts: Iterable[str]) -> set[str]:
    """Return the words with a capital letter that do not begin a sentence, as `plain` has them."""
    return {plain(word) for text in texts for word in INSIDE.findall(text) if word[0].isupper()}


def _mentions(words: Iterable[str], name: str) -> bool:
    """Tell whether a name is among some words, with or without an ending: Sunday, Sundays."""
    return any(word.startswith(name.rstrip("s")) for word in words)


def _scripts(text: str) -> set[str]:
    """Return the scripts of a text's letters, by the first words of their names in Unicode; Japan's three are one."""
    found = {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()}
    return {re.sub("HIRAGANA|KATAKANA.*", "CJK", script) for script in found}
