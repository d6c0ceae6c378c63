"""The owner's kit, `doctor --full`: what is wrong is named and nothing else, and no ending loses what is done."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlparse

import mlx.core as mx
import pytest
import yaml
from child_environment import child_environment
from run_cli import run, succeeds

from mlx_lora.bench.doctor import checks as kit_checks
from mlx_lora.bench.doctor import kit as kit_module
from mlx_lora.bench.doctor.check import (
    GROUPS,
    CheckFinding,
    Kit,
    KitCheck,
    apart,
    bounded,
    dtypes_of,
    largest_apart,
    on_cpu,
)
from mlx_lora.bench.doctor.kit import PAGE_FILE, RESULT_FILE, Asked, all_checks, kit_problems, run_kit
from mlx_lora.bench.run import Ended
from mlx_lora.kernels import choose as kernel_table
from mlx_lora.utils import device

ROOT = Path(__file__).parents[3]
IN_PROCESS = ("kernels", "formats", "adapters", "losses")


def good(name: str, group: str = "kernels", calls: list[str] | None = None) -> KitCheck:
    def check(kit):
        if calls is not None:
            calls.append(name)
        yield CheckFinding("line", "ok", "fine")

    return KitCheck(group, name, check)


def red(content) -> list[str]:
    return [
        f"{check['name']}: {finding['name']}"
        for check in content["checks"]
        for finding in check["findings"]
        if finding["status"] == "failed"
    ]


def kept(folder: Path) -> dict:
    return json.loads((folder / RESULT_FILE).read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The share of a minute, of the groups that start no other process."""
    folder = tmp_path_factory.mktemp("quick")
    groups = [word for name in IN_PROCESS for word in ("--group", name)]
    return folder, run("doctor", "--full", "--quick", *groups, "--out", folder, "--json", exactly=True)


@pytest.mark.long
def test_the_quick_share_is_green_here_and_its_file_is_valid(quick):
    folder, ran = quick
    assert ran.code == 0, ran.err
    content = kept(folder)
    assert json.loads(ran.out) == content
    assert kit_problems(content) == []
    assert {check["group"] for check in content["checks"]} == set(IN_PROCESS)
    assert content["finished"]
    assert content["summary"]["ok"] > 100
    assert content["summary"]["seconds"] == pytest.approx(sum(one["seconds"] for one in content["checks"]), abs=0.1)
    measured = [one["found"] for check in content["checks"] for one in check["findings"] if one["found"] is not None]
    assert max(measured) > 0  # numbers were compared, not an array with itself
    page = (folder / PAGE_FILE).read_text()
    assert "<script" not in page
    assert not re.search(r'(src|href)="http', page)
    assert all(check["name"].replace("'", "&#39;") in page for check in content["checks"])


def test_the_schema_refuses_other_content(quick):
    content = kept(quick[0])
    finding = content["checks"][0]["findings"][0]
    for changed in ({"status": "green"}, {"found": math.inf}, {"words": ""}, {"advice": 3}):
        content["checks"][0]["findings"][0] = {**finding, **changed}
        assert len(kit_problems(content)) == 1, changed
    content["checks"][0]["findings"][0] = finding
    assert kit_problems({**content, "schema_version": 2})
    assert kit_problems({key: value for key, value in content.items() if key != "machine"})
    assert kit_problems([])


@pytest.mark.long
def test_a_wrong_kernel_is_named_and_nothing_else_is_red(tmp_path, monkeypatch):
    """One candidate has a wrong output, and another a wrong gradient only; training would use them, too."""
    right = kernel_table.lean_swiglu

    def wrong(keeps: bool, gate: mx.array, up: mx.array) -> mx.array:
        made = right(keeps, gate, up)
        return 1.2 * made if keeps else made + 0.25 * (made - mx.stop_gradient(made))

    monkeypatch.setattr(kernel_table, "lean_swiglu", wrong)
    asked = {"kernels", "adapters", "losses"}
    checks = [one for one in all_checks() if one.group in asked or (one.group, one.name) == ("objectives", "sft")]
    content, _ = run_kit(Asked(tmp_path, quick=True), checks)
    assert {line.rpartition(", ")[2].partition(": ")[2] for line in red(content)} == {
        "lean gated activation: output",
        "lean gated activation: gradient",
        "leanest gated activation: gradient",
    }
    assert any(check["group"] == "objectives" for check in content["checks"])


