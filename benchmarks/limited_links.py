"""Compare the step of a shared base over links of limited bandwidth with the planner's prediction.

    python benchmarks/limited_links.py                                  (needs root, and Linux with ip and tc)
    python benchmarks/limited_links.py --model DIR --rates 1,10 --tokens 256

Two processes of one thread, in two network namespaces that a veth pair joins, train with `--shard-base` while `tc` limits
the rate of both directions. The prediction is the planner's: its count of what is sent and its model of what is hidden,
with the bandwidth and latency that `mlx-lora cluster` measures over the same link, and with computing seconds from the same two
processes with the whole base. So neither bandwidth nor speed is guessed; what is tested is the count and the model.

By default the model is a random one whose blocks are large, so that at 1 Gbit/s the link decides, and at 10 Gbit/s computing does.
Exit code 1 if a step is more than 25% away from its prediction. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
from _environment import environment
from _figures import seconds_of, steps_from_metrics
from _ours import read_metrics
from _processes import ChildFailed, child_environment, last_lines, run_child

from mlx_lora.config.load import train_settings
from mlx_lora.models.meta import outline_of
from mlx_lora.parallel.sharded_tables import units_of
from mlx_lora.planner.memory import SINGLE
from mlx_lora.planner.several_macs import Link, Units, sending, sends_beside
from mlx_lora.trainer.fit import outlined_shape
from mlx_lora.utils.device import current_device

WITHIN = 0.25
RANK = 4
SYNTHETIC = Path(__file__).parent / "sides" / "synthetic.py"
MODEL = {"hidden": 1024, "layers": 8, "vocabulary": 1024}
UNLIMITED = 0.0
SETTLING_S = 0.05  # the longest that a packet may wait in tc's queue
# The same kernels and checkpoints on both sides, as a shared base needs them.
SAME = ("--grad-checkpoint", "block", "--kernels", "ours")


class Namespaces:
    """Two network namespaces joined by a veth pair whose rate can be limited."""

    def __init__(self, port: int):
        """Name them after this process.

        Args:
            port: of the first rank; the second has the next one.
        """
        self.names = [f"mlxlora{os.getpid()}{side}" for side in "ab"]
        self.devices = [f"ml{os.getpid() % 10**6}{side}" for side in "ab"]
        self.hosts = [[f"10.231.8.{rank + 1}:{port + rank}"] for rank in (0, 1)]

    def make(self) -> None:
        """Make and join them."""
        for name in self.names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        pair = ("type", "veth", "peer", "name", self.devices[1], "netns", self.names[1])
        _run("ip", "link", "add", self.devices[0], "netns", self.names[0], *pair)
        for rank, (name, link) in enumerate(zip(self.names, self.devices, strict=True)):
            _run("ip", "-n", name, "addr", "add", f"10.231.8.{rank + 1}/24", "dev", link)
            _run("ip", "-n", name, "link", "set", link, "up")

    def inside(self, name: str, *words: str) -> None:
        """Run a command in a namespace."""
        _run("ip", "netns", "exec", name, *words)

    def limit(self, gbit: float) -> None:
        """Limit what each side sends to a rate in Gbit/s; UNLIMITED removes the limit."""
        for name, link in zip(self.names, self.devices, strict=True):
            subprocess.run(
                ["ip", "netns", "exec", name, "tc", "qdisc", "del", "dev", link, "root"], capture_output=True
            )
            if gbit:
                # A burst of a millisecond, and at least a few of the largest packets.
                burst = max(256 << 10, int(gbit * 1e9 / 8 / 1000))
                words = ("rate", f"{gbit:g}gbit", "burst", str(burst), "latency", f"{1000 * SETTLING_S:.0f}ms")
                self.inside(name, "tc", "qdisc", "add", "dev", link, "root", "tbf", *words)

    def remove(self) -> None:
        """Remove them, and with them their devices."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*words: str) -> None:
    """Run a command.

    Raises:
        ChildFailed: it failed.
    """
    ran = subprocess.run(words, capture_output=True, text=True)
    if ran.returncode:
        raise ChildFailed(f"{' '.join(words)}: {(ran.stderr or ran.stdout).strip()}")


@contextmanager
def joined(port: int) -> Iterator[Namespaces]:
    """Yield two joined namespaces, and remove them afterward."""
    namespaces = Namespaces(port)
    # `timeout` ends a run with SIGTERM, after which nothing would remove them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        namespaces.make()
        yield namespaces
    finally:
        namespaces.remove()


