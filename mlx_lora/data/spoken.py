"""Split text that a chat template rendered into turns that a person can read, without the template's markers."""

from __future__ import annotations

import re
from collections.abc import Iterable

ROLES = {
    "system": "System", "developer": "System", "user": "User", "human": "User", "assistant": "Assistant", "model": "Assistant",
    "tool": "Tool", "ipython": "Tool", "observation": "Tool",
}  # fmt: skip
# Markers of families whose role is not written between two markers.
OWN_ROLE = {"[INST]": "User", "[/INST]": "Assistant", "[SYSTEM_PROMPT]": "System"}
HEADINGS = {"Instruction": "User", "Input": "User", "Response": "Assistant"}  # of the Alpaca template
ANY_MARKER = r"<[|｜][^<>\n]{1,40}[|｜]>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|\[/?(?:INST|SYSTEM_PROMPT)\]"
HEADING = rf"(?m:^### (?:{'|'.join(HEADINGS)}):)"
HEADER = re.compile(rf"\s*({'|'.join(ROLES)})[ \t]*(?:\n+|$)")
BETWEEN_TURNS = re.compile(r"start|end(?!_header)|eot|<\|turn>|<turn\|>", re.IGNORECASE)
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*|<think>\s*$")


def spoken_turns(text: str, specials: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Return the turns of a rendered conversation.

    Args:
        text: as the template rendered it; its beginning may be cut off.
        specials: the tokenizer's special tokens; the markers of known families are found without them.

    Returns:
        (role, content) of each turn with content: System, User, Assistant or Tool; an empty role for text outside turns.
    """
    known = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    parts = re.split(f"({'|'.join(filter(None, (known, ANY_MARKER, HEADING)))})", text)
    turns: list[tuple[str, str]] = []
    role, dropping, fresh = "", False, True
    for number, part in enumerate(parts):
        if number % 2:
            own = _role_in(part)
            if own:
                role, fresh = own, True
            elif BETWEEN_TURNS.search(part):
                role, fresh = "", True
            # Between these two, gpt-oss names the channel; the words after `message` are the content.
            dropping = part == "<|channel|>" or (dropping and part != "<|message|>")
            continue
        header = HEADER.match(part) if number and not role and not dropping else None
        if header:
            role, fresh, part = ROLES[header[1]], True, part[header.end() :]
        content = EMPTY_THINKING.sub("", part)
        if dropping or not content.strip():
            continue
        if turns and not fresh and turns[-1][0] == role:
            turns[-1] = (role, turns[-1][1] + content)
        else:
            turns.append((role, content))
        fresh = False
    return [(role, content.strip()) for role, content in turns]


def without_markers(text: str, specials: Iterable[str] = ()) -> str:
    """Return a model's answer without special tokens."""
    return "\n".join(content for _, content in spoken_turns(text, specials))


def _role_in(marker: str) -> str:
    """Return the role that a marker names by itself, an empty string if it names none."""
    if marker.startswith("### "):
        return HEADINGS[marker[4:-1]]
    return OWN_ROLE.get(marker) or ROLES.get(marker.strip("<>|｜").lower(), "")
