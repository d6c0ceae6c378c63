"""Read the JSON that Telegram Desktop exports: one chat (`messages`), or all of an account (`chats`: `list`).

Messages have `from`, `date`, and `text`, which is a string or a list of strings and entities (links, bold text, custom
emoji), each with its text.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from mlx_lora.sources.chat_messages import FORWARDED, MEDIA, SYSTEM_LINE, Chat, ChatMessage, plain

# What only this export has: the type of a chat. Its own program writes it before the messages.
CHAT_TYPE = re.compile(
    r'"type"\s*:\s*"(?:personal_chat|bot_chat|saved_messages|(?:private|public)_(?:group|supergroup|channel))"'
)
NOBODY = "Deleted Account"  # as Telegram shows people who left


def is_telegram(head: str) -> bool:
    """Tell whether a JSON text is such an export, from its first characters."""
    return head.lstrip("\ufeff \n\r\t").startswith("{") and CHAT_TYPE.search(head) is not None


def read_telegram(value: Any) -> list[Chat] | None:
    """Return the chats of an export, without service messages, media, and what was forwarded; None if it is none."""
    if not isinstance(value, dict):
        return None
    listed = value.get("chats")
    chats = listed.get("list") if isinstance(listed, dict) else [value]
    if not isinstance(chats, list) or not all(isinstance(one, dict) for one in chats):
        return None
    lists = [one["messages"] for one in chats if isinstance(one.get("messages"), list)]
    number, found = 0, []
    for messages in lists:
        chat = Chat()
        for message in messages:
            number += 1
            if isinstance(message, dict):
                _add(chat, message, number)
        found.append(chat)
    return found or None


def _add(chat: Chat, message: dict[str, Any], number: int) -> None:
    """Add a message to its chat, or count why it is left out."""
    text = plain(_text(message.get("text")))
    if message.get("type") != "message":
        chat.left_out[SYSTEM_LINE] += 1
    elif message.get("forwarded_from") is not None or message.get("via_bot") is not None:
        chat.left_out[FORWARDED] += 1  # another's words
    elif not text:
        chat.left_out[MEDIA] += 1
    else:
        speaker = message.get("from")
        name = plain(speaker) if isinstance(speaker, str) else ""
        chat.messages.append(ChatMessage(number, name or NOBODY, text, _moment(message.get("date"))))


def _text(text: Any) -> str:
    """Return a message's text, with that of its entities."""
    if isinstance(text, str):
        return text
    parts = text if isinstance(text, list) else []
    return "".join(
        part if isinstance(part, str) else str(part.get("text", "")) if isinstance(part, dict) else "" for part in parts
    )


def _moment(date: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(date).replace(tzinfo=None)
    except (TypeError, ValueError):
        return None
