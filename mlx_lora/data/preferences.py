"""Read records that compare or rate answers: pairs of a chosen and a rejected one, and single answers with a label.

    TRL             prompt, chosen, rejected (text or messages; without prompt: two whole dialogues)
                    prompt, completion, label
    LLaMA-Factory   conversations or instruction, with chosen, rejected; messages or conversations with kto_tag;
                    chosen_messages, rejected_messages
    Axolotl         prompt, input, question, instruction or conversation, and system, with chosen, rejected or with
                    completion, label; completion as a whole dialogue
    others          query, problem or context, and system_prompt, in any case, with chosen, rejected
    OpenAI          input: {messages}, preferred_output, non_preferred_output
    UltraFeedback   instruction, completions: [{response, overall_score}, ...]
    Nectar          prompt, answers: [{answer, rank}, ...]
    HH              chosen, rejected: two dialogues in one text, "\\n\\nHuman: ...\\n\\nAssistant: ..."

Each answer becomes a separate example, a `Conversation` or `Completion` in which only the answer is trained, so
templates, masks and limits work as for any other example.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from mlx_lora.data.assistant_spans import common_prefix
from mlx_lora.data.examples import (
    Completion,
    Conversation,
    EmptyPart,
    EmptyRecord,
    Fields,
    FormatError,
    Message,
    MissingColumn,
    as_list,
    as_string,
    conversation,
    keys_of,
    number_of,
    usual_role,
)
from mlx_lora.data.formats import (
    ANSWER_LISTS,
    ANSWERS,
    GIVEN,
    KEPT,
    columns_of,
    is_id,
    opened,
    opening,
    parse_record,
    sharegpt_messages,
    usual_names,
)

Answer = Conversation | Completion
ASKER, SPEAKER = "\n\nHuman:", "\n\nAssistant:"  # start a question and an answer in a dialogue of Anthropic's HH
LABELS = ("label", "kto_tag")
YES, NO = ("true", "1", "yes"), ("false", "0", "no")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# In a list of several answers, the keys of an answer's text, and of how good it is; rank 1 is the best.
TEXTS, SCORES, RANKS = ("response", "text", "answer"), ("overall_score", "score", "rating"), ("rank",)
LABEL_EXPECTED = "prompt, completion, label; messages (or conversations, or instruction and output), label or kto_tag"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        chosen, rejected: the better and the worse one, each with its prompt.
        margin: how much better, if the record says so (a reward model's target).
        repeats: whether both answers begin with the prompt, a text (data/read.py); None: the prompt is no text.
    """

    chosen: Answer
    rejected: Answer
    margin: float = 0.0
    repeats: bool | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rated:
    """One answer, and whether it is a good one; `repeats` is that of the pair that it is from."""

    answer: Answer
    good: bool
    repeats: bool | None = field(default=None, compare=False)


def parse_pairs(record: Fields, all_pairs: bool = False) -> list[Pair]:
    """Read one record as preference pairs: one, or several if it ranks more than two answers.

    Args:
        record: as read from the file; None stands for an absent value.
        all_pairs: if answers have scores, return every pair with different scores instead of the best with the worst.

    Raises:
        FormatError: the record has no such shape (EmptyRecord: it has, with an empty answer or two equal ones).
    """
    record = _known(record)
    missing = [name for name in ("chosen", "rejected") if name not in record]
    several = [name for name in ANSWER_LISTS if isinstance(record.get(name), list)]
    if missing and several:
        pairs = _scored(record, several[0], all_pairs)
    elif missing:
        needs = f"found {keys_of(record)}; a preference pair needs {' and '.join(missing)}"
        if any(name in record for name in LABELS):
            raise FormatError(f"{needs}; for single answers with a label, train with --objective kto")
        raise MissingColumn(
            f"{needs}; "
            + ("for plain chats, train with --objective sft" if missing[1:] else "add it, or remove the row")
        )
    else:
        margin = number_of(record.get("margin", 0.0))
        if margin is None:
            raise FormatError(f"margin is {record['margin']!r}; it must be a number")
        pairs = [_pair(record, record["chosen"], record["rejected"], margin)]
    for pair in pairs:
        texts = [_answer_text(answer) for answer in (pair.chosen, pair.rejected)]
        for name, text in zip(("chosen", "rejected"), texts, strict=True):
            if not text.strip():
                raise EmptyPart(f"empty {name} answer")
        if texts[0] == texts[1]:
            raise EmptyRecord("the two answers are equal")
    return pairs


