"""Write the adapter folder atomically in mlx-lm's layout, and read it with errors that name every mismatch.

adapters.safetensors   plain factors, float32, `model.layers.0.self_attn.q_proj.lora_a` ..., for every method:
                       PiSSA's have rank 2r, ReLoRA's n r, AdaLoRA's differ by layer. All layers have the same
                       scale; if a pattern gives a layer another alpha, the difference is multiplied into B.
                       Parameters trained in full have their own names.
adapter_config.json    mlx-lm's keys (fine_tune_type, num_layers, lora_parameters), ours under "mlx_lora"

An adapter that is already in its base's weights is refused, whichever program fused it, and even if the result was quantized
since. A base's fingerprint does not tell, because it depends on norms and biases (models/folder.py), which fusing does not
change, and a folder that another program fused has no mark. But the update D is known. The adapter stores its base's share
along D:

    share(W) = <W, D> / <D, D>          share(W + D) = share(W) + 1

Rounding and quantizing W add noise that is independent of D: its standard deviation is s / |D| for a noise of s per
number, a few thousandths over the rows sampled here. An update too small to tell from that noise is not judged.

Shapes: n rows of a layer, r rank.

A run can start from the factors of another adapter (--resume-adapter-file).

An adapter of a vision-language model can be written for stock mlx-vlm: in mlx-lm's form, with two differences: `keys` are the layers' whole paths, and a few models have other names there.

    here, and in mlx-lm                                mlx-vlm
    language_model.model.layers.0.self_attn.q_proj     language_model.layers.0.self_attn.q_proj       SmolVLM, Idefics 3
                                                       the same path                                  all others
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import __version__
from mlx_lora.adapters.base import LINEAR, QUANTIZED, AdapterLayer, is_parameter
from mlx_lora.adapters.inject import (
    LAYER_TYPES,
    adapt_layers,
    adapter_layers,
    adapter_parameters,
    select_targets,
    train_in_full,
)
from mlx_lora.adapters.qat import RIGHT_FUSED, begin_qat, rounded_to
from mlx_lora.config.objectives import POOLINGS
from mlx_lora.config.settings import DataSettings, TrainSettings
from mlx_lora.exporters.adapter_config import (
    check_use,
    head_of,
    is_reward_model,
    label_names,
    own_entries,
    own_problems,
    shape_problems,
    template_beside,
)
from mlx_lora.exporters.peft import PEFT_WEIGHTS, PREFIX, TOWERS, PeftAdapter, is_peft, read_peft
from mlx_lora.models.folder import of_tower, read_safetensors_header, save_tensors, without_mark, write_json
from mlx_lora.models.head import LAST_OF_HEAD, SCORE, SCORE_WEIGHT, check_whole_head, put_head
from mlx_lora.models.load import Base
from mlx_lora.models.quantize import QuantFormat
from mlx_lora.utils.errors import InputError, Problems, first_of
from mlx_lora.utils.files import replacing_file
from mlx_lora.utils.parsing import parse_yaml, read_json
from mlx_lora.utils.text import similar_paths

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
LIMITS = ("max_seq_length", "max_pixels")  # of what a run reads of a text or a picture


@dataclass(frozen=True)
class AdapterInfo:
    """The facts about an adapter, without its factors.

    Attributes:
        method: a key of methods.PRESETS.
        rank, alpha, scale, dropout: of the run; stored layers have their own ranks, and `scale` is the factor on
            the product of every stored pair.
        num_layers: the number of last blocks that `keys` applies to.
        keys: block-relative or full names, as mlx-lm reads them.
        base_model, base_revision, base_fingerprint: the model it was trained on.
        chat_template: the Jinja text it was trained with if that is not the model's own, else None.
        full: names of parameters trained in full, alone or in addition to factors.
        qat: whether it was trained with the rounding of its fused form, and is right in that form only.
        rounded_to: with `qat`, how its layers were quantized, in words (adapters/qat.py); None: not known, or no `qat`.
        head: what the outputs of its score head mean, as `Objective.head` has it; None: it has none, or one output.
    """

    method: str
    rank: int
    alpha: float
    scale: float
    dropout: float
    num_layers: int
    keys: tuple[str, ...]
    base_model: str
    base_revision: str | None
    base_fingerprint: str
    chat_template: str | None = None
    full: tuple[str, ...] = ()
    qat: bool = False
    rounded_to: str | None = None
    head: dict[str, Any] | None = None

    @property
    def scores(self) -> bool:
        """Whether it has a score head, and gives scores instead of text: a reward model, or a classifier."""
        return SCORE_WEIGHT in self.full


def save_adapter(
    folder: Path,
    model: nn.Module,
    info: AdapterInfo,
    same_rank: bool = False,
    overlap: dict[str, float] | None = None,
) -> None:
    """Write the trained parameters of `model` and `info` into `folder`; each file is replaced atomically.

    Args:
        folder: created if missing.
        model: adapted.
        info: the facts about the adapter.
        same_rank: pad layers with zeros to the largest rank, which stock mlx-lm requires.
        overlap: what `measure_overlap` returned, if it was measured before.
    """
    stored, layers = stored_parameters(model, info), adapter_layers(model)
    rank = max((value.shape[1] for name, value in stored.items() if name.endswith(".lora_a")), default=info.rank)
    if same_rank:
        for path, layer in layers.items():
            for leaf, axis in layer.rank_axes.items():
                value = stored[f"{path}.{leaf}"]
                widths = [(0, rank - size if i == axis else 0) for i, size in enumerate(value.shape)]
                stored[f"{path}.{leaf}"] = mx.pad(value, widths)
    measured = measure_overlap(model) if overlap is None else overlap
    config = {
        "fine_tune_type": next((layer.STORED_TYPE or layer.LAYER_TYPE for layer in layers.values()), "full"),
        # mlx-lm would load the factors without the rounding: without this key it refuses them.
        **({} if info.qat else {"num_layers": info.num_layers}),
        "lora_parameters": {"rank": rank, "scale": info.scale, "dropout": info.dropout, "keys": list(info.keys)},
        "model": info.base_model,
        **label_names(info.head),
        "mlx_lora": {"version": __version__, **asdict(info), "overlap": measured},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with replacing_file(folder / WEIGHTS_FILE) as temporary:
        save_tensors(temporary, stored)


def stored_parameters(model: nn.Module, info: AdapterInfo) -> dict[str, mx.array]:
    """Return the stored arrays of an adapted model: plain factors for `info.scale`, and parameters trained in full."""
    layers, parameters = adapter_layers(model), dict(tree_flatten(model.parameters()))
    stored = {f"{path}.{name}": p for path, layer in layers.items() for name, p in layer.stored(info.scale).items()}
    return {**stored, **{name: parameters[name] for name in info.full}}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json, mlx-lm's or PEFT's.

    Raises:
        InputError: it is missing, unreadable, or describes a kind of adapter that we cannot load.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        near = similar_paths(folder, lambda p: (p / CONFIG_FILE).is_file())
        if near:
            raise InputError(f"--adapter-path {folder}: no such folder; did you mean {near[0]}?")
        raise InputError(f"--adapter-path {folder}: no such folder; give the folder that a training run wrote")
    if not path.is_file():
        raise InputError(f"{path}: cannot be read (no such file); give the folder that a training run wrote")
    config = read_json(path, "restore it from a checkpoint")
    if is_peft(config):
        return config
    layer_type = config.get("fine_tune_type", "lora")
    if layer_type not in (*LAYER_TYPES, "full"):
        known = ", ".join(LAYER_TYPES)
        raise InputError(f"{path}: fine_tune_type {str(layer_type)[:40]!r}; this version loads {known} and full")
    problems, own = own_problems(config), own_entries(config)
    if own.get("qat") is True and "num_layers" not in config:
        config = {**config, "num_layers": own.get("num_layers")}
    if layer_type == "full":  # mlx-lm's config has nothing else that is needed
        config = {"num_layers": -1, **config, "lora_parameters": {"rank": 1, "scale": 1.0, "keys": []}}
    elif not isinstance(config.get("lora_parameters"), dict) or type(config.get("num_layers")) is not int:
        raise InputError(f"{path}: lora_parameters or num_layers is missing; give the folder of an MLX or PEFT adapter")
    problems += shape_problems(config["lora_parameters"])
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}; restore it from a checkpoint")
    return config


def trains_tower(folder: Path) -> bool:
    """Return whether an adapter, ours or PEFT's, changes the vision tower or the connector."""
    file = next((folder / name for name in (WEIGHTS_FILE, PEFT_WEIGHTS) if (folder / name).is_file()), None)
    names = () if file is None else read_safetensors_header(file)
    theirs = tuple(PREFIX + prefix for pairs in TOWERS.values() for _, prefix in pairs)
    return any(of_tower(name) or name.startswith(theirs) for name in names)


