"""Hand-made adapter folders, checkpoints and run folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.mutate import safetensors_bytes
from fuzz.nasty import DEEP, LAUGHS, Nasty, copying, exported, folder, on_model, raw, resumed
from fuzz.seeds import Seeds


def shape(**changes: Any) -> dict[str, Any]:
    """lora_parameters with something wrong."""
    return {"rank": 2, "scale": 16.0, "dropout": 0.0, "keys": ["self_attn.q_proj"], **changes}


ADAPTERS = [
    *(folder("adapter_config.json", "run", on_model, lora_parameters=shape(**{key: value})) for key, value in (
        [("rank", v) for v in (10**9, True, 0, 2.0, "2", 10**30)]
        + [("scale", v) for v in (float("nan"), float("inf"), True, "x", 10**400)]
        + [("dropout", v) for v in ("x", [], float("nan"), -1, 2)]
        + [("keys", v) for v in (["../x"], [""], ["*"], ["a*" * 60], [1], "q_proj", {}, ["q_proj,k_proj"], ["self_attn.q_proj"] * 100_000)]
    )),
    *(folder("adapter_config.json", "run", on_model, **{key: value}) for key, value in (
        [("num_layers", v) for v in (True, 10**30, -10**30, "x", 1.0)]
        + [("fine_tune_type", v) for v in (["lora"], {}, "full", None, "dora")]
        + [("mlx_lora", v) for v in ("x", {"alpha": "x"}, {"full": 5}, {"full": [1]}, {"full": ["model.layers"]}, {"full": ["x"] * 1000}, {"chat_template": 5},
            {"chat_template": "{% for %}"}, {"method": "x"}, {"method": []}, {"base_model": []}, {"base_revision": {}}, {"base_fingerprint": []})]
        + [("peft_type", v) for v in ("LORA", None, [], "X")]
    )),
    folder("adapter_config.json", "run", exported, mlx_lora={"method": "../x", "base_model": {"a": 1}}),
    folder("adapter_config.json", "run", exported, mlx_lora={"base_model": "../../outside/x\n---\nlicense: evil"}),
    raw("adapter_config.json", "run", DEEP, on_model),
    raw("adapter_config.json", "run", "[]", on_model),
    raw("adapter_config.json", "run", b"\xff", on_model),
    raw("adapters.safetensors", "run", safetensors_bytes(b'{"../../x.lora_a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)), on_model),
    raw("adapters.safetensors", "run", safetensors_bytes(DEEP.encode(), bytes(8)), on_model),
]  # fmt: skip

PEFTS = [
    *(folder("adapter_config.json", "peft", on_model, **{key: value}) for key, value in (
        [("alpha_pattern", v) for v in ({r"(\w|\w\w|\w\w\w|\.)+\.q_pro": 1}, {"(a|a?)+$" : 1}, {"(": 1}, {"q_proj": "x"}, [], "x", {".*" * 500: 1}, {"q_proj": float("nan")})]
        + [("lora_alpha", v) for v in ("x", None, [], float("nan"), 10**400, 0, -1)]
        + [("r", v) for v in (10**9, "x", None, 0)]
        + [("lora_dropout", v) for v in ("x", [], 5)]
        + [("modules_to_save", v) for v in (5, "lm_head", [1], [""], [None], ["../x"])]
        + [("target_modules", v) for v in (5, "(.*)*x", [1])]
        + [("peft_type", v) for v in (5, "IA3", "ADALORA", [])]
        + [("use_rslora", v) for v in ("x", [])]
        + [("init_lora_weights", v) for v in (5, "pissa_niter_4", "pissa" * 1000)]
        + [("base_model_name_or_path", v) for v in (5, [], "../../outside", "x\n---\n")]
        + [("bias", v) for v in (5, "all", [])]
    )),
    folder("adapter_config.json", "peft", on_model, peft_type="ADALORA", init_r="x"),
    folder("adapter_config.json", "peft", on_model, auto_mapping={"base_model_class": "os", "parent_library": "os"}),
    raw("adapter_model.safetensors", "peft", safetensors_bytes(b'{"base_model.model.model.layers": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)), on_model),
    raw("adapter_model.safetensors", "peft", safetensors_bytes(b'{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', bytes(16)), on_model),
]  # fmt: skip


@PEFTS.append
@copying("peft", on_model)
def pickled_adapter(copy: Path) -> None:
    """A PEFT folder of a pickle alone."""
    (copy / "adapter_model.safetensors").unlink()
    (copy / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def newest_of(copy: Path) -> Path:
    """The newest checkpoint of a run folder."""
    return sorted((copy / "checkpoints").iterdir())[-1]


def gone_on(copy: Path, seeds: Seeds) -> tuple:
    """The command that goes on from the newest checkpoint."""
    return resumed(copy, seeds, newest_of(copy))


def state(**changes: Any) -> Nasty:
    """Change state.json of the newest checkpoint."""

    @copying("run", gone_on)
    def case(copy: Path) -> None:
        file = newest_of(copy) / "state.json"
        content = json.loads(file.read_text())
        for key, value in changes.items():
            content = {**content, key: {**content[key], **value} if isinstance(value, dict) else value}
        file.write_text(json.dumps(content))

    return case


def arrays(change: Callable[[dict, bytes], tuple[dict, bytes]]) -> Nasty:
    """Change state.safetensors of the newest checkpoint, checksum and all."""

    @copying("run", gone_on)
    def case(copy: Path) -> None:
        newest = newest_of(copy)
        content = (newest / "state.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header, rest = change(json.loads(content[8 : 8 + size]), content[8 + size :])
        (newest / "state.safetensors").write_bytes(safetensors_bytes(json.dumps(header).encode(), rest))
        told = json.loads((newest / "state.json").read_text())
        told["sha256"]["state.safetensors"] = hashlib.sha256((newest / "state.safetensors").read_bytes()).hexdigest()
        (newest / "state.json").write_text(json.dumps(told))

    return case


def renamed(header: dict, rest: bytes) -> tuple[dict, bytes]:
    """Arrays of layers that the model does not have."""
    return {name.replace("layers.0", "layers.7"): entry for name, entry in header.items()}, rest


def without_random(header: dict, rest: bytes) -> tuple[dict, bytes]:
    """A state without its random key, of the same bytes."""
    return {name.replace("random", "ransom"): entry for name, entry in header.items()}, rest


def as_ints(header: dict, rest: bytes) -> tuple[dict, bytes]:
    """Masters that are not floats."""
    return {
        name: {**entry, "dtype": "I32"} if entry and entry.get("dtype") == "F32" else entry
        for name, entry in header.items()
    }, rest


CHECKPOINTS = [
    state(sha256={"../../../../outside/secret.json": "0"}),
    state(sha256=[]),
    state(sha256={"state.safetensors": None}),
    state(position={"taken": -1}),
    state(position={"taken": "x"}),
    state(position={"taken": 10**30, "consumed": 10**30}),
    state(position={"consumed": None}),
    state(position={"best_loss": "x", "best_at": []}),
    state(identity=[]),
    state(identity={"price_epochs": "x"}),
    state(identity={"price_epochs": float("nan")}),
    state(identity={"price_epochs": -1}),
    state(version="1"),
    arrays(renamed),
    arrays(without_random),
    arrays(as_ints),
]


RUNS = [
    raw("metrics.jsonl", "run", DEEP, exported),
    raw("metrics.jsonl", "run", '{"step": 1, "val_loss": "x"}\n', exported),
    raw("metrics.jsonl", "run", '{"step": "x", "val_loss": 1}\n{"step": 2, "val_loss": 2}\n', exported),
    raw("metrics.jsonl", "run", '{"step": 1, "val_loss": NaN}\n', exported),
    raw("run.yaml", "run", "data: 2001-99-99", exported),
    raw("run.yaml", "run", "[" * 20_000, exported),
    raw("run.yaml", "run", "data: [1]", exported),
    raw("run.yaml", "run", LAUGHS + "data: *a11", exported),
    raw("run.yaml", "run", 'data: "x\\n---\\nlicense: evil\\n"', exported),
    raw("README.md", "run", b"\xff\xfe", exported),
]
