"""What a chat export holds: the messages of one chat or several, and counts of what was left out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

# What the counts of `Chat.left_out` are called, in the singular.
SYSTEM_LINE, MEDIA, DELETED, FORWARDED = "system line", "media message", "deleted message", "forwarded message"
# Marks that set the direction of writing, and a byte order mark within the text; they are no part of what was written.
MARKS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


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
class Chat:
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
    chats: list[Chat]
    unit: str = "line"

    @property
    def speakers(self) -> Counter[str]:
        """Who wrote how many messages, the most talkative first."""
        return Counter(message.speaker for chat in self.chats for message in chat.messages)


def plain(text: str) -> str:
    """Return a text without marks of direction, with ordinary spaces, and without spaces at its ends."""
    return re.sub("[\u00a0\u202f]", " ", MARKS.sub("", text)).strip()