def adapter_files(folder: Path) -> list[Path]:
    """Return the files that decide what an adapter does: its config and its weights, in PEFT's names too."""
    names = (CONFIG_FILE, WEIGHTS_FILE, PEFT_WEIGHTS)
    return [folder / name for name in names if (folder / name).is_file()]


def check_base(base: Base, config: dict[str, Any], origin: Path) -> None:
    """Refuse an adapter whose config says that it was trained on another base.

    Raises:
        InputError: the bases differ; the message names both.
    """
    own = own_entries(config)
    trained_on = own.get("base_fingerprint")
    if "overlap" not in own and own.get("base_model") == base.model_id:  # from a version that ignored fused bases
        trained_on = trained_on if trained_on != without_mark(base.fingerprint) else base.fingerprint
    if trained_on and trained_on != base.fingerprint:
        if trained_on == without_mark(base.fingerprint):
            raise InputError(
                f"{origin}: trained on {own.get('base_model')}, but --model {base.model_id} is that model with an adapter "
                "fused into it; give the base, or --ignore-fingerprint to put the adapter on top"
            )
        raise InputError(
            f"{origin}: was trained on a different base, {own.get('base_model')} (fingerprint {trained_on}; --model "
            f"{base.model_id} has {base.fingerprint}); pass that one, or --ignore-fingerprint to use it anyway"
        )


