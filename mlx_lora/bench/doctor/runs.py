"""Check whole runs: a step of each objective, an exact resume, text generation with what a run trained, memory, and speed.

A run goes through the same function as `mlx-lora train`. It uses mlx's own kernels (`--kernels mlx`), because ours have
their own lines: a line here is red for what is wrong in the run itself. The checks of memory and speed train in a process of
its own, with `train_child`.

Of generation, a row in a batch must get the numbers that it gets alone, with and without an adapter. Logits are compared while
both decode the same tokens, so that a rounding that turns one token does not make the rest differ. In float32 the served texts must
be equal, too: there, nothing is near enough to a tie.

What may slow this machine down or change its numbers is told, too: power, heat, other programs, a virtual GPU.

The planner is checked with eight runs: their peak memory as planned before the run and as measured by MLX's allocator. Each run
is `mlx-lora train` in a process of its own, on a model of random weights, with rows that are full.

The speed of training is compared with that of mlx_lm.lora's trainer and torch on the same rows, and with that after some minutes
of load. Each program runs in a process of its own, one after the other. The first pass over the rows, which compiles, is not
counted. Seconds of the counted passes are compared; tokens per second are theirs, without padding. The models have the widths of
published ones, and no more blocks than take seconds. Ratios between programs are those of the model; tokens per second are not,
because blocks are left out.
"""

from __future__ import annotations

import json
import math
import queue
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.api.base import load
from mlx_lora.api.train import train
from mlx_lora.bench.doctor.check import (
    CheckFinding,
    Kit,
    apart,
    bounded,
    dtype_name,
    on_cpu,
    other_tiny_folder,
    tiny_folder,
    write_model,
)
from mlx_lora.bench.machine import describe_machine, describe_power
from mlx_lora.bench.run import AFFINE, INTERRUPTED, LLAMA_1B, QWEN3_4B, QWEN3_8B, SMOLLM2, Watch, chat_rows, run_process
from mlx_lora.config.fields import flag_words
from mlx_lora.config.objectives import OBJECTIVES as ROWS
from mlx_lora.config.objectives import PAIRS, TAUGHT
from mlx_lora.config.settings import FIELDS, ModelSettings
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.engine.engine import Engine, Event, Limits, Request, Sampling
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.kernels.measure import TOLERANCE
from mlx_lora.models.load import Base, load_base
from mlx_lora.reports.run_report import FACTS_FILE
from mlx_lora.rollouts.rewards import text_of
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.text import GIB, package_versions

WEIGHTS = "adapters.safetensors"
STEPS, STOPPED = 6, 3  # of the run that is resumed
LOSS_BOUND = 1e-3  # two steps in float32: the second sees what the first changed
COMMON = {
    "batch_size": 2, "max_seq_length": 256, "rank": 4, "learning_rate": 1e-3, "warmup": 0.0, "kernels": "mlx",
    "valid_fraction": 0.0, "val_batches": 0, "sample_tokens": 0, "steps_per_report": 1, "progress": False,
    "cache_trunk": "off", "target_modules": "all-linear",
}  # fmt: skip
ADVICE = "do not train toward this objective here; report it with these numbers"


SAMPLED = {"group_size": 2, "max_new_tokens": 8}
DEFAULT, ON_PAIRS = FIELDS["objective"].default, PAIRS[0]
# The records of an objective -> what its run needs; labels, documents and vectors are not checked here.
NEEDED: dict[str, dict[str, Any]] = {
    "examples": {},
    "pairs": {},
    "rated": {"batch_size": 4},
    "prompts": {"reward": "letters", **SAMPLED},
}
# Name -> settings of the run. Sampled answers may differ between devices by a rounding, so only their runs are checked.
OBJECTIVES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    f"{DEFAULT}, 4-bit base": {"packed": True},
    f"{DEFAULT}, dora": {"method": "dora"},
    f"{DEFAULT}, qa-lora, 4-bit base": {"method": "qa-lora", "packed": True},
    f"{DEFAULT}, qat, 4-bit base": {"qat": 1.0, "packed": True},
    f"{DEFAULT}, full": {"method": "full", "learning_rate": 1e-4},
    **{
        name: {"objective": name, **NEEDED[row.records], **({"teacher": True} if row.taught else {})}
        for name, row in ROWS.items()
        if row.records in NEEDED and not row.vectors
    },
    **{f"{name}, on policy": {"objective": name, "teacher": True, "on_policy": True, **SAMPLED} for name in TAUGHT},
}

