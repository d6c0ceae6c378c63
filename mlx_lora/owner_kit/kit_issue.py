"""Make the address of a prefilled issue: the summary and the red lines. Nothing is sent; the browser shows a form."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mlx_lora.owner_kit.kit_run import finding_line, summary_line

ISSUES = "https://github.com/mlx-lora/mlx-lora/issues"
TEMPLATE = "doctor.yml"  # .github/ISSUE_TEMPLATE, whose fields have these names
TITLE, SUMMARY, LINES = "title", "summary", "lines"
MOST_CHARACTERS = 7000  # of an address: GitHub refuses about 8,000, browsers more


def issue_url(content: Mapping[str, Any], summary: str, lines: Sequence[str], path: Path) -> str:
    """Return the address of a new issue.

    Args:
        content: of the result.
        summary: one line.
        lines: red lines, then warnings; as many as the address can hold are taken.
        path: of the result file, to be attached by hand; only its name is told.
    """
    machine, here, versions = content["machine"], content["device"], content["software"]["versions"]
    facts = [
        summary,
        f"{here['name']} ({here['backend']}), {here['memory_bytes'] / 2**30:.0f} GiB, {machine['system']} {machine['system_version']}",
        f"mlx {versions.get('mlx')}, mlx-lm {versions.get('mlx-lm')}, mlx-lora {versions.get('mlx-lora')} {content['software']['commit'] or ''}",
        f"Share: {content['share']}. Please attach {path.name}.",
    ]
    title = f"doctor --full on {machine['chip'] or here['name']}: {content['summary']['failed']} red"
    kept = list(lines)
    while True:
        left = len(lines) - len(kept)
        shown = [*kept, *([f"... and {left} more in {path.name}"] if left else [])]
        fields = {TITLE: title, SUMMARY: "\n".join(facts), LINES: "\n".join(shown) or "none"}
        address = f"{ISSUES}/new?{urlencode({'template': TEMPLATE, **fields})}"
        if len(address) <= MOST_CHARACTERS or not kept:
            return address
        kept.pop()


def show_issue(content: Mapping[str, Any], path: Path, say: Callable[[str], None]) -> str:
    """Open the address in a browser, or print it where there is none, and return it.

    Args:
        content: of the result.
        path: of the result file.
        say: takes lines.
    """
    lines = [
        f"{status}  {check['group']}: {check['name']}: {finding_line(finding)}"
        for status in ("failed", "warning")
        for check in content["checks"]
        for finding in check["findings"]
        if finding["status"] == status
    ]
    address = issue_url(content, summary_line(content), lines, path)
    opened = webbrowser.open(address)
    say("A prefilled issue is open in the browser; nothing is sent before you press its button" if opened else address)
    say(f"Attach {path} to it")
    return address
