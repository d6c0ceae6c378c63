"""Measure the peak memory of runs on pictures, and compare it with the planner's prediction.

    python benchmarks/plan_vision.py --out FOLDER
    python benchmarks/plan_vision.py --out FOLDER --case 'smolvlm, frozen'

Six runs of models with random weights (tests/tiny_vision.py, wider and deeper): three families, pictures of two sizes, a frozen
tower and trained ones. Each is two steps in a process of its own. The peak is MLX's, of the whole run; the plan is that of
`mlx-lora plan` with the same flags, and beside it that of the run itself. Ends with one line of JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _harness import REPOSITORY, as_words, environment, options, record, say, table
from _ours import last_report, train_command

OPTIONS = (
    ("--out", ..., "Folder for models, rows and runs; models that are there are used again."),
    ("--case", (), "Names of runs; all of them by default."),
    ("--batch-size", 2, "Rows of a step, each of which has one picture."),
    ("--checkpointing", "none", "As in --grad-checkpoint."),
    ("--record", "", "JSON file for the result."),
)
TEXT = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}  # fmt: skip
SIGLIP = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "smolvlm": {"text_config": TEXT, "vision_config": {**SIGLIP, "image_size": 224}},
    "gemma3": {"text_config": {**TEXT, "head_dim": 64}, "vision_config": {**SIGLIP, "image_size": 448}},
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": QWEN_ROPE},
        "vision_config": {"depth": 4, "hidden_size": 384, "intermediate_size": 1536, "num_heads": 6, "out_hidden_size": 512, "window_size": 112},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        family: of CHANGES.
        side: of its pictures, in pixels.
        more: flags.
    """

    family: str
    side: int
    more: dict[str, str] = field(default_factory=dict)


CASES = {
    "smolvlm, frozen": Case("smolvlm", 224),
    "smolvlm, tower in full": Case("smolvlm", 224, {"--train-vision": "full", "--train-connector": "full"}),
    "qwen2_5_vl, frozen": Case("qwen2_5_vl", 224),
    "qwen2_5_vl, large pictures, tower with factors": Case("qwen2_5_vl", 448, {"--train-vision": "lora"}),
    "gemma3, frozen": Case("gemma3", 448),
    "gemma3, connector in full": Case("gemma3", 448, {"--train-connector": "full"}),
}


def write_model(family: str, folder: Path) -> Path:
    """Write a model with random weights, whose processor keeps pictures as large as its tower takes them."""
    sys.path.append(str(REPOSITORY / "tests"))
    from tiny_vision import write_model_here

    if (folder / "model.safetensors").is_file():
        return folder
    write_model_here(family, folder, scale=0.02, changes=CHANGES[family])
    file = folder / "preprocessor_config.json"
    processor = json.loads(file.read_text(encoding="utf-8"))
    sizes = {
        "smolvlm": {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 224}, "do_image_splitting": False},
        "gemma3": {"size": {"height": 448, "width": 448}},
        "qwen2_5_vl": {"size": {"shortest_edge": 28**2, "longest_edge": 448**2}},
    }  # fmt: skip
    file.write_text(json.dumps({**processor, **sizes[family]}), encoding="utf-8")
    own = folder / "processor_config.json"
    tokens = {"smolvlm": {"image_seq_len": 64}, "gemma3": {"image_seq_length": 16}, "qwen2_5_vl": {}}
    own.write_text(json.dumps({**json.loads(own.read_text(encoding="utf-8")), **tokens[family]}), encoding="utf-8")
    return folder


def write_rows(folder: Path, side: int, count: int) -> Path:
    """Write rows of one picture each."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        Image.new("RGB", (side, side), (40 * number % 256, 90, 200)).save(folder / f"{number}.png")
        question = f"What is shown here, in picture {number}?"
        rows.append({"images": [f"{number}.png"], "prompt": question, "completion": "A color. " * 12})
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def planned(flags: list[str]) -> dict[str, Any]:
    """Return the plan of `mlx-lora plan` with these flags, made in this process."""
    from mlx_lora.cli.plan import main as command

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        command.main([*flags, "--json"], standalone_mode=False)
    return json.loads(text.getvalue())


def measured(name: str, case: Case, asked: Any, out: Path) -> dict[str, Any]:
    """Return the planned and the measured peak of a run, in bytes."""
    model = write_model(case.family, out / "models" / case.family)
    data = write_rows(out / "rows" / str(case.side), case.side, 2 * asked.batch_size)
    flags = as_words({"--model": model, "--data": data, "--batch-size": asked.batch_size,
                      "--grad-checkpoint": asked.checkpointing, "--kernels": "ours", "--iters": 2, "--valid-fraction": 0,
                      **case.more})  # fmt: skip
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(out / "cache" / "pictures", ignore_errors=True)
    cache = {"MLX_LORA_CACHE": str(out / "cache")}
    report = last_report(train_command(*flags, "--sample-tokens", "0"), run, out / "log", 3600, cache)
    plan = planned(flags)
    own = json.loads((run / "report.json").read_text(encoding="utf-8"))["planned_peak_bytes"]
    found = {"case": name, "planned": plan["peak_bytes"], "planned_by_run": own, "measured": report["peak_memory_bytes"], "phase": plan["phase"],
             "parts": plan["parts"], "phases": plan["phases"], "shapes": report.get("shapes")}  # fmt: skip
    say(json.dumps(found))
    return found


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    asked = options(__doc__, *OPTIONS).parse_args()
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    found = [measured(name, CASES[name], asked, out) for name in asked.case or CASES]
    rows = [(one["case"], f"{one['planned'] / 1e6:.0f}", f"{one['planned_by_run'] / 1e6:.0f}", f"{one['measured'] / 1e6:.0f}",
             f"{one['planned'] / one['measured']:.2f}", one["phase"]) for one in found]  # fmt: skip
    print(table(("run", "planned MB", "the run's plan MB", "measured MB", "planned / measured", "decided by"), rows))
    record({"environment": environment(), "options": vars(asked), "runs": found}, asked.record, ("runs",))


if __name__ == "__main__":
    main()
