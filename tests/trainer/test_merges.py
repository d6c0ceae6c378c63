"""Runs whose adapter survives a merge: --method qa-lora and --qat through the commands, killed and resumed, and refused inputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from comparing import by_dtype
from conftest import quantized, tiny_model, write_folder
from make_adapters import TOKENS
from mlx_lm.utils import load as mlx_lm_load
from resumed_runs import command, stopped_after, weights
from run_cli import run, succeeds

from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.load import load_base


def fused_and_kept(model, adapter, out, data) -> dict:
    measured = ("--data", data) if data else ()
    ran = succeeds("fuse", "--model", model, "--adapter-path", adapter, "--out", out, *measured, "--json")
    return json.loads(ran.out)


def best_validation(folder) -> float:
    losses = [json.loads(line)["val_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return min(loss for loss in losses if loss is not None)


@pytest.fixture(scope="module")
def qa_run(tiny_4bit_folder, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa") / "run"
    succeeds(*command(tiny_4bit_folder, chats, folder, "--method", "qa-lora", "--rank", 2))
    return folder


@pytest.mark.long
def test_a_fused_qa_lora_has_the_loss_of_the_adapter(tiny_4bit_folder, chats, qa_run, tmp_path):
    found = fused_and_kept(tiny_4bit_folder, qa_run, tmp_path / "fused", chats)
    assert found["loss_fused"] == pytest.approx(found["loss_adapter"], abs=by_dtype(1e-3, 5e-3))
    assert found["loss_base"] - found["loss_adapter"] > 0.05
    assert found["error_mean"] < 1e-3


@pytest.mark.long
def test_a_lora_of_the_same_run_loses_much_of_it(tiny_4bit_folder, chats, tmp_path):
    """The pair of the test above: what rounding costs where nothing is done about it."""
    assert run(*command(tiny_4bit_folder, chats, tmp_path / "run", "--rank", 2)).code == 0
    assert fused_and_kept(tiny_4bit_folder, tmp_path / "run", tmp_path / "fused", chats)["error_mean"] > 0.1


@pytest.mark.long
def test_training_goes_on_from_a_stored_qa_lora(tiny_4bit_folder, chats, qa_run, tmp_path):
    again = command(
        tiny_4bit_folder, chats, tmp_path / "more", "--method", "qa-lora", "--rank", 2, "--resume-adapter-file", qa_run
    )
    succeeds(*again)
    assert weights(tmp_path / "more") != weights(qa_run)


@pytest.fixture(scope="module")
def qat_run(tiny_4bit_folder, chats, tmp_path_factory):
    """A run whose second half computes with fused weights, and a checkpoint in either half."""
    folder = tmp_path_factory.mktemp("qat") / "run"
    succeeds(*command(tiny_4bit_folder, chats, folder, "--qat", 0.5, "--save-every", 4))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("step", [4, 8])
def test_a_killed_run_resumes_to_the_same_bytes_before_and_after_the_rounding_begins(
    tiny_4bit_folder, chats, qat_run, tmp_path, step
):
    copy = stopped_after(qat_run, tmp_path / "copy", step)
    succeeds(*command(tiny_4bit_folder, chats, copy, "--qat", 0.5, "--save-every", 4, "--resume", "auto"))
    assert weights(copy) == weights(qat_run)


@pytest.mark.long
@pytest.mark.float32("the losses of a tiny model fused and not fused are nearer than bfloat16 tells apart")
def test_the_rounding_changes_what_is_trained_and_shown(tiny_4bit_folder, chats, qat_run, tmp_path):
    """The validation of such a run is that of the model which fusing writes."""
    plain, always = tmp_path / "plain", tmp_path / "always"
    assert run(*command(tiny_4bit_folder, chats, plain, "--val-batches", -1)).code == 0
    assert run(*command(tiny_4bit_folder, chats, always, "--val-batches", -1, "--qat")).code == 0
    assert len({weights(folder) for folder in (plain, always, qat_run)}) == 3
    found = fused_and_kept(tiny_4bit_folder, plain, tmp_path / "plain-fused", None)
    best = best_validation(plain)
    assert abs(best - found["loss_adapter"]) < 1e-3 < abs(best - found["loss_fused"])
    assert fused_and_kept(tiny_4bit_folder, always, tmp_path / "always-fused", None)["error_mean"] < 1e-3
    evaluate = ("evaluate", "--adapter-path", always, "--json")  # on what the run held out
    ran = run(*evaluate, "--model", tiny_4bit_folder)
    best = best_validation(always)
    assert json.loads(ran.out)["loss"] == pytest.approx(best, abs=1e-3)


BAD = {
    "float base": ("float", ("--method", "qa-lora"), "--method qa-lora"),
    "mxfp4 base": ("mxfp4", ("--method", "qa-lora"), "mxfp4"),
    "qat over a float base": ("float", ("--qat",), "--qat"),
    "qat with qa-lora": ("4bit", ("--qat", "--method", "qa-lora"), "--qat"),
    "qat with dropout": ("4bit", ("--qat", "--dropout", 0.1), "--dropout"),
    "qat with full": ("4bit", ("--qat", "--method", "full"), "--qat"),
    "a share above 1": ("4bit", ("--qat", 1.5), "qat"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tiny_folder, tiny_4bit_folder, chats, tmp_path):
    which, flags, word = BAD[name]
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    model = {
        "float": lambda: tiny_folder,
        "4bit": lambda: tiny_4bit_folder,
        "mxfp4": lambda: write_folder(tmp_path / "mx", quantized(tiny_model(), 4, 32, "mxfp4"), config),
    }[which]()
    ran = run(*command(model, chats, tmp_path / "run", *flags))
    assert ran.code == 2
    assert len([line for line in ran.lines if line.startswith("Error")]) == 1
    assert word in ran.lines[-1]
    assert not (tmp_path / "run" / "adapters.safetensors").exists()


@pytest.mark.long
def test_an_adapter_of_qat_is_always_used_in_its_fused_form(tiny_4bit_folder, chats, tmp_path):
    """Without the rounding it is another model, which nothing has trained: others refuse it, and we round on loading."""
    adapter, fused, merged = tmp_path / "run", tmp_path / "fused", tmp_path / "merged"
    assert run(*command(tiny_4bit_folder, chats, adapter, "--qat")).code == 0
    found = fused_and_kept(tiny_4bit_folder, adapter, fused, chats)
    assert found["loss_adapter"] == pytest.approx(found["loss_fused"], abs=1e-3)
    base = load_base(ModelSettings(model=str(tiny_4bit_folder)))
    load_adapter(base, adapter)
    wanted = np.array(base.model(TOKENS))
    assert (
        run("export", "--model", tiny_4bit_folder, "--adapter-path", adapter, "--to", "hf", "--out", merged).code == 0
    )
    for model in (fused, merged):
        assert np.allclose(load_base(ModelSettings(model=str(model))).model(TOKENS), wanted, atol=2e-2), model
    assert not np.allclose(load_base(ModelSettings(model=str(tiny_4bit_folder))).model(TOKENS), wanted, atol=2e-2)
    for form in ("peft", "gguf-adapter", "mlx-lm"):
        ran = run(
            "export", "--model", tiny_4bit_folder, "--adapter-path", adapter, "--to", form, "--out", tmp_path / form
        )
        assert (ran.code, "--qat" in ran.err) == (2, True), form
    with pytest.raises(AttributeError):
        mlx_lm_load(str(tiny_4bit_folder), adapter_path=str(adapter))


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_of_qat_with_its_rounding_only(tiny_4bit_folder, chats, qat_run, tmp_path):
    more = command(tiny_4bit_folder, chats, tmp_path / "more", "--resume-adapter-file", qat_run)
    for extra in ((), ("--qat", 0.5)):
        ran = run(*more, *extra)
        assert (ran.code, "--resume-adapter-file" in ran.lines[-1], "--qat" in ran.lines[-1]) == (2, True, True)
    ran = succeeds(*more, "--qat", "--val-batches", -1)
    first = json.loads((tmp_path / "more" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(best_validation(qat_run), abs=0.2)
