"""The commit that the working tree is compared with, and what differs between two recordings: case, file and key."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

ABSENT = "absent"
PARTS = ("arrays", "metrics", "plans")


class Difference(NamedTuple):
    """One value that is not the same.

    Attributes:
        case: its name.
        part: `arrays`, `metrics` or `plans`; `problems` if the case itself failed.
        place: file and key.
        old, new: the two values.
    """

    case: str
    part: str
    place: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.case}: {self.place}: {self.old} -> {self.new}"


def incomparable(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return why two recordings cannot be compared: another machine, other packages, or other inputs."""
    facts = {**old["machine"], **new["machine"]}
    found = [
        f"{name}: {old['machine'].get(name, ABSENT)} and {new['machine'].get(name, ABSENT)}"
        for name in facts
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    inputs = {**old["inputs"], **new["inputs"]}
    return found + [f"input {name} differs" for name in inputs if old["inputs"].get(name) != new["inputs"].get(name)]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Return all differences between two recordings; a case that failed in either is one, too."""
    found = []
    for name in {**old["cases"], **new["cases"]}:
        one, other = old["cases"].get(name), new["cases"].get(name)
        if one is None or other is None:
            found.append(
                Difference(name, "problems", "the case", *(ABSENT if c is None else "recorded" for c in (one, other)))
            )
            continue
        if one["problems"] or other["problems"]:
            found.append(Difference(name, "problems", "the case", one["problems"], other["problems"]))
        for part in PARTS:
            before, after = dict(values(one[part])), dict(values(other[part]))
            for place in {**before, **after}:
                if before.get(place, ABSENT) != after.get(place, ABSENT):
                    found.append(Difference(name, part, place, before.get(place, ABSENT), after.get(place, ABSENT)))
    return found


def values(files: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield file and key, and the value, of everything that a case has in one part."""
    for file, content in files.items():
        if isinstance(content, dict):
            yield from ((f"{file} {key}", value) for key, value in content.items())
        else:
            yield f"{file} number of lines", len(content)
            for number, line in enumerate(content, 1):
                yield from ((f"{file} line {number} {key}", value) for key, value in line.items())


def described(found: list[Difference], cases: int, most: int = 6) -> str:
    """Return the differences as text, at most `most` for each case and part, and a last line that counts the cases."""
    lines, shown = [], {}
    for one in found:
        shown.setdefault((one.case, one.part), []).append(str(one))
    for (case, part), texts in shown.items():
        lines += texts[:most]
        if len(texts) > most:
            lines.append(f"{case}: and {len(texts) - most} more of its {part}")
    differing = len({one.case for one in found})
    return "\n".join([*lines, f"{cases} cases, {differing} differ" if differing else f"{cases} cases, all equal"])


ROOT = Path(__file__).parents[2]
BASE = Path(__file__).with_name("BASE")


class NoTreeError(Exception):
    """The commit cannot be read: no git, no checkout, or one that is too shallow."""


def base_commit() -> str:
    """Return the commit in tests/golden/BASE; a change that is meant to change results names a newer one there."""
    return BASE.read_text(encoding="utf-8").split()[0]


def unpacked(commit: str, folder: Path) -> Path:
    """Unpack the package of a commit into a folder and return it; the checkout itself stays as it is.

    Raises:
        NoTreeError: git or the commit is missing.
    """
    try:
        archive = subprocess.run(["git", "archive", commit, "mlx_lora"], cwd=ROOT, capture_output=True, check=True)
    except FileNotFoundError:
        raise NoTreeError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip().splitlines()
        raise NoTreeError(f"commit {commit} cannot be read: {words[-1] if words else error}") from None
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder
