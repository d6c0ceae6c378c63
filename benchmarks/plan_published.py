"""Compare the times that gpu_counts.py predicts with training speeds that others have published for Macs.

    python benchmarks/plan_published.py --picture docs/published.png

We measured none of these figures. They lie in plan_published.json, each with its source and with what is guessed. Each is
predicted from the graph of a step of mlx_lm.lora 0.32 with the same model, adapter, rows, and checkpointing. Models are outlined
from their published settings; nothing is downloaded.

Every other figure, in the order of the file, fits one time of a launch and, for each generation of chips, one share of the
listed FLOPS. The other half is only predicted. `of the FLOPS` needs neither: it is the counted operations of products for each second
of the published time, as a share of the chip's listed FLOPS. In the file, `tokens` are those of a step that the published speed counts, and
`width` is what is computed of each row: of rows that are not full, the mean and 16 positions, because mlx_lm.lora pads to multiples of 32.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
import numpy as np
from _gpu_kernels import as_on_metal
from _harness import options, table
from gpu_counts import Case, Launch, graphs_of, launches_of
from mlx import nn

from mlx_lora.models.graph import as_on_gpu, uncollected
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.speed import LAUNCH_S, REACHED_BANDWIDTH, REACHED_FLOPS, find_chip

PUBLISHED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
FIGURES = PUBLISHED["figures"]
KEYS = {"all": None, "q, v": ("self_attn.q_proj", "self_attn.v_proj")}
CLOSE = 1.3
LAUNCHES_S = np.geomspace(1e-6, 3e-4, 100)
SHARES = np.arange(0.05, 1.5, 0.01)
HEAD = ("who", "chip", "run", "rows", "of the FLOPS", "tokens/s, published", "predicted", "ratio", "fitted")
OPTIONS = (("--picture", str, "File that gets the picture, such as docs/published.png."),)


@dataclass(frozen=True)
class Published(Case):
    """A published run.

    Attributes:
        config: of its model.
    """

    config: Any = None

    def outline(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model without weights, and its config."""
        return outline_of_config(self.config, mx.bfloat16).model, self.config


def case_of(figure: dict[str, Any]) -> Published:
    """Return the run of a figure."""
    bits = figure["bits"]
    packed = {"quantization": {"group_size": 64, "bits": bits}} if bits else {}
    return Published(
        figure["model"], bool(bits), figure["width"], figure["width"], figure["checkpoint"], figure["rows"], figure["rank"],
        figure["num_layers"], KEYS[figure["keys"]], PUBLISHED["models"][figure["model"]] | packed,
    )  # fmt: skip


class Work:
    """The launches of a published step on its chip, and its speed."""

    def __init__(self, figure: dict[str, Any]) -> None:
        chip = find_chip(figure["chip"])
        cores = (figure["gpu_cores"] or chip.gpu_cores) / chip.gpu_cores
        with as_on_metal(), as_on_gpu(), uncollected():
            counts = Counter[Launch](
                one for graph in graphs_of(case_of(figure), "mlx_lm.lora")[0] for one in launches_of(graph)
            )
        self.times = np.array(list(counts.values()))
        # Where a chip has matrix units, mlx did not use them yet.
        self.computing = np.array([one.flops for one in counts]) / (chip.tflops * 1e12 * cores)
        self.moving = np.array([one.nbytes for one in counts]) / (chip.gb_per_s * 1e9 * REACHED_BANDWIDTH)
        self.packed = np.array([one.kind == "packed product" for one in counts])
        self.family, self.speed, self.tokens = chip.name.split()[0], figure["tokens_per_s"], figure["tokens"]

    @property
    def reached(self) -> float:
        """The share of the listed FLOPS that the published speed needs."""
        return float(self.times @ self.computing) * self.speed / self.tokens

    def ratio(self, launch_s: float, share: float, packed: float = 1.0) -> float:
        """Return the predicted speed divided by the published one.

        Args:
            launch_s: the least time of a launch.
            share: of the listed FLOPS.
            packed: the speed of products of packed weights as a multiple of that of others.
        """
        computing = self.computing / np.where(self.packed, share * packed, share)
        return self.tokens / (self.times @ np.maximum(np.maximum(computing, self.moving), launch_s)) / self.speed


class Fit(NamedTuple):
    """What was fitted.

    Attributes:
        launch_s: time of a launch.
        shares: of the listed FLOPS, by generation of chips.
        packed: see `Work.ratio`.
        up_to_s: the longest time of a launch with which the squares are at most a tenth above the least.
    """

    launch_s: float
    shares: dict[str, float]
    packed: float = 1.0
    up_to_s: float = 0.0

    def ratio(self, work: Work) -> float:
        """Return the ratio of a step; a generation without fitted figures has the median share of the others."""
        return work.ratio(self.launch_s, self.shares.get(work.family, median(self.shares.values())), self.packed)


