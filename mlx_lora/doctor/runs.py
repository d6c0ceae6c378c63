"""Check whole runs: a step of each objective, an exact resume, and text generation with what a run trained.

A run goes through the same function as `mlx-lora train`. It uses mlx's own kernels (`--kernels mlx`), because ours have
their own lines: a line here is red for what is wrong in the run itself. The checks of memory and speed train in a process of
its own, with `train_child`.

Of generation, a row in a batch must get the numbers that it gets alone, with and without an adapter. Logits are compared while
both decode the same tokens, so that a rounding that turns one token does not make the rest differ. In float32 the served texts must
be equal, too: there, nothing is near enough to a tie."""

from __future__ import annotations

import json
import math
import queue
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.api.base import load
from mlx_lora.api.train import train
from mlx_lora.bench.run import INTERRUPTED, Watch, run_process
from mlx_lora.bench.workloads import chat_rows, pair_rows
from mlx_lora.config.fields import flag_of
from mlx_lora.config.settings import ModelSettings
from mlx_lora.doctor.check import (
    CheckFinding,
    Kit,
    KitCheck,
    apart,
    bounded,
    dtype_name,
    on_cpu,
    other_tiny_folder,
    tiny_folder,
)
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.kernels.measure import TOLERANCE
from mlx_lora.models.folder import read_safetensors_header
from mlx_lora.models.load import Base, load_base
from mlx_lora.reports.run_report import FACTS_FILE
from mlx_lora.rollouts.rewards import text_of
from mlx_lora.serving.adapter_store import AdapterSource
from mlx_lora.serving.engine import Engine, Event, Limits, Request, Sampling
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError

WEIGHTS = "adapters.safetensors"
STEPS, STOPPED = 6, 3  # of the run that is resumed
LOSS_BOUND = 1e-3  # two steps in float32: the second sees what the first changed
COMMON = {
    "batch_size": 2, "max_seq_length": 256, "rank": 4, "learning_rate": 1e-3, "warmup": 0.0, "kernels": "mlx",
    "valid_fraction": 0.0, "val_batches": 0, "sample_tokens": 0, "steps_per_report": 1, "progress": False,
    "cache_trunk": "off", "target_modules": "all-linear",
}  # fmt: skip
ADVICE = "do not train toward this objective here; report it with these numbers"


def run_checks() -> list[KitCheck]:
    """Return a check for each objective, and for resuming."""
    steps = [
        KitCheck("objectives", name, partial(check_step, name), quick=name in ("sft", "sft, 4-bit base", "dpo"))
        for name in OBJECTIVES
    ]
    resume = [
        KitCheck("resume", name, partial(check_resume, changes), quick=number == 0)
        for number, (name, changes) in enumerate(RESUMED.items())
    ]
    return [*steps, *resume]


def _chats() -> list[dict[str, Any]]:
    return [json.loads(line) for line in chat_rows(8, (4, 8), (4, 12), 0).splitlines()]


def _pairs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in pair_rows(8, (4, 8), (4, 12), 0).splitlines()]


def _rated() -> list[dict[str, Any]]:
    """Return single answers, good and bad by turns."""
    return [
        {"prompt": one["prompt"], "completion": one["chosen"], "label": bool(number % 2)}
        for number, one in enumerate(_pairs())
    ]


def _prompts() -> list[dict[str, Any]]:
    return [{"prompt": row["messages"][0]["content"], "answer": "a"} for row in _chats()]


SAMPLED = {"group_size": 2, "max_new_tokens": 8}
# Name -> settings of the run. Sampled answers may differ between devices by a rounding, so only their runs are checked.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft, 4-bit base": {"packed": True},
    "sft, dora": {"method": "dora"},
    "sft, qa-lora, 4-bit base": {"method": "qa-lora", "packed": True},
    "sft, qat, 4-bit base": {"qat": 1.0, "packed": True},
    "sft, full": {"method": "full", "learning_rate": 1e-4},
    "dpo": {"objective": "dpo"},
    "orpo": {"objective": "orpo"},
    "simpo": {"objective": "simpo"},
    "cpo": {"objective": "cpo"},
    "kto": {"objective": "kto", "batch_size": 4},
    "reward": {"objective": "reward"},
    "distill": {"objective": "distill", "teacher": True},
    "grpo": {"objective": "grpo", "reward": "letters", **SAMPLED},
    "rloo": {"objective": "rloo", "reward": "letters", **SAMPLED},
    "distill, on policy": {"objective": "distill", "teacher": True, "on_policy": True, **SAMPLED},
}
ROWS = {"sft": _chats, "kto": _rated, "grpo": _prompts, "rloo": _prompts, "distill": _chats}


