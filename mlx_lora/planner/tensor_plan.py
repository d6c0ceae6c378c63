"""Choose how several processes divide a run: rows with a whole base, rows with a shared base, or layers.

    data, whole base     a rank computes its rows; the gradients are added up once a step
    data, shared base    the same, and each block's weights go around once or twice in each batch, while blocks compute
    tensor               a rank computes all rows with its part of each layer; each block adds up a batch's activations
                         at four places, and each of these sums is waited for

So tensor parallelism sends tokens x width, and a shared base sends weights: small batches on a link with little latency
speak for the first, large batches for the second. A whole base sends least, if it fits.

Shapes: N ranks, T tokens of a batch, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_lora.planner.macs_plan import Link, Mac, MacsPlan
from mlx_lora.planner.memory import SINGLE, MemoryPlan, plan_memory
from mlx_lora.planner.shapes import ModelShape, Run
from mlx_lora.planner.speed import step_seconds
from mlx_lora.system.units import gigabytes

# mlx-lm's modules whose cut was read and is tested (tests/test_tensor_parallel.py).
ARCHITECTURES = (
    "deepseek_v2", "deepseek_v3", "exaone_moe", "glm4_moe", "glm4_moe_lite", "gpt_oss", "llama", "ministral3", "mistral4",
    "qwen2", "qwen3", "qwen3_moe", "step3p5",
)  # fmt: skip
DATA, TENSOR = "data", "tensor"


def cut_problem(architecture: str, config: Mapping[str, Any], size: int) -> str | None:
    """Return in a few words why a model cannot be cut into so many parts, None if it can as far as its config says.

    Args:
        architecture: mlx-lm's module, such as `llama`, which also has Mistral.
        config: config.json.
        size: N.
    """
    if architecture not in ARCHITECTURES:
        return f"mlx-lm's {architecture} is not one of the architectures that are cut ({', '.join(ARCHITECTURES)})"
    text = {**config, **(config.get("text_config") or {})}
    heads = text.get("num_attention_heads")
    counts = {
        "attention heads": heads,
        "key-value heads": text.get("num_key_value_heads") or heads,
        "MLP columns": text.get("intermediate_size"),
        "expert columns": text.get("moe_intermediate_size"),
    }
    uneven = [f"{count} {name}" for name, count in counts.items() if isinstance(count, int) and count % size]
    return f"the model has {' and '.join(uneven)}, which cannot be divided by {size}" if uneven else None


def cut_config(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return config.json of one rank's part, as far as the planner reads it: its heads."""
    text = {**config, **(config.get("text_config") or {})}
    heads = int(text.get("num_attention_heads") or 0)
    if not heads:
        return dict(config)
    width = text.get("head_dim") or text.get("hidden_size", 0) // heads
    key_heads = int(text.get("num_key_value_heads") or heads)
    own = {"num_attention_heads": heads // size, "num_key_value_heads": key_heads // size, "head_dim": width}
    return {**config, **own, **({"text_config": {**config["text_config"], **own}} if "text_config" in config else {})}


def sums_of_step(shape: ModelShape, checkpointing: str) -> int:
    """Return how often a batch's activations are added up over the ranks in a step.

    Two branches of each block end with a sum in the forward pass, and begin with one in the backward pass. A block that is
    computed again, without its products, adds up its attention's output once more. The loss, whose positions are divided, adds
    up the gradient of its inputs.
    """
    trained = len(shape.blocks) - shape.first_trained
    again = trained if checkpointing not in ("none", "selective") else 0
    return 2 * len(shape.blocks) + 2 * trained + again + (not shape.plain_loss)


@dataclass(frozen=True)
class Split:
    """One way to divide a run, and what is predicted of it.

    Attributes:
        name: `data` or `tensor`.
        shared: whether the base is in parts; only with `data`.
        tokens: of a batch of all ranks.
        memory: each rank's plan.
        computing_s: of a step, of the slowest rank.
        waiting_s: in which nothing is computed, for the link.
        problem: why it cannot be used; empty if it can.
    """

    name: str
    shared: bool = False
    tokens: int = 0
    memory: tuple[MemoryPlan, ...] = ()
    computing_s: float = 0.0
    waiting_s: float = 0.0
    problem: str = ""

    @property
    def step_s(self) -> float:
        """The seconds of a step."""
        return self.computing_s + self.waiting_s

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.step_s if self.step_s else 0.0

    @property
    def fits(self) -> bool:
        """Whether it fits each rank."""
        return all(plan.fits for plan in self.memory)

    @property
    def most_needed_bytes(self) -> int:
        """By the rank that needs most."""
        return max((plan.needed_bytes for plan in self.memory), default=0)

    @property
    def words(self) -> str:
        """Its name for messages."""
        return f"{self.name} with {'a shared' if self.shared else 'a whole'} base" if self.name == DATA else self.name

    @property
    def verdict(self) -> str:
        """Its speed, or why it cannot be used."""
        if self.problem:
            return f"not possible ({self.problem})"
        if not self.fits:
            least = min(plan.budget_bytes for plan in self.memory)
            return f"does not fit (needs {gigabytes(self.most_needed_bytes)} of {gigabytes(least)})"
        return f"{self.tokens_per_s:,.0f} tokens/s"


def split_by_tensor(shape: ModelShape, batch: Run, macs: Sequence[Mac], link: Link, number_bytes: int) -> Split:
    """Return what is predicted of tensor parallelism.

    Args:
        shape: of one rank's part of the model, with the whole adapter.
        batch: of all ranks, each of which computes all of it.
        macs, link: what it runs on.
        number_bytes: of an activation.
    """
    memory = tuple(plan_memory(shape, batch, mac.machine) for mac in macs)
    computing = max(step_seconds(shape, batch, mac.machine, mac.ceilings)[0] for mac in macs)
    one = link.sum_s(batch.positions * shape.width * number_bytes, len(macs))
    waiting = sums_of_step(shape, batch.checkpointing) * one + link.sum_s(SINGLE * shape.trained, len(macs))
    return Split(TENSOR, tokens=batch.positions, memory=memory, computing_s=computing, waiting_s=waiting)


def split_by_rows(shape: ModelShape, batch: Run, macs: Sequence[Mac], link: Link) -> Split:
    """Return what is predicted of rows that are dealt, with the whole base on each rank.

    Args:
        shape: of the whole model.
        batch: of all ranks.
        macs, link: what it runs on.
    """
    own = replace(batch, rows=-(-batch.rows // len(macs)))
    memory = tuple(plan_memory(shape, own, mac.machine) for mac in macs)
    computing = max(step_seconds(shape, own, mac.machine, mac.ceilings)[0] for mac in macs)
    waiting = link.sum_s(SINGLE * shape.trained, len(macs))
    return Split(DATA, tokens=batch.positions, memory=memory, computing_s=computing, waiting_s=waiting)


def split_with_shared_base(plan: MacsPlan, tokens: int) -> Split:
    """Return what is predicted of rows that are dealt, with a part of the base on each rank.

    Args:
        plan: of such a run.
        tokens: of a batch of all ranks.
    """
    computing = max(plan.computing_s)
    return Split(DATA, True, tokens, plan.memory, computing, plan.step_s - computing)


def best(splits: Sequence[Split]) -> Split:
    """Return the fastest split that fits; if none does, the one that needs least."""
    possible = [split for split in splits if not split.problem]
    fitting = [split for split in possible if split.fits]
    if fitting:
        return max(fitting, key=lambda split: split.tokens_per_s)
    return min(possible, key=lambda split: split.most_needed_bytes)
