"""Read a chat export as conversations in which one person's messages are the answers (--speaker).

    Ben     18:22  Are you coming?            user        Are you coming?
    Marta   18:23  In ten minutes.        ->  assistant   In ten minutes.
    Marta   18:23  Bring the keys?                        Bring the keys?

An export is recognized by its content, whatever its name. Consecutive messages of one side are one turn, a line each. A
pause of --conversation-gap hours begins a new conversation. In a chat of more than two, each line of the others begins
with its writer's name. Left out, and counted: a conversation's messages before anyone else has written, because they
answer nothing, and those after the last answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_files import (
    ChatExport,
    ChatMessage,
    ExportedChat,
    is_imessage,
    is_telegram,
    is_transcript,
    is_whatsapp,
    read_imessage,
    read_telegram,
    read_transcript,
    read_whatsapp,
)
from mlx_lora.data.examples import Record
from mlx_lora.data.files import DataFile
from mlx_lora.data.records import decoded_text, text_encoding
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.text import counted, did_you_mean

HEAD_BYTES = 1 << 17  # of a file, to recognize it by
MOST_NAMED = 8  # speakers that a message lists
CHARACTERS_PER_TOKEN = 2  # at least, also in languages that the tokenizer knows little of
OF_A_TURN = 20  # characters that a template puts around a turn, about
WHATSAPP, TELEGRAM, IMESSAGE, TRANSCRIPT = "WhatsApp chat", "Telegram chat", "iMessage chat", "transcript"
OPENING, UNANSWERED, ELSEWHERE = "opening", "unanswered", "elsewhere"


def chat_kind(path: Path) -> str | None:
    """Return what kind of chat export a file is, by its beginning; None: it is none.

    Raises:
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json"):
        return None
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).decode(text_encoding(path), errors="ignore")
    if suffix == ".json":
        return TELEGRAM if is_telegram(head) else None
    lines = head.splitlines()
    tests = {WHATSAPP: is_whatsapp, IMESSAGE: is_imessage, TRANSCRIPT: is_transcript}
    return next((kind for kind, fits in tests.items() if fits(lines)), None)


def read_chats(path: Path) -> ChatExport | None:
    """Return the messages of a chat export; None if the file is none.

    Raises:
        InputError: the file's text cannot be decoded.
    """
    kind = chat_kind(path)
    if kind is None:
        return None
    text = decoded_text(path)
    if kind == TELEGRAM:
        try:
            chats = read_telegram(parse_json(text))
        except (json.JSONDecodeError, ValueError):
            return None  # the reader of records says where
        return ChatExport(kind, chats, "message") if chats else None
    lines = text.split("\n")
    read = {WHATSAPP: read_whatsapp, IMESSAGE: read_imessage, TRANSCRIPT: read_transcript}[kind]
    return ChatExport(kind, [read(lines)])


@dataclass(frozen=True)
class ChatSummary:
    """What was made of a chat export.

    Attributes:
        file, kind, speaker: Its name, what it is, and whose messages are trained.
        messages: Messages that have text, of all speakers.
        trained: How many of the speaker's are trained.
        answers: Turns that they make.
        conversations: Rows.
        left_out: What was left out -> messages.
        gap_hours: The pause that begins a new conversation.
    """

    file: str
    kind: str
    speaker: str
    messages: int
    trained: int
    answers: int
    conversations: int
    left_out: Counter[str]
    gap_hours: float

    @property
    def words(self) -> str:
        """The summary as a sentence."""
        where = {
            OPENING: f"by {self.speaker} before anyone else wrote",
            UNANSWERED: "after the last answer of a conversation",
            ELSEWHERE: f"of chats without {self.speaker}",
        }
        left = [
            f"{counted(count, 'message')} {where[what]}" if what in where else counted(count, what)
            for what, count in self.left_out.items()
        ]
        pause = "" if self.kind == TRANSCRIPT else f" (a pause of {self.gap_hours:g} h begins another)"
        return (
            f"{self.file} is a {self.kind} of {counted(self.messages, 'message')}: {counted(self.trained, 'message')} by "
            f"{self.speaker} trained as {counted(self.answers, 'answer')} in {counted(self.conversations, 'conversation')}"
            f"{pause}; left out: {', '.join(left) or 'nothing'}"
        )


def chats_of(file: DataFile, settings: DataSettings) -> ChatExport | None:
    """Return the chats that a file exports, if it is such an export and is to be read as one; None otherwise.

    A transcript without dates may as well be a play: it is only read as a chat if --speaker is given.

    Raises:
        InputError: --speaker is not given, or the file cannot be read.
    """
    if settings.data_format != "auto":
        return None
    kind = chat_kind(file.path)
    if kind is None or (kind == TRANSCRIPT and settings.speaker is None):
        return None
    export = read_chats(file.path)
    if export is None or not export.speakers:
        return None
    if settings.speaker is None:
        raise InputError(
            f"{file.name} is a {kind} of {named(export.speakers)}; choose whose messages are trained as answers with "
            "--speaker NAME, or train all of it as plain text with --data-format text"
        )
    return export


