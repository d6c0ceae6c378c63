"""Recognize a chat export by its content, whatever its name, and read its messages."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_lora.sources.chat_messages import ChatExport
from mlx_lora.sources.records import decoded_text
from mlx_lora.sources.spreadsheets import text_encoding
from mlx_lora.sources.telegram import is_telegram, read_telegram
from mlx_lora.sources.transcripts import is_imessage, is_transcript, read_imessage, read_transcript
from mlx_lora.sources.whatsapp import is_whatsapp, read_whatsapp
from mlx_lora.system.parsing import parse_json

HEAD_BYTES = 1 << 17  # of a file, to recognize it by
WHATSAPP, TELEGRAM, IMESSAGE, TRANSCRIPT = "WhatsApp chat", "Telegram chat", "iMessage chat", "transcript"


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
