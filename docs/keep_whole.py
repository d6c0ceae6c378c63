"""A hook of mkdocs: keeps flags, file names, and ranges of numbers on one line, and marks quoted errors, which wrap.

A browser breaks a line after every hyphen, which shows `--grad-accumulation-steps` as `--grad-` and the rest, and `480-670` as two
numbers. Text that is longer than a phone's line still breaks where it has to.
"""

from __future__ import annotations

import re
from typing import Any

CODE = re.compile(r"<code[^>]*>.*?</code>", re.DOTALL)
CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
HEAD = re.compile(r"<th[^>]*>.*?</th>", re.DOTALL)
BETWEEN_TAGS = re.compile(r"(?<=>)[^<>]+(?=<)")
WORD = re.compile(r"[\w./\[\]']*-[\w./=:,\[\]'-]*")  # a word with a hyphen: a flag, mlx-lora, a path
RANGE = re.compile(r"\d[\d,.]*-\d[\d,.]*")
LONGEST = 32  # characters; a longer word may break
ERROR = re.compile(r'<div class="language-text(?= highlight">\s*<pre><span></span><code>Error:)')


def keep_whole(html: str, words: re.Pattern[str]) -> str:
    """Return HTML in which matching words between tags stand in elements that do not break."""

    def kept(match: re.Match[str]) -> str:
        word = match[0]
        return f'<span class="whole">{word}</span>' if len(word) <= LONGEST else word

    return BETWEEN_TAGS.sub(lambda text: words.sub(kept, text[0]), html)


def on_page_content(html: str, **_: Any) -> str:
    """Return the page's HTML with what belongs together kept together (mkdocs calls this for each page)."""
    html = ERROR.sub('<div class="language-text quoted-error', html)
    html = CELL.sub(lambda cell: keep_whole(cell[0], RANGE), html)
    html = HEAD.sub(lambda cell: keep_whole(cell[0], WORD), html)
    return CODE.sub(lambda code: keep_whole(code[0], WORD), html)
