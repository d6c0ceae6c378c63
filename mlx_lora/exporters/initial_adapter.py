"""Start a run from the factors of another adapter (--resume-adapter-file)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.config.objectives import POOLINGS
from mlx_lora.exporters.adapter_config import check_use, head_of
from mlx_lora.exporters.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_base,
    load_factors,
    read_adapter_config,
    run_of,
)
from mlx_lora.exporters.peft import PEFT_WEIGHTS, PeftAdapter, is_peft, read_peft
from mlx_lora.models.head import SCORE
from mlx_lora.models.load import Base
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings

FLAG = "--resume-adapter-file"


@dataclass(frozen=True)
class Start:
    """The factors to start from.

    Attributes:
        file: Their file.
        peft: What was read of a PEFT adapter; None: the file is in our layout.
        scale: The factor on the stored products; None: that of the run.
        qat: Whether they are right with the rounding of their fused form only.
        head: What the outputs of their score head mean; None: not known, or there is none.
    """

    file: Path
    peft: PeftAdapter | None
    scale: float | None
    qat: bool = False
    head: dict[str, Any] | None = None

    def order_of(self, head: dict[str, Any] | None) -> mx.array | None:
        """Return the numbers of its outputs in the order of a run's, (K,) int; None: in the same order, as far as is known.

        Args:
            head: What the run's outputs mean, as `Objective.head` has it.

        Raises:
            InputError: The run has other labels, or another kind of them.
        """
        if self.head is None or head is None:
            return None
        theirs, ours = (list(one.get("labels") or []) for one in (self.head, head))
        compared = {
            "--problem-type": (self.head.get("problem_type"), head.get("problem_type")),
            "--labels": (",".join(sorted(theirs)), ",".join(sorted(ours))),
        }
        for flag, (before, now) in compared.items():
            if before != now:
                raise InputError(
                    f"{FLAG} {self.file}: was trained with {flag} {before}, this run has {now}; give {flag} {before} and data "
                    "that fit, or train a new adapter"
                )
        return None if theirs == ours else mx.array([theirs.index(label) for label in ours])


def resume_file(given: str) -> Path:
    """Return the file of factors that --resume-adapter-file names, itself or by its folder.

    Raises:
        InputError: the folder has none.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return path
    found = next((path / name for name in (WEIGHTS_FILE, PEFT_WEIGHTS) if (path / name).is_file()), None)
    if found is None:
        raise InputError(f"{FLAG} {given}: the folder has no {WEIGHTS_FILE} and no {PEFT_WEIGHTS}; give an adapter's")
    return found


def start_folder(given: str) -> Path:
    """Return the folder of the adapter that a run began with, to be measured against.

    Args:
        given: As the run had --resume-adapter-file; a folder or a file on this disk.

    Raises:
        InputError: It is gone, has no config, or is one of several files in its folder.
    """
    path = Path(given).expanduser()
    folder = path if path.is_dir() else path.parent
    named = (WEIGHTS_FILE, PEFT_WEIGHTS) if path == folder else (path.name,)
    if not (folder / CONFIG_FILE).is_file() or not any((folder / name).is_file() for name in named):
        raise InputError(
            f"{FLAG} {given}: the adapter that the run began with, which is its reference, is not there; give its folder "
            "as --reference-adapter"
        )
    if path != folder and path.name not in (WEIGHTS_FILE, PEFT_WEIGHTS):
        raise InputError(
            f"{FLAG} {given}: the run began with this file, and only a whole folder can be measured against; copy it with "
            f"{CONFIG_FILE} to a folder as {WEIGHTS_FILE}, and give that as --reference-adapter"
        )
    return folder


def vectors_of_start(settings: TrainSettings) -> dict[str, str]:
    """Return pooling and prompts of the run that made the adapter to start from, where they are known, and open in the settings."""
    given, names = settings.adapter.resume_adapter_file, ("pooling", "query_prompt", "document_prompt")
    if given is None:
        return {}
    path = Path(given).expanduser()
    run = run_of(path if path.is_dir() else path.parent)
    if run.get("objective") != "embed" or run.get("pooling") not in (None, *POOLINGS):
        return {}
    return {
        name: run[name]
        for name in names
        if getattr(settings.objective, name) is None and isinstance(run.get(name), str)
    }


def read_start(base: Base, given: str, scores: bool) -> Start:
    """Read what --resume-adapter-file names, before the base is adapted.

    Args:
        base: Not adapted yet.
        given: A file or a folder.
        scores: Whether the run trains a reward model; then another adapter may become one.

    Raises:
        InputError: it is for another base, or cannot be read.
    """
    file = resume_file(given)
    if not (file.parent / CONFIG_FILE).exists():
        return Start(file, None, None)
    config = read_adapter_config(file.parent)
    check_use(config, file, None if scores else False)
    if is_peft(config):
        return Start(file, read_peft(file.parent, config, base.model), None)
    check_base(base, config, file)
    qat = (config.get("mlx_lora") or {}).get("qat") is True
    return Start(file, None, config.get("lora_parameters", {}).get("scale"), qat, head_of(config, file.parent))


def put_start(model: nn.Module, start: Start, fresh: tuple[str, ...], head: dict[str, Any] | None = None) -> None:
    """Load the factors into the adapter layers of a model.

    Args:
        model: Adapted.
        start: From `read_start`.
        fresh: Names of parameters that stay as they are where the file does not have them.
        head: What the outputs of the run's score head mean; those of the start are put in their order.

    Raises:
        InputError: layers, shapes or labels differ.
    """
    order = start.order_of(head)
    if start.peft is None:
        load_factors(model, start.file, start.scale, fresh=fresh)
    else:
        _put_peft(model, start.file, start.peft, fresh)
    if order is not None:
        score = model[SCORE]
        score.update({name: value[order] for name, value in score.parameters().items()})
        mx.eval(score.parameters())


def _put_peft(model: nn.Module, file: Path, adapter: PeftAdapter, fresh: tuple[str, ...]) -> None:
    """Load the factors of a PEFT adapter; see `put_start`."""
    layers = adapter_layers(model)
    problems = [f"{path} is missing" for path in layers if path not in adapter.factors]
    problems += [f"{path} is not adapted in this run" for path in adapter.factors if path not in layers]
    problems += [f"{path}.{leaf} was trained in full" for path, leaf in adapter.full if f"{path}.{leaf}" not in fresh]
    if adapter.leaves_head is not None:
        problems.append(f"{adapter.leaves_head} is adapted without the head, which is the same matrix here")
    for path, layer in layers.items():
        rank, _ = adapter.shapes.get(path, (layer.rank, 1.0))
        problems += [f"{path} has rank {rank}, the run {layer.rank}"] if rank != layer.rank else []
        if path in adapter.factors and ("m" in layer) != (path in adapter.magnitudes):
            problems.append(f"{path} is {'not ' if 'm' in layer else ''}a DoRA layer, unlike in this run")
    factors = {}
    for path, layer in layers.items() if not problems else ():
        try:
            pairs = zip(("lora_a", "lora_b"), adapter.factors[path], strict=True)
            factors[path] = [layer.from_stored(name, array) for name, array in pairs]
        except ValueError as error:
            problems.append(f"{path}.{error}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{file}: does not fit this run: {shown}; give its --rank, --target-modules and --method")
    for path, layer in layers.items():
        a, b = factors[path]
        layer.lora_a, layer.lora_b = a, b * (adapter.shapes[path][1] / layer.scale)
        if path in adapter.magnitudes:
            layer.m = adapter.magnitudes[path]
    mx.eval(model.trainable_parameters())