def load_adapter(
    base: Base, folder: Path, ignore_fingerprint: bool = False, scores: bool | None = False
) -> AdapterInfo:
    """Put the adapter in `folder` onto `base.model`, which is changed in place.

    Args:
        base: an unadapted base, whose `adapter` is then the folder.
        folder: from us, stock mlx-lm or PEFT.
        ignore_fingerprint: allow another base of the same shape.
        scores: whether the caller needs scores, which a reward model gives instead of text; None: either.

    Raises:
        InputError: the base, names or shapes do not fit; one message has all problems.
    """
    config = read_adapter_config(folder)
    check_use(config, folder, scores)
    base.adapter = folder
    if trains_tower(folder) and isinstance(base.config.get("vision_config"), dict):
        from mlx_lora.models.vision import open_tower

        open_tower(base)
    if is_peft(config):
        if is_reward_model(config):
            put_head(base, outputs=_outputs(read_safetensors_header(folder / PEFT_WEIGHTS)))
        info = _load_peft(base, read_peft(folder, config, base.model))
        if info.scores:
            check_whole_head(base, info.full, folder)
        return replace(info, head=head_of(config, folder), chat_template=template_beside(folder, base.hf_tokenizer))
    own = own_entries(config)
    if not ignore_fingerprint:
        check_base(base, config, folder)
    shape = config["lora_parameters"]
    layer_type, scale, file = config.get("fine_tune_type", "lora"), float(shape["scale"]), folder / WEIGHTS_FILE
    header = read_safetensors_header(file)
    full = tuple(own.get("full", [])) if layer_type != "full" else tuple(header)
    if is_reward_model(config):
        put_head(base, outputs=_outputs(header))
    modules, lost = dict(base.model.named_modules()), []
    for name in full:
        # An adapted layer's base has its own name inside the layer; some layers of towers are called `linear` themselves.
        outer = re.sub(r"\.(linear|embedding)(?=\.[^.]+$)", "", name)
        places = [one.rpartition(".") for one in (name, outer)]
        lost += [] if any(is_parameter(modules.get(path), leaf) for path, _, leaf in places) else [outer]
    if lost:
        raise InputError(f"{file}: the model does not have {', '.join(lost[:5])}; give the base it was trained on")
    if layer_type != "full":
        blocks = len(base.model.layers)
        count = max(config["num_layers"], 0)  # mlx-lm: -1 and 0 both mean every block
        if count > blocks:
            raise InputError(
                f"--adapter-path {folder}: adapts {count} blocks, --model has {blocks}; give the base it was trained on"
            )
        # As in mlx-lm, keys are names inside the last blocks, or full paths.
        wish = ",".join(shape.get("keys") or ()) or "all-linear"
        targets = select_targets(base.model, wish, count or -1, flag=f"{folder / CONFIG_FILE}: key", stored=True)
        shapes = {}
        for path in targets.paths:
            sizes = header.get(f"{path}.lora_a", {}).get("shape", [])
            # What is missing or misshapen is named by load_factors.
            shapes[path] = sizes[1] if len(sizes) > 1 and sizes[1] > 0 else shape["rank"], scale
        adapt_layers(base.model, shapes, layer_type, dropout=float(shape.get("dropout") or 0.0))
    restore_full(base.model, full)
    load_factors(base.model, file)
    # Another program's config has no record of the update.
    share = None if ignore_fingerprint else share_present(base.model, own.get("overlap") or {})
    if share is not None and share > PRESENT:
        raise InputError(
            f"{folder}: --model {base.model_id} already contains this adapter ({share:.0%} of its update is in the weights); "
            f"use the model as it is, or give {own.get('base_model')}, or --ignore-fingerprint to add it once more"
        )
    if own.get("qat") is True:
        trained, here = own.get("rounded_to"), rounded_to(base.model)
        if not here or (trained not in (None, here) and not ignore_fingerprint):
            raise InputError(
                f"{folder}: {RIGHT_FUSED}, on layers of {trained or 'a quantized base'}; --model {base.model_id} has "
                f"{here or 'float layers'}; give {own.get('base_model')} quantized as in the run (with its --bits, if it had some)"
            )
        begin_qat(base.model)
    _finish(base.model)
    return AdapterInfo(
        method=own.get("method", layer_type),
        rank=shape["rank"],
        alpha=float(shape["scale"] * shape["rank"] if own.get("alpha") is None else own["alpha"]),
        scale=float(shape["scale"]),
        dropout=float(shape.get("dropout", 0.0)),
        num_layers=config["num_layers"],
        keys=tuple(shape.get("keys") or ()),
        base_model=own.get("base_model", base.model_id),
        base_revision=own.get("base_revision"),
        base_fingerprint=base.fingerprint,
        chat_template=own.get("chat_template"),
        full=full,
        qat=own.get("qat") is True,
        rounded_to=own.get("rounded_to"),
        head=head_of(config, folder),
    )


