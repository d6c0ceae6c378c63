"""Define what a check of `doctor --full` is given and finds, compare what the device and the CPU compute, and make models.

Both compute in one process. The device computes in the dtype that training uses, and on a GPU in float32 too. The CPU always
computes in float32, from the same (rounded) inputs, so what remains is the device's rounding and its faults. On a machine
without a GPU, both are the CPU, and what is compared are our functions and their definitions.

The models have random weights, and are tiny or of published shapes: nothing is downloaded. Their tokenizer has a token for each
byte, so every text can be encoded, and ids are below 261 whatever the vocabulary.

Test whether this machine computes a training step's products correctly, and list its measured kernels, for `doctor`.

Small products are correct on machines where a model's shapes return garbage, so the test uses shapes with known faults:

    mlx#3797   half-precision products with a long inner side, from M N = 2048^2 on (M5)
    mlx#4411   float32 products with 11 bits (M5): two rows and more, never one
    mlx#4201   a quantized product whose weight is not transposed: the backward pass of every quantized base
    mlx#3586   a 6-bit product of 720 rows
    mlx#3854   nvfp4 with few rows and a long inner side
    mlx#3585   attention over more than eight positions

A sample of each result's rows is compared with numpy in float64. Shapes: (M, K) by (K, N).

The table of kernels has all candidates measured on this machine, with time, memory and error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.kernels.choose import activation_class, attention_class, choose_among, kernel_rows
from mlx_lora.kernels.measure import TOLERANCE, ShapeClass, choose, read_figures
from mlx_lora.losses.fused import NAME, choose_kernel, head_words, loss_figures
from mlx_lora.models.convert import build_model
from mlx_lora.models.folder import save_tensors
from mlx_lora.models.generator import NAME as WEIGHTS
from mlx_lora.models.generator import TOKEN, choose_form, kind_words, product_figures
from mlx_lora.models.head import Head
from mlx_lora.utils import device
from mlx_lora.utils.device import Device
from mlx_lora.utils.files import read_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Checks and findings

Status = Literal["ok", "warning", "failed", "skipped"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "failed", "skipped")
# Group -> what it asks, in the order in which the groups run.
GROUPS = {
    "machine": "Is this machine ready: versions, memory, arithmetic, disk, power?",
    "kernels": "Does every kernel and its gradient give the numbers of a float32 reference on the CPU?",
    "formats": "Do the quantized formats give the numbers of their dequantized weights, forward and backward?",
    "adapters": "Does every adapter layer give the numbers of the CPU, forward and in every gradient?",
    "losses": "Does every loss give the numbers of the CPU, forward and backward?",
    "objectives": "Does a training step of each objective run, and give the numbers of the CPU?",
    "resume": "Does a run that was stopped and resumed end with the same bytes?",
    "decode": "Does a batch write what each of its rows writes alone, with and without an adapter?",
    "memory": "Does a run need the memory that the plan says?",
    "speed": "How fast is training, beside mlx_lm.lora and torch on the same rows, and after some minutes?",
}
LARGEST = 1e30  # what an infinite error is written as, because JSON has no infinity


@dataclass(frozen=True)
class CheckFinding:
    """One line of the result.

    Attributes:
        name: what was looked at, unique within its check.
        status: `failed` for what is wrong, `warning` for what an owner should know, `skipped` for what cannot run here.
        words: what was found; for `skipped`, why.
        found: the number that was measured; None if the words say all.
        wanted: its bound, or the number that was expected; None without one.
        unit: of both.
        advice: what to do; empty if nothing.
        values: further numbers by name, which the page draws.
    """

    name: str
    status: Status
    words: str
    found: float | None = None
    wanted: float | None = None
    unit: str = ""
    advice: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Kit:
    """What a check is given.

    Attributes:
        here: the device.
        quick: take the small share of about a minute.
        work: a folder for models, data and runs, which is removed at the end.
        minutes: length of the steady load.
    """

    here: Device
    quick: bool
    work: Path
    minutes: float

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, so that the CPU can judge it."""
        return self.here.backend != "cpu"

    @property
    def as_fast_as_a_gpu(self) -> bool:
        """Whether runs may have a real model's size: on a GPU, unless a CPU only pretends to be one, as in a rehearsal."""
        return self.on_gpu and device.trial_flops() > 1e11


