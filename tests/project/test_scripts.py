"""Scripts of the checkout: the tests that a change touches, the package's size, what mlx's GPUs lack, the nightly runs and their issue, and results that people submit."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import urllib.error
from functools import reduce
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from made_results import made_entry, made_result

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """Import a module of scripts/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID", "GITHUB_TOKEN", "GITHUB_API_URL"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module


@pytest.fixture
def check(script):
    return script("check")


@pytest.fixture
def house(script):
    return script("house")


@pytest.fixture
def tree(check, tmp_path, monkeypatch):
    """A checkout with three tests: one, in a room, imports a module, one a helper that does, one patches it by name."""
    (tmp_path / "tests" / "data").mkdir(parents=True)
    for name, text in {
        "data/test_direct": "from mlx_lora.data.read import Rows\n",
        "test_helped": "import helper\n",
        "helper": "from mlx_lora.data import read\n",
        "test_patched": "PLACE = 'mlx_lora.data.read.SplitRows'\n",
        "test_other": "from mlx_lora.data.reader import Rows\nPAGE = 'docs/data.md'\n",
    }.items():
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    forget(check)
    yield check
    forget(check)


def forget(check) -> None:
    check.imported.cache_clear()
    check.reached.cache_clear()


def test_a_module_finds_its_tests(tree):
    own, near = tree.touched_tests(["mlx_lora/data/read.py"])
    assert own == []
    assert sorted(near) == ["tests/data/test_direct.py", "tests/test_helped.py", "tests/test_patched.py"]


def test_a_helper_a_test_and_a_page_find_theirs(tree):
    assert tree.touched_tests(["tests/helper.py"]) == ([], ["tests/test_helped.py"])
    assert tree.touched_tests(["tests/test_other.py"]) == (["tests/test_other.py"], [])
    assert tree.touched_tests(["docs/data.md"]) == ([], ["tests/test_other.py"])
    assert tree.touched_tests(["docs/none.md"]) == ([], [])


def test_a_total_above_its_bar_is_told(house, monkeypatch, capsys):
    """`make lint` runs it."""
    _, bar = house.BARS["modules"]
    for value in (bar, bar + 1):
        monkeypatch.setattr(house, "measure", lambda value=value: {"modules": value})
        assert house.main([]) == (value > bar)
        assert ("above the bar" in capsys.readouterr().out) == (value > bar)


