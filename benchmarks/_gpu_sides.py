"""The other trainers of gpu_counts.py: each one's own loop runs up to its first step, which is listed and not computed.

A trainer gives its step to `mx.compile`, and that step calls what `nn.value_and_grad` returned. Both are replaced here, so loss,
clipping, weight decay and update are the trainer's, and so are its batches. Its own Metal kernels are each replaced by one
operation that reads and writes the same (`own_kernel`); those that multiply do so at the rate of a matrix product here, which
favors them. What a loop adds up beside its step, a few numbers, is not counted.

All train factors of rank 16 on all linear layers of all blocks, with a constant learning rate and what else is their default:

    mlx-lm-lora       5.10.2     AdamW, as the others
    unsloth-zoo       2026.10.9  checkpoints blocks; has float32 norms; clips each factor's gradient; decays weights
    mlx-train-perf    0.9.1      its loss and its attention in mlx-lm's loop, as if it had been verified with this mlx
    mlx-vlm           0.7.10     trains its own models, in steps that it does not compile; trains no experts
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"  # else its package starts a CUDA set-up on Linux

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_lora.bench.run import MODELS
from mlx_lora.compat.functions import Place, exchanged, original
from mlx_lora.models.graph import Graph, one_kernel

if TYPE_CHECKING:
    from gpu_counts import Case

RANK, ALPHA, RATE = 16, 32, 1e-4
LAYERS = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0}
MACHINE = {"device_name": "Apple M4 Max", "memory_size": 64 << 30, "max_recommended_working_set_size": 48 << 30}
MACS_PER_S = 1e12  # which mlx-train-perf measures, so that no launch takes too long


class Trainer(NamedTuple):
    """How to start a trainer.

    Attributes:
        run: its loop.
        waits: how many times its loop waits for the GPU in each step.
        compiles: whether it compiles its step.
        places: what is exchanged for it besides what `Loop` exchanges.
    """

    run: Callable[[], None]
    waits: int
    compiles: bool = True
    places: dict[Place, Callable[..., Any]] = {}  # noqa: RUF012


class Listed(Exception):
    """A step was listed, which ends its loop."""


class Loop:
    """Takes a loop's first step.

    Attributes:
        graphs: of that step.
    """

    def __init__(self, gradient_of: Callable[..., Graph], plain_of: Callable[..., Graph]) -> None:
        self.graphs, self._gradient_of, self._plain_of = list[Graph](), gradient_of, plain_of
        self._taken = self._given = None
        self._recomputes = False

    def places(self) -> dict[Place, Callable[..., Any]]:
        """Return what is exchanged while the loop runs."""
        return {
            (mx, "compile"): self._compile,
            (mx, "checkpoint"): self._checkpoint,
            (mx, "custom_function"): OwnBackward,
            (mx, "eval"): lambda *_: None,
            (mx, "device_info"): lambda *_: MACHINE,
            (mx, "set_wired_limit"): lambda _: 0,
            (mx.metal, "is_available"): lambda: True,
            (mx.fast, "metal_kernel"): own_kernel,
            (nn, "value_and_grad"): self._value_and_grad,
        }

    def _checkpoint(self, block: Callable[..., Any]) -> Callable[..., Any]:
        self._recomputes = True
        return block

    def _value_and_grad(self, model: nn.Module, loss: Callable[..., Any]) -> Callable[..., Any]:
        def both(_: nn.Module, *batch: Any) -> Any:
            if self._given is None:
                self._taken = model, loss, batch
                self._given = loss(model, *batch), tree_map(mx.zeros_like, model.trainable_parameters())
            return self._given

        return both

    def _compile(self, step: Callable[..., Any], inputs: Any = None, **_: Any) -> Callable[..., Any]:
        if inputs is None:
            return step  # no step, but a function inside of one

        def first(*arguments: Any) -> None:
            step(*arguments)  # without values, to meet its loss
            self.graphs = [self._gradient(), self._update(step, inputs, arguments)]
            raise Listed

        return first

    def _gradient(self) -> Graph:
        model, loss, batch = self._taken
        arrays = {str(number): array for number, array in enumerate(leaves(batch))}

        def outputs() -> list[mx.array]:
            rest = iter(arrays.values())
            own = tree_map(lambda value: next(rest) if isinstance(value, mx.array) else value, batch)
            value, *others = leaves(loss(model, *own))
            return [value, *(_shown(mx.stop_gradient(other)) for other in others)]

        return self._gradient_of(model, outputs, arrays, self._recomputes)

    def _update(self, step: Callable[..., Any], state: Sequence[Any], arguments: Sequence[Any]) -> Graph:
        model, of_optimizer = state[:2]

        def update(values: list[Any]) -> list[mx.array]:
            model.update(values[0])
            of_optimizer.update(values[1])
            self._given = values[2]
            result = step(*arguments)
            return leaves([result, model.trainable_parameters(), of_optimizer])

        return self._plain_of(update, [model.trainable_parameters(), dict(of_optimizer), self._given])


class OwnBackward:
    """Stands for `mx.custom_function`: it is looked up at each call, as graph.py needs it, and no argument of it is None."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward, self._backward = forward, None

    def vjp(self, backward: Callable[..., Any]) -> OwnBackward:
        """Set the backward pass."""
        self._backward = backward
        return self

    def __call__(self, *arguments: Any) -> Any:
        def whole(arrays: Any) -> list[Any]:
            rest = iter(arrays if isinstance(arrays, (list, tuple)) else [arrays])
            return [None if argument is None else next(rest) for argument in arguments]

        def backward(primals: Any, *others: Any) -> list[mx.array]:
            own = whole(primals)
            found = self._backward(own if len(own) > 1 else own[0], *others)
            found = found if isinstance(found, (list, tuple)) else [found]
            return [d for d, argument in zip(found, arguments, strict=True) if argument is not None]

        function = mx.custom_function(lambda *arrays: self._forward(*whole(arrays)))
        if isinstance(function, OwnBackward):  # it is not being listed
            function = original(mx, "custom_function")(function._forward)
        function.vjp(backward)
        return function(*(_shown(argument) for argument in arguments if argument is not None))


