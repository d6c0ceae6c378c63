"""The Python API: the same results as the commands, a base that can be used again, and errors in Python's words."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest
import yaml
from run_cli import run, succeeds

import mlx_lora
from mlx_lora.api.base import python_words
from mlx_lora.api.train import data_source
from mlx_lora.trainer.guards import interrupt_flag
from mlx_lora.trainer.progress import NotebookProgress, display_here
from mlx_lora.utils import errors

QUICK = {"iters": 6, "learning_rate": 5e-3, "batch_tokens": 256, "max_seq_length": 128, "steps_per_report": 2}
QUICK |= {"sample_tokens": 0, "save_every": 0}
FLAGS = [part for name, value in QUICK.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def base(tiny_folder):
    return mlx_lora.load(tiny_folder)


@pytest.fixture(scope="module")
def trained(base, chats, tmp_path_factory):
    return mlx_lora.train(base, chats, tmp_path_factory.mktemp("api") / "a", progress=False, **QUICK)


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def test_command_and_api_train_to_the_same_bytes(trained, tiny_folder, chats, tmp_path):
    def command(name: str, *more) -> bytes:
        common = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / name, *FLAGS)
        succeeds(*common, *more)
        return weights(tmp_path / name)

    assert command("same") == weights(trained.adapter)
    assert command("other", "--seed", 1) != weights(trained.adapter)
    files = [yaml.safe_load((folder / "run.yaml").read_text()) for folder in (trained.adapter, tmp_path / "same")]
    assert {name for name in files[0] if files[0][name] != files[1][name]} == {"adapter_path"}
    assert trained.settings == files[0]


def test_a_run_has_its_losses_and_files(trained):
    lines = [json.loads(line) for line in (trained.adapter / "metrics.jsonl").read_text().splitlines()]
    assert trained.metrics == lines
    assert trained.losses == [line["loss"] for line in lines if line["loss"] is not None]
    assert trained.val_losses == [line["val_loss"] for line in lines if line["val_loss"] is not None]
    assert (len(trained.losses), len(trained.val_losses), trained.steps) == (3, 2, 6)
    assert trained.losses[-1] < trained.losses[0]
    assert trained.val_loss == trained.val_losses[-1]
    assert trained.report.read_text().startswith("<!doctype html>")
    page = trained._repr_html_()
    assert page.count("<polyline") == 2  # both curves
    assert str(trained.adapter) in page


def test_the_base_is_as_it_was_after_training(base, trained, chats, capfd):
    """A second run of the same rows, given as records and in a folder of its own, ends with the same bytes."""
    before = base.generate("Say 1.", max_tokens=6)
    records = [json.loads(line) for line in chats.read_text().splitlines()]
    again = mlx_lora.train(base, records, progress=False, **QUICK)
    assert capfd.readouterr() == ("", "")
    assert weights(again.adapter) == weights(trained.adapter)
    assert again.adapter.is_relative_to(os.environ["MLX_LORA_CACHE"])
    assert base.generate("Say 1.", max_tokens=6) == before
    with_adapter = base.generate("Say 1.", adapter=trained.adapter, max_tokens=6)
    assert with_adapter != before
    assert mlx_lora.generate(base, "Say 1.", max_tokens=6) == before  # and not the adapter used last
    out = run("generate", "--model", base.folder, "--adapter-path", trained.adapter, "-p", "Say 1.", "-m", 6, "--json")
    assert json.loads(out.out)["text"] == with_adapter


def test_sampling_repeats_with_its_seed(base):
    texts = [base.generate("x", temperature=1.0, seed=seed, max_tokens=8) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.long
def test_evaluate_plan_and_export_give_what_the_commands_give(base, trained, chats, tiny_folder, tmp_path):
    alone = mlx_lora.evaluate(base, chats)
    ours = mlx_lora.evaluate(base, chats, trained.adapter)
    theirs = run("evaluate", "--model", tiny_folder, "--adapter-path", trained.adapter, "--data", chats, "--json")
    assert ours == json.loads(theirs.out)
    assert ours["loss"] < alone["loss"] == mlx_lora.evaluate(base, chats)["loss"]
    flags = ("--chip", "M2 Pro", "--rank", 4, "--max-seq-length", 64, "--json")
    planned = mlx_lora.plan(base, chip="M2 Pro", rank=4, max_seq_length=64)
    assert json.loads(json.dumps(planned)) == json.loads(run("plan", "--model", tiny_folder, *flags).out)
    assert (planned["settings"]["rank"], planned["settings"]["max_seq_length"]) == (4, 64)
    file = mlx_lora.export(base, trained.adapter, to="peft", out=tmp_path / "ours") / "adapter_model.safetensors"
    flags = ("--model", tiny_folder, "--adapter-path", trained.adapter, "--to", "peft", "--out", tmp_path / "theirs")
    assert run("export", *flags).code == 0
    assert file.read_bytes() == (tmp_path / "theirs" / file.name).read_bytes()
    with pytest.raises(ValueError, match="force=True"):
        mlx_lora.export(base, trained.adapter, to="peft", out=tmp_path / "ours")


def test_bits_quantize_while_loading_as_convert_does(tiny_folder, tiny_4bit_folder, base, tmp_path):
    assert run("convert", "--model", tiny_folder, "--out", tmp_path / "4bit", "--bits", 4).code == 0
    small = mlx_lora.load(tiny_folder, bits=4)
    assert (small.folder / "model.safetensors").read_bytes() == (tmp_path / "4bit/model.safetensors").read_bytes()
    assert small.loaded.quantization["bits"] == 4
    assert base.loaded.quantization is None
    made = (small.folder / "config.json").stat().st_mtime_ns
    assert mlx_lora.load(tiny_folder, bits=4).folder == small.folder
    assert (small.folder / "config.json").stat().st_mtime_ns == made
    assert mlx_lora.load(tiny_4bit_folder, bits=4).folder == tiny_4bit_folder
    with pytest.raises(ValueError, match=r"bits=8: .* already quantized \(4 bits\); leave bits out"):
        mlx_lora.load(tiny_4bit_folder, bits=8)


class Table:
    """What a datasets.Dataset offers, and a data frame: iterating over it gives no records."""

    def to_list(self):
        return [{"prompt": "a", "completion": "b"}]

    def __iter__(self):
        raise AssertionError("its values depend on its format")


def test_data_may_be_records_a_data_set_or_splits(chats):
    assert data_source(chats) == str(chats)
    assert data_source("owner/name") == "owner/name"
    rows = [{"prompt": "a", "completion": "b"}]
    file = data_source(rows)
    assert Path(file).read_text() == '{"prompt": "a", "completion": "b"}\n'
    assert data_source(Table()) == data_source(iter(rows)) == file
    assert data_source([*rows, *rows]) != file
    folder = Path(data_source({"train": rows, "validation": Table()}))
    assert sorted(path.name for path in folder.iterdir()) == ["train.jsonl", "valid.jsonl"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"prompt": "a"}, "a dict with prompt; give a list of records"),
        (["a"], r"train record 1: found str"),
        ([{"a": 1}, {"b": {1}}], "train record 2: .*set.* keep texts"),
        ([{"a": float("nan")}], "train record 1: .*keep texts"),
        (3, "found int; give a path"),
        ("no.jsonl", r'data="no.jsonl": no such file'),
    ],
)
def test_bad_data_are_named(base, data, words):
    with pytest.raises(ValueError, match=words):
        mlx_lora.train(base, data, iters=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 1e-3}, "unknown setting 'lr'; use 'learning_rate'"),
        ({"lora_r": 8, "rank": 0}, r"'lora_r'; use 'rank'; rank=0: must be at least 1"),
        ({"load_in_4bit": True}, "load the model with bits=4"),
        ({"method": "qlora"}, 'use method="lora", and load the model with bits=4'),
        ({"dtype": "float32"}, "dtype: belongs to the model; give it to mlx_lora.load"),
        ({"test": True}, "test: not available in Python; call mlx_lora.evaluate"),
        ({"iters": 1, "epochs": 1}, "iters=1 with epochs=1"),
        ({"objective": "dpo", "mask_prompt": False}, 'mask_prompt=False with objective="dpo"'),
        ({"resume": "auto"}, "without adapter_path"),
        ({"report_to": "nothing"}, 'report_to="nothing": only tensorboard, trackio, wandb, swanlab'),
    ],
)
def test_wrong_settings_are_answered_in_pythons_words(base, chats, settings, words):
    with pytest.raises(mlx_lora.InputError, match=words):
        mlx_lora.train(base, chats, **settings)


def test_other_wrong_arguments(base, trained, chats, monkeypatch):
    with pytest.raises(ValueError, match=r"adapter_path=.*already holds an adapter; .*force=True"):
        mlx_lora.train(base, chats, trained.adapter, **QUICK)
    with pytest.raises(ValueError, match=r"temperature=-1: .*; top_p=2: must"):
        base.generate("x", temperature=-1, top_p=2)
    with pytest.raises(ValueError, match='adapter="/nowhere": no such folder'):
        base.generate("x", adapter="/nowhere")
    with pytest.raises(ValueError, match="train: found int"):
        mlx_lora.train(3, chats)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    monkeypatch.setenv("MLX_HOSTFILE", "/nowhere")
    with pytest.raises(ValueError, match=r"launcher|MLX_HOSTFILE"):
        mlx_lora.train(base, chats)


def test_flags_become_arguments():
    words = (
        "--no-mask-prompt with --objective dpo: no; give --adapter-path and --resume, or --force, or leave --rank out"
    )
    spelled = (
        'mask_prompt=False with objective="dpo": no; give adapter and resume="auto", or force=True, or leave rank out'
    )
    assert python_words(words, {"adapter_path": "adapter"}) == spelled
    assert issubclass(mlx_lora.InputError, errors.InputError | ValueError)
    assert not issubclass(errors.InputError, ValueError)  # or code that expects one would swallow it


def test_plot_draws_both_curves_or_says_what_is_missing(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(mlx_lora.InputError, match=r"pip install 'mlx-lora\[plots\]'"):
        trained.plot()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    (axes,) = trained.plot().axes
    assert [list(line.get_ydata()) for line in axes.lines] == [trained.losses, trained.val_losses]


def test_a_notebook_shows_a_bar_and_the_curve(base, chats, tmp_path, monkeypatch):
    shells = pytest.importorskip("IPython.core.interactiveshell")
    capture = pytest.importorskip("IPython.utils.capture")
    assert display_here() is not NotebookProgress
    shell = shells.InteractiveShell.instance()
    monkeypatch.setattr(shell, "kernel", object(), raising=False)  # as a notebook's shell has
    try:
        with capture.capture_output() as shown:
            done = mlx_lora.train(base, chats, tmp_path / "a", **QUICK)
    finally:
        shells.InteractiveShell.clear_instance()
    first, *_, last = (output.data["text/html"] for output in shown.outputs)
    assert 'value="0" max="6"' in first
    assert 'value="6" max="6"' in last
    assert last.count("<polyline") == 2
    assert f"val loss {done.val_loss:.4f}" in last
    assert "6 steps done" in shown.stdout
    assert shown.stderr == ""


def test_training_in_another_thread_is_never_interrupted():
    asked: list[bool] = []

    def enter() -> None:
        with interrupt_flag() as flag:
            asked.append(flag())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert asked == [False]


def test_importing_a_command_does_not_hide_the_function_of_its_name():
    for name in ("train", "generate", "evaluate", "plan", "export"):
        assert isinstance(importlib.import_module(f"mlx_lora.cli.{name}"), types.ModuleType)
        assert name != "train" or callable(importlib.import_module("mlx_lora.train"))  # what python -m runs
        assert isinstance(getattr(mlx_lora, name), types.FunctionType)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mlx_lora.trian  # noqa: B018


def test_editors_see_the_same_names_as_python():
    tree = ast.parse(Path(mlx_lora.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    assert seen == mlx_lora._HOMES
    assert sorted({*seen, "BLAS"}) == sorted(mlx_lora.__all__)
    assert all(callable(getattr(mlx_lora, name)) for name in seen)
