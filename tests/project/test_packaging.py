"""What a release is made of: the wheel, in a fresh environment and an empty folder, and GitHub's workflows: who may write, what is tried."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import io
import json
import os
import plistlib
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import virtual_gpu
import yaml
from packaging.requirements import Requirement
from refusing import refuses
from run_cli import run

import mlx_lora
from mlx_lora.bench.doctor import command as doctor

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOME = PROJECT["project"]["urls"]["Homepage"]
CHANGELOG = """# Changelog

## 0.2.0 (unreleased)

- new

## 0.1.0 (2026-12-01)

- one

### Models

- two

## 0.0.9 (2026-01-01)

- old
"""


def script(path: str) -> ModuleType:
    """A file below packaging/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "packaging" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_data_file_of_the_package_is_declared():
    listed = subprocess.run(["git", "ls-files", "mlx_lora"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    files = [line.removeprefix("mlx_lora/") for line in listed.stdout.splitlines() if not line.endswith(".py")]
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["mlx_lora"]
    # As setuptools reads them: a star does not cross a slash.
    declared = [
        name for name in files
        if any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in patterns)
    ]  # fmt: skip
    assert declared == files
    assert {"py.typed", "recipes/bard.yaml", "recipes/bard/train.jsonl", "reports/pages/page.css"} <= set(files)
    assert not fnmatch.fnmatchcase("recipes/bard.yaml.orig", "*.yaml")


def test_the_version_is_written_once():
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mlx_lora.__version__"}
    source = (ROOT / "mlx_lora" / "__init__.py").read_text()
    assert script("release_notes.py").package_version(source) == mlx_lora.__version__
    ran = run("__main__", "--version")
    assert (ran.code, ran.out.split()[-1]) == (0, mlx_lora.__version__)


def test_the_project_has_one_address():
    texts = [ROOT / "packaging/homebrew/mlx-lora.rb", *(ROOT / ".github").rglob("*.*"), ROOT / "README.md"]
    found = {
        match[0] for path in texts for match in re.finditer(r"https://github\.com/[\w.-]+/mlx-lora\b", path.read_text())
    }
    assert HOME == "https://github.com/mlx-lora/mlx-lora"
    assert found == {HOME}
    assert all(url.startswith(HOME) for url in PROJECT["project"]["urls"].values())


def test_release_notes_are_the_tags_own():
    notes = script("release_notes.py")
    assert notes.release_notes("v0.1.0", "0.1.0", CHANGELOG) == "- one\n\n### Models\n\n- two\n"
    for tag, version, words in (
        ("v0.1.0", "0.2.0", "tag v0.2.0"),
        ("v0.2.0", "0.2.0", "put the date"),
        ("v0.3.0", "0.3.0", "no section"),
        ("v0.1", "0.1", "no section"),
    ):
        refuses(words, notes.release_notes, tag, version, CHANGELOG, kind=notes.NotReady)
    refuses("no line", notes.package_version, "__version__ = metadata.version('mlx-lora')\n", kind=notes.NotReady)


def source_archive(path: Path, version: str) -> Path:
    """A source archive with nothing but its PKG-INFO."""
    member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO")
    info = f"Metadata-Version: 2.4\nName: mlx-lora\nVersion: {version}\n".encode()
    member.size = len(info)
    with tarfile.open(path, "w:gz") as content:
        content.addfile(member, io.BytesIO(info))
    return path


def locked(name: str, *ends: str, **more: str) -> dict[str, Any]:
    """A package as uv locks it, with a wheel for each end of a name; the checksum tells which one it is."""
    wheels = [
        {"url": (url := f"https://files.pythonhosted.org/packages/a/{name.replace('-', '_')}-1.0-{end}.whl"),
         "hashes": {"sha256": hashlib.sha256(url.encode()).hexdigest()}} for end in ends
    ]  # fmt: skip
    return {"name": name, "wheels": wheels, **more}


def test_the_formula_is_filled_in_from_the_archive_and_the_lock_file(tmp_path):
    render = script("homebrew/render.py")
    made, template = source_archive(tmp_path / "mlx_lora-3.2.1.tar.gz", "3.2.1"), render.TEMPLATE.read_text()
    own = [f"macosx_{version}_0_arm64" for version in (14, 15, 26)]
    packages = [
        locked("mlx", *(f"cp313-cp313-{system}" for system in own)),
        locked("mlx-metal", *(f"py3-none-{system}" for system in own)),
        *(locked(name, "py3-none-any") for name in ("mlx-lm", "setuptools")),
        # Not these: another Python, another processor, a newer macOS than any, and what is slower.
        locked("regex", "cp312-cp312-macosx_11_0_arm64", "cp313-cp313-macosx_99_0_arm64", "cp313-cp313-macosx_11_0_x86_64",
               "py3-none-any", "cp313-cp313-macosx_11_0_arm64"),
        locked("colorama", "py3-none-any", marker="sys_platform == 'win32'"),
    ]  # fmt: skip
    formula = render.render(made, {"packages": packages}, template)
    assert f'/v3.2.1/{made.name}"\n  sha256 "{hashlib.sha256(made.read_bytes()).hexdigest()}"' in formula
    assert [bool(re.search(r"@[A-Z0-9]+@", text)) for text in (formula, template)] == [False, True]
    found = re.findall(r'resource "(\S+)" do\s+url "(\S+)", using: :nounzip\s+sha256 "(\w+)"\s+end', formula)
    assert all(checksum == hashlib.sha256(url.encode()).hexdigest() for _, url, checksum in found)
    assert {(name, url.partition("-1.0-")[2]) for name, url, _ in found if not name.startswith("mlx")} == {
        ("setuptools", "py3-none-any.whl"), ("regex", "cp313-cp313-macosx_11_0_arm64.whl"),
    }  # fmt: skip
    blocks = re.findall(r"  on_(\w+)(?: :or_newer)? do\n(.*?)\n  end\n", formula, re.DOTALL)
    assert {name: re.findall(r"(mlx\S*)-1.0-\S+_(\d+)_0_", block) for name, block in blocks} == {
        name: [("mlx", version), ("mlx_metal", version)]
        for name, version in (("sonoma", "14"), ("sequoia", "15"), ("tahoe", "26"))
    }
    assert f'depends_on "python@{PROJECT["project"]["classifiers"][-3].rpartition(" ")[2]}"' in formula
    best, *others = packages[4]["wheels"][3], *packages[:4]
    for archive, asked, words in (
        (made, [*others, locked("regex")], "regex: no wheel"),
        (made, [*others, locked("regex", "cp313-cp313-macosx_15_0_arm64")], "macOS 14"),
        (made, [*others, {"name": "regex", "wheels": [{"url": best["url"]}]}], "SHA-256"),
        (
            made,
            [*others, {"name": "regex", "wheels": [{**best, "url": "http://a/regex-1.0-py3-none-any.whl"}]}],
            "PyPI",
        ),
        (made, packages[:2], "mlx-lm, setuptools"),
        (source_archive(tmp_path / "mlx_lora-3.2.2.tar.gz", "3.2.1"), packages, "another version"),
        (source_archive(tmp_path / "mlx-lora-3.2.1.tar.gz", "3.2.1"), packages, "not named"),
        (tmp_path / "mlx_lora-9.tar.gz", packages, "cannot be read"),
    ):
        refuses(words, render.render, archive, {"packages": asked}, template, kind=render.Unusable)


@pytest.mark.long
def test_the_space_answers_by_our_own_commands_and_keeps_no_file(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())  # the page is looked at by hand
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    app = script("space/app.py")
    monkeypatch.setattr(app, "model_folder", lambda name: tiny_folder)
    for name, text in (("a.jsonl", '{"prompt": "a", "completion": "b"}\n' * 9), ("b.exe", "x"), ("c.jsonl", "{")):
        (tmp_path / "upload").mkdir()
        (tmp_path / "upload" / name).write_text(text)
        line, plan, report = app.answer(
            str(tmp_path / "upload" / name), "a/b", "as it is published", "M4, 16 GB", 8, 64
        )
        assert ("--rank 8" in line, "M4, 16 GB" in plan, "9 rows" in report) == (name == "a.jsonl",) * 3
        assert not list(tmp_path.iterdir())
    assert f"]=={mlx_lora.__version__}\n" in (ROOT / "packaging/space/requirements.txt").read_text()


def test_the_app_shows_in_a_dialog_why_the_studio_ended(tmp_path):
    app = script("macos/make_app.py").make_app(tmp_path, mlx_lora.__version__) / "Contents"
    facts = plistlib.loads((app / "Info.plist").read_bytes())
    assert (app / "Resources" / f"{facts['CFBundleIconFile']}.icns").read_bytes()[8:12] == b"ic07"
    programs = tmp_path / "Library/Application Support" / facts["CFBundleName"] / "env/bin"
    programs.mkdir(parents=True)
    (programs.parent / "installed").write_text(facts["CFBundleShortVersionString"])
    fakes = {"mlx-lora": "echo Error: no such day; exit 2", "uname": "echo arm64", "curl": "exit 7",
             "osascript": 'echo "$@" >>"$HOME/said"'}  # fmt: skip
    for name, line in fakes.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    with_fakes = {"HOME": str(tmp_path), "PATH": f"{programs}:/usr/bin:/bin"}
    assert subprocess.run([app / "MacOS" / facts["CFBundleExecutable"]], env=with_fakes, check=False).returncode == 1
    assert "Error: no such day" in (tmp_path / "said").read_text()


# This package changes these, or uses what they do not document.
BOUNDED = ("mlx", "mlx-lm", "mlx-vlm", "transformers", "lm-eval", "verifiers", "tinker", "uvicorn")


@pytest.mark.parametrize("name", BOUNDED)
def test_a_package_that_is_changed_has_an_upper_limit(name):
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    asked = [one for one in map(Requirement, lines) if one.name == name]
    assert asked
    assert all(any(part.operator == "<" for part in one.specifier) for one in asked)


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


def test_the_release_workflow_publishes_only_what_was_built_and_checked():
    jobs = FLOWS["release"]["jobs"]
    assert FLOWS["release"][True] == {"push": {"tags": ["v*"]}}
    assert (jobs["pypi"]["needs"], jobs["github"]["needs"]) == ("build", "pypi")
    assert jobs["pypi"]["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    named = re.findall(r"(?:packaging|tests)/[\w/]+\.py", "\n".join(commands("release", "build")))
    assert len(named) == 3
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_forms_have_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form.keys() >= {"name", "description", "body"}
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) > 1
    assert all(part["attributes"]["label"] for part in asked)
    if path.stem == "bug":
        assert any("mlx-lora doctor --json" in part["attributes"]["label"] for part in asked)


def test_make_demo_installs_the_package_alone(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    plans = {target: subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
             for target in ("demo", "test")}  # fmt: skip
    assert "-e ." in plans["demo"]
    assert "[dev]" not in plans["demo"]
    assert "[dev]" in plans["test"]
    assert plans["demo"].count("-m venv .venv") == plans["test"].count("-m venv .venv") == 1  # one environment


@pytest.mark.parametrize(("flow", "name"), JOBS)
def test_a_job_ends_may_do_little_and_calls_what_exists(flow, name):
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

    for line in commands(flow, name):
        for target in re.findall(r"\bmake ([a-z-]+)", line):
            assert target in TARGETS
        for script in re.findall(r"\bpython3? ([\w/]+\.py)", line):
            assert (ROOT / script).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_runs_known_code_and_no_strangers_with_our_rights(path):
    assert "pull_request_target" not in FLOWS[path.stem][True]  # YAML 1.1 reads `on` as true
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


WAIT_S = 600


class Installed:
    """The wheel in an environment of its own, which borrows this one's other packages."""

    def __init__(self, folder: Path):
        self.wheel = build(folder)
        self.bin = folder / "venv" / "bin"
        self.home = folder / "empty"
        self.home.mkdir()
        python = self.bin / "python"
        done(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        # Paths of a .pth file are searched last, and the .pth files in them are not read: no editable mlx_lora.
        (packages,) = (folder / "venv").glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
        pip = (sys.executable, "-m", "pip", "--python", python)
        done(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", self.wheel)
        # As a new user has it: no settings of the tests or of a checkout, and caches that are empty.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLX_LORA_"))}
        self.environment |= {"HOME": str(folder / "home")}
        (folder / "home").mkdir()
        self.environment["PATH"] = f"{self.bin}{os.pathsep}{self.environment['PATH']}"

    def run(self, *words: object) -> str:
        """Run a program in the empty folder and return its standard output."""
        return done(self.bin / str(words[0]), *words[1:], cwd=self.home, env=self.environment)


def done(*words: object, **options) -> str:
    """Run a command to its end and return its standard output."""
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=WAIT_S, check=False, **options)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def build(folder: Path) -> Path:
    """Build the wheel from a copy of what git knows, so that the checkout stays clean."""
    names = done("git", "ls-files", "-z", "mlx_lora", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", cwd=ROOT)
    for name in names.rstrip("\0").split("\0"):
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder / "dist", folder / "source")
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(installed):
    tracked = set(done("git", "ls-files", "mlx_lora", cwd=ROOT).split())
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        facts = wheel.read(metadata).decode()
    assert held == tracked
    assert {"mlx_lora/py.typed", "mlx_lora/recipes/bard/train.jsonl", "mlx_lora/reports/pages/page.html"} <= held
    assert {"mlx_lora/studio/pages/index.html", "mlx_lora/studio/pages/vendor/preact.module.js"} <= held
    assert f"\nVersion: {mlx_lora.__version__}\n" in facts
    assert "\nProject-URL: Homepage, https://" in facts


@pytest.mark.slow
def test_the_commands_work_from_the_wheel_in_an_empty_folder(installed, tiny_folder):
    where = installed.run("python", "-c", "import mlx_lora; print(mlx_lora.__file__)").strip()
    assert Path(where).is_relative_to(installed.bin.parent)
    assert mlx_lora.__version__ in installed.run("mlx-lora", "--version")
    installed.run("mlx-lora", "convert", "--model", tiny_folder, "--out", "model", "--no-quantize")
    words = ("--model", "model", "--config", "bard", "--iters", 2, "--val-batches", 1)
    installed.run("mlx-lora", "train", *words)
    assert (installed.home / "runs" / "bard" / "report.html").is_file()
    adapter = ("--model", "model", "--adapter-path", "runs/bard")
    said = json.loads(installed.run("mlx-lora", "generate", *adapter, "--prompt", "Hi", "--max-tokens", 3, "--json"))
    assert said["tokens"] == 3
    assert "--force" in installed.run("mlx-lora", "demo", "--help")
    assert "bard, code-style" in installed.run("mlx-lora", "train", "--help")


FIVE_LINES = """
import mlx_lora
base = mlx_lora.load({model!r})
records = [{{"prompt": f"Say {{n}}.", "completion": "abcabc"}} for n in range(40)]
run = mlx_lora.train(base, records, rank=8, iters=30, learning_rate=1e-2, progress=False)
print(mlx_lora.generate(base, "Say 1.", adapter=run.adapter, max_tokens=6))
"""


@pytest.mark.slow
def test_five_lines_of_python_train_on_dicts_and_print_a_text(installed, tiny_folder):
    """The page's first example, in an empty folder."""
    lines = FIVE_LINES.format(model=str(tiny_folder))
    before = set(installed.home.iterdir())
    assert installed.run("python", "-c", lines).strip() == "abcabc"
    assert set(installed.home.iterdir()) == before  # the run lies in the cache


@pytest.fixture(scope="module")
def uv(tmp_path_factory) -> Path:
    """uv, in an environment of its own; skips without an index."""
    folder = tmp_path_factory.mktemp("uv")
    done(sys.executable, "-m", "venv", folder)
    words = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"]
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=WAIT_S, check=False)
    if ran.returncode:
        pytest.skip(f"uv cannot be installed: {ran.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "uv"


@pytest.mark.slow
def test_uvx_runs_the_wheel_file_with_its_own_dependencies(installed, uv, tiny_folder, tmp_path):
    """Nothing is borrowed here: uv installs what the wheel asks for, as it does for a new user."""
    environment = {
        **installed.environment,
        "UV_CACHE_DIR": str(uv.parents[1] / "cache"),
        "UV_TOOL_DIR": str(tmp_path / "tools"),
    }
    words = (uv, "tool", "run", "--python", sys.executable, "--from", installed.wheel, "mlx-lora")
    (tmp_path / "empty").mkdir()
    here = {"cwd": tmp_path / "empty", "env": environment}
    assert done(*words, "--version", **here).split()[-1] == mlx_lora.__version__
    assert "Commands:" in done(*words, "--help", **here)
    assert "Usage: mlx-lora train" in done(*words, "train", "--help", **here)
    # The same packages, in an environment that had none: the page's first example.
    python = (uv, "run", "--no-project", "--isolated", "--python", sys.executable, "--with", installed.wheel, "python")
    assert done(*python, "-c", FIVE_LINES.format(model=str(tiny_folder)), **here).strip() == "abcabc"
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_the_wheel_serves(installed, tiny_folder):
    log = installed.home / "serve.log"
    words = ["serve", "--model", tiny_folder, "--port", 0]
    with log.open("w") as out:
        server = subprocess.Popen(
            [installed.bin / "mlx-lora", *map(str, words)],
            stdout=out, stderr=out, cwd=installed.home, env=installed.environment,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + WAIT_S
        while not (ready := [line.split() for line in log.read_text().splitlines() if line.startswith("ready")]):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()  # noqa: PT018
            time.sleep(0.2)
        url = ready[0][1]
        body = {"prompt": "Hi", "max_tokens": 3}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 3
        with urllib.request.urlopen(url, timeout=60) as page:
            assert b"<html" in page.read()
    finally:
        server.kill()
        server.wait()
