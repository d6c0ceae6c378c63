"""The wheel in a fresh environment and an empty folder: what it holds, and that the commands work from it."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

import mlx_lora

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
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