def _outputs(header: dict[str, Any]) -> int:
    """Return the number of outputs of a stored score head; 1 if there is none, which is told when it is loaded."""
    plain = {name.replace(".modules_to_save.default", ""): entry for name, entry in header.items()}
    return next((entry["shape"][0] for name, entry in plain.items() if name.endswith(LAST_OF_HEAD)), 1)


def restore_full(model: nn.Module, names: tuple[str, ...]) -> None:
    """Prepare a model for loading parameters trained in full: make their modules dense and the parameters trainable."""
    modules, places = dict(model.named_modules()), [name.rpartition(".") for name in names]
    train_in_full(model, tuple({path for path, _, leaf in places if leaf == "weight"}))
    for path, _, leaf in places:
        if leaf != "weight":
            modules[path].unfreeze(keys=[leaf], recurse=False)


def _finish(model: nn.Module) -> None:
    """Make an adapted model ready for use: freeze it."""
    for layer in adapter_layers(model).values():
        layer.finish()
    model.freeze()
    model.eval()


def _load_peft(base: Base, adapter: PeftAdapter) -> AdapterInfo:
    """Put a PEFT adapter onto `base.model`, which is changed in place."""
    paths = tuple(adapter.factors)
    rank, scale = next(iter(adapter.shapes.values()))
    layer_type = "dora" if adapter.magnitudes else "lora"
    adapt_layers(base.model, {path: adapter.shapes[path] for path in paths}, layer_type, dropout=adapter.dropout)
    layers = adapter_layers(base.model)
    for path, layer in layers.items():
        layer.lora_a, layer.lora_b = adapter.factors[path]
        if adapter.magnitudes:
            layer.m = adapter.magnitudes[path]
    if adapter.leaves_head is not None:
        layers[adapter.leaves_head].adapts_head = False
    full = {}
    for (path, leaf), value in adapter.full.items():
        inside = f".{layers[path].holds}" if path in layers else ""
        full[f"{path}{inside}.{leaf}"] = value
    restore_full(base.model, tuple(full))
    own = adapter_parameters(base.model)
    base.model.load_weights([(name, value.astype(own[name].dtype)) for name, value in full.items()], strict=False)
    mx.eval(base.model.trainable_parameters())
    _finish(base.model)
    return AdapterInfo(
        method=layer_type,
        rank=rank,
        alpha=scale * rank,
        scale=scale,
        dropout=adapter.dropout,
        num_layers=len(base.model.layers),
        keys=paths,
        base_model=adapter.base_model or base.model_id,
        base_revision=None,
        base_fingerprint=base.fingerprint,
        full=tuple(full),
    )


