"""Read from a tower's graph what the pictures of a batch take in memory; nothing is computed.

A trained tower keeps arrays of each picture from its forward to its backward pass, attention's scores of all pairs of patches
among them, so that large pictures take more than their share. Its graph is listed as a block's is (trainer/model_shape.py),
for one picture as large as the largest of the data, and for one of half the area: bytes per token are interpolated between
the two sizes, which is exact for what grows with the tokens or with their square. A frozen tower keeps nothing, and its forward
pass is counted.

MLX computes the pictures of a batch side by side, so what it allocates meanwhile grows with them: it is also read for two and
for four pictures. That counts where the connector alone is trained, and the tower before it keeps nothing.

Neither is compiled, since mlx-vlm's towers read sizes of pictures while they run, so no operations are joined.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.models.folder import FOREIGN_ERRORS, short
from mlx_lora.models.graph import as_on_gpu, gradient_graph, uncollected
from mlx_lora.models.liveness import AHEAD, as_evaluated, count_memory, forward_peak
from mlx_lora.planner.shapes import ModelShape, NotKnown, TowerBytes, TowerShape
from mlx_lora.utils import device

if TYPE_CHECKING:
    from mlx_lora.data.image_tokens import ImageProcessor, ImageTable
    from mlx_lora.models.vision import VisionTower

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
