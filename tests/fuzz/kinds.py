"""What is fed to which command: kind, number -> a case in its own folder.

Of each kind the first numbers are the hand-made nasties, the rest are mutations of a good file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fuzz import nasty
from fuzz.mutate import (
    json_bytes,
    read_pieces,
    spoiled_bytes,
    spoiled_gguf,
    spoiled_json,
    spoiled_safetensors,
    spoiled_text,
    spoiled_tree,
)
from fuzz.nasty import Nasty, converted, evaluated, exported, on_copy, on_model, rendered, resumed
from fuzz.seeds import ROWS, SETTINGS, TEMPLATE, Seeds

Command = tuple[object, ...]
FOREIGN = Path(__file__).parents[1] / "foreign"


def data_json_lines(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """Rows of the five formats, as .jsonl or as a list in .json."""
    rows = [spoiled_tree(row, rng) if rng.random() < 0.5 else row for row in rng.sample(ROWS, 3)]
    lines = [json_bytes(row) for row in rows]
    if rng.random() < 0.5:
        content, name = b"\n".join(lines), "d.jsonl"
    else:
        content, name = b"[" + b",\n".join(lines) + b"]", "d.json"
    if rng.random() < 0.3:
        content = spoiled_text(content.decode(), rng)
    return evaluated(put(place / "in" / name, content), seeds)


def data_tables(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """CSV, Parquet and plain text."""
    kind = rng.choice(("csv", "parquet", "txt"))
    if kind == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerows([["prompt", "completion"], ["a", "b\nc"], ['"q"', "d,e"], ["é", "f"]])
        content = spoiled_text(out.getvalue(), rng)
    elif kind == "txt":
        content = spoiled_text("Some text.\nMore of it.\n" * 5, rng)
    else:
        content = spoiled_bytes(nasty.parquet([{"prompt": "a", "completion": "b"}] * 5), rng)
    return evaluated(put(place / "in" / f"d.{kind}", content), seeds)


def model_config(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """config.json and its fellows, of a float and of a quantized model."""
    folder = copied(rng.choice((seeds.model, seeds.model4)), place)
    file = folder / rng.choice(("config.json", "config.json", "config.json", "model.safetensors.index.json"))
    if not file.exists():
        file.write_text(
            json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../../outside/secret.safetensors"}})
        )
    put(file, spoiled_json(file.read_bytes(), rng))
    return on_copy(folder, seeds)


def model_weights(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """model.safetensors."""
    folder = copied(rng.choice((seeds.model, seeds.model4)), place)
    file = folder / "model.safetensors"
    put(file, spoiled_safetensors(file.read_bytes(), rng))
    return on_copy(folder, seeds)


def tokenizer_files(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """tokenizer.json, its settings, its templates, and SentencePiece's model file."""
    if rng.random() < 0.2:
        folder = copied(seeds.spm_only, place)
        put(folder / "tokenizer.model", spoiled_bytes((folder / "tokenizer.model").read_bytes(), rng))
        return on_copy(folder, seeds)
    folder = copied(seeds.model, place)
    name = rng.choice(("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"))
    good = folder / name
    content = (
        good.read_bytes()
        if good.exists()
        else b'{"eos_token_id": [3, 4], "bos_token": "<s>", "eos_token": {"content": "</s>"}}'
    )
    put(good, spoiled_json(content, rng))
    return on_copy(folder, seeds)