@dataclass(frozen=True)
class KitCheck:
    """One check.

    Attributes:
        group: a key of GROUPS.
        name: unique within the kit.
        run: yields what it finds; if it raises, that is a finding too.
        quick: whether `--quick` includes it.
        needs: returns why it cannot run here, or an empty text.
    """

    group: str
    name: str
    run: Callable[[Kit], Iterable[CheckFinding]]
    quick: bool = True
    needs: Callable[[Kit], str] = lambda kit: ""


def bounded(
    name: str, error: float, bound: float, what: str, advice: str = "", unit: str = "relative error"
) -> CheckFinding:
    """Return a finding that is ok if an error is within its bound; one that is not finite never is.

    Args:
        name: of the finding.
        error, bound: the error and the largest allowed one.
        what: what was compared with what.
        advice: if it is not.
        unit: of both.
    """
    good = math.isfinite(error) and error <= bound
    found = error if math.isfinite(error) else LARGEST
    return CheckFinding(name, "ok" if good else "failed", what, found, bound, unit, "" if good else advice)


# The device against the CPU

Outputs = Callable[..., list[mx.array]]


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU inside the block; device.py's functions then answer for the CPU."""
    with mx.stream(mx.cpu):
        yield


def dtypes_of(kit: Kit) -> list[mx.Dtype]:
    """Return the dtypes in which the device is checked: that of runs, and on a GPU float32 as well."""
    used = device.compute_dtype()
    return [used] if kit.quick or used == mx.float32 or not kit.on_gpu else [used, mx.float32]


def labeled_dtypes(kit: Kit) -> list[tuple[mx.Dtype, str]]:
    """Return `dtypes_of`, each with what its findings' names end with: nothing for the first."""
    return [(dtype, f", {dtype_name(dtype)}" if number else "") for number, dtype in enumerate(dtypes_of(kit))]


def dtype_name(dtype: mx.Dtype) -> str:
    """Return a dtype's name, as in bfloat16."""
    return str(dtype).rpartition(".")[2]


