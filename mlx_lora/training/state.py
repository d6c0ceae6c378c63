"""The state of a run: its position, and every array that the next step reads.

A run that is resumed from it takes the same steps, bit for bit, as one that never stopped. It consists of masters,
moments and the schedule's step count, the method's own state (AdaLoRA's importance, ReLoRA's cycles), the random key
of dropout, and the number of consumed micro-batches (the plan is a pure function of data, seed and epoch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.system.errors import InputError, RunError
from mlx_lora.training.step import Step


class Diverged(RunError):
    """Ends a run because many updates in a row were not finite; `at` is the run's position."""

    def __init__(self, at: Position):
        super().__init__(f"step {at.taken}: loss or gradient was not finite {at.skipped_in_a_row} times in a row")
        self.at = at


# Frozen factors that a method keeps in addition to the trained ones.
FROZEN = ("start_a", "start_b", "fixed_a", "fixed_b")


@dataclass
class Position:
    """The position of a run, which the loop keeps up to date.

    Attributes:
        taken: optimizer steps so far.
        consumed: micro-batches of the plan so far.
        skipped, skipped_in_a_row: updates that were not finite.
        val_loss, val_at: the last validation and its step.
        best_loss, best_accuracy, best_at: the best validation so far and its step; None if it reported no accuracy.
        worse: validations since then that were not better by the early stopping threshold.
        parts: the number of parts in which each batch runs.
    """

    taken: int = 0
    consumed: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None
    val_at: int | None = None
    best_loss: float | None = None
    best_accuracy: float | None = None
    best_at: int | None = None
    worse: int = 0
    parts: int = 1

    def validated(
        self, loss: float, threshold: float = 0.0, accuracy: float | None = None, by_accuracy: bool = False
    ) -> bool:
        """Record a validation, and return whether it is the best so far.

        Args:
            loss: mean per trained token, or per example of preference training.
            threshold: an improvement up to this does not count for early stopping, as in transformers'
                EarlyStoppingCallback.
            accuracy: share of pairs that are preferred as labeled, if the objective reports it.
            by_accuracy: whether the best validation is the one with the highest accuracy (of equal ones, the one with
                the lowest loss); otherwise it is the one with the lowest loss. A validation before the first step is
                then not a candidate: policy and reference are still the same, so its accuracy is only rounding.
        """
        self.val_loss, self.val_at = loss, self.taken
        if by_accuracy and not self.taken:
            return False
        less = math.inf if self.best_loss is None else self.best_loss - loss
        gain = less
        if by_accuracy and accuracy is not None:
            gain = math.inf if self.best_accuracy is None else accuracy - self.best_accuracy
        better = math.isfinite(loss) and (gain > 0 or (gain == 0 and less > 0))
        self.worse = 0 if better and (gain > threshold or not threshold) else self.worse + 1
        if better:
            self.best_loss, self.best_at = loss, self.taken
            self.best_accuracy = accuracy if self.taken else None
        return better


def run_arrays(step: Step) -> dict[str, mx.array]:
    """Return the arrays of a run by flat names."""
    arrays = {f"masters.{name}": value for name, value in step.masters.arrays.items()}
    arrays |= {f"optimizer.{name}": value for name, value in tree_flatten(step.optimizer.state)}
    arrays["random"] = mx.random.state[0]
    if step.events is not None:
        arrays |= {f"events.{name}": value for name, value in tree_flatten(step.events.state)}
        arrays |= {f"extras.{name}": value for name, value in step.events.extras().items()}
    for path, layer in adapter_layers(step.model).items():
        arrays |= {f"layers.{path}.{name}": layer[name] for name in FROZEN if name in layer}
    return arrays


def finite(step: Step) -> bool:
    """Return whether all trained parameters are finite."""
    return bool(mx.all(mx.stack([mx.isfinite(value).all() for value in step.masters.arrays.values()])).item())


def restore_arrays(step: Step, arrays: dict[str, mx.array]) -> None:
    """Restore the arrays of a run.

    Args:
        step: a new step with the same settings, and with a model adapted by them.
        arrays: as `run_arrays` returned them.

    Raises:
        InputError: they have other names, shapes or types than this run's.
    """
    layers = adapter_layers(step.model)
    _check_arrays(run_arrays(step), arrays, layers)

    def part(prefix: str) -> dict[str, mx.array]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    for name, value in part("layers.").items():
        path, _, leaf = name.rpartition(".")
        layers[path][leaf] = value
        layers[path].freeze(keys=[leaf], recurse=False)
    step.masters.put(part("masters."))
    # Everything is changed in place, because the compiled functions captured these containers.
    step.optimizer.state.update(_filled(step.optimizer.state, part("optimizer.")))
    # The random state cannot be assigned an array, but a seed is the key's two halves.
    high, low = arrays["random"].tolist()
    mx.random.seed(high << 32 | low)
    if step.events is not None:
        step.events.state.update(_filled(step.events.state, part("events.")))
        step.events.restore(part("extras."))
    step.taken = int(step.optimizer.state["step"].item())
    step.masters.hand_out()
    mx.eval(step.model.parameters(), step.masters.arrays, step.optimizer.state)


def _check_arrays(own: dict[str, mx.array], stored: dict[str, mx.array], layers: Mapping[str, nn.Module]) -> None:
    """Refuse arrays that differ from the run's, except those that a method adds during the run."""
    added = [name for name in stored if name not in own]
    strange = [name for name in added if not name.startswith("extras.") and not _is_frozen(name, layers)]
    wrong = [
        name
        for name, value in own.items()
        if not _is_frozen(name, layers)
        and (name not in stored or (stored[name].shape, stored[name].dtype) != (value.shape, value.dtype))
    ]
    if wrong or strange:
        raise InputError(
            f"--resume: the checkpoint's state does not match this run: {', '.join((wrong + strange)[:3])}; "
            "use an older checkpoint, or start a new run"
        )


def _is_frozen(name: str, layers: Mapping[str, nn.Module]) -> bool:
    path, _, leaf = name.removeprefix("layers.").rpartition(".")
    return name.startswith("layers.") and path in layers and leaf in FROZEN


def _filled(tree: dict, arrays: dict[str, mx.array]) -> dict:
    """Return a tree with this one's structure and other arrays; names contain dots, so they do not give the structure."""
    return tree_map_with_path(lambda path, _: arrays[path], tree)
