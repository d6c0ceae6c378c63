"""Put an adapter on a model as a run's settings say, unfreeze what is trained in full, and freeze everything else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import EMBEDDING, QUANTIZED, SWITCH, AdapterLayer, dense_weight, with_weight
from mlx_lora.adapters.initialize import kaiming_factors, normal_factors, path_key, principal_factors
from mlx_lora.adapters.targets import Targets, adapter_class, has_weights, layer_shapes, select_targets
from mlx_lora.config.presets import PRESETS, Method
from mlx_lora.config.settings import AdapterSettings, parse_pattern
from mlx_lora.utils.errors import InputError

# From a run's settings


@dataclass(frozen=True)
class Adapted:
    """The adapter that was put on a model.

    Attributes:
        method: the preset.
        targets: adapted layers; for `full`, the trained modules.
        rank, scale: of layers without a pattern; for AdaLoRA, the initial rank.
        full: names of parameters trained in addition to the factors.
    """

    method: Method
    targets: Targets
    rank: int
    scale: float
    full: tuple[str, ...]


def adapt_model(model: nn.Module, settings: AdapterSettings, seed: int) -> Adapted:
    """Freeze `model`, adapt it as the settings say, and unfreeze the parameters that are trained in full.

    Args:
        model: an unadapted mlx-lm model; changed in place.
        settings: already checked.
        seed: of the initial factors.

    Raises:
        InputError: the settings name layers, modules or biases that the model does not have, or contradict each other.
    """
    method = PRESETS[settings.method]
    model.freeze()
    rank = starting_rank(settings)
    scale = method.scale_of(settings.alpha, rank)
    if method.layer_type == "full":
        targets = select_targets(model, settings.target_modules, settings.num_layers, has_weights)
        train_in_full(model, targets.paths)
        return Adapted(method, targets, rank, scale, tuple(full_parameters(model)))
    targets = select_targets(model, settings.target_modules, settings.num_layers)
    whole: tuple[str, ...] = ()
    if settings.modules_to_save:
        whole = select_targets(model, settings.modules_to_save, -1, has_weights, "--modules-to-save").paths
        both = [path for path in whole if path in targets.paths]
        if both:
            raise InputError(
                f"--modules-to-save {', '.join(both)}: also in --target-modules; train it in full or adapt it, not both"
            )
    shapes = layer_shapes(
        targets.paths,
        method,
        rank,
        settings.alpha,
        parse_pattern(settings.rank_pattern),
        parse_pattern(settings.alpha_pattern),
    )
    adapt_layers(model, shapes, method.layer_type, method.init, settings.dropout, seed)
    train_in_full(model, whole)
    train_biases(model, settings.bias)
    return Adapted(method, targets, rank, scale, tuple(full_parameters(model)))


def starting_rank(settings: AdapterSettings) -> int:
    """Return the layers' initial rank, which for AdaLoRA is 1.5 times its target (arXiv 2303.10512, 4.1)."""
    if settings.method != "adalora":
        return settings.rank
    return settings.adalora_init_rank or -(-3 * settings.rank // 2)


# Changes of a model


def inject(
    model: nn.Module,
    paths: Iterable[str],
    rank: int,
    scale: float,
    seed: int = 0,
    layer_type: str = "lora",
    init: str = "kaiming",
) -> None:
    """Freeze `model` and wrap the layers at `paths`, all with one rank and scale and without dropout."""
    adapt_layers(model, dict.fromkeys(paths, (rank, scale)), layer_type, init, seed=seed)


def adapt_layers(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, float]],
    layer_type: str = "lora",
    init: str = "kaiming",
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Freeze `model` and wrap layers; the factors become its only trainable parameters.

    Args:
        model: changed in place. A new adapter does not change its outputs, with any init.
        shapes: full path from `select_targets` -> rank, and factor on the low-rank product. A rank above a layer's narrower
            side is allowed but wasteful, as in PEFT.
        dropout: on the adapter's input.
        seed: of the initial factors.
        layer_type: a layer type of the registry, such as `lora`.
        init: `kaiming`, `pissa` or `svd` (config/presets.py); the last two with the layer type `lora` only.

    Raises:
        InputError: the layer type does not support a layer, or a layer has fewer principal directions than the rank.
    """
    model.freeze()
    modules = dict(model.named_modules())
    unfit = [path for path in shapes if adapter_class(modules[path], layer_type) is None]
    if unfit:
        raise InputError(f"--method {layer_type}: cannot adapt {', '.join(unfit)}; leave it out of --target-modules")
    _refuse_bases(modules, shapes, layer_type)
    wrapped = []
    for path, shape in shapes.items():
        layer = _adapted(modules[path], path, shape, dropout, seed, layer_type, init)
        layer.freeze()
        layer.unfreeze(keys=layer.trained, recurse=False)
        wrapped.append((path, layer))
    model.update_modules(tree_unflatten(wrapped))


def _refuse_bases(modules: Mapping[str, nn.Module], paths: Iterable[str], layer_type: str) -> None:
    """Refuse bases that a type of layer cannot wrap although it wraps others of their kind."""
    refusals: dict[str, list[str]] = {}
    for path in paths:
        made = adapter_class(modules[path], layer_type)
        if made is not None and (reason := made.refusal(modules[path])):
            refusals.setdefault(reason, []).append(path)
    if refusals:
        reason, refused = max(refusals.items(), key=lambda item: len(item[1]))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise InputError(f"--method {layer_type}: {refused[0]}{more} {reason}")


def _adapted(
    base: nn.Module, path: str, shape: tuple[int, float], dropout: float, seed: int, layer_type: str, init: str
) -> AdapterLayer:
    """Return one layer, wrapped."""
    made = adapter_class(base, layer_type)
    if made is None:
        raise ValueError(f"{path}: adapt_layers has not refused it")
    (rank, scale), dims, experts, wrap = shape, made.factor_dims(base), _experts(base), made.from_base
    if init == "kaiming":
        a, b = kaiming_factors(path, *dims, rank, seed, experts)
        gain = made.initial_gain(base)
        return wrap(base, (a if gain == 1 else a * gain, b), scale, dropout)
    if init == "svd":
        layer = wrap(base, normal_factors(path, *dims, rank, seed, experts), scale, dropout)
        layer.lora_e = mx.zeros((rank,) if experts is None else (experts, rank))
        return layer
    if rank > min(dims):
        raise InputError(
            f"--rank {rank} with --method pissa: {path} has {min(dims)} principal directions; lower --rank, or use --method lora"
        )
    weight, key = dense_weight(base), path_key(path, seed)
    if experts is None:
        matrix = weight if isinstance(base, EMBEDDING) else weight.T  # (in, out)
        a, b = principal_factors(matrix, rank, scale, key)
    else:
        pairs = [principal_factors(expert, rank, scale, key) for expert in weight]  # (out, r), (r, in)
        a, b = mx.stack([pair[1] for pair in pairs]), mx.stack([pair[0] for pair in pairs])
    layer = wrap(base, (a, b), scale, dropout)
    layer.start_a, layer.start_b = a, b
    mx.eval(layer.trainable_parameters())  # so that only one weight at a time is dense
    return layer


def _experts(base: nn.Module) -> int | None:
    return base.num_experts if isinstance(base, SWITCH) else None


def fresh_factors(path: str, layer: AdapterLayer, seed: int) -> tuple[mx.array, mx.array]:
    """Return new initial factors for an adapted layer, with its rank and orientation.

    Args:
        path: decides the random draw together with the seed; ReLoRA appends the number of the cycle.
        layer: an adapter layer.
        seed: of the run.
    """
    a, b = kaiming_factors(path, *layer.factor_dims(layer.base), layer.rank, seed, _experts(layer.base))
    gain = layer.initial_gain(layer.base)
    return (a if gain == 1 else a * gain), b


def train_in_full(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Make all weights of these modules trainable; quantized ones become dense, because packed numbers have no gradient.

    Args:
        model: frozen except its adapters; changed in place.
        paths: modules that have weights.
    """
    modules = dict(model.named_modules())
    dense = [
        (path, with_weight(modules[path], dense_weight(modules[path])))
        for path in paths
        if isinstance(modules[path], QUANTIZED)
    ]
    model.update_modules(tree_unflatten(dense))
    modules.update(dense)
    for path in paths:
        modules[path].unfreeze(recurse=False)


