"""Run the kit's checks one after the other, keep each result at once, and go on whatever one of them does.

The result can become a prefilled issue with the summary and the red lines: the browser shows a form, and nothing is sent.
"""

from __future__ import annotations

import logging
import tempfile
import time
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import mlx.core as mx

from mlx_lora.bench.machine import describe_device, describe_machine, describe_power, describe_software
from mlx_lora.doctor.check import GROUPS, LARGEST, CheckFinding, Kit, KitCheck
from mlx_lora.doctor.kernels import format_checks, kernel_checks
from mlx_lora.doctor.layers import layer_checks, loss_checks
from mlx_lora.doctor.machine import (
    gpu_problem,
    is_virtual,
    machine_checks,
    memory_checks,
    peer_versions,
    speed_checks,
    virtual_words,
)
from mlx_lora.doctor.result import MOST_ATTEMPTS, PAGE_FILE, RESULT_FILE, KitState, open_state, write_kit_page
from mlx_lora.doctor.runs import decode_checks, run_checks
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import first_line
from mlx_lora.utils.text import counted, format_duration, installed_versions

log = logging.getLogger(__name__)

# Groups whose numbers say nothing about a chip if the GPU is a virtual machine's.
NOT_VIRTUAL = ("memory", "speed")
MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED", "skipped": "skipped"}


@dataclass(frozen=True)
class Asked:
    """What the owner asked for.

    Attributes:
        folder: for the result and the page.
        quick: take the share of a minute.
        groups: to run; empty: all.
        again: run these again, also what has ended.
        minutes: of the steady load.
    """

    folder: Path
    quick: bool = False
    groups: tuple[str, ...] = ()
    again: bool = False
    minutes: float = 2.0


def all_checks(short: Sequence[KitCheck] = ()) -> list[KitCheck]:
    """Return all checks in the order of their groups.

    Args:
        short: those of the short doctor, which belong to the group `machine`.
    """
    made = [
        *short, *machine_checks(), *kernel_checks(), *format_checks(), *layer_checks(), *loss_checks(), *run_checks(),
        *decode_checks(), *memory_checks(), *speed_checks(),
    ]  # fmt: skip
    return sorted(made, key=lambda check: list(GROUPS).index(check.group))


def run_kit(asked: Asked, checks: Sequence[KitCheck]) -> tuple[dict[str, Any], bool]:
    """Run the checks that have not ended yet, write the result and the page, and return the result's content.

    Args:
        asked: what the owner asked for.
        checks: all of them.

    Returns:
        The content, and whether the owner interrupted it.

    Raises:
        InputError: the folder holds a file of that name which is not ours.
    """
    here = device.current_device()
    share = "quick" if asked.quick else "full"
    state, why = open_state(asked.folder / RESULT_FILE, _facts(here), share, _key(here, share))
    if why:
        log.info(f"Starting anew: {why}")
    wanted = [
        check
        for check in checks
        if (check.quick or not asked.quick) and (not asked.groups or check.group in asked.groups)
    ]
    if asked.again:
        state.forget(wanted)
    left = [check for check in wanted if not state.is_done(check)]
    if len(left) < len(wanted):
        log.info(
            f"Going on: {len(wanted) - len(left)} of {counted(len(wanted), 'check')} are done (--again repeats them)"
        )
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="mlx-lora-doctor-", ignore_cleanup_errors=True) as work:
        kit = Kit(here, asked.quick, Path(work), asked.minutes)
        unfit = _unfit_groups(kit)
        try:
            for number, check in enumerate(wanted, 1):
                if check in left:
                    _run_one(state, check, kit, unfit, f"[{number}/{len(wanted)}]")
        except KeyboardInterrupt:
            interrupted = True
    state.content["finished"] = all(state.is_done(check) for check in wanted)
    state.content["power_after"] = describe_power()
    state.write()
    write_kit_page(asked.folder / PAGE_FILE, state.content)
    return state.content, interrupted


