"""Run the kit's checks one after the other, keep each result at once, and go on whatever one of them does.

The result can become a prefilled issue with the summary and the red lines: the browser shows a form, and nothing is sent.

The result file, from which a second call goes on, is written after each check. A check that was begun and never ended has taken the process with it, or someone killed the
process meanwhile. It is tried once more; if it does not end then either, that is its finding, and the kit goes on with the next one.
The file has a schema, version 1, which is checked by the same code as the results of `bench`.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
import webbrowser
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import mlx.core as mx

from mlx_lora.bench.doctor import checks
from mlx_lora.bench.doctor.check import GROUPS, LARGEST, STATUSES, TINY_4BIT, CheckFinding, Kit, KitCheck
from mlx_lora.bench.doctor.checks import gpu_problem, is_virtual, peer_versions
from mlx_lora.bench.machine import describe_device, describe_machine, describe_power, describe_software
from mlx_lora.bench.results import DEVICE, MACHINE, POWER, SOFTWARE, field_problems, fields_of, under
from mlx_lora.kernels.choose import kernel_rows
from mlx_lora.losses.fused import NAME
from mlx_lora.losses.preference import PAIR_LOSSES
from mlx_lora.reports.charts import Bar, bar_chart, render_page
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError, first_line
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import counted, format_duration, installed_versions

RESULT_FILE, PAGE_FILE = "doctor.json", "doctor.html"
MOST_ATTEMPTS = 2


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, with a new summary.

    Raises:
        ValueError: the content is not what the schema says, which is a mistake in a check.
    """
    findings = [one["status"] for entry in content["checks"] for one in entry["findings"]]
    seconds = sum(entry["seconds"] or 0.0 for entry in content["checks"])
    content["summary"] = {status: findings.count(status) for status in STATUSES} | {"seconds": round(seconds, 3)}
    if problems := kit_problems(content):
        raise ValueError(f"{path.name}: {'; '.join(problems[:3])}")
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_content(path: Path, facts: Mapping[str, Any], key: Mapping[str, str | None]) -> tuple[dict[str, Any], str]:
    """Return the content of a result file, and why it starts anew where there was another; empty if it does not.

    Args:
        path: of the file, which need not be there.
        facts: `machine`, `device`, `software`, `peers` and `power_before` of now.
        key: what the results depend on, with the `share`.

    Raises:
        InputError: there is a file that is not ours.
    """
    why, before = "", None
    if path.exists():
        before = read_json(path, "give another folder with --out")
        if before.get("schema") != SCHEMA:
            raise InputError(f"{path}: not a result of the doctor; give another folder with --out")
    if before is not None and not kit_problems(before):  # else it was cut short
        changed = [name for name in {**before["key"], **key} if before["key"].get(name) != key.get(name)]
        if not changed:
            return before, ""
        why = "; ".join(f"{name} was {before['key'].get(name)} and is {key.get(name)}" for name in changed[:3])
    content = {
        "schema": SCHEMA, "schema_version": VERSION, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "share": key["share"], "finished": False, "key": dict(key), **facts, "power_after": None, "summary": {}, "checks": [],
    }  # fmt: skip
    return content, why


# Schema

SCHEMA, VERSION = "mlx-lora-doctor", 1


TOP = fields_of(
    "",
    ("schema", "text", f"`{SCHEMA}`"),
    ("schema_version", "whole", "1"),
    ("created", "text", "local date and time of the start, ISO 8601"),
    ("share", "text", "`full`, or `quick` for the share of a minute"),
    ("finished", "yes/no", "whether every check that was asked for has run"),
    ("key", "mapping", "versions and device that all checks ran with; with others, they run again"),
    ("machine", "mapping", "hardware and operating system"),
    ("device", "mapping", "the device that MLX computes on"),
    ("device.virtual", "yes/no", "whether the GPU is that of a virtual machine"),
    ("software", "mapping", "versions and environment variables"),
    ("peers", "mapping", "versions of packages that training is compared with; null if they are not installed"),
    ("power_before", "mapping", "power and temperature before the first check"),
    ("power_after", "mapping?", "the same after the last check"),
    ("summary", "mapping", "how many findings have each status, and the seconds of all checks"),
    *((f"summary.{status}", "whole", f"findings with this status: {status}") for status in STATUSES),
    ("summary.seconds", "number", "the sum of the checks' seconds"),
    ("checks", "list", "one entry per check, in the order in which they ran"),
)
CHECK = fields_of(
    "",
    ("group", "text", f"one of {', '.join(GROUPS)}"),
    ("name", "text", "unique within its group"),
    ("done", "yes/no", "whether it has ended"),
    ("attempts", "whole", "how often it was begun"),
    ("seconds", "number?", "how long it took; null before its end"),
    ("findings", "list", "what it found"),
)
FINDING = fields_of(
    "",
    ("name", "text", "what was looked at"),
    ("status", "text", f"one of {', '.join(STATUSES)}"),
    ("words", "text", "what was found, in words; for `skipped`, why"),
    ("found", "number?", "the number that was measured"),
    ("wanted", "number?", "its bound, or the number that was expected"),
    ("unit", "text?", "of both"),
    ("advice", "text?", "what to do"),
    ("values", "mapping", "further numbers, by name"),
    ("values.{}", "number", "one of them"),
)


