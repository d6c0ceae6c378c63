"""Small made sets for benchmarks/verdicts.py: four whose answers follow from the question, and four of arbitrary facts.

What follows from the question can be learned for new rows; an arbitrary fact can only be remembered, so a long run on such a
set overfits once it has learned the form. Words and forms lie in verdict_sets.json: `draws` are made in their order, a name
draws one of these words, two numbers a number between them, two names two different words, null yes or no.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

MADE = json.loads(Path(__file__).with_name("verdict_sets.json").read_text(encoding="utf-8"))
WORDS, FOLLOWING, ARBITRARY, UNGUESSABLE = (MADE[name] for name in ("words", "following", "arbitrary", "unguessable"))

Row = dict[str, str]


class Word(str):
    """A drawn word that a form may also write as {word:title}, {word:upper} or {word:short}, its first three letters."""

    def __format__(self, how: str) -> str:
        return self[:3].lower() if how == "short" else getattr(self, how)() if how else str(self)


class Choice(int):
    """A drawn yes or no, of which a form writes one of two texts: {urgent:Now|Later}."""

    def __format__(self, texts: str) -> str:
        return texts.split("|")[0 if self else 1]


def drawn(draws: dict[str, Any], r: random.Random) -> dict[str, Any]:
    """Return the values of a set's draws."""
    found: dict[str, Any] = {}
    for name, what in draws.items():
        if what is None:
            found[name] = Choice(r.random() < 0.5)
        elif isinstance(what, str):
            one = r.choice(WORDS[what])
            found[name] = Word(one) if isinstance(one, str) else one
        else:
            found[name] = r.sample(WORDS[what[0]], 2) if isinstance(what[0], str) else r.randint(*what)
    return found


def following(name: str, seed: int, train: int, valid: int) -> dict[str, list[Row]]:
    """Return rows whose answers follow from their questions; no question occurs twice."""
    r, made, form = random.Random(f"{name} {seed}"), {}, FOLLOWING[name]
    while len(made) < train + valid:
        values = drawn(form["draws"], r)
        made[r.choice(form["asks"]).format(**values)] = form["answer"].format(**values)
    rows = [{"prompt": ask, "completion": answer} for ask, answer in made.items()]
    return {"train": rows[:train], "valid": rows[train:]}


def arbitrary(name: str, seed: int, train: int, valid: int) -> dict[str, list[Row]]:
    """Return rows about things of which each is in one split only, in two wordings for training."""
    form, r, rows = ARBITRARY[name], random.Random(f"{name} {seed}"), {"train": [], "valid": []}
    things = WORDS[form["of"]]
    for number, thing in enumerate(r.sample(things, len(things))):
        values = {"name": thing, **drawn(form["draws"], r)}
        answer, asks = form["answer"].format(**values), [ask.format(**values) for ask in form["asks"]]
        split = "valid" if number % 3 == 2 else "train"
        rows[split] += [{"prompt": ask, "completion": answer} for ask in r.sample(asks, 2)]
    return {"train": rows["train"][:train], "valid": rows["valid"][:valid]}


def unguessable(name: str, seed: int, train: int, valid: int) -> dict[str, list[Row]]:
    """Return rows whose answers are ten random signs: once that is learned, all further training is by heart."""
    r, rows = random.Random(f"{name} {seed}"), []
    for who in r.sample([*WORDS["NAMES"], *WORDS["TOWNS"]], train + valid):
        signs = " ".join(r.choice(UNGUESSABLE[name]) for _ in range(10))
        rows.append({"prompt": f"What is the {name} of {who}?", "completion": signs})
    return {"train": rows[:train], "valid": rows[train:]}


def repeated(rows: dict[str, list[Row]], seed: int, valid: int) -> dict[str, list[Row]]:
    """Return the training rows, and as held-out rows some of them again with a word more or less."""
    r = random.Random(seed)
    again = [lambda t: f"{t} ", lambda t: f"Hello! {t}", lambda t: t.rstrip(".?!"), lambda t: f"{t} Thanks."]
    valid_rows = [{**row, "prompt": r.choice(again)(row["prompt"])} for row in r.sample(rows["train"], valid)]
    return {"train": rows["train"], "valid": valid_rows}
