"""A new loss on preference pairs is one function and one row, and a new objective one file and one row, in a copy of the package."""

from __future__ import annotations

from pathlib import Path

from changed_package import copied

TRAINS = """
import json
from pathlib import Path
import mlx.core as mx
import mlx_lora
from conftest import tiny_model, write_folder
from mlx_lora.trainer.run import train_run
from mlx_lora.config.load import train_settings

folder = write_folder(Path("tiny"), tiny_model())
rows = [{"prompt": f"{n}?", "chosen": f"{n} yes", "rejected": "no"} for n in range(8)]
Path("pairs.jsonl").write_text("\\n".join(map(json.dumps, rows)))
flags = {"model": str(folder), "data": "pairs.jsonl", "objective": "dpo", "iters": 3, "learning_rate": 5e-3,
         "sample_tokens": 0, "val_batches": 0, "steps_per_report": 1, "kernels": "ours", "batch_size": 4}
losses = {}
for name in ("sigmoid", "cubic"):
    train_run(train_settings({**flags, "loss_type": name, "adapter_path": name}))
    lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    losses[name] = [line["loss"] for line in lines]
print(json.dumps({"package": mlx_lora.__file__, "losses": losses, "margin": lines[-1]["margin"]}))
"""


def test_a_new_pairwise_loss_is_one_function_and_one_row(tmp_path):
    package = copied(tmp_path)
    file = "losses/preference.py"
    package.edit(file, "# DPO's family by TRL's names.\n", '''def cubic(pairs: Pairs, options: PairOptions) -> mx.array:
    """Cube of the distance from a margin of 1."""
    return mx.abs(1 - options.beta * pairs.delta) ** 3


# DPO's family by TRL's names.
''')  # fmt: skip
    package.edit(file, '    "hinge": hinge,\n', '    "hinge": hinge,\n    "cubic": cubic,\n')
    assert package.touched() == [file]
    seen = package.python(TRAINS)
    assert Path(seen["package"]).is_relative_to(tmp_path)
    assert abs(seen["losses"]["cubic"][0] - 1) < 1e-5
    assert seen["losses"]["cubic"][-1] < 0.9
    assert abs(seen["losses"]["sigmoid"][0] - 0.6931) < 1e-3
    assert seen["margin"] > 0


NEW = '''"""A margin between two answers (--objective margin)."""

import mlx.core as mx

from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.preference import AnswerSums, Preference


def margin(settings) -> Objective:
    """Return the objective of --objective margin."""
    return Preference(settings, "a margin between two answers", loss=loss, reports=("apart",))


def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
    """Return what the good answer lacks to be e^5 times as likely as the bad one."""
    apart = sums.side(0).logps - sums.side(1).logps
    return mx.maximum(0.0, 5.0 - apart), {"apart": apart}
'''
RUNS_IT = """
import json
from pathlib import Path
from conftest import tiny_model, write_folder
from run_cli import run

folder = write_folder(Path("tiny"), tiny_model())
rows = [{"prompt": f"{n}?", "chosen": f"{n} yes", "rejected": "no"} for n in range(8)]
Path("pairs.jsonl").write_text("\\n".join(map(json.dumps, rows)))
ran = run("train", "--model", folder, "--data", "pairs.jsonl", "--objective", "margin", "--adapter-path", "run", "--iters", 6,
          "--learning-rate", 5e-3, "--sample-tokens", 0, "--val-batches", 0, "--steps-per-report", 1, "--batch-size", 4,
          "--save-every", 3)
plan = run("plan", "--model", folder, "--data", "pairs.jsonl", "--objective", "margin")
again = run("train", "--config", "run/run.yaml", "--resume", "--iters", 8)
lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
print(json.dumps({"codes": [ran.code, plan.code, again.code], "lines": lines, "said": ran.err + plan.err + again.err}))
"""


def test_a_new_objective_is_its_file_and_one_row(tmp_path):
    """Planner, reports and resume come with it."""
    package = copied(tmp_path)
    (package.root / "mlx_lora" / "objectives" / "margin.py").write_text(NEW)
    package.edit(
        "config/objectives.py",
        "OBJECTIVES = {\n",
        'OBJECTIVES = {\n    "margin": ObjectiveRow("margin.margin", **_PREFERENCE),\n',
    )
    assert sorted(package.touched()) == ["config/objectives.py", "objectives/margin.py"]
    seen = package.python(RUNS_IT)
    assert seen["codes"] == [0, 0, 0], seen["said"]
    found = {line["step"]: line for line in seen["lines"] if line["loss"] is not None}
    assert found[8]["apart"] > found[1]["apart"]
    assert found[8]["loss"] < found[1]["loss"]