def train_biases(model: nn.Module, which: str) -> None:
    """Make biases trainable.

    Args:
        model: adapted; changed in place.
        which: `none`, `lora_only` (those of adapted layers) or `all`, as in PEFT.

    Raises:
        InputError: there is no such bias.
    """
    if which == "none":
        return
    holders = [layer.base for layer in adapter_layers(model).values()]
    if which == "all":
        holders = model.modules()
    biased = [holder for holder in holders if isinstance(holder.get("bias"), mx.array)]
    if not biased:
        raise InputError(f"--bias {which}: the model has no such bias; leave --bias out")
    for holder in biased:
        holder.unfreeze(keys=["bias"], recurse=False)


def remove_adapters(model: nn.Module) -> None:
    """Put the frozen layers back in place of the adapter layers around them."""
    model.update_modules(tree_unflatten([(path, layer.base) for path, layer in adapter_layers(model).items()]))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Take the adapters off inside the block."""
    layers = adapter_layers(model)
    remove_adapters(model)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten([*layers.items()]))


# What a model has


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers of `model` by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return all trained parameters by their stored names (`model.layers.0.self_attn.q_proj.lora_a`)."""
    return dict(tree_flatten(model.trainable_parameters()))


def full_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the parameters trained in addition to the factors: weights of modules trained in full, and biases."""
    factors = {f"{path}.{name}" for path, layer in adapter_layers(model).items() for name in layer.trained}
    return {name: value for name, value in adapter_parameters(model).items() if name not in factors}