def load_factors(model: nn.Module, file: Path, scale: float | None = None, fresh: tuple[str, ...] = ()) -> None:
    """Load stored factors into the adapter layers of `model`; names and shapes must match exactly.

    Args:
        model: adapted.
        file: adapters.safetensors.
        scale: the factor on the stored products; in a layer with another scale, the difference is multiplied into
            B. None: each layer's own scale.
        fresh: names of parameters that stay as they are where the file does not have them.

    Raises:
        InputError: tensors are missing, unknown or misshapen; one message has all of them.
    """
    header, layers = read_safetensors_header(file), adapter_layers(model)
    wanted = adapter_parameters(model)
    wanted = {name: value for name, value in wanted.items() if name in header or name not in fresh}
    shapes = {name: value.shape for name, value in wanted.items()}
    for path, layer in layers.items():
        shapes |= {f"{path}.{name}": layer.stored_shape(name) for name in layer.trained if f"{path}.{name}" in wanted}
    problems = [f"{name} is missing" for name in wanted if name not in header]
    problems += [f"{name} is not in the model" for name in header if name not in wanted]
    problems += [
        f"{name} is {tuple(header[name]['shape'])}, the model needs {shape}"
        for name, shape in shapes.items()
        if name in header and tuple(header[name]["shape"]) != shape
    ]
    if problems:
        raise InputError(f"{file}: does not fit this model: {first_of(problems)}; give the base it was trained on")
    stored = mx.load(str(file))
    for path, layer in layers.items():
        for name in (name for name in layer.trained if f"{path}.{name}" in wanted):
            try:
                stored[f"{path}.{name}"] = layer.from_stored(name, stored[f"{path}.{name}"])
            except ValueError as error:
                problems.append(f"{path}.{error}")
    if problems:
        raise InputError(
            f"{file}: does not fit this model: {first_of(problems)}; continue with the --method that trained it"
        )
    # Factors are float32 masters; a parameter trained in full has the model's dtype.
    model.load_weights([(name, stored[name].astype(wanted[name].dtype)) for name in wanted], strict=False)
    for layer in layers.values():
        if scale is not None and layer.scale != scale:
            layer.lora_b = layer.lora_b * (scale / layer.scale)
    mx.eval(model.trainable_parameters())


# Is the adapter in the base already?

LAYERS, ROWS = 8, 1024  # the most that are sampled, so that it takes little time
PRESENT = 0.5  # the least share of a fused update; quantized bases lose some of it
# The noise of a quantized weight, relative to its size, by bits; a float one may have been quantized to four before.
NOISE = {2: 0.45, 3: 0.2}
LEAST_NOISE = 0.1
MOST_DEVIATION = 0.1  # the largest standard deviation of the share, from noise; PRESENT is five times this


