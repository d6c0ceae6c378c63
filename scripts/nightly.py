"""Run the tests against other versions of mlx, mlx-lm and mlx-vlm than the released ones, and say what these break and what is new.

    python scripts/nightly.py --versions newest                         the newest of the registry, pre-releases too
    python scripts/nightly.py --versions main --out nightly             the main branches (mlx is built where it is quick)
    python scripts/nightly.py --versions mlx==0.32.3 --tests tests/trainer/test_step.py tests/losses/test_fused.py
    python scripts/nightly.py --found a/nightly.json b/nightly.json --expect 2 --file-issue

A new environment gets this checkout with the released versions, and the tests run in it; then it gets the other versions, and
they run again, and architectures that docs/models.md does not name are tried (scripts/new_architecture.py). A test that passed before and does not now runs once more: if it passes then, it is listed as unsteady.
Writes nightly.json, nightly.md, and the results of both runs (before.json is a --baseline of later runs) into --out. The exit
code is 1 if a test broke. --file-issue keeps one open GitHub issue with what broke, and closes it when nothing does; it
reads GITHUB_TOKEN and GITHUB_REPOSITORY. Python's own library is enough for all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _nightly_issue import GitHub, GitHubFailed, update_issue
from _nightly_results import ROOT, Run, compare, read_junit, render

WATCHED = ("mlx", "mlx-lm", "mlx-vlm")
MAIN = {
    "mlx": "mlx @ git+https://github.com/ml-explore/mlx",
    "mlx-lm": "mlx-lm @ git+https://github.com/ml-explore/mlx-lm",
    "mlx-vlm": "mlx-vlm @ git+https://github.com/Blaizzy/mlx-vlm",
}
# mlx's wheel for Linux has no backend of its own.
MLX = "mlx[cpu]" if sys.platform == "linux" else "mlx"
AS_IN_CI = "not slow and not parity and not metal and not cuda"  # `make test` and `make test-long`
HANGS_S = 900  # a test that takes longer has its stack written to the log
GRACE_S = 30.0
LISTING = """
import json
from importlib import metadata
found = {}
for package in metadata.distributions():
    source = json.loads(package.read_text("direct_url.json") or "{}")
    commit = source.get("vcs_info", {}).get("commit_id", "")
    found[package.name.lower()] = package.version + (f" ({commit[:10]})" if commit else "")
print(json.dumps(found))
"""


class Failed(RuntimeError):
    """A step before the tests failed; the message has the end of its output."""


class Environment:
    """A virtual environment that is made for this run.

    Attributes:
        python: its interpreter.
        log: takes the output of all commands but the tests'.
    """

    def __init__(self, folder: Path, log: Path):
        self.python, self.log = folder / "bin" / "python", log
        self._run([sys.executable, "-m", "venv", "--clear", str(folder)])
        self.pip("install", "--quiet", "--upgrade", "pip")

    def pip(self, *arguments: str) -> str:
        """Run pip and return its standard output."""
        return self._run([str(self.python), "-m", "pip", *arguments])

    def packages(self) -> dict[str, str]:
        """Return the version of every package, with the commit if it came from a repository."""
        return json.loads(self._run([str(self.python), "-c", LISTING]))

    def _run(self, command: list[str]) -> str:
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean_environment())
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{ended.stdout}{ended.stderr}\n")
        if ended.returncode:
            last = "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-12:])
            raise Failed(f"{' '.join(command[1:5])} ... ended with {ended.returncode}:\n{last}")
        return ended.stdout


def clean_environment() -> dict[str, str]:
    """Return this process's variables without those that would bring other packages or the token in."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PYTEST_ADDOPTS", "GITHUB_TOKEN", "GH_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), **kept}  # mlx's build takes one core otherwise


def requirements(versions: Sequence[str]) -> list[str]:
    """Return what pip has to install for --versions, all but the main branches."""
    if list(versions) == ["newest"]:
        return ["--upgrade", "--pre", MLX, "mlx-lm", "mlx-vlm"]
    return [f"{MLX}{text[3:]}" if text.startswith("mlx==") else text for text in versions]


