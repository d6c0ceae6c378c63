"""Read chats as text: what imessage-exporter writes, and transcripts with a name at the beginning of each line.

    May 17, 2022  5:29:42 PM (Read by you after 3 minutes)         Marta: Are you coming?
    Marta                                                          Ben: In ten minutes.
    Are you coming?                                                Bring the keys?

Source of the first: https://github.com/ReagentX/imessage-exporter, its format `txt`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

from mlx_lora.sources.chat_messages import DELETED, MEDIA, SYSTEM_LINE, Chat, ChatMessage, plain

DATE = re.compile(r"(?P<date>[A-Z][a-z]{2} \d{1,2}, \d{4}) +(?P<time>\d{1,2}:\d{2}:\d{2} [AP]M)(?P<more>.*)")
READ_BY = re.compile(r"(?: \(.*\))?")
REACTIONS = ("Tapbacks:", "Reactions:")
REPLY_NOTE = "This message responded to an earlier message."
FILE = re.compile(r"(?:~?/|attachments/|[A-Za-z]:\\)[^\n]*\.\w{2,5}|Attachment missing!")
EFFECT = re.compile(r"Sent with [A-Z][\w ]{2,20}")
UNSENT = re.compile(r".{1,60} unsent (?:a|this) message.*")
LATER = re.compile(r"Edited .{1,60} later: (?P<text>.*)")
INDENT = "    "
SAID = re.compile(r"(?P<name>[^\W\d_][\w .'’-]{0,39}):[ \t]+(?P<text>\S.*)")
LOOKED_AT = 400  # lines of a file's beginning
MOST_SPEAKERS = 12
LEAST_TURNS = 4


def is_imessage(lines: Sequence[str]) -> bool:
    """Tell whether a text is what imessage-exporter writes, from its first lines."""
    first = next((line for line in lines if line.strip()), "")
    dates = sum(DATE.fullmatch(line) is not None for line in lines[:LOOKED_AT])
    return DATE.fullmatch(first) is not None and dates >= 2


def read_imessage(lines: Iterable[str]) -> Chat:
    """Return the messages of such a text, without replies that it shows a second time, reactions, and files."""
    chat = Chat()
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


def _add_block(chat: Chat, start: int, block: list[str]) -> None:
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


def is_transcript(lines: Sequence[str]) -> bool:
    """Tell whether most lines of a text begin with one of a few names and a colon."""
    written = [line for line in lines[:LOOKED_AT] if line.strip()]
    names = Counter(said["name"] for line in written if (said := SAID.fullmatch(line)))
    turns = names.total()
    few = 2 <= len(names) <= MOST_SPEAKERS and turns >= 2 * len(names)
    return few and turns >= LEAST_TURNS and turns >= 0.6 * len(written) and SAID.fullmatch(written[0]) is not None


def read_transcript(lines: Iterable[str]) -> Chat:
    """Return the messages of a transcript; blank lines separate conversations, unless they are between most messages."""
    chat, blank = Chat(), False
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
