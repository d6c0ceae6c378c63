"""Kill a training run with -9 repeatedly, resume it, and compare its adapter with that of an undisturbed run.

    python scripts/soak.py [--kills 200] [--per-run 5] [--objective sft|grpo]

A run of the tests' tiny model, with dropout, accumulation, a validation every 2nd and a checkpoint every step, is
killed `--per-run` times at random moments, then finishes: its adapter must equal that of the undisturbed run byte for
byte. Then the next run starts. Moments are drawn over the whole life of the process, with its start, and half of the
kills wait for a save or a validation. Prints what the runs were doing when killed, and one JSON line; the exit code is 1
if any adapter differs.

With `--objective grpo` the run samples its answers: two updates on each rollout, a checkpoint after both. A third of the
kills then wait for a reward, so that they fall between a rollout and its update.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

STEPS = 12
OF = {
    "sft": ("--batch-tokens", 512, "--steps-per-eval", 2, "--save-every", 1),
    "grpo": ("--batch-size", 2, "--group-size", 4, "--max-new-tokens", 24, "--updates-per-rollout", 2,
             "--steps-per-eval", 4, "--save-every", 2, "--sample-tokens", 0),
}  # fmt: skip
MARK = "SOAK_MARK"  # the environment variable with the file that a reward touches
REWARD = f"""
import os
from pathlib import Path

def odd(completions, **columns):
    Path(os.environ["{MARK}"]).touch()
    return [sum(ord(letter) % 2 for letter in text) / max(1, len(text)) for text in completions]
"""


def command(model: Path, data: Path, folder: Path, objective: str) -> list[str]:
    """Return the training command, which resumes from the folder."""
    words = (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", STEPS, "--objective", objective,
        "--grad-accumulation-steps", 2, "--dropout", 0.1, "--rank", 8, "--steps-per-report", 1, "--val-batches", 2,
        "--keep", 2, "--resume", *OF[objective],
    )  # fmt: skip
    if objective == "grpo":
        words += ("--reward", f"{data.parent / 'reward.py'}:odd")
    return [sys.executable, "-m", "mlx_lora", *(str(word) for word in words)]


def prepare(root: Path, objective: str) -> tuple[Path, Path]:
    """Write the model and the data."""
    from conftest import tiny_model, write_folder

    size = {"hidden_size": 128, "intermediate_size": 384}
    model = write_folder(root / "model", tiny_model(**size), size)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "abc" * (5 + n % 20)} for n in range(120)]
    if objective == "grpo":
        rows = [{"prompt": f"{n} and {n + 1}: "} for n in range(120)]
        (root / "reward.py").write_text(REWARD)
        os.environ[MARK] = str(root / "rewarded")
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def checksum(folder: Path) -> str:
    return hashlib.sha256((folder / "adapters.safetensors").read_bytes()).hexdigest()


def saving(folder: Path) -> bool:
    """Tell whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob(".step-*"))


def rewarded(folder: Path) -> bool:
    """Tell whether answers have been rewarded since the mark was removed: now the update follows, or a validation ends."""
    return Path(os.environ[MARK]).exists()


def validating(folder: Path) -> bool:
    """Tell whether the last line of the metrics is of a step that a validation may follow."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):
        return False
    return last["val_loss"] is None and last["step"] % 2 == 0


def moment(folder: Path) -> str:
    """Return what the run was doing, judging by its folder."""
    if saving(folder):
        return "in a save"
    if validating(folder):
        return "in a validation"
    if not (folder / "metrics.jsonl").exists():
        return "before the first step"
    return "in a step, or starting again"


def kill_once(line: list[str], folder: Path, chance: random.Random, usual_s: float, objective: str) -> str | None:
    """Start the run, kill it, and return what it was doing; None if it had already ended."""
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(chance.uniform(0.3, 1) * usual_s)
    wanted = chance.choice([saving, validating, None, None] + [rewarded] * 2 * (objective == "grpo"))
    if wanted is rewarded:
        Path(os.environ[MARK]).unlink(missing_ok=True)
    while wanted and child.poll() is None and not wanted(folder):
        time.sleep(0.0005)
    where = "right after a reward" if wanted is rewarded else moment(folder)
    alive = child.poll() is None
    child.kill()
    child.wait()
    return where if alive else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=5, help="kills before a run may finish")
    parser.add_argument("--objective", choices=list(OF), default="sft")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, moments, bad, runs = random.Random(options.seed), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as root_name:
        root = Path(root_name)
        os.environ["MLX_LORA_CACHE"] = str(root / "cache")
        os.environ.setdefault("MLX_LORA_MEASURE_KERNELS", "0")  # the cache is removed: a busy clock could choose others
        model, data = prepare(root, options.objective)
        for name in ("cold", "whole"):  # the first one compiles kernels, which takes several times as long
            began_s = time.perf_counter()
            subprocess.run(command(model, data, root / name, options.objective), check=True, stderr=subprocess.DEVNULL)
        usual_s, expected = time.perf_counter() - began_s, checksum(root / "whole")
        while sum(moments.values()) < options.kills:
            folder = root / f"run-{runs}"
            if runs % 3 == 0:  # so that some kills fall into the encoding of the data
                shutil.rmtree(root / "cache", ignore_errors=True)
            line = command(model, data, folder, options.objective)
            for _ in range(3 * options.per_run):
                where = kill_once(line, folder, chance, usual_s, options.objective)
                if where is None:
                    break
                moments[where] += 1
                if sum(moments.values()) % options.per_run == 0:
                    break
            last = subprocess.run(line, capture_output=True, text=True)
            same = not last.returncode and checksum(folder) == expected
            bad += not same
            runs += 1
            found = f"FAILED\n{last.stderr[-2000:]}" if last.returncode else "same bytes" if same else "DIFFERENT"
            print(f"run {runs}: {sum(moments.values())} kills, {found}", flush=True)
            shutil.rmtree(folder)
    print("; ".join(f"{where}: {count}" for where, count in moments.most_common()))
    print(json.dumps({"kills": sum(moments.values()), "runs": runs, "different": bad, "places": dict(moments)}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
