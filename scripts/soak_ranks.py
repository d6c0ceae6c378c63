"""Kill, freeze and cut off processes that share a base, resume them, and compare their adapter with an undisturbed run's.

    python scripts/soak_ranks.py [--kills 20] [--freezes 20] [--cuts 20] [--groups 1] [--silence 20] [--ranks 2]

Runs of the tests' tiny model, with dropout, accumulation, validations and checkpoints, share their base among `--ranks`
processes (`--parts`, as --shard-base takes them). At random moments of a run

    kill      a process gets SIGKILL
    freeze    a process gets SIGSTOP, and SIGCONT when the others have ended
    cut       the link between two network namespaces goes down (needs root and iproute2; two processes)

Every process that still runs must end within 30 s and with an exit code, and one of them must say why. After `--per-run`
faults the run finishes: its adapter must equal that of the undisturbed run byte for byte. A silent machine counts as lost
after 20 s; `--silence 5` shortens that, and the script then allows 15 s. `--groups` tries so many runs at the same time.

Faults fall between the run's header and its end: before that, processes are still waiting for each other. Prints a line for
each fault, and one JSON line; the exit code is 1 if a process hung, no reason was told, or an adapter differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ranks import Started, namespace_pair  # noqa: E402
from soak import checksum  # noqa: E402

STEPS = 20
GRACE_S = 10.0  # beyond the silence until a lost machine counts as such, for all to end
BEGUN, DONE = "Base: ", f"{STEPS} steps done"  # in the run header, and after the last save
STALLED_S = 600.0  # until a run that nothing was done to counts as hung
REASONS = {"kill": "ended without a message", "freeze": "sent nothing for", "cut": "sent nothing for"}
# The train command, with another limit of silence.
SILENCED = """
import sys
import mlx_lora.parallel.ranks as heartbeat
heartbeat.SILENCE_S = float(sys.argv.pop(1))
from mlx_lora.cli.train import main
main()
"""


@dataclass
class Found:
    """What came of one fault.

    Attributes:
        kind: of the fault.
        seconds: until the last process had ended.
        codes: exit codes.
        problem: empty if all went well.
    """

    kind: str
    seconds: float
    codes: list[int | None]
    problem: str


@dataclass
class Group:
    """Runs that take place one after the other, beside those of other groups.

    Attributes:
        number: of the group.
        options: of the command.
        root: takes its runs.
        model, data: of every run.
        expected: the checksum of the undisturbed run.
        usual_s: that it took.
        faults: what came of them.
        different: runs whose adapter differs, or that did not finish.
    """

    number: int
    options: argparse.Namespace
    root: Path
    model: Path
    data: Path
    expected: str = ""
    usual_s: float = 0.0
    faults: list[Found] = field(default_factory=list)
    runs: int = 0
    different: int = 0

    def command(self, folder: Path) -> list[object]:
        """Return the training command, which resumes from the folder."""
        words = [
            "--model", self.model, "--data", self.data, "--adapter-path", folder, "--iters", STEPS,
            "--batch-tokens", 512, "--grad-accumulation-steps", 2, "--dropout", 0.1, "--rank", 8, "--steps-per-report", 1,
            "--steps-per-eval", 4, "--val-batches", 2, "--save-every", 2, "--keep", 2, "--resume",
            "--shard-base", self.options.parts,
        ]  # fmt: skip
        return ["-c", SILENCED, self.options.silence, *words]

    def start(self, folder: Path, prefixes: list[list[str]]) -> Started:
        logs = folder.parent / f"{folder.name} logs"
        shutil.rmtree(logs, ignore_errors=True)
        return Started([self.command(folder)] * self.options.ranks, logs, prefixes)

    def undisturbed(self) -> None:
        """Take the run that the others are compared with."""
        began_s = time.monotonic()
        ended = self.start(self.root / "whole", []).wait(STALLED_S)
        if any(ended.codes):
            raise SystemExit(f"the undisturbed run ended with {ended.codes}: {ended.errs[0][-2000:]}")
        self.expected, self.usual_s = checksum(self.root / "whole"), time.monotonic() - began_s

    def disturb(self, kinds: list[str], chance: random.Random) -> None:
        """Do these faults to a run, let it finish, and compare its adapter."""
        folder = self.root / f"run {self.number} {self.runs}"
        with namespace_pair(f"s{os.getpid() % 10000}g{self.number}") if "cut" in kinds else none() as prefixes:
            for kind in kinds:
                found = self.fault(kind, folder, prefixes if kind == "cut" else [], chance)
                if found is None:
                    break
                self.faults.append(found)
                words = found.problem or f"exit codes {found.codes}"
                print(f"group {self.number}: {kind}: all ended after {found.seconds:.1f} s, {words}", flush=True)
        ended = self.start(folder, []).wait(STALLED_S)
        same = not any(ended.codes) and checksum(folder) == self.expected
        self.different += not same
        self.runs += 1
        words = "same bytes" if same else f"DIFFERENT ({ended.codes}) {ended.message(0)}"
        print(f"group {self.number}: run {self.runs}: {words}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)

    def fault(self, kind: str, folder: Path, prefixes: list[list[str]], chance: random.Random) -> Found | None:
        """Start or continue the run, do something to it, and return what came of it; None if the run had ended before.

        A run may end well while the fault is done to it; its adapter is compared all the same.
        """
        ranks, victim = self.start(folder, prefixes), chance.randrange(self.options.ranks)
        try:
            if not self.moment(ranks, folder, chance):
                return None
            began_s = time.monotonic()
            if kind == "cut":
                link(prefixes, "down")
            else:
                ranks.signal(victim, {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[kind])
            survivors = [rank for rank in range(self.options.ranks) if kind == "cut" or rank != victim]
            hung = not ends(ranks, survivors, self.options.silence + GRACE_S)
            if kind == "freeze":
                ranks.signal(victim, signal.SIGCONT)
                hung |= not ends(ranks, [victim], GRACE_S)
            seconds = time.monotonic() - began_s
            codes = [process.poll() for process in ranks.processes]
            if not hung and not any(codes[rank] for rank in survivors) and DONE in ranks.logs[0].read_text():
                return None  # all had already said that they were done
            texts = [ranks.logs[rank].read_text() for rank in survivors]
            told = any(REASONS[kind] in text for text in texts)
            problem = "a process HUNG" if hung else "" if told else f"NO REASON was told: {texts}"
            return Found(kind, seconds, codes, problem)
        finally:
            for process in ranks.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            if kind == "cut":
                link(prefixes, "up")

    def moment(self, ranks: Started, folder: Path, chance: random.Random) -> bool:
        """Wait for a random moment between the run's header and its end; return False if the run has ended.

        Half of the moments are near a save, when there is a checkpoint more than before.
        """
        deadline = time.monotonic() + STALLED_S
        before, near_a_save = set((folder / "checkpoints").glob("step-*")), chance.random() < 0.5
        while BEGUN not in ranks.logs[0].read_text():
            if any(process.poll() is not None for process in ranks.processes) or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        while near_a_save and not set((folder / "checkpoints").glob("step-*")) - before:
            if any(process.poll() is not None for process in ranks.processes) or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        time.sleep(chance.uniform(0, (0.1 if near_a_save else 0.5) * self.usual_s))
        return all(process.poll() is None for process in ranks.processes)


@contextmanager
def none() -> Iterator[list[list[str]]]:
    """Yield no prefixes."""
    yield []


def link(prefixes: list[list[str]], state: str) -> None:
    """Set the link between two namespaces up or down; one end is enough."""
    subprocess.run([*prefixes[0], "ip", "link", "set", "veth0", state], check=True)


def ends(ranks: Started, which: list[int], limit_s: float) -> bool:
    """Wait until these ranks have ended, and return whether they did in time."""
    deadline = time.monotonic() + limit_s
    for rank in which:
        try:
            ranks.processes[rank].wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def dealt(options: argparse.Namespace, chance: random.Random) -> list[list[list[str]]]:
    """Return the faults of each run of each group."""
    kinds = [kind for kind in REASONS for _ in range(getattr(options, f"{kind}s"))]
    chance.shuffle(kinds)
    runs = [kinds[at : at + options.per_run] for at in range(0, len(kinds), options.per_run)]
    return [runs[group :: options.groups] for group in range(options.groups)]


def soak(group: Group, runs: list[list[str]]) -> Group:
    """Take a group's runs, and those again whose end came before all of their faults."""
    chance = random.Random(group.options.seed * 1000 + group.number)
    for kinds in runs:
        left = list(kinds)
        for _ in range(2 * len(kinds)):
            if not left:
                break
            before = len(group.faults)
            group.disturb(left, chance)
            left = left[len(group.faults) - before :]
    return group


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in REASONS:
        parser.add_argument(f"--{kind}s", type=int, default=20)
    parser.add_argument("--groups", type=int, default=1, help="runs at the same time")
    parser.add_argument("--per-run", type=int, default=4, help="faults before a run may finish")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parts", default="even", help="--shard-base")
    parser.add_argument("--silence", type=float, default=20.0, help="seconds until a silent machine counts as lost")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.cuts and (options.ranks != 2 or os.geteuid() != 0 or not shutil.which("ip")):
        parser.error("--cuts: needs two ranks, root and iproute2; give --cuts 0")
    with tempfile.TemporaryDirectory() as root_name:
        root = Path(root_name)
        os.environ["MLX_LORA_CACHE"] = str(root / "cache")
        os.environ.setdefault("MLX_LORA_MEASURE_KERNELS", "0")  # a busy clock could choose others
        from soak import prepare

        groups = [Group(number, options, root, *prepare(root, "sft")) for number in range(options.groups)]
        groups[0].undisturbed()
        for group in groups:
            group.expected, group.usual_s = groups[0].expected, groups[0].usual_s
        with ThreadPoolExecutor(options.groups) as pool:
            list(pool.map(soak, groups, dealt(options, random.Random(options.seed))))
    faults = [found for group in groups for found in group.faults]
    kinds = {kind: [found for found in faults if found.kind == kind] for kind in REASONS}
    facts = {
        "faults": {kind: len(of_kind) for kind, of_kind in kinds.items()},
        "longest_s": {
            kind: round(max((f.seconds for f in of_kind), default=0.0), 1) for kind, of_kind in kinds.items()
        },
        "problems": sum(bool(found.problem) for found in faults),
        "runs": sum(group.runs for group in groups),
        "different": sum(group.different for group in groups),
    }
    print(json.dumps(facts))
    return 1 if facts["problems"] or facts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
