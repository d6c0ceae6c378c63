"""Put an adapter on a model as a run's settings say, unfreeze what is trained in full, and freeze everything else."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import (
    EMBEDDING,
    LINEAR,
    QUANTIZED,
    SWITCH,
    AdapterLayer,
    dense_weight,
    is_exactly,
    with_weight,
)
from mlx_lora.adapters.lora import (
    DoRAEmbedding,
    DoRALinear,
    DoRASwitchLinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
    QALoRAEmbedding,
    QALoRALinear,
    QALoRASwitchLinear,
)
from mlx_lora.config.presets import PRESETS, Method
from mlx_lora.config.settings import AdapterSettings, parse_pattern
from mlx_lora.models.folder import of_tower
from mlx_lora.utils.errors import InputError

# Choose the layers that a run adapts or trains in full, by name, pattern and depth, and the class, rank and alpha of each.
#
# A variant of LoRA is a class for each kind of base (adapters/lora.py, or a file of its own), and rows of `_CLASSES`.

_CLASSES = (
    LoRALinear,
    LoRAEmbedding,
    LoRASwitchLinear,
    DoRALinear,
    DoRAEmbedding,
    DoRASwitchLinear,
    QALoRALinear,
    QALoRAEmbedding,
    QALoRASwitchLinear,
)
REGISTRY: dict[tuple[str, tuple[type, ...]], type[AdapterLayer]] = {(one.LAYER_TYPE, one.OVER): one for one in _CLASSES}
LAYER_TYPES = tuple(dict.fromkeys(name for name, _ in REGISTRY))


def adapter_class(base: nn.Module, layer_type: str = "lora") -> type[AdapterLayer] | None:
    """Return the class that wraps `base` in a layer of this type, or None if there is none."""
    kind = next((kind for kind in (LINEAR, EMBEDDING, SWITCH) if is_exactly(base, kind)), None)
    return None if kind is None else REGISTRY.get((layer_type, kind))


ALL_LINEAR, ALL_EXPERTS = "all-linear", "all-experts"
# The names, in mlx-lm's mixtures, of the layers that choose a token's experts.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
NO_GRADIENT = "it picks positions by top-k, which has no gradient"
READ_PAST = "mlx-lm reads its weight directly, without the adapter"
# Parts of mlx-lm's models that cannot be trained (NO_GRADIENT), or not with an adapter.
OUT_OF_REACH = {
    "indexer": NO_GRADIENT,  # DeepSeek V3.2, GLM-5
    **dict.fromkeys(("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm"), NO_GRADIENT),  # MiniMax M3
    "altup": READ_PAST,
    "self_attention_res_proj": READ_PAST,
    "mlp_res_proj": READ_PAST,
    "output_attn_res_proj": READ_PAST,
}


@dataclass(frozen=True)
class Targets:
    """The layers to adapt.

    Attributes:
        paths: full module paths, in the model's own order.
        keys: the same set in the format of mlx-lm's `lora_parameters.keys`.
        num_layers: the number of last blocks that `keys` applies to.
    """

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    num_layers: int


def is_adaptable(module: nn.Module) -> bool:
    """Return whether a low-rank layer can wrap this module."""
    return adapter_class(module) is not None


def has_weights(module: nn.Module) -> bool:
    """Return whether a module itself has arrays, so that it can be trained in full."""
    return any(isinstance(value, mx.array) for name, value in module.items() if not name.startswith("_"))


def block_paths(model: nn.Module) -> list[str]:
    """Return the paths of the model's blocks (`model.layers.0` ...), in order."""
    by_identity = {id(module): path for path, module in model.named_modules()}
    return [by_identity[id(block)] for block in model.layers]


