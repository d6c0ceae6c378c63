"""Read records that compare or rate answers: pairs of a chosen and a rejected one, and single answers with a label.

    TRL             prompt, chosen, rejected (text or messages; without prompt: two whole dialogues)
                    prompt, completion, label
    LLaMA-Factory   conversations or instruction, with chosen, rejected; messages or conversations with kto_tag
    OpenAI          input: {messages}, preferred_output, non_preferred_output
    UltraFeedback   instruction, completions: [{response, overall_score}, ...]
    HH              chosen, rejected: two dialogues in one text, "\\n\\nHuman: ...\\n\\nAssistant: ..."

Each answer becomes an example of its own, a `Conversation` or `Completion` of which only the answer is trained, so
templates, masks and limits are those of every other example.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mlx_lora.data.examples import Completion, Conversation, EmptyRecord, FormatError, Message, Record
from mlx_lora.data.formats import parse_record, sharegpt_messages
from mlx_lora.data.messages import as_list, as_string, conversation, keys_of
from mlx_lora.data.turns import common_prefix

Answer = Conversation | Completion
SPEAKER = "\n\nAssistant:"  # starts an answer in a dialogue of Anthropic's HH
LABELS = ("label", "kto_tag")
YES, NO = ("true", "1", "yes"), ("false", "0", "no")
PAIR_EXPECTED = (
    "prompt, chosen, rejected; chosen and rejected as whole dialogues; conversations (or instruction), chosen, rejected; "
    "input, preferred_output, non_preferred_output; instruction, completions with scores"
)
LABEL_EXPECTED = "prompt, completion, label; messages (or conversations, or instruction and output), label or kto_tag"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        chosen, rejected: the better and the worse one, each with its prompt.
        margin: how much better, where the record says so (a reward model's target).
    """

    chosen: Answer
    rejected: Answer
    margin: float = 0.0


@dataclass(frozen=True)
class Rated:
    """One answer, and whether it is a good one."""

    answer: Answer
    good: bool


def parse_pairs(record: Record, all_pairs: bool = False) -> list[Pair]:
    """Read one record as preference pairs: one, or several where it ranks more than two answers.

    Args:
        record: as read from the file; None stands for an absent value.
        all_pairs: of scored answers, take every pair with different scores rather than best against worst.

    Raises:
        FormatError: the record has no such shape (EmptyRecord: it has, with an empty answer or two equal ones).
    """
    record = {_NAMES.get(key, key): value for key, value in record.items() if value is not None}
    if "completions" in record and isinstance(record["completions"], list):
        pairs = _scored(record, all_pairs)
    else:
        missing = [name for name in ("chosen", "rejected") if name not in record]
        if missing:
            found = f"found {keys_of(record)}"
            raise FormatError(f"{found}; a preference pair needs {' and '.join(missing)}: one of {PAIR_EXPECTED}")
        pairs = [_pair(record, record["chosen"], record["rejected"], _margin(record))]
    for pair in pairs:
        _check(pair)
    return pairs


def parse_rated(record: Record) -> list[Rated]:
    """Read one record as rated answers: one with a label, or a pair as a good and a bad one.

    Raises:
        FormatError: as in `parse_pairs`.
    """
    record = {_NAMES.get(key, key): value for key, value in record.items() if value is not None}
    name = next((name for name in LABELS if name in record), None)
    if name is None:
        if {"chosen", "rejected"} <= record.keys():
            return [r for pair in parse_pairs(record) for r in (Rated(pair.chosen, True), Rated(pair.rejected, False))]
        raise FormatError(f"found {keys_of(record)}; a rated answer needs {LABEL_EXPECTED}")
    text = str(record[name]).strip().lower()
    if text not in (*YES, *NO):
        raise FormatError(f"{name} is {record[name]!r}; it must be true or false")
    rest = {key: value for key, value in record.items() if key not in LABELS}
    _, example = parse_record(rest)
    if not isinstance(example, Conversation | Completion):
        raise FormatError(f"found {keys_of(record)}; a rated answer needs {LABEL_EXPECTED}")
    return [Rated(_last_answer_only(example), text in YES)]


_NAMES = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
}


def _pair(record: Record, chosen: Any, rejected: Any, margin: float = 0.0) -> Pair:
    """Return the pair of two answers in whichever of their shapes."""
    context = _context(record)
    if context is None and isinstance(chosen, str) and isinstance(rejected, str):
        return _text_pair(record, chosen, rejected, margin)
    answers = [_answer_messages(chosen, "chosen"), _answer_messages(rejected, "rejected")]
    whole = [bool(answer) and answer[0].get("role") != "assistant" for answer in answers]
    if any(whole):  # dialogues from their beginning: what they share is the prompt
        shared = _shared_turns(*answers)
        if context and not isinstance(record.get("prompt"), str) and answers[0][: len(context)] != context:
            raise FormatError("the prompt is not the beginning of the chosen dialogue; leave one of them out")
        context, answers = shared, [answer[len(shared) :] for answer in answers]
    if not context:
        raise FormatError("chosen and rejected share no beginning; a pair answers one prompt")
    tools, functions = _tools(record), record.get("functions")
    chosen, rejected = (_conversation(context, answer, tools, functions) for answer in answers)
    return Pair(chosen, rejected, margin)


