"""Tell whether an answer is right, where its expected answer lets anybody tell: by its numbers and names, not by its wording.

    JSON                                   the first JSON value in the answer is the expected one
    numbers and names that the question    all of them are in the answer; "1,250" is 1250, "6:45 pm" is 18:45, "TH-4471" is th4471,
    does not have                          and "twelve" is 12
    at most eight words without any        the answer is the expected one but for case, space and punctuation
    anything else                          nobody can tell: it may be as good in other words

Names are words with a capital letter that do not begin a sentence. Scripts without capital letters have numbers only.
"""

from __future__ import annotations

import json
import re
import unicodedata
from contextlib import suppress
from decimal import Decimal
from typing import Any

SHORT_WORDS = 8  # an expected answer of at most so many words without numbers and names has to be given exactly
YES, NO = frozenset(("yes", "true", "ja", "sí", "oui")), frozenset(("no", "false", "nein", "non"))
# Words with a capital letter that say what a number counts, so that nobody has to repeat them.
_UNITS = frozenset(
    re.findall(
        r"\w+",
        "i uhr euro euros eur usd gbp chf dollar franken kronen kc prozent grad kilo gramm liter meter kilometer stuck personen "
        "minute minuten stunde stunden tag tage tagen woche wochen monat monate monaten jahr jahre jahren",
    )
)
_SMALL = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen",
)
_TENS = {
    name: 10 * n
    for n, name in enumerate(("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 2)
}
_WORDS = 8  # an expected answer of at most so many words without numbers and names has to be given exactly
YES, NO = frozenset(("yes", "true", "ja", "sí", "oui")), frozenset(("no", "false", "nein", "non"))
# Words with a capital letter that say what a number counts, so that nobody has to repeat them.
_UNITS = frozenset(
    "i uhr euro euros eur usd gbp chf dollar franken kronen kc prozent grad kilo gramm liter meter kilometer stuck personen minute "  # noqa: SIM905
    "minuten stunde stunden tag tage tagen woche wochen monat monate monaten jahr jahre jahren".split()
)
_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = dict(
    zip(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], range(20, 100, 10), strict=True)
)
_WORDS = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<more>{'|'.join(_SMALL[1:10])}))?|(?P<small>{'|'.join(_SMALL)}))?"
    r"(?P<hundred>(?<=\w) hundred|\bhundred)?\b",
    re.IGNORECASE,
)
_TIME = re.compile(
    r"(?<![\w.,:])(\d{1,2})(?:[:h]([0-5]\d)(?![\d:])|\.([0-5]\d)(?=\s*(?:uhr|h|[ap]\.?m)\b)|(?=\s*(?:uhr|o.clock|[ap]\.?m)\b))"
    r"\s*(?:(?:uhr|o.clock|h)\b)?(?:\s*([ap])\.?m\b\.?)?",
    re.IGNORECASE,
)
_CODE = re.compile(r"(?<![^\W_])[a-z]{1,8}-?\d[\da-z]*(?:-[\da-z]+)*", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![^\s(])[-\u2212])?\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+")
_OPENING = " \t\"'\u201c\u201e\u2018\u00ab([*\u2022-\u2013"


