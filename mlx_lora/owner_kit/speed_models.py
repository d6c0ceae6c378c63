"""The models whose training speed the kit measures: widths of published models, random weights, and no more blocks than
take seconds.

Ratios between programs are those of the model; tokens per second are not, because blocks are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.owner_kit.kit_check import Kit
from mlx_lora.owner_kit.kit_models import write_model
from mlx_lora.suite.workload_models import AFFINE, LLAMA_1B, QWEN3_4B, QWEN3_8B, SMOLLM2
from mlx_lora.system import device
from mlx_lora.system.units import GIB

SMALL_QWEN = {
    **QWEN3_4B.config,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
}
SMALL_GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 32768,
}  # fmt: skip
MEMORY_FOR_LARGE = 30 * GIB  # from here, an 8B model's widths


@dataclass(frozen=True)
class SpeedModel:
    """A model.

    Attributes:
        name: as it is published.
        config: of the whole model.
        blocks: that are kept.
        packed: whether it is in 4 bits.
    """

    name: str
    config: dict[str, Any]
    blocks: int
    packed: bool

    @property
    def words(self) -> str:
        """Its name in the result."""
        whole = self.config["num_hidden_layers"]
        cut = "" if self.blocks == whole else f", {self.blocks} of {whole} blocks"
        return f"{self.name}, {'4-bit' if self.packed else 'float'}{cut}"

    def write(self, kit: Kit) -> Path:
        """Return a folder with it, written once."""
        config = {**self.config, "num_hidden_layers": self.blocks}
        folder = kit.work / f"speed-{self.name}-{self.blocks}{'-4bit' if self.packed else ''}"
        return write_model(folder, config, device.compute_dtype(), AFFINE if self.packed else None)


def speed_models(kit: Kit) -> list[SpeedModel]:
    """Return four models for this machine."""
    if not kit.on_gpu:
        return [
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, False),
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, True),
            SpeedModel("Gemma-3-270M", SMALL_GEMMA, 6, False),  # its pattern of windows is six blocks long
            SpeedModel("Qwen3-0.6B", SMALL_QWEN, 2, True),
        ]
    large = QWEN3_8B if kit.here.working_set_bytes >= MEMORY_FOR_LARGE else QWEN3_4B
    return [
        SpeedModel("SmolLM2-135M", SMOLLM2.config, 30, False),
        SpeedModel("Gemma-3-270M", SMALL_GEMMA, 18, False),
        SpeedModel("Llama-3.2-1B", LLAMA_1B.config, 8, True),
        SpeedModel(large.name, large.config, 6, True),
    ]
