"""What objectives with pictures have in common: the tower, rows with pictures, and a loss that reads them.

A row's tokens include those of its pictures (data/image_tokens.py). What the language model reads at these tokens comes from the
frozen tower (models/vision.py), once for each picture (objectives/vision_encoder.py):

    batch -> rows' pictures -> embeddings (F, D), places (B, T), and what the family needs besides -> loss

Inside `with_images` (models/image_inputs.py) the model reads embeddings in place of image tokens, and all else is the
objective's own: its loss, kernels, checkpointing and adapters. `Pictures` is a part of an objective that is asked for what rows,
plan and loss need.

With --train-connector or --train-vision, tower and connector are parts of the model, a batch has pixels in place of
embeddings, and the tower is asked inside the loss, once for each picture and step, so that gradients reach it. Nothing is
kept then, and the step is not compiled.

Shapes: B rows, T columns, F embeddings of a batch's pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import LINEAR
from mlx_lora.adapters.inject import has_weights
from mlx_lora.data.data_sets import find_sets
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.models.folder import FOREIGN_ERRORS, of_connector, of_tower, short
from mlx_lora.models.graph import (
    AHEAD,
    as_evaluated,
    as_on_gpu,
    count_memory,
    forward_peak,
    gradient_graph,
    uncollected,
)
from mlx_lora.models.image_inputs import ImageInputSpec, prepare_rotation, with_images
from mlx_lora.models.vision import (
    VisionTower,
    arrays_of,
    attach_tower,
    attached_tower,
    build_tower,
    compute_dtype,
    image_token,
    load_tower,
    open_tower,
    without_language_model,
)
from mlx_lora.objectives.vision_encoder import (
    PromptPictures,
    UnseenPictures,
    VisionEncoder,
    most_kept_bytes,
    put_template,
    tower_key,
)
from mlx_lora.planner.memory import ModelShape, NotKnown, TowerBytes, TowerShape
from mlx_lora.rollouts.rewards import reward_folders
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config
from mlx_lora.utils.parsing import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import AdapterSettings, DataSettings, TrainSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.losses.cross_entropy import Arrays
    from mlx_lora.objectives.base import BoundObjective, RunContext


# Read from a tower's graph what the pictures of a batch take in memory; nothing is computed.
#
# A trained tower keeps arrays of each picture from its forward to its backward pass, attention's scores of all pairs of patches
# among them, so that large pictures take more than their share. Its graph is listed as a block's is (trainer/fit.py),
# for one picture as large as the largest of the data, and for one of half the area: bytes per token are interpolated between
# the two sizes, which is exact for what grows with the tokens or with their square. A frozen tower keeps nothing, and its forward
# pass is counted.
#
# MLX computes the pictures of a batch side by side, so what it allocates meanwhile grows with them: it is also read for two and
# for four pictures. That counts where the connector alone is trained, and the tower before it keeps nothing.
#
# Neither is compiled, since mlx-vlm's towers read sizes of pictures while they run, so no operations are joined.

# Towers that compute each window of a picture apart have graphs that grow with the picture. Beyond this many tokens, a smaller
# one is read, and continued.
MOST_TRACED_TOKENS = 256
SEVERAL = 4  # pictures that are read together; of more, each is counted as what the last ones add
MOST_NODES = 6000  # of one picture's graph, beyond which two of them are read together
SHRINKINGS = 8  # tries to get there; some image processors make all pictures equally large

Size = tuple[int, int]


def with_tower(
    shape: ModelShape, tower: VisionTower, processor: ImageProcessor, table: ImageTable, rows_each: int
) -> ModelShape:
    """Return a run's shape with the memory that its tower takes for the pictures of its data.

    Args:
        shape: of the language model, with what is trained of the tower.
        tower: loaded or outlined; its parameters that are not frozen are trained.
        processor, table: of the pictures.
        rows_each: see `TowerShape`.
    """
    if not table.shown:
        return shape
    traced = TracedTower(tower, processor, table)
    try:
        traced.at(1, device.on_gpu())
    except NotKnown as error:
        return replace(shape, not_known=(*shape.not_known, str(error)))
    return replace(shape, tower=TowerShape(traced, traced.trained_numbers, rows_each))


@dataclass
class TracedTower:
    """The memory of a tower for the pictures of any batch of some data.

    Attributes:
        tower, processor, table: as for `with_tower`.
    """

    tower: VisionTower
    processor: ImageProcessor
    table: ImageTable
    _known: dict[tuple[Size, int, bool], TowerBytes] = field(default_factory=dict)
    _answers: dict[tuple[int, bool], TowerBytes] = field(default_factory=dict)
    _nodes: int = 0  # of one picture's graph, as far as it was read

    @cached_property
    def trained_numbers(self) -> int:
        """How many numbers of tower and connector are trained."""
        arrays = dict(tree_flatten(self.tower.model.trainable_parameters()))
        return sum(array.size for array in arrays.values())

    def at(self, rows: int, on_gpu: bool) -> TowerBytes:
        """Return the bytes for a batch of the rows whose pictures take the most.

        Args:
            rows: with different pictures.
            on_gpu: whether it is computed on a GPU.

        Raises:
            NotKnown: the tower's graph cannot be read.
        """
        case = (rows, on_gpu)
        if case not in self._answers:
            self._answers[case] = self._of_rows(rows, on_gpu)
        return self._answers[case]

    def _of_rows(self, rows: int, on_gpu: bool) -> TowerBytes:
        most = max(self._tokens(size) for size in self._sizes)
        if not self.trained_numbers:
            return TowerBytes(0, self._of_tokens(most, on_gpu).window)
        each = {tokens: self._of_tokens(tokens, on_gpu).kept for tokens in {self._tokens(one) for one in self._sizes}}
        pictures = {digest: each[shown.tokens] for digest, shown in self.table.shown.items()}
        whole = sorted((sum(pictures[digest] for digest in row) for row in self.table.rows), reverse=True)
        count = sum(sorted(map(len, self.table.rows), reverse=True)[:rows])
        return TowerBytes(sum(whole[:rows]), self._of_tokens(most, on_gpu).window * self._side_by_side(count, on_gpu))

    def _side_by_side(self, count: int, on_gpu: bool) -> float:
        """Return what so many pictures allocate while they are computed, as a multiple of what one allocates."""
        size, most = self._traced[0], SEVERAL
        one = self._read(size, 1, on_gpu).window
        if count <= 1 or not one:
            return 1.0
        if self._nodes > MOST_NODES:
            most = 2
        few, more = max(1, most // 2), min(count, most)
        found = self._read(size, more, on_gpu).window
        if count > most:
            found += (count - most) * max(0.0, found - self._read(size, few, on_gpu).window) / (most - few)
        return max(1.0, found / one)

    @cached_property
    def _sizes(self) -> set[Size]:
        return {picture.size for picture in self.table.pictures.values()}

    @cached_property
    def _traced(self) -> tuple[Size, Size]:
        """The sizes of pictures whose graphs are read: the largest of the data, or a smaller one, and half of it."""
        size = max(self._sizes, key=self._tokens)
        for _ in range(SHRINKINGS):
            if self._tokens(size) <= MOST_TRACED_TOKENS:
                break
            size = _of_area(size, 0.5)
        return size, _of_area(size, 0.5)

    def _tokens(self, size: Size) -> int:
        return self.processor.shown(size).tokens

    def _of_tokens(self, tokens: int, on_gpu: bool) -> TowerBytes:
        """Return the bytes of one picture of so many tokens."""
        large, small = (self._read(size, 1, on_gpu) for size in self._traced)
        high, low = (self._tokens(size) for size in self._traced)
        if high == low:
            return TowerBytes(large.kept * tokens / high, large.window * tokens / high)
        share = (tokens - low) / (high - low)

        def between(at_low: float, at_high: float) -> float:
            rise = at_high / high - at_low / low  # of the bytes per token; a fall does not go on beyond
            return (at_high / high + (share - 1) * (max(0.0, rise) if share > 1 else rise)) * tokens

        window = between(small.window, large.window)
        # Which moment of a pass decides changes with the size. In large pictures it is one with attention's scores.
        window = max(window, large.window * (tokens / high) ** 2) if share > 1 else window
        return TowerBytes(between(small.kept, large.kept), window)

    def _read(self, size: Size, count: int, on_gpu: bool) -> TowerBytes:
        case = (size, count, on_gpu)
        if case not in self._known:
            try:
                with as_on_gpu() if on_gpu and not device.on_gpu() else nullcontext():
                    self._known[case] = self._listed(size, count)
            except FOREIGN_ERRORS as error:
                raise NotKnown(f"the vision tower: {short(error, 100)}") from error
        return self._known[case]

    def _listed(self, size: Size, count: int) -> TowerBytes:
        """List the graph of the tower for some pictures of one size, and count its memory."""
        from PIL import Image

        model, tokens = self.tower.model, self._tokens(size)
        pixels = {name: mx.array(value) for name, value in self.processor.pixels(Image.new("RGB", size)).items()}
        pixels_bytes = count * sum(array.nbytes for array in pixels.values())
        own = dict(tree_flatten(model.parameters()))
        trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
        frozen = [name for name in own if name not in set(trained)]

        def function(varied: list[mx.array], fixed: list[mx.array]) -> list[mx.array]:
            given = zip(trained + frozen, (varied if trained else []) + fixed, strict=True)
            model.update(tree_unflatten(list(given)))
            seen = [self.tower(pixels, tokens) for _ in range(count)]
            found = [array for one in seen for array in (one.embeddings, one.deep) if array is not None]
            return found if trained else [array + varied[0] for array in found]

        was_training = model.training
        model.train(bool(trained))
        try:
            with left_unchanged(model), uncollected():
                # Of a frozen one, only the forward pass counts, and a number beside it is all that has a gradient.
                varied = [own[name] for name in trained] or [mx.zeros(1)]
                graph = gradient_graph(function, varied, [own[name] for name in frozen])
                if not trained:
                    return TowerBytes(0, forward_peak(graph, AHEAD, fuses=False) + pixels_bytes)
                found = count_memory(as_evaluated(graph), AHEAD, fuses=False)
                self._nodes = max(self._nodes, len(graph.nodes) // count)
        finally:
            model.train(was_training)
        # If the connector alone is trained, the forward pass of the tower before it may take more than the gradient.
        window = max(found.window_bytes, found.forward_bytes - found.kept_bytes)
        return TowerBytes(found.kept_bytes + pixels_bytes, window)


def _of_area(size: Size, share: float) -> Size:
    """Return the size of a picture with a share of another's area."""
    return max(1, round(size[0] * share**0.5)), max(1, round(size[1] * share**0.5))