def fit(works: Sequence[Work], packed: Iterable[float] = (1.0,), by_family: bool = True) -> Fit:
    """Return the constants with the least squares of the logarithms of the ratios."""
    groups = [[one for one in works if one.family == family] for family in {one.family: 0 for one in works}]
    groups = groups if by_family else [list(works)]
    found = []
    for multiple in packed:
        for launch_s in LAUNCHES_S:
            squares, shares = 0.0, {}
            for group in groups:
                errors = [sum(np.log(one.ratio(launch_s, share, multiple)) ** 2 for one in group) for share in SHARES]
                squares += min(errors)
                shares[group[0].family] = float(SHARES[int(np.argmin(errors))])
            found.append((squares, Fit(float(launch_s), shares, multiple)))
    least, best = min(found, key=lambda one: one[0])
    return best._replace(up_to_s=max(one.launch_s for squares, one in found if squares <= 1.1 * least))


def close(ratios: Iterable[float]) -> str:
    """Return how many of the ratios are within the bound, in words."""
    within = [1 / CLOSE <= one <= CLOSE for one in ratios]
    return f"{sum(within)} of {len(within)} within a factor of {CLOSE}"


def row(figure: dict[str, Any], work: Work, ratio: float, fitted: bool) -> list[str]:
    """Return a table row."""
    layers = "" if figure["num_layers"] < 0 else f", {figure['num_layers']} blocks"
    bits = f" {figure['bits']}-bit" if figure["bits"] else ""
    run = f"{figure['model']}{bits}, {figure['keys']}{layers}{', checkpoints' if figure['checkpoint'] else ''}"
    cores = f", {figure['gpu_cores']} cores" if figure["gpu_cores"] else ""
    speeds = f"{work.speed:,.4g}", f"{work.speed * ratio:,.0f}", f"{ratio:.2f}"
    rows = f"{figure['rows']} x {figure['width']:,}"
    return [figure["who"], figure["chip"] + cores, run, rows, f"{work.reached:.0%}", *speeds, "yes" if fitted else "no"]


def picture(ratios: Sequence[float], file: str) -> None:
    """Draw predicted against published speeds: one color for each chip, and empty marks for what was not fitted."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = drawing.subplots()
    ends = np.array([20.0, 4000.0])
    axis.fill_between(ends, ends / CLOSE, ends * CLOSE, color="0.92", label=f"within a factor of {CLOSE}")
    axis.plot(ends, ends, color="0.6", linewidth=1)
    chips = list({one["chip"]: 0 for one in FIGURES})
    for at, (one, ratio) in enumerate(zip(FIGURES, ratios, strict=True)):
        color, speed = f"C{chips.index(one['chip'])}", one["tokens_per_s"]
        face = "none" if at % 2 else color
        axis.plot(speed, speed * ratio, "o", markersize=8, markeredgewidth=1.6, color=color, markerfacecolor=face)
    for at, chip in enumerate(chips):
        axis.plot([], [], "o", color=f"C{at}", label=chip)
    axis.plot([], [], "o", color="0.3", markerfacecolor="none", markeredgewidth=1.6, label="empty: not fitted")
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ticks = [30, 100, 300, 1000, 3000]
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        side.set_ticks([], minor=True)
    axis.set(xlabel="published tokens/s", ylabel="predicted tokens/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    drawing.savefig(file, dpi=120)


def main(argv: Sequence[str]) -> int:
    """Print the table and what was fitted."""
    asked = options(__doc__, *OPTIONS).parse_args(argv)
    works = [Work(figure) for figure in FIGURES]
    known, unseen = works[::2], works[1::2]
    found = fit(known)
    ratios = [found.ratio(one) for one in works]
    marked = [at % 2 == 0 for at in range(len(FIGURES))]
    print(table(HEAD, map(row, FIGURES, works, ratios, marked)))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.shares.items())
    launch = f"{1e6 * found.launch_s:.0f} us a launch (up to {1e6 * found.up_to_s:.0f} us fit about as well)"
    print(f"\nFitted: {launch}; of the listed FLOPS: {shares}\n")
    ways = {
        "fitted": found,
        "one share for all chips": fit(known, by_family=False),
        "products of packed weights with a speed of their own": fit(known, packed=np.arange(0.5, 2.01, 0.1)),
        "planner/speed.py, nothing fitted": Fit(LAUNCH_S, REACHED_FLOPS),
    }
    for name, way in ways.items():
        used = f"{1e6 * way.launch_s:.0f} us, {median(way.shares.values()):.0%}, packed {way.packed:.1f}x"
        print(
            f"- {name}: fitted half {close(map(way.ratio, known))}, other half {close(map(way.ratio, unseen))} ({used})"
        )
    if asked.picture:
        picture(ratios, asked.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