def test_a_check_that_raises_is_one_red_line(tmp_path, logged):
    def broken(kit):
        yield CheckFinding("before", "ok", "fine")
        raise RuntimeError("[metal] out of order\nand much more")

    checks = [good("a"), KitCheck("kernels", "b", broken), good("c")]
    content, interrupted = run_kit(Asked(tmp_path), checks)
    assert (content["finished"], interrupted) == (True, False)
    assert [len(check["findings"]) for check in content["checks"]] == [1, 2, 1]
    assert len(red(content)) == 1
    words = content["checks"][1]["findings"][1]["words"]
    assert "[metal] out of order" in words
    assert "and much more" not in words
    assert any("out of order" in line for line in logged)


def test_after_an_interrupt_only_the_rest_is_run(tmp_path):
    calls: list[str] = []

    def interrupted(kit):
        calls.append("b")
        if calls.count("b") == 1:
            raise KeyboardInterrupt
        yield CheckFinding("line", "ok", "fine")

    checks = [good("a", calls=calls), KitCheck("kernels", "b", interrupted), good("c", calls=calls)]
    content, stopped = run_kit(Asked(tmp_path), checks)
    assert (stopped, content["finished"], kept(tmp_path)["checks"][0]["done"]) == (True, False, True)
    assert (tmp_path / PAGE_FILE).exists()
    content, stopped = run_kit(Asked(tmp_path), checks)
    assert (stopped, content["finished"]) == (False, True)
    assert calls == ["a", "b", "b", "c"]
    run_kit(Asked(tmp_path, again=True, groups=("kernels",)), checks)
    assert calls == ["a", "b", "b", "c", "a", "b", "c"]


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import mlx_lora
from mlx_lora.bench.doctor.check import CheckFinding, KitCheck
from mlx_lora.bench.doctor.kit import Asked, run_kit

def good(kit):
    yield CheckFinding("line", "ok", "fine")

def killed(kit):
    os.kill(os.getpid(), signal.SIGKILL)
    yield

