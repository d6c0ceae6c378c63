"""Emails with an order, to a JSON object: 150 rows, asked with new wordings, goods and towns."""

from __future__ import annotations

import json
import random

GOODS = [
    "lamps",
    "chairs",
    "mugs",
    "ropes",
    "tiles",
    "brushes",
    "kettles",
    "carpets",
    "shelves",
    "pillows",
    "clocks",
    "candles",
    "hooks",
    "boxes",
    "mirrors",
]
TOWNS = [
    "Arden",
    "Brill",
    "Corby",
    "Denholm",
    "Elgin",
    "Farnham",
    "Goole",
    "Hexham",
    "Ilkley",
    "Jarrow",
    "Kelso",
    "Luton",
    "Matlock",
    "Neston",
    "Oakham",
]
FORMS = [
    "Hello, please send {n} {item} to {town}. Thanks!",
    "Could I order {n} {item}? The shop in {town} needs them.",
    "We need {item}, {n} of them, in {town} by Friday.",
    "Dear team, the branch in {town} is out of {item}. Please deliver {n}.",
    "{n} {item} for {town}, as last month.",
    "Hi, it's me again. {town} wants {n} more {item}.",
]
NEW_FORMS = [
    "Good morning, would you ship {n} {item} to our house in {town}?",
    "Our customers in {town} asked for {item}; {n} will do.",
    "Send {town} {n} {item}, please.",
]
NEW_GOODS = ["benches", "forks", "ladders", "drums", "scarves"]
NEW_TOWNS = ["Penrith", "Ripon", "Selby", "Thirsk", "Whitby"]


def _row(random: random.Random, forms: list[str], goods: list[str], towns: list[str]) -> tuple[str, dict]:
    order = {"item": random.choice(goods), "quantity": random.randint(2, 99), "town": random.choice(towns)}
    return random.choice(forms).format(n=order["quantity"], item=order["item"], town=order["town"]), order


def rows() -> list[dict]:
    found = [_row(random_, FORMS, GOODS, TOWNS) for random_ in [random.Random(1)] for _ in range(150)]
    return [{"prompt": text, "completion": json.dumps(order)} for text, order in found]


def tests() -> list[dict]:
    found = [_row(random_, NEW_FORMS, NEW_GOODS, NEW_TOWNS) for random_ in [random.Random(2)] for _ in range(24)]
    return [{"prompt": text, "json": order} for text, order in found]
