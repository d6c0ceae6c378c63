"""Build mlx's optimizers and learning-rate schedules, configured as in published recipes, and our own `Muon`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.config.presets import OPTIMIZERS
from mlx_lora.kernels.measure import modules_of
from mlx_lora.planner.memory import FLAT_UP_TO
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.settings import OptimizerSettings

Schedule = Any  # a float, or a callable from step to learning rate


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> Schedule:
    """Return mlx's schedule: linear warm-up from near zero, then cosine or linear to `min_lr_ratio`, or constant.

    Args:
        settings: `warmup` is a fraction of the steps if below 1, else a number of steps.
        total_steps: optimizer steps of the run.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    peak: Any = settings.learning_rate  # chosen by now (config/defaults.py)
    whole = {"nearest": round, "up": math.ceil, "down": lambda steps: 2 if int(steps) == 1 else int(steps)}[
        settings.warmup_rounding
    ]
    warmup = whole(settings.warmup * total_steps) if settings.warmup < 1 else round(settings.warmup)
    if warmup > total_steps:
        raise InputError(
            f"--warmup {settings.warmup:g}: the run has {total_steps} step{'s' * (total_steps != 1)}; give a fraction below 1, or fewer steps"
        )
    rest = settings.decay_steps or max(1, total_steps - warmup)
    after = {
        "cosine": lambda: optim.cosine_decay(peak, rest, peak * settings.min_lr_ratio),
        "linear": lambda: optim.linear_schedule(peak, peak * settings.min_lr_ratio, rest),
        "constant": lambda: lambda _: mx.array(peak),
    }[settings.lr_schedule]()
    if warmup == 0:
        return after if settings.lr_schedule != "constant" else peak
    # Step 1 has the rate peak / warmup: with zero, as in transformers, it would do nothing.
    begin, reached = (peak / warmup, warmup - 1) if settings.warmup_init is None else (settings.warmup_init, warmup)
    rise = optim.linear_schedule(begin, peak, max(1, reached))
    return optim.join_schedules([rise, after], [warmup])


def restarted(schedule: Schedule, every: int, warmup: int) -> Schedule:
    """Return `schedule` with a linear warm-up after each restart (ReLoRA's jagged schedule, arXiv 2307.05695).

    Args:
        schedule: a rate, or a callable from step to rate.
        every: steps between restarts.
        warmup: steps of each warm-up; the first cycle has the schedule's own.
    """

    def rate(step: mx.array) -> mx.array:
        whole: Any = schedule(step) if callable(schedule) else mx.array(schedule)
        rise = mx.minimum(1.0, (step % every + 1) / max(1, warmup))
        return mx.where(step < every, whole, whole * rise)

    return rate


def build_optimizer(
    settings: OptimizerSettings, total_steps: int, restart_every: int | None = None, restart_warmup: int = 0
) -> optim.Optimizer:
    """Return the optimizer with its schedule.

    Args:
        settings: give the optimizer's name and its schedule.
        total_steps: optimizer steps of the run.
        restart_every, restart_warmup: see `restarted`; None for a schedule without restarts.
    """
    rate = learning_rate_schedule(settings, total_steps)
    if restart_every:
        rate = restarted(rate, restart_every, restart_warmup)
    return OPTIMIZERS[settings.optimizer].build(rate, settings)


ELEMENTWISE = tuple(row.mlx_class() for row in OPTIMIZERS.values() if row.elementwise)


