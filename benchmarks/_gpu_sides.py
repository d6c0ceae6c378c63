"""The other trainers of gpu_counts.py: each one's own loop runs up to its first step, which is listed and not computed.

A trainer gives its step to `mx.compile`, and that step calls what `nn.value_and_grad` returned. Both are replaced here, so the loss,
the clipping and the update are the trainer's, and so are its batches. Each of its own Metal kernels is replaced by one operation
that reads and writes the same. Those of mlx-train-perf multiply: each pair of positions that attention needs, and the logits, at the
rate of a matrix product, which its authors do not claim. What a loop adds up beside its step, a few numbers, is not counted, nor that a
step without compiling computes twice what it asks for twice. A trainer that refuses a model says why.

All train factors of rank 16 of all linear layers with AdamW and a constant learning rate. What else is their default stays:

    mlx-lm-lora       5.10.2     as mlx_lm.lora
    unsloth-zoo       2026.10.9  computes blocks twice; has float32 norms; clips each gradient; weights decay
    mlx-train-perf    0.9.1      its loss and its attention in mlx_lm.lora's loop, as if its authors had tested them with this mlx
    mlx-vlm           0.7.10     trains its own models, in steps that it does not compile; has no factors for experts
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import cache, partial
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from _gpu_checkpoints import computed_twice, marked
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner import TrainingArgs, linear_to_lora_layers, train

from mlx_lora.bench.run import MODELS
from mlx_lora.compat.functions import exchanged, original
from mlx_lora.models.graph import Graph, one_kernel

RANK, ALPHA, RATE, WORKING_SET = 16, 32, 1e-4, 48 << 30  # of a Mac with 64 GiB


def first_step(
    side: str, case: Any, gradient_of: Callable[..., Graph], plain_of: Callable[..., Graph]
) -> tuple[list[Graph], bool, int]:
    """Return the graphs of a trainer's first step, whether it is compiled, and how many times a step waits for the GPU.

    Args:
        side: of SIDES.
        case: what is trained; of gpu_counts.py.
        gradient_of, plain_of: of gpu_counts.py.
    """
    (start, waits), loop = SIDES[side], Loop(gradient_of, plain_of)
    block = type(case.outline()[0].layers[0])
    plain = block.__call__
    try:
        with suppress(Listed), exchanged(loop.places), redirect_stdout(io.StringIO()):
            start(case)
    finally:
        block.__call__ = plain  # mlx-lm's checkpointing changes the class
    return loop.graphs, side != "mlx-vlm", waits(len(case.outline()[0].layers))


class Listed(Exception):
    """A step was listed, which ends its loop."""


class Loop:
    """Takes a loop's first step.

    Attributes:
        places: what is exchanged while the loop runs.
        graphs: of that step.
    """

    def __init__(self, gradient_of: Callable[..., Graph], plain_of: Callable[..., Graph]) -> None:
        self.graphs, self._model, self._gradient_of, self._plain_of = list[Graph](), None, gradient_of, plain_of
        self.places: dict[Any, Callable[..., Any]] = {
            (mx, "compile"): self._compile,
            (mx, "checkpoint"): lambda block: partial(marked, block),
            (mx, "custom_function"): OwnBackward,
            (mx, "eval"): lambda *_: None,
            (mx, "device_info"): lambda *_: {"max_recommended_working_set_size": WORKING_SET},
            (mx, "set_wired_limit"): lambda _: 0,
            (mx.metal, "is_available"): lambda: True,
            (mx.fast, "metal_kernel"): own_kernel,
            (nn, "value_and_grad"): self._value_and_grad,
        }

    def _value_and_grad(self, model: nn.Module, loss: Callable[..., Any]) -> Callable[..., Any]:
        def both(_: nn.Module, *batch: Any) -> Any:
            if self._model is None:
                self._model, self._loss, self._batch = model, loss, batch
                self._given = loss(model, *batch), tree_map(mx.zeros_like, model.trainable_parameters())
            return self._given

        return both

    def _compile(self, step: Callable[..., Any], inputs: Any = None, **_: Any) -> Callable[..., Any]:
        def first(*arguments: Any) -> None:
            step(*arguments)  # without values, to meet its loss
            self.graphs += [computed_twice(self._gradient()), self._update(step, inputs[1], arguments)]
            raise Listed

        return first if inputs else step  # which may be a function inside of a step

    def _gradient(self) -> Graph:
        arrays = {str(number): array for number, array in enumerate(leaves(self._batch))}

        def outputs() -> list[mx.array]:
            rest = iter(arrays.values())
            batch = tree_map(lambda value: next(rest) if isinstance(value, mx.array) else value, self._batch)
            loss, *others = leaves(self._loss(self._model, *batch))
            return [loss, *(_shown(mx.stop_gradient(other)) for other in others)]

        return self._gradient_of(self._model, outputs, arrays)

    def _update(self, step: Callable[..., Any], state: dict[str, Any], arguments: Sequence[Any]) -> Graph:
        def update(values: list[Any]) -> list[mx.array]:
            self._model.update(values[0])
            state.update(values[1])
            self._given = values[2]
            return leaves([step(*arguments), self._model.trainable_parameters(), state])

        return self._plain_of(update, [self._model.trainable_parameters(), dict(state), self._given])


class OwnBackward:
    """Stands for `mx.custom_function`: looks it up at each call, as graph.py needs it, and takes arguments that are None."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.backward = forward, forward

    def vjp(self, backward: Callable[..., Any]) -> OwnBackward:
        """Set the backward pass."""
        self.backward = backward
        return self

    def __call__(self, *arguments: Any) -> Any:
        def whole(arrays: Any) -> list[Any]:
            rest = iter(arrays if isinstance(arrays, (list, tuple)) else [arrays])
            return [None if argument is None else next(rest) for argument in arguments]

        def backward(primals: Any, *others: Any) -> list[mx.array]:
            found = self.backward(whole(primals) if len(arguments) > 1 else primals, *others)
            found = found if isinstance(found, (list, tuple)) else [found]
            return [cotangent for cotangent, argument in zip(found, arguments, strict=True) if argument is not None]

        function = mx.custom_function(lambda *arrays: self.forward(*whole(arrays)))
        if isinstance(function, OwnBackward):  # nothing is being listed
            function = original(mx, "custom_function")(function.forward)
        function.vjp(backward)
        return function(*(_shown(argument) for argument in arguments if argument is not None))


