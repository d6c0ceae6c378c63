"""Divide a document into passages for search: its sections, and long ones at blank lines.

A passage begins with the headings that it is under, so that it can be found, and understood, without the rest of its document.
"""

from __future__ import annotations

import re

MOST_CHARS = 1200  # of a passage: about 300 tokens, so that encoders with 512 take it whole
HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*\s*$")
FENCE = re.compile(r"\s*(```|~~~)")


def passages_of(text: str, most_chars: int = MOST_CHARS) -> list[str]:
    """Return the passages of a Markdown or plain text, none for an empty one.

    Args:
        text: of the document.
        most_chars: of a passage, its headings included; a paragraph that is longer is cut at a space.
    """
    found: list[str] = []
    for headings, body in _sections(text):
        first = " > ".join(headings)
        room = max(most_chars // 2, most_chars - len(first) - 1)
        for part in _parts(body, room):
            found.append(f"{first}\n{part}" if first else part)
    return found


def _sections(text: str) -> list[tuple[list[str], str]]:
    """Return the headings above each section, and the section's text without its own."""
    path: dict[int, str] = {}
    sections: list[tuple[list[str], list[str]]] = [([], [])]
    fenced = False
    for line in text.splitlines():
        fenced ^= bool(FENCE.match(line))
        heading = None if fenced else HEADING.match(line)
        if heading is None:
            sections[-1][1].append(line)
            continue
        level = len(heading[1])
        path = {known: name for known, name in path.items() if known < level} | {level: heading[2]}
        sections.append(([path[known] for known in sorted(path)], []))
    return [(headings, "\n".join(lines).strip()) for headings, lines in sections]


def _parts(body: str, most_chars: int) -> list[str]:
    """Return a section in parts of at most so many characters, cut at blank lines, else at spaces."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", body):
        left = paragraph.strip()
        while left:
            piece = left if len(left) <= most_chars else left[: left.rfind(" ", most_chars // 2, most_chars) + 1]
            piece = piece or left[:most_chars]
            left = left[len(piece) :].strip()
            if parts and len(parts[-1]) + 2 + len(piece) <= most_chars:
                parts[-1] += f"\n\n{piece.strip()}"
            else:
                parts.append(piece.strip())
    return parts