@dataclass(frozen=True)
class Pair:
    """Starts a command as two ranks, each in its namespace, with one thread and a core of its own."""

    namespaces: Namespaces
    folder: Path
    cores: Sequence[int]
    timeout_s: float

    def run(self, words: Sequence[str], name: str) -> tuple[str, float]:
        """Run `python -m mlx_lora...` as two ranks.

        Args:
            words: arguments of `python`.
            name: of the logs.

        Returns:
            Rank 0's standard output, and the processor seconds of both ranks by the seconds of their cores.

        Raises:
            ChildFailed: a rank ended with an error, or the time ran out.
        """
        hosts = self.folder / "hosts.json"
        hosts.write_text(json.dumps(self.namespaces.hosts), encoding="utf-8")
        threads = {f"{prefix}_NUM_THREADS": "1" for prefix in ("OPENBLAS", "OMP", "VECLIB_MAXIMUM")}
        logs, outs = ([self.folder / f"{name}{rank}.{kind}" for rank in (0, 1)] for kind in ("log", "out"))
        children, start, cpu_s = [], time.monotonic(), 0.0
        try:
            for rank in (0, 1):
                pinned = ["taskset", "-c", str(self.cores[rank])] if shutil.which("taskset") else []
                within = ["ip", "netns", "exec", self.namespaces.names[rank], *pinned]
                ring = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
                with logs[rank].open("w") as log, outs[rank].open("w") as out:
                    children.append(
                        subprocess.Popen(
                            [*within, sys.executable, *words],
                            stdout=out,
                            stderr=log,
                            stdin=subprocess.DEVNULL,
                            env={**child_environment(), **threads, **ring},
                        )
                    )
            for rank, child in enumerate(children):
                ended, status, usage = os.wait4(child.pid, os.WNOHANG)
                while not ended:
                    if time.monotonic() - start > self.timeout_s:
                        raise ChildFailed(f"{name}: longer than {self.timeout_s:.0f} s (--timeout)")
                    time.sleep(0.05)
                    ended, status, usage = os.wait4(child.pid, os.WNOHANG)
                child.returncode = os.waitstatus_to_exitcode(status)
                cpu_s += usage.ru_utime + usage.ru_stime
                if child.returncode:
                    raise ChildFailed(f"{name}: rank {rank} ended with {child.returncode}:\n{last_lines(logs[rank])}")
        finally:
            for child in children:
                if child.returncode is None:
                    child.kill()
                    child.wait()
        return outs[0].read_text(encoding="utf-8"), cpu_s / (2 * (time.monotonic() - start))

    def step_s(self, words: Sequence[str], name: str) -> dict[str, Any]:
        """Train, and return the median seconds of a step, all steps', and the cores' share."""
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)
        _, share = self.run([*words, "--adapter-path", str(run)], name)
        # The first step of a shape traces.
        seconds = seconds_of(steps_from_metrics(read_metrics(run)))[1:]
        return {"step_s": statistics.median(seconds), "steps_s": seconds, "cpu_share": share}

    def link(self) -> Link:
        """Return the bandwidth and latency that `mlx-lora cluster` measures."""
        found = json.loads(self.run(["-m", "mlx_lora", "cluster", "--json"], "probe")[0])["link"]
        return Link(found["bytes_per_s"], found["latency_s"])


