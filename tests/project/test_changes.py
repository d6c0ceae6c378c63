"""What a change costs, made in a copy of the package: a loss, an objective, a setting, an optimizer or a layer type is a row and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from changed_package import copied

# Run in one process on the changed copy, each after what they share.
SHARED = """
import contextlib, io, json
from pathlib import Path
from types import SimpleNamespace
import mlx.core as mx
import mlx_lora
from conftest import TINY, tiny_model, write_folder
from run_cli import run
from tiny_steps import batch, make_step
from mlx_lora.adapters.inject import adapter_layers, inject, select_targets
from mlx_lora.cli.train import main
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import read_factors
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, read_adapter_config, save_adapter
from mlx_lora.exporters.fuse import fuse_adapter
from mlx_lora.exporters.peft import write_peft
from mlx_lora.gguf.write import write_gguf_adapter
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import model_shape
from mlx_lora.parallel.strategy import SINGLE_DEVICE, DataParallel
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.run_folder import RunFolder, check_continuation, identity_of
from mlx_lora.utils.errors import InputError

def told(call, *arguments):
    try:
        call(*arguments)
    except InputError as error:
        return str(error)

folder = write_folder(Path("tiny"), tiny_model())
rows = [{"prompt": f"{n}?", "chosen": f"{n} yes", "rejected": "no"} for n in range(8)]
Path("pairs.jsonl").write_text("\\n".join(map(json.dumps, rows)))
facts = {"package": mlx_lora.__file__}
"""
LOSS_RUN = """
flags = {"model": str(folder), "data": "pairs.jsonl", "objective": "dpo", "iters": 3, "learning_rate": 5e-3,
         "sample_tokens": 0, "val_batches": 0, "steps_per_report": 1, "kernels": "ours", "batch_size": 4}
losses = {}
for name in ("sigmoid", "cubic"):
    train_run(train_settings({**flags, "loss_type": name, "adapter_path": name}))
    lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    losses[name] = [line["loss"] for line in lines]
facts["loss"] = {"losses": losses, "margin": lines[-1]["margin"]}
"""
CUBIC = '''def cubic(pairs: Pairs, options: PairOptions) -> mx.array:
    """Cube of the distance from a margin of 1."""
    return mx.abs(1 - options.beta * pairs.delta) ** 3


# DPO's family by TRL's names.
'''
MARGIN = '''"""A margin between two answers (--objective margin)."""

import mlx.core as mx

from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.reference import AnswerSums
from mlx_lora.objectives.dpo import Preference


def margin(settings) -> Objective:
    """Return the objective of --objective margin."""
    return Preference(settings, "a margin between two answers", loss=loss, reports=("apart",))


def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
    """Return what the good answer lacks to be e^5 times as likely as the bad one."""
    apart = sums.side(0).logps - sums.side(1).logps
    return mx.maximum(0.0, 5.0 - apart), {"apart": apart}
'''
OBJECTIVE_RUN = """
ran = run("train", "--model", folder, "--data", "pairs.jsonl", "--objective", "margin", "--adapter-path", "run", "--iters", 4,
          "--learning-rate", 5e-3, "--sample-tokens", 0, "--val-batches", 0, "--steps-per-report", 1, "--batch-size", 4,
          "--save-every", 2)
plan = run("plan", "--model", folder, "--data", "pairs.jsonl", "--objective", "margin", "--chip", "M2", "--memory-gb", 16)
again = run("train", "--config", "run/run.yaml", "--resume", "--iters", 6)
lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
facts["objective"] = {"codes": [ran.code, plan.code, again.code], "lines": lines, "said": ran.err + plan.err + again.err}
"""
NEW_SETTINGS = """\
    target_spread: float = setting(0.0, "Share of the target spread over all tokens.", TRAINING, at_least=0, at_most=0.9)
    report_color: str = setting("green", "Color of the curves.", OUTPUT, common=True, may_change=True, per_machine=True,
        choices=("green", "blue"))
"""
# What a run would do with two settings that are new.
SETTINGS_RUN = """
def shown(flag):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main.main([flag])
    return out.getvalue()

class Plan:
    shapes = ((1, 2),)

    def __len__(self):
        return 1

class Ranks:
    size = 2

    def everyone(self, facts):
        self.first = getattr(self, "first", facts)
        return [self.first, facts]

def identity(settings):
    return identity_of(settings, "base", "rows", Plan(), 1.0)

