"""Callbacks: what they are told, what their errors do to a run, and the loggers that are made of them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from run_cli import one_line, run

import mlx_lora
from mlx_lora.trainer.callbacks import EVENTS, numbers_of

QUICK = {"iters": 4, "learning_rate": 5e-3, "batch_tokens": 256, "max_seq_length": 128, "steps_per_report": 2}
QUICK |= {"sample_tokens": 0, "progress": False, "val_batches": 1}


@pytest.fixture(scope="module")
def base(tiny_folder):
    return mlx_lora.load(tiny_folder)


class Recorder(mlx_lora.Callback):
    """Notes every event, and raises at one of them."""

    def __init__(self, fails_at: str = "", step: int = 0):
        self.told: list[tuple[str, dict]] = []
        self.fails_at, self.step = fails_at, step

    def note(self, event: str, facts: dict) -> None:
        self.told.append((event, facts))
        if event == self.fails_at and facts.get("step", 0) == self.step:
            raise ZeroDivisionError("of mine")


for event in EVENTS:
    setattr(Recorder, event, lambda self, facts, event=event: self.note(event, facts))


@pytest.fixture(scope="module")
def whole(base, chats, tmp_path_factory):
    recorder, out = Recorder(), tmp_path_factory.mktemp("whole") / "a"
    return mlx_lora.train(base, chats, out, callbacks=[recorder], save_every=2, **QUICK), recorder


def test_a_run_tells_each_event_once(whole):
    done, recorder = whole
    assert [(event, facts.get("step")) for event, facts in recorder.told] == [
        ("on_start", None), ("on_validation", 0), ("on_step", 1), ("on_step", 2), ("on_report", 2), ("on_save", 2),
        ("on_step", 3), ("on_step", 4), ("on_report", 4), ("on_validation", 4), ("on_save", 4), ("on_end", None),
    ]  # fmt: skip
    told = dict(recorder.told)  # the last of each
    assert told["on_start"]["settings"]["rank"] == 16
    assert told["on_start"]["settings"] == done.settings
    assert told["on_step"] == {"step": 4, "steps": 4}
    assert told["on_report"] == done.metrics[-2]
    assert told["on_validation"]["val_loss"] == done.val_loss
    where = str(done.adapter)
    assert told["on_end"] == {
        "adapter_path": where, "error": None, "steps": 4, "val_loss": done.val_loss, "interrupted": False,
        "stopped_early": False,
    }  # fmt: skip
    assert [p.name for p in sorted((done.adapter / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_an_error_in_a_callback_ends_the_run_with_a_checkpoint_that_resumes_to_the_same_bytes(
    base, chats, whole, tmp_path
):
    failing, other = Recorder("on_step", 1), Recorder()
    with pytest.raises(mlx_lora.RunError, match=r"ZeroDivisionError: of mine.*step 1 is saved.*resume") as caught:  # fmt: skip
        mlx_lora.train(base, chats, tmp_path / "a", callbacks=[failing, other], **QUICK)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert (tmp_path / "a/checkpoints/step-000001").is_dir()
    assert other.told[-1][0] == "on_end"
    assert "of mine" in other.told[-1][1]["error"]
    mlx_lora.train(base, chats, tmp_path / "a", resume="auto", **QUICK)
    folders = (tmp_path / "a", whole[0].adapter, tmp_path / "a/checkpoints/step-000001")
    resumed, straight, one = ((folder / "adapters.safetensors").read_bytes() for folder in folders)
    assert resumed == straight != one


@pytest.mark.parametrize(
    ("event", "kept"),
    [pytest.param("on_start", "nothing is saved yet", marks=pytest.mark.slow), ("on_end", "run itself is complete")],
)
def test_an_error_before_or_after_the_steps(base, chats, tmp_path, event, kept):
    with pytest.raises(mlx_lora.RunError, match=rf"Recorder\.{event} failed.*{kept}"):
        mlx_lora.train(base, chats, tmp_path / "a", callbacks=[Recorder(event)], **QUICK)
    assert (tmp_path / "a/adapters.safetensors").exists() == (event == "on_end")


class Misspelled(mlx_lora.Callback):
    def on_step_end(self, facts):
        """Never called."""


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Misspelled(), r"Misspelled\.on_step_end is never called; did you mean on_step\?"),
        (Recorder, "Recorder is a class or function; give instances"),
        ("tensorboard", "found str; give instances"),
    ],
)
def test_callbacks_that_could_not_work_are_refused(base, chats, callback, words):
    with pytest.raises(mlx_lora.InputError, match=words):
        mlx_lora.train(base, chats, callbacks=[callback], **QUICK)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of TensorBoard's event files: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_gets_every_report(base, chats, tmp_path):
    pytest.importorskip("tensorboardX")
    board = mlx_lora.TensorBoard(tmp_path / "board")
    done = mlx_lora.train(base, chats, tmp_path / "a", callbacks=[board], report_to="tensorboard", **QUICK)
    found = scalars(tmp_path / "board")
    assert [step for step, _ in found["train/loss"]] == [2, 4]
    assert [value for _, value in found["train/loss"]] == pytest.approx(done.losses, rel=1e-6)
    assert [value for _, value in found["valid/loss"]] == pytest.approx(done.val_losses, rel=1e-6)
    assert "train/tokens_per_s" in found
    assert "valid/tokens_per_s" not in found
    assert scalars(tmp_path / "a/tensorboard") == found  # what --report-to writes


def test_numbers_that_are_not_finite_are_left_out():
    facts = {"step": 3, "loss": float("nan"), "val_loss": None, "shapes": ["2x3"], "epoch": 0.5, "learning_rate": 0.1}
    assert numbers_of(facts, "train") == {"train/epoch": 0.5, "train/learning_rate": 0.1}
    assert numbers_of({**facts, "val_loss": 2.0}, "valid") == {"valid/epoch": 0.5, "valid/loss": 2.0}


def test_a_logger_that_is_not_there_is_named_before_the_model_is_read(chats, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    asked = ("train", "--model", "/nowhere", "--data", chats, "--adapter-path", tmp_path / "a")
    one_line(run(*asked, "--report-to", "trackio"), "--report-to trackio", "pip install 'mlx-lora[trackio]'")
    one_line(run(*asked, "--report-to", "trakio"), "--report-to trakio", "tensorboard, trackio, wandb, swanlab")
