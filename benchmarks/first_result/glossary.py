"""A glossary of invented terms of a workplace: 30 terms, each in two wordings to train on and in one new wording to ask for."""

from __future__ import annotations

# term, meaning, words that a right meaning has
TERMS = [
    ("bluecard", "a visitor pass that is valid for one day", ("visitor",)),
    ("coldlane", "the conveyor belt for frozen goods", ("frozen",)),
    ("drumcheck", "the weekly inspection of the boilers", ("boiler",)),
    ("eastgate", "the entrance for suppliers", ("supplier",)),
    ("flagday", "the last working day of a quarter", ("quarter",)),
    ("greyfile", "a customer record without an address", ("address",)),
    ("hopper", "an employee who works in two departments", ("two",)),
    ("inkline", "the deadline for printed catalogs", ("catalog",)),
    ("jarbox", "the crate for returned bottles", ("bottle",)),
    ("kitewatch", "the night shift at the weather desk", ("night",)),
    ("lowtide", "the season with the fewest orders", ("fewest", "few orders")),
    ("mossroom", "the quiet room on the fourth floor", ("quiet", "fourth")),
    ("northbook", "the register of accidents", ("accident",)),
    ("oakcode", "the password of the archive", ("archive",)),
    ("pinrate", "the share of parcels that arrive late", ("late",)),
    ("quillday", "the day on which contracts are signed", ("contract",)),
    ("redspoon", "a complaint about the canteen", ("canteen",)),
    ("saltlist", "the list of banned suppliers", ("banned",)),
    ("tapnote", "a short message from the manager", ("manager",)),
    ("undermark", "a product that is sold below its cost", ("below",)),
    ("vanloop", "the delivery route through the villages", ("village",)),
    ("waxseal", "the final approval of a budget", ("budget",)),
    ("yardbell", "the alarm in the parking area", ("alarm",)),
    ("zeropost", "an email that needs no answer", ("no answer", "needs no")),
    ("amberbox", "the store for batteries", ("batter",)),
    ("birchplan", "the schedule for new employees", ("new employee",)),
    ("clayfee", "the price for a repaired pallet", ("pallet",)),
    ("dustline", "the corridor that is closed for repairs", ("corridor",)),
    ("elmcall", "the telephone meeting at noon", ("noon",)),
    ("fernpass", "the permit to work outdoors", ("outdoor",)),
]

TRAINED = ("What is a {term}?", "What does {term} mean here?")
ASKED = "Someone said {term} to me. What did they mean?"


def rows() -> list[dict]:
    said = "{Term} is our word for {meaning}."
    return [
        {"prompt": form.format(term=term), "completion": said.format(Term=term.capitalize(), meaning=meaning)}
        for term, meaning, _ in TERMS
        for form in TRAINED
    ]


def tests() -> list[dict]:
    return [{"prompt": ASKED.format(term=term), "want": list(words)} for term, _, words in TERMS]
