"""Keep a GGUF file's config and tokenizer as a folder in the cache, for what needs them and not the weights."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_lora.models.gguf_arch import model_config
from mlx_lora.sources.gguf_reader import read_gguf
from mlx_lora.sources.gguf_tokenizer import write_tokenizer
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.files import replacing_folder, sha256_of


def gguf_tokenizer_folder(path: Path) -> Path:
    """Return the cached folder with a GGUF file's config.json and tokenizer, which is written the first time.

    Raises:
        InputError: the file is damaged, or its tokenizer is of a kind that cannot be rebuilt.
    """
    stat = path.stat()
    folder = (
        cache_dir("previews") / f"tokenizer-{sha256_of(f'{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}')[:16]}"
    )
    if not (folder / "config.json").is_file():
        file = read_gguf(path)
        with replacing_folder(folder) as temporary:
            write_tokenizer(file.metadata, temporary)
            (temporary / "config.json").write_text(json.dumps(model_config(file), default=str), encoding="utf-8")
    return folder