def kit_problems(content: Any) -> list[str]:
    """Return the problems of a result's content, a few words each; empty: it is valid."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return [f'foreign: no "schema": "{SCHEMA}" in it']
    if content.get("schema_version") != VERSION:
        return [f"schema_version is {content.get('schema_version')!r}, not {VERSION}"]
    found = [line for fields in (TOP, MACHINE, DEVICE, SOFTWARE) for line in field_problems(content, fields)]
    for moment in ("power_before", "power_after"):
        if isinstance(content.get(moment), dict):
            found += under(moment, field_problems(content[moment], POWER))
    for number, check in enumerate(content["checks"] if isinstance(content.get("checks"), list) else []):
        wrong = list(field_problems(check, CHECK))
        problems = wrong or (
            [] if check["group"] in GROUPS else [f"group is {check['group']!r}, not one of {', '.join(GROUPS)}"]
        )
        for place, finding in enumerate([] if wrong else check["findings"]):
            problems += under(f"findings[{place}]", field_problems(finding, FINDING))
            if isinstance(finding, dict) and finding.get("status") not in STATUSES:
                problems.append(
                    f"findings[{place}].status is {finding.get('status')!r}, not one of {', '.join(STATUSES)}"
                )
        found += under(f"checks[{number}]", problems)
    return found


# The page

PAGES = Path(__file__).parent / "pages"
PLANNED = "planned GB"
URGENT = ("failed", "warning")


def write_kit_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of a result."""
    charts, groups = {"memory": _memory_charts, "speed": _speed_charts}, []
    for name, asks in GROUPS.items():
        checks = [check for check in content["checks"] if check["group"] == name]
        lines = [(check["name"], finding) for check in checks for finding in check["findings"]]
        skipped: dict[str, list[str]] = {}  # why something was skipped -> what it holds for
        for check, line in lines:
            if line["status"] == "skipped":
                label = check if line["name"] == check else f"{check}: {line['name']}"
                skipped.setdefault(line["words"], []).append(label)
        if checks:
            groups.append({
                "name": name, "asks": asks, "checks": checks, "statuses": [line["status"] for _, line in lines],
                "skipped": skipped, "charts": charts[name](checks) if name in charts else [],
            })  # fmt: skip
    page = render_page(
        PAGES, "doctor.html", **content, groups=groups, shown=SHOWN, numbers=_numbers, lasting=format_duration
    )
    replace_text(path, page)


def _numbers(finding: Mapping[str, Any]) -> str:
    """Return a finding's number, and how it stands to its bound."""
    shown = [
        "not finite" if value >= LARGEST else f"{value:,.0f}" if value >= 1000 else f"{value:.2g}"
        for value in (finding["found"], finding["wanted"])
        if value is not None and finding["found"] is not None
    ]
    return (" ≤ " if len(shown) > 1 and finding["found"] <= finding["wanted"] else " > ").join(shown)


