"""The tower of a vision-language model: load it through mlx-vlm, and compute what the language model gets to see of a picture.

A vision-language model has three parts. A vision tower turns the pixels of a picture into states of its patches, a connector turns
these into embeddings as wide as the language model's, and the language model reads them in place of the embeddings of the
picture's tokens. The language model is mlx-lm's, as for text alone (models/load.py): adapters, kernels, losses and
checkpointing are the same. Tower and connector are mlx-vlm's. A frozen tower is asked once for each picture:

    pixels of a picture -> tower -> connector -> embeddings (n, D), and of Qwen3-VL more of them for its first blocks

`models/image_inputs.py` puts them into a batch. If the tower or the connector is trained, or an adapter changes them, both are
parts of the model beside its language model (`open_tower`), under mlx-vlm's names, like any other layer.

mlx-vlm has one method per family that computes the embeddings of a whole prompt. It is called here with a prompt of nothing
but a picture's tokens, and a language model that only gives zeros, so that its result is the picture's embeddings. So a
family needs no code here, unless what mlx-vlm does with them differs from what transformers does.

Shapes: n tokens of a picture, D width of the language model, L blocks that get more.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.compat.foreign import MERGE_PICTURE
from mlx_lora.compat.functions import become
from mlx_lora.models.convert import files_with_tower
from mlx_lora.models.folder import FOREIGN_ERRORS, of_tower, short
from mlx_lora.models.load import Base
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json

INSTALL = "pip install 'mlx-lora[vision]'"
LANGUAGE = "language_model."
# Names of the tower in stored tensors that transformers 5 writes without, and mlx-vlm reads with, this part.
TOWER, INNER = "vision_tower.", "vision_model."
QUANTIZED = ("weight", "scales", "biases")


@dataclass(frozen=True)
class ImageFeatures:
    """What the language model gets of one picture.

    Attributes:
        embeddings: (n, D), which take the place of its tokens' embeddings.
        deep: (L, n, D), added to the output of the first L blocks at these tokens; None for most models.
    """

    embeddings: mx.array
    deep: mx.array | None = None


def has_tower(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a vision-language model."""
    return isinstance(config.get("vision_config"), dict)


def image_token(config: Mapping[str, Any]) -> int:
    """Return the id of the token that stands for a part of a picture.

    Raises:
        InputError: the config has none.
    """
    for name in ("image_token_id", "image_token_index"):
        if isinstance(config.get(name), int):
            return config[name]
    raise InputError(f"config.json of this {config.get('model_type')} names no image_token_id; choose another model")


class VisionTower:
    """The tower and the connector of a model."""

    def __init__(self, model: Any, width: int, token: int, rescale: float = 1.0):
        """Keep mlx-vlm's model, whose language model has been replaced by a `NoText`.

        Args:
            model: mlx-vlm's, in eval mode.
            width: of the language model, D.
            token: the picture's token.
            rescale: factor on the embeddings, for families whose language model scales its embeddings by a rounded factor.
        """
        self.model, self.width, self.token, self.rescale = model, width, token, rescale

    @property
    def size_bytes(self) -> int:
        """The size of its parameters."""
        return sum(array.nbytes for array in arrays_of(self.model).values())

    def features(self, pixels: Mapping[str, np.ndarray], tokens: int) -> ImageFeatures:
        """Return what the language model gets of one picture; it is computed here.

        Args:
            pixels: what the image processor made of the picture (data/image_tokens.py).
            tokens: n, the number of its tokens.

        Raises:
            InputError: mlx-vlm's tower fails, or gives another number of embeddings.
        """
        arrays = {name: mx.array(value) for name, value in pixels.items() if isinstance(value, np.ndarray)}
        try:
            found = self(arrays, tokens)
            mx.eval(found.embeddings, found.deep if found.deep is not None else ())
        except FOREIGN_ERRORS as error:
            raise InputError(f"mlx-vlm's tower fails on a picture of {tokens} tokens ({short(error, 200)})") from error
        if len(found.embeddings) != tokens:
            raise InputError(
                f"mlx-vlm's tower gives {len(found.embeddings)} embeddings of a picture of {tokens} tokens"
            )
        return found

    def __call__(self, pixels: Mapping[str, mx.array], tokens: int) -> ImageFeatures:
        """Return the same, lazily; a gradient flows through it.

        mlx-vlm reads sizes of pictures and masks while it runs, so that this cannot be compiled.
        """
        ids, others = mx.full((1, tokens), self.token, mx.int32), dict(pixels)
        values = others.pop("pixel_values")
        found = self.model.get_input_embeddings(ids, values, mask=mx.ones((1, tokens), mx.int32), **others)
        deep = found.deepstack_visual_embeds
        embeddings = found.inputs_embeds.reshape(-1, self.width) * self.rescale
        stacked = None if deep is None or not len(deep) else mx.stack(list(deep)).reshape(len(deep), tokens, -1)
        return ImageFeatures(embeddings, stacked)


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    """Return all parameters of a model by name."""
    return dict(tree_flatten(model.parameters()))  # pyright: ignore[reportArgumentType, reportReturnType]