def parse_rated(record: Fields) -> list[Rated]:
    """Read one record as rated answers: one with a label, or a pair as a good and a bad one.

    Raises:
        FormatError: as in `parse_pairs`.
    """
    record = _known(record)
    name = next((name for name in LABELS if name in record), None)
    if name is None:
        several = any(isinstance(record.get(name), list) for name in ANSWER_LISTS)
        if several or {"chosen", "rejected"} <= record.keys():
            pairs = parse_pairs(record)
            return [Rated(one, one is p.chosen, p.repeats) for p in pairs for one in (p.chosen, p.rejected)]
        raise MissingColumn(f"found {keys_of(record)}; a rated answer needs {LABEL_EXPECTED}")
    text = str(record[name]).strip().lower()
    if text not in (*YES, *NO):
        raise FormatError(f"{name} is {record[name]!r}; it must be true or false")
    example = _answered({key: value for key, value in record.items() if key not in LABELS})
    if not isinstance(example, Conversation | Completion):
        raise MissingColumn(f"found {keys_of(record)}; a rated answer needs {LABEL_EXPECTED}")
    if isinstance(example, Conversation):  # the label is for the last answer, and earlier ones are context
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        turns = [turn if i == last else {**turn, "weight": 0} for i, turn in enumerate(example.messages)]
        example = replace(example, messages=turns)
    return [Rated(example, text in YES)]


OUR_NAMES = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "chosen_messages": "chosen",
    "rejected_messages": "rejected",
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
    "chatgpt": "chosen",  # in Intel's Orca pairs, as they were first published
    "llama2-13b-chat": "rejected",
}

CHATS = ("conversations", "conversation", "messages")  # the turns before the answers


def columns_not_read(record: Fields, named: str | None) -> list[str]:
    """Return the columns of a record of preferences that have content and are not read.

    Args:
        record: as in the file; one that could be read.
        named: the columns that the settings name, as in `NamedColumns.renamed`; None: none.
    """
    record = _our_columns(record)
    read = named.split(" + ") if named else _before_answers(record)
    if any(name in record for name in LABELS):  # one answer, of any format
        read = [*read, *ANSWERS, *CHATS, "prompt"]
    return [
        key
        for key, value in record.items()
        if value not in ("", [], {}) and key not in (*read, *KEPT) and not is_id(key)
    ]


def _our_columns(record: Fields) -> Fields:
    """Return a record without absent values, with our names of its columns."""
    record = {OUR_NAMES.get(key, key): value for key, value in record.items() if value is not None}
    return {OUR_NAMES.get(key, key): value for key, value in usual_names(record).items()}


def _known(record: Fields) -> Fields:
    """Return a record with our columns, if it is one of texts."""
    record = _our_columns(record)
    for name in MEDIA:
        if record.get(name):
            hint = "; a vision-language model takes questions with pictures" if "image" in name else ""
            raise FormatError(f"it has {name}; only text is trained{hint}")
    return record


def _answered(record: Fields) -> Any:
    """Return the example that a rated record holds, without its label."""
    answer = record.get("completion")
    if isinstance(answer, list) and answer and isinstance(answer[0], dict) and answer[0].get("role") != "assistant":
        return _conversation([], answer, record)  # the whole dialogue
    if answer is None or (isinstance(answer, str) and isinstance(record.get("prompt"), str) and not opening(record)):
        return parse_record(record)[1]
    context = _context(record, answer)
    if not context:
        raise MissingColumn(f"found {keys_of(record)}; a rated answer needs {LABEL_EXPECTED}")
    return _conversation(context, _answer_messages(answer, "completion"), record)