plain = train_settings({})
changed = {name: train_settings({name: value}) for name, value in (("target_spread", 0.5), ("report_color", "blue"))}
changed["target_spread"] = train_settings({"target_spread": 0.5, "adapter_path": "."})
RunFolder(changed["target_spread"], None, {}, SINGLE_DEVICE, None, None).begin(None, 1)
found = train_settings({}, read_settings("run.yaml", {}))
begun = SimpleNamespace(folder="a", identity=identity(plain))
check_same = DataParallel(Ranks()).check_same
check_same(plain, identity(plain))
facts["settings"] = {
    "help": shown("--help"),
    "help-all": shown("--help-all"),
    "too large": told(train_settings, {"target_spread": 1.5}),
    "no choice": told(train_settings, {"report_color": "red"}),
    "from run.yaml": found.to_flat()["target_spread"],
    "resumed": {name: told(check_continuation, begun, identity(settings)) for name, settings in changed.items()},
    "on rank 1": {name: told(check_same, settings, identity(settings)) for name, settings in changed.items()},
}
"""
GAINED = '''"""LoRA whose output has a trained gain for each feature."""

import mlx.core as mx

from mlx_lora.adapters.base import AdapterLayer
from mlx_lora.adapters.base import LINEAR


class GainedLinear(AdapterLayer):
    """A frozen linear layer plus g * scale * (x A) B, g one trained number for each output."""

    LAYER_TYPE, OVER, BESIDE = "gained", LINEAR, ("gains",)

    def __init__(self, base, lora_a, lora_b, scale, dropout=0.0):
        super().__init__(base, lora_a, lora_b, scale, dropout)
        self.gains = mx.ones(lora_b.shape[1])

    def __call__(self, x, key=None):
        z = self.dropout(x, key) @ self.lora_a.astype(x.dtype)
        return self.linear(x) + self.gains.astype(x.dtype) * (z @ (self.scale * self.lora_b).astype(x.dtype))

    def delta(self):
        return self.gains[:, None] * self.product()
'''
LAYER_RUN = """
scratch = Path("scratch")
scratch.mkdir()
trained, again, bare = (load_base(ModelSettings(model=str(folder))) for _ in range(3))
tokens, chosen = mx.arange(40)[None], select_targets(trained.model)
inject(trained.model, chosen.paths, 4, 2.0, layer_type="gained")
shape = model_shape(trained.model, TINY)
numbers = sum(layer.lora_a.size + layer.lora_b.size + layer.lora_b.shape[1]
              for layer in adapter_layers(trained.model).values())
apply_checkpointing(trained.model, "selective")
step = make_step(trained.model)
for number in range(3):
    step([batch(2, 24, seed=number)])
info = AdapterInfo("lora", 4, 8.0, 2.0, 0.0, chosen.num_layers, chosen.keys, trained.model_id, None,
                   trained.fingerprint)
