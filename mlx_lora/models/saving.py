"""Write model folders shard by shard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.system.errors import InputError, RunError

MAX_SHARD_BYTES = 5 << 30  # what mlx-lm and the hub use


def save_tensors(path: Path, tensors: dict[str, mx.array], file_format: str = "mlx") -> None:
    """Write a safetensors file and check that it is complete.

    Args:
        path: of the file.
        tensors: by name.
        file_format: its "format" entry: mlx, or pt for files that PEFT and transformers read.

    Raises:
        RunError: the disk is full or disconnected.
    """
    mx.eval(tensors)
    try:
        mx.save_safetensors(str(path), tensors, metadata={"format": file_format})
        read_safetensors_header(path)  # a disk that filled up leaves a short file
    except (RuntimeError, InputError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise RunError(
            f"{path}: writing {size / 1e6:.1f} MB failed, with {free / 1e6:.1f} MB free ({error})"
        ) from error


class ShardWriter:
    """Collect parameters and write them as safetensors shards with an index.

    Memory holds one shard. The names are mlx-lm's: `model.safetensors`, or `model-00001-of-0000N.safetensors`.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.shard: dict[str, mx.array] = {}
        self.shard_bytes = self.total_bytes = 0
        self.names: list[list[str]] = []

    def add(self, parameters: dict[str, mx.array]) -> None:
        """Add parameters; they are evaluated when their shard is written, at the latest."""
        size = sum(array.nbytes for array in parameters.values())
        if self.shard and self.shard_bytes + size > self.max_shard_bytes:
            self._write()
        self.shard |= parameters
        self.shard_bytes += size
        self.total_bytes += size

    def close(self) -> int:
        """Write the last shard, rename all to their final names, write the index; return the bytes of all tensors."""
        self._write()
        count = len(self.names)
        weight_map = {}
        for i, names in enumerate(self.names):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            (self.folder / f"part-{i}.safetensors").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
        return self.total_bytes

    def _write(self) -> None:
        save_tensors(self.folder / f"part-{len(self.names)}.safetensors", self.shard)
        self.names.append(list(self.shard))
        self.shard, self.shard_bytes = {}, 0


def write_json(path: Path, content: object) -> None:
    """Write one JSON file, indented, UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_out(out: Path, *, force: bool) -> None:
    """Check that `out` may be written, before any work is done.

    Raises:
        InputError: `out` is a file, or a folder that must not be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a new folder")
    if not any(out.iterdir()):
        return
    if not force:
        raise InputError(f"--out {out}: exists and is not empty; give a new folder, or --force to replace it")
    if not (out / "config.json").is_file():
        raise InputError(
            f"--out {out}: --force only replaces model folders, and this one has no config.json; remove it first"
        )