def _pair(record: Fields, chosen: Any, rejected: Any, margin: float = 0.0) -> Pair:
    """Return the pair of two answers, in any of the supported shapes."""
    context = _context(record, chosen, rejected)
    if context is None and isinstance(chosen, str) and isinstance(rejected, str):
        return _text_pair(record, chosen, rejected, margin)
    answers = [_answer_messages(chosen, "chosen"), _answer_messages(rejected, "rejected")]
    if any(answer and answer[0].get("role") != "assistant" for answer in answers):  # dialogues from their beginning
        # The prompt: the turns with which both begin, up to the last one that is not an answer.
        count = next(
            (i for i, turns in enumerate(zip(*answers, strict=False)) if turns[0] != turns[1]), min(map(len, answers))
        )
        while count and answers[0][count - 1].get("role") == "assistant":
            count -= 1
        shared = answers[0][:count]
        _check_prompt(record, context or [], answers)
        answers = [answer[len(shared) :] for answer in answers]
        first = shared and shared[0].get("role") not in ("system", "developer")
        context = [*(opening(record) if first else []), *shared]
    if not context:
        raise FormatError("chosen and rejected begin differently; both must answer the same prompt")
    better, worse = (_conversation(context, answer, record) for answer in answers)
    return Pair(better, worse, margin)


def _check_prompt(record: Fields, context: list[Message], dialogues: list[list[Message]]) -> None:
    """Refuse a record if one of its two dialogues does not begin with its prompt."""
    if not {"query", "problem", "context"}.isdisjoint(_before_answers(record)):
        return  # often a source of the dialogues, in other words
    prompt, bare = record.get("prompt"), context[len(opening(record)) :]
    for name, dialogue in zip(("chosen", "rejected"), dialogues, strict=True):
        if isinstance(prompt, str):  # in some data sets the first question, in others the last
            fits = any(prompt.strip() in str(turn.get("content")) for turn in dialogue[:-1])
        else:
            fits = context == dialogues[0] or any(dialogue[: len(turns)] == turns for turns in (context, bare))
        if not fits:
            raise FormatError(f"the prompt is not the beginning of the {name} dialogue; leave one of them out")


def _text_pair(record: Fields, chosen: str, rejected: str, margin: float) -> Pair:
    """Return a pair of plain texts: after a prompt, or two dialogues in one text each."""
    if isinstance(prompt := record.get("prompt"), str):
        begins = [bool(prompt) and text.startswith(prompt) for text in (chosen, rejected)]
        if not all(begins) and (ASKER in chosen[: len(ASKER)] or ASKER in rejected[: len(ASKER)]):
            name = "rejected" if begins[0] else "chosen"
            raise FormatError(f"the prompt is not the beginning of the {name} dialogue; leave one of them out")
        goes_on = all(text[len(prompt) :].strip() for text in (chosen, rejected))
        repeats = all(begins) and goes_on if prompt.strip() else None
        return Pair(Completion(prompt, chosen), Completion(prompt, rejected), margin, repeats)
    shared = chosen[: common_prefix(chosen, rejected)]

    def may_ask(value: Any) -> bool:  # turns, or a text of several words that the answers do not share
        is_text = isinstance(value, str) and len(value.split()) > 2
        return isinstance(value, list) or (is_text and value.strip() not in shared)

    if SPEAKER in shared:
        shared = shared[: shared.rindex(SPEAKER) + len(SPEAKER)]
    elif others := [name for name in columns_not_read(record, None) if may_ask(record[name])]:
        raise MissingColumn(
            f"found {columns_of(record)}; none of them is known as the prompt; name it with --prompt-column, or remove "
            f"{', '.join(others[:3])} if chosen and rejected begin with it"
        )
    elif shared.endswith(" "):
        shared = shared[:-1]  # the space belongs to the next word's token
    if not shared:
        raise FormatError(
            "chosen and rejected begin differently, and there is no prompt; both must answer the same prompt"
        )
    return Pair(Completion(shared, chosen[len(shared) :]), Completion(shared, rejected[len(shared) :]), margin)