def leaves(tree: Any) -> list[mx.array]:
    """Return the arrays of a tree."""
    return [value for _, value in tree_flatten(tree) if isinstance(value, mx.array)]


def _shown(array: mx.array) -> mx.array:
    """Return a view of an array: MLX takes no cotangent of an output that `mx.stop_gradient` made."""
    return array[None].squeeze(0)


# Kernels


def own_kernel(name: str, **_: Any) -> Callable[..., list[mx.array]]:
    """Stand for `mx.fast.metal_kernel`: a launch is one operation, which writes all outputs one after the other."""

    def launch(inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        reads, *products = next(of for start, of in MULTIPLY.items() if name.startswith(start))(*inputs)
        nbytes = [math.prod(shape) * dtype.size for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        made = one_kernel(
            ((sum(nbytes),), mx.uint8), *sorted(leaves(reads), key=lambda x: -x.size), _products(name, *products)
        )
        parts = made.split(np.cumsum(nbytes)[:-1].tolist())
        return [
            part.view(*of).reshape(shape) for part, shape, *of in zip(parts, output_shapes, output_dtypes, strict=True)
        ]

    return launch


@cache
def _products(name: str, rows: int, each: int) -> mx.array:
    """Return an empty array of a kernel's own, whose other sides tell gpu_counts.py how many numbers it multiplies."""
    return mx.array(np.zeros((0, rows, each), np.uint8))


def _scores(times: int, queries: mx.array, *others: Any) -> tuple[Sequence[Any], int, int]:
    """Return what attention reads, and what it multiplies: for each pair of positions, `times` a head's width."""
    batch, heads, width, size = queries.shape
    return (queries, *others), batch * heads * width * (width + 1) // 2, times * size


def _logits(hidden: mx.array, *others: Any) -> tuple[Sequence[Any], int, int]:
    """Return what the loss reads for the part of the vocabulary that it is asked for, and what it multiplies."""
    *head, _, part, _, _ = others
    start, end = part.tolist()
    return (hidden, *(array[start:end] for array in head), *others[-4:]), hidden.size, end - start


# How much kernels multiply, by what their names start with.
MULTIPLY: dict[str, Callable[..., tuple[Sequence[Any], int, int]]] = {
    "mtp_flash_fwd": partial(_scores, 2),
    "mtp_flash_bwd_dq": partial(_scores, 3),
    "mtp_flash_bwd_dkv": partial(_scores, 4),
    "mtp_fused_ce": _logits,
    "": lambda *inputs: (inputs, 0, 0),
}


# Trainers


def _row(case: Any) -> tuple[list[int], int]:
    """Return a row of tokens, and how many of its first ones are not trained."""
    return [1] * (case.width + 1), case.width + 1 - case.trained


def arguments(case: Any, kind: type, prepare: Callable[[nn.Module], None] = lambda _: None) -> list[Any]:
    """Return the first arguments of mlx-lm's `train`: a model with its layers, an optimizer with its state, data, settings."""
    model, _ = case.outline()
    prepare(model)
    model.freeze()
    how = {"rank": case.rank, "scale": ALPHA / RANK, "dropout": 0.0, "keys": case.keys}
    linear_to_lora_layers(model, case.num_layers, how)
    optimizer = optim.AdamW(RATE)
    optimizer.init(model.trainable_parameters())
    settings = kind(batch_size=case.rows, iters=1, max_seq_length=case.width + 1, grad_checkpoint=case.checkpoint)
    return [model, optimizer, [_row(case)] * case.rows, None, settings]


def _mlx_lm_lora(case: Any) -> None:
    from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, train_sft

    train_sft(*arguments(case, SFTTrainingArgs))


def _mlx_train_perf(case: Any) -> None:
    attention, loss, launches, adapter, wrapper = (
        import_module(f"mlx_train_perf.{name}")
        for name in ("attention.api", "core.loss", "core.kernel.launch", "adapters.mlx_lm", "attention.wrapper")
    )
    rates = {attention: ("fwd_rate", "bwd_dq_rate", "bwd_dkv_rate"), launches: ("rate", "rate_quantized")}
    measured = {(of, f"calibrated_{name}"): lambda **_: 1e12 for of, names in rates.items() for name in names}
    with exchanged(measured | {(of, "check_mlx_verified"): lambda **_: None for of in (attention, loss)}):
        model, *others = arguments(case, TrainingArgs, wrapper.enable_flash_attention)
        train(model, *others, adapter.make_loss_fn(model))


def _unsloth_zoo(case: Any) -> None:
    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"  # else its package starts a CUDA set-up on Linux
    from unsloth_zoo.mlx import loader, trainer, utils

    model, model._config = case.outline()
    tokens, given = _row(case)
    settings = trainer.MLXTrainingConfig(
        per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=1, warmup_steps=0, learning_rate=RATE,
        lr_scheduler_type="constant", max_seq_length=len(tokens), append_eos=False, disable_memory_limits=True,
    )  # fmt: skip
    with exchanged({(utils, "_gather_qmm_canary_defective"): lambda *_: False}):
        loader.FastMLXModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        row = {"input_ids": tokens, "labels": [-100] * given + tokens[given:]}
        trainer.MLXTrainer(model, None, [row], args=settings).train()


def _mlx_vlm(case: Any) -> None:
    from mlx_vlm.trainer import VLMTrainingArgs, prepare_model_for_training
    from mlx_vlm.trainer.vlm.sft.runtime import train_vlm

    of, (tokens, given) = MODELS[case.model], _row(case)
    kind = import_module(f"mlx_vlm.models.{of.config['model_type']}")
    model = kind.Model(kind.ModelConfig.from_dict(of.config))
    model.set_dtype(mx.bfloat16)
    if case.packed:
        part = "experts" if of.quantization["mode"] == "mxfp4" else ""  # as mlx_lora/models/meta.py
        nn.quantize(
            model,
            **of.quantization,
            class_predicate=lambda path, layer: part in path and hasattr(layer, "to_quantized"),
        )
    prepare_model_for_training(model, lora_rank=RANK, lora_alpha=ALPHA, verbose=False)
    rows = [{"input_ids": np.array(tokens), "completion_mask": np.arange(len(tokens)) >= given}]
    # It is asked to compile its step only to meet it (`Loop`).
    settings = VLMTrainingArgs(max_seq_length=len(tokens), train_on_completions=True, compile=True)
    train_vlm(model, optim.AdamW(RATE), rows, None, settings)


# Each with how many times its loop waits for the GPU in a step; a wait for what is computed already is none.
SIDES: dict[str, tuple[Callable[[Any], None], Callable[[int], int]]] = {
    "mlx_lm.lora": (
        lambda case: train(*arguments(case, TrainingArgs)),
        lambda _: 1,
    ),  # mlx_lm/tuner/trainer.py:331: mx.eval(state, losses, n_tokens, grad_accum)
    "mlx-lm-lora": (_mlx_lm_lora, lambda _: 1),  # trainer/sft_trainer.py:643: the same
    "mlx-train-perf": (_mlx_train_perf, lambda _: 1),  # mlx_lm.lora's loop
    "mlx-vlm": (_mlx_vlm, lambda _: 1),  # trainer/common/engine.py:142: mx.eval(state, accumulator.state(), gradients)
    # mlx/trainer.py:966: mx.eval(previous) behind each block but the first; 8947: mx.eval(*eval_targets); 7759: the loss's .item()
    "unsloth-zoo": (_unsloth_zoo, lambda blocks: blocks + 1),
}
