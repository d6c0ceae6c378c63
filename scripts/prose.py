"""Check the prose of README.md, docs/ and CHANGELOG.md's newest section: words we avoid, and proselint.

python scripts/prose.py

Code, in fences or in backticks, is not prose. WORDS is a small vocabulary after Google's developer style: American spelling, the
reader's words, no riddles.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A word or phrase, as a regular expression -> what to write instead.
WORDS = {
    r"licence\w*": "license",
    r"\w*(?:col|fav|behavi|neighb|harb|hon|lab)our\w*": "the American spelling with -or",
    r"\w*(?:quanti|normali|optimi|initiali|recogni|organi|serial|util|memor|token|summar|regular|vector|parallel)is(?:e|ed|es|ing|ation)s?":
        "the American spelling with -ize",
    r"(?:grey|centre|metre|fibre|catalogue|judgement|whilst|amongst|analyse[ds]?)": "the American spelling",
    r"(?:cancel|label|model|travel)l(?:ed|ing)": "the American spelling with one l",
    r"for want of": "for lack of",
    r"wants (?:a|an|the|to)": "needs",
    r"is wanted": "is needed",
    r"in vain": "without success",
    r"as though nobody had|as if nobody had": "what does not happen",
    r"leaves you alone|leave alone": "unattended",
    r"thus|hence|thereby|whereby|therein|wherein|whence": "so",
    r"lest": "so that ... not",
    r"be it": "whether",
    r"e\.g\.": "for example",
    r"i\.e\.": "that is",
    r"etc\.": "and so on",
    r"via": "through",
    r"please (?:note|be aware)": "nothing",
    r"utilize[ds]?": "use",
    r"in order to": "to",
    r"simply|easily|just works?": "nothing: it may not be easy for the reader",
    r"blazing(?:ly)?|state[- ]of[- ]the[- ]art|cutting[- ]edge|seamless(?:ly)?": "a figure",
    r"nobody had|nobody touched": "what happened",
    r"like length": "similar length",
    r"the others go on": "the others continue",
    r"[\d.]+ %": "no space before the percent sign",
    r"per cent": "percent",
    r"blacklist|whitelist|master copy|sanity check": "block list, allow list, main copy, check",
}  # fmt: skip
AVOIDED = re.compile(
    r"(?<![\w-])(?:" + "|".join(f"(?P<w{n}>{word})" for n, word in enumerate(WORDS)) + r")(?![\w-])", re.I
)
# Checks of proselint that do not fit: we write straight quotes and three dots, and tables and technical terms repeat words.
OFF = ("typography", "lexical_illusions", "misc.but", "hyperbole", "dates_times", "annotations")
GENERATED = {"models.md", "families.md"}  # what a sweep wrote: model names and error messages
FENCE, CODE, LINK = re.compile(r"^\s*```"), re.compile(r"`[^`]*`"), re.compile(r"\]\([^)]*\)|<[^>]+>|https?://\S+")
Finding = tuple[str, int, str]


def prose_of(text: str) -> str:
    """Return a page's text, lines kept, with code and addresses blanked."""
    lines, fenced = [], False
    for line in text.splitlines():
        if FENCE.match(line):
            fenced = not fenced
            line = ""
        lines.append("" if fenced else LINK.sub("]", CODE.sub("x", line)))
    return "\n".join(lines) + "\n"


def newest_section(text: str) -> str:
    """Return a change log up to the second version's heading."""
    return "\n## ".join(text.split("\n## ")[:2]) + "\n"


def pages() -> dict[str, str]:
    """Return the prose of every page, by its name."""
    found = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    found["CHANGELOG.md"] = newest_section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if path.name not in GENERATED:
            found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return {name: prose_of(text) for name, text in found.items()}


def avoided(name: str, text: str) -> Iterator[Finding]:
    """Yield the words to avoid, with what to write instead."""
    for number, line in enumerate(text.splitlines(), start=1):
        for found in AVOIDED.finditer(line):
            advice = list(WORDS.values())[int(str(found.lastgroup)[1:])]
            yield name, number, f"{found[0]!r}: write {advice}"


def linted(texts: dict[str, str]) -> Iterator[Finding]:
    """Yield what proselint finds."""
    program = shutil.which("proselint", path=str(Path(sys.executable).parent)) or "proselint"
    with tempfile.TemporaryDirectory() as folder:
        paths = {str(Path(folder) / f"{n}.md"): name for n, name in enumerate(texts)}
        for path, name in paths.items():
            Path(path).write_text(texts[name], encoding="utf-8")
        ran = subprocess.run([program, "check", "-o", "json", *paths], capture_output=True)
        for path, result in json.loads(ran.stdout)["result"].items():
            name = next(name for known, name in paths.items() if path.endswith(known))
            for found in result.get("diagnostics", []):
                if not found["check_path"].startswith(OFF):
                    yield name, found["pos"][0], f"{found['message']} ({found['check_path']})"


def main() -> int:
    """Print what was found; 1 if there is something."""
    texts = pages()
    found = [finding for name, text in texts.items() for finding in avoided(name, text)] + list(linted(texts))
    for name, line, words in sorted(found):
        print(f"{name}:{line}: {words}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
