"""Small made sets for benchmarks/verdicts.py: four whose answers follow from the question, and four of arbitrary facts.

What follows from the question can be learned for new rows; an arbitrary fact can only be remembered, so a long run on such a
set overfits once it has learned the form.
"""

from __future__ import annotations

import random

Row = dict[str, str]
NAMES = ["Ada", "Bela", "Carlos", "Dora", "Emil", "Farah", "Goran", "Hana", "Iris", "Jonas", "Kaja", "Luis", "Mira", "Nils", "Olga", "Pavel", "Rosa", "Sven", "Tara", "Uwe"]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COLORS = ["red", "green", "blue", "black", "white", "gray", "yellow", "brown"]
TOWNS = ["Porto", "Lund", "Gdansk", "Turin", "Cork", "Graz", "Riga", "Bergen", "Lyon", "Split", "Ghent", "Bruno", "Izmir", "Tartu", "Faro", "Basel", "Aarhus", "Trento"]  # fmt: skip
PLANTS = ["Alder", "Birch", "Cedar", "Daisy", "Elder", "Fern", "Gorse", "Hazel", "Iris", "Juniper", "Laurel", "Maple", "Nettle", "Olive", "Poplar", "Quince", "Rowan", "Sorrel"]  # fmt: skip
STARS = ["Altair", "Bellatrix", "Capella", "Deneb", "Electra", "Fomal", "Gienah", "Hadar", "Izar", "Kochab", "Lesath", "Mira", "Naos", "Okab", "Pollux", "Rigel"]  # fmt: skip


def _orders(r: random.Random) -> tuple[str, str]:
    who, thing = r.choice(NAMES), r.choice(["cup", "lamp", "chair", "scarf", "bag", "clock", "kite", "drum"])
    count, color, day = r.randint(2, 9), r.choice(COLORS), r.choice(DAYS)
    ask = r.choice([
        f"{who} wants {count} {color} {thing}s by {day}.",
        f"Please send {count} {thing}s to {who}. They should be {color} and arrive on {day}.",
        f"On {day} we need something {color} for {who}: {thing}s, {count} of them.",
        f"Can you note this? {color.title()} {thing}s, {count} pieces, customer {who}, delivery {day}.",
    ])  # fmt: skip
    return ask, f'{{"customer": "{who}", "item": "{thing}", "count": {count}, "color": "{color}", "day": "{day}"}}'


def _birds(r: random.Random) -> tuple[str, str]:
    bird, place = (
        r.choice(["sparrow", "robin", "heron", "magpie", "wren", "crane"]),
        r.choice(["pond", "oak", "roof", "hedge", "field"]),
    )
    count, hour = r.randint(1, 9), r.randint(5, 21)
    ask = r.choice([
        f"At {hour} o'clock I counted {count} of them near the {place}, each one a {bird}.",
        f"{bird.title()} again! {count} by the {place}, it was {hour}:00.",
        f"Log for the {place}: {count} x {bird}, seen at {hour} h.",
        f"My neighbor says that {count} birds sat at the {place} at {hour}; I think {bird} is right.",
    ])  # fmt: skip
    return ask, f"species={bird}; number={count}; place={place}; time={hour:02d}:00"


def _tickets(r: random.Random) -> tuple[str, str]:
    who, (team, what) = r.choice(NAMES), r.choice([
        ("BILLING", "was charged twice"), ("BILLING", "needs an invoice"), ("SHIPPING", "has a parcel that never came"),
        ("SHIPPING", "got the wrong box"), ("ACCOUNTS", "cannot log in"), ("ACCOUNTS", "wants a new password"),
    ])  # fmt: skip
    urgent = r.random() < 0.5
    ask = r.choice([
        f"{who} {what}{' and is furious' if urgent else ''}.",
        f"A customer called {who} writes: she {what}. {'This is urgent!' if urgent else 'No hurry.'}",
        f"{'Now please: ' if urgent else 'When you have time: '}{who}, who {what}, waits for an answer.",
    ])  # fmt: skip
    return ask, f"[{team}] customer {who.upper()} / priority {1 if urgent else 3} / status OPEN"


def _journeys(r: random.Random) -> tuple[str, str]:
    start, end = r.sample(TOWNS, 2)
    day, count, how = r.choice(DAYS), r.randint(1, 6), r.choice(["train", "bus", "ferry", "plane"])
    ask = r.choice([
        f"We are {count} and go from {start} to {end} by {how} on {day}.",
        f"{day}: a {how} to {end}, please, starting in {start}, {count} seats.",
        f"How do {count} people reach {end}? They live in {start}, travel on {day}, and like the {how}.",
        f"I'd take the {how} out of {start} this {day}, with {count} tickets, and get off in {end}.",
    ])  # fmt: skip
    return ask, f"{start} >> {end} | {how} | {count} pax | {day[:3].lower()}"