save_adapter(scratch / "a", trained.model, info)
load_adapter(again, scratch / "a")
wanted, plain = again.model(tokens), bare.model(tokens)
same = mx.array_equal(trained.model(tokens), wanted).item()
layers = adapter_layers(again.model)
layers_found = {
    "type": read_adapter_config(scratch / "a")["fine_tune_type"],
    "classes": sorted({type(layer).__name__ for layer in layers.values()}),
    "gains": min(abs(layer.gains - 1).max().item() for layer in layers.values()),
    "planned": [shape.trained, numbers, sorted({one.rank for one in shape.blocks[0].layers})],
    "same": same,
    "refused": [
        told(write_peft, scratch / "p", again.model, "some/base", 0.0),
        told(write_gguf_adapter, scratch / "g.gguf", again.model, "some/base"),
        told(read_factors, bare, scratch / "a", mx.float32),
    ],
}
fuse_adapter(again.model, dequantize=False)
fused = again.model(tokens)
distances = [abs(other - wanted).max().item() for other in (fused, plain)]
facts["layer"] = {**layers_found, "fused": distances, "left": len(adapter_layers(again.model))}
print(json.dumps(facts))
"""


FIRST_LAYER = "from mlx_lora.adapters.lora import"
# What is changed -> files that are new, and edits: file, text before, text after.
CHANGES = {
    "loss": ({}, [
        ("losses/preference.py", "# DPO's family by TRL's names.\n", CUBIC),
        ("losses/preference.py", "        sigmoid_norm,\n", "        sigmoid_norm, cubic,\n"),
    ]),
    "objective": ({"objectives/margin.py": MARGIN}, [
        ("config/objectives.py", "OBJECTIVES = {\n", 'OBJECTIVES = {\n    "margin": ObjectiveRow("margin.margin", **_PREFERENCE),\n'),
    ]),
    "settings": ({}, [("config/settings.py", "    epochs: float | None = setting(", NEW_SETTINGS + "    epochs: float | None = setting(")]),
    "layer": ({"adapters/gained.py": GAINED}, [
        ("adapters/inject.py", FIRST_LAYER, f"from mlx_lora.adapters.gained import GainedLinear\n{FIRST_LAYER}"),
        ("adapters/inject.py", "_CLASSES = (\n", "_CLASSES = (\n    GainedLinear,\n"),
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The folder of a copy with all changes, the files that each touched, and what the programs found on the copy."""
    package, touched, before = copied(tmp_path_factory.mktemp("changed")), {}, set()
    for name, (files, edits) in CHANGES.items():
        for file, text in files.items():
            (package.root / "mlx_lora" / file).write_text(text)
        for edit in edits:
            package.edit(*edit)
        touched[name] = sorted(set(package.touched()) - before)
        before |= set(touched[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DISABLE_COMPILE", "1")  # g++ takes seconds
        facts = package.python(SHARED + LOSS_RUN + OBJECTIVE_RUN + SETTINGS_RUN + LAYER_RUN)
    assert Path(facts["package"]).is_relative_to(package.root)
    return package.root, touched, facts


@pytest.mark.long
def test_a_new_pairwise_loss_is_one_function_and_one_row(changed):
    _, touched, facts = changed
    losses, margin = facts["loss"]["losses"], facts["loss"]["margin"]
    assert touched["loss"] == ["losses/preference.py"]
    assert abs(losses["cubic"][0] - 1) < 1e-5
    assert losses["cubic"][-1] < 0.9
    assert abs(losses["sigmoid"][0] - 0.6931) < 1e-3
    assert margin > 0


@pytest.mark.long
def test_a_new_objective_is_its_file_and_one_row(changed):
    """Planner, reports and resume come with it."""
    _, touched, facts = changed
    assert touched["objective"] == ["config/objectives.py", "objectives/margin.py"]
    assert facts["objective"]["codes"] == [0, 0, 0], facts["objective"]["said"]
    found = {line["step"]: line for line in facts["objective"]["lines"] if line["loss"] is not None}
    assert found[6]["apart"] > found[1]["apart"]
    assert found[6]["loss"] < found[1]["loss"]


@pytest.mark.long
def test_a_new_setting_is_one_row(changed):
    root, touched, facts = changed
    seen = facts["settings"]
    assert touched["settings"] == ["config/settings.py"]
    assert "--target-spread X" in seen["help-all"]
    assert "--target-spread" not in seen["help"]
    assert "--report-color NAME" in seen["help"]
    assert seen["too large"] == "--target-spread 1.5: must be at least 0 and at most 0.9"
    assert seen["no choice"] == "--report-color 'red': not one of green, blue"
    written = yaml.safe_load((root / "run.yaml").read_text())
    assert (written["target_spread"], written["report_color"], seen["from run.yaml"]) == (0.5, "green", 0.5)
    for seen_by, words in (
        ("resumed", "target_spread was 0.0, is now 0.5"),
        ("on rank 1", "target_spread is 0.0 on rank 0, 0.5"),
    ):
        assert words in seen[seen_by]["target_spread"]
        assert seen[seen_by]["report_color"] is None


@pytest.mark.long
def test_a_layer_type_is_its_file_its_row_and_its_test(changed):
    _, touched, facts = changed
    assert touched["layer"] == ["adapters/gained.py", "adapters/inject.py"]
    found = facts["layer"]
    assert (found["type"], found["classes"], found["left"]) == ("gained", ["GainedLinear"], 0)
    trained, numbers, ranks = found["planned"]
    assert (trained, ranks) == (numbers, [4])
    assert found["gains"] > 0  # they were trained, stored and read back
    assert found["same"]
    for said, words in zip(
        found["refused"], ("PEFT does not have", "llama.cpp's adapters do not have", "row by row"), strict=True
    ):
        assert words in said
    close, far = found["fused"]
    assert close < 1e-4 < far


LION = '    "lion": Optimizer("Lion", 1, 6.0, elementwise=True, takes_decay=True),\n'
# Runs in a process of its own, on a copy with another optimizer.
OPTIMIZER_TEST = """
import json
from pathlib import Path
from run_cli import run
from tiny_steps import adapted, batch, factors, make_step
from mlx_lora.models.meta import model_shape
from mlx_lora.planner.speed import find_chip
from mlx_lora.planner.memory import plan_memory
from mlx_lora.planner.memory import RunShape

# Flags are checked before the model, which is not there.
said = [run("plan", "--model", "/no/such/model", "--optimizer", name).err for name in ("lion", "lioness")]
model = adapted()
shape, machine = model_shape(model, {}), find_chip("M2").machine(16)
held = {name: plan_memory(shape, RunShape(1, 64, optimizer=name), machine).phases["loss"] for name in ("lion", "adamw")}
before, step = factors(model), make_step(model, optimizer="lion")
step([batch(2, 24, seed=0)])
print(json.dumps({
    "said": said, "saved": held["adamw"] - held["lion"], "trained": shape.trained,
    "class": type(step.optimizer).__name__, "flat": "flat" in step.masters.arrays,
    "moved": float(abs(factors(model) - before).max()),
}))
"""


@pytest.mark.slow
def test_an_optimizer_is_one_row_in_one_file(tmp_path):
    package = copied(tmp_path)
    package.edit("config/presets.py", '    "adafactor": Optimizer(', LION + '    "adafactor": Optimizer(')
    assert package.touched() == ["config/presets.py"]
    facts = package.python(OPTIMIZER_TEST)
    accepted, refused = facts["said"]
    assert "/no/such/model" in accepted
    assert "lioness" in refused
    assert "/no/such/model" not in refused
    assert facts["saved"] == 4 * facts["trained"] > 0  # it keeps one number less than AdamW for each trained one
    assert (facts["class"], facts["flat"]) == ("Lion", True)
    assert facts["moved"] > 0
