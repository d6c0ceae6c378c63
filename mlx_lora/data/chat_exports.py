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

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import DataFile
from mlx_lora.data.examples import Record
from mlx_lora.data.file_formats import decoded_text, text_encoding
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.text import counted, did_you_mean

# Read the files that chat programs export: messages in order, and counts of what was left out.
#
# Telegram Desktop writes JSON: one chat (`messages`), or all of an account (`chats`: `list`). Messages have `from`, `date`,
# and `text`, which is a string or a list of strings and entities (links, bold text, custom emoji), each with its text.
#
# imessage-exporter (https://github.com/ReagentX/imessage-exporter, its format `txt`) writes blocks. A transcript has a name
# at the beginning of each line:
#
#     May 17, 2022  5:29:42 PM (Read by you after 3 minutes)         Marta: Are you coming?
#     Marta                                                          Ben: In ten minutes.
#     Are you coming?                                                Bring the keys?
#
# WhatsApp writes text, in the language of the phone:
#
#     iPhone    [12.03.24, 18:22:11] Marta: Are you coming?          a mark U+200E precedes what Marta did not write herself:
#               [12.03.24, 18:22:40] Marta: ‎image omitted      media, calls, and notices
#     Android   12/03/2024, 18:22 - Marta: Are you coming?           a notice has no name: 12/03/2024, 18:22 - Ben left
#               3/12/24, 6:22 PM - Marta: <Media omitted>
#
# A line without such a beginning continues the message before it. The order of day and month follows from the whole file.
# Where the export marks what is no message (U+200E, angle brackets, no name), no word of a language is needed; the words
# below are for exports that have lost the marks, in English, German, French, Spanish, Portuguese, Italian and Dutch.

# What the counts of `ExportedChat.left_out` are called, in the singular.
SYSTEM_LINE, MEDIA, DELETED, FORWARDED = "system line", "media message", "deleted message", "forwarded message"
# Marks that set the direction of writing, and a byte order mark within the text; they are no part of what was written.
MARKS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
LOOKED_AT = 400  # lines of a file's beginning


@dataclass(frozen=True)
class ChatMessage:
    """One message.

    Attributes:
        line: The line that it starts on, or its number in a JSON file, from 1.
        speaker: Who wrote it.
        text: What was written, without marks of direction; it may have several lines.
        when: In the time of the exporting phone; None: not known.
        after_break: Whether a blank line before it separates it from an earlier conversation (transcripts without times).
    """

    line: int
    speaker: str
    text: str
    when: datetime | None = None
    after_break: bool = False


@dataclass
class ExportedChat:
    """One chat: its messages in order, and how many were left out, by what they are."""

    messages: list[ChatMessage] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ChatExport:
    """A file that a chat program wrote.

    Attributes:
        kind: `WhatsApp chat`, `Telegram chat`, `iMessage chat` or `transcript`.
        chats: One, or all of an account.
        unit: What `ChatMessage.line` counts: `line` or `message`.
    """

    kind: str
    chats: list[ExportedChat]
    unit: str = "line"

    @property
    def speakers(self) -> Counter[str]:
        """Who wrote how many messages, the most talkative first."""
        return Counter(message.speaker for chat in self.chats for message in chat.messages)


def plain(text: str) -> str:
    """Return a text without marks of direction, with ordinary spaces, and without spaces at its ends."""
    return re.sub("[\u00a0\u202f]", " ", MARKS.sub("", text)).strip()


# Telegram

# What only this export has: the type of a chat. Its own program writes it before the messages.
CHAT_TYPE = re.compile(
    r'"type"\s*:\s*"(?:personal_chat|bot_chat|saved_messages|(?:private|public)_(?:group|supergroup|channel))"'
)
NOBODY = "Deleted Account"  # as Telegram shows people who left


