"""GitHub's workflows: who may write, what is tried, and that what they call is there."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import virtual_gpu
import yaml

from mlx_lora.bench.doctor import command as doctor

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
FLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES}
JOBS = [(flow, job) for flow, content in FLOWS.items() for job in content["jobs"]]
# Everything that a job may write; whatever is not here only reads.
WRITES = {("nightly", "report"): {"issues"}, ("release", "pypi"): {"id-token"}, ("release", "github"): {"contents"}}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def job_of(flow: str, name: str) -> dict[str, Any]:
    return FLOWS[flow]["jobs"][name]


def commands(flow: str, name: str) -> list[str]:
    """The lines that a job runs."""
    return [line for step in job_of(flow, name)["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize(("flow", "name"), JOBS)
def test_a_job_ends_and_may_do_little(flow, name):
    job = job_of(flow, name)
    assert 0 < job["timeout-minutes"] <= 180
    allowed = job.get("permissions", FLOWS[flow].get("permissions"))
    assert isinstance(allowed, dict)  # not read-all or write-all, and not whatever the repository has
    assert {scope for scope, level in allowed.items() if level == "write"} == WRITES.get((flow, name), set())
    for step in job["steps"]:
        # A tag can be moved to other code, a commit cannot.
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}"))
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        # What a stranger wrote, a branch's name or an issue's title, must not become part of a script.
        assert "github.event." not in step.get("run", "")
        assert "github.head_ref" not in step.get("run", "")


@pytest.mark.parametrize(("flow", "name"), JOBS)
def test_what_a_job_calls_exists(flow, name):
    for line in commands(flow, name):
        for target in re.findall(r"\bmake ([a-z-]+)", line):
            assert target in TARGETS
        for script in re.findall(r"\bpython3? ([\w/]+\.py)", line):
            assert (ROOT / script).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_action_says_which_version_its_commit_is(path):
    used = re.findall(r"uses: (\S+)(.*)", path.read_text(encoding="utf-8"))
    assert used
    assert all(re.fullmatch(r" # v\d+\.\d+\.\d+", comment) for _, comment in used)
    commits = {name: {other for other, _ in used if other.split("@")[0] == name.split("@")[0]} for name, _ in used}
    assert all(len(same) == 1 for same in commits.values())


def test_what_is_published_is_built_by_tools_of_one_version_and_stored_before_the_tests():
    steps = job_of("release", "build")["steps"]
    (installed,) = (line for line in commands("release", "build") if "pip install" in line)
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", name) for name in installed.partition("pip install ")[2].split())
    assert "python -m build --no-isolation" in commands("release", "build")
    tests = next(n for n, step in enumerate(steps) if "make setup" in step.get("run", ""))
    assert tests > max(n for n, step in enumerate(steps) if "upload-artifact" in step.get("uses", ""))


def test_no_workflow_runs_a_strangers_code_with_our_rights():
    for content in FLOWS.values():
        assert "pull_request_target" not in content[True]  # YAML 1.1 reads `on` as true


def test_both_systems_and_every_python_are_tried():
    matrix = job_of("ci", "test")["strategy"]["matrix"]
    tried = {(os, python) for os in matrix["os"] for python in matrix["python"]}
    tried |= {(row["os"], row["python"]) for row in matrix["include"]}
    assert {"3.11", "3.12", "3.13", "3.14"} <= {python for os, python in tried if os.startswith("ubuntu")}
    assert {"macos-15", "macos-26"} <= {os for os, _ in tried}
    assert all(isinstance(python, str) for _, python in tried)  # 3.10 without quotes is 3.1


def test_the_kit_runs_after_red_tests_and_its_json_is_kept():
    steps = job_of("ci", "test")["steps"]
    (kit,) = (step for step in steps if "doctor --full" in step.get("run", ""))
    (kept,) = (step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert steps.index(kit) > next(n for n, step in enumerate(steps) if step.get("run") == "make test")
    assert steps.index(kept) > steps.index(kit)
    assert kit["if"] == kept["if"] == "always()"
    assert "continue-on-error" not in kit
    words = shlex.split(kit["run"])
    assert words[words.index("--out") + 1] == kept["with"]["path"].rstrip("/")
    known = {name for option in doctor.main.params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_job_that_writes_issues_installs_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    (line,) = commands("nightly", "report")
    assert not re.search(r"\b(pip|make|npm|apt-get)\b", line)
    monkeypatch.setenv("GITHUB_TOKEN", "t")
    monkeypatch.setenv("GITHUB_REPOSITORY", "a/b")
    args = importlib.import_module("nightly").arguments(shlex.split(line)[2:])
    systems = job_of("nightly", "versions")["strategy"]["matrix"]["os"]
    assert [path.parent.name for path in args.found] == [f"nightly-{os}" for os in systems]
    assert args.expect == len(systems)
    assert args.file_issue


# --- the virtual GPU of GitHub's Macs


@pytest.mark.parametrize(
    ("name", "virtual"), [("Apple Paravirtual device", True), ("Apple M1 (Virtual)", True), ("Apple M4 Max", False)]
)
def test_a_virtual_gpu_is_known_by_its_name(name, virtual):
    assert virtual_gpu.is_virtual(name) is virtual


def test_what_a_virtual_gpu_cannot_run_is_skipped_with_its_reason():
    marked = []

    def item(nodeid: str, *markers: str) -> SimpleNamespace:
        return SimpleNamespace(
            nodeid=nodeid,
            get_closest_marker=lambda name: name in markers,
            add_marker=lambda mark: marked.append((nodeid, mark.kwargs["reason"])),
        )

    items = [
        item("tests/test_a.py::test_one"),
        item("tests/test_a.py::test_two[x]"),
        item("tests/test_b.py::test_c", "metal"),
    ]
    virtual_gpu.skip_by_name(items, {"tests/test_a.py::test_two": "needs more memory"})
    assert [name for name, _ in marked] == ["tests/test_a.py::test_two[x]", "tests/test_b.py::test_c"]
    assert "needs more memory" in marked[0][1]
    assert "metal" in marked[1][1]


def test_the_last_lines_name_what_was_not_run(tmp_path):
    """A whole run of pytest on a GPU that says it is virtual, and on one that does not."""
    (tmp_path / "gpu.py").write_text("import os, virtual_gpu\nvirtual_gpu.gpu_name = lambda: os.environ['GPU']\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = metal: a real GPU\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_plain(): pass\n@pytest.mark.metal\ndef test_real(): pass\n"
    )
    told = {}
    for name in ("Apple Paravirtual device", "Apple M4"):
        paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "virtual_gpu", "-p", "gpu", "-p", "no:cacheprovider", "test_it.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths, "GPU": name, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout
        assert name in ran.stdout
        told[name] = [line for line in ran.stdout.splitlines() if "::test_real" in line and "metal" in line]
    assert len(told["Apple Paravirtual device"]) == 1
    assert told["Apple M4"] == []