QUICK = (DEFAULT, f"{DEFAULT}, 4-bit base", ON_PAIRS)  # of these, in the quick share


def _rows(records: str) -> list[dict[str, Any]]:
    """Return records of a kind."""
    pairs = records in ("pairs", "rated")
    rows = [json.loads(line) for line in chat_rows(8, (4, 8), (4, 12), pairs=pairs).splitlines()]
    if records == "prompts":
        return [{"prompt": row["messages"][0]["content"], "answer": "a"} for row in rows]
    if records == "rated":  # good and bad by turns
        answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        return [{**row, "label": bool(number % 2)} for number, row in enumerate(answers)]
    return rows


def letters(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return the share of letters in each answer: a reward that differs between the answers of a random model."""
    texts = [text_of(completion) for completion in completions]
    return [sum(letter.isalpha() for letter in text) / max(1, len(text)) for text in texts]


def train_tiny(kit: Kit, folder: Path, steps: int, **asked: Any) -> list[dict[str, Any]]:
    """Train from a new folder, and return the lines of metrics.jsonl."""
    asked = {**COMMON, **asked}
    packed = asked.pop("packed", False)
    # Our dense product of a quantized weight has its own lines.
    path = "packed" if packed else "auto"
    base = load(tiny_folder(kit.work, packed), dtype=asked.pop("dtype", "auto"), quantized_matmul=path)
    if asked.pop("teacher", False):
        asked["teacher"] = str(other_tiny_folder(kit.work))
    if asked.get("reward") == "letters":
        asked["reward"] = letters
    run = train(base, _rows(ROWS[asked.get("objective", DEFAULT)].records), folder, iters=steps, **asked)
    if run.interrupted:
        raise KeyboardInterrupt
    return [line for line in run.metrics if line["val_loss"] is None]


def check_step(name: str, kit: Kit) -> Iterator[CheckFinding]:
    """Take two steps of one objective: the loss must be finite, and the factors must move."""
    root = Path(kit.work) / f"step-{name.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(root, ignore_errors=True)
    dtype = dtype_name(device.compute_dtype())
    lines = train_tiny(kit, root / "a", 2, **OBJECTIVES[name])
    losses = [line["loss"] for line in lines]
    finite = len(losses) == 2 and all(loss is not None and math.isfinite(loss) for loss in losses)
    norms = [line["grad_norm"] for line in lines]
    moves = finite and all(norm is not None and math.isfinite(norm) and norm > 0 for norm in norms)
    words = f"two steps in {dtype}: losses {_listed(losses)}, gradient norms {_listed(norms)}"
    yield CheckFinding("steps", "ok" if moves else "failed", words, advice="" if moves else ADVICE)
    if OBJECTIVES[name].keys() & SAMPLED.keys():
        return
    exactly = {**OBJECTIVES[name], "dtype": "float32"}
    mine = train_tiny(kit, root / "b", 2, **exactly)
    if kit.on_gpu:
        with on_cpu():
            exact = train_tiny(kit, root / "c", 2, **exactly)
        what = "losses and gradient norms of two float32 steps against the CPU's"
    else:
        exact = train_tiny(kit, root / "c", 2, **exactly, grad_checkpoint="block")
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
    train_tiny(kit, root / "whole", STEPS, save_every=STOPPED, keep=0, **changes)
    whole = (root / "whole" / WEIGHTS).read_bytes()
    shutil.copytree(root / "whole", root / "stopped")
    for checkpoint in (root / "stopped" / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > STOPPED:
            shutil.rmtree(checkpoint)
    before = (root / "stopped" / "checkpoints" / f"step-{STOPPED:06d}" / WEIGHTS).read_bytes()
    train_tiny(kit, root / "stopped", STEPS, save_every=STOPPED, keep=0, resume="auto", **changes)
    again = (root / "stopped" / WEIGHTS).read_bytes()
    same = again == whole and before != whole
    words = "the same bytes"
    if not same:
        stored: list[Any] = [mx.load(str(root / name / WEIGHTS)) for name in ("whole", "stopped")]
        one, other = stored
        changed = [name for name in one if not mx.array_equal(one[name], other[name]).item()]
        words = f"{len(changed)} of {len(one)} arrays differ from the run that never stopped"
    words = f"stopped after step {STOPPED} of {STEPS}: {words}"
    advice = "" if same else "train without stopping; see the line `repeats` of the group machine first; report it"
    yield CheckFinding("stored factors", "ok" if same else "failed", words, advice=advice)


# A run in a process of its own

# Nothing is held out, validated, sampled or saved: the steps alone are looked at.
QUIET = {
    "valid_fraction": 0, "val_batches": 0, "steps_per_eval": 0, "save_every": 0, "steps_per_report": 1,
    "sample_tokens": 0, "learning_rate": 1e-4, "seed": 0,
}  # fmt: skip


def train_child(
    kit: Kit, name: str, model: Path, data: Path, settings: Mapping[str, Any], seconds: float | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train in a new process, and return the lines of metrics.jsonl with a loss, and report.json.

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
    words = flag_words({"model": model, "data": data, "adapter_path": folder, **QUIET, **settings})
    watch = Watch(folder / "metrics.jsonl", seconds)
    ended = run_process([sys.executable, "-m", "mlx_lora.train", *words], kit.work / f"{name}.log", watch)
    if ended.code not in (0, INTERRUPTED):
        raise RunError(f"train ended with code {ended.code}: {ended.last_words}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    return [line for line in lines if line["val_loss"] is None], facts


# Text generation

PROMPTS = ("O Romeo", "wherefore art thou, and why", "Deny thy father and refuse thy name; or if thou wilt not")
TOKENS = 16
WAIT_S = 120.0
SERVING_ADVICE = (
    "serve one request at a time (--max-batch 1) and report it; mlx_lora/engine/engine.py makes the batches"
)


def check_decode(packed: bool, kit: Kit) -> Iterator[CheckFinding]:
    """Compare rows of a batch with single rows, first without an adapter, then with one, and then served texts."""
    folder, dtype = tiny_folder(kit.work, packed), device.compute_dtype()
    adapter = kit.work / f"spoken{'-4bit' if packed else ''}"
    shutil.rmtree(adapter, ignore_errors=True)
    train_tiny(kit, adapter, 6, packed=packed, learning_rate=3e-2)  # so far that the model says something else
    for words, path in (("without an adapter", None), ("with an adapter", adapter)):
        base = load_base(ModelSettings(model=str(folder)))
        if path is not None:
            load_adapter(base, path)
        error = _batch_error(base)
        what = f"{dtype_name(dtype)} logits of {len(PROMPTS)} rows, {TOKENS} tokens each, in a batch against alone"
        yield bounded(f"logits {words}", error, TOLERANCE[dtype], what, SERVING_ADVICE)
    # The texts of a server that answers all at once, and those of `generate`, in float32.
    alone = load(folder, dtype="float32")
    wanted = {
        (name, prompt): alone.generate(prompt, adapter if name else None, max_tokens=TOKENS, ignore_chat_template=True)
        for name in (None, "adapter")
        for prompt in PROMPTS
    }
    found, waiting = {}, {}
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder), dtype="float32")), Limits())
    try:
        engine.call(lambda store: store.add({"adapter": AdapterSource(adapter)})).result(WAIT_S)
        for name, prompt in wanted:
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            tokens = engine.base.hf_tokenizer.encode(prompt)
            engine.submit(Request(tokens, name, TOKENS, sampling=Sampling(temperature=0), continues=True), events.put)
            waiting[name, prompt] = events
        for key, events in waiting.items():
            pieces = [events.get(timeout=WAIT_S)]
            while not pieces[-1].last:
                pieces.append(events.get(timeout=WAIT_S))
            found[key] = "".join(event.piece.text for event in pieces)
    finally:
        engine.close()
    same = sum(found[key] == text for key, text in wanted.items())
    changes = any(wanted[None, prompt] != wanted["adapter", prompt] for prompt in PROMPTS)
    words = f"{same} of {len(wanted)} texts in one batch are those of `generate`"
    words += "" if changes else "; the adapter changes none of them"
    good = same == len(wanted) and changes
    yield CheckFinding("served texts", "ok" if good else "failed", words, advice="" if good else SERVING_ADVICE)


def _batch_error(base: Base) -> float:
    """Return the largest relative distance of a row's logits in a batch from those alone, over all rows and tokens."""
    base.model.eval()
    prompts = [base.hf_tokenizer.encode(text) for text in PROMPTS]
    alone = [_decode_alone(base.model, prompt) for prompt in prompts]
    # One cache per layer, which holds all rows.
    caches = [layer[0].merge(list(layer)) for layer in zip(*(cache for _, _, cache in alone), strict=True)]
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


# The machine

PEER_PACKAGES = ("torch", "peft", "transformers")
BUSY_LOAD = 1.0  # per core
HOT = ("serious", "critical")
HOT_C = 95.0
# What a virtual GPU must be able to compute, or no check can run: a product, its gradient, 16 bits, random numbers.
PROBE = """
import mlx_lora, mlx.core as mx
x = mx.random.normal((64, 64)).astype(mx.bfloat16)
mx.eval(mx.grad(lambda w: mx.softmax(x @ w, axis=-1).square().sum())(x), mx.fast.rms_norm(x, x[0], 1e-5))
"""


def peer_versions() -> dict[str, str | None]:
    """Return the versions of packages that training is compared with; None for those that are not installed."""
    return package_versions(PEER_PACKAGES)


def is_virtual(here: device.Device) -> bool:
    """Return whether the GPU is that of a virtual machine, as on GitHub's runners (`Apple Paravirtual device`)."""
    return here.backend != "cpu" and "virtual" in here.name.lower()


def virtual_words(here: device.Device) -> str:
    """Return what is said of a virtual GPU."""
    return f"a virtual GPU ({here.name})"


def gpu_problem(kit: Kit) -> str:
    """Return why the GPU cannot compute, empty if it can; asked in a process of its own, which it may end."""
    ended = run_process([sys.executable, "-c", PROBE], kit.work / "probe.log")
    return "" if ended.code == 0 else f"a probe ended with code {ended.code}, {ended.last_words}"


def check_gpu(kit: Kit) -> Iterator[CheckFinding]:
    """Say which device computes, and whether it is a real one."""
    if is_virtual(kit.here):
        words = f"{virtual_words(kit.here)}: its memory and speed are not those of a chip, so they are left out"
        yield CheckFinding("device", "warning", words, advice="run this on a Mac itself for memory and speed")
    elif kit.on_gpu:
        cores = describe_machine()["gpu_cores"]
        yield CheckFinding("device", "ok", f"{kit.here.header()}{f', {cores} GPU cores' if cores else ''}")
    else:
        words = f"{kit.here.header()}: no GPU, so functions are compared with their definitions on the CPU"
        yield CheckFinding("device", "ok", words)


def check_power(kit: Kit) -> Iterator[CheckFinding]:
    """Say what slows measurements down now."""
    power, cores = describe_power(), describe_machine()["cpu_cores"] or 1
    low, heat, state, load = (
        power[name] for name in ("low_power_mode", "temperature_c", "thermal_state", "load_average")
    )
    hot = state in HOT or (heat is not None and heat > HOT_C)
    warmth = state or ("not known" if heat is None else f"{heat:.0f} °C at the hottest sensor")
    lines = {
        "source": (power["source"] == "battery", power["source"] or "not known", "plug in the charger"),
        "low-power mode": (
            low is True,
            "not known" if low is None else "on" if low else "off",
            "turn it off before you compare speeds",
        ),
        "heat": (hot, warmth, "let the machine cool, then run --again --group speed"),
        "other programs": (
            load > BUSY_LOAD * cores,
            f"load {load:g} over the last minute on {cores} cores",
            "close other programs before you compare speeds",
        ),
    }
    for name, (slows, words, advice) in lines.items():
        yield CheckFinding(name, "warning" if slows else "ok", words, advice=advice if slows else "")


# The planner

BOUND = 0.10  # of the measured peak
LAYOUT = {"group_size": 64, "bits": 4, "mode": "affine"}
PLAN_ADVICE = (
    "give --memory-budget with some room; docs/planner.md says how the plan counts; report it with these numbers"
)
# SmolLM2's and Llama 3.2 1B's widths. In a much smaller model, what the plan rounds up is more than a tenth.
MODEL_ON_CPU = {**SMOLLM2.config, "num_hidden_layers": 6}
MODEL_ON_GPU = {**LLAMA_1B.config, "num_hidden_layers": 8}


@dataclass(frozen=True)
class PlannedRun:
    """One run: rank, rows per step, --grad-checkpoint, method, and whether the base is in 4 bits and the data are pairs."""

    rank: int
    rows: int
    checkpointing: str
    method: str = "lora"
    packed: bool = False
    pairs: bool = False

    @property
    def words(self) -> str:
        """Its name in the result."""
        kind = ON_PAIRS if self.pairs else self.method
        base = "4-bit" if self.packed else "float"
        return f"{kind}, {base} base, rank {self.rank}, {self.rows} rows, checkpointing {self.checkpointing}"


RUNS = (
    PlannedRun(8, 2, "none"),
    PlannedRun(64, 2, "none"),
    PlannedRun(8, 2, "block"),
    PlannedRun(16, 4, "block"),
    PlannedRun(16, 4, "none", packed=True),
    PlannedRun(16, 4, "block", "dora", packed=True),
    PlannedRun(8, 2, "none", pairs=True),
    PlannedRun(8, 4, "block", packed=True, pairs=True),
)


def check_peak(one: PlannedRun, kit: Kit) -> Iterator[CheckFinding]:
    """Compare the planned with the measured peak of one run."""
    positions = 1024 if kit.as_fast_as_a_gpu else 256
    folder = kit.work / f"memory{'-4bit' if one.packed else ''}"
    config = MODEL_ON_GPU if kit.as_fast_as_a_gpu else MODEL_ON_CPU
    model = write_model(folder, config, device.compute_dtype(), LAYOUT if one.packed else None)
    data = kit.work / f"memory-{'pairs' if one.pairs else 'texts'}.jsonl"
    if one.pairs:  # answers that nearly fill a row; a token is a byte
        words = positions // 8  # of an answer, at about five bytes each, with the prompt and the template beside them
        data.write_text(chat_rows(16, (4, 5), (words, words), pairs=True), encoding="utf-8")
    else:
        rows = [json.loads(line) for line in chat_rows(16, (4, 5), (positions, positions), 0).splitlines()]
        texts = [json.dumps({"text": row["messages"][1]["content"][:positions]}) for row in rows]
        data.write_text("\n".join(texts) + "\n", encoding="utf-8")
    settings = {
        **({"objective": ON_PAIRS} if one.pairs else {"mask_prompt": False}), "method": one.method, "rank": one.rank,
        "batch_size": one.rows, "iters": 3, "grad_checkpoint": one.checkpointing, "max_seq_length": positions + 1,
    }  # fmt: skip
    planned, measured = _peaks(kit, one, model, data, settings)
    if planned is not None and abs(planned / measured - 1) > BOUND:
        # The first run of a shape on a machine also measures kernels, and the plan is for the run alone.
        planned, measured = _peaks(kit, one, model, data, settings)
    if planned is None:
        yield CheckFinding("peak", "failed", "the run was not planned", advice=PLAN_ADVICE)
        return
    ratio = planned / measured
    good = abs(ratio - 1) <= BOUND
    words = f"planned {planned / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: {ratio:.3f} times"
    yield CheckFinding(
        "peak", "ok" if good else "warning", words, abs(ratio - 1), BOUND, "of the measured peak",
        "" if good else PLAN_ADVICE, {"planned GB": planned / 1e9, "measured GB": measured / 1e9},
    )  # fmt: skip


def _peaks(kit: Kit, one: PlannedRun, model: Path, data: Path, settings: dict[str, Any]) -> tuple[int | None, int]:
    """Return the planned and the measured peak of one run, in bytes."""
    records, facts = train_child(kit, f"memory-{RUNS.index(one)}", model, data, settings)
    return facts["planned_peak_bytes"], max(record["peak_memory_bytes"] for record in records)


# Speed

BATCH, RANK = 4, 16
FASTER = 0.95  # of a peer's speed: within the noise of two runs
STEADY = 1.10  # first speed over last
MODELS = 4


@dataclass(frozen=True)
class SpeedLength:
    """How much is run: rows, passes that are counted after the first, words of an answer, and a peer's longest time."""

    rows: int
    passes: int
    words: tuple[int, int]
    limit_s: float


ON_CPU, ON_GPU = SpeedLength(8, 1, (4, 14), 60.0), SpeedLength(16, 3, (60, 200), 120.0)


def check_speed(number: int, kit: Kit) -> Iterator[CheckFinding]:
    """Compare our speed with the peers' on one model."""
    model, length = speed_models(kit)[number], ON_GPU if kit.as_fast_as_a_gpu else ON_CPU
    folder, data = model.write(kit), kit.work / "speed.jsonl"
    data.write_text(chat_rows(length.rows, (3, 6), length.words, 0), encoding="utf-8")
    settings = {
        "batch_size": BATCH,
        "rank": RANK,
        "alpha": 2.0 * RANK,
        "max_seq_length": 2048,
        "epochs": 1 + length.passes,
    }
    records, _ = train_child(kit, f"speed-{number}", folder, data, {**settings, "grad_checkpoint": "none"})
    each = length.rows // BATCH
    ends = [record["elapsed_s"] for record in records]
    tokens = sum(record["real_tokens"] for record in records[each:])
    if len(ends) != each * (1 + length.passes):
        raise RunError(f"{len(ends)} steps were reported, not {each * (1 + length.passes)}")
    ours = tokens / (ends[-1] - ends[each - 1])
    yield CheckFinding(
        f"{model.words}: mlx-lora", "ok", f"{ours:,.0f} tokens/s", ours, None, "tokens/s", values={"mlx-lora": ours}
    )
    job = {
        "model": str(folder), "data": str(data), "batch_size": BATCH, "rank": RANK, "steps": len(ends),
        "ends": str(kit.work / "peer-steps.txt"),
    }  # fmt: skip
    (kit.work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    for name, argument in PEERS.items():
        label, steps = f"{model.words}: {name}", Path(job["ends"])
        if name == "torch" and (missing := [one for one in ("torch", "peft") if peer_versions()[one] is None]):
            words = f"{' and '.join(missing)} not installed (pip install torch peft)"
            yield CheckFinding(label, "skipped", words)
            continue
        steps.unlink(missing_ok=True)
        command = [sys.executable, "-m", "mlx_lora.bench.doctor.peers", argument, str(kit.work / "job.json")]
        ended = run_process(command, kit.work / "peer.log", limit_s=length.limit_s)
        lines = steps.read_text(encoding="utf-8").splitlines() if steps.exists() else []
        if len(lines) == len(ends):
            theirs = tokens / (float(lines[-1]) - float(lines[each - 1]))
            slower = ours / theirs < FASTER
            note = " in float weights, as it has no 4-bit base here" if name == "torch" and model.packed else ""
            words = f"{theirs:,.0f} tokens/s{note}; mlx-lora is {ours / theirs:.2f} times as fast"
            yield CheckFinding(
                label, "warning" if slower else "ok", words, ours / theirs, None, "times as fast",
                SLOWER if slower else "", {name: theirs},
            )  # fmt: skip
        elif ended.stopped:
            words = f"stopped after {length.limit_s:.0f} s, start included, at step {len(lines)} of {len(ends)}"
            yield CheckFinding(label, "ok", f"{words}; mlx-lora's steps took {ends[-1]:.1f} s")
        else:
            yield CheckFinding(label, "warning", f"it ended with code {ended.code}: {ended.last_words}"[:300])


PEERS = {"mlx_lm.lora": "mlx-lm", "torch": "torch"}  # name -> argument of peers.py
SLOWER = "run it again on a quiet machine (--again --group speed); report it with these numbers"


def check_steady(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the speed of the first minute of a steady load with that of its last minute."""
    model = speed_models(kit)[0]
    data = kit.work / "steady.jsonl"
    # Rows of one length: every step has the same shape.
    data.write_text(chat_rows(1, (6, 6), (30, 30), 0) * (8 * BATCH), encoding="utf-8")
    settings = {
        "batch_size": BATCH,
        "rank": RANK,
        "iters": 100_000,
        "steps_per_report": 10 if kit.as_fast_as_a_gpu else 1,
    }
    records, _ = train_child(kit, "steady", model.write(kit), data, settings, seconds=60 * kit.minutes)
    after = describe_power()
    first, last = steady_speeds(records, 60 * kit.minutes)
    ratio = first / last
    state = after["thermal_state"] or (f"{after['temperature_c']:.0f} °C" if after["temperature_c"] else "not known")
    words = (
        f"{model.words}: {first:,.0f} tokens/s at first and {last:,.0f} after {kit.minutes:g} minutes, "
        f"{ratio:.2f} times as fast at first; heat afterwards: {state}"
    )
    slower = ratio > STEADY
    advice = "heat, the charger or another program: see the lines of the group machine" if slower else ""
    yield CheckFinding(
        "first over last", "warning" if slower else "ok", words, ratio, STEADY, "times", advice,
        {"first minute": first, "last minute": last},
    )  # fmt: skip


def steady_speeds(records: list[dict], seconds: float) -> tuple[float, float]:
    """Return the tokens per second of the first and of the last minute, or of halves of a shorter load.

    Args:
        records: lines of metrics.jsonl; the first two, which compile, are left out.
        seconds: of the load.

    Raises:
        RunError: there are too few steps.
    """
    steady, window = records[1:], min(60.0, seconds / 2)
    if len(steady) < 4:
        raise RunError(f"{len(records)} reports in {seconds:.0f} s are too few to compare; give more --minutes")
    begin, end = steady[0]["elapsed_s"], steady[-1]["elapsed_s"]
    early = [one for one in steady[1:] if one["elapsed_s"] <= begin + window] or steady[1:2]
    late = [one for one in steady[1:] if one["elapsed_s"] > end - window] or steady[-1:]
    before_late = steady[steady.index(late[0]) - 1]["elapsed_s"]
    return (
        sum(one["real_tokens"] for one in early) / (early[-1]["elapsed_s"] - begin),
        sum(one["real_tokens"] for one in late) / (end - before_late),
    )


# Models

SMALL_QWEN = {
    **QWEN3_4B.config,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
}
SMALL_GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 32768,
}  # fmt: skip
MEMORY_FOR_LARGE = 30 * GIB  # from here, an 8B model's widths


@dataclass(frozen=True)
class SpeedModel:
    """A model.

    Attributes:
        name: as it is published.
        config: of the whole model.
        blocks: that are kept.
        packed: whether it is in 4 bits.
    """

    name: str
    config: dict[str, Any]
    blocks: int
    packed: bool

    @property
    def words(self) -> str:
        """Its name in the result."""
        whole = self.config["num_hidden_layers"]
        cut = "" if self.blocks == whole else f", {self.blocks} of {whole} blocks"
        return f"{self.name}, {'4-bit' if self.packed else 'float'}{cut}"

    def write(self, kit: Kit) -> Path:
        """Return a folder with it, written once."""
        config = {**self.config, "num_hidden_layers": self.blocks}
        folder = kit.work / f"speed-{self.name}-{self.blocks}{'-4bit' if self.packed else ''}"
        return write_model(folder, config, device.compute_dtype(), AFFINE if self.packed else None)


def speed_models(kit: Kit) -> list[SpeedModel]:
    """Return four models for this machine."""
    if not kit.as_fast_as_a_gpu:
        return [
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, False),
            SpeedModel("SmolLM2-135M", SMOLLM2.config, 4, True),
            SpeedModel("Gemma-3-270M", SMALL_GEMMA, 6, False),  # its pattern of windows is six blocks long
            SpeedModel("Qwen3-0.6B", SMALL_QWEN, 2, True),
        ]
    large = QWEN3_8B if kit.here.working_set_bytes >= MEMORY_FOR_LARGE else QWEN3_4B
    return [
        SpeedModel("SmolLM2-135M", SMOLLM2.config, 30, False),
        SpeedModel("Gemma-3-270M", SMALL_GEMMA, 18, False),
        SpeedModel("Llama-3.2-1B", LLAMA_1B.config, 8, True),
        SpeedModel(large.name, large.config, 6, True),
    ]
