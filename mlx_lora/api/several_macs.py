"""Predict whether a run fits on several Macs that share its base, and whether their link or their chips decide the speed."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlx_lora.api.macs_splits import predicted_splits, splits_line
from mlx_lora.models.kernel_choice import KernelChoice
from mlx_lora.models.outline import outline_of
from mlx_lora.planner.chips import find_chip
from mlx_lora.planner.fitting import largest_batch, run_of
from mlx_lora.planner.macs_plan import Link, Mac, MacsPlan, Units, least_tokens, memory_shares, plan_macs
from mlx_lora.planner.memory import MemoryPlan
from mlx_lora.planner.shapes import KernelTerms, ModelShape
from mlx_lora.planner.speed import listed_ceilings
from mlx_lora.settings.checks import shard_parts
from mlx_lora.settings.config import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.system import device
from mlx_lora.system.errors import InputError
from mlx_lora.system.units import counted, gigabytes
from mlx_lora.training.base_shards import units_of
from mlx_lora.training.run_fit import outlined_shape

# Thunderbolt 5 is sold as 80 Gbit/s; half of it is assumed for messages of a block's size, and was not measured.
LINK_GBIT = 40.0


def parse_macs(text: str) -> list[tuple[str, int]]:
    """Return (chip, memory in GB) of each Mac in `M4 Pro:48,M2 Max:32`.

    Raises:
        InputError: it is written otherwise, or names one Mac only.
    """
    macs = []
    for part in text.split(","):
        chip, colon, memory = part.rpartition(":")
        if not colon or not memory.strip().isdecimal() or not 1 <= int(memory) <= 4096:
            raise InputError(f'--macs {text!r}: write chip and memory of each Mac, as in "M4 Pro:48,M2 Max:32"')
        macs.append((find_chip(chip).name, int(memory)))
    if len(macs) < 2:
        raise InputError(f"--macs {text!r}: one Mac; use --chip and --memory-gb, or name two or more")
    return macs


def plan_on_macs(settings: TrainSettings, macs: list[tuple[str, int]], link_gbit: float = LINK_GBIT) -> dict[str, Any]:
    """Return the plan of a run on several Macs that share its base, as JSON values.

    Args:
        settings: of the run; each row counts as --max-seq-length tokens, and a batch is that of all Macs together.
        macs: (chip, memory in GB) of each.
        link_gbit: 10^9 bits a second that each Mac sends while it receives as many.

    Raises:
        InputError: there is no such chip or model, or the parts do not fit the Macs.
    """
    number_bytes = 4 if settings.model.dtype == "float32" else 2
    dtype = settings.model.dtype if settings.model.dtype != "auto" else "bfloat16"
    outline = outline_of(settings.model.model or "", settings.model.revision, device.compute_dtype(dtype))
    shape = outlined_shape(outline, settings, KernelChoice(settings.loop.kernels))
    units = units_of(outline.model)
    chosen = [
        Mac(
            dataclasses.replace(find_chip(chip).machine(memory, number_bytes), kernels=KernelTerms()),
            listed_ceilings(find_chip(chip), number_bytes),
        )
        for chip, memory in macs
    ]
    shares = _shares(settings, chosen)
    mode = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
    tokens = settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    rows, width = largest_batch(settings.data.max_seq_length - 1, settings, tokens)
    run = run_of(settings, max(rows, len(macs)), width, mode)
    link = Link(link_gbit * 1e9 / 8)
    found = plan_macs(shape, units, run, chosen, shares, link)
    least = least_tokens(shape, units, run, chosen, shares, link)
    return {
        "fits": found.fits,
        "macs": [_mac_row(*row) for row in zip(chosen, shares, found.memory, found.computing_s, strict=True)],
        "batch_tokens": run.positions,
        "max_seq_length": width + 1,
        "grad_checkpoint": mode,
        "units": {
            "blocks": len(units.blocks),
            "largest_bytes": max((*units.blocks, *units.tables)),
            "bytes": units.bytes,
        },
        "sent_bytes_per_step": found.sent_bytes,
        "link_gbit_per_s": link_gbit,
        "predicted": _predicted(found, run.positions, shape, units),
        "least_batch_tokens": least,
        "splits": predicted_splits(settings, shape, run, chosen, link, found),
        "whole_base_bytes": shape.base_bytes,
    }


def _shares(settings: TrainSettings, macs: list[Mac]) -> list[float]:
    """Return each Mac's part of the base: those of --shard-base, or in proportion to what each may use."""
    asked = settings.loop.shard_base
    parts = shard_parts(asked)
    if asked == "even":
        parts = [1.0] * len(macs)
    if parts is None:
        return memory_shares([mac.machine for mac in macs])
    if len(parts) != len(macs):
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {len(macs)} Macs; give one for each")
    return [part / sum(parts) for part in parts]


def _mac_row(mac: Mac, share: float, memory: MemoryPlan, computing_s: float) -> dict[str, Any]:
    return {
        "name": mac.machine.name,
        "share": share,
        "fits": memory.fits,
        "peak_bytes": memory.peak_bytes,
        "needed_bytes": memory.needed_bytes,
        "budget_bytes": memory.budget_bytes,
        "parts": memory.parts,
        "phase": memory.phase,
        "computing_s": computing_s,
    }


def _predicted(found: MacsPlan, tokens: int, shape: ModelShape, units: Units) -> dict[str, Any]:
    return {
        "note": "predicted, not measured",
        "step_s": found.step_s,
        "computing_s": max(found.computing_s),
        "link_s": found.link_s,
        "first_message_s": found.first_s,
        "gradients_s": found.sum_s,
        "decides": "link" if found.link_decides else "chips",
        "tokens_per_s": tokens / found.step_s,
        "sent_of_base": sum(units.of_step(shape.first_trained)) / max(1, units.bytes),
    }


def render_macs(plan: dict[str, Any]) -> str:
    """Return the plan as text for the terminal, with a table in Markdown."""
    speed, count = plan["predicted"], len(plan["macs"])
    verdict = "fits" if plan["fits"] else "does not fit"
    lines = [
        f"{counted(count, 'Mac')} that share the base of {gigabytes(plan['whole_base_bytes'])}: {verdict}",
        "",
        "| Mac | part | needs | may use | computing a step |",
        "|---|---|---|---|---|",
        *(
            f"| {mac['name']} | {mac['share']:.0%} | {gigabytes(mac['needed_bytes'])}{'' if mac['fits'] else ', too much'} "
            f"| {gigabytes(mac['budget_bytes'])} | {mac['computing_s']:.1f} s |"
            for mac in plan["macs"]
        ),
        "",
        f"A step of {plan['batch_tokens']:,} tokens: {speed['computing_s']:.1f} s of computing beside {speed['link_s']:.1f} s of sending "
        f"({gigabytes(plan['sent_bytes_per_step'])} at {plan['link_gbit_per_s']:g} Gbit/s), so the {speed['decides']} decide"
        f"{'s' if speed['decides'] == 'link' else ''}; {speed['step_s']:.1f} s in all, {speed['tokens_per_s']:,.0f} tokens/s",
    ]
    least = plan["least_batch_tokens"]
    lines.append(
        "No batch of up to a million tokens hides the sending"
        if least is None
        else f"Sending is hidden from about {least:,} tokens a batch on (--batch-tokens)"
    )
    lines.append(splits_line(plan["splits"]))
    lines.append(
        "All predicted, from listed rates of the chips and an assumed rate of the link; nothing was measured on a Mac."
    )
    return "\n".join(lines)