# What is trained of a vision tower and its connector, and the tower of a model that is only planned

# Arrays of Gemma 4's tower that nobody trains: bounds of its clipped layers, and what standardizes its output.
BUFFERS = frozenset({"input_min", "input_max", "output_min", "output_max", "std_bias", "std_scale"})


def trains_tower(adapter: AdapterSettings) -> bool:
    """Return whether tower or connector are trained."""
    return bool(adapter.train_connector or adapter.train_vision)


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
        whole = way == "full"
        names = [
            name
            for name, module in parts.items()
            if of_connector(name) == is_connector
            and (has_weights(module) and BUFFERS.isdisjoint(module) if whole else isinstance(module, LINEAR))
        ]
        if not names:
            raise InputError(f"{flag} {way}: this model has no linear layer there; give {flag} full")
        found[way] += names
    return tuple(found["lora"]), tuple(found["full"])


def outlined_tower(settings: TrainSettings) -> VisionTower | None:
    """Return the tower of a model by its config alone, without weights; None if it cannot be made: loading reports why.

    Args:
        settings: of the run.
    """
    try:
        file = resolve_config(settings.model.model or "", settings.model.revision) / "config.json"
        config = read_json(file, "download the model again")
        dtype = device.compute_dtype(settings.model.dtype)
        return without_language_model(build_tower(config), config, image_token(config), dtype)
    except (InputError, *FOREIGN_ERRORS):
        return None