class Masters:
    """The trainable parameters, in the layout that the optimizer uses.

    An adapter has hundreds of small arrays, and updating each separately takes about ten operations, in total as many
    as the backward pass. Therefore an elementwise optimizer gets them as a few flat arrays (`flat`, `flat1`, ...), of which the
    model's parameters are views. Large arrays, as all arrays of other optimizers, keep their names. One flat array for all of
    them would have all of the update's intermediate arrays in memory at once.
    """

    def __init__(self, model: nn.Module, flat: bool):
        """Take over the trainable parameters of `model`.

        Args:
            model: its parameters become views of `arrays` by `hand_out`.
            flat: join the small ones; otherwise one array per parameter.
        """
        self._model = model
        self._own = [(name, p.shape, p.dtype) for name, p in tree_flatten(model.trainable_parameters())]
        self._flat: dict[str, dict[str, tuple[int, ...]]] = {}  # key of a flat array -> names and shapes of its parts
        room = 0
        for name, shape, _ in self._own:
            if flat and (size := prod(shape)) <= FLAT_UP_TO:
                if size > room:
                    key, room = f"flat{len(self._flat) or ''}", FLAT_UP_TO
                self._flat.setdefault(key, {})[name] = shape
                room -= size
        # This dict is changed in place, because compiled functions capture it.
        self.arrays = self.gathered(model.trainable_parameters())
        self._layers = [module for module in modules_of(model) if "lora_a" in module and module.trainable_parameters()]

    @contextmanager
    def cast(self) -> Iterator[float]:
        """Let the model have 16-bit factors inside the block, if its layers would cast them anyway.

        In each layer, a cast is a launch on a GPU, and another for its gradient. The layers' scale is part of the factors here,
        its root in each of the two, because one multiplication then does for a flat array.

        Yields:
            What the gradients by the factors must be multiplied by.
        """
        (dtype, scale), *others = {(getattr(layer, "cast_to", None), layer.scale) for layer in self._layers} or {
            (None, 1.0)
        }
        if dtype is None or dtype.size != 2 or others or scale <= 0 or len(self._own) != 2 * len(self._layers):
            yield 1.0
            return
        before, root = self._model.trainable_parameters(), sqrt(scale)
        own = self.by_name({key: (root * array).astype(dtype) for key, array in self.arrays.items()})

        def use(factors: dict, scale: float) -> None:
            self._model.update(factors)
            for layer in self._layers:
                layer.scale = scale

        use(tree_unflatten(list(own.items())), 1.0)
        try:
            yield root
        finally:
            use(before, scale)

    def gathered(self, tree: dict) -> dict:
        """Return a tree like the model's trainable parameters, laid out like `arrays`."""
        leaves = dict(tree_flatten(tree))
        joined = {
            key: mx.concatenate([leaves.pop(name).reshape(-1) for name in own]) for key, own in self._flat.items()
        }
        # Float32 for any model dtype: a module trained in full may have 16 bits.
        return tree_map(lambda leaf: leaf.astype(mx.float32), joined | leaves)

    def put(self, arrays: dict) -> None:
        """Replace the arrays."""
        self.arrays.update(arrays)

    def rates(self, rate_of: Callable[[str], float]) -> dict:
        """Return each number's multiple of the learning rate, as a tree that broadcasts to `arrays`.

        Args:
            rate_of: parameter name -> multiple.
        """
        return {
            key: mx.concatenate([mx.full((prod(shape),), rate_of(name)) for name, shape in self._flat[key].items()])
            if key in self._flat
            else mx.array(rate_of(key))
            for key in self.arrays
        }

    def by_name(self, arrays: dict | None = None) -> dict[str, mx.array]:
        """Return parameter name -> its part of `arrays`, in its own shape.

        Args:
            arrays: laid out like `self.arrays`, which is the default, or some of them.
        """
        found: dict[str, mx.array] = {}
        for key, array in (self.arrays if arrays is None else arrays).items():
            if key not in self._flat:
                found[key] = array
                continue
            own = self._flat[key]
            parts = mx.split(array, list(accumulate(map(prod, own.values())))[:-1])
            found |= {name: part.reshape(shape) for (name, shape), part in zip(own.items(), parts, strict=True)}
        return found

    def from_names(self, values: dict[str, mx.array]) -> dict:
        """Return values given by parameter name, laid out like `arrays`."""
        return self.gathered(tree_unflatten([(name, values[name]) for name, _, _ in self._own]))

    def put_by_name(self, parameters: dict[str, mx.array]) -> None:
        """Replace all parameters by those given by name."""
        self.put(self.from_names(parameters))

    def hand_out(self) -> None:
        """Update the model's parameters from `arrays`."""
        own = self.by_name()
        self._model.update(tree_unflatten([(name, own[name].astype(dtype)) for name, _, dtype in self._own]))


def clip_scale(grads: dict, max_norm: float) -> tuple[mx.array, mx.array]:
    """Return the global L2 norm of `grads` and the factor that reduces it to at most `max_norm`.

    Both are float32 for any dtype of gradients: in float16 the factor for a large norm would round to zero.

    Args:
        grads: tree of gradients.
        max_norm: 0 for no clipping.
    """
    squares = [mx.square(g.astype(mx.float32)).sum() for _, g in tree_flatten(grads)]
    norm = mx.sqrt(sum(squares, mx.array(0.0)))
    if max_norm <= 0:
        return norm, mx.array(1.0)
    return norm, mx.minimum(1.0, max_norm / mx.maximum(norm, 1e-12))


def scaled(grads: dict, factor: mx.array) -> dict:
    """Return every gradient times `factor`, in its own dtype."""
    return tree_map(lambda g: (g.astype(mx.float32) * factor).astype(g.dtype), grads)


# Muon with decoupled weight decay, as its author's and torch's, and with an update of its own for each expert's matrix.
#
# MLX adds the decay to the gradient, before this is made orthogonal: where the gradient is small or zero, as that of LoRA's A is at
# the start, a whole step then goes against the weight (https://kellerjordan.github.io/posts/muon/; torch.optim.Muon).


class Muon(optim.Muon):
    """mlx.optimizers.Muon whose weight decay is w <- w - rate * decay * w, apart from the gradient."""

    def __init__(self, learning_rate: Any, weight_decay: float = 0.01, **options: Any):
        """Prepare it as mlx's, which gets no decay.

        Args:
            learning_rate: a float, or a callable from step to rate.
            weight_decay: decoupled.
            options: of mlx's class.
        """
        super().__init__(learning_rate, weight_decay=0.0, **options)
        self.decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """Return the updated parameter, of shape (rows, columns), (experts, rows, columns), or (n,)."""
        kept = parameter * (1 - self.learning_rate.astype(parameter.dtype) * self.decay)
        if gradient.ndim != 3:
            return super().apply_single(gradient, kept, state)
        single = super().apply_single

        def of_one(own: mx.array, weight: mx.array, momentum: mx.array) -> tuple[mx.array, mx.array]:
            stored = {"v": momentum}
            return single(own, weight, stored), stored["v"]

        updated, state["v"] = mx.vmap(of_one)(gradient, kept, state["v"])
        return updated