def _context(record: Fields, *answers: Any) -> list[Message] | None:
    """Return the turns before the answers, None if the record has none, or has them as plain text."""
    if isinstance(given := record.get("input"), dict):  # OpenAI's
        return as_list(given.get("messages"), "input.messages")
    if isinstance(prompt := record.get("prompt"), list):
        return opened(record, _turns(prompt)) if all(isinstance(turn, dict) for turn in prompt) else prompt
    names = _before_answers(record)
    if names and names[0] in CHATS:
        return opened(record, _turns(as_list(record[names[0]], names[0])))
    turns = opening(record)
    if names and names != ["prompt"]:
        asked = [as_string(record[name], name) for name in names]
        return [*turns, {"role": "user", "content": "\n".join(part for part in asked if part.strip())}]
    if isinstance(prompt, str) and (turns or not all(isinstance(answer, str) for answer in answers)):
        return [*turns, {"role": "user", "content": prompt}]
    return None


def _before_answers(record: Fields) -> list[str]:
    """Return the columns that what comes before the answers is read from: one of turns, or those of a question."""
    if isinstance(record.get("input"), dict):
        return ["input"]
    if isinstance(prompt := record.get("prompt"), list):
        return ["prompt"]
    if chat := next((name for name in CHATS if name in record), None):
        return [chat]
    asking = ("instruction", "question") if isinstance(prompt, str) else ("instruction", "question", "query", "problem")
    question = [name for name in asking if name in record][:1]
    if isinstance(prompt, str) and not question:
        return ["prompt"]
    return [*question, *(name for name in record if name in GIVEN and isinstance(record[name], str))]


def _turns(turns: list[Any]) -> list[Message]:
    """Return turns as messages, also if they are ShareGPT's."""
    if not all(isinstance(turn, dict) for turn in turns):
        raise FormatError("a turn is not an object; expected role, content")
    if turns and "from" in turns[0]:
        return sharegpt_messages(turns)
    return [{**turn, "role": usual_role(turn["role"])} if "role" in turn else turn for turn in turns]


def _answer_messages(answer: Any, name: str) -> list[Message]:
    """Return an answer as turns: a text, one turn of OpenAI's or ShareGPT's, or a list of them (or {messages: list})."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    turns = answer.get("messages", [answer]) if isinstance(answer, dict) else answer
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise FormatError(f"{name} must be a text, a message or a list of messages")
    return _turns(turns)


def _conversation(context: list[Message], answer: list[Message], record: Fields) -> Conversation:
    """Return a conversation in which only the answer is trained, with the tools of its record."""
    if not answer:
        raise EmptyRecord("an answer without text")
    before = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in context]
    found = conversation(before + answer, _tools(record), None, record.get("functions"))
    return replace(found, unread=found.unread | {"chat_template_kwargs"} & record.keys())


def _scored(record: Fields, name: str, all_pairs: bool) -> list[Pair]:
    """Return pairs of the answers that a list holds with scores or ranks, each better one against a worse one."""
    answers = []
    for entry in record[name]:
        entry = entry if isinstance(entry, dict) else {}
        text = next((entry[key] for key in TEXTS if key in entry), None)
        key = next((key for key in (*SCORES, *RANKS) if isinstance(entry.get(key), int | float | str)), None)
        if not isinstance(text, str) or key is None:
            raise FormatError(f"{name} must be a list of {{response, overall_score}} or {{answer, rank}}")
        if not text.strip():
            continue
        try:
            answers.append((-float(entry[key]) if key in RANKS else float(entry[key]), text))
        except ValueError:
            raise FormatError(f"{key} is {entry[key]!r}; it must be a number") from None
    answers.sort(key=lambda answer: -answer[0])
    found = list(combinations(answers, 2)) if all_pairs else [(answers[0], answers[-1])] if answers else []
    found = [(good, bad) for good, bad in found if good[0] > bad[0] and good[1] != bad[1]]
    if not found:
        raise EmptyRecord("no two different answers with different scores")
    return [_pair(record, good[1], bad[1], good[0] - bad[0]) for good, bad in found]


def _tools(record: Fields) -> Any:
    given = record.get("input")
    return given.get("tools") if isinstance(given, dict) else record.get("tools")


def _answer_text(answer: Answer) -> str:
    if isinstance(answer, Completion):
        return answer.completion
    trained = [message for message in answer.messages if message.get("weight", 1) and message["role"] == "assistant"]
    return "\n".join(f"{message.get('content') or ''}{message.get('tool_calls') or ''}" for message in trained)