def will_change(environment: Environment, versions: Sequence[str]) -> bool:
    """Return whether --versions are others than the released ones, which are installed."""
    if list(versions) == ["released"]:
        return False
    if list(versions) == ["main"]:
        return True
    report = environment.pip("install", "--quiet", "--dry-run", "--report", "-", *requirements(versions))
    return bool(json.loads(report)["install"])


def change(environment: Environment, versions: Sequence[str]) -> None:
    """Replace the released packages.

    The main branches of mlx-lm and mlx-vlm are Python alone. mlx's is built on Linux, where only its CPU backend is compiled. On a Mac its Metal
    kernels would be compiled too, on a hosted runner's three cores and for its virtual GPU: there the registry's newest
    pre-release serves.
    """
    if list(versions) != ["main"]:
        environment.pip("install", "--quiet", *requirements(versions))
        return
    environment.pip("install", "--quiet", "--upgrade", MAIN["mlx-lm"], MAIN["mlx-vlm"])
    if sys.platform != "linux":
        environment.pip("install", "--quiet", "--upgrade", "--pre", MLX)
        return
    # The wheels keep the library in a package of its own, whose file the built one would have to share.
    environment.pip("uninstall", "--quiet", "--yes", "mlx", "mlx-cpu")
    environment.pip("install", "--quiet", "--no-deps", MAIN["mlx"])


def run_tests(environment: Environment, tests: Sequence[str], args: argparse.Namespace, name: str) -> Run:
    """Run pytest in the environment; its output goes to NAME.log, what it found is returned and goes to NAME.json."""
    junit, log = args.out / f"{name}.xml", args.out / f"{name}.log"
    junit.unlink(missing_ok=True)
    command = [str(environment.python), "-m", "pytest", "-m", AS_IN_CI, "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command += ["--continue-on-collection-errors", "-o", f"faulthandler_timeout={HANGS_S}"]
    command += ["-n", str(args.processes), "--dist", "loadfile"] if args.processes > 1 else []
    variables = {**clean_environment(), "OPENBLAS_NUM_THREADS": "1"}  # as `make test` does
    start, error = time.monotonic(), None
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [*command, *tests], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=variables, start_new_session=True
        )
        try:
            code = child.wait(args.timeout)
        except subprocess.TimeoutExpired:
            code, error = end(child), f"the tests took longer than {args.timeout:g} s (--timeout)"
    found = read_junit(junit) if junit.exists() else {}
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:])
    if error is not None:
        error = f"{error}; the end of its output:\n{last}"
    elif code not in (0, 1) or not found:
        error = f"pytest ended with {code}:\n{last}"
    run = Run(environment.packages(), found, round(time.monotonic() - start, 1), error)
    run.write(args.out / f"{name}.json")
    say(f"{name}: {run.summary()} in {run.seconds:.0f} s")
    return run