def measure_overlap(model: nn.Module) -> dict[str, float]:
    """Return the inner products of an adapted model's weights with its update.

    Ranks that share the base must all call this.

    Returns:
        `inner` <W, D>, `size` <D, D> and `noise`, the mean square of the noise that quantizing may have added to W, all
        over the sampled rows, to six digits; empty without linear layers whose update is not zero.
    """
    layers = [layer for layer in adapter_layers(model).values() if layer.OVER is LINEAR]
    chosen = [layers[len(layers) * i // LAYERS] for i in range(LAYERS)] if len(layers) > LAYERS else layers
    if not chosen:
        return {}
    blocks = {id(module): block for block in model.layers for module in block.modules()}
    sums = mx.zeros((4,))
    for layer in chosen:
        block = blocks.get(id(layer))
        shared = (
            block if hasattr(block, "at_hand") else None
        )  # a block of a shared base, whose weights must be gathered
        with shared.at_hand([]) if shared is not None else nullcontext():
            sums = sums + _sums(layer)
        mx.eval(sums)  # one block of a shared base at a time
    inner, size, noise, numbers = sums.tolist()
    if not size > 0:  # NaN too
        return {}
    found = {"inner": inner, "size": size, "noise": noise / numbers}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def _sums(layer: AdapterLayer) -> mx.array:
    """Return <W, D>, <D, D>, the noise's square and the count of numbers, over one layer's first rows."""
    base = layer.base
    names = [name for name in ("weight", "scales", "biases") if name in base]
    rows = [base[name][:ROWS] for name in names]
    weight = QuantFormat.of(base).dequantize(*rows) if isinstance(base, QUANTIZED) else rows[0]
    weight = weight.astype(mx.float32)  # (n, in)
    a, b = layer.plain_factors()  # (in, r), (r, out)
    update = layer.scale * (b.T[: len(weight)] @ a.T)  # (n, in)
    noise = NOISE.get(base.bits, LEAST_NOISE) if isinstance(base, QUANTIZED) else LEAST_NOISE
    squares = noise**2 * mx.square(weight).sum()
    return mx.stack([(weight * update).sum(), mx.square(update).sum(), squares, mx.array(float(weight.size))])


def share_present(model: nn.Module, stored: dict[str, Any]) -> float | None:
    """Return the share of its adapter's update in a model's weights: about 0, or about 1 if it was fused.

    Args:
        model: adapted.
        stored: what `measure_overlap` returned when the adapter was written.

    Returns:
        The share; None if it is not known, because the factors are not those measured or the update is too small.
    """
    found = measure_overlap(model)
    if not found or not stored or abs(found["size"] - stored["size"]) > 1e-3 * stored["size"]:
        return None
    deviation = (max(found["noise"], stored["noise"]) / found["size"]) ** 0.5
    if deviation > MOST_DEVIATION:
        return None
    return (found["inner"] - stored["inner"]) / found["size"]


def with_limits_of_run(data: DataSettings, given: Collection[str], adapter: Path) -> DataSettings:
    """Return the settings with the limits of the adapter's run on texts and pictures, except those that the user gave."""
    run = run_of(adapter)
    found = {name: run[name] for name in LIMITS if name not in given and type(run.get(name)) is int}
    return replace(data, **found)


def check_writes_text(adapter: Path) -> None:
    """Refuse an adapter of a run of embeddings, where a model is to write.

    Raises:
        InputError: it is one.
    """
    if run_of(adapter).get("objective") == "embed":
        raise InputError(
            f"{adapter}: this adapter is for --objective embed, and gives vectors, not text; use embed, evaluate "
            "--objective embed, serve, or export --to sentence-transformers"
        )


def run_of(adapter: Path) -> dict[str, Any]:
    """Return the contents of run.yaml, nothing if there is none or it cannot be read."""
    try:
        content = parse_yaml((adapter / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
    order = None
    if start.head is not None and head is not None:
        theirs, ours = (list(one.get("labels") or []) for one in (start.head, head))
        compared = {
            "--problem-type": (start.head.get("problem_type"), head.get("problem_type")),
            "--labels": (",".join(sorted(theirs)), ",".join(sorted(ours))),
        }
        for flag, (before, now) in compared.items():
            if before != now:
                raise InputError(
                    f"{FLAG} {start.file}: was trained with {flag} {before}, this run has {now}; give {flag} {before} and data "
                    "that fit, or train a new adapter"
                )
        order = None if theirs == ours else mx.array([theirs.index(label) for label in ours])
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
    layers, factors = adapter_layers(model), {}
    problems = Problems(f"{path} is missing" for path in layers if path not in adapter.factors)
    problems += [f"{path} is not adapted in this run" for path in adapter.factors if path not in layers]
    problems += [f"{path}.{leaf} was trained in full" for path, leaf in adapter.full if f"{path}.{leaf}" not in fresh]
    problems.note_if(
        adapter.leaves_head is not None,
        f"{adapter.leaves_head} is adapted without the head, which is the same matrix here",
    )
    for path, layer in layers.items():
        rank, _ = adapter.shapes.get(path, (layer.rank, 1.0))
        problems.note_if(rank != layer.rank, f"{path} has rank {rank}, the run {layer.rank}")
        problems.note_if(
            path in adapter.factors and ("m" in layer) != (path in adapter.magnitudes),
            f"{path} is {'not ' if 'm' in layer else ''}a DoRA layer, unlike in this run",
        )
    for path, layer in layers.items() if not problems else ():
        try:
            pairs = zip(("lora_a", "lora_b"), adapter.factors[path], strict=True)
            factors[path] = [layer.from_stored(name, array) for name, array in pairs]
        except ValueError as error:
            problems.append(f"{path}.{error}")
    if problems:
        raise InputError(
            f"{file}: does not fit this run: {first_of(problems)}; give its --rank, --target-modules and --method"
        )
    for path, layer in layers.items():
        a, b = factors[path]
        layer.lora_a, layer.lora_b = a, b * (adapter.shapes[path][1] / layer.scale)
        if path in adapter.magnitudes:
            layer.m = adapter.magnitudes[path]
    mx.eval(model.trainable_parameters())


# model_type -> our prefix, mlx-vlm's.
NAMES: dict[str, tuple[str, str]] = dict.fromkeys(("smolvlm", "idefics3"), ("language_model.model.", "language_model."))


# Layers whose `weight` mlx-vlm's own code reads, which its adapter layers do not have.
READ = ("vision_tower.patch_embedder.input_proj",)  # Gemma 4


def write_mlx_vlm(folder: Path, model: nn.Module, info: AdapterInfo, kind: str) -> None:
    """Write an adapter folder that mlx-vlm's `load` takes as `adapter_path`.

    Args:
        folder: to write.
        model: adapted.
        info: of the adapter.
        kind: model_type of the base.

    Raises:
        InputError: the adapter has more than low-rank factors on layers, or is on a layer that mlx-vlm cannot adapt.
    """
    if info.full or info.qat:
        raise InputError(
            "--to mlx-vlm: the adapter has whole trained parts, or rounding; fuse it instead (mlx-lora fuse)"
        )
    modules = dict(model.named_modules())
    if unfit := [path for path in READ if isinstance(modules.get(path), AdapterLayer)]:
        raise InputError(f"--to mlx-vlm: it cannot adapt {unfit[0]}; fuse the adapter instead (mlx-lora fuse)")
    save_adapter(folder, model, info, same_rank=True)
    ours, theirs = NAMES.get(kind, ("", ""))
    stored = mx.load(str(folder / WEIGHTS_FILE))
    if not isinstance(stored, dict):
        raise ValueError(f"{WEIGHTS_FILE} is no file of tensors")
    named = {
        theirs + name.removeprefix(ours) if ours and name.startswith(ours) else name: array
        for name, array in stored.items()
    }
    mx.eval(named)
    save_tensors(folder / WEIGHTS_FILE, named)
    config = read_json(folder / CONFIG_FILE, "export it again")
    config["lora_parameters"]["keys"] = sorted({name.rpartition(".")[0] for name in named})
    write_json(folder / CONFIG_FILE, config)