def _text_pair(record: Record, chosen: str, rejected: str, margin: float) -> Pair:
    """Return a pair of plain texts: after a prompt, or two dialogues in one text each."""
    if isinstance(prompt := record.get("prompt"), str):
        # Some sets repeat the prompt in front of both answers.
        if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Pair(Completion(prompt, chosen), Completion(prompt, rejected), margin)
    shared = chosen[: common_prefix(chosen, rejected)]
    if SPEAKER in shared:
        shared = shared[: shared.rindex(SPEAKER) + len(SPEAKER)]
    elif shared.endswith(" "):
        shared = shared[:-1]  # the space belongs to the next word's token
    if not shared:
        raise FormatError("chosen and rejected share no beginning, and there is no prompt; a pair answers one prompt")
    return Pair(Completion(shared, chosen[len(shared) :]), Completion(shared, rejected[len(shared) :]), margin)


def _context(record: Record) -> list[Message] | None:
    """Return the turns before the answers, None where the record has none of its own or has them as plain text."""
    if isinstance(given := record.get("input"), dict):  # OpenAI's
        return as_list(given.get("messages"), "input.messages")
    if isinstance(prompt := record.get("prompt"), list):
        return prompt
    system = as_string(record.get("system", ""), "system")
    turns = [{"role": "system", "content": system}] if system else []
    if "conversations" in record or "conversation" in record:
        return turns + sharegpt_messages(record.get("conversations", record.get("conversation")))
    if "messages" in record:
        return turns + as_list(record["messages"], "messages")
    question = record.get("instruction", record.get("question"))
    if question is not None:
        more = as_string(record.get("input", ""), "input")
        text = "\n".join(part for part in (as_string(question, "instruction"), more) if part.strip())
        return [*turns, {"role": "user", "content": text}]
    if isinstance(record.get("prompt"), str) and not all(isinstance(record[n], str) for n in ("chosen", "rejected")):
        return [*turns, {"role": "user", "content": record["prompt"]}]
    return None


def _answer_messages(answer: Any, name: str) -> list[Message]:
    """Return an answer as turns: a text, one turn of OpenAI's or ShareGPT's, or a list of them."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    turns = [answer] if isinstance(answer, dict) else answer
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise FormatError(f"{name} must be a text, a message or a list of messages")
    return sharegpt_messages(turns) if "from" in turns[0] else list(turns)


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Return the turns with which both dialogues begin, up to the last that is not an answer."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    while count and chosen[count - 1].get("role") == "assistant":
        count -= 1
    return chosen[:count]


def _conversation(context: list[Message], answer: list[Message], tools: Any, functions: Any) -> Conversation:
    """Return a conversation of which only the answer is trained."""
    if not answer:
        raise EmptyRecord("an answer without text")
    before = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in context]
    return conversation(before + answer, tools, None, functions)


def _last_answer_only(example: Answer) -> Answer:
    """Return a rated example with its earlier answers as context: the label is the last one's."""
    if isinstance(example, Completion):
        return example
    last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    messages = [message if i == last else {**message, "weight": 0} for i, message in enumerate(example.messages)]
    return Conversation(messages, example.tools, example.reasoning_field, example.unread)


def _scored(record: Record, all_pairs: bool) -> list[Pair]:
    """Return pairs of answers that a list holds with scores, each better one against a worse one."""
    answers = []
    for entry in record["completions"]:
        text = entry.get("response", entry.get("text")) if isinstance(entry, dict) else None
        score = (
            next((entry[name] for name in ("overall_score", "score", "rating") if name in entry), None)
            if text
            else None
        )
        if not isinstance(text, str) or not isinstance(score, int | float | str):
            raise FormatError("completions must be a list of {response, overall_score}")
        try:
            answers.append((float(score), text))
        except ValueError:
            raise FormatError(f"overall_score is {score!r}; it must be a number") from None
    answers.sort(key=lambda answer: -answer[0])
    found = list(combinations(answers, 2)) if all_pairs else [(answers[0], answers[-1])] if answers else []
    pairs = [_pair(record, good[1], bad[1], good[0] - bad[0]) for good, bad in found if good[0] > bad[0]]
    if not pairs:
        raise EmptyRecord("no two answers with different scores")
    return pairs


def _margin(record: Record) -> float:
    value = record.get("margin", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"margin is {value!r}; it must be a number")
    return float(value)


def _tools(record: Record) -> Any:
    given = record.get("input")
    return given.get("tools") if isinstance(given, dict) else record.get("tools")


def _check(pair: Pair) -> None:
    """Refuse a pair with nothing to compare."""
    texts = [_answer_text(answer) for answer in (pair.chosen, pair.rejected)]
    for name, text in zip(("chosen", "rejected"), texts, strict=True):
        if not text.strip():
            raise EmptyRecord(f"empty {name} answer")
    if texts[0] == texts[1]:
        raise EmptyRecord("equal answers")


def _answer_text(answer: Answer) -> str:
    if isinstance(answer, Completion):
        return answer.completion
    trained = [message for message in answer.messages if message.get("weight", 1) and message["role"] == "assistant"]
    return "\n".join(f"{message.get('content') or ''}{message.get('tool_calls') or ''}" for message in trained)