def end(child: subprocess.Popen) -> int:
    """End pytest and its workers, and return its code: it first gets the time to write what it has."""
    for stop in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(child.pid, stop)
            return child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    return child.wait()


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the environment, run the tests before and after the change of versions, and return what was found."""
    log = args.out / "install.log"
    log.unlink(missing_ok=True)
    say(f"installing this checkout with the released versions into {folder}")
    environment = Environment(folder, log)
    environment.pip("install", "--quiet", "--editable", f"{ROOT}[dev]")
    before = Run.read(args.baseline) if args.baseline else None
    released = environment.packages()
    say(f"released: {', '.join(f'{name} {released.get(name)}' for name in WATCHED)}")
    facts = {"asked": " ".join(args.versions), "platform": platform.platform(), "python": platform.python_version()}
    facts |= {"commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "tests_asked": args.tests}
    try:
        changes = will_change(environment, args.versions)
        if changes:
            before = before or run_tests(environment, args.tests, args, "before")
            say(f"installing {facts['asked']}")
            change(environment, args.versions)
            now = environment.packages()
            say(f"installed: {', '.join(f'{name} {now.get(name)}' for name in WATCHED)}")
        else:
            say(f"{facts['asked']}: these are the released versions, so there is one run")
    except Failed as error:
        say(f"Error: {error}")
        return {**facts, **compare(before, Run(released, {}, 0.0, f"{facts['asked']} could not be installed: {error}"))}
    after = run_tests(environment, args.tests, args, "after")
    found = compare(before or after, after)
    if found["broke"] and not after.error:
        say(f"{len(found['broke'])} tests broke; they run once more")
        again = run_tests(environment, [row["test"] for row in found["broke"]], args, "again")
        found = compare(before or after, after, again)
    found["new"] = new_architectures(environment, args) if changes and not after.error else []
    return {**facts, **found, "green": found["green"] and not found["new"]}


def new_architectures(environment: Environment, args: argparse.Namespace) -> list[str]:
    """Try the architectures that docs/models.md does not name, and return their rows for it."""
    command = [str(environment.python), "scripts/new_architecture.py", "--new"]
    with (args.out / "new.log").open("w", encoding="utf-8") as log:
        try:
            ended = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=clean_environment(),
                timeout=args.timeout,
            )
        except subprocess.TimeoutExpired:
            return [f"no result after {args.timeout:g} s (--timeout)"]
    rows = [line for line in ended.stdout.splitlines() if line.strip()]
    say(f"new architectures: {sum(row.startswith('|') for row in rows)}")
    return rows or (
        [f"scripts/new_architecture.py ended with {ended.returncode}; see new.log"] if ended.returncode else []
    )


def commit() -> str:
    """Return this checkout's commit, empty outside of git."""
    command = ["git", "describe", "--always", "--dirty"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.stdout.strip()


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", help="newest, main, released, or mlx==VERSION and mlx-lm==VERSION")
    parser.add_argument("--found", nargs="+", type=Path, default=[], metavar="JSON", help="take these; run nothing")
    parser.add_argument("--expect", type=int, default=1, help="with --found: how many there must be (default 1)")
    parser.add_argument("--tests", nargs="+", default=[], help="files or ids of tests (default: all that CI runs)")
    parser.add_argument(
        "--baseline", type=Path, help="before.json of an earlier run, instead of a run before the change"
    )
    parser.add_argument("--out", type=Path, default=Path("nightly"), help="folder of the results (default: nightly)")
    parser.add_argument("--environment", type=Path, help="folder of the environment (default: a temporary one)")
    parser.add_argument("--processes", type=int, default=2, help="of pytest (default 2)")
    parser.add_argument("--timeout", type=float, default=5400, help="seconds for one run of the tests (default 5400)")
    parser.add_argument("--file-issue", action="store_true", help="open, update or close the issue on GitHub")
    args = parser.parse_args(argv)
    if bool(args.versions) == bool(args.found):
        parser.error("give --versions to run the tests, or --found with what earlier runs found")
    named = args.versions or []
    if len(named) != 1 or named[0] not in ("newest", "main", "released"):
        wrong = [text for text in named if text.partition("==")[0] not in WATCHED or not text.partition("==")[2]]
        if wrong:
            parser.error(f"--versions {' '.join(wrong)}: give newest, main, released, or mlx==VERSION mlx-lm==VERSION")
    missing = [name for name in ("GITHUB_TOKEN", "GITHUB_REPOSITORY") if args.file_issue and not os.environ.get(name)]
    if missing:
        parser.error(f"--file-issue reads {' and '.join(missing)} from the environment; set it")
    if args.baseline and not args.baseline.is_file():
        parser.error(f"--baseline {args.baseline}: no such file; give the before.json of an earlier run")
    return args


def say(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Run or read, report, and return 0, or 1 if something broke."""
    args = arguments(argv)
    expected = args.expect if args.found else 1
    if args.found:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in args.found if path.is_file()]
    else:
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        folder = args.environment or Path(tempfile.mkdtemp(prefix="nightly-"))
        try:
            found = [run_all(args, folder)]
        except Failed as error:
            say(f"Error: {error}")
            return 1
        finally:
            if args.environment is None:
                shutil.rmtree(folder, ignore_errors=True)
        (args.out / "nightly.json").write_text(json.dumps(found[0], indent=1), encoding="utf-8")
        (args.out / "nightly.md").write_text(render(found, expected), encoding="utf-8")
    print(render(found, expected))
    green = len(found) >= expected and all(row["green"] for row in found)
    if args.file_issue:
        try:
            hub = GitHub(os.environ["GITHUB_REPOSITORY"], os.environ["GITHUB_TOKEN"])
            say(update_issue(hub, found, expected))
        except GitHubFailed as error:
            say(f"Error: {error}")
            return 1
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