def frozen_tower_bytes(tower: VisionTower, deep: int, table: ImageTable, most_bytes: int) -> int:
    """Return the bytes of a tower that is not trained, and of what it saw, as far as they stay in memory.

    Args:
        tower: loaded or outlined.
        deep: how many blocks get more of a picture than its embeddings.
        table: of the pictures.
        most_bytes: that are kept of what it saw (objectives/vision_encoder.py).
    """
    floats = (a for a in arrays_of(tower.model).values() if mx.issubdtype(a.dtype, mx.floating))
    of_token = tower.width * max(floats, key=lambda array: array.size).dtype.size * (1 + deep)
    return tower.size_bytes + min(most_bytes, of_token * sum(shown.tokens for shown in table.shown.values()))


# What objectives with pictures have in common: the tower, rows with pictures, and a loss that reads them


class Pictures:
    """Reads rows with pictures, and lets an objective compute its loss of them.

    Attributes:
        table: of the pictures of all rows.
    """

    def __init__(self, options: ObjectiveSettings):
        self.table = ImageTable.empty()
        self.asked = f"--objective {options.objective} with pictures"
        self._options = options
        self._eyes: VisionEncoder | None = None
        self._token: int | None = None  # of pictures, as far as it is known
        self._processor: ImageProcessor | None = None  # of the rows that were read
        self._outlines: dict[str, VisionTower | None] = {}  # of plans, by dtype
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

    # Before the run

    def open(self, ctx: RunContext, trains_prompts: bool) -> None:
        """Load the tower, and let the base take the positions of pictures.

        Raises:
            InputError: the model sees no pictures, or it cannot be trained like this.
        """
        adapter, base = ctx.settings.adapter, ctx.base
        reasons = {"--no-mask-prompt": not ctx.settings.data.mask_prompt, self.asked: trains_prompts}
        if ImageInputSpec.of(base.config).prompt and any(reasons.values()):
            raise InputError(
                f"{next(flag for flag, holds in reasons.items() if holds)} with a {base.config.get('model_type')} "
                "model: the tokens of its prompts see those that follow, so they cannot be trained; leave it out, or choose "
                "another"
            )
        trains = ctx.trains and trains_tower(adapter)
        # A tower that is measured may be an adapter's, which is put on later.
        tower = open_tower(base) if trains or not ctx.trains else load_tower(base.folder, compute_dtype(base))
        self._eyes = VisionEncoder.of(base, ctx.settings.data, self.table, tower, trains)
        if trains:
            self._layers, self._whole = tower_targets(tower.model, adapter)

    def check_sampling(self, ctx: RunContext) -> None:
        """Refuse what answers about pictures cannot be sampled with, or rewarded by.

        Raises:
            InputError: the model's prompts see themselves, or a reward is a model of text.
        """
        if folders := reward_folders(self._options):
            raise InputError(
                f"--reward {folders[0]} with pictures: a reward model reads text alone; give a function, or another reward"
            )
        if ImageInputSpec.of(ctx.base.config).prompt:
            raise InputError(
                f"{self.asked} with a {ctx.base.config.get('model_type')} model: several answers to a prompt that sees itself "
                "cannot be sampled together; choose another model, or --objective dpo"
            )

    @property
    def compiles(self) -> bool:
        """Whether a step may be compiled: a trained tower reads the sizes of pictures while it runs."""
        return not self.vision.trained

    def adapted(self, adapter: AdapterSettings) -> AdapterSettings:
        """Return the settings by which the base is adapted, with what --train-connector and --train-vision name."""
        layers, whole = self._layers, self._whole
        if adapter.method == "full":  # whose targets are trained in full
            layers, whole = whole, ()
        saved = ",".join(filter(None, (adapter.modules_to_save, *whole)))
        return replace(
            adapter, target_modules=",".join((adapter.target_modules, *layers)), modules_to_save=saved or None
        )

    def outlined(self, model: nn.Module, settings: TrainSettings) -> AdapterSettings:
        """Return the settings by which a model without weights is adapted for a plan; it gets the tower if that is trained.

        Raises:
            InputError: a part that is to be trained has no such layer.
        """
        adapter = settings.adapter
        tower = outlined_tower(settings) if trains_tower(adapter) else None
        if tower is None:
            return adapter
        attach_tower(model, tower)
        self._layers, self._whole = tower_targets(tower.model, adapter)
        return self.adapted(adapter)

    def settle(self, ctx: RunContext) -> None:
        """Leave out the kept output of frozen blocks, which would know no pictures, and say what is seen, and trained of the tower."""
        ctx.settings = replace(ctx.settings, loop=replace(ctx.settings.loop, cache_trunk="off"))
        adapter, size = ctx.settings.adapter, f"{self.vision.tower.size_bytes / 1e6:.0f} MB"
        words = "tower frozen"
        if self.vision.trained:
            ways = {"connector": adapter.train_connector, "tower": adapter.train_vision}
            words = ", ".join(f"{part} {'frozen' if way is None else f'trained ({way})'}" for part, way in ways.items())
        ctx.record.about.append(f"{words}, {size}")
        ctx.record.identity["pictures"] = self.vision.identity()
        ctx.record.lines.append(self.vision.words())

    def tower_bytes(self, settings: TrainSettings) -> int:
        """Return the bytes of a tower that is not a part of the model, and of what it saw, as far as they stay in memory."""
        tower = None if trains_tower(settings.adapter) else self._tower(settings)
        if tower is None:  # tower and connector are among the model's own parameters
            return 0
        deep = 0 if self._processor is None else ImageInputSpec.of(self._processor.config).deep
        return frozen_tower_bytes(tower, deep, self.table, most_kept_bytes())

    def added_to(self, shape: ModelShape, settings: TrainSettings, model: nn.Module) -> ModelShape:
        """Return a run's shape with what the tower takes of the pictures that were read.

        Args:
            shape, settings: of the run.
            model: the adapted one, with weights or without.
        """
        tower = attached_tower(model) if trains_tower(settings.adapter) else self._tower(settings)
        if tower is None or self._processor is None:
            return shape
        return with_tower(shape, tower, self._processor, self.table, settings.objective.trained_rows_per_example)

    def _tower(self, settings: TrainSettings) -> VisionTower | None:
        """Return the tower that is not trained, or one without weights if none is loaded."""
        if self._eyes is not None:
            return self._eyes.tower
        if settings.model.dtype not in self._outlines:
            self._outlines[settings.model.dtype] = outlined_tower(settings)
        return self._outlines[settings.model.dtype]

    # Rows

    def reader(
        self, folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, data: DataSettings
    ) -> ImageReader:
        """Return what turns the pictures below the data's folders into tokens.

        Args:
            folder: of the model.
            config: its config.json.
            tokenizer: gets the template that shows pictures.
            data: names the files.
        """
        processor = ImageProcessor(folder, config, data.max_pixels) if self._eyes is None else self._eyes.processor
        files = [file.path for one in find_sets(data.data or "") for files in one.splits.values() for file in files]
        roots = list(dict.fromkeys(path.parent for path in files))
        self._token, self._processor = image_token(config), processor
        put_template(tokenizer, folder, data, processor.family)
        return ImageReader(processor, roots, self.table, self._token)

    def untrained(self, rows: EncodedSet) -> EncodedSet:
        """Return rows in which no token of a picture is a target."""
        return rows if self._token is None else replace(rows, mask=rows.mask & (rows.tokens != self._token))

    def of_row(self, number: int | None) -> PromptPictures | None:
        """Return the pictures of a row; None: it has none.

        Args:
            number: that the row has for its pictures (`EncodedSet.pictures`); None: it has no pictures.
        """
        digests = self.table.rows[number] if number is not None else ()
        return PromptPictures(self.vision, digests) if digests else None

    # The loss

    def shown_to(self, bound: BoundObjective, model: nn.Module) -> BoundObjective:
        """Return an objective's loss on a model which sees the pictures of a batch."""
        prepare_rotation(model, self.vision.spec)
        return bound.within(self._with_batch, "pictures", self.arrays_of)

    def arrays_of(self, batch: Batch) -> Sequence[mx.array] | UnseenPictures:
        """Return the arrays of a batch's pictures."""
        rows = self.table.of_numbers(batch.columns.get("pictures"), len(batch.inputs))
        prompts = batch.mask.argmax(axis=1) + 1  # up to the first trained target
        return self.vision.arrays(batch.inputs, rows, prompts)

    def _with_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of a model and a batch's arrays whose model reads the batch's pictures."""
        vision = self.vision

        def call(model: nn.Module, arrays: Arrays) -> Any:
            with with_images(model, vision.spec, vision.shown(arrays["pictures"])):
                return function(model, arrays)

        return call

    @contextmanager
    def shown(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Let a model read the pictures of a batch inside the context."""
        prepare_rotation(model, self.vision.spec)
        with with_images(model, self.vision.spec, self.vision.shown(self.arrays_of(batch))):
            yield

    @contextmanager
    def of_plain_base(self, ctx: RunContext) -> Iterator[None]:
        """Look with the plain base's tower inside the context, where an adapter is measured that may have another."""
        own = self.vision
        if not ctx.trains:
            self._eyes = own.with_tower(open_tower(ctx.plain_base))
        yield
        self._eyes = own

    @property
    def facts(self) -> list[Any]:
        """What numbers that were computed with the pictures depend on, as JSON values."""
        return [self.vision.identity(), tower_key(self.vision.tower, self.vision.processor)]