def train_words(model: Path, data: Path, tokens: int, steps: int) -> list[str]:
    """Return a train command whose steps have two rows of one length."""
    words = ["-m", "mlx_lora.train", "--model", str(model), "--data", str(data), "--rank", str(RANK)]
    words += ["--iters", str(steps), "--batch-size", "2", "--max-seq-length", str(tokens // 2 + 1)]
    words += ["--steps-per-report", "1", "--save-every", "0", "--valid-fraction", "0", "--val-batches", "0"]
    return [*words, *SAME]


def units_with_adapter(model: Path) -> tuple[Units, int, int]:
    """Return a model's units as the planner counts them, its first trained block and the bytes of its adapter's gradients."""
    settings = train_settings({"model": str(model), "rank": RANK})
    outline = outline_of(str(model), None, mx.float32)
    shape = outlined_shape(outline, settings)
    return units_of(outline.model), shape.first_trained, SINGLE * shape.trained


def made(folder: Path, tokens: Sequence[int], rows: int) -> tuple[Path, dict[int, Path]]:
    """Write a random model, and rows for each number of tokens of a step; return both."""
    data = {}
    for count in tokens:
        job = {**MODEL, "rows": rows, "sequence": count // 2 + 1, "folder": str(folder)}
        (folder / "job.json").write_text(json.dumps({**job, "result": str(folder / "made.json")}), encoding="utf-8")
        run_child([sys.executable, str(SYNTHETIC), str(folder / "job.json")], folder / "made.log", timeout_s=120)
        data[count] = (folder / "train.jsonl").rename(folder / f"rows{count}.jsonl")
        if count != tokens[-1]:
            shutil.rmtree(folder / "model")
    return folder / "model", data


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rates", default="1,5,10", help="Gbit/s, separated by commas.")
    parser.add_argument("--tokens", default="256,1024", help="Tokens of a step, both ranks together.")
    parser.add_argument("--model", type=Path, help="Folder of another model, whose tokenizer gives long rows.")
    parser.add_argument("--data", type=Path, help="Text rows for --model, each longer than a row of a step.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--port", type=int, default=34500)
    parser.add_argument("--timeout", type=float, default=240, help="Seconds allowed for each run.")
    parser.add_argument("--out", type=Path, help="JSON file of everything.")
    args = parser.parse_args(argv)
    args.rates, args.tokens = ([float(x) for x in text.split(",")] for text in (args.rates, args.tokens))
    args.tokens = [2 * (int(count) // 2) for count in args.tokens]
    args.cores = [int(core) for core in args.cores.split(",")]
    if len(args.cores) != 2 or args.steps < 3 or (args.model is None) != (args.data is None):
        parser.error("give two --cores, --steps 3 or more, and --data with --model")
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        parser.error("network namespaces need root, ip and tc (iproute2)")
    return args


def measure(args: argparse.Namespace, pair: Pair, model: Path, data: dict[int, Path]) -> list[dict[str, Any]]:
    """Return a row for each rate and number of tokens, measured and predicted."""
    units, first_trained, gradient_bytes = units_with_adapter(model)
    words = {count: train_words(model, data[count], count, args.steps) for count in args.tokens}
    pair.namespaces.limit(UNLIMITED)
    computing = {count: pair.step_s(words[count], f"whole{count}") for count in args.tokens}
    for count, found in computing.items():
        print(f"whole base, {count} tokens: {found['step_s']:.2f} s a step, cores {found['cpu_share']:.0%}", flush=True)
    rows = []
    for gbit in args.rates:
        pair.namespaces.limit(gbit)
        link = pair.link()
        sent = sending(units, first_trained, gradient_bytes, [0.5, 0.5], link, sends_beside(current_device().backend))
        hidden = replace(sent, beside=True)
        for count in args.tokens:
            found = pair.step_s([*words[count], "--shard-base"], f"shared{count}")
            computing_s = computing[count]["step_s"]
            predicted_s = sent.step_s(computing_s)
            rows.append({
                "gbit_per_s": gbit, "measured_gbit_per_s": link.bytes_per_s * 8e-9, "latency_s": link.latency_s,
                "tokens": count, "computing_s": computing_s, "link_s": sent.link_s, "predicted_s": predicted_s,
                "if_hidden_s": hidden.step_s(computing_s), "sent_bytes": sent.sent_bytes,
                "measured_over_predicted": found["step_s"] / predicted_s, **found,
            })  # fmt: skip
            print(table_row(rows[-1]), flush=True)
    return rows


def table_row(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    return (
        f"| {row['gbit_per_s']:g} ({row['measured_gbit_per_s']:.2f}) | {row['tokens']} | {row['computing_s']:.2f} | {row['link_s']:.2f} "
        f"| {row['predicted_s']:.2f} | {row['step_s']:.2f} | {row['measured_over_predicted'] - 1:+.0%} "
        f"| {row['if_hidden_s']:.2f} | {row['cpu_share']:.0%} |"
    )


def main(argv: Sequence[str]) -> int:
    """Measure all; return 0, or 1 if a run failed or a step is too far from its prediction."""
    args = arguments(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="links-") as temporary, joined(args.port) as namespaces:
            folder = Path(temporary)
            if args.model is None:
                model, data = made(folder, args.tokens, 2 * (args.steps + 2))
            else:
                model, data = args.model, dict.fromkeys(args.tokens, args.data)
            pair = Pair(namespaces, folder, args.cores, args.timeout)
            print(
                "| Gbit/s (measured) | tokens | computing s | link s | predicted s | measured s | off | if hidden s | cores |"
            )
            print("|---|---|---|---|---|---|---|---|---|")
            rows = measure(args, pair, model, data)
    except ChildFailed as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    worst = max(abs(row["measured_over_predicted"] - 1) for row in rows)
    result = {**environment(), "model": str(args.model or "random"), "worst": worst, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"worst: {worst:.0%} from the prediction, allowed {WITHIN:.0%}")
    print(json.dumps({key: result[key] for key in ("date", "commit", "model", "worst", "rows")}))
    return 0 if worst <= WITHIN and math.isfinite(worst) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