def _run_one(state: KitState, check: KitCheck, kit: Kit, unfit: Mapping[str, str], place: str) -> None:
    """Run one check, and keep what it finds."""
    start, findings = time.perf_counter(), []
    entry = state.begin(check)
    if entry["attempts"] > MOST_ATTEMPTS:
        words = f"the process ended {MOST_ATTEMPTS} times while this check ran"
        advice = "see the system's crash report for python; report it with the name of this check"
        findings.append(CheckFinding("the process", "failed", words, advice=advice))
    elif why := unfit.get(check.group) or check.needs(kit):
        findings.append(CheckFinding(check.name, "skipped", why))
    else:
        try:
            # One by one, so that what was found before a fault is kept.
            with console.log_to(console.drop):  # the lines of runs that the checks make
                for finding in check.run(kit):
                    findings.append(finding)
        except KeyboardInterrupt:
            state.take_back(entry)
            raise
        except Exception as error:  # whatever it is, the owner wants to know it, and what the other checks find
            words = f"{type(error).__name__}: {first_line(error)}".replace(str(kit.work), "WORK")[:500]
            advice = "report it; the other checks are not affected"
            findings.append(CheckFinding("raised an error", "failed", words, advice=advice))
    seconds = time.perf_counter() - start
    state.end(entry, findings, seconds)
    log.info(_line(place, check, findings, seconds))
    for finding in findings:
        if finding.status in ("failed", "warning"):
            log.info(f"    {MARKS[finding.status]}  {finding_line(finding)}")
    mx.clear_cache()


def _line(place: str, check: KitCheck, findings: Sequence[CheckFinding], seconds: float) -> str:
    counts = Counter(finding.status for finding in findings)
    found = ", ".join(f"{counts[status]} {words}" for status, words in MARKS.items() if counts[status]) or "nothing"
    return f"{place} {check.group}: {check.name}: {found} ({seconds:.1f} s)"


def finding_line(finding: CheckFinding | Mapping[str, Any]) -> str:
    """Return a finding as one line, with its numbers."""
    one = finding if isinstance(finding, Mapping) else vars(finding)
    numbers = ""
    if one["found"] is not None and one["wanted"] is not None:
        found = "not finite" if one["found"] >= LARGEST else f"{one['found']:.3g}"
        numbers = f" ({found}, bound {one['wanted']:.3g}{' ' + one['unit'] if one['unit'] else ''})"
    return f"{one['name']}: {one['words']}{numbers}"


def summary_line(content: Mapping[str, Any]) -> str:
    """Return the result in one line."""
    summary = content["summary"]
    counts = ", ".join(f"{summary[status]} {words}" for status, words in MARKS.items() if summary[status])
    done = "" if content["finished"] else "; not finished: the same command goes on"
    return f"{counted(len(content['checks']), 'check')} in {format_duration(summary['seconds'])}: {counts}{done}"


def _facts(here: device.Device) -> dict[str, Any]:
    """Return what the result says about this machine."""
    return {
        "machine": describe_machine(),
        "device": {**describe_device(), "virtual": is_virtual(here)},
        "software": describe_software(),
        "peers": peer_versions(),
        "power_before": describe_power(),
    }


def _key(here: device.Device, share: str) -> dict[str, str | None]:
    """Return what results depend on: with other versions, another device or another share they are not continued."""
    system = describe_machine()
    return {
        "share": share,
        "device": f"{here.name} ({here.backend})",
        "system": f"{system['system']} {system['system_version']}",
        **installed_versions(),
        **peer_versions(),
        "commit": describe_software()["commit"],
    }


def _unfit_groups(kit: Kit) -> dict[str, str]:
    """Return the groups that cannot run on this device, with the reason."""
    if not is_virtual(kit.here):
        return {}
    problem = gpu_problem(kit)
    if problem:
        return {
            group: f"{virtual_words(kit.here)}, which does not compute: {problem}"
            for group in GROUPS
            if group != "machine"
        }
    return {group: f"{virtual_words(kit.here)}, whose numbers say nothing about a chip" for group in NOT_VIRTUAL}


# The prefilled issue

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


def show_issue(content: Mapping[str, Any], path: Path) -> str:
    """Open the address in a browser, or print it where there is none, and return it.

    Args:
        content: of the result.
        path: of the result file.
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
    log.info(
        "A prefilled issue is open in the browser; nothing is sent before you press its button" if opened else address
    )
    log.info(f"Attach {path} to it")
    return address