def letters(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return the share of letters in each answer: a reward that differs between the answers of a random model."""
    texts = [text_of(completion) for completion in completions]
    return [sum(letter.isalpha() for letter in text) / max(1, len(text)) for text in texts]


def train_tiny(kit: Kit, name: str, folder: Path, steps: int, **changes: Any) -> list[dict[str, Any]]:
    """Train from a new folder, and return the lines of metrics.jsonl."""
    asked = {**COMMON, **OBJECTIVES[name], **changes}
    packed = asked.pop("packed", False)
    # Our dense product of a quantized weight has its own lines.
    path = "packed" if packed else "auto"
    base = load(tiny_folder(kit.work, packed), dtype=asked.pop("dtype", "auto"), quantized_matmul=path)
    if asked.pop("teacher", False):
        asked["teacher"] = str(other_tiny_folder(kit.work))
    if asked.get("reward") == "letters":
        asked["reward"] = letters
    rows = ROWS.get(asked.get("objective", "sft"), _pairs)()
    run = train(base, rows, folder, iters=steps, **asked)
    if run.interrupted:
        raise KeyboardInterrupt
    return [line for line in run.metrics if line["val_loss"] is None]


def check_step(name: str, kit: Kit) -> Iterator[CheckFinding]:
    """Take two steps of one objective: the loss must be finite, and the factors must move."""
    root = Path(kit.work) / f"step-{name.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(root, ignore_errors=True)
    dtype = dtype_name(device.compute_dtype())
    lines = train_tiny(kit, name, root / "a", 2)
    losses = [line["loss"] for line in lines]
    finite = len(losses) == 2 and all(loss is not None and math.isfinite(loss) for loss in losses)
    norms = [line["grad_norm"] for line in lines]
    moves = finite and all(norm is not None and math.isfinite(norm) and norm > 0 for norm in norms)
    words = f"two steps in {dtype}: losses {_listed(losses)}, gradient norms {_listed(norms)}"
    yield CheckFinding("steps", "ok" if moves else "failed", words, advice="" if moves else ADVICE)
    sampled = OBJECTIVES[name].keys() & SAMPLED.keys()
    if sampled:
        return
    mine = train_tiny(kit, name, root / "b", 2, dtype="float32")
    if kit.on_gpu:
        with on_cpu():
            exact = train_tiny(kit, name, root / "c", 2, dtype="float32")
        what = "losses and gradient norms of two float32 steps against the CPU's"
    else:
        exact = train_tiny(kit, name, root / "c", 2, dtype="float32", grad_checkpoint="block")
        what = "losses and gradient norms of two steps against the same with --grad-checkpoint block"
    yield bounded("numbers", _farthest(mine, exact), LOSS_BOUND, what, ADVICE)


def _farthest(lines: list[dict[str, Any]], exact: list[dict[str, Any]]) -> float:
    """Return the largest relative distance of losses and gradient norms."""
    if len(lines) != len(exact):
        return math.inf
    both = [(one[key], other[key]) for one, other in zip(lines, exact, strict=True) for key in ("loss", "grad_norm")]
    if any(value is None for pair in both for value in pair):
        return math.inf
    return max(abs(found - wanted) / max(abs(wanted), 1e-3) for found, wanted in both)


def _listed(values: list[float | None]) -> str:
    return " and ".join("none" if value is None else f"{value:.4g}" for value in values)


RESUMED: dict[str, dict[str, Any]] = {
    "lora with dropout": {"dropout": 0.1},
    "dora, block checkpoints, 4-bit base": {"method": "dora", "grad_checkpoint": "block", "packed": True},
}


def check_resume(changes: dict[str, Any], kit: Kit) -> Iterator[CheckFinding]:
    """Train, and train again from a checkpoint: the stored factors must be the same bytes."""
    root = Path(kit.work) / f"resume-{changes.get('method', 'lora')}"
    shutil.rmtree(root, ignore_errors=True)
    train_tiny(kit, "sft", root / "whole", STEPS, save_every=STOPPED, keep=0, **changes)
    whole = (root / "whole" / WEIGHTS).read_bytes()
    shutil.copytree(root / "whole", root / "stopped")
    for checkpoint in (root / "stopped" / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > STOPPED:
            shutil.rmtree(checkpoint)
    before = (root / "stopped" / "checkpoints" / f"step-{STOPPED:06d}" / WEIGHTS).read_bytes()
    train_tiny(kit, "sft", root / "stopped", STEPS, save_every=STOPPED, keep=0, resume="auto", **changes)
    again = (root / "stopped" / WEIGHTS).read_bytes()
    same = again == whole and before != whole
    words = f"stopped after step {STOPPED} of {STEPS}: " + (
        "the same bytes" if same else f"{_other_arrays(root)} differ from the run that never stopped"
    )
    advice = "" if same else "train without stopping; see the line `repeats` of the group machine first; report it"
    yield CheckFinding("stored factors", "ok" if same else "failed", words, advice=advice)


def _other_arrays(root: Path) -> str:
    """Return how many stored arrays are not equal."""
    one, other = (mx.load(str(root / name / WEIGHTS)) for name in ("whole", "stopped"))
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    changed = [name for name in one if not mx.array_equal(one[name], other[name]).item()]
    return f"{len(changed)} of {len(read_safetensors_header(root / 'whole' / WEIGHTS))} arrays"


# A run in a process of its own

# Nothing is held out, validated, sampled or saved: the steps alone are looked at.
QUIET = {
    "valid_fraction": 0, "val_batches": 0, "steps_per_eval": 0, "save_every": 0, "steps_per_report": 1,
    "sample_tokens": 0, "learning_rate": 1e-4, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended.

    Attributes:
        records: lines of metrics.jsonl with a loss.
        facts: report.json.
    """

    records: list[dict[str, Any]]
    facts: dict[str, Any]


def train_child(
    kit: Kit, name: str, model: Path, data: Path, settings: Mapping[str, Any], seconds: float | None = None
) -> TrainedRun:
    """Train in a new process and return its figures.

    Args:
        kit: its work folder takes the run.
        name: of the run.
        model, data: --model and --data.
        settings: further settings by name; True is a flag without a value.
        seconds: interrupt it that long after its first step; None: never.

    Raises:
        RunError: it failed.
    """
    folder = kit.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = {"model": model, "data": data, "adapter_path": folder, **QUIET, **settings}
    words = [word for key, value in asked.items() for word in _words(key, value)]
    watch = Watch(folder / "metrics.jsonl", seconds)
    ended = run_process([sys.executable, "-m", "mlx_lora.train", *words], kit.work / f"{name}.log", watch)
    if ended.code not in (0, INTERRUPTED):
        raise RunError(f"train ended with code {ended.code}: {ended.last_words}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    return TrainedRun([line for line in lines if line["val_loss"] is None], facts)


def _words(name: str, value: Any) -> list[str]:
    """Return a setting as words of the command line."""
    if isinstance(value, bool):
        return [flag_of(name) if value else f"--no-{flag_of(name).removeprefix('--')}"]
    return [flag_of(name), str(value)]


# Text generation

PROMPTS = ("O Romeo", "wherefore art thou, and why", "Deny thy father and refuse thy name; or if thou wilt not")
TOKENS = 16
WAIT_S = 120.0
SERVING_ADVICE = (
    "serve one request at a time (--max-batch 1) and report it; mlx_lora/serving/engine.py makes the batches"
)


def decode_checks() -> list[KitCheck]:
    """Return a check for a float base and one for a quantized one."""
    return [
        KitCheck("decode", "float base", partial(check_decode, False)),
        KitCheck("decode", "4-bit base", partial(check_decode, True), quick=False),
    ]


def check_decode(packed: bool, kit: Kit) -> Iterator[CheckFinding]:
    """Compare rows of a batch with single rows, first without an adapter, then with one."""
    folder, dtype = tiny_folder(kit.work, packed), device.compute_dtype()
    adapter = _adapter(kit, packed)
    for words, path in (("without an adapter", None), ("with an adapter", adapter)):
        base = load_base(ModelSettings(model=str(folder)))
        if path is not None:
            load_adapter(base, path)
        error = _batch_error(base)
        what = f"{dtype_name(dtype)} logits of {len(PROMPTS)} rows, {TOKENS} tokens each, in a batch against alone"
        yield bounded(f"logits {words}", error, TOLERANCE[dtype], what, SERVING_ADVICE)
    yield from _served(folder, adapter)


def _adapter(kit: Kit, packed: bool) -> Path:
    """Train an adapter that changes what the model says."""
    folder = Path(kit.work) / f"spoken{'-4bit' if packed else ''}"
    shutil.rmtree(folder, ignore_errors=True)
    train_tiny(kit, "sft", folder, 6, packed=packed, learning_rate=3e-2)
    return folder


def _batch_error(base: Base) -> float:
    """Return the largest relative distance of a row's logits in a batch from those alone, over all rows and tokens."""
    base.model.eval()
    prompts = [base.hf_tokenizer.encode(text) for text in PROMPTS]
    alone = [_decode_alone(base.model, prompt) for prompt in prompts]
    caches = _merged([cache for _, _, cache in alone])
    tokens = [tokens for _, tokens, _ in alone]
    worst = 0.0
    for step in range(TOKENS):
        logits = base.model(mx.array([row[step] for row in tokens])[:, None], cache=caches)[:, -1]  # (rows, V)
        worst = max(worst, *(apart(logits[n], alone[n][0][step]) for n in range(len(prompts))))
    return worst


def _decode_alone(model: nn.Module, prompt: list[int]) -> tuple[list[mx.array], list[int], list[Any]]:
    """Return the logits of each step, the tokens that each step is given, and the caches of the prompt before the first."""
    caches = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=caches)
    begun = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=begun)
    mx.eval([cache.state for cache in (*caches, *begun)])
    token, found, given = prompt[-1], [], []
    for _ in range(TOKENS):
        given.append(token)
        logits = model(mx.array([[token]]), cache=caches)[0, -1]
        mx.eval(logits)
        found.append(logits)
        token = int(mx.argmax(logits).item())
    return found, given, begun