def is_right(expected: str, given: str, question: str) -> bool | None:
    """Return whether an answer is right; None: this expected answer does not let anybody tell."""
    with suppress(ValueError):
        if expected.lstrip()[:1] in ("{", "["):
            return json.loads(expected) == _first_json(given)
    first, begins = (normalized(text).split(" ")[0].rstrip(",.") for text in (expected, given))
    if (first in YES and begins in NO) or (first in NO and begins in YES):
        return False
    asked, said = (frozenset().union(*_facts(text)) for text in (question, given))
    plain = re.sub(r"\bone\b", "", expected, flags=re.IGNORECASE)  # more often a pronoun
    if facts := [fact for fact in _facts(plain, names=True) if not fact & asked]:
        squeezed = re.sub(r"[\s\u2013-]", "", _folded(given))
        return all(fact & said or any(_holds_code(squeezed, one) for one in fact) for fact in facts)
    if normalized(expected) in YES | NO:
        return first == begins
    # Chinese and Japanese have no spaces; a word is about two characters.
    unspaced = expected.lower() == expected.upper() and len(expected.split()) < 2
    if (len(expected) // 2 if unspaced else len(expected.split())) > SHORT_WORDS:
        return None
    return normalized(given) == normalized(expected)


def normalized(text: str) -> str:
    """Return a text for an exact match: lower case, without punctuation at the ends of words, with single spaces."""
    words = (re.sub(r"^\W+|\W+$", "", word) for word in text.lower().split())
    return " ".join(filter(None, words))


def _facts(text: str, names: bool = False) -> list[frozenset[str]]:
    """Return the numbers, times, codes and words of a text, each with all that it may be written as.

    Args:
        text: an answer or a question.
        names: only those words that are names.
    """
    text = re.sub(r"(?<=\d)[\u00a0\u202f'\u2019](?=\d{3}(?!\d))", "", text)  # 1 250 and 1'250
    text = _WORDS.sub(_digits, unicodedata.normalize("NFKC", text))
    found: list[frozenset[str]] = []

    def time(match: re.Match[str]) -> str:
        hour, minutes, half = int(match[1]), match[2] or match[3] or "00", (match[4] or "").lower()
        hour = hour % 12 + 12 * (half == "p") if half else hour
        whole = {str(hour)} if minutes == "00" and not half else set()  # "from 9 to 18"
        found.append(frozenset({f"{hour}:{minutes}", *whole}))
        return " "

    def code(match: re.Match[str]) -> str:
        found.append(frozenset({_folded(match[0]).replace("-", "")}))
        return " "

    text = _CODE.sub(code, _TIME.sub(time, text))
    for match in _NUMBER.finditer(text):
        found += _numbers(match[0].replace("\u2212", "-"))
    for match in _WORD.finditer(text):
        before, word = text[: match.start()].rstrip(_OPENING), _folded(match[0])
        named = match[0] != match[0].lower() and word not in _UNITS and before and before[-1] not in ".!?:\n"
        if named or not names:
            found.append(frozenset({word}))
    return found


def _digits(match: re.Match[str]) -> str:
    if not match[0]:
        return ""
    small = [*_SMALL, ""]
    low = small.index((match["more"] or match["small"] or "zero").lower())
    number = _TENS.get((match["tens"] or "").lower(), 0) + low
    return str((number or 1) * 100 if match["hundred"] else number)


def _numbers(text: str) -> list[frozenset[str]]:
    """Return the numbers that are written as one: the parts of a date are several, and 1.250 may be 1250 as well."""
    parts = re.split("[.,]", text)
    thousands = (
        all(len(part) == 3 for part in parts[1:]) and parts[0].lstrip("-") not in ("", "0") and len(parts[0]) < 5
    )
    may_be = ["".join(parts)] if len(parts) > 1 and thousands else []
    if len(parts) == 2 or (
        len(parts) > 2 and all(len(part) == 3 for part in parts[1:-1]) and "." in text and "," in text
    ):
        may_be.append(f"{''.join(parts[:-1])}.{parts[-1]}")
    if may_be:
        return [frozenset(_plain(one) for one in may_be)]
    return [frozenset({_plain(part)}) for part in parts]


def _plain(number: str) -> str:
    whole = len(number) > 2 and number[0] == "0" and number.isdigit()  # the beginning of a telephone number
    return number if whole else f"{Decimal(number).normalize():f}"


def _holds_code(squeezed: str, code: str) -> bool:
    """Return whether a text without spaces has a code of letters and digits, however it is divided there."""
    return bool(re.fullmatch(r"[a-z]+\d\w*", code) and re.search(rf"{code}(?!\d)", squeezed))


def _folded(text: str) -> str:
    """Return a text without case and accents."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return "".join(one for one in apart if not unicodedata.combining(one))


def _first_json(text: str) -> Any:
    """Return the first object or list in a text; None: there is none."""
    for match in re.finditer(r"[{\[]", text):
        with suppress(ValueError):
            return json.JSONDecoder().raw_decode(text, match.start())[0]
    return None
