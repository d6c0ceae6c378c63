"""Settings and what all commands share: precedence, JSON, color, pipes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from conftest import tiny_model, write_folder
from make_adapters import adapt_and_save
from mlx.utils import tree_flatten
from run_cli import one_line, run

from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.supervise import last_given, smaller


@pytest.fixture
def resolve(tmp_path):
    """Resolve flags over the text of a settings file, as the commands do."""

    def resolve(flags: dict, text: str):
        (tmp_path / "c.yaml").write_text(text)
        return train_settings(flags, read_settings(str(tmp_path / "c.yaml"), flags))

    return resolve


def test_flag_beats_file_beats_default(resolve):
    settings = resolve({"rank": 8}, "rank: 4\nlearning-rate: 1e-3\nsave_every: 1e2\n")
    assert (settings.adapter.rank, settings.optimizer.learning_rate, settings.loop.save_every) == (8, 1e-3, 100)
    assert settings.adapter.alpha == 32


def test_iters_and_epochs_are_one_setting_with_two_names(resolve):
    settings = resolve({"iters": 5}, "epochs: 3\n")
    assert (settings.loop.iters, settings.loop.epochs) == (5, None)
    settings = resolve({"epochs": 3.0}, "iters: 5\n")
    assert (settings.loop.iters, settings.loop.epochs) == (None, 3.0)
    with pytest.raises(InputError, match="--iters 5 with --epochs 3"):
        resolve({}, "iters: 5\nepochs: 3\n")


def test_large_seeds_are_kept_exactly(resolve):
    for seed in (2**53 + 1, 2**63 - 1):
        assert train_settings({"seed": seed}).loop.seed == seed
        assert resolve({}, f"seed: {seed}\n").loop.seed == seed
    with pytest.raises(InputError, match="--seed"):
        train_settings({"seed": 2**63})


def test_json_is_json_even_of_a_broken_model(tmp_path, chats):
    model = tiny_model()
    model.load_weights(
        [(n, v * math.nan) for n, v in tree_flatten(model.parameters()) if n.endswith("norm.weight")], strict=False
    )
    folder = write_folder(tmp_path / "nan", model)
    ran = run("evaluate", "--model", folder, "--data", chats, "--json")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(ran.out, parse_constant=refuse)["loss"] is None
    assert console.perplexity(1000.0) == math.inf
    assert console.perplexity(1.0) == pytest.approx(math.e)


@pytest.mark.parametrize(("terminal", "variables", "colored"), [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False),
])  # fmt: skip
def test_color_on_terminals_that_want_it(monkeypatch, terminal, variables, colored):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: terminal, raising=False)
    assert console.wants_color() is colored


def test_a_long_error_loses_its_middle_between_words():
    words = " ".join(f"word{number}" for number in range(300))
    shown = console.printable(words, 200)
    assert len(shown) <= 205
    first, last = shown.split(" ... ")
    assert set(first.split()) | set(last.split()) < set(words.split())
    assert words.startswith(first)
    assert words.endswith(last)
    assert console.printable("x" * 300, 200) == "x" * 150 + " ... " + "x" * 50
    assert console.printable("x" * 200, 200) == "x" * 200


@pytest.mark.long
def test_a_reader_that_leaves_gets_no_complaint(tiny_folder):
    command = [
        sys.executable,
        "-m",
        "mlx_lora",
        "generate",
        "--model",
        tiny_folder,
        "--prompt",
        "x",
        "--max-tokens",
        "400",
    ]
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


IMPORT = "import time; begun = time.process_time(); import mlx_lora, sys; print(time.process_time() - begun, {'mlx', 'numpy'} & {*sys.modules} or '')"
HELP = """
import sys, time
from mlx_lora.__main__ import main
try:
    main(["--help"])
except SystemExit:
    print(time.process_time(), "mlx" if "mlx" in sys.modules else "", file=sys.stderr)
"""


@pytest.mark.parametrize(("code", "limit_s"), [(IMPORT, 0.1), (HELP, 0.3)])
def test_the_package_and_its_help_come_at_once(code, limit_s):
    """In processor time, so that other programs do not count; the best of five, and for the help from the process's start."""
    words = [sys.executable, "-c", code]
    ran = [subprocess.run(words, capture_output=True, text=True, timeout=60, check=True) for _ in range(5)]
    assert min(float((one.stdout if code is IMPORT else one.stderr).split()[-1]) for one in ran) < limit_s
    assert ("Usage: " in ran[0].stdout) == (code is HELP)


@pytest.mark.parametrize("second", ["--adapter-path", "--adapter"])
def test_an_option_of_one_value_is_not_given_twice(second, tmp_path):
    ran = run("fuse", "--model", "m", "--adapter-path", "a", second, "b", "--out", tmp_path / "out", exactly=True)
    one_line(ran, "--adapter-path", second, "chat", "--blend")  # and what takes several
    one_line(run("train", "--rank", 4, "--rank=8", "--model", "m", exactly=True), "--rank")
    assert "--rank" not in run("train", "--rank", 4, "--model", "m").err
    # Options that may be repeated still are.
    assert "--adapter" not in run("chat", "--model", tmp_path / "none", "--blend", "c=a:1", "--blend", "d=a:1").err


@pytest.mark.parametrize(
    "written", [("--adapter-path", ""), ("--adapter", ""), ("--adapter", "b="), ("--adapter-path", "b=")]
)
def test_an_adapter_is_named_the_same_way_in_every_command_that_reads_one(written, tiny_folder, chats, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a")
    given = ("--model", tiny_folder, written[0], f"{written[1]}{tmp_path / 'a'}")
    evaluated = run("evaluate", *given, "--data", chats, "--json")
    plain = run("evaluate", "--model", tiny_folder, "--data", chats, "--json")
    assert json.loads(evaluated.out)["loss"] != json.loads(plain.out)["loss"]
    assert run("generate", *given, "--prompt", "Say 1.", "--max-tokens", 2).code == 0
    assert run("export", *given, "--to", "peft", "--out", tmp_path / "peft").code == 0
    assert run("fuse", *given, "--out", tmp_path / "fused").code == 0
    assert "cannot" not in run("chat", *given, "--temp", "inf").err


@pytest.mark.parametrize("flag", ["--adapter", "--adapter-path"])
def test_chat_and_serve_take_both_spellings(flag, tiny_folder, tmp_path):
    for command in ("chat", "serve"):
        one_line(run(command, "--model", tiny_folder, flag, f"b={tmp_path / 'none'}"), str(tmp_path / "none"))


def test_flags_at_the_end_of_a_composed_command_take_the_place_of_its_own():
    begun = [
        "python",
        "-m",
        "mlx_lora.train",
        "--rank=4",
        "--grad-checkpoint",
        "none",
        "-c",
        "a.yaml",
        "--force",
        "--resume",
        "--seed",
        "-1",
    ]
    restarted = last_given([*begun, "--resume", *smaller(2)])
    assert restarted == [
        "python", "-m", "mlx_lora.train", "--rank=4", "-c", "a.yaml", "--force", "--seed", "-1",
        "--resume", "--batch-parts", "2", "--grad-checkpoint", "block",
    ]  # fmt: skip
    assert last_given(["--rank", "4", "--rank=8"]) == ["--rank=8"]
    repeated = ["serve", "--adapter", "a", "--adapter", "b"]
    assert last_given(repeated) == repeated