def _memory_charts(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw planned and measured peaks of the runs with each way of checkpointing."""
    charts = []
    titles = {"none": "Peak memory, nothing computed twice", "block": "Peak memory with block checkpoints"}
    for mode, title in titles.items():
        bars = []
        for check in checks:
            *parts, of = check["name"].split(", ")
            for values in (finding["values"] for finding in check["findings"]):
                if PLANNED in values and of.endswith(mode):
                    # The column of names has room for a few letters.
                    name = " ".join(parts).replace(" base rank ", " r").replace(" rows", "")
                    bars.append(Bar(" x".join(name.rsplit(" ", 1)), values["measured GB"], note=check["name"]))
                    bars.append(Bar("by the plan", values[PLANNED], predicted=True, note=check["name"]))
        if bars:
            keys = [(0, False, "measured"), (0, True, "planned before the run")]
            charts.append({"title": title, "svg": bar_chart(title, bars, " GB"), "keys": keys})
    return charts


def _speed_charts(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw a chart per model, and one of the steady load."""
    charts = []
    for check in checks:
        bars = [
            Bar(who, speed, color=0 if who == "mlx-lora" or who.endswith("minute") else 1)
            for finding in check["findings"]
            for who, speed in finding["values"].items()
        ]
        if bars:
            title = check["findings"][0]["name"].rpartition(": ")[0] or check["name"]
            svg = bar_chart(f"{title}: tokens per second", bars)
            charts.append({"title": f"{title}: tokens/s", "svg": svg, "keys": []})
    return charts


SHOWN = {"ok": "good", "failed": "red", "warning": "with a warning", "skipped": "skipped"}


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
    rows = {row.name: row for row in kernel_rows()}
    formats = [
        (f"{bits}-bit affine", [{"bits": bits, "group_size": group, "mode": "affine"} for group in checks.GROUPS])
        for bits in checks.AFFINE_BITS
    ]
    formats += [
        (mode, [{"bits": bits, "group_size": group, "mode": mode}]) for mode, (bits, group) in checks.FLOATS.items()
    ]
    losses = {
        "DPO's family": partial(checks.check_pair_losses, PAIR_LOSSES),
        "ORPO, SimPO, CPO": partial(checks.check_pair_losses, checks.OTHER_PAIR_LOSSES),
        "KTO's family": checks.check_rated_losses,
        "reward model": checks.check_reward_loss,
        "GRPO's family and RLOO": checks.check_policy_losses,
        "distillation": checks.check_divergences,
        "a whole model": partial(checks.check_model, None),
        "a whole 4-bit model": partial(checks.check_model, TINY_4BIT),
    }
    made = [
        *short,
        KitCheck("machine", "GPU", checks.check_gpu),
        KitCheck("machine", "power and load", checks.check_power),
        *(
            KitCheck(
                "kernels",
                f"{name}, {rows[name].words(shape)}",
                partial(checks.check_kernel, name, shape),
                number == 0,
            )
            for name, shapes in checks.SHAPES.items()
            for number, shape in enumerate(shapes)
        ),
        *(
            KitCheck("kernels", f"{NAME}, {words}", partial(checks.check_loss, make), number < 2)
            for number, (words, make) in enumerate(checks.HEADS.items())
        ),
        KitCheck("kernels", "exponentials", checks.check_exponentials),
        KitCheck("kernels", "tanh, power, sums", checks.check_substitutes),
        *(
            KitCheck("formats", name, partial(checks.check_layouts, layouts), name in ("4-bit affine", "mxfp4"))
            for name, layouts in formats
        ),
        *(
            KitCheck("formats", f"experts in {words}", partial(checks.check_experts, layout), number == 0)
            for number, (words, layout) in enumerate(checks.EXPERT_LAYOUTS.items())
        ),
        *(KitCheck("adapters", case.words, partial(checks.check_layer, case)) for case in checks.CASES),
        *(KitCheck("losses", name, check) for name, check in losses.items()),
        *(
            KitCheck("objectives", name, partial(checks.check_step, name), name in checks.QUICK)
            for name in checks.SHORT_RUNS
        ),
        *(
            KitCheck("resume", name, partial(checks.check_resume, changes), number == 0)
            for number, (name, changes) in enumerate(checks.RESUMED.items())
        ),
        KitCheck("decode", "float base", partial(checks.check_decode, False)),
        KitCheck("decode", "4-bit base", partial(checks.check_decode, True), quick=False),
        *(
            KitCheck("memory", checks.planned_run_words(one), partial(checks.check_peak, one), number == 4)
            for number, one in enumerate(checks.RUNS)
        ),
        *(
            KitCheck(
                "speed", f"model {number + 1} of {checks.MODELS}", partial(checks.check_speed, number), number == 0
            )
            for number in range(checks.MODELS)
        ),
        KitCheck("speed", "rates", checks.check_rates),
        KitCheck("speed", "steady load", checks.check_steady, quick=False),
    ]
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
    here, machine, software = device.current_device(), describe_machine(), describe_software()
    facts = {
        "machine": machine,
        "device": {**describe_device(), "virtual": is_virtual(here)},
        "software": software,
        "peers": peer_versions(),
        "power_before": describe_power(),
    }
    # What results depend on: with other versions, another device or another share they are not continued.
    key = {
        "share": "quick" if asked.quick else "full",
        "device": f"{here.name} ({here.backend})",
        "system": f"{machine['system']} {machine['system_version']}",
        **installed_versions(),
        **facts["peers"],
        "commit": software["commit"],
    }
    path = asked.folder / RESULT_FILE
    content, why = read_content(path, facts, key)
    if why:
        log.info(f"Starting anew: {why}")
    wanted = [
        check
        for check in checks
        if (check.quick or not asked.quick) and (not asked.groups or check.group in asked.groups)
    ]
    if asked.again:
        names = {(check.group, check.name) for check in wanted}
        content["checks"] = [one for one in content["checks"] if (one["group"], one["name"]) not in names]
    entries = {(one["group"], one["name"]): one for one in content["checks"]}
    left = [check for check in wanted if not entries.get((check.group, check.name), {}).get("done")]
    if len(left) < len(wanted):
        log.info(
            f"Going on: {len(wanted) - len(left)} of {counted(len(wanted), 'check')} are done (--again repeats them)"
        )
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="mlx-lora-doctor-", ignore_cleanup_errors=True) as work:
        kit = Kit(here, asked.quick, Path(work), asked.minutes)
        unfit: dict[str, str] = {}
        if is_virtual(here):
            problem = gpu_problem(kit)
            why = f"which does not compute: {problem}" if problem else "whose numbers say nothing about a chip"
            groups = [group for group in GROUPS if group != "machine"] if problem else NOT_VIRTUAL
            unfit = dict.fromkeys(groups, f"a virtual GPU ({here.name}), {why}")
        try:
            for number, check in enumerate(wanted, 1):
                if check in left:
                    if (check.group, check.name) not in entries:
                        entry = {
                            "group": check.group, "name": check.name, "done": False, "attempts": 0, "seconds": None,
                            "findings": [],
                        }  # fmt: skip
                        content["checks"].append(entry)
                        entries[check.group, check.name] = entry
                    entry = entries[check.group, check.name]
                    _run_one(check, entry, kit, unfit, partial(write_content, path, content))
                    _log_findings(entry, f"[{number}/{len(wanted)}]")
        except KeyboardInterrupt:
            interrupted = True
    done = {(one["group"], one["name"]) for one in content["checks"] if one["done"]}
    content["finished"] = all((check.group, check.name) in done for check in wanted)
    content["power_after"] = describe_power()
    write_content(path, content)
    write_kit_page(asked.folder / PAGE_FILE, content)
    return content, interrupted