def select_targets(
    model: nn.Module,
    target_modules: str = ALL_LINEAR,
    num_layers: int = -1,
    fits: Callable[[nn.Module], bool] = is_adaptable,
    flag: str = "--target-modules",
    stored: bool = False,
) -> Targets:
    """Choose layers.

    In a mixture of experts `all-linear` includes the experts and the shared ones, as in mlx-lm: they are most of what
    a token passes through, and "LoRA Without Regret" (2025) finds adapters on attention alone worse. It excludes the
    routers, as PEFT does and mlx-lm does not: a changed router sends tokens to experts not trained for them, and there
    is no load balancing here. Name a router (`mlp.gate`) to adapt it. Each of the many experts has its own factors, so
    for a small adapter use `self_attn.*`.

    Args:
        model: an mlx-lm model.
        target_modules: `all-linear` (every linear layer of the blocks except routers; heads and embeddings only by
            name), `all-experts`, or names and shell patterns separated by commas: `q_proj`, `self_attn.*`, `*.layers.3.mlp.*`,
            `embed_tokens`. A name matches a whole path or the end of one after a dot, as in PEFT.
        num_layers: only the last N blocks; 0 or less for all, as in mlx-lm. Layers outside blocks are not filtered.
        fits: returns whether a module can be chosen: `is_adaptable`, or `has_weights` for training in full.
        flag: the flag that gave `target_modules`, for errors.
        stored: whether they come from a stored adapter, which may have layers that we would not train; then
            `all-linear` includes routers, which is what mlx-lm means if an adapter names no keys.

    Raises:
        InputError: a part matches nothing that can be trained; the message has the reason and the names that exist.
    """
    blocks = block_paths(model)
    if num_layers > len(blocks):
        raise InputError(
            f"--num-layers {num_layers}: the model has {len(blocks)} blocks; give at most that many, or -1 for all"
        )
    chosen_blocks = blocks if num_layers <= 0 else blocks[len(blocks) - num_layers :]
    fitting = {path: module for path, module in model.named_modules() if fits(module)}
    in_block = {path: next((b for b in blocks if path.startswith(b + ".")), None) for path in fitting}
    allowed = [p for p in fitting if in_block[p] is None or in_block[p] in chosen_blocks]
    if not stored:
        beyond = {part for part, why in OUT_OF_REACH.items() if fits is is_adaptable or why is NO_GRADIENT}
        allowed = [p for p in allowed if beyond.isdisjoint(p.split("."))]
    picked: set[str] = set()
    problems = []
    for wish in (part.strip() for part in target_modules.split(",")):
        if wish == ALL_LINEAR:
            found = [p for p in allowed if in_block[p] and isinstance(fitting[p], (*LINEAR, *SWITCH))]
            found = [p for p in found if stored or ROUTERS.isdisjoint(p.split("."))]
        elif wish == ALL_EXPERTS:
            found = [p for p in allowed if in_block[p] and isinstance(fitting[p], SWITCH)]
        else:
            found = [p for p in allowed if matches(p, wish)]
        picked.update(found)
        if not found:
            problems.append(_unmatched(flag, wish, list(fitting), num_layers))
    if problems:
        raise InputError("; ".join(problems))
    order = [path for path, _ in model.named_modules() if path in picked]
    paths = tuple(sorted(order, key=_natural))
    return Targets(paths, _mlx_lm_keys(paths, chosen_blocks), len(chosen_blocks))


def targets_of(model: nn.Module, paths: Iterable[str]) -> Targets:
    """Return the targets that have exactly these paths, in an mlx-lm model."""
    wanted, blocks = set(paths), block_paths(model)
    ordered = tuple(sorted((path for path, _ in model.named_modules() if path in wanted), key=_natural))
    first = next((i for i, block in enumerate(blocks) if any(p.startswith(f"{block}.") for p in ordered)), 0)
    return Targets(ordered, _mlx_lm_keys(ordered, blocks[first:]), len(blocks) - first)


def matches(path: str, wish: str) -> bool:
    """Return whether a name or pattern matches this module path; in a vision tower, only one that begins as the path does."""
    if of_tower(path):  # so that `q_proj` means the language model's, whether the tower is there or not
        return of_tower(wish) and (path == wish or fnmatchcase(path, wish))
    return path == wish or path.endswith("." + wish) or fnmatchcase(path, wish) or fnmatchcase(path, "*." + wish)