def conversations_of(export: ChatExport, name: str, settings: DataSettings) -> tuple[Iterator[Record], ChatSummary]:
    """Return the conversations of an export as records, and what was left out.

    Args:
        export: The chats.
        name: Of their file, for messages.
        settings: The speaker, the pause between conversations, and the length of rows.

    Raises:
        InputError: no message is by the speaker, or nobody else wrote one.
    """
    speaker = _resolved(export, name, settings.speaker or "")
    records: list[Record] = []
    left_out: Counter[str] = Counter()
    trained = answers = 0
    for chat in export.chats:
        if all(message.speaker != speaker for message in chat.messages):
            left_out[ELSEWHERE] += len(chat.messages)
            continue
        left_out.update(chat.left_out)
        in_group = len({message.speaker for message in chat.messages}) > 2
        for part in _conversations(chat, settings.conversation_gap):
            turns = _turns(part, speaker, left_out)
            trained += sum(len(turn) for turn in turns if turn[0].speaker == speaker)
            for piece in _pieces(turns, speaker, settings.max_seq_length * CHARACTERS_PER_TOKEN):
                answers += len(piece) // 2
                messages = [_message(turn, speaker, in_group) for turn in piece]
                records.append(
                    Record(
                        piece[0][0].line, {"messages": messages}, export.unit, form=f"conversations of a {export.kind}"
                    )
                )
    if not records:
        raise InputError(
            f"{name}: nobody writes before {speaker}, so there is nothing to answer; give another --speaker"
        )
    total = sum(export.speakers.values())
    left_out = Counter({what: count for what, count in left_out.items() if count})
    gap = settings.conversation_gap
    return iter(records), ChatSummary(name, export.kind, speaker, total, trained, answers, len(records), left_out, gap)


def transcript_note(file: DataFile) -> str:
    """Return a note on a text that is trained as it is and looks like a transcript; empty for others."""
    export = read_chats(file.path) if chat_kind(file.path) == TRANSCRIPT else None
    if export is None:
        return ""
    return (
        f"{file.name} looks like a transcript of {named(export.speakers)}, and is trained as plain text; --speaker NAME trains "
        "that person's answers instead"
    )


def named(speakers: Counter[str]) -> str:
    """Return the speakers with their numbers of messages in words."""
    parts = [f"{name} ({count:,})" for name, count in speakers.most_common(MOST_NAMED)]
    more = f" and {len(speakers) - MOST_NAMED:,} more" if len(speakers) > MOST_NAMED else ""
    return ", ".join(parts) + more


def _resolved(export: ChatExport, name: str, asked: str) -> str:
    """Return the speaker that was asked for as the file spells it: the whole name, or the beginning of only one."""
    speakers, plain = export.speakers, asked.strip().casefold()
    same = [one for one in speakers if one.casefold() == plain]
    begin = [one for one in speakers if one.casefold().startswith(f"{plain} ")]
    found = [asked] if asked in speakers else same or begin
    if len(found) == 1 and plain:
        return found[0]
    several = f" matches {', '.join(found)}" if found else ": no message by that name"
    hint = "" if found else did_you_mean(asked, speakers)
    raise InputError(f"--speaker {asked}{several} in {name}; it has {named(speakers)}{hint}")


def _conversations(chat: ExportedChat, gap_hours: float) -> Iterator[list[ChatMessage]]:
    """Yield the messages between two long pauses."""
    gap, part = timedelta(hours=gap_hours), []
    for message in chat.messages:
        last = part[-1] if part else None
        paused = bool(last and last.when and message.when and message.when - last.when >= gap)
        if part and (paused or message.after_break):
            yield part
            part = []
        part.append(message)
    if part:
        yield part


def _turns(messages: list[ChatMessage], speaker: str, left_out: Counter[str]) -> list[list[ChatMessage]]:
    """Return the turns of a conversation, others first and the speaker last; count the messages outside of them."""
    turns: list[list[ChatMessage]] = []
    for message in messages:
        answers = message.speaker == speaker
        if turns and (turns[-1][0].speaker == speaker) == answers:
            turns[-1].append(message)
        elif turns or not answers:
            turns.append([message])
        else:
            left_out[OPENING] += 1
    if turns and turns[-1][0].speaker != speaker:
        left_out[UNANSWERED] += len(turns.pop())
    return turns


def _pieces(turns: list[list[ChatMessage]], speaker: str, most_characters: int) -> Iterator[list[list[ChatMessage]]]:
    """Yield a conversation in parts that fit into a row, each from a turn of the others to an answer."""
    piece: list[list[ChatMessage]] = []
    size = 0
    for turn in turns:
        length = sum(len(message.text) + 1 for message in turn) + OF_A_TURN
        if piece and turn[0].speaker != speaker and size + length > most_characters:
            yield piece
            piece, size = [], 0
        piece.append(turn)
        size += length
    if piece:
        yield piece


def _message(turn: list[ChatMessage], speaker: str, in_group: bool) -> dict[str, str]:
    own = turn[0].speaker == speaker
    lines = [f"{one.speaker}: {one.text}" if in_group and not own else one.text for one in turn]
    return {"role": "assistant" if own else "user", "content": "\n".join(lines)}
