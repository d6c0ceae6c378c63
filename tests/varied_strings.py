"""Deterministic strings that tokenizers disagree on: scripts, spaces, code, marks, special tokens, junk."""

from __future__ import annotations

import random

_WORDS = (
    "the of and to in training adapter Rank LoRA QLoRA model's don't WE'LL they'd I'm antidisestablishmentarianism "
    "naïve façade Straße ŒUVRE İstanbul ǅ e\u0301te\u0301 Zoë Ελληνικά русский язык Українська עברית العربية مُحَمَّد فارسی "
    "हिन्दी தமிழ் ไทยไม่มีช่องว่าง ខ្មែរ 中文分词 漢字かな交じり文 カタカナ 한국어 한국어 Tiếng Việt ａｂｃ １２３ ½ ² Ⅷ ٣٤٥ "
    "👍 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ✨ ❤️ → ∑ ∫ ≤ € £ ₿ “quoted” ‘it’s’ – — … « » "
    "0 7 42 1999 1234567890 3.14159 1e-5 0x7FFF 1,000,000 2026-01-31 12:30:05 +49-170-1234567 "
    "https://example.org/a/b.html?q=1&r=%20#frag mailto:a.b+c@d-e.io C:\\Users\\x ~/.config/app.yaml "
    "def f(x): return x**2 {'key': [1, 2]} <div class=\"a\"> </div> /* note */ #include<stdio.h> a+=b; x!=y && !z "
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case __init__ $HOME @user #tag ====== ------ ...... ~~~~ "
    "<|im_start|> <|im_end|> <|endoftext|> <start_of_turn> <end_of_turn> <bos> <eos> <unk> <s> </s> <0x41> ▁ Ġ \ufeff"
)
WORDS = _WORDS.split(" ")

GLUE = (
    " ",
    "",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "   ",
    " \n ",
    "\t\t",
    "\u00a0",
    "\u3000",
    "\u200b",
    ", ",
    ".",
    "        ",
)

FIXED = (
    "",
    " ",
    "\n",
    "\t",
    "\x00",
    "\x1b[0m\x07\x7f",
    "a",
    "▁",
    "▁▁ ▁",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    "<|im_end|><|im_end|> <|im_end|>",
    "<bos><bos> text<eos>",
    "'s 'S 't 'LL 're 'VE 'm 'D ''s",
    "\U0010ffff \ue000 \ufffd \u0378 \U000e0001",
    "Z" + "".join(chr(c) for c in range(0x300, 0x330)),
)

# Blocks for random code points; surrogates are no characters. The unassigned planes 4 to 13 are left out: SmolLM2
# has no token for their first byte, and where llama.cpp keeps a hole the `tokenizers` BPE joins its neighbors.
BLOCKS = (
    (0x20, 0x7E),
    (0x00, 0x2FF),
    (0x300, 0x9FF),
    (0xE00, 0x1FFF),
    (0x2000, 0x2BFF),
    (0x3000, 0x9FFF),
    (0xA000, 0xD7FF),
    (0xE000, 0xFFFF),
    (0x10000, 0x1342F),
    (0x14400, 0x1FFFF),  # between: hieroglyphs that became letters in Unicode 16, known to llama.cpp only
    (0x20000, 0x3FFFF),
    (0xE0000, 0xE01EF),
    (0x100000, 0x10FFFF),
)


def varied_strings(count: int, seed: int = 0) -> list[str]:
    """Return `count` strings, the same ones for the same seed; the first are hand-picked."""
    rng = random.Random(seed)
    makers = (_sentence, _sentence, _runs, _random_unicode, _periodic, _long_word)
    strings = [*FIXED, *WORDS]
    while len(strings) < count:
        strings.append(rng.choice(makers)(rng))
    return strings[:count]


def _sentence(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(GLUE) for _ in range(rng.randint(1, 30)))


def _runs(rng: random.Random) -> str:
    parts = (
        rng.choice(" \n\t\r-=#.a0_*/\u3000é") * rng.randint(1, 70) + rng.choice(("", "x", "Word", "9"))
        for _ in range(4)
    )
    return "".join(parts)


def _random_unicode(rng: random.Random) -> str:
    blocks = [rng.choice(BLOCKS) for _ in range(rng.randint(1, 3))]
    return "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 40)))


def _periodic(rng: random.Random) -> str:
    unit = "".join(rng.choice("abxyo-1.") for _ in range(rng.randint(1, 4)))
    return (unit * 30)[: rng.randint(2, 90)] + rng.choice(("", " ", "z"))


def _long_word(rng: random.Random) -> str:
    return "".join(rng.choice("etaoinshrdluETAOINäöüß") for _ in range(rng.randint(20, 400)))