def _merged(rows: list[list[Any]]) -> list[Any]:
    """Return one cache per layer, which holds all rows."""
    return [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]


def _served(folder: Path, adapter: Path) -> Iterator[CheckFinding]:
    """Compare the texts of a server that answers all at once with those of `generate`, in float32."""
    base = load(folder, dtype="float32")
    names: tuple[str | None, ...] = (None, "adapter")
    wanted = {
        (name, prompt): base.generate(prompt, adapter if name else None, max_tokens=TOKENS, ignore_chat_template=True)
        for name in names
        for prompt in PROMPTS
    }
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder), dtype="float32")), Limits())
    try:
        engine.call(lambda store: store.add({"adapter": AdapterSource(adapter)})).result(WAIT_S)
        waiting = {key: _asked(engine, *key) for key in wanted}
        found = {key: _answer(events) for key, events in waiting.items()}
    finally:
        engine.close()
    other = [key for key in wanted if found[key] != wanted[key]]
    plain = [wanted[None, prompt] for prompt in PROMPTS]
    adapted = [wanted["adapter", prompt] for prompt in PROMPTS]
    words = f"{len(wanted) - len(other)} of {len(wanted)} texts in one batch are those of `generate`"
    good = not other and plain != adapted
    if plain == adapted:
        words += "; the adapter changes none of them"
    yield CheckFinding("served texts", "ok" if good else "failed", words, advice="" if good else SERVING_ADVICE)


def _asked(engine: Engine, name: str | None, prompt: str) -> queue.SimpleQueue[Event]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    tokens = engine.base.hf_tokenizer.encode(prompt)
    engine.submit(Request(tokens, name, TOKENS, sampling=Sampling(temperature=0), continues=True), events.put)
    return events


def _answer(events: queue.SimpleQueue[Event]) -> str:
    pieces: list[str] = []
    while True:
        event = events.get(timeout=WAIT_S)
        pieces.append(event.piece.text)
        if event.last:
            return "".join(pieces)