checks = [KitCheck("kernels", "a", good), KitCheck("kernels", "b", killed), KitCheck("kernels", "c", good)]
run_kit(Asked(Path(sys.argv[1])), checks)
"""


@pytest.mark.long
def test_a_kill_loses_nothing_and_a_check_that_kills_twice_is_passed_by(tmp_path):
    environment = child_environment()
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    calls: list[str] = []
    state = kept(tmp_path)
    assert [(one["name"], one["done"]) for one in state["checks"]] == [("a", True), ("b", False)]
    checks = [good(name, calls=calls) for name in "abc"]
    state["checks"][1]["attempts"] += 1  # as a second kill leaves it
    state["key"] = run_kit(Asked(tmp_path / "other"), [])[0]["key"]  # a rehearsal's device is not that of the process
    (tmp_path / RESULT_FILE).write_text(json.dumps(state))
    content, _ = run_kit(Asked(tmp_path), checks)
    assert calls == ["c"]
    assert red(content) == ["b: the process"]


def test_another_version_or_device_starts_anew(tmp_path, monkeypatch, logged):
    calls: list[str] = []
    checks = [good("a", calls=calls)]
    for _ in range(2):
        run_kit(Asked(tmp_path), checks)
    assert calls == ["a"]
    versions = kit_module.installed_versions()
    monkeypatch.setattr(kit_module, "installed_versions", lambda: {**versions, "mlx": "99.0"})
    run_kit(Asked(tmp_path), checks)
    assert calls == ["a", "a"]
    assert any("mlx" in line and "99.0" in line for line in logged)
    here = device.current_device()
    monkeypatch.setattr(
        kit_module.device, "current_device", lambda: device.Device("cpu", "another", *list(vars(here).values())[2:])
    )
    run_kit(Asked(tmp_path), checks)
    assert calls == ["a", "a", "a"]
    run_kit(Asked(tmp_path, quick=True), checks)
    assert calls == ["a", "a", "a", "a"]


def test_a_file_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / RESULT_FILE).write_text('{"mine": 1}')
    ran = run("doctor", "--full", "--quick", "--group", "losses", "--out", tmp_path)
    assert (ran.code, RESULT_FILE in ran.err) == (2, True)
    assert (tmp_path / RESULT_FILE).read_text() == '{"mine": 1}'


@pytest.mark.parametrize(("problem", "skipped"), [("", {"memory", "speed"}), ("code 1", set(GROUPS) - {"machine"})])
def test_a_virtual_gpu_is_named_and_what_it_cannot_do_is_skipped(problem, skipped, tmp_path, monkeypatch):
    name = "Apple Paravirtual device"
    virtual = device.Device("metal", name, 7 * 2**30, 5 * 2**30, "")
    monkeypatch.setattr(kit_module.device, "current_device", lambda: virtual)
    monkeypatch.setattr(kit_module, "gpu_problem", lambda kit: problem)
    checks = [good(f"check of {group}", group) for group in GROUPS]
    checks.append(next(check for check in all_checks() if check.name == "GPU"))
    content, _ = run_kit(Asked(tmp_path), checks)
    assert content["device"]["virtual"]
    lines = {check["name"]: check["findings"][0] for check in content["checks"]}
    assert {group for group in GROUPS if lines[f"check of {group}"]["status"] == "skipped"} == skipped
    assert name in lines["check of speed"]["words"]
    assert problem in lines["check of speed"]["words"]
    assert (lines["GPU"]["status"], name in lines["GPU"]["words"]) == ("warning", True)
    assert name in (tmp_path / PAGE_FILE).read_text()


def test_the_issue_is_prefilled_within_an_address(quick, monkeypatch):
    folder, _ = quick
    content = kept(folder)
    lines = [f"failed  kernels: attention {number}: {'x & y ' * 20}" for number in range(400)]
    address = kit_module.issue_url(content, "a summary", lines, folder / RESULT_FILE)
    assert 2000 < len(address) <= kit_module.MOST_CHARACTERS
    fields = {key: value[0] for key, value in parse_qs(urlparse(address).query).items()}
    assert "a summary" in fields["summary"]
    assert RESULT_FILE in fields["summary"]
    assert str(folder) not in address
    assert fields["lines"].startswith(lines[0])
    assert "more" in fields["lines"].splitlines()[-1]
    few = kit_module.issue_url(content, "a summary", lines[:2], folder / RESULT_FILE)
    assert parse_qs(urlparse(few).query)["lines"] == ["\n".join(lines[:2])]
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / kit_module.TEMPLATE).read_text())
    assert {"summary", "lines"} <= {field["id"] for field in form["body"]}
    assert f'"{kit_module.ISSUES}"' in (ROOT / "pyproject.toml").read_text()
    opened: list[str] = []
    for has_browser in (True, False):
        monkeypatch.setattr(webbrowser, "open", lambda url, has=has_browser: opened.append(url) or has)
        ran = succeeds("doctor", "--full", "--quick", "--group", "losses", "--out", folder, "--send")
        assert opened[-1].startswith(f"{kit_module.ISSUES}/new?")
        assert (opened[-1] in ran.err) != has_browser
        assert RESULT_FILE in ran.err


def test_a_group_that_is_not_there_is_refused(tmp_path):
    ran = run("doctor", "--full", "--group", "kernel", "--out", tmp_path)
    assert (ran.code, "kernels" in ran.err) == (2, True)


def test_errors_that_are_not_finite_are_red():
    assert bounded("x", 1e-6, 1e-4, "words").status == "ok"
    for error in (2e-4, math.nan, math.inf):
        assert bounded("x", error, 1e-4, "words", "do this") == CheckFinding(
            "x", "failed", "words", 2e-4 if error == 2e-4 else 1e30, 1e-4, "relative error", "do this"
        )
    one = mx.array([1.0, 2.0])
    assert apart(one, one) == 0
    assert apart(mx.array([1.0, math.nan]), one) == math.inf
    assert apart(mx.array([1.0]), one) == math.inf
    assert largest_apart({"a": one, "b": 1.1 * one}, {"a": one, "b": one}) == (pytest.approx(0.1, rel=1e-3), "b")
    assert largest_apart({"a": one}, {"b": one})[0] == math.inf


def test_the_cpu_judges_a_gpu_in_float32_too(tmp_path, monkeypatch):
    here = device.Device("metal", "Apple M2", 2**34, 2**33, "")
    monkeypatch.setattr(device, "compute_dtype", lambda name="auto": mx.bfloat16)
    kits = [Kit(here, quick, tmp_path, 1.0) for quick in (True, False)]
    assert [dtypes_of(kit) for kit in kits] == [[mx.bfloat16], [mx.bfloat16, mx.float32]]
    with on_cpu():
        assert mx.default_device() == mx.Device(mx.cpu)


def planned_run(planned: int, *peaks: int):
    left = list(peaks)
    return lambda *args, **named: ([{"peak_memory_bytes": left.pop(0)}], {"planned_peak_bytes": planned})


def test_a_plan_that_is_off_is_a_warning(tmp_path, monkeypatch):
    kit = Kit(device.current_device(), False, tmp_path, 1.0)
    monkeypatch.setattr(kit_checks, "write_model", lambda folder, *args: folder)
    cases = {(105, 100): "ok", (89, 100, 100): "warning", (111, 100, 100): "warning", (89, 100, 90): "ok"}
    for (planned, *peaks), status in cases.items():
        monkeypatch.setattr(kit_checks, "train_child", planned_run(planned, *peaks))
        [finding] = kit_checks.check_peak(kit_checks.RUNS[0], kit)
        assert finding.status == status, (planned, peaks)


def test_speeds_are_those_of_the_counted_passes(tmp_path, monkeypatch):
    kit = Kit(device.Device("cpu", "a CPU", 2**34, 2**33, ""), False, tmp_path, 1.0)
    steps = [{"elapsed_s": end, "real_tokens": 400} for end in (5.0, 9.0, 10.0, 11.0)]  # two of a pass, two counted
    monkeypatch.setattr(kit_checks, "train_child", lambda *args, **named: (steps, {}))
    monkeypatch.setattr(kit_checks.SpeedModel, "write", lambda model, kit: kit.work)
    ends = {"mlx_lm.lora": (4.0, 8.0, 12.0, 16.0), "torch": (1.0, 2.0, 2.5, 3.0)}

    def peer(command, log, limit_s):
        job = json.loads(Path(command[-1]).read_text())
        name = next(name for name, peer in kit_checks.PEERS.items() if peer == command[3])
        Path(job["ends"]).write_text("".join(f"{end}\n" for end in ends[name]))
        return Ended(0, "")

    monkeypatch.setattr(kit_checks, "run_process", peer)
    monkeypatch.setattr(kit_checks, "peer_versions", lambda: {"torch": "2", "peft": "1"})
    ours, mlx_lm, torch = kit_checks.check_speed(0, kit)
    assert ours.found == pytest.approx(800 / 2)
    assert (mlx_lm.status, mlx_lm.found) == ("ok", pytest.approx(4.0))
    assert (torch.status, torch.found) == ("warning", pytest.approx(0.5))
    monkeypatch.setattr(kit_checks, "peer_versions", lambda: {"torch": None, "peft": "1"})
    *_, torch = kit_checks.check_speed(0, kit)
    assert (torch.status, "torch" in torch.words) == ("skipped", True)


def test_a_load_that_gets_slower_shows():
    steps = [{"elapsed_s": float(second), "real_tokens": 100} for second in range(1, 61)]
    steps += [{"elapsed_s": 60.0 + 2 * number, "real_tokens": 100} for number in range(1, 61)]  # half as fast
    first, last = kit_checks.steady_speeds(steps, 180)
    assert first == pytest.approx(100, rel=0.02)
    assert last == pytest.approx(50, rel=0.02)
    first, last = kit_checks.steady_speeds(steps[:60], 60)
    assert first == pytest.approx(last, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("share", [("--quick",), ("--minutes", "0.5")])
def test_the_whole_kit_has_no_red_line_here(share, tmp_path):
    ran = run("doctor", "--full", "--no-hub", "--out", tmp_path, *share)
    content = kept(tmp_path)
    assert ran.code == 0, red(content)
    assert content["finished"]
    assert {check["group"] for check in content["checks"]} == set(GROUPS)


@pytest.mark.parametrize("chip", ["M2 Pro", "Cray-1"])
def test_assumed_rates_stand_beside_measured_ones(chip):
    (found,) = kit_checks.check_rates(SimpleNamespace(here=SimpleNamespace(name=chip)))
    assert (found.status == "ok") is bool(found.values) is (chip == "M2 Pro")
    assert all(value >= 0 for value in found.values.values())
