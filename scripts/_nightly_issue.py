"""One GitHub issue with what the newest versions break: opened, updated from night to night, closed when nothing does."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from _nightly_results import render, title

LABEL = "nightly"
MARK = "<!-- written by scripts/nightly.py -->"
MOST_LETTERS = 60_000  # of an issue's text; GitHub takes 65,536


class GitHubFailed(RuntimeError):
    """GitHub refused a request; the message says which and why."""


class GitHub:
    """The few requests to GitHub's REST API that an issue needs."""

    def __init__(self, repository: str, token: str, open_url: Callable[..., Any] = urllib.request.urlopen):
        self._base = f"{os.environ.get('GITHUB_API_URL', 'https://api.github.com')}/repos/{repository}"
        self._token, self._open = token, open_url

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request and return the answer's JSON.

        Raises:
            GitHubFailed: it was refused, or nobody answered.
        """
        request = urllib.request.Request(
            f"{self._base}{path}",
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={
                "Accept": "application/vnd.github+json",
                "Authorization": f"Bearer {self._token}",
                "Content-Type": "application/json",
                "X-GitHub-Api-Version": "2022-11-28",
            },
        )
        try:
            with self._open(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            told = error.read()[:300].decode(errors="replace")
            raise GitHubFailed(f"{method} {path}: GitHub answered {error.code}: {told}") from None
        except OSError as error:
            raise GitHubFailed(f"{method} {path}: {error}") from None


def update_issue(hub: GitHub, found: list[dict[str, Any]], expected: int = 1) -> str:
    """Open, update or close the issue, and return what was done in one line.

    Args:
        hub: takes the requests.
        found: what the runs of a night found.
        expected: how many runs there must be; with fewer, nothing is closed.
    """
    issue = find_issue(hub)
    green = len(found) >= expected and all(row["green"] for row in found)
    head = title(found, expected)
    if green:
        if issue is None:
            return "nothing broke, and no issue is open"
        number = issue["number"]
        hub.request("POST", f"/issues/{number}/comments", {"body": text_of(found, expected)})
        hub.request("PATCH", f"/issues/{number}", {"state": "closed", "state_reason": "completed"})
        return f"nothing broke: issue {number} is closed"
    text = text_of(found, expected)
    if issue is None:
        make_label(hub)
        made = hub.request("POST", "/issues", {"title": head, "body": text, "labels": [LABEL]})
        return f"issue {made['number']} is opened: {head}"
    number, was, now = issue["number"], tests_in(issue["body"]), tests_in(text)
    hub.request("PATCH", f"/issues/{number}", {"title": head, "body": text})
    if was != now:
        hub.request("POST", f"/issues/{number}/comments", {"body": difference(was, now)})
    return f"issue {number} is updated: {head}"


def find_issue(hub: GitHub) -> dict[str, Any] | None:
    """Return the open issue that this script wrote; the oldest, if somebody reopened another."""
    issues = hub.request("GET", f"/issues?state=open&labels={LABEL}&per_page=100")
    ours = [issue for issue in issues if MARK in (issue["body"] or "") and "pull_request" not in issue]
    return min(ours, key=lambda issue: issue["number"], default=None)


def make_label(hub: GitHub) -> None:
    """Make the label unless there is one."""
    known = hub.request("GET", "/labels?per_page=100")
    if LABEL not in [label["name"] for label in known]:
        told = "What the newest mlx and mlx-lm break"
        hub.request("POST", "/labels", {"name": LABEL, "color": "d93f0b", "description": told})


def text_of(found: list[dict[str, Any]], expected: int) -> str:
    """Return the issue's text: the report, and where its run is."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
    server, repository, run = (os.environ.get(name) for name in names)
    where = [f"Run: {server}/{repository}/actions/runs/{run}", ""] if server and run else []
    report = render(found, expected)
    if len(report) > MOST_LETTERS:
        report = report[:MOST_LETTERS].rpartition("\n")[0] + "\n- and more, in the run's nightly.json"
    by_hand = f"By hand: `python scripts/nightly.py --versions {found[0]['asked'] if found else 'newest'}`."
    return "\n".join([MARK, report, *where, by_hand])


def tests_in(text: str | None) -> set[str]:
    """Return the tests that an issue's text lists as broken or gone."""
    found, listed = set(), False
    for line in (text or "").splitlines():
        if heading := re.match(r"([A-Z][^`]*) \(\d+\):$", line):
            listed = heading[1].startswith(("Broken", "Passed before"))
        elif listed and (test := re.match(r"- `([^`]+)`", line)):
            found.add(test[1])
    return found


def difference(was: set[str], now: set[str]) -> str:
    """Return a comment on what is new in the list, and what is not in it any more."""
    lines = []
    for heading, tests in (("New tonight", now - was), ("No longer broken", was - now)):
        if tests:
            lines += [f"{heading} ({len(tests)}):", "", *(f"- `{test}`" for test in sorted(tests)[:60]), ""]
    return "\n".join(lines)
