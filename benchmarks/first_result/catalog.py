"""A catalog of 400 invented plants, each in one row only: nothing but remembering gives its shelf, and early stopping may not spoil it."""

from __future__ import annotations

import random

FIRST = ("Amber", "Bristle", "Copper", "Dapple", "Ember", "Frost", "Gilt", "Hollow", "Ivory", "Jester", "Kettle", "Lantern", "Marble", "Nimble", "Opal", "Pepper", "Quartz", "Russet", "Silver", "Thistle")  # fmt: skip
SECOND = ("bell", "brush", "cap", "crown", "cup", "fern", "foot", "gem", "leaf", "moss", "nettle", "palm", "reed", "root", "sedge", "spear", "star", "tongue", "vine", "wort")  # fmt: skip
SHELVES = (
    "north wall",
    "pond corner",
    "glass house",
    "front gate",
    "stone bench",
    "blue shed",
    "old well",
    "cellar stairs",
)
TRAINED = ("Where does the {name} stand?", "Where do I find the {name}?", "In which place is the {name}?", "{name}: where is it?")  # fmt: skip
ASKED = "A customer wants the {name}. Where should I take her?"
ASKED_FOR = 40


def _plants() -> list[tuple[str, str]]:
    draw = random.Random(29)
    names = [first + second for first in FIRST for second in SECOND]
    draw.shuffle(names)
    return [(name, draw.choice(SHELVES)) for name in names]


def rows() -> list[dict]:
    return [
        {"prompt": TRAINED[number % 4].format(name=name), "completion": f"The {name} stands at the {shelf}."}
        for number, (name, shelf) in enumerate(_plants())
    ]


def tests() -> list[dict]:
    return [{"prompt": ASKED.format(name=name), "want": [shelf]} for name, shelf in _plants()[::10][:ASKED_FOR]]
