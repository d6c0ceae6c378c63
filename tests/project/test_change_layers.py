"""What a change costs: an optimizer is one row in one file, a layer type is its own file and one row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mlx_lora"
LION = '    "lion": Optimizer("Lion", 1, 6.0, elementwise=True, takes_decay=True),\n'
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
# Runs in a process of its own, on the changed copy of the package.
OPTIMIZER_TEST = """
from run_cli import run
from tiny_steps import adapted, batch, factors, make_step
from mlx_lora.models.meta import model_shape
from mlx_lora.planner.speed import find_chip
from mlx_lora.planner.memory import plan_memory
from mlx_lora.planner.shapes import RunShape

def optimizer_facts():
    # Flags are checked before the model, which is not there.
    said = [run("plan", "--model", "/no/such/model", "--optimizer", name).err for name in ("lion", "lioness")]
    model = adapted()
    shape, machine = model_shape(model, {}), find_chip("M2").machine(16)
    held = {name: plan_memory(shape, RunShape(1, 64, optimizer=name), machine).phases["loss"] for name in ("lion", "adamw")}
    before, step = factors(model), make_step(model, optimizer="lion")
    step([batch(2, 24, seed=0)])
    return {
        "said": said, "saved": held["adamw"] - held["lion"], "trained": shape.trained,
        "class": type(step.optimizer).__name__, "flat": step.masters.is_flat,
        "moved": float(abs(factors(model) - before).max()),
    }
"""
LAYER_TEST = """
import mlx.core as mx
from conftest import TINY, tiny_model, write_folder
from tiny_steps import batch, make_step
from mlx_lora.adapters.inject import adapter_layers, inject
from mlx_lora.models.meta import model_shape
from mlx_lora.adapters.inject import select_targets
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, read_adapter_config, save_adapter
from mlx_lora.exporters.fuse import fuse_adapter
from mlx_lora.gguf.write import write_gguf_adapter
from mlx_lora.exporters.peft import write_peft
from mlx_lora.models.load import load_base
from mlx_lora.engine.adapter_store import read_factors
from mlx_lora.config.settings import ModelSettings
from mlx_lora.utils.errors import InputError
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

def refusal(call, *arguments):
    try:
        call(*arguments)
    except InputError as error:
        return str(error)

def layer_facts(scratch):
    folder = write_folder(scratch / "tiny", tiny_model())
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
    facts = {
        "type": read_adapter_config(scratch / "a")["fine_tune_type"],
        "classes": sorted({type(layer).__name__ for layer in layers.values()}),
        "gains": min(abs(layer.gains - 1).max().item() for layer in layers.values()),
        "planned": [shape.trained, numbers, sorted({one.rank for one in shape.blocks[0].layers})],
        "same": same,
        "refused": [
            refusal(write_peft, scratch / "p", again.model, "some/base", 0.0),
            refusal(write_gguf_adapter, scratch / "g.gguf", again.model, "some/base"),
            refusal(read_factors, bare, scratch / "a", mx.float32),
        ],
    }
    fuse_adapter(again.model, dequantize=False)
    fused = again.model(tokens)
    distances = [abs(other - wanted).max().item() for other in (fused, plain)]
    return {**facts, "fused": distances, "left": len(adapter_layers(again.model))}
"""
BOTH = """
import json, sys
from pathlib import Path
import layer_check, optimizer_check
scratch = Path(sys.argv[1])
print(json.dumps({"optimizer": optimizer_check.optimizer_facts(), "layer": layer_check.layer_facts(scratch)}))
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def add_line(path: Path, line: str, before: str) -> Path:
    """Write `line` in front of the one place where the file says `before`."""
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, path
    return write(path, text.replace(before, line + before))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Change a copy of the package as a contributor would, and try both changes there."""
    root = tmp_path_factory.mktemp("changed")
    package, adapters = root / "mlx_lora", root / "mlx_lora" / "adapters"
    shutil.copytree(PACKAGE, package)  # with compiled files, which stay valid
    optimizer = {
        add_line(package / "config" / "optimizers.py", LION, before='    "adafactor": Optimizer('),
    }
    layer = {
        write(adapters / "gained.py", GAINED),
        add_line(
            adapters / "inject.py",
            "from mlx_lora.adapters.gained import GainedLinear\n",
            before="from mlx_lora.adapters.lora import",
        ),
        add_line(adapters / "inject.py", "    GainedLinear,\n", before="    QALoRASwitchLinear,\n)"),
        write(root / "layer_check.py", LAYER_TEST),
    }
    write(root / "optimizer_check.py", OPTIMIZER_TEST)
    path = os.pathsep.join([str(root), str(Path(__file__).parents[1])])
    own = {"PYTHONPATH": path, "MLX_LORA_CACHE": str(root / "cache"), "MLX_DISABLE_COMPILE": "1"}  # g++ takes seconds
    command = [sys.executable, "-c", BOTH, str(tmp_path_factory.mktemp("scratch"))]
    ran = subprocess.run(command, cwd=root, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout.splitlines()[-1])
    return {**facts, "files": {"optimizer": len(optimizer), "layer": len(layer)}}


@pytest.mark.slow
def test_an_optimizer_is_one_row_in_one_file(found):
    facts = found["optimizer"]
    assert found["files"]["optimizer"] == 1
    accepted, refused = facts["said"]
    assert "/no/such/model" in accepted
    assert "lioness" in refused
    assert "/no/such/model" not in refused
    assert facts["saved"] == 4 * facts["trained"] > 0  # it keeps one number less than AdamW for each trained one
    assert (facts["class"], facts["flat"]) == ("Lion", True)
    assert facts["moved"] > 0


def test_a_layer_type_is_its_file_its_row_and_its_test(found):
    facts = found["layer"]
    assert found["files"]["layer"] == 3
    assert (facts["type"], facts["classes"]) == ("gained", ["GainedLinear"])
    assert facts["planned"][0] == facts["planned"][1]
    assert facts["planned"][2] == [4]
    assert facts["gains"] > 0  # they were trained, stored and read back
    assert facts["same"]
    peft, gguf, row = facts["refused"]
    assert "is of a type that PEFT does not have" in peft
    assert "is of a type that llama.cpp's adapters do not have" in gguf
    assert "cannot be served row by row" in row
    close, far = facts["fused"]
    assert close < 1e-4 < far
    assert facts["left"] == 0