def leaves(tree: Any) -> list[mx.array]:
    """Return the arrays of a tree."""
    return [value for _, value in tree_flatten(tree) if isinstance(value, mx.array)]


def _shown(array: mx.array) -> mx.array:
    """Return a view of an array: MLX counts no output of a function that ends in `mx.stop_gradient`."""
    return array[None].squeeze(0)


# Kernels


def own_kernel(name: str, **_: Any) -> Callable[..., list[mx.array]]:
    """Stand for `mx.fast.metal_kernel`: a launch is one operation, which writes all outputs one after the other."""

    def launch(inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        reads, products = next((of for start, of in MULTIPLY.items() if name.startswith(start)), _none)(list(inputs))
        ends = np.cumsum(
            [0, *(math.prod(s) * d.size for s, d in zip(output_shapes, output_dtypes, strict=True))]
        ).tolist()
        arrays = sorted((x for x in reads if isinstance(x, mx.array)), key=lambda x: -x.size)
        made = one_kernel(((ends[-1],), mx.uint8), *arrays, _products(name, *products))
        parts = zip(ends, ends[1:], output_shapes, output_dtypes, strict=False)
        return [made[start:end].view(dtype).reshape(shape) for start, end, shape, dtype in parts]

    return launch


@cache
def _products(name: str, rows: int, each: int) -> mx.array:
    """Return an empty array whose other sides tell gpu_counts.py how many numbers a kernel multiplies; each kernel has its own."""
    return mx.array(np.zeros((0, rows, each), np.uint8))


def _none(inputs: list[Any]) -> tuple[list[Any], tuple[int, int]]:
    return inputs, (0, 0)


def _scores(times: int, inputs: list[Any]) -> tuple[list[Any], tuple[int, int]]:
    """Return what attention reads, and its multiplications: `times` a head's width for each pair of positions."""
    batch, heads, width, size = inputs[0].shape
    return inputs, (batch * heads * width * (width + 1) // 2, times * size)


def _logits(inputs: list[Any]) -> tuple[list[Any], tuple[int, int]]:
    """Return what the loss reads for the part of the vocabulary that it is asked for, and its multiplications."""
    hidden, *head, _, part, _, _ = inputs
    start, end = part.tolist()
    return [hidden, *(array[start:end] for array in head), *inputs[-4:]], (hidden.size, end - start)


MULTIPLY = {
    "mtp_flash_fwd": partial(_scores, 2),
    "mtp_flash_bwd_dq": partial(_scores, 3),
    "mtp_flash_bwd_dkv": partial(_scores, 4),
    "mtp_fused_ce": _logits,
}


# Trainers


def row(case: Case) -> tuple[list[int], int]:
    """Return a row of tokens, and how many of its first ones are not trained."""
    return [1] * (case.width + 1), case.width + 1 - case.trained


def adapted(case: Case, prepare: Callable[[nn.Module], None] = lambda _: None) -> tuple[nn.Module, optim.Optimizer]:
    """Return a model with mlx-lm's layers, and an optimizer with its state."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = case.outline()
    prepare(model)
    model.freeze()
    linear_to_lora_layers(model, -1, LAYERS)
    return model, ready(model)


def ready(model: nn.Module) -> optim.Optimizer:
    """Return an optimizer that has its state."""
    optimizer = optim.AdamW(RATE)
    optimizer.init(model.trainable_parameters())
    return optimizer


def mlx_lm_lora(case: Case) -> Trainer:
    """Trace `train_sft`, which waits in mx.eval(state, losses, n_tokens, grad_accum)."""
    from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, train_sft

    settings = SFTTrainingArgs(batch_size=1, iters=1, max_seq_length=case.width + 1)

    def run() -> None:
        train_sft(*adapted(case), [row(case)], None, settings)

    return Trainer(run, 1)


def mlx_train_perf(case: Case) -> Trainer:
    """Trace mlx_lm's `train` with this trainer's loss and attention; it waits as mlx_lm does."""
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_train_perf.adapters.mlx_lm import make_loss_fn
    from mlx_train_perf.attention.wrapper import enable_flash_attention

    attention, loss, launches = (
        import_module(f"mlx_train_perf.{name}") for name in ("attention.api", "core.loss", "core.kernel.launch")
    )
    measured = lambda **_: MACS_PER_S
    places = {(module, "check_mlx_verified"): lambda **_: None for module in (attention, loss)}
    places |= {(attention, f"calibrated_{name}_rate"): measured for name in ("fwd", "bwd_dq", "bwd_dkv")}
    places |= {(launches, name): measured for name in ("calibrated_rate", "calibrated_rate_quantized")}
    settings = TrainingArgs(batch_size=1, iters=1, max_seq_length=case.width + 1)

    def run() -> None:
        model, optimizer = adapted(case, enable_flash_attention)
        train(model, optimizer, [row(case)], None, settings, make_loss_fn(model))

    return Trainer(run, 1, places=places)


def unsloth_zoo(case: Case) -> Trainer:
    """Trace MLXTrainer.train, which waits in _async_eval_by_layer once for each block, in mx.eval(*eval_targets), and in mx.eval(global_toks)."""
    from unsloth_zoo.mlx import trainer, utils
    from unsloth_zoo.mlx.loader import FastMLXModel

    model, config = case.outline()
    model._config = config
    tokens, given = row(case)
    rows = [{"input_ids": tokens, "labels": [-100] * given + tokens[given:]}]
    settings = trainer.MLXTrainingConfig(
        per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=1, warmup_steps=0, learning_rate=RATE,
        lr_scheduler_type="constant", max_seq_length=len(tokens), append_eos=False, disable_memory_limits=True,
    )  # fmt: skip

    def run() -> None:
        own = FastMLXModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        trainer.MLXTrainer(own, None, rows, args=settings).train()

    places = {(utils, "_gather_qmm_canary_defective"): lambda *_: False}
    return Trainer(run, len(model.layers) + 2, places=places)


def mlx_vlm(case: Case) -> Trainer:
    """Trace `train_vlm`, which waits in mx.eval(state, accumulator.state(), gradients)."""
    from mlx_vlm.trainer.common.model import prepare_model_for_training
    from mlx_vlm.trainer.vlm.config import VLMTrainingArgs
    from mlx_vlm.trainer.vlm.sft.runtime import train_vlm

    of = MODELS[case.model]
    kind = import_module(f"mlx_vlm.models.{of.config['model_type']}")
    model = kind.Model(kind.ModelConfig.from_dict(of.config))
    model.set_dtype(mx.bfloat16)
    if case.packed:
        nn.quantize(model, **of.quantization)
    tokens, given = row(case)
    sample = {"input_ids": np.array(tokens), "completion_mask": np.arange(len(tokens)) >= given}
    settings = VLMTrainingArgs(iters=1, max_seq_length=len(tokens), train_on_completions=True, compile=True)

    def run() -> None:
        prepare_model_for_training(model, lora_rank=RANK, lora_alpha=ALPHA, verbose=False)
        train_vlm(model, optim.AdamW(RATE), [sample], None, settings)

    return Trainer(run, 1, compiles=False)


SIDES: dict[str, Callable[[Case], Trainer]] = {
    "mlx-lm-lora": mlx_lm_lora,
    "unsloth-zoo": unsloth_zoo,
    "mlx-train-perf": mlx_train_perf,
    "mlx-vlm": mlx_vlm,
}


def first_step(
    side: str, case: Case, gradient_of: Callable[..., Graph], plain_of: Callable[..., Graph]
) -> tuple[list[Graph], bool, int]:
    """Return the graphs of a trainer's first step, whether it is compiled, and how many times a step waits for the GPU.

    Args:
        side: of SIDES.
        case: what is trained.
        gradient_of, plain_of: of gpu_counts.py.
    """
    trainer, loop = SIDES[side](case), Loop(gradient_of, plain_of)
    with exchanged(loop.places() | trainer.places), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        with suppress(Listed):
            trainer.run()
    return loop.graphs, trainer.compiles, trainer.waits
