"""What objectives with pictures have in common: the tower, rows with pictures, and a loss that reads them.

A row's tokens include those of its pictures (data/image_tokens.py). What the language model reads at these tokens comes from the
frozen tower (models/vision.py), once for each picture (objectives/image_features.py):

    batch -> rows' pictures -> embeddings (F, D), places (B, T), and what the family needs besides -> loss

Inside `with_images` (models/image_inputs.py) the model reads embeddings in place of image tokens, and all else is the
objective's own: its loss, kernels, checkpointing and adapters. So the class here is a mix-in, which stands before the class of
an objective for text:

    VisionSFT         imitation                                  objectives/vision_sft.py
    VisionPreference  dpo, orpo, simpo, cpo, kto                 objectives/vision_preference.py
    VisionPolicy      grpo, rloo                                 objectives/vision_policy.py

With --train-connector or --train-vision, tower and connector are parts of the model, a batch has pixels in place of
embeddings, and the tower is asked inside the loss, once for each picture and step, so that gradients reach it. Nothing is
kept then, and the step is not compiled.

Shapes: B rows, T columns, F embeddings of a batch's pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora.data.files import find_sets
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable
from mlx_lora.data.load import DataSplits, Seen, load_data, load_eval_set
from mlx_lora.models.image_inputs import ImageInputSpec, prepare_rotation, with_images
from mlx_lora.models.vision import (
    VisionTower,
    attach_tower,
    attached_tower,
    compute_dtype,
    image_token,
    load_tower,
    open_tower,
)
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext
from mlx_lora.objectives.image_features import most_kept_bytes
from mlx_lora.objectives.picture_texts import PromptPictures
from mlx_lora.objectives.tower_memory import with_tower
from mlx_lora.objectives.tower_training import frozen_tower_bytes, outlined_tower, tower_targets, trains_tower
from mlx_lora.objectives.vision_encoder import VisionEncoder, put_template
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from datetime import date

    from transformers import PreTrainedTokenizerBase

    from mlx_lora.config.settings import AdapterSettings, DataSettings, TrainSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.losses.cross_entropy import Arrays, Loss
    from mlx_lora.planner.shapes import ModelShape


@dataclass(eq=False)
class WithPictures(Objective):
    """Reads rows with pictures, and computes another objective's loss of them."""

    def __post_init__(self) -> None:
        self.table = ImageTable.empty()
        self._eyes: VisionEncoder | None = None
        self._attached = False  # whether the tower is a part of the model
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

    @property
    def asked(self) -> str:
        """How users ask for this objective."""
        return f"--objective {self.name}" + ("" if self.name == "vision_sft" else " with --images")

    @property
    def shares_prompts(self) -> bool:
        """False: each answer has a row of its own, with the pictures of its prompt."""
        return False

    # Before the run

    def open(self, ctx: RunContext) -> None:
        """Load the tower, and let the base take the positions of pictures.

        Raises:
            InputError: the model sees no pictures, or processes divide it.
        """
        self._check(ctx)
        adapter, base = ctx.settings.adapter, ctx.base
        trains = ctx.trains and trains_tower(adapter)
        self._attached = trains or not ctx.trains  # a tower that is measured may be an adapter's, which is put on later
        tower = open_tower(base) if self._attached else load_tower(base.folder, compute_dtype(base))
        self._eyes = VisionEncoder.of(ctx.base, ctx.settings.data, self.table, tower, trains)
        self.compiles = not trains
        if trains:
            self._layers, self._whole = tower_targets(tower.model, adapter)
        super().open(ctx)

    def _check(self, ctx: RunContext) -> None:
        """Refuse what pictures cannot be combined with.

        Raises:
            InputError: with the reason.
        """
        if ctx.strategy.divides_base:
            raise InputError(
                f"{self.asked} with a divided base: only whole bases see pictures; leave out --shard-base and --offload-base"
            )
        trains_prompt = {"--no-mask-prompt": not ctx.settings.data.mask_prompt, self.asked: self.likelihood == "rows"}
        if ImageInputSpec.of(ctx.base.config).prompt and any(trains_prompt.values()):
            raise InputError(
                f"{next(flag for flag, asked in trains_prompt.items() if asked)} with a {ctx.base.config.get('model_type')} "
                "model: the tokens of its prompts see those that follow, so they cannot be trained; leave it out, or choose "
                "another"
            )

    def adapted(self, adapter: AdapterSettings) -> AdapterSettings:
        """Add what --train-connector and --train-vision name; see `Objective.adapted`."""
        layers, whole = self._layers, self._whole
        if adapter.method == "full":  # whose targets are trained in full
            layers, whole = whole, ()
        saved = ",".join(filter(None, (adapter.modules_to_save, *whole)))
        return replace(
            adapter, target_modules=",".join((adapter.target_modules, *layers)), modules_to_save=saved or None
        )

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """Return the settings without the kept output of frozen blocks, which would know no pictures."""
        settings = super().settled(settings)
        return replace(settings, loop=replace(settings.loop, cache_trunk="off"))

    def other_models_bytes(self, settings: TrainSettings) -> int:
        """Return the bytes of a tower that is not a part of the model, and of what it saw, as far as they stay in memory."""
        others = super().other_models_bytes(settings)
        tower = None if trains_tower(settings.adapter) else self._tower(settings)
        if tower is None:  # tower and connector are among the model's own parameters
            return others
        deep = 0 if self._processor is None else ImageInputSpec.of(self._processor.config).deep
        return others + frozen_tower_bytes(tower, deep, self.table, most_kept_bytes())

    def outlined(self, model: nn.Module, settings: TrainSettings) -> AdapterSettings:
        """Put the tower on a model without weights if it is to be trained; see `Objective.outlined`.

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

    def with_pictures(self, shape: ModelShape, settings: TrainSettings, model: nn.Module) -> ModelShape:
        """Add what the tower takes of the pictures; see `Objective.with_pictures`."""
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

    def header_words(self, plan: BatchPlan, ctx: RunContext) -> list[str]:
        """Return words on the tower for the run's header."""
        words = super().header_words(plan, ctx)
        adapter, size = ctx.settings.adapter, f"{self.vision.tower.size_bytes / 1e6:.0f} MB"
        if not self.vision.trained:
            return [*words, f"tower frozen, {size}"]
        ways = {"connector": adapter.train_connector, "tower": adapter.train_vision}
        trained = ", ".join(f"{part} {'frozen' if way is None else f'trained ({way})'}" for part, way in ways.items())
        return [*words, f"{trained}, {size}"]

    # Rows

    def read_data(self, ctx: RunContext, data: DataSettings, teacher_prompt: str | None = None) -> DataSplits:
        """Read rows that may have pictures; see `Objective.read_data`."""
        reader, tokenizer = self.reader(data, self.vision.processor, ctx.base.config), ctx.base.hf_tokenizer
        put_template(tokenizer, ctx.base.folder, data, reader.processor.family)
        splits = load_data(data, tokenizer, ctx.settings.loop.seed, ctx.today, self.records, Seen(pictures=reader))
        ctx.record.identity["pictures"] = self.vision.identity()
        ctx.record.lines.append(self.vision.words())
        return splits.changed(lambda sets: {name: self.targets_of(rows) for name, rows in sets.items()})

    def read_set(self, ctx: RunContext, data: DataSettings) -> EncodedSet:
        """Read one set to measure; see `Objective.read_set`."""
        reader = self.reader(data, self.vision.processor, ctx.base.config)
        put_template(ctx.base.hf_tokenizer, ctx.base.folder, data, reader.processor.family)
        return load_eval_set(data.data or "", data, ctx.base.hf_tokenizer, self.records, Seen(pictures=reader))

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
        reader = self.reader(data, ImageProcessor(folder, config, data.max_pixels), config)
        put_template(tokenizer, folder, data, reader.processor.family)
        return load_data(data, tokenizer, settings.loop.seed, today, self.records, Seen(pictures=reader))

    def reader(self, data: DataSettings, processor: ImageProcessor, config: dict[str, Any]) -> ImageReader:
        """Return what turns the pictures below the data's folders into tokens.

        Args:
            data: names the files.
            processor: of the model.
            config: config.json of the model.
        """
        files = [file.path for one in find_sets(data.data or "") for files in one.splits.values() for file in files]
        roots = list(dict.fromkeys(path.parent for path in files))
        self._token, self._processor = image_token(config), processor
        return ImageReader(processor, roots, self.table, self._token)

    def targets_of(self, rows: EncodedSet) -> EncodedSet:
        """Return rows with the objective's targets, of which no token of a picture is one.

        A plan's objective has not read the rows itself, and counts pictures in prompts that are trained.
        """
        found = super().targets_of(rows)
        if found.mask is rows.mask or self._token is None or self.likelihood != "rows":
            return found
        return replace(found, mask=found.mask & (found.tokens != self._token))

    def pictures_of(self, number: int | None) -> PromptPictures | None:
        """Return the pictures of a row; see `Objective.pictures_of`."""
        digests = self.table.rows[number] if number is not None else ()
        return PromptPictures(self.vision, digests) if digests else None

    # The loss

    def bind(self, loss: Loss, model: nn.Module) -> BoundObjective:
        """Return the objective's loss on a vision-language model; see `Objective.bind`."""
        prepare_rotation(model, self.vision.spec)
        bound = super().bind(loss, model)
        loss, given = bound.loss, self._with_batch
        seen = replace(
            loss,
            train=given(loss.train),
            measure=given(loss.measure),
            tokens=given(loss.tokens),
            measure_tokens=None if loss.measure_tokens is None else given(loss.measure_tokens),
        )

        def arrays_of(batch: Batch) -> Arrays:
            return bound.arrays_of(batch) | {"pictures": self.arrays_of(batch)}

        whole = None if bound.whole_set is None else bound.whole_set.above(given)
        return replace(bound, loss=seen, arrays_of=arrays_of, whole_set=whole)

    def arrays_of(self, batch: Batch) -> list[Any]:
        """Return the arrays of a batch's pictures."""
        rows = self.table.of_numbers(batch.pictures, len(batch.inputs))
        prompts = batch.mask.argmax(axis=1) + 1  # up to the first trained target
        return list(self.vision.arrays(batch.inputs, rows, prompts))

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

    def look_with(self, tower: VisionTower) -> None:
        """Take another state of the tower from here on; what was seen before is not used again."""
        self._eyes = self.vision.with_tower(tower)
