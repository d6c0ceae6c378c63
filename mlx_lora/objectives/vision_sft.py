"""Imitation with pictures: cross-entropy on the answers' tokens, of conversations that have pictures.

The rows are those of imitation, with a picture's tokens where it is shown (data/image_tokens.py). What the language model
reads at these tokens comes from the frozen tower (models/vision.py), once for each picture (objectives/image_features.py):

    batch -> rows' pictures -> embeddings (F, D), places (B, T), and what the family needs besides -> loss of tokens

The loss, its kernels, checkpointing and adapters are those of imitation. Inside `with_images` (models/image_inputs.py) the
model reads embeddings in place of image tokens.

With --train-connector or --train-vision, tower and connector are parts of the model, a batch has pixels in place of
embeddings, and the tower is asked inside the loss, once for each picture and step, so that gradients reach it. Nothing is
kept then, and the step is not compiled.

Shapes: B rows, T columns, F embeddings of a batch's pictures, padded to a power of two so that few shapes are compiled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.base import LINEAR, base_dims
from mlx_lora.adapters.targets import has_weights
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS
from mlx_lora.data.chat_template import own_template
from mlx_lora.data.files import find_sets
from mlx_lora.data.image_tokens import Family, ImageProcessor, ImageReader, ImageTable
from mlx_lora.data.load import DataSplits, load_data, load_eval_set
from mlx_lora.data.read import PICTURES
from mlx_lora.losses.cross_entropy import Arrays, Loss
from mlx_lora.models.folder import FOREIGN_ERRORS
from mlx_lora.models.image_inputs import ImageInputSpec, positions_of, prepare_rotation, with_images
from mlx_lora.models.tower_files import of_connector, of_tower
from mlx_lora.models.vision import (
    LANGUAGE,
    ImageFeatures,
    VisionTower,
    arrays_of,
    build_tower,
    compute_dtype,
    image_token,
    load_tower,
    open_tower,
)
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext
from mlx_lora.objectives.image_features import ImageFeatureCache
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from datetime import date

    from transformers import PreTrainedTokenizerBase

    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import AdapterSettings, DataSettings, TrainSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.models.load import Base

FEWEST = 16  # embeddings that a batch has room for
TRAINED_BYTES = 16  # of a trained number: its float32 master, gradient and two moments
# Arrays of Gemma 4's tower that nobody trains: bounds of its clipped layers, and what standardizes its output.
BUFFERS = frozenset({"input_min", "input_max", "output_min", "output_max", "std_bias", "std_scale"})
AT_ENDS = 34  # arrays as wide as the tower that a picture takes besides its blocks


def vision_sft(settings: ObjectiveSettings) -> Objective:
    """Return the objective of --objective vision_sft, which has no options of its own."""
    return VisionSFT("vision_sft", PICTURES, "imitation, with pictures")


@dataclass(eq=False)
class VisionSFT(Objective):
    """Imitation with pictures."""

    def __post_init__(self) -> None:
        self.table = ImageTable.empty()
        self._eyes: VisionEncoder | None = None
        self._attached = False  # whether the tower is a part of the model
        # Of tower and connector: modules that are trained in full, and layers that get factors.
        self._whole: tuple[str, ...] = ()
        self._layers: tuple[str, ...] = ()

    @property
    def vision(self) -> VisionEncoder:
        """The tower and what belongs to it.

        Raises:
            ValueError: `open` was not called.
        """
        if self._eyes is None:
            raise ValueError("the tower is not loaded")
        return self._eyes

    def open(self, ctx: RunContext) -> None:
        """Load the tower, and let the base take the positions of pictures.

        Raises:
            InputError: the model sees no pictures, or processes divide it.
        """
        if ctx.strategy.divides_base:
            raise InputError(
                "--objective vision_sft with a divided base: only whole bases see pictures; leave out --shard-base, "
                "--offload-base and --parallel tensor"
            )
        if ctx.settings.loop.cache_trunk == "on":
            raise InputError(
                "--cache-trunk on with --objective vision_sft: the tower's output is kept instead; leave it out"
            )
        if ImageInputSpec.of(ctx.base.config).prompt and not ctx.settings.data.mask_prompt:
            raise InputError(
                f"--no-mask-prompt with a {ctx.base.config.get('model_type')} model: the tokens of its prompts see those "
                "that follow, so they cannot be trained; leave it out"
            )
        adapter = ctx.settings.adapter
        trains = ctx.trains and bool(adapter.train_connector or adapter.train_vision)
        self._attached = trains or not ctx.trains  # a tower that is measured may be an adapter's, which is put on later
        base = ctx.base
        tower = open_tower(base) if self._attached else load_tower(base.folder, compute_dtype(base))
        self._eyes = VisionEncoder.of(ctx.base, ctx.settings.data, self.table, tower, trains)
        self.compiles = not trains
        if trains:
            self._layers, self._whole = tower_targets(tower.model, adapter)

    def adapted(self, adapter: AdapterSettings) -> AdapterSettings:
        """Add what --train-connector and --train-vision name; see `Objective.adapted`."""
        layers, whole = self._layers, self._whole
        if adapter.method == "full":  # whose targets are trained in full
            layers, whole = whole, ()
        saved = ",".join(filter(None, (adapter.modules_to_save, *whole)))
        return replace(
            adapter, target_modules=",".join((adapter.target_modules, *layers)), modules_to_save=saved or None
        )

    def read_data(self, ctx: RunContext, data: DataSettings, teacher_prompt: str | None = None) -> DataSplits:
        """Read conversations with pictures; see `Objective.read_data`."""
        reader = self._reader(data, self.vision.processor, ctx.base.config)
        put_template(ctx.base.hf_tokenizer, ctx.base.folder, data, reader.processor.family)
        splits = load_data(data, ctx.base.hf_tokenizer, ctx.settings.loop.seed, ctx.today, PICTURES, pictures=reader)
        ctx.record.identity["pictures"] = self.vision.identity()
        ctx.record.lines.append(self.vision.words())
        return splits

    def read_set(self, ctx: RunContext, data: DataSettings) -> EncodedSet:
        """Read one set to measure; see `Objective.read_set`."""
        reader = self._reader(data, self.vision.processor, ctx.base.config)
        put_template(ctx.base.hf_tokenizer, ctx.base.folder, data, reader.processor.family)
        return load_eval_set(data.data or "", data, ctx.base.hf_tokenizer, PICTURES, pictures=reader)

    def read_planned(
        self,
        settings: TrainSettings,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        config: dict[str, Any],
        today: date | None,
        records: str,
    ) -> DataSplits:
        """Read a run's data for a plan; see `Objective.read_planned`."""
        data = settings.data
        reader = self._reader(data, ImageProcessor(folder, config, data.max_pixels), config)
        put_template(tokenizer, folder, data, reader.processor.family)
        return load_data(data, tokenizer, settings.loop.seed, today, PICTURES, pictures=reader)

    def _reader(self, data: DataSettings, processor: ImageProcessor, config: dict[str, Any]) -> ImageReader:
        files = [file.path for one in find_sets(data.data or "") for files in one.splits.values() for file in files]
        roots = list(dict.fromkeys(path.parent for path in files))
        return ImageReader(processor, roots, self.table, image_token(config))

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """Return the settings without what would compute rows without their pictures."""
        return replace(settings, loop=replace(settings.loop, cache_trunk="off", sample_tokens=0))

    def bind(self, loss: Loss, model: nn.Module) -> BoundObjective:
        """Return the loss of tokens on a vision-language model; see `Objective.bind`."""
        spec = self.vision.spec
        count = len(Arrays._fields)
        prepare_rotation(model, spec)

        def with_pictures(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(model: nn.Module, *arrays: Any) -> Any:
                with with_images(model, spec, self.vision.shown(arrays[count:])):
                    return function(model, *arrays[:count])

            return call

        measured = None if loss.measure_tokens is None else with_pictures(loss.measure_tokens)
        seen = replace(
            loss,
            train=with_pictures(loss.train),
            measure=with_pictures(loss.measure),
            tokens=with_pictures(loss.tokens),
            measure_tokens=measured,
        )
        return BoundObjective(seen, self.arrays_of)

    def arrays_of(self, batch: Batch) -> tuple[Any, ...]:
        """Return the loss's arguments for a batch: those of imitation, then those of its pictures."""
        rows = self.table.of_labels(batch.labels, len(batch.inputs))
        prompts = batch.mask.argmax(axis=1) + 1  # up to the first trained target
        return (*Arrays.of(batch), *self.vision.arrays(batch.inputs, rows, prompts))

    def header_words(self, plan: BatchPlan, ctx: RunContext) -> list[str]:
        """Return words on the tower for the run's header."""
        adapter, size = ctx.settings.adapter, f"{self.vision.tower.size_bytes / 1e6:.0f} MB"
        if not self.vision.trained:
            return [f"tower frozen, {size}"]
        ways = {"connector": adapter.train_connector, "tower": adapter.train_vision}
        words = ", ".join(f"{part} {'frozen' if way is None else f'trained ({way})'}" for part, way in ways.items())
        return [f"{words}, {size}, pictures are seen again in each step"]

    def other_models_bytes(self, settings: TrainSettings) -> int:
        """Return the bytes of the tower, and of what it saw, as far as they stay in memory."""
        if self._eyes is None:
            return planned_tower_bytes(settings, self.table)
        if self.vision.trained:  # tower and connector are among the model's own parameters
            return kept_by_tower(self.vision.processor.config, settings, self.table)
        return self.vision.tower.size_bytes + min(self.vision.seen.most_bytes, self.vision.pictures_bytes())


@dataclass(frozen=True)
class VisionEncoder:
    """A model's tower with its image processor, and how the language model reads what it sees.

    Attributes:
        tower: frozen.
        processor: makes pixels and tokens of pictures.
        spec: of the language model.
        table: of the pictures.
        seen: what the tower saw.
        trained: whether tower or connector are trained, so that what it sees changes.
    """

    tower: VisionTower
    processor: ImageProcessor
    spec: ImageInputSpec
    table: ImageTable
    seen: ImageFeatureCache
    trained: bool = False

    @classmethod
    def of(
        cls, base: Base, data: DataSettings, table: ImageTable, tower: VisionTower, trained: bool = False
    ) -> VisionEncoder:
        """Put a base's tower and its image processor together.

        Raises:
            InputError: it has a family that is not known here.
        """
        processor, spec = ImageProcessor(base.folder, base.config, data.max_pixels), ImageInputSpec.of(base.config)
        return cls(tower, processor, spec, table, ImageFeatureCache(tower, processor, table), trained)

    def identity(self) -> str:
        """Return what tells other pictures, or other pixels of them, apart."""
        facts = [self.table.rows, sorted(self.table.pictures), self.processor.max_pixels]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def words(self) -> str:
        """Return a line on the pictures for the run's header."""
        tokens = [shown.tokens for shown in self.table.shown.values()]
        if not tokens:
            return "Pictures: none in the data"
        sizes = [picture.size for picture in self.table.pictures.values()]
        largest = max(sizes, key=lambda size: size[0] * size[1])
        each = (
            f"{min(tokens)} to {max(tokens)} tokens each" if min(tokens) < max(tokens) else f"{max(tokens)} tokens each"
        )
        limit = f", at most {self.processor.max_pixels:,} pixels" if self.processor.max_pixels else ""
        return (
            f"Pictures: {counted(len(tokens), 'picture')}, the largest {largest[0]} x {largest[1]} pixels{limit}; {each}, "
            f"{np.mean(tokens):.0f} on average"
        )

    def pictures_bytes(self) -> int:
        """Return the bytes of what the tower sees of all pictures."""
        each = self.tower.width * 4 * (1 + self.spec.deep)
        return each * sum(shown.tokens for shown in self.table.shown.values())

    def arrays(self, inputs: np.ndarray, rows: list[tuple[str, ...]], prompts: np.ndarray | None = None) -> list[Any]:
        """Return the arrays that `with_images` takes for a batch, or if the tower is trained, what `shown` makes them of.

        Args:
            inputs: (B, T) token ids.
            rows: the digests of each row's pictures.
            prompts: (B,) the number of tokens of each row before its first answer; None: a row is a prompt.

        Raises:
            InputError: a picture's file has changed.
        """
        is_picture = inputs == self.tower.token  # (B, T)
        digests = [digest for row in rows for digest in row]
        count = sum(self.table.shown[digest].tokens for digest in digests)
        if int(is_picture.sum()) != count:
            raise ValueError(f"{int(is_picture.sum())} image tokens, and {count} embeddings for them")
        places = np.where(is_picture, np.cumsum(is_picture).reshape(is_picture.shape), 0).astype(np.int32)
        given = {"places": mx.array(places)}
        if self.spec.prompt:
            ends = np.full(len(inputs), inputs.shape[1]) if prompts is None else prompts
            given["pictures"] = mx.array((np.arange(inputs.shape[1]) < ends[:, None]).astype(np.int32))
        elif self.spec.both_ways:
            given["pictures"] = mx.array(self._numbers(is_picture, rows))
        if self.spec.sections is not None:
            grids = [[self.table.shown[digest].grid for digest in row] for row in rows]
            found = [positions_of(row, grid) for row, grid in zip(is_picture, grids, strict=True)]
            given["positions"] = mx.array(np.stack(found, axis=1))  # (3, B, T)
        if self.trained:
            return [UnseenPictures(given, [self._pixels(digest) for digest in digests])]
        return self._with_embeddings(given, [self.seen.of(digest) for digest in digests])

    def shown(self, arrays: Sequence[Any]) -> Sequence[mx.array]:
        """Return the arrays that `with_images` takes; a trained tower is asked about the pictures here."""
        if len(arrays) != 1 or not isinstance(arrays[0], UnseenPictures):
            return arrays
        return self._with_embeddings(arrays[0].given, [self.tower(*one) for one in arrays[0].pixels])

    def _pixels(self, digest: str) -> tuple[dict[str, mx.array], int]:
        """Return what the tower takes of a picture, and the number of its tokens."""
        pixels = self.processor.pixels(self.table.pictures[digest].pixels())
        return {name: mx.array(value) for name, value in pixels.items()}, self.table.shown[digest].tokens

    def _with_embeddings(self, given: dict[str, mx.array], seen: Sequence[ImageFeatures]) -> list[mx.array]:
        """Return a batch's arrays with what is seen of its pictures, padded."""
        count = sum(len(one.embeddings) for one in seen)
        room = max(FEWEST, 1 << max(0, count - 1).bit_length()) - count
        width, dtype = self.tower.width, seen[0].embeddings.dtype if seen else mx.float32
        embeddings = mx.concatenate([*(one.embeddings for one in seen), mx.zeros((room, width), dtype)])
        given = {**given, "embeddings": embeddings}
        if self.spec.deep:
            deep = [one.deep for one in seen if one.deep is not None]
            given["deep"] = mx.concatenate([*deep, mx.zeros((self.spec.deep, room, width), dtype)], axis=1)
        return [given[name] for name in self.spec.names]

    def _numbers(self, is_picture: np.ndarray, rows: list[tuple[str, ...]]) -> np.ndarray:
        """Return the number of the picture that each token belongs to, in its row; (B, T) int32, 0 for text."""
        found = np.zeros(is_picture.shape, np.int32)
        for number, row in enumerate(rows):
            lengths = [self.table.shown[digest].tokens for digest in row]
            found[number][is_picture[number]] = np.repeat(np.arange(1, len(row) + 1), lengths)
        return found


@dataclass(frozen=True)
class UnseenPictures:
    """The pictures of a batch that a trained tower is yet to be asked about.

    Attributes:
        given: the batch's arrays that do not depend on it, by name.
        pixels: for each picture, what the tower takes, and the number of its tokens.
    """

    given: dict[str, mx.array]
    pixels: list[tuple[dict[str, mx.array], int]]


def tower_targets(tower: nn.Module, adapter: AdapterSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the layers of tower and connector that get factors, and the modules that are trained in full.

    Args:
        tower: mlx-vlm's model.
        adapter: says which.

    Raises:
        InputError: a part has no such layer.
    """
    found: dict[str, list[str]] = {"lora": [], "full": []}
    parts = {name: module for name, module in tower.named_modules() if of_tower(name)}
    for flag, way, is_connector in (
        ("--train-connector", adapter.train_connector, True),
        ("--train-vision", adapter.train_vision, False),
    ):
        if way is None:
            continue
        fits = _is_trainable if way == "full" else _is_linear
        names = [name for name, module in parts.items() if of_connector(name) == is_connector and fits(module)]
        if not names:
            raise InputError(f"{flag} {way}: this model has no linear layer there; give {flag} full")
        found[way] += names
    return tuple(found["lora"]), tuple(found["full"])


def _is_trainable(module: nn.Module) -> bool:
    return has_weights(module) and BUFFERS.isdisjoint(module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEAR)


def planned_tower_bytes(settings: TrainSettings, table: ImageTable) -> int:
    """Return the bytes of a model's tower, and of its training, by its config alone; 0 if that does not tell.

    Args:
        settings: of the run.
        table: of the pictures, as far as the data were read.

    Raises:
        InputError: a part that is to be trained has no such layer.
    """
    try:
        file = resolve_config(settings.model.model or "", settings.model.revision) / "config.json"
        config = read_json(file, "download the model again")
        tower = build_tower(config)
    except (InputError, *FOREIGN_ERRORS):
        return 0  # loading reports what is wrong with the model
    size = device.compute_dtype(settings.model.dtype).size
    stored = sum(array.size * size for name, array in arrays_of(tower).items() if not name.startswith(LANGUAGE))
    adapter = settings.adapter
    if not (adapter.train_connector or adapter.train_vision):
        return stored
    (layers, whole), modules = tower_targets(tower, adapter), dict(tower.named_modules())
    numbers = sum(value.size for path in whole for value in modules[path].values() if isinstance(value, mx.array))
    numbers += sum(adapter.rank * sum(base_dims(modules[path])) for path in layers)
    return stored + TRAINED_BYTES * numbers + kept_by_tower(config, settings, table)


def kept_by_tower(config: Mapping[str, Any], settings: TrainSettings, table: ImageTable) -> int:
    """Return the bytes that a trained tower keeps of a batch's pictures from its forward to its backward pass.

    An estimate: numbers per patch, fitted to towers of 4 and 8 blocks without checkpointing. With a frozen tower and a trained
    connector, nothing of the tower is kept.
    """
    vision, loop = config["vision_config"], settings.loop
    tokens = sum(shown.tokens for shown in table.shown.values())
    rows = [sum(table.shown[digest].tokens for digest in row) for row in table.rows]
    most = loop.batch_size * max(rows, default=0) if loop.batch_size else loop.batch_tokens or DEFAULT_BATCH_TOKENS
    width = vision.get("embed_dim") or vision["hidden_size"]
    inner = vision.get("intermediate_size") or int(vision.get("mlp_ratio", 4) * width)
    blocks = vision.get("num_hidden_layers") or vision.get("depth") or 1
    each = AT_ENDS * width + (blocks * (6 * width + 3 * inner) if settings.adapter.train_vision else 0)
    return int(min(tokens, most) * _patches_of_token(config) * each * device.compute_dtype(settings.model.dtype).size)


def _patches_of_token(config: Mapping[str, Any]) -> float:
    """Return how many patches of a picture become one token."""
    vision = config["vision_config"]
    if "spatial_merge_size" in vision:
        return vision["spatial_merge_size"] ** 2
    if "pooling_kernel_size" in vision:  # Gemma 4
        return vision["pooling_kernel_size"] ** 2
    if config.get("model_type") == "mistral3":
        return config.get("spatial_merge_size", 2) ** 2
    if "mm_tokens_per_image" in config:
        return (vision["image_size"] // vision["patch_size"]) ** 2 / config["mm_tokens_per_image"]
    return config.get("scale_factor", 1) ** 2


def image_template(tokenizer: PreTrainedTokenizerBase, folder: Path, family: Family) -> str | None:
    """Return the chat template of a model that shows pictures; None if it has no template.

    Older folders have two: that of the tokenizer for text alone, and the processor's in chat_template.json.
    """
    own = own_template(tokenizer) or family.template
    file = folder / "chat_template.json"
    if (own is None or family.place not in own) and file.is_file():
        found = read_json(file, "download the model again").get("chat_template")
        return found if isinstance(found, str) else own
    return own


def put_template(tokenizer: PreTrainedTokenizerBase, folder: Path, data: DataSettings, family: Family) -> None:
    """Give a model's tokenizer the template that shows pictures, unless the settings name another."""
    if data.chat_template is None and (template := image_template(tokenizer, folder, family)) is not None:
        tokenizer.chat_template = template