def normal(*shape: int, seed: int, dtype: mx.Dtype = mx.float32, size: float = 1.0) -> mx.array:
    """Return random numbers, the same on every device: they are drawn by numpy."""
    return mx.array(size * np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def host(array: mx.array) -> np.ndarray:
    """Return an array's numbers in float64; a float64 array may only be read on the CPU."""
    with on_cpu():
        return np.array(array.astype(mx.float32)).astype(np.float64)


def apart(found: mx.array, exact: mx.array) -> float:
    """Return |found - exact| / |exact| over all numbers, in float64 on the host; infinite for what is not finite."""
    one, other = host(found), host(exact)
    if one.shape != other.shape or not np.isfinite(one).all():
        return math.inf
    size = float(np.sqrt(np.square(other).sum()))
    return float(np.sqrt(np.square(one - other).sum())) / (size + 1e-30)


def passes(function: Outputs, arrays: Sequence[mx.array], cotangents: Sequence[mx.array], compiled: bool = False):
    """Return a function's outputs and its gradients with respect to all arrays, computed.

    Args:
        function: takes the arrays.
        arrays: its arguments.
        cotangents: of its outputs.
        compiled: through mx.compile, as in a training step.
    """

    def both(*arrays: mx.array) -> list[mx.array]:
        outputs, gradients = mx.vjp(function, list(arrays), list(cotangents))
        return [*outputs, *gradients]

    made = (mx.compile(both) if compiled else both)(*arrays)
    mx.eval(made)
    return made[: len(cotangents)], made[len(cotangents) :]


def exact_passes(function: Outputs, arrays: Sequence[mx.array], cotangents: Sequence[mx.array], double: bool = False):
    """Return `passes` on the CPU in float32, or with `double` in float64, which a GPU does not have."""
    mx.eval(list(arrays), list(cotangents))
    with on_cpu():
        dtype = mx.float64 if double else mx.float32
        return passes(function, [x.astype(dtype) for x in arrays], [c.astype(dtype) for c in cotangents])


def compare_passes(
    name: str,
    function: Outputs,
    exact: tuple[Sequence[mx.array], Sequence[mx.array]],
    arrays: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    advice: str,
    times: float = 1.0,
) -> Iterator[CheckFinding]:
    """Yield two findings: the outputs of a function and its gradients, against `exact_passes` of its definition.

    Args:
        name: of the function.
        function: takes the arrays.
        exact: the numbers that it should give.
        arrays: in the dtype that is checked; all are differentiated.
        cotangents: of the outputs.
        advice: what to do if they differ.
        times: factor on the tolerance of the dtype, for what sums more roundings.
    """
    dtype = arrays[0].dtype
    bound = times * TOLERANCE[dtype]
    outputs, gradients = passes(function, arrays, cotangents, device.compiling_is_cheap())
    what = f"{dtype_name(dtype)} against {dtype_name(exact[0][0].dtype)} on the CPU"
    for part, found, wanted in (("output", outputs, exact[0]), ("gradient", gradients, exact[1])):
        errors = [apart(one, other) for one, other in zip(found, wanted, strict=True)]
        yield bounded(f"{name}: {part}", max(errors), bound, what, advice)


def largest_apart(found: Mapping[str, Any], exact: Mapping[str, Any]) -> tuple[float, str]:
    """Return the largest distance of arrays of the same names, relative to the largest array, and the array's name.

    A gradient that is nearly zero has no size of its own, so distances are relative to the largest of them all, and to the
    array's own size where that is at least a hundredth.
    """
    if found.keys() != exact.keys():
        return math.inf, ", ".join(sorted(found.keys() ^ exact.keys())[:3])
    sizes = {name: float(np.sqrt(np.square(host(x)).sum())) for name, x in exact.items()}
    most, worst = max(sizes.values()), (0.0, "")
    for name, size in sizes.items():
        whole = apart(found[name], exact[name]) * (size + 1e-30) / max(size, 0.01 * most, 1e-30)
        worst = max(worst, (whole, name))
    return worst


# Models of random weights

END, START, TEXT_END = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 288,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
TINY_4BIT = {"group_size": 32, "bits": 4, "mode": "affine"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and ChatML's markers."""
    # Imported here, because the short check needs none of it.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (TEXT_END, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=TEXT_END, chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def random_model(
    config: dict[str, Any], dtype: mx.Dtype = mx.float32, layout: dict[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """Return a model of random weights in evaluation mode, the same each time.

    Args:
        config: config.json's entries.
        dtype: of the weights that are not quantized.
        layout: `group_size`, `bits` and `mode`; None: nothing is quantized.
        seed: of the weights.
    """
    mx.random.seed(seed)
    model = build_model(config)
    model.set_dtype(dtype)
    if layout is not None:
        nn.quantize(model, **layout)
    mx.eval(model.parameters())
    model.eval()
    return model


def write_model(
    folder: Path,
    config: dict[str, Any],
    dtype: mx.Dtype = mx.float32,
    layout: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder with a model of random weights and the byte tokenizer, unless it is there; arguments as in `random_model`."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    model = random_model(config, dtype, layout, seed)
    save_tensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    content = {**config, "eos_token_id": tokenizer.eos_token_id}
    if layout is not None:
        content["quantization"] = layout
    # Last, so that a folder with it is whole.
    (folder / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def tiny_folder(work: Path, packed: bool = False) -> Path:
    """Return the folder of a model of two blocks."""
    return write_model(work / f"tiny{'-4bit' if packed else ''}", TINY, layout=TINY_4BIT if packed else None)


# Products

SAMPLED_ROWS = 32
# Relative to the largest exact number: a few roundings of the dtype. Float32 with 11 bits would reach 5e-4.
PRODUCT_TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 2e-2, mx.float16: 3e-3}
# Products above this many operations are for a GPU: mlx's CPU has no fast 16-bit kernel.
MOST_CPU_OPERATIONS = 4e9
MOST_CPU_HALF_OPERATIONS = 4e8


LAYOUTS = ((4, 64, "affine"), (6, 64, "affine"), (8, 32, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4"))


def self_test() -> Iterator[CheckFinding]:
    """Yield all comparisons that this backend can make within seconds."""
    on_cpu = device.current_device().backend == "cpu"
    for m, k, n in ((8, 256, 1024), (720, 2048, 2048), (1024, 12288, 4096), (2048, 576, 1536)):
        for dtype in (mx.float32, mx.bfloat16, mx.float16):
            most = MOST_CPU_OPERATIONS if dtype == mx.float32 else MOST_CPU_HALF_OPERATIONS
            if not on_cpu or 2 * m * k * n <= most:
                x, w = normal(m, k, seed=0, dtype=dtype), normal(n, k, seed=1, dtype=dtype)
                yield compare_rows(
                    f"{m} x {k} by {k} x {n}, {dtype_name(dtype)}",
                    x @ w.T,
                    lambda rows, x=x, w=w: host(x)[rows] @ host(w).T,
                    PRODUCT_TOLERANCE[dtype],
                )
    rows = 64 if on_cpu else 720
    for bits, group_size, mode in LAYOUTS:
        for transpose in (True, False):
            layout = {"bits": bits, "group_size": group_size, "mode": mode}
            yield _quantized(rows, 2048 if not on_cpu else 512, layout, transpose)
    yield _quantized(4, 4096 if not on_cpu else 1024, {"bits": 4, "group_size": 16, "mode": "nvfp4"}, True)
    yield _attention()


def _quantized(m: int, side: int, layout: dict[str, Any], transpose: bool) -> CheckFinding:
    dtype = device.compute_dtype()
    x, w = normal(m, side, seed=0, dtype=dtype), normal(side, side, seed=1, dtype=dtype)
    packed = mx.quantize(w, **layout)
    dense = mx.dequantize(*packed, **layout, dtype=dtype)
    made = mx.quantized_matmul(x, *packed, transpose=transpose, **layout)
    way = "forward" if transpose else "backward"
    what = f"{m} x {side} by {side} x {side}, {layout['bits']}-bit {layout['mode']}, {way}"

    def exact(rows: np.ndarray) -> np.ndarray:
        return host(x)[rows] @ (host(dense).T if transpose else host(dense))

    return compare_rows(what, made, exact, max(PRODUCT_TOLERANCE[dtype], 1e-4))


def _attention(heads: int = 2, length: int = 128, width: int = 64) -> CheckFinding:
    dtype = device.compute_dtype()
    q, k, v = (normal(1, heads, length, width, seed=seed, dtype=dtype) for seed in range(3))
    made = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width), mask="causal")

    def exact(rows: np.ndarray) -> np.ndarray:
        scores = host(q) @ host(k).swapaxes(-1, -2) / math.sqrt(width)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True) @ host(v)).reshape(-1, width)[rows]

    what = f"causal attention over {length} positions, {dtype_name(dtype)}"
    return compare_rows(what, made.reshape(-1, width), exact, PRODUCT_TOLERANCE[dtype])


def compare_rows(what: str, made: mx.array, exact: Callable[[np.ndarray], np.ndarray], bound: float) -> CheckFinding:
    """Return the largest error of a sample of an array's rows, relative to the largest exact number."""
    rows = np.unique(np.linspace(0, len(made) - 1, SAMPLED_ROWS).astype(int))
    wanted = exact(rows)
    return bounded(what, float(np.abs(host(made)[rows] - wanted).max() / np.abs(wanted).max()), bound, what)


def changing_gradients(rounds: int = 4) -> list[str]:
    """Compute gradients that are summed by scattering several times, and return the names of those that vary.

    Embeddings and experts add the gradients of many positions to one row. A GPU may add them in any order; two runs with
    one seed then only agree up to rounding.
    """
    dtype = device.compute_dtype()
    table, pulls = normal(64, 256, seed=1, dtype=dtype), normal(4096, 256, seed=2, dtype=dtype)
    ids = mx.random.randint(0, 64, (4096,), key=mx.random.key(1))
    experts, chosen = normal(4, 32, 256, seed=3, dtype=dtype), mx.sort(ids[:512] % 4)

    def embedded(weight: mx.array) -> mx.array:
        return (weight[ids] * pulls).astype(mx.float32).sum()

    def mixed(weight: mx.array) -> mx.array:
        states = pulls[:512, None, :32]  # (N, 1, in)
        made = mx.gather_mm(states, weight, rhs_indices=chosen, sorted_indices=True)
        return (made * pulls[:512, None]).astype(mx.float32).sum()

    changing = []
    for name, loss, weight in (("embeddings", embedded, table), ("experts", mixed, experts)):
        gradients = [mx.grad(loss)(weight) for _ in range(rounds)]
        mx.eval(gradients)
        if not all(mx.array_equal(gradients[0], other).item() for other in gradients[1:]):
            changing.append(name)
    return changing


# Table of kernels

# The shapes that `doctor --kernels` measures: widths of SmolLM2-135M, heads of Llama 3, recurrences of Qwen3.5 and Mamba-2.
ATTENTION = ((9, 3, 64, 256), (9, 3, 64, 1024), (32, 8, 128, 1024))
ACTIVATION = (1536, 8192)
HEAD = (49152, 576)
PACKED = ((512, 512, 4, 64, "affine"), (2048, 2048, 4, 64, "affine"))  # weights while text is generated
RECURRENT = {"gated delta": (128, 16, 32, 128, 128, "a gate per head"), "state space": (256, 24, 64, 1, 128)}


def measure_usual() -> None:
    """Measure kernels in common shapes, unless they were measured before."""
    dtype, rows = device.compute_dtype(), {row.name: row for row in kernel_rows()}
    calls = [
        (rows["attention"], attention_class(heads, key_heads, width, width, keys))
        for heads, key_heads, width, keys in ATTENTION
    ]
    calls += [(rows["gated activation"], activation_class(width)) for width in ACTIVATION]
    calls += [(rows[name], shape) for name, shape in RECURRENT.items()]
    choose_among(calls, "auto", dtype, measure=True)
    head = nn.Embedding(*HEAD)
    head.weight = head.weight.astype(dtype)
    head.freeze()
    mx.eval(head.weight)
    loss_figures(Head(nn.Module(), head), dtype, measure=True)
    for kind in PACKED:
        product_figures(kind, TOKEN, dtype)


def known_table() -> list[dict[str, Any]]:
    """Return the measurements on this machine with this mlx: kernel, shape, dtype, choice, and each candidate's figures."""
    before = f"{device.measured_on()}|"
    words = {row.name: row.words for row in kernel_rows()} | {NAME: head_words, WEIGHTS: kind_words}
    rules = {NAME: choose_kernel, WEIGHTS: choose_form}
    table = []
    for key in sorted(read_store("kernels")):
        figures = read_figures(key) if key.startswith(before) else None
        dtype, _, rest = key.removeprefix(before).partition("|")
        kernel, _, of = rest.partition("|")
        if not figures or kernel not in words:
            continue
        shape: ShapeClass = tuple(int(part) if part.isdecimal() else part for part in of.split(","))
        table.append(
            {
                "kernel": kernel,
                "shape": words[kernel](shape),
                "dtype": dtype,
                "chosen": rules.get(kernel, choose)(figures) or "none is right",
                "candidates": {name: {**asdict(one), "correct": one.correct} for name, one in figures.items()},
            }
        )
    return table
