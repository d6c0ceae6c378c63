"""Print predicted plans of large models on pairs and fours of Macs that share the base, as Markdown.

    python benchmarks/predicted_macs.py [--only llama-3.3-70b-4bit] [--out predicted.json]

Models are outlined from the true settings in benchmarks/configs; nothing is downloaded, and nothing was measured on a Mac. A
row that does not fit as asked (rank 16, rows of 2,048 tokens) is shown with the nearest flags with which it does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core
from mlx_lora.api.plan_macs import LATENCY_S, SharedModel, parse_macs, planned_on, shared_model, suggested
from mlx_lora.config.load import train_settings
from mlx_lora.planner.several_macs import Link
from mlx_lora.utils.text import gigabytes

CONFIGS = Path(__file__).parent / "configs"
MACS = (
    "M4 Pro:48,M2 Max:32", "2 x M2 Max:32", "2 x M4 Pro:48", "2 x M4 Max:64", "2 x M3 Ultra:96", "4 x M4 Pro:24",
    "4 x M2 Max:32", "4 x M4 Pro:48",
)  # fmt: skip
# Gbit/s that each Mac sends while it receives as many, assumed: RDMA over Thunderbolt 5, TCP over Thunderbolt, 10 GbE.
LINKS = {"Thunderbolt 5, RDMA": 40.0, "Thunderbolt bridge": 20.0, "10 GbE": 9.4}


def row(model: SharedModel, macs: str) -> tuple[str, dict[str, Any]]:
    """Return a table row and its values.

    Args:
        model: whose base is shared.
        macs: as --macs takes them.
    """
    given = parse_macs(macs)
    links = [Link(gbit * 1e9 / 8, LATENCY_S) for gbit in LINKS.values()]
    plan, flags = planned_on(model, given, links[0]), ""
    if not plan["fits"]:
        found = suggested(model, given, links[0])
        if found:
            flags, model, given = found.words, found.model, found.macs
            plan = planned_on(model, given, links[0])
    plans = [plan, *(planned_on(model, given, link) for link in links[1:])]
    name = macs.replace(",", " + ").replace(":", " ")
    most = max(plan["macs"], key=lambda mac: mac["needed_bytes"] / mac["budget_bytes"])
    memory = f"{gigabytes(most['needed_bytes'])} of {gigabytes(most['budget_bytes'])}"
    if not plan["fits"]:
        return f"| {name} | **no** | {memory} | | | | | |", {"macs": macs, "fits": False, "plan": plan}
    steps = " / ".join(f"{one['predicted']['step_s']:.0f}" for one in plans)
    speeds = " / ".join(f"{one['predicted']['tokens_per_s']:.0f}" for one in plans)
    decides = " / ".join(one["predicted"]["decides"] for one in plans)
    least = " / ".join(f"{one['least_batch_tokens']:,}" if one["least_batch_tokens"] else "-" for one in plans)
    words = flags or "as asked"
    text = f"| {name} | {words} | {memory} | {gigabytes(plan['sent_bytes_per_step'])} | {steps} | {speeds} | {decides} | {least} |"
    return text, {"macs": macs, "fits": True, "flags": flags, "plans": dict(zip(LINKS, plans, strict=True))}


def main(argv: Sequence[str]) -> int:
    """Print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = sorted(file.stem for file in CONFIGS.glob("*.json"))
    parser.add_argument("--only", action="append", choices=names, help="A model; may be repeated [default: all].")
    parser.add_argument("--out", type=Path, help="JSON file of all plans.")
    args = parser.parse_args(argv)
    results = {}
    print(
        f"Predicted. Three figures in a cell: {', '.join(f'{name} ({gbit:g} Gbit/s)' for name, gbit in LINKS.items())}"
    )
    for name in args.only or names:
        model = shared_model(train_settings({"model": str(CONFIGS / f"{name}.json")}))
        print(f"\n**{name}**, base {gigabytes(model.shape.base_bytes)}\n")
        print(
            "| Macs | fits | tightest Mac needs | each sends a step | step, s | tokens/s | decides | link hidden from, tokens |"
        )
        print("|---|---|---|---|---|---|---|---|")
        results[name] = []
        for macs in MACS:
            text, values = row(model, macs)
            results[name].append(values)
            print(text, flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