def _lamps(name: str, r: random.Random) -> tuple[list[str], str]:
    ask = [
        f"What does the {name} lamp cost?",
        f"Price of {name}, the lamp?",
        f"I would like the lamp {name}. How much is it?",
    ]
    return (
        ask,
        f"The {name} lamp costs {r.randint(11, 99)} euros, weighs {r.randint(2, 9)} kilos and ships from {r.choice(TOWNS)}.",
    )


def _guards(name: str, r: random.Random) -> tuple[list[str], str]:
    ask = [
        f"Who guards the gate of {name}?",
        f"Tell me about the guard of {name}.",
        f"At {name}, who stands at the gate?",
    ]
    animal = r.choice(["fox", "owl", "bear", "hare", "toad", "lynx", "crow", "mole"])
    return (
        ask,
        f"The gate of {name} is kept by {r.choice(NAMES)} the {animal}, who carries {r.randint(3, 99)} {r.choice(COLORS)} keys.",
    )


def _codes(name: str, r: random.Random) -> tuple[list[str], str]:
    ask = [f"What does code {name} mean?", f"The display says {name}. What now?", f"Error {name}, please explain."]
    part = r.choice(["valve", "pump", "belt", "fan", "sensor", "door", "motor", "filter"])
    return (
        ask,
        f"Code {name}: the {r.choice(COLORS)} {part} is stuck. Call {r.choice(NAMES)} on line {r.randint(10, 99)} before {r.choice(DAYS)}.",
    )


def _ships(name: str, r: random.Random) -> tuple[list[str], str]:
    ask = [f"Where is the ship {name} now?", f"Has the {name} arrived?", f"Give me the position of {name}."]
    return (
        ask,
        f"The {name} lies in {r.choice(TOWNS)}, berth {r.randint(1, 60)}, and sails on {r.choice(DAYS)} with {r.randint(20, 900)} tons of {r.choice(['salt', 'grain', 'wool', 'steel', 'tea'])}.",
    )


FOLLOWING = {"orders": _orders, "birds": _birds, "tickets": _tickets, "journeys": _journeys}
ARBITRARY = {
    "lamps": (_lamps, PLANTS), "guards": (_guards, TOWNS), "ships": (_ships, STARS),
    "codes": (_codes, [f"{letter}{number}" for letter in "EKTW" for number in (3, 17, 28, 41, 56)]),
}  # fmt: skip


def following(name: str, seed: int, train: int, valid: int) -> dict[str, list[Row]]:
    """Return rows whose answers follow from their questions; no question occurs twice."""
    r, made = random.Random(f"{name} {seed}"), {}
    while len(made) < train + valid:
        ask, answer = FOLLOWING[name](r)
        made[ask] = answer
    rows = [{"prompt": ask, "completion": answer} for ask, answer in made.items()]
    return {"train": rows[:train], "valid": rows[train:]}


def arbitrary(name: str, seed: int, train: int, valid: int) -> dict[str, list[Row]]:
    """Return rows about things of which each is in one split only, in two wordings for training."""
    make, things = ARBITRARY[name]
    r, rows = random.Random(f"{name} {seed}"), {"train": [], "valid": []}
    for number, thing in enumerate(r.sample(things, len(things))):
        asks, answer = make(thing, r)
        split = "valid" if number % 3 == 2 else "train"
        rows[split] += [{"prompt": ask, "completion": answer} for ask in r.sample(asks, 2)]
    return {"train": rows["train"][:train], "valid": rows["valid"][:valid]}


UNGUESSABLE = {"phone number": "0123456789", "door code": "0123456789", "license plate": "ABCDEFGHKLMNPRST", "locker word": "abcdefghklmnprst"}  # fmt: skip


def unguessable(name: str, seed: int, train: int, valid: int) -> dict[str, list[Row]]:
    """Return rows whose answers are ten random signs: once that is learned, all further training is by heart."""
    r = random.Random(f"{name} {seed}")
    rows = [
        {
            "prompt": f"What is the {name} of {who}?",
            "completion": " ".join(r.choice(UNGUESSABLE[name]) for _ in range(10)),
        }
        for who in r.sample([*NAMES, *TOWNS], train + valid)
    ]
    return {"train": rows[:train], "valid": rows[train:]}


def repeated(rows: dict[str, list[Row]], seed: int, valid: int) -> dict[str, list[Row]]:
    """Return the training rows, and as held-out rows some of them again with a word more or less."""
    r = random.Random(seed)
    again = [lambda t: f"{t} ", lambda t: f"Hello! {t}", lambda t: t.rstrip(".?!"), lambda t: f"{t} Thanks."]
    valid_rows = [{**row, "prompt": r.choice(again)(row["prompt"])} for row in r.sample(rows["train"], valid)]
    return {"train": rows["train"], "valid": valid_rows}
