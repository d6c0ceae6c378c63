"""Predict whether a training server (`serve --training`) has room for so many clients, and how many it has room for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_lora.config.settings import AdapterSettings, ServeSettings
from mlx_lora.models.head import find_head
from mlx_lora.models.meta import outline_for
from mlx_lora.planner.fit import budget_of, largest_that_fits
from mlx_lora.planner.memory import plan_clients
from mlx_lora.planner.shapes import Rollout, RunShape
from mlx_lora.trainer.fit import outlined_shape, with_caches, with_kernels
from mlx_lora.training_server.models import ALPHA, LoraShape, chosen_paths, most_positions
from mlx_lora.training_server.worker import MOST_RESIDENT
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.planner.memory import MemoryPlan
    from mlx_lora.planner.shapes import Machine

MOST_CLIENTS = 1024
# What the plan has of a `MemoryPlan`.
FACTS = ("fits", "peak_bytes", "parts", "cache_bytes", "needed_bytes", "budget_bytes", "phase", "phases")


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