def _only_picture(features: mx.array, embeddings: mx.array, ids: mx.array) -> mx.array:
    """Put features where a picture's tokens are, in a prompt of nothing else.

    LLaVA's own method assigns to `embeddings[:, positions]`, whose gradient fails in mlx 0.32.
    """
    return features.astype(embeddings.dtype).reshape(embeddings.shape)


def _merged(self: Any, features: mx.array, image_sizes: Sequence[Any]) -> mx.array:
    """Join squares of patches, as Mistral 3's connector does; its own method makes a slice of each patch.

    Args:
        self: mlx-vlm's merger.
        features: (patches, width) or with a first axis of one.
        image_sizes: height and width in pixels of each picture.
    """
    k, parts, at = self.spatial_merge_size, [], 0
    features = features.reshape(-1, features.shape[-1])
    for size in image_sizes:
        rows, columns = (int(side) // self.patch_size for side in size)
        grid = features[at : at + rows * columns].reshape(rows, columns, -1)[: rows // k * k, : columns // k * k]
        squares = grid.reshape(rows // k, k, columns // k, k, -1).transpose(0, 2, 4, 1, 3)  # width before the square
        parts.append(squares.reshape(-1, features.shape[-1] * k * k))
        at += rows * columns
    return self.merging_layer(mx.concatenate(parts))


class NoText(nn.Module):
    """Stands where mlx-vlm has the language model: its embeddings are zeros, and it has no positions."""

    embed_scale = 1.0  # of Gemma 4
    hidden_size_per_layer_input = 0  # of Gemma 4: models/image_inputs.py has these

    def __init__(self, width: int, dtype: mx.Dtype):
        super().__init__()
        self._width, self._dtype = width, dtype

    @property
    def model(self) -> NoText:
        """Itself: families differ in where they look for `embed_tokens`."""
        return self

    def embed_tokens(self, tokens: mx.array) -> mx.array:
        """Return zeros, (B, T) -> (B, T, D)."""
        return mx.zeros((*tokens.shape, self._width), self._dtype)

    def get_rope_index(self, *args: Any, **kwargs: Any) -> tuple[None, None]:
        """Return no positions: models/image_inputs.py has those of the whole row."""
        return None, None


ATTACHED = "vision_tower_of_this_model"  # a plain attribute of the model; the tower's layers are its children


def open_tower(base: Base) -> VisionTower:
    """Return the tower of a base as a part of its model, where adapters and optimizers find it; it is loaded once.

    The tower's modules are both the model's children and its own, so what one changes the other has.

    Raises:
        InputError: see `load_tower`.
    """
    tower = attached_tower(base.model)
    if tower is None:
        tower = load_tower(base.folder, compute_dtype(base))
        attach_tower(base.model, tower)
    return tower


def attach_tower(model: nn.Module, tower: VisionTower) -> None:
    """Make a tower a part of its language model."""
    setattr(model, ATTACHED, tower)
    for name, part in tower.model.children().items():
        if of_tower(name):
            model[name] = part


def attached_tower(model: nn.Module) -> VisionTower | None:
    """Return the tower that is a part of a model; None if none is."""
    return vars(model).get(ATTACHED)


def take_tower(model: nn.Module) -> dict[str, mx.array]:
    """Take the tower off a model again, and return its parameters by mlx-vlm's names; nothing if it has none."""
    if vars(model).pop(ATTACHED, None) is None:
        return {}
    taken = {name: array for name, array in arrays_of(model).items() if of_tower(name)}
    for name in {name.split(".", 1)[0] for name in taken}:
        del model[name]
    return taken


def compute_dtype(base: Base) -> mx.Dtype:
    """Return the dtype that the tower of a base computes in."""
    return device.compute_dtype("auto" if "/" in base.dtypes else base.dtypes)


def load_tower(folder: Path, dtype: mx.Dtype) -> VisionTower:
    """Load the tower and the connector of a folder.

    Args:
        folder: with config.json and *.safetensors, as transformers, mlx-vlm or this package writes them.
        dtype: to compute in.

    Raises:
        InputError: mlx-vlm is not installed, does not know the model, or its tensors are missing.
    """
    model, config = stored_tower(folder)
    tower = without_language_model(model, config, image_token(config), dtype)
    mx.eval(model.parameters())
    return tower


def stored_tower(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return mlx-vlm's model of a folder without its language model, in the dtypes of the files and not computed, and config.json.

    Raises:
        InputError: as `load_tower`.
    """
    config = read_json(folder / "config.json", "download the model again")
    kind = config.get("model_type")
    if not has_tower(config):
        raise InputError(f"{folder}: a {kind} model, which sees no pictures; choose one with a vision_config")
    image_token(config)  # refuses a config without one
    try:
        model = build_tower(config)
        weights = _tower_weights(folder, _module_of(config), model)
        _load(model, weights, config)
    except FOREIGN_ERRORS as error:
        raise InputError(f"{folder}: mlx-vlm cannot load the tower of this {kind} model ({short(error)})") from error
    return model, config


def without_language_model(model: Any, config: Mapping[str, Any], token: int, dtype: mx.Dtype) -> VisionTower:
    """Return mlx-vlm's model as a frozen tower; its language model is replaced, its parameters need not be computed."""
    kind, width = str(config.get("model_type")), (config.get("text_config") or config)["hidden_size"]
    model.language_model = NoText(width, dtype)
    if hasattr(model, MERGE_PICTURE.name) and kind == "llava":
        setattr(model, MERGE_PICTURE.name, _only_picture)
    if kind == "mistral3":
        merger = model.multi_modal_projector.patch_merger
        become(merger, type("PatchMerger", (type(merger),), {"__call__": _merged}))
    model.set_dtype(dtype)
    model.freeze()
    model.eval()
    if kind == "paligemma":  # mlx-vlm leaves the config's epsilon out here
        model.vision_tower.vision_model.post_layernorm.eps = model.config.vision_config.layer_norm_eps
        model.config.pad_token_id = -1  # of which a prompt of nothing but a picture has none
    return VisionTower(model, width, token, _rescale(kind, width, model.config))


def build_tower(config: Mapping[str, Any]) -> Any:
    """Return mlx-vlm's model for a config.json, whose parameters are not computed.

    Raises:
        InputError: mlx-vlm is not installed, does not know it, or leaves out what the config asks for.
    """
    vision = config.get("vision_config") or {}
    if vision.get("model_type") == "pixtral":  # whose settings mlx-vlm's tower leaves out
        if (activation := vision.get("hidden_act", "gelu")) != "silu":
            raise InputError(
                f"config.json of this {config.get('model_type')} has hidden_act {activation} in its vision_config, and "
                "mlx-vlm's Pixtral tower computes silu; choose another model"
            )
        if not isinstance(config.get("vision_feature_layer", -1), int):
            raise InputError(
                f"config.json of this {config.get('model_type')} takes several layers of the tower "
                "(vision_feature_layer), and mlx-vlm takes one; choose another model"
            )
    module, token = _module_of(config), image_token(config)
    utils = importlib.import_module("mlx_vlm.utils")
    # What mlx-vlm's classes ask for; the text part is never computed.
    scalars = {name: value for name, value in config.items() if not isinstance(value, dict)}
    text = {**scalars, **(config.get("text_config") or {})}
    rope = text.get("rope_parameters")
    if isinstance(rope, dict):
        full = next((part for part in rope.values() if isinstance(part, dict)), rope)
        text["rope_theta"] = full.get("rope_theta", 10000.0)
        if "mrope_section" in full:
            text["rope_scaling"] = {**full, "type": "default"}
    text.setdefault("rms_norm_eps", 1e-6)
    named = {"image_token_id": token, "image_token_index": token}
    whole = {**text, **config, **named, "text_config": text, "audio_config": None}  # without what hears
    arguments = module.ModelConfig.from_dict(whole)
    whole["text_config"] = text  # a few classes put their own there
    arguments = utils.update_module_configs(arguments, module, whole, ["text", "vision", "perceiver", "projector"])
    try:
        return module.Model(arguments)
    except ValueError:
        # transformers 5 writes qwen3_vl_vision where published files, and mlx-vlm's check, have qwen3_vl.
        arguments.vision_config.model_type = str(arguments.vision_config.model_type).removesuffix("_vision")
        return module.Model(arguments)


def _module_of(config: Mapping[str, Any]) -> ModuleType:
    """Return mlx-vlm's package of an architecture.

    Raises:
        InputError: mlx-vlm is not installed, or does not know it.
    """
    kind = str(config.get("model_type"))
    if kind == "llava" and (config.get("vision_config") or {}).get("model_type") == "pixtral":
        config = {**config, "model_type": "pixtral"}  # mlx-vlm's name; transformers takes it for a LLaVA
    try:
        utils = importlib.import_module("mlx_vlm.utils")
    except ImportError as error:
        raise InputError(f"--model sees pictures, for which mlx-vlm is missing ({error}); {INSTALL}") from error
    try:
        return utils.get_model_and_args(config=dict(config))[0]
    except FOREIGN_ERRORS as error:
        raise InputError(f"mlx-vlm does not know {kind} models ({short(error, 100)}); choose another model") from error


def _tower_weights(folder: Path, module: ModuleType, model: Any) -> dict[str, mx.array]:
    """Return the tensors of a folder that are not of the language model, under mlx-vlm's names."""
    utils = importlib.import_module("mlx_vlm.utils")
    weights: dict[str, mx.array] = {}
    for file in files_with_tower(folder):
        weights.update(mx.load(str(file)))  # pyright: ignore[reportArgumentType, reportCallIssue] # one file, a dict
    weights = utils.sanitize_weights(model, weights)
    for name, part in (("VisionModel", "vision_config"), ("LanguageModel", "text_config")):
        kind, arguments = vars(module).get(name), vars(model.config).get(part)
        if kind is not None and arguments is not None:
            weights = utils.sanitize_weights(kind, weights, arguments)
    wanted = {name for name, _ in tree_flatten(model.parameters()) if not name.startswith(LANGUAGE)}
    found = {}
    for name, array in weights.items():
        if not name.startswith((LANGUAGE, "lm_head")):
            longer = name.replace(TOWER, TOWER + INNER, 1)  # mlx-vlm has some with `vision_model`
            found[longer if name.startswith(TOWER) and name not in wanted and longer in wanted else name] = array
    return found


def _load(model: Any, weights: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Load the tower's tensors; all of its parameters must be among them."""
    del model.language_model
    if quantization := config.get("quantization"):
        usual = {name: quantization[name] for name in ("group_size", "bits", "mode") if name in quantization}

        def stored(path: str, module: nn.Module) -> bool | dict[str, Any]:
            own = quantization.get(path)
            return (own if isinstance(own, dict) else usual) if f"{path}.scales" in weights else False

        nn.quantize(model, class_predicate=stored)
    model.load_weights(list(weights.items()), strict=True)


def _rescale(kind: str, width: int, config: Any) -> float:
    """Return by how much a family's embeddings are to be scaled, beyond what mlx-vlm does.

    The language models of the Gemma family multiply what they embed by sqrt(D); in mlx-lm, Gemma 3's factor is rounded to
    bfloat16. mlx-vlm divides the embeddings of a picture by sqrt(D) itself, except for Gemma 4; for PaliGemma it takes D
    from the config's `hidden_size`, which is 2048 in published files of any size.
    """
    if kind == "gemma4":
        return width**-0.5
    if kind == "paligemma":
        return (config.hidden_size / width) ** 0.5
    if kind == "gemma3":
        return width**0.5 / mx.array(width**0.5, mx.bfloat16).astype(mx.float32).item()
    return 1.0