def layer_shapes(
    paths: tuple[str, ...],
    method: Method,
    rank: int,
    alpha: float,
    ranks: Mapping[str, float],
    alphas: Mapping[str, float],
) -> dict[str, tuple[int, float]]:
    """Return each layer's (rank, scale).

    Args:
        paths: the adapted layers.
        method: decides how the scale follows from alpha and rank.
        rank, alpha: for layers that no pattern matches.
        ranks, alphas: name or pattern -> a layer's own value; the first match counts, as in PEFT.

    Raises:
        InputError: a pattern matches no adapted layer.
    """
    for flag, patterns in (("--rank-pattern", ranks), ("--alpha-pattern", alphas)):
        idle = [pattern for pattern in patterns if not any(matches(path, pattern) for path in paths)]
        if idle:
            raise InputError(
                f"{flag} {', '.join(idle)}: matches no adapted layer; fix the pattern, or add the layer to --target-modules"
            )
    shapes = {}
    for path in paths:
        own_rank = int(next((value for pattern, value in ranks.items() if matches(path, pattern)), rank))
        own_alpha = next((value for pattern, value in alphas.items() if matches(path, pattern)), alpha)
        shapes[path] = own_rank, method.scale_of(own_alpha, own_rank)
    return shapes


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _unmatched(flag: str, wish: str, fitting: list[str], num_layers: int) -> str:
    meant = [path for path in fitting if matches(path, wish)]
    for part, why in OUT_OF_REACH.items():
        if meant and all(part in path.split(".") for path in meant):
            return f"{flag} {wish!r}: {part} would learn nothing, because {why}; leave it out"
    if meant:
        return f"{flag} {wish!r}: matches layers only outside the last {num_layers} blocks; raise --num-layers"
    names = sorted({path.rsplit(".", 1)[-1] for path in fitting})
    if wish == ALL_LINEAR:
        found = f"name one of {', '.join(names)}" if names else "choose another model"
        return f"{flag} {wish}: the model's blocks have no linear layer that can be adapted; {found}"
    close = difflib.get_close_matches(wish, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{flag} {wish!r}: matches no layer; {hint}the layers are {', '.join(names)}; all-linear chooses all linear ones"


def _mlx_lm_keys(paths: tuple[str, ...], chosen_blocks: list[str]) -> tuple[str, ...]:
    """Return block-relative names if every chosen block has the same targets, else full paths."""
    relative = {
        block: tuple(p[len(block) + 1 :] for p in paths if p.startswith(block + ".")) for block in chosen_blocks
    }
    outside = [p for p in paths if not any(p.startswith(block + ".") for block in chosen_blocks)]
    if len(set(relative.values())) == 1:
        return (*next(iter(relative.values())), *outside)
    return paths


# Compute the initial factors, a pure function of seed, layer path, shape and, for PiSSA, the base's weight.
#
# `a` is (in, r) and `b` (r, out), where an embedding's in is its vocabulary. For experts they are mlx-lm's (E, r, in) and
# (E, out, r), drawn separately for each expert.

# PiSSA's singular vectors are exact up to this narrower side. Above it an eigendecomposition would take seconds per
# layer, so the subspace iteration below is used, which takes only products.
EXACT_UP_TO = 1024
OVERSAMPLING, ROUNDS = 16, 16


def kaiming_factors(
    path: str, in_width: int, out_width: int, rank: int, seed: int, experts: int | None = None
) -> tuple[mx.array, mx.array]:
    """Return `lora_a` uniform in +-1/sqrt(in) and `lora_b` zero, so that a new adapter changes nothing.

    PEFT's `kaiming_uniform_(a=sqrt(5))` and mlx-lm draw from this same distribution.

    Args:
        path: the layer's path in the model, such as `model.layers.0.self_attn.q_proj`.
        in_width, out_width: the base's widths (an embedding's input width is its vocabulary).
        rank: r.
        seed: the run's seed.
        experts: E, for a layer of experts, each with its own draw.

    Returns:
        (in, r) and (r, out), float32; with experts (E, r, in) and (E, out, r), as in mlx-lm.

    Source: LoRA, arXiv 2106.09685, section 4.1; He et al., arXiv 1502.01852.
    """
    bound = 1 / math.sqrt(in_width)
    if experts is not None:
        shape = (experts, rank, in_width)
        return mx.random.uniform(-bound, bound, shape, key=path_key(path, seed)), mx.zeros((experts, out_width, rank))
    lora_a = mx.random.uniform(-bound, bound, (in_width, rank), key=path_key(path, seed))
    return lora_a, mx.zeros((rank, out_width))


def principal_factors(matrix: mx.array, rank: int, scale: float, key: mx.array) -> tuple[mx.array, mx.array]:
    """Return factors whose product is the best approximation of `matrix` with this rank:

        scale a b = U_r S_r V_r^T,   a = U_r sqrt(S_r / scale),   b = sqrt(S_r / scale) V_r^T

    Args:
        matrix: (in, out), float.
        rank: at most the narrower side.
        scale: the factor that the product will be multiplied by.
        key: random key of the subspace iteration, used if the narrower side is above EXACT_UP_TO.

    Returns:
        (in, r) and (r, out), float32.

    Source: PiSSA, arXiv 2404.02948, eq. 2 to 4; Halko et al., arXiv 0909.4061, algorithm 4.4.
    """
    matrix = matrix.astype(mx.float32)
    if matrix.shape[0] < matrix.shape[1]:
        b, a = principal_factors(matrix.T, rank, scale, key)
        return a.T, b.T
    narrow = matrix.shape[1]
    directions = _exact_directions(matrix, rank) if narrow <= EXACT_UP_TO else _iterated(matrix, rank, key)
    images = matrix @ directions  # (in, r) = U_r S_r
    sizes = mx.maximum(mx.linalg.norm(images, axis=0), 1e-20)  # S_r
    root = mx.sqrt(sizes / scale)
    return images / sizes * root, root[:, None] * directions.T


def _exact_directions(matrix: mx.array, rank: int) -> mx.array:
    """Return the leading right singular vectors, (narrow, r), from the Gram matrix in float64 on the host.

    Squaring halves the digits: of float64's sixteen, eight remain, more than float32 has.
    """
    tall = np.array(matrix)
    gram = np.zeros((tall.shape[1], tall.shape[1]))
    for start in range(0, len(tall), 8192):  # a whole embedding in float64 would take gigabytes
        part = tall[start : start + 8192].astype(np.float64)
        gram += part.T @ part
    _, vectors = np.linalg.eigh(gram)  # ascending
    return mx.array(np.ascontiguousarray(vectors[:, ::-1][:, :rank]), dtype=mx.float32)


def _iterated(matrix: mx.array, rank: int, key: mx.array) -> mx.array:
    """Return the leading right singular vectors, (narrow, r), by subspace iteration on the device.

    They are exact if singular values decrease fast; in a flat spectrum they are mixed with those just below rank r.
    """
    width = min(matrix.shape[1], rank + OVERSAMPLING)
    space = mx.random.normal((matrix.shape[1], width), key=key)
    for _ in range(ROUNDS):
        space, _ = mx.linalg.qr(matrix.T @ (matrix @ space), stream=mx.cpu)
        mx.eval(space)
    images = matrix @ space
    _, vectors = mx.linalg.eigh(images.T @ images, stream=mx.cpu)
    return space @ vectors[:, ::-1][:, :rank]


def path_key(path: str, seed: int) -> mx.array:
    """Return the random key of one layer, which does not depend on the other adapted layers."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


# Put an adapter on a model as a run's settings say, unfreeze what is trained in full, and freeze everything else

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
    refusals: dict[str, list[str]] = {}  # of bases that this type cannot wrap although it wraps others of their kind
    for path in shapes:
        made = adapter_class(modules[path], layer_type)
        if made is not None and (reason := made.refusal(modules[path])):
            refusals.setdefault(reason, []).append(path)
    if refusals:
        reason, refused = max(refusals.items(), key=lambda item: len(item[1]))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise InputError(f"--method {layer_type}: {refused[0]}{more} {reason}")
    wrapped = []
    for path, shape in shapes.items():
        layer = _adapted(modules[path], path, shape, dropout, seed, layer_type, init)
        layer.freeze()
        layer.unfreeze(keys=layer.trained, recurse=False)
        wrapped.append((path, layer))
    model.update_modules(tree_unflatten(wrapped))


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
        # Gains start at zero; factors as in AdaLoRA's code and PEFT (arXiv 2303.10512, section 3.1).
        keys, (inputs, outputs) = mx.random.split(path_key(path, seed)), dims
        sizes = (
            [(inputs, rank), (rank, outputs)]
            if experts is None
            else [(experts, rank, inputs), (experts, outputs, rank)]
        )
        a, b = (0.02 * mx.random.normal(size, key=key) for size, key in zip(sizes, keys, strict=True))
        layer = wrap(base, (a, b), scale, dropout)
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