def read_telegram(value: Any) -> list[ExportedChat] | None:
    """Return the chats of an export, without service messages, media, and what was forwarded; None if it is none."""
    if not isinstance(value, dict):
        return None
    listed = value.get("chats")
    chats = listed.get("list") if isinstance(listed, dict) else [value]
    if not isinstance(chats, list) or not all(isinstance(one, dict) for one in chats):
        return None
    numbers, found = itertools.count(1), []
    for messages in (one["messages"] for one in chats if isinstance(one.get("messages"), list)):
        found.append(chat := ExportedChat())
        for message, number in zip(messages, numbers, strict=False):
            if not isinstance(message, dict):
                continue
            text = plain(_telegram_text(message.get("text")))
            if message.get("type") != "message":
                chat.left_out[SYSTEM_LINE] += 1
            elif message.get("forwarded_from") is not None or message.get("via_bot") is not None:
                chat.left_out[FORWARDED] += 1  # another's words
            elif not text:
                chat.left_out[MEDIA] += 1
            else:
                speaker, when = message.get("from"), None
                name = plain(speaker) if isinstance(speaker, str) else ""
                with suppress(TypeError, ValueError):
                    when = datetime.fromisoformat(message.get("date", "")).replace(tzinfo=None)
                chat.messages.append(ChatMessage(number, name or NOBODY, text, when))
    return found or None


def _telegram_text(text: Any) -> str:
    """Return a message's text, with that of its entities."""
    if isinstance(text, str):
        return text
    parts = text if isinstance(text, list) else []
    return "".join(
        part if isinstance(part, str) else str(part.get("text", "")) if isinstance(part, dict) else "" for part in parts
    )


# iMessage

DATE = re.compile(r"(?P<date>[A-Z][a-z]{2} \d{1,2}, \d{4}) +(?P<time>\d{1,2}:\d{2}:\d{2} [AP]M)(?P<more>.*)")
READ_BY = re.compile(r"(?: \(.*\))?")
REACTIONS = ("Tapbacks:", "Reactions:")
REPLY_NOTE = "This message responded to an earlier message."
FILE = re.compile(r"(?:~?/|attachments/|[A-Za-z]:\\)[^\n]*\.\w{2,5}|Attachment missing!")
EFFECT = re.compile(r"Sent with [A-Z][\w ]{2,20}")
UNSENT = re.compile(r".{1,60} unsent (?:a|this) message.*")
LATER = re.compile(r"Edited .{1,60} later: (?P<text>.*)")
INDENT = "    "


def is_imessage(lines: Sequence[str]) -> bool:
    """Tell whether a text is what imessage-exporter writes, from its first lines."""
    first = next((line for line in lines if line.strip()), "")
    dates = sum(DATE.fullmatch(line) is not None for line in lines[:LOOKED_AT])
    return DATE.fullmatch(first) is not None and dates >= 2


def read_imessage(lines: Iterable[str]) -> ExportedChat:
    """Return the messages of such a text, without replies that it shows a second time, reactions, and files."""
    chat = ExportedChat()
    block: list[str] = []
    start = 0
    for number, line in enumerate(lines, 1):
        if DATE.fullmatch(line):
            _add_block(chat, start, block)
            start, block = number, []
        if start:
            block.append(line)
    _add_block(chat, start, block)
    return chat


def _add_block(chat: ExportedChat, start: int, block: list[str]) -> None:
    """Add the message of some lines, of which the first is its date and the second its sender."""
    if not block:
        return
    begin = DATE.fullmatch(block[0])
    if begin is None or not READ_BY.fullmatch(begin["more"]) or len(block) < 2 or not block[1].strip():
        chat.left_out[SYSTEM_LINE] += 1  # someone named the conversation, or left it
        return
    kept: list[str] = []
    for line in block[2:]:
        if line in REACTIONS or (line.startswith(INDENT) and DATE.fullmatch(line.strip())):
            break  # reactions follow, or replies, which are messages of their own further below
        if line == REPLY_NOTE or EFFECT.fullmatch(line):
            continue
        if FILE.fullmatch(line.strip()):
            chat.left_out[MEDIA] += 1
        elif UNSENT.fullmatch(line):
            chat.left_out[DELETED] += 1
        elif edited := LATER.fullmatch(line.strip()):
            kept = [edited["text"].strip('“”"')]  # the last of several versions
        else:
            kept.append(line)
    if text := plain("\n".join(kept)):
        when = datetime.strptime(f"{begin['date']} {begin['time']}", "%b %d, %Y %I:%M:%S %p")
        chat.messages.append(ChatMessage(start, plain(block[1]), text, when))


# Transcripts

SAID = re.compile(r"(?P<name>[^\W\d_][\w .'’-]{0,39}):[ \t]+(?P<text>\S.*)")
MOST_SPEAKERS = 12
LEAST_TURNS = 4


