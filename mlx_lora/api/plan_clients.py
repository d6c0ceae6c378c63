"""Predict whether a training server (`serve --training`) has room for so many clients, and how many it has room for.

The server takes from here what a client's model adapts, and how large a micro-batch may be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora.adapters.inject import ALL_LINEAR, select_targets
from mlx_lora.config.settings import AdapterSettings, ServeSettings
from mlx_lora.models.head import find_head
from mlx_lora.models.meta import outline_for
from mlx_lora.planner.fit import budget_of, largest_that_fits
from mlx_lora.planner.memory import Machine, MemoryPlan, Rollout, RunShape, plan_clients
from mlx_lora.trainer.fit import outlined_shape, with_caches, with_kernels
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings

MOST_CLIENTS = 1024
# Sets of weights in memory to sample from, beyond which the least recently used are written to files.
MOST_RESIDENT = 8
# Tinker's: the product of the factors counts alpha / rank.
ALPHA = 32.0
# Names of the modules that mix positions; the rest of a block is its MLP, experts included.
ATTENTION = re.compile(r"attn|attention|mixer|conv|ssm", re.IGNORECASE)
# Positions of a micro-batch, padding included: with a fused head, and where all logits are in memory, as float32, with their gradient.
POSITIONS, LOGIT_BYTES = 4096, 2**30
# What the plan has of a `MemoryPlan`.
FACTS = ("fits", "peak_bytes", "parts", "cache_bytes", "needed_bytes", "budget_bytes", "phase", "phases")


@dataclass(frozen=True)
class LoraShape:
    """What a client asks for when it creates a model.

    Attributes:
        rank: of all layers.
        seed: of the first factors.
        attention, mlp, unembed: which layers are adapted.
    """

    rank: int
    seed: int
    attention: bool = True
    mlp: bool = True
    unembed: bool = True


def most_positions(plain_loss: bool, vocabulary: int) -> int:
    """Return the most positions of a micro-batch; fewer where all logits are in memory, unless one row is longer."""
    return max(256, min(POSITIONS, LOGIT_BYTES // (12 * vocabulary))) if plain_loss else POSITIONS


def chosen_paths(model: nn.Module, config: dict[str, Any], shape: LoraShape) -> tuple[str, ...]:
    """Return the layers that a client's model adapts.

    Raises:
        InputError: there are none, or the model's head cannot be adapted.
    """
    paths = []
    if shape.attention or shape.mlp:
        for path in select_targets(model, ALL_LINEAR).paths:
            if shape.attention if ATTENTION.search(path) else shape.mlp:
                paths.append(path)
    if shape.unembed:
        head = find_head(model, config)
        if isinstance(head, str):
            raise InputError(f"train_unembed: {head}, so it cannot be adapted; pass train_unembed=False")
        by_identity = {id(module): path for path, module in model.named_modules()}
        paths.append(by_identity[id(head.layer)])
    if not paths:
        raise InputError(
            "lora_config: train_mlp, train_attn and train_unembed leave no layer; pass one of them as True"
        )
    return tuple(paths)


def plan_training_server(settings: TrainSettings, clients: int, machine: Machine) -> dict[str, Any]:
    """Return the plan of a server whose clients each train one adapter; no weights are read.

    Each client adapts all linear layers and, where that is possible, the head, as Tinker's do by default. Requests have rows of
    --max-seq-length tokens, and as many answers of that length, prompts included, are sampled at a time as `serve --max-batch`
    allows by default.

    Args:
        settings: of the model, and of the rank, the longest row and the memory budget.
        clients: that train at a time.
        machine: that it runs on.

    Returns:
        `fits`, `peak_bytes`, `parts`, `most_clients`, `further_client_bytes` (what one client more adds to the peak), and more.

    Raises:
        InputError: there is no such model.
    """
    if not settings.model.model:
        raise InputError("--model is required: a hub id, a folder, a config.json or a .gguf file")
    dtype = settings.model.dtype
    if dtype == "auto":  # a GPU computes with 16 bits, even if this machine does not
        dtype = "float32" if machine.number_bytes == 4 else "bfloat16"
    outline = outline_for(settings.model, device.compute_dtype(dtype))
    outline.model.freeze()
    rank, unembed = settings.adapter.rank, not isinstance(find_head(outline.model, outline.config), str)
    paths = chosen_paths(outline.model, outline.config, LoraShape(rank, 0, unembed=unembed))
    adapter = AdapterSettings(rank=rank, alpha=ALPHA, target_modules=",".join(paths))
    settings = replace(settings, adapter=adapter)
    shape = with_caches(outlined_shape(outline, settings), outline.model)
    machine = with_kernels(settings, shape, machine)
    width, budget = settings.data.max_seq_length, budget_of(settings.loop, machine)
    run = RunShape(max(1, most_positions(shape.plain_loss, shape.vocabulary) // width), width)
    prompt = max(1, width // 2)
    answers = Rollout(ServeSettings().max_batch, 1, prompt, max(1, width - prompt))

    def planned(number: int) -> MemoryPlan:
        return plan_clients(shape, number, run, answers, MOST_RESIDENT, machine, budget)

    memory = planned(clients)
    return {
        "not_known": list(shape.not_known),
        **{name: getattr(memory, name) for name in FACTS},
        "clients": clients,
        "most_clients": largest_that_fits(lambda number: planned(number).fits, MOST_CLIENTS, step=1),
        "rank": rank,
        "train_unembed": unembed,
        "max_seq_length": width,
        "rows": run.rows,
        "answers": answers.prompts,
        "further_client_bytes": planned(clients + 1).peak_bytes - memory.peak_bytes,
        "machine": {"name": machine.name, "backend": machine.backend, "memory_bytes": machine.memory_bytes},
    }