def _run_one(
    check: KitCheck, entry: dict[str, Any], kit: Kit, unfit: Mapping[str, str], write: Callable[[], None]
) -> None:
    """Run one check, and keep in its entry what it finds, as JSON values; what a user's folders are called stays here."""
    start, findings = time.perf_counter(), []
    entry["attempts"] += 1
    write()
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
            entry["attempts"] -= 1  # it did not end the process
            write()
            raise
        except Exception as error:  # whatever it is, the owner wants to know it, and what the other checks find
            words = f"{type(error).__name__}: {first_line(error)}".replace(str(kit.work), "WORK")[:500]
            advice = "report it; the other checks are not affected"
            findings.append(CheckFinding("raised an error", "failed", words, advice=advice))
    made = [asdict(one) for one in findings]
    for one in made:
        for name in ("found", "wanted"):  # JSON has no infinity, and the schema no negative number
            if one[name] is not None:
                one[name] = min(max(one[name], 0.0), LARGEST) if math.isfinite(one[name]) else LARGEST
        for name in ("name", "words", "unit", "advice"):
            one[name] = one[name].replace(str(Path.home()), "~") or None
    entry |= {"done": True, "seconds": round(time.perf_counter() - start, 3), "findings": made}
    write()
    mx.clear_cache()


def _log_findings(entry: Mapping[str, Any], place: str) -> None:
    """Say what a check found, with its red lines and its warnings."""
    counts = Counter(finding["status"] for finding in entry["findings"])
    found = ", ".join(f"{counts[status]} {words}" for status, words in MARKS.items() if counts[status]) or "nothing"
    log.info(f"{place} {entry['group']}: {entry['name']}: {found} ({entry['seconds']:.1f} s)")
    for finding in entry["findings"]:
        if finding["status"] in URGENT:
            log.info(f"    {MARKS[finding['status']]}  {finding_line(finding)}")


def finding_line(one: Mapping[str, Any]) -> str:
    """Return a finding as one line, with its numbers."""
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