def is_transcript(lines: Sequence[str]) -> bool:
    """Tell whether most lines of a text begin with one of a few names and a colon."""
    written = [line for line in lines[:LOOKED_AT] if line.strip()]
    names = Counter(said["name"] for line in written if (said := SAID.fullmatch(line)))
    turns = names.total()
    few = 2 <= len(names) <= MOST_SPEAKERS and turns >= 2 * len(names)
    return few and turns >= LEAST_TURNS and turns >= 0.6 * len(written) and SAID.fullmatch(written[0]) is not None


def read_transcript(lines: Iterable[str]) -> ExportedChat:
    """Return the messages of a transcript; blank lines separate conversations, unless they are between most messages."""
    chat, blank = ExportedChat(), False
    names: list[tuple[int, str, list[str], bool]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            blank = True
            continue
        if said := SAID.fullmatch(line):
            names.append((number, plain(said["name"]), [said["text"]], blank))
        elif names:
            names[-1][2].append(line)
        blank = False
    breaks = sum(after for *_, after in names[1:])
    separate = breaks < len(names) / 2
    chat.messages = [
        ChatMessage(number, name, plain("\n".join(texts)), None, after and separate)
        for number, name, texts, after in names
    ]
    return chat


# WhatsApp

LRM = "\u200e"
S = "[ \t\u00a0\u202f]"
HEADER = re.compile(
    rf"(?P<open>\[)?{S}*(?P<date>\d{{1,4}}(?:[./\-]|년|年){S}?\d{{1,2}}(?:[./\-]|월|月){S}?\d{{1,4}})[.일日]?,?"
    rf"(?P<before>{S}[^\d\[\]:\n]{{0,12}}?)(?P<hour>\d{{1,2}})[:.h](?P<minute>\d{{2}})(?:[:.](?P<second>\d{{2}}))?"
    rf"(?P<after>{S}?[^\d\[\]:\-\n]{{0,10}}?)(?(open)\]{S}?|{S}[-\u2013]{S})(?P<rest>.*)"
)
NAMED = re.compile(rf"(?P<name>[^:\n]{{1,60}}?):(?:{S}(?P<text>.*))?", re.DOTALL)
MORNING = {"am", "上午", "凌晨", "早上", "午前", "오전", "ص", "πμ"}
AFTERNOON = {"pm", "下午", "晚上", "中午", "午後", "오후", "م", "μμ"}
QUOTES = re.compile(
    '["“”„«»]'
)  # Anna changed the subject to "Trip: Rome" is no message of `Anna changed the subject to "Trip`
# A line in angle brackets, or a file's name with a word in parentheses, stands for a picture or another file.
IN_BRACKETS = re.compile(r"<[^<>\n]{2,120}>")
ATTACHED = re.compile(
    r"(?:[A-Z]{3}-\d{8}-WA\d{4}\.\w{2,5} \([^()\n]{4,40}\)|[^\n]{1,120}\.\w{2,5} \((?:file attached|Datei angehängt|"
    r"fichier joint|archivo adjunto|arquivo anexado|ficheiro anexado|file allegato|bestand bijgevoegd)\))"
)
OMITTED = re.compile(
    r"(?:(?:image|photo|video|video note|audio|gif|sticker|document|contact card|media|voice message) omitted"
    r"|(?:bild|foto|video|videonachricht|audio|gif|sticker|dokument|kontaktkarte|medien) weggelassen"
    r"|(?:image|photo|vidéo|audio|gif|sticker|document|fiche contact|médias?) (?:absente?|omise?s?)"
    r"|(?:imagen|foto|vídeo|video|audio|gif|sticker|documento|tarjeta de contacto|multimedia) omitid[oa]"
    r"|(?:imagem|foto|vídeo|áudio|gif|figurinha|documento|cartão do contato|mídia) (?:ocult|ocultad|omitid)[oa]s?"
    r"|(?:immagine|foto|video|audio|gif|sticker|documento|scheda contatto|media) omess[oaie]"
    r"|(?:afbeelding|foto|video|audio|gif|sticker|document|contactkaart|media) weggelaten)",
    re.IGNORECASE,
)
REMOVED = re.compile(
    r"(?:this message was deleted|you deleted this message|diese nachricht wurde gelöscht|du hast diese nachricht gelöscht"
    r"|ce message a été supprimé|vous avez supprimé ce message|se eliminó este mensaje|este mensaje fue eliminado"
    r"|eliminaste este mensaje|(?:esta )?mensagem (?:foi )?apagada|(?:você )?apagou esta mensagem"
    r"|questo messaggio è stato eliminato|hai eliminato questo messaggio|dit bericht is verwijderd"
    r"|(?:je|u) hebt dit bericht verwijderd)\.?",
    re.IGNORECASE,
)
NOTICE = re.compile(
    r"(?:null|waiting for this message.*|missed (?:voice|video) call.*|verpasster (?:sprach|video)anruf.*"
    r"|appel (?:vocal|vidéo) manqué.*|(?:video)?llamada perdida.*|chamada de (?:voz|vídeo) perdida.*"
    r"|(?:video)?chiamata (?:vocale )?persa.*|gemiste (?:spraak|video-)oproep.*"
    r"|.{0,60}(?:end-to-end encrypted|Ende-zu-Ende-verschlüsselt|chiffrés de bout en bout|cifrados de extremo a extremo"
    r"|criptografia de ponta a ponta|crittografati end-to-end|end-to-end versleuteld).*)",
    re.IGNORECASE | re.DOTALL,
)
# What follows a message: that it was edited, or the file that it is the caption of.
EDITED = re.compile(
    rf"\s*(?:{LRM}<[^<>\n]{{2,120}}>|<[^<>\n]{{0,60}}(?:edited|bearbeitet|modifié|modificado|editó|editado|editada|modificato"
    rf"|bewerkt)[^<>\n]{{0,20}}>)\s*$",
    re.IGNORECASE,
)
FILE_NAME = re.compile(r"\.\w{2,5}>")
WHATSAPP_LOOKED_AT = 200  # the same for WhatsApp


@dataclass
class _Line:
    """A message as the file has it: its line, the parts of its date and time, and what follows them."""

    line: int
    date: tuple[int, int, int]
    time: tuple[int, int, int]
    rest: str
    bracketed: bool
    half: str = ""


def is_whatsapp(lines: list[str]) -> bool:
    """Tell whether a text is such an export, from its first lines: two messages, and one of them at the beginning."""
    found = [
        (number, part) for number, line in enumerate(lines[:WHATSAPP_LOOKED_AT]) if (part := _header(line)) is not None
    ]
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    named = [number for number, part in found if NAMED.fullmatch(part["rest"])]
    return len(named) >= 2 and found[0][0] <= first + 3


def read_whatsapp(lines: Iterable[str]) -> ExportedChat:
    """Return the messages of an export, without notices, media, and deleted messages, which are counted."""
    found = list(_joined(lines))
    chat, moment = ExportedChat(), _moments(found)
    for one, when in zip(found, moment, strict=True):
        named = NAMED.fullmatch(one.rest)
        name = plain(named["name"]).removeprefix("~").strip() if named else ""
        if named is None or not name or QUOTES.search(name):
            chat.left_out[SYSTEM_LINE] += 1
            continue
        text, reason = _written(named["text"] or "", one.bracketed)
        if reason:
            chat.left_out[reason] += 1
        if text:
            chat.messages.append(ChatMessage(one.line, name, text, when))
    return chat


def _header(line: str) -> re.Match[str] | None:
    """Return the parts of a line that begins a message; None for another line."""
    return HEADER.fullmatch(line.lstrip("\u200e\u200f\u202a\u202b\ufeff"))


def _joined(lines: Iterable[str]) -> Iterator[_Line]:
    """Yield messages, each with the lines that continue it; lines before the first message are left out."""
    last: _Line | None = None
    for number, line in enumerate(lines, 1):
        part = _header(line)
        if part is None:
            if last is not None:
                last.rest += "\n" + line
            continue
        if last is not None:
            yield last
        day = [int(one) for one in re.findall(r"\d+", part["date"])]
        time = int(part["hour"]), int(part["minute"]), int(part["second"] or 0)
        words = re.sub(r"[\W_]", "", MARKS.sub("", part["before"])), re.sub(r"[\W_]", "", MARKS.sub("", part["after"]))
        half = next((word.casefold() for word in words if word.casefold() in MORNING | AFTERNOON), "")
        last = _Line(number, (day[0], day[1], day[2]), time, part["rest"], part["open"] is not None, half)
    if last is not None:
        yield last


def _moments(found: list[_Line]) -> list[datetime | None]:
    """Return when each message was written, by the order of day and month under which the dates go forward."""
    orders = {"ymd": (0, 1, 2), "dmy": (2, 1, 0), "mdy": (2, 0, 1)}
    if any(one.date[0] > 31 for one in found):
        return [_read_moment(one, orders["ymd"]) for one in found]
    slashed = any(one.half for one in found)  # of those who write 3/12 for March 12, most have a clock of 12 hours
    tried = {
        name: [_read_moment(one, orders[name]) for one in found]
        for name in (("mdy", "dmy") if slashed else ("dmy", "mdy"))
    }

    def fits(name: str) -> tuple[int, int]:
        whole = [moment for moment in tried[name] if moment is not None]
        back = sum(after < before for before, after in itertools.pairwise(whole))
        return len(found) - len(whole), back

    return tried[min(tried, key=fits)]


def _read_moment(one: _Line, order: tuple[int, int, int]) -> datetime | None:
    year, month, day = (one.date[i] for i in order)
    hour, minute, second = one.time
    if one.half and hour <= 12:
        hour = hour % 12 + (12 if one.half in AFTERNOON else 0)
    try:
        return datetime(year + 2000 if year < 100 else year, month, day, hour, minute, second)
    except ValueError:
        return None


def _written(text: str, bracketed: bool) -> tuple[str, str]:
    """Return what a person wrote in a message, and what was left out of it; either may be empty."""
    end, marked = EDITED.search(text), text.startswith(LRM)
    file = MEDIA if end and FILE_NAME.search(end[0]) else ""
    text = text[: end.start()] if end and end.start() else text
    lines = text.split("\n")
    first = plain(lines[0])
    if IN_BRACKETS.fullmatch(first) or ATTACHED.fullmatch(first) or OMITTED.fullmatch(first):
        return plain(MARKS.sub("", "\n".join(lines[1:]))), MEDIA  # a caption may follow
    if REMOVED.fullmatch(first):
        return "", DELETED
    if NOTICE.fullmatch(plain(text)):
        return "", SYSTEM_LINE
    if marked and bracketed:
        return "", MEDIA if OMITTED.search(first) or IN_BRACKETS.search(first) else SYSTEM_LINE
    before, mark, after = text.rpartition(LRM)  # a caption, then the mark, then what stands for the picture
    if mark and bracketed and OMITTED.fullmatch(plain(after)):
        return plain(before), MEDIA
    if not plain(text):
        return "", MEDIA if marked or text != lines[0] else ""
    return plain(text), file


# Read a chat export as conversations in which one person's messages are the answers (--speaker)

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
        return TELEGRAM if head.lstrip("\ufeff \n\r\t").startswith("{") and CHAT_TYPE.search(head) else None
    lines = head.splitlines()
    tests = {WHATSAPP: is_whatsapp, IMESSAGE: is_imessage, TRANSCRIPT: is_transcript}
    return next((kind for kind, fits in tests.items() if fits(lines)), None)


def read_chats(path: Path) -> ChatExport | None:
    """Return the messages of a chat export; None if the file is none.

    Raises:
        InputError: the file's text cannot be decoded.
    """
    if (kind := chat_kind(path)) is None:
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


def chats_of(file: DataFile, settings: DataSettings) -> tuple[ChatExport | None, str]:
    """Return the chats that a file exports, if it is such an export and is to be read as one, else None; and a note.

    A transcript without dates may as well be a play: it is only read as a chat if --speaker is given, and noted otherwise.

    Raises:
        InputError: --speaker is not given, or the file cannot be read.
    """
    export = read_chats(file.path) if settings.data_format == "auto" else None
    if export is None or not export.speakers:
        return None, ""
    if settings.speaker is not None:
        return export, ""
    if export.kind == TRANSCRIPT:
        return None, (
            f"{file.name} looks like a transcript of {named(export.speakers)}, and is trained as plain text; --speaker NAME "
            "trains that person's answers instead"
        )
    raise InputError(
        f"{file.name} is a {export.kind} of {named(export.speakers)}; choose whose messages are trained as answers with "
        "--speaker NAME, or train all of it as plain text with --data-format text"
    )


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