def adapter_folder(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """Ours: a LoRA, and a DoRA with norms trained in full."""
    return adapted(copied(rng.choice((seeds.run, seeds.dora)), place), "adapters.safetensors", seeds, rng)


def peft_folder(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """PEFT's."""
    return adapted(copied(seeds.peft, place), "adapter_model.safetensors", seeds, rng)


def gguf_file(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """GGUF: bytes, metadata, tensor table; read on to a converted folder."""
    seed = seeds.root / rng.choice(("bpe.gguf", "spm.gguf"))
    content = spoiled_bytes(seed.read_bytes(), rng) if rng.random() < 0.2 else spoiled_gguf(pieces_of(seed), rng)
    return converted(put(place / "in" / "m.gguf", content), seeds)


def settings_file(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """--config: ours, and the three other trainers'."""
    text = rng.choice([SETTINGS, *(file.read_text() for file in sorted(FOREIGN.iterdir()))])
    tree = spoiled_tree(yaml.safe_load(text), rng)
    content = spoiled_text(text, rng) if rng.random() < 0.3 else json_bytes(tree)  # JSON is YAML
    return ("settings", "--config", put(place / "in" / "c.yaml", content))


def checkpoint(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """A run folder to go on from; half of them with checksums that hold, as a forger would make them."""
    folder = copied(seeds.run, place)
    found = sorted((folder / "checkpoints").iterdir())[-1]
    name = rng.choice(("state.json", "state.safetensors", "adapters.safetensors", "adapter_config.json"))
    spoil = spoiled_json if name.endswith("json") else spoiled_safetensors
    put(found / name, spoil((found / name).read_bytes(), rng))
    if name != "state.json" and rng.random() < 0.7:
        state = json.loads((found / "state.json").read_text())
        state["sha256"][name] = hashlib.sha256((found / name).read_bytes()).hexdigest()
        put(found / "state.json", json.dumps(state).encode())
    return resumed(folder, seeds, found if rng.random() < 0.5 else "auto")


def chat_template(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """--chat-template."""
    file = put(place / "in" / "t.jinja", spoiled_text(TEMPLATE, rng))
    return rendered(file, seeds)


def run_folder(place: Path, seeds: Seeds, rng: random.Random) -> Command:
    """run.yaml and metrics.jsonl, which a model card is written from."""
    folder = copied(seeds.run, place)
    name = rng.choice(("run.yaml", "metrics.jsonl"))
    if name == "run.yaml":
        content = json_bytes(spoiled_tree(yaml.safe_load((folder / name).read_text()), rng))
    else:
        lines = (folder / name).read_text().splitlines()
        content = b"\n".join(json_bytes(spoiled_tree(json.loads(line), rng)) for line in lines)
    put(folder / name, content if rng.random() < 0.8 else spoiled_text((folder / name).read_text(), rng))
    return exported(folder, seeds)


# Kind -> (mutation, hand-made ones, share of the cases).
KINDS: dict[str, tuple[Callable[[Path, Seeds, random.Random], Command], list[Nasty], int]] = {
    "data: json, jsonl": (data_json_lines, nasty.DATA, 14),
    "data: csv, parquet, txt": (data_tables, nasty.TABLES, 8),
    "model config": (model_config, nasty.CONFIGS, 14),
    "model safetensors": (model_weights, nasty.WEIGHTS, 12),
    "tokenizer files": (tokenizer_files, nasty.TOKENIZERS, 8),
    "adapter folder": (adapter_folder, nasty.ADAPTERS, 12),
    "PEFT folder": (peft_folder, nasty.PEFTS, 10),
    "GGUF": (gguf_file, nasty.GGUFS, 12),
    "settings YAML": (settings_file, nasty.SETTINGS, 12),
    "checkpoint": (checkpoint, nasty.CHECKPOINTS, 6),
    "chat template": (chat_template, nasty.TEMPLATES, 6),
    "run folder": (run_folder, nasty.RUNS, 4),
}


def make_case(kind: str, number: int, seed: int, place: Path, seeds: Seeds) -> Command:
    """Put case `number` of a kind into `place` and return the command that reads it."""
    mutate, nasties, _ = KINDS[kind]
    (place / "in").mkdir(parents=True)
    if number < len(nasties):
        return nasties[number](place, seeds)
    return mutate(place, seeds, random.Random(f"{seed} {kind} {number}"))


def plan_cases(total: int) -> list[tuple[str, int]]:
    """Deal at least `total` cases out to the kinds; every nasty is among them."""
    shares = sum(share for _, _, share in KINDS.values())
    plan = []
    for kind, (_, nasties, share) in KINDS.items():
        plan += [(kind, number) for number in range(max(len(nasties) + 3, -(-total * share // shares)))]
    return plan


def put(path: Path, content: bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(content)
    return path


def copied(folder: Path, place: Path) -> Path:
    """Copy a seed folder into the case's own."""
    return Path(shutil.copytree(folder, place / "in" / "folder"))


def adapted(folder: Path, weights: str, seeds: Seeds, rng: random.Random) -> Command:
    """Spoil an adapter folder and return the command that reads it."""
    if rng.random() < 0.5:
        put(folder / weights, spoiled_safetensors((folder / weights).read_bytes(), rng))
    else:
        put(folder / "adapter_config.json", spoiled_json((folder / "adapter_config.json").read_bytes(), rng))
    return on_model(folder, seeds)


_pieces: dict[Path, dict[str, Any]] = {}


def pieces_of(seed: Path) -> dict[str, Any]:
    """Return a GGUF seed's pieces, read once per process."""
    if seed not in _pieces:
        _pieces[seed] = read_pieces(str(seed))
    return _pieces[seed]
