"""Generate the workloads' training data from a seed: the same bytes everywhere, and nothing to download.

The text consists of common English words, drawn by rank (a word further down the list is less likely), in sentences of 6
to 18 words. It has no meaning, and neither has a loss on it; a benchmark only needs token counts, lengths and shapes.
Only `random.random` is used, because Python guarantees its sequence for a seed.
"""

from __future__ import annotations

import json
import random

_LIST = """
the of and to in that it was for on with as his they at be this have from or one had by but not what all were we when
your can said there use an each which she do how their if will up other about out many then them these so some her
would make like him into time has look two more write go see number no way could people my than first water been call
who oil its now find long down day did get come made may part over new sound take only little work know place year
live me back give most very after thing our just name good sentence man think say great where help through much before
line right too mean old any same tell boy follow came want show also around form three small set put end does another
well large must big even such because turn here why ask went men read need land different home us move try kind hand
picture again change off play spell air away animal house point page letter mother answer found study still learn
should world high every near add food between own below country plant last school father keep tree never start city
earth eye light thought head under story saw left few while along might close something seem next hard open example
begin life always those both paper together got group often run important until children side feet car mile night walk
white sea began grow took river four carry state once book hear stop without second later miss idea enough eat face
watch far really almost let above girl sometimes mountain cut young talk soon list song being leave family
"""
WORDS = tuple(_LIST.split())


def chat_rows(count: int, prompt_words: tuple[int, int], answer_words: tuple[int, int], seed: int) -> str:
    """Return `count` single-turn chats as JSON lines, in the messages format.

    Args:
        count: the number of rows.
        prompt_words, answer_words: least and most words. Lengths are evenly distributed on a logarithmic scale: as in
            real instructions, many are short and few are long.
        seed: of the words and lengths.
    """
    source = random.Random(seed)
    lines = []
    for _ in range(count):
        prompt, answer = (_text(source, _length(source, *bounds)) for bounds in (prompt_words, answer_words))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def pair_rows(count: int, prompt_words: tuple[int, int], answer_words: tuple[int, int], seed: int) -> str:
    """Return `count` preference pairs as JSON lines, in TRL's conversational format; arguments as in `chat_rows`."""
    source = random.Random(seed)
    lines = []
    for _ in range(count):
        prompt = _text(source, _length(source, *prompt_words))
        answers = [_text(source, _length(source, *answer_words)) for _ in range(2)]
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
        record = {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def _length(source: random.Random, least: int, most: int) -> int:
    return round(least * (most / least) ** source.random())


def _text(source: random.Random, words: int) -> str:
    """Return this many words as sentences."""
    sentences: list[str] = []
    left = words
    while left > 0:
        size = min(left, 6 + int(source.random() * 13))
        # The square of a uniform number makes early words far more frequent, as in any language.
        chosen = [WORDS[int(source.random() ** 2 * len(WORDS))] for _ in range(size)]
        sentences.append(" ".join(chosen).capitalize() + ".")
        left -= size
    return " ".join(sentences)