@pytest.mark.slow
def test_a_plain_run_loads_few_modules(house, tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a?", "completion": "b"}\n' * 4 + '{"prompt": "c?", "completion": "d"}\n' * 4)
    assert house.loaded(str(tiny_folder), str(data)) <= house.BARS["modules of a plain run"][1]


def test_what_is_counted(house, tmp_path, monkeypatch):
    file = tmp_path / "losses" / "a.py"
    file.parent.mkdir()
    file.write_text(
        '''"""What it is."""\nimport mlx.nn as nn\nfrom mlx_lm.models import _private\n\n
def f(arrays, layer, other):
    """Do it."""
    layer.__class__ = other
    nn.Linear = other
    raise InputError("--one with --two: no")
    return arrays[0], other._hidden
'''
    )
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.count([file]) == 7
    assert len(list(house.by_number())) == len(list(house.refusals())) == 1
    assert [place.split(" ", 1)[1] for place in house.foreign_privates()] == [
        "_private", "__class__ =", "Linear =", "_hidden",
    ]  # fmt: skip


SAMPLE = """
import pytest

def test_right(): pass

def test_wrong():
    assert 1 == 2, "first line\\nsecond line"

@pytest.mark.parametrize("word", ["a.b", "c::d"])
def test_each(word): assert word == "a.b"

def test_skipped(): pytest.skip("no GPU here")

@pytest.fixture
def falling():
    yield
    raise OSError("the teardown")

def test_twice(falling): assert False

class TestGroup:
    def test_inside(self): raise ValueError("inside")
"""


@pytest.fixture
def results(script) -> ModuleType:
    return script("_nightly_results")


def test_outcomes_and_first_lines_are_read(results, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests/test_some.py").write_text(SAMPLE)
    (tmp_path / "tests/test_lost.py").write_text("import nothing_of_this_name\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=results.xml"]
    variables = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([*command, "--continue-on-collection-errors", "tests"], cwd=tmp_path, env=variables, check=False)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    found = results.read_junit(tmp_path / "results.xml")
    start = "tests/test_some.py"
    lost = found.pop("tests/test_lost.py")
    assert lost["outcome"] == "error"
    assert "nothing_of_this_name" in lost["line"]
    outcomes = {name.removeprefix(f"{start}::"): test["outcome"] for name, test in found.items()}
    assert outcomes == {
        "test_right": "passed", "test_wrong": "failed", "test_each[a.b]": "passed", "test_each[c::d]": "failed",
        "test_skipped": "skipped", "test_twice": "error", "TestGroup::test_inside": "failed",
    }  # fmt: skip
    assert "first line" in found[f"{start}::test_wrong"]["line"]
    assert "second line" not in found[f"{start}::test_wrong"]["line"]
    assert "no GPU here" in found[f"{start}::test_skipped"]["line"]
    # pytest itself takes these ids: a file that is there is followed by its classes and the test's name.
    assert f"{start}::TestGroup::test_inside" in found
    (tmp_path / "cut.xml").write_text('<testsuites><testsuite><testcase classname="a"')
    assert results.read_junit(tmp_path / "cut.xml") == {}


def run_of(results: ModuleType, error: str | None = None, mlx: str = "1", **outcomes: str) -> Any:
    tests = {
        f"tests/test_a.py::{name}": {"outcome": found, "line": f"{name} it is"} for name, found in outcomes.items()
    }
    return results.Run({"mlx": mlx, "mlx-lm": "5 (abc)", "numpy": "2"}, tests, 3.0, error)


def names(rows: list[dict[str, str] | str]) -> list[str]:
    """Return the names of tests, of which some lists have more than the id."""
    return [(row if isinstance(row, str) else row["test"]).rpartition("::")[2] for row in rows]


# Outcomes before, after, and of what broke once more -> what is found.
COMPARED = {
    "what broke passed before": (
        {"a": "passed", "b": "passed", "c": "failed", "d": "failed", "e": "passed", "f": "passed", "g": "skipped"},
        {"a": "passed", "b": "failed", "c": "failed", "d": "passed", "e": "skipped", "g": "skipped", "new": "error"}, None,
        {"green": False, "broke": ["b", "new"], "failed_before": ["c"], "gone": ["e", "f"], "mended": ["d"]},
    ),
    "the same versions break nothing": (
        {"b": "failed", "c": "failed"}, {"b": "failed", "c": "failed"}, None,
        {"green": True, "broke": [], "failed_before": ["b", "c"]},
    ),
    "what passes the second time is unsteady": (
        {"a": "passed", "b": "passed"}, {"a": "failed", "b": "failed"}, {"a": "passed", "b": "failed"},
        {"green": False, "unsteady": ["a"], "broke": ["b"]},
    ),
    "all pass the second time": (
        {"a": "passed", "b": "passed"}, {"a": "failed", "b": "failed"}, {"a": "passed", "b": "passed"}, {"green": True},
    ),
    # They were not lost, they were not run.
    "a run without results": ({"a": "passed"}, {"error": "took longer"}, None, {"green": False, "gone": []}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_runs_are_compared(name, results):
    before, after, again, wanted = COMPARED[name]
    repeated = None if again is None else run_of(results, **again)
    found = results.compare(run_of(results, **before), run_of(results, mlx="2", **after), again=repeated)
    assert found["changed"] == {"mlx": ["1", "2"]}
    assert {
        key: names(found[key]) if isinstance(value, list) else found[key] for key, value in wanted.items()
    } == wanted


def test_a_file_that_cannot_be_imported_broke_once(results):
    before = run_of(results, a="passed", b="passed")
    lost = {"tests/test_a.py": {"outcome": "error", "line": "ImportError: no name 'x'"}}
    found = results.compare(before, results.Run(before.packages, lost, 1.0))
    assert [row["test"] for row in found["broke"]] == ["tests/test_a.py"]
    assert found["gone"] == []


def night(results: ModuleType, *broke: str, line: str = "assert 1 == 2", **more: Any) -> dict[str, Any]:
    facts = {"asked": "main", "platform": "Linux", "python": "3.12", "commit": "abc", "date": "today"}
    before = run_of(results, **dict.fromkeys(("a", "b", "c"), "passed"))
    after = run_of(results, mlx="2", **{name: "failed" if name in broke else "passed" for name in ("a", "b", "c")})
    found = results.compare(before, after)
    for row in found["broke"]:
        row["line"] = line
    return {**facts, **found, **more}


def test_a_report_names_versions_tests_and_lines(results):
    text = results.render([night(results, "a", "b")])
    assert all(word in text for word in ("mlx 2", "mlx-lm 5 (abc)", "test_a.py::a", "test_a.py::b", "assert 1 == 2"))
    assert "test_a.py::c" not in text
    assert "2 tests" in results.title([night(results, "a", "b")], 1)
    new = night(results, new=["| qwen5 | | right | |", "    slope along the gradient"], green=False)
    assert "1 architecture to add" in results.title([new, new], 2)
    assert "| qwen5 |" in results.render([new])


def test_a_report_cannot_be_written_into(results):
    row = night(results, "a", line="` @everyone <script>")
    (line,) = (line for line in results.render([row]).splitlines() if "@everyone" in line)
    assert line.count("`") == 4  # two code spans, of id and line
    fenced = results.render([night(results, error="```\n@everyone", green=False)])
    assert fenced.count("```") == 2


# --- the issue


class Hub:
    """GitHub's answers, from memory."""

    def __init__(self) -> None:
        self.issues: list[dict[str, Any]] = []
        self.comments: list[tuple[int, str]] = []
        self.labels: list[dict[str, Any]] = []

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        if path.startswith("/labels"):
            return self.labels if method == "GET" else self.labels.append(body)
        if method == "GET":
            assert "state=open" in path
            return [issue for issue in self.issues if issue["state"] == "open"]
        if path == "/issues":
            self.issues.append({**body, "number": len(self.issues) + 1, "state": "open"})
            return self.issues[-1]
        number = int(path.split("/")[2])
        if path.endswith("/comments"):
            self.comments.append((number, body["body"]))
        else:
            self.issues[number - 1] |= body
        return None


def test_one_issue_is_opened_updated_and_closed(script, results):
    update, hub = script("_nightly_issue").update_issue, Hub()
    update(hub, [night(results)])
    assert hub.issues == []
    update(hub, [night(results, "a")])
    update(hub, [night(results, "a")])  # the next night, the same
    assert len(hub.issues) == len(hub.labels) == 1
    assert hub.comments == []
    update(hub, [night(results, "b", "c")])
    assert len(hub.issues) == 1
    assert "test_a.py::c" in hub.issues[0]["body"]
    ((number, told),) = hub.comments  # only a change is told
    assert number == 1
    assert all(name in told for name in ("test_a.py::a", "test_a.py::b", "test_a.py::c"))
    update(hub, [night(results)])
    assert hub.issues[0]["state"] == "closed"
    update(hub, [night(results, "a")])
    assert [issue["state"] for issue in hub.issues] == ["closed", "open"]
    assert len(hub.labels) == 1


def test_other_issues_are_left_alone(script, results):
    update, hub = script("_nightly_issue").update_issue, Hub()
    hub.issues = [{"number": 1, "state": "open", "title": "mine", "body": None, "labels": ["nightly"]}]
    update(hub, [night(results)])
    assert hub.issues[0]["state"] == "open"
    update(hub, [night(results, "a")])
    assert len(hub.issues) == 2


def test_a_missing_result_closes_nothing(script, results):
    update, hub = script("_nightly_issue").update_issue, Hub()
    update(hub, [night(results, "a"), night(results)], 2)
    update(hub, [night(results)], 2)
    assert hub.issues[0]["state"] == "open"
    assert "1 run without a result" in hub.issues[0]["title"]
    update(hub, [], 2)
    assert hub.issues[0]["state"] == "open"


def test_an_issues_text_has_a_bound(script, results):
    many = night(results, "a")
    many["broke"] = [{"test": f"tests/test_a.py::t{n}", "line": "x" * 240} for n in range(3000)]
    text = script("_nightly_issue").text_of([many] * 8, 8)
    assert len(text) < 65_536
    assert "2940 more" in text


def test_a_request_carries_the_token_and_a_refusal_its_reason(script):
    module, sent = script("_nightly_issue"), []

    def answer(request, timeout):
        sent.append(request)
        if request.method == "POST":
            raise urllib.error.HTTPError(request.full_url, 403, "no", {}, io.BytesIO(b'{"message": "not you"}'))
        return io.BytesIO(b'[{"number": 3}]')

    hub = module.GitHub("a/b", "secret", answer)
    assert hub.request("GET", "/issues") == [{"number": 3}]
    assert sent[0].full_url.endswith("/repos/a/b/issues")
    assert sent[0].headers["Authorization"] == "Bearer secret"
    with pytest.raises(module.GitHubFailed, match=r"403.*not you"):
        hub.request("POST", "/issues", {"title": "x"})
    assert json.loads(sent[1].data) == {"title": "x"}


# --- the command


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--versions"),
        (["--versions", "newest", "--found", "x.json"], "--found"),
        (["--versions", "latest"], "latest"),
        (["--versions", "mlx==1", "numpy==2"], "numpy==2"),
        (["--versions", "newest", "--file-issue"], "GITHUB_TOKEN"),
        (["--versions", "newest", "--baseline", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_are_refused(script, given, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        script("nightly").arguments(given)
    assert words in capsys.readouterr().err


class Pip:
    """An environment that notes what it is to install."""

    def __init__(self, report: list[str] = ()):
        self.calls: list[tuple[str, ...]] = []
        self._report = report

    def pip(self, *words: str) -> str:
        self.calls.append(words)
        return json.dumps({"install": list(self._report)})


def test_versions_are_asked_of_the_registry_or_the_main_branches(script, monkeypatch):
    nightly = script("nightly")
    monkeypatch.setattr(nightly, "MLX", "mlx[cpu]")
    assert nightly.requirements(["mlx==1.2", "mlx-lm==3"]) == ["mlx[cpu]==1.2", "mlx-lm==3"]
    assert not nightly.will_change(Pip(), ["newest"])
    assert nightly.will_change(Pip(["mlx"]), ["newest"])
    assert not nightly.will_change(Pip(["mlx"]), ["released"])
    for system, built in (("linux", True), ("darwin", False)):
        monkeypatch.setattr(nightly.sys, "platform", system)
        pip = Pip()
        nightly.change(pip, ["main"])
        asked = [" ".join(words) for words in pip.calls]
        assert any("ml-explore/mlx-lm" in words for words in asked)
        assert any(words.endswith("ml-explore/mlx") for words in asked) is built
        assert any("--pre" in words for words in asked) is not built


@pytest.fixture
def whole_run(script, results, monkeypatch, tmp_path):
    """Run `run_all` with an environment that installs nothing and tests whose outcomes are given."""
    nightly = script("nightly")

    def run(versions: list[str], outcomes: dict[str, dict[str, str]], report: list[str], refused: bool = False) -> Any:
        ran: list[tuple[str, list[str]]] = []

        class Made(Pip):
            def __init__(self, folder: Path, log: Path):
                super().__init__(report)

            def pip(self, *words: str) -> str:
                if refused and "numpy" in words:
                    raise nightly.Failed("no such version")
                return super().pip(*words)

            def packages(self) -> dict[str, str]:
                return {"mlx": "2" if len(self.calls) > 2 else "1", "mlx-lm": "5"}

        def run_tests(environment: Made, tests: list[str], args: Any, name: str) -> Any:
            ran.append((name, list(tests)))
            return run_of(results, mlx=environment.packages()["mlx"], **outcomes[name])

        monkeypatch.setattr(nightly, "Environment", Made)
        monkeypatch.setattr(nightly, "new_architectures", lambda environment, args: [])
        monkeypatch.setattr(nightly, "run_tests", run_tests)
        monkeypatch.setattr(nightly, "requirements", lambda versions: ["numpy"] if refused else ["mlx==2"])
        args = SimpleNamespace(out=tmp_path, versions=versions, tests=["tests/test_a.py"], baseline=None)
        return nightly.run_all(args, tmp_path / "environment"), ran

    return run


def test_tests_run_before_and_after_and_what_broke_once_more(whole_run):
    before, after = {"a": "passed", "b": "passed", "c": "passed"}, {"a": "passed", "b": "failed", "c": "failed"}
    outcomes = {"before": before, "after": after, "again": {"b": "failed", "c": "passed"}}
    found, ran = whole_run(["mlx==2"], outcomes, ["mlx"])
    both = ["tests/test_a.py::b", "tests/test_a.py::c"]
    assert ran == [("before", ["tests/test_a.py"]), ("after", ["tests/test_a.py"]), ("again", both)]
    assert (names(found["broke"]), names(found["unsteady"])) == (["b"], ["c"])
    assert (found["changed"], found["asked"]) == ({"mlx": ["1", "2"]}, "mlx==2")


def test_the_released_versions_run_once(whole_run):
    found, ran = whole_run(["newest"], {"after": {"a": "passed", "b": "failed"}}, [])
    assert [name for name, _ in ran] == ["after"]
    assert found["green"]
    assert names(found["failed_before"]) == ["b"]


def test_versions_that_cannot_be_installed_are_not_green(whole_run):
    found, ran = whole_run(["mlx==2"], {"before": {"a": "passed"}}, ["mlx"], refused=True)
    assert ran == []
    assert not found["green"]
    assert "no such version" in found["error"]


def test_tests_get_no_token(script, monkeypatch):
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    kept = script("nightly").clean_environment()
    assert "secret" not in kept.values()
    assert kept["MLX_DISABLE_COMPILE"] == "1"


def test_a_comparison_is_read_again(script, results, tmp_path, capsys):
    nightly, file = script("nightly"), tmp_path / "nightly.json"
    file.write_text(json.dumps(night(results, "a")))
    assert nightly.main(["--found", str(file)]) == 1
    assert "test_a.py::a" in capsys.readouterr().out
    file.write_text(json.dumps(night(results)))
    assert nightly.main(["--found", str(file)]) == 0
    assert nightly.main(["--found", str(file), str(tmp_path / "none.json"), "--expect", "2"]) == 1
    assert "1 of 2" in capsys.readouterr().out


@pytest.fixture
def here(monkeypatch):
    """This environment, with as few of its pytest plugins as possible."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return SimpleNamespace(python=Path(sys.executable), packages=dict)


def test_a_hang_is_ended_and_told(script, here, tmp_path, monkeypatch):
    nightly = script("nightly")
    monkeypatch.setattr(nightly, "GRACE_S", 0.2)  # it does not hear an interrupt
    hang = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ndef test_hang(): time.sleep(600)\n"
    (tmp_path / "test_hang.py").write_text(hang)
    args = SimpleNamespace(out=tmp_path, processes=1, timeout=1.0)
    run = nightly.run_tests(here, [str(tmp_path / "test_hang.py")], args, "after")
    assert "--timeout" in run.error
    assert not run.tests
    assert nightly.Run.read(tmp_path / "after.json") == run


def test_what_ended_before_an_interrupt_is_kept(script, results, here, tmp_path):
    nightly = script("nightly")
    lines = "import os, signal\ndef test_quick(): pass\ndef test_hang(): os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "test_cut.py").write_text(lines)
    args = SimpleNamespace(out=tmp_path, processes=1, timeout=60.0)
    run = nightly.run_tests(here, [str(tmp_path / "test_cut.py")], args, "after")
    assert [test["outcome"] for name, test in run.tests.items() if "test_quick" in name] == ["passed"]
    assert run.error
    assert not results.compare(None, run)["green"]


@pytest.fixture
def metal(script):
    return script("metal_support")


@pytest.fixture
def listed(metal):
    return json.loads(metal.LIST.read_text(encoding="utf-8"))


@pytest.mark.long
def test_nothing_of_ours_asks_a_gpu_for_what_it_lacks(metal, listed):
    used = metal.uses(ROOT / "mlx_lora", listed)
    assert {"linalg.qr", "linalg.eigh", "distributed.all_sum"} <= {use.name for use in used}
    assert [use for use in used if use.guard is None] == []


def test_unguarded_uses_are_found(metal, listed):
    text = """
import mlx.core as mx
a = mx.linalg.svd(x)
b = mx.linalg.inv(x, stream=mx.gpu)
c = mx.zeros(2, dtype=mx.float64)
with mx.stream(mx.cpu):
    d = mx.linalg.qr(mx.zeros(2, dtype=mx.float64))
e = mx.linalg.eigh(x, stream=mx.cpu)
f = mx.linalg.norm(x)
"""
    found = {use.line: use.guard for use in metal.uses_in(text, "a.py", metal.refused(listed))}
    assert [line for line, guard in found.items() if guard is None] == [3, 4, 5]
    assert set(found) == {3, 4, 5, 7, 8}


def test_the_list_knows_the_installed_functions(metal, listed):
    """A name that mlx no longer has would hide the function that took its place."""
    for name in metal.refused(listed) - {"linalg.det", "linalg.slogdet"}:
        owner = mx
        for part in name.split("."):
            owner = getattr(owner, part, None)
        assert owner is not None, name
    assert all(primitive in metal.FUNCTIONS for primitive in [*listed["metal"], *listed["cuda"]])


# --- the page of results


def test_the_page_has_every_committed_result(script):
    page = script("results_page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text) == text, "run python scripts/results_page.py"


WRONG = {  # what a file may not have -> what becomes of it, by the path in it
    "gone": ("device.name", None),
    "a future": ("created", "2099-01-01T00:00:00+0000"),
    "a folder": ("tiers", ["../../etc"]),
    "a table": ("machine.chip", "M2 | <b>"),
    "a path": ("results.0.base.model", "/Users/ada/model"),
    "a virtual Mac": ("device.name", "Apple Paravirtual device"),
    "memory": ("results.0.figures.peak_memory_bytes", 17 << 30),
    "order": ("results.0.figures.tokens_per_s.p10", 5000.0),
    "faster than itself": ("results.0.figures.mfu", 1.7),
    "not its own total": ("results.0.figures.overall_tokens_per_s", 4000.0),
    "far from the plan": ("results.0.predicted.tokens_per_s", 20.0),
    "battery": ("results.0.power_before.source", "battery"),
    "changed files": ("software.commit", "abc-dirty"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_submitted_file_that_cannot_be_is_refused_in_one_line(what, script, tmp_path, capsys):
    page, content, (where, value) = script("results_page"), made_result(), WRONG[what]
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(content))
    *folders, last = where.split(".")
    reduce(lambda part, name: part[int(name) if name.isdecimal() else name], folders, content)[last] = value
    bad.write_text(json.dumps(content))
    assert [page.main(["--check", str(path)]) for path in (good, bad)] == [0, 1]
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(good), str(bad)]


def test_a_submitted_file_comes_into_the_table_with_the_fastest_first(script, tmp_path, monkeypatch):
    page = script("results_page")
    for name, there in (("ROOT", tmp_path), ("RESULTS", tmp_path / "results"), ("PAGE", tmp_path / "results.md")):
        monkeypatch.setattr(page, name, there)
    page.PAGE.write_text(f"above {page.BEGIN} old {page.END} below")
    for speed in (980.0, 1020.0):
        (tmp_path / "one.json").write_text(json.dumps(made_result(entries=[made_entry(speed=speed)])))
        page.main(["--add", str(tmp_path / "one.json")])
    rows = re.findall(r"\| \[(.+?)\]\(.+/(results/\S+)\) \| 16 GB \| \S+ \| ([\d,]+)", page.PAGE.read_text())
    assert [(label, speed, (tmp_path / where).is_file()) for label, where, speed in rows] == [
        ("M2 Pro, 16 GPU cores", speed, True) for speed in ("1,020", "980")
    ]
    assert " old " not in page.PAGE.read_text()


# --- measured figures


def test_the_page_of_measured_figures_is_current(script):
    assert script("measured").main(["--check"]) == 0, "run python scripts/measured.py"


def test_a_changed_figure_changes_every_page_that_quotes_it(script, tmp_path, monkeypatch, capsys):
    measured = script("measured")
    for name, there in (("ROOT", "."), ("FILES", "files"), ("PAGE", "docs/measured.md")):
        monkeypatch.setattr(measured, name, tmp_path / there)
    pages = [tmp_path / "README.md", tmp_path / "docs" / "a.md", tmp_path / "docs" / "b" / "c.md"]
    for path in (*pages, tmp_path / "files" / "speed.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "A <!-- measured: speed.ratio -->old<!-- /measured --> and <!--measured:speed.ratio--><!--/measured-->."
        )
    record = dict.fromkeys(measured.FIELDS, "x") | {"tables": [], "notes": []}
    for value in ("3.0", "2.9"):
        (tmp_path / "files" / "speed.json").write_text(json.dumps(record | {"values": {"ratio": value}}))
        assert [measured.main(["--check"]), measured.main([]), measured.main(["--check"])] == [1, 0, 0]
        assert [re.findall(r"-->([^ ]*)<!--", path.read_text()) for path in pages] == [[value, value]] * 3
    assert "docs/b/c.md is stale" in capsys.readouterr().out
    for key, end, words in (("rate", "<!--/measured-->", "quotes speed.rate, which"), ("ratio", "", "has 1 measured")):
        pages[1].write_text(f"A <!--measured:speed.{key}-->1{end}")
        with pytest.raises(SystemExit, match=f"Error: docs/a.md {words}"):
            measured.main([])
