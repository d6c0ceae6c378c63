"""Results of two test runs: read from pytest's JUnit file, compared, and written as a report."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINE_LETTERS = 240  # of an error's first line
MOST_TESTS = 60  # in a report's list: an issue's text has a bound
BAD = ("failed", "error")
# A test that fails and whose teardown then fails too is in the file twice.
WORST_FIRST = ("error", "failed", "skipped", "passed")


@dataclass(frozen=True)
class Run:
    """One run of the tests.

    Attributes:
        packages: name -> version, of the environment.
        tests: id, as pytest takes it -> `outcome` (passed, failed, error, skipped) and the error's first `line`.
        seconds: that it took.
        error: why there is no whole result, or None.
    """

    packages: dict[str, str]
    tests: dict[str, dict[str, str]]
    seconds: float
    error: str | None = None

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def counts(self) -> dict[str, int]:
        """Return the number of tests by outcome."""
        return dict(Counter(test["outcome"] for test in self.tests.values()))

    def summary(self) -> str:
        """Return the counts in words."""
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.counts().items()))
        return ", ".join(filter(None, [counts, self.error and "not finished"])) or "no test"


def read_junit(path: Path) -> dict[str, dict[str, str]]:
    """Return every test of a JUnit file; one that is cut off has none."""
    try:
        cases = ET.parse(path).getroot().iter("testcase")
    except ET.ParseError:
        return {}
    found: dict[str, dict[str, str]] = {}
    for case in cases:
        test = {"outcome": "passed", "line": ""}
        for outcome, tag in (("skipped", "skipped"), ("failed", "failure"), ("error", "error")):
            if (part := case.find(tag)) is not None:
                test = {"outcome": outcome, "line": first_line(part)}
        name = test_id(case.get("classname", ""), case.get("name", ""))
        known = found.get(name, test)
        found[name] = min(known, test, key=lambda one: WORST_FIRST.index(one["outcome"]))
    return found


def first_line(part: ET.Element) -> str:
    """Return the first line that says something: of the message, or where it says only that collecting failed, of the text."""
    message = part.get("message", "").strip()
    if message in ("", "collection failure"):
        # pytest marks the lines of an error with E.
        lines = [line[1:].strip() for line in (part.text or "").splitlines() if line.startswith("E ")]
        message = next(filter(None, lines), message)
    return message.splitlines()[0][:LINE_LETTERS] if message else ""


def test_id(classname: str, name: str) -> str:
    """Return a test's id as pytest takes it: JUnit's class name has dots between folders, file and classes."""
    parts = [part for part in classname.split(".") if part]
    for count in range(len(parts), 0, -1):
        path = Path(*parts[:count]).with_suffix(".py")
        if (ROOT / path).is_file():
            return "::".join([path.as_posix(), *parts[count:], name])
    file = Path(*name.split(".")).with_suffix(".py") if name and not parts else None  # a file that was not collected
    return (
        file.as_posix() if file is not None and (ROOT / file).is_file() else "::".join(filter(None, [classname, name]))
    )


def compare(before: Run | None, after: Run, again: Run | None = None) -> dict[str, Any]:
    """Return what passed before and does not now.

    Args:
        before: with the released versions.
        after: with the others.
        again: the second run of those that broke; what passes in it is unsteady.

    Returns:
        `broke`, `unsteady` and `failed_before`: rows of `test` and `line`; `gone`: passed before, skipped or absent now;
        `mended`: ids; `packages` and `changed`: versions, and which differ; counts, `seconds`, `error`, and `green`.
    """
    was = before.tests if before else {}
    broke, unsteady, failed_before, gone = [], [], [], []
    files = {name for name, test in after.tests.items() if "::" not in name and test["outcome"] in BAD}
    for name, test in sorted(after.tests.items()):
        row = {"test": name, "line": test["line"]}
        # A file that was not collected passed if a test of it did.
        passed = [one["outcome"] == "passed" for id_, one in was.items() if id_ == name or id_.startswith(f"{name}::")]
        if test["outcome"] in BAD and any(passed):
            second = again.tests.get(name, test) if again and not again.error else test
            (unsteady if second["outcome"] == "passed" else broke).append(row)
        elif test["outcome"] in BAD and was and not passed and before is not after:
            broke.append(row)  # a test that the first run did not have
        elif test["outcome"] in BAD:
            failed_before.append(row)
    for name, test in sorted(was.items()):
        now = after.tests.get(name)
        if test["outcome"] != "passed" or name.partition("::")[0] in files or after.error:
            continue
        if now is None or now["outcome"] == "skipped":
            gone.append({"test": name, "line": f"skipped: {now['line']}" if now else "not among the tests any more"})
    mended = sorted(
        name
        for name, test in was.items()
        if test["outcome"] in BAD and after.tests.get(name, {}).get("outcome") == "passed"
    )
    old = before.packages if before else {}
    changed = {
        name: [old.get(name), after.packages.get(name)]
        for name in sorted({*old, *after.packages})
        if old and old.get(name) != after.packages.get(name)
    }
    return {
        "green": not (broke or gone or after.error),
        "broke": broke,
        "gone": gone,
        "unsteady": unsteady,
        "failed_before": failed_before,
        "mended": mended,
        "packages": after.packages,
        "changed": changed,
        "counts": after.counts(),
        "counts_before": before.counts() if before else {},
        "seconds": after.seconds,
        "error": after.error,
    }


def versions_of(row: dict[str, Any]) -> str:
    """Return the versions of mlx and mlx-lm, with their commits."""
    return " and ".join(f"{name} {row['packages'].get(name, '(not installed)')}" for name in ("mlx", "mlx-lm"))


def title(found: list[dict[str, Any]], expected: int) -> str:
    """Return what happened in one line."""
    tests = sum(len(row["broke"]) + len(row["gone"]) for row in found)
    stopped = sum(bool(row["error"]) for row in found) + max(0, expected - len(found))
    parts = [f"{tests} {'tests' if tests != 1 else 'test'} broken"] if tests else []
    new = len({line for row in found for line in row.get("new", []) if not line.startswith(" ")})
    parts += [f"{new} {'architectures' if new != 1 else 'architecture'} to add"] if new else []
    parts += [f"{stopped} {'runs' if stopped != 1 else 'run'} without a result"] if stopped else []
    if not parts:
        return "Nightly: nothing broke"
    red = next((row for row in found if not row["green"]), None)
    return f"Nightly: {', '.join(parts)}" + (f" with {versions_of(red)}" if red else "")


def render(found: list[dict[str, Any]], expected: int = 1) -> str:
    """Return the report in Markdown."""
    lines = [f"**{title(found, expected)}**", ""]
    for row in found:
        lines += _section(row)
    if len(found) < expected:
        lines += [f"{expected - len(found)} of {expected} runs left no result: see their logs.", ""]
    return "\n".join(lines)


def _section(row: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(row["counts"].items())) or "no test ran"
    lines = [
        f"### {versions_of(row)}: {row['platform']}, Python {row['python']}",
        "",
        f"Asked: {row['asked']}. Commit {row['commit'] or 'unknown'}, {row['date']}. {counts}; {row['seconds']:.0f} s.",
        "",
    ]
    if row["changed"]:
        told = ", ".join(f"{name} {old or 'none'} → {new or 'none'}" for name, (old, new) in row["changed"].items())
        lines += [f"Changed against the released versions: {told}.", ""]
    else:
        lines += ["No version differs from the released ones.", ""]
    if row["error"]:
        lines += ["No whole result:", "", "```text", row["error"].replace("```", "'''"), "```", ""]
    for heading, rows in (
        ("Broken", row["broke"]),
        ("Passed before, skipped or absent now", row["gone"]),
        ("Unsteady (passed the second time)", row["unsteady"]),
        ("Fails with the released versions too", row["failed_before"]),
    ):
        if rows:
            lines += [f"{heading} ({len(rows)}):", "", *_listed(rows), ""]
    if row.get("new"):
        lines += ["Not yet in docs/models.md:", "", "```text", *(code(line) for line in row["new"]), "```", ""]
    if row["mended"]:
        lines += [f"Fail with the released versions and pass now: {len(row['mended'])}.", ""]
    return lines


def _listed(rows: list[dict[str, str]]) -> list[str]:
    # In code spans nothing is a mention, a link or a heading.
    lines = [f"- `{code(row['test'])}`" + (f": `{code(row['line'])}`" if row["line"] else "") for row in rows]
    more = len(lines) - MOST_TESTS
    return [*lines[:MOST_TESTS], f"- and {more} more, in the run's nightly.json"] if more > 0 else lines


def code(text: str) -> str:
    """Return text that can stand in a code span."""
    return " ".join(text.replace("`", "'").split())
