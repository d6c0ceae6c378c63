"""What the hand-made cases are built from: each is a known way to break a reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds

Nasty = Callable[[Path, Seeds], tuple]
DEEP = "[" * 50_000 + "]" * 50_000
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# Twelve lines that stand for 9^12 texts.
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


def folder(name: str, kind: str, more: Callable[[Path, Seeds], tuple] | None = None, **changes: Any) -> Nasty:
    """Change keys of a JSON file in a copied seed folder; a value may be a function of the case's place and seeds."""

    def make(place: Path, seeds: Seeds) -> tuple:
        copy = Path(shutil.copytree(seeds.root / kind, place / "in" / "folder"))
        content = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        content |= {key: value(place, seeds) if callable(value) else value for key, value in changes.items()}
        (copy / name).write_text(json.dumps({key: value for key, value in content.items() if value != "@gone"}))
        return more(copy, seeds) if more else ("generate", "--model", copy, "--prompt", "x", "--max-tokens", 2)

    return make


def raw(name: str, kind: str, content: str | bytes, more: Callable[[Path, Seeds], tuple] | None = None) -> Nasty:
    """Write a file into a copied seed folder."""

    def make(place: Path, seeds: Seeds) -> tuple:
        copy = Path(shutil.copytree(seeds.root / kind, place / "in" / "folder"))
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return more(copy, seeds) if more else ("generate", "--model", copy, "--prompt", "x", "--max-tokens", 2)

    return make


def outside(name: str) -> Callable[[Path, Seeds], str]:
    """A path out of the case's folder, relative to the copied seed folder."""
    return lambda place, seeds: f"../../../outside/{name}"


def absolute(name: str) -> Callable[[Path, Seeds], str]:
    """The same, absolute."""
    return lambda place, seeds: str(seeds.root.parent / "outside" / name)


def on_model(copy: Path, seeds: Seeds) -> tuple:
    """Put a copied adapter on the good model."""
    return ("generate", "--model", seeds.model, "--adapter-path", copy, "--prompt", "x", "--max-tokens", 2)


def exported(copy: Path, seeds: Seeds) -> tuple:
    """Write a copied adapter in another form, with its card."""
    return ("export", "--model", seeds.model, "--adapter-path", copy, "--to", "peft", "--out", copy.parents[1] / "out")


def resumed(folder: Path, seeds: Seeds, at: object) -> tuple:
    """The command that goes on from a checkpoint."""
    return (
        "train", "--model", seeds.model, "--data", seeds.root / "data.jsonl", "--iters", 3, "--rank", 2,
        "--batch-tokens", 256, "--adapter-path", folder, "--save-every", 1, "--resume", at,
    )  # fmt: skip
