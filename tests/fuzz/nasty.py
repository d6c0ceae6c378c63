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


def on_copy(copy: Path, seeds: Seeds) -> tuple:
    """The command that reads a copied model."""
    return ("generate", "--model", copy, "--prompt", "x", "--max-tokens", 2)


def copying(kind: str, command: Callable[[Path, Seeds], tuple] = on_copy) -> Callable[[Callable[[Path], None]], Nasty]:
    """Make a case of a function that spoils a copied seed folder."""

    def decorate(spoil: Callable[[Path], None]) -> Nasty:
        def make(place: Path, seeds: Seeds) -> tuple:
            copy = Path(shutil.copytree(seeds.root / kind, place / "in" / "folder"))
            spoil(copy)
            return command(copy, seeds)

        return make

    return decorate


def folder(name: str, kind: str, command: Callable[[Path, Seeds], tuple] = on_copy, **changes: Any) -> Nasty:
    """Change keys of a JSON file in a copied seed folder; a value may be a function of the copy."""

    @copying(kind, command)
    def case(copy: Path) -> None:
        content = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        content |= {key: value(copy) if callable(value) else value for key, value in changes.items()}
        (copy / name).write_text(json.dumps({key: value for key, value in content.items() if value != "@gone"}))

    return case


def raw(name: str, kind: str, content: str | bytes, command: Callable[[Path, Seeds], tuple] = on_copy) -> Nasty:
    """Write a file into a copied seed folder."""

    @copying(kind, command)
    def case(copy: Path) -> None:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(as_bytes(content))

    return case


def laid(name: str, content: str | bytes, command: Callable[[Path, Seeds], tuple]) -> Nasty:
    """Feed one file."""

    def make(place: Path, seeds: Seeds) -> tuple:
        (place / "in" / name).write_bytes(as_bytes(content))
        return command(place / "in" / name, seeds)

    return make


def as_bytes(content: str | bytes) -> bytes:
    """A file's content, also of text that no file may have."""
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content


def absolute(name: str) -> Callable[[Path], str]:
    """A path out of the case's folder."""
    return lambda copy: str(copy.parents[3] / "outside" / name)


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
