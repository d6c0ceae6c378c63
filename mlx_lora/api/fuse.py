"""Fold an adapter into its base as one model folder, in the way of rounding that keeps most of what the adapter learned.

A quantized base is rounded again, and no rule says beforehand which rounding is best: on a new grid for the sum of base
and update, all weights are rounded once more, and on the base's own grid, updates below half a step are lost. So without
a flag that chooses, layers are compensated if the rows that the adapter was trained on are on this disk. Where weights are
rounded each for itself (without these rows; experts and embeddings), the base's own grid is tried, then if too little is
kept a new one (with a budget of bits, in the other order), and the better of the two is what is left in the folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_lora.adapters.base import LINEAR
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.api.fused_gain import FADED, Gain, GainMeter, calibration_tokens
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.fuse import Rounding, Survival, is_rounded, write_fused
from mlx_lora.exporters.rounding import Budget, CalibrationTokens
from mlx_lora.exporters.sentence_transformers import write_form
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base, load_base
from mlx_lora.objectives.text_vectors import form_of_run
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import place_beside, replacing_folder

# A larger error of rounding, relative to the update, is not taken for harmless without measuring.
HARMLESS = 0.05
FINE_BITS = 8  # from so many bits on, rounding each weight for itself loses little


@dataclass(frozen=True)
class FuseSettings:
    """What is written, and how.

    Attributes:
        out: folder.
        dequantize: make the whole model float.
        bits: of the fused layers of a quantized base; None: its own.
        compensate: round for the outputs of the layers; None: where the run's rows are on this disk.
        rows: for that, as `evaluate --data` takes them; None: the run's.
        budget: bytes that the model may take; None: layers keep their bits.
        data: rows to measure on; None: what the run held out.
        force: replace an existing model folder.
    """

    out: Path
    dequantize: bool = False
    bits: int | None = None
    compensate: bool | None = None
    rows: str | None = None
    budget: Budget | None = None
    data: str | None = None
    force: bool = False

    @property
    def rounding(self) -> Rounding:
        """What was asked for, without the tokens that it takes."""
        return Rounding(self.dequantize, self.bits, compensate=bool(self.compensate), budget=self.budget)


@dataclass(frozen=True)
class Fused:
    """A fused model that was written.

    Attributes:
        model_id: of the base.
        full: how many parameters were trained in full.
        rounding: of the model that is in the folder.
        survival: by layer.
        gain: what was measured; None: nothing needed to be.
    """

    model_id: str
    full: int
    rounding: Rounding
    survival: dict[str, Survival]
    gain: Gain | None = None

    def summary(self) -> dict[str, Any]:
        """Return the rounding error relative to the update, of the mean and of the worst layer, and the bits."""
        if not self.survival:
            return {"layers": 0, "bits": None, "error_mean": 0.0, "error_most": 0.0, "most_layer": None}
        most = max(self.survival, key=lambda path: self.survival[path].error)
        return {
            "layers": len(self.survival),
            "bits": min((s.bits for s in self.survival.values() if s.bits), default=None),
            "error_mean": sum(s.error for s in self.survival.values()) / len(self.survival),
            "error_most": self.survival[most].error,
            "most_layer": most,
        }


def fuse(model: ModelSettings, adapter: Path, asked: FuseSettings, ignore_fingerprint: bool = False) -> Fused:
    """Write the base with the adapter folded in, and measure how much of what the adapter learned is in it.

    Args:
        model: the base.
        adapter: its folder.
        asked: what is written, and how.
        ignore_fingerprint: as for load_adapter.

    Raises:
        InputError: an argument cannot be used.
        RunError: the written model cannot be read back.
    """
    ways: list[Rounding] = []
    if adapter.resolve().is_relative_to(asked.out.resolve()):
        raise InputError(f"--out {asked.out}: holds the adapter {adapter}; give another folder")

    def write(out: Path, number: int, *, force: bool) -> tuple[Fused, bool]:
        """Write the model rounded in one of the ways, and return what was written and whether it predicts tokens."""
        base = load_base(model)  # again for each way: writing changes it
        info = load_adapter(base, adapter, ignore_fingerprint, scores=None)
        if info.chat_template:  # rows are measured with it, and layers rounded for them
            base.hf_tokenizer.chat_template = info.chat_template
        scores, form = SCORE_WEIGHT in info.full, form_of_run(base, adapter)
        if asked.data and (scores or form):
            what, objective = ("a reward model has", "reward") if scores else ("embeddings have", "embed")
            raise InputError(
                f"--data: {what} no loss on answers; leave it out, and use evaluate --objective {objective}"
            )
        ways.extend([] if ways else ways_to_round(base, adapter, asked))
        survival = write_fused(base, out, info, ways[number], force=force, keep_dtype=model.dtype != "auto")
        if form:
            write_form(out, form, base.hf_tokenizer)
        return Fused(base.model_id, len(info.full), ways[number], survival), not (scores or form)

    def read(out: Path) -> Base:
        return load_base(replace(model, model=str(out), revision=None, bits=None))

    best, predicts = write(asked.out, 0, force=asked.force)
    if not predicts or not (asked.data or best.summary()["error_mean"] > HARMLESS):
        return best
    meter = GainMeter.of_adapter(model, adapter, asked.data, ignore_fingerprint)
    best = replace(best, gain=meter.compare(read(asked.out)))
    for number in range(1, len(ways)):
        if best.gain is not None and best.gain.kept is not None and best.gain.kept >= FADED:
            break
        with TemporaryDirectory(prefix=f".{asked.out.name}.", dir=place_beside(asked.out)) as folder:
            out = Path(folder) / asked.out.name
            other, _ = write(out, number, force=False)
            other = replace(other, gain=meter.compare(read(out)))
            if _keeps_more(other.gain, best.gain):
                with replacing_folder(asked.out) as place:
                    for file in out.iterdir():
                        file.rename(place / file.name)
                best = other
    return best


def ways_to_round(base: Base, adapter: Path, asked: FuseSettings) -> list[Rounding]:
    """Return the ways of rounding that are tried, the likely best one first.

    Args:
        base: adapted.
        adapter: its folder.
        asked: what is written, and how.

    Raises:
        InputError: the base cannot be rounded as asked.
    """
    way = asked.rounding
    way.check(base)
    layers = [layer for layer in adapter_layers(base.model).values() if is_rounded(layer, way)]
    bits = asked.bits or min((layer.base.bits for layer in layers), default=FINE_BITS)
    linear = [layer for layer in layers if layer.OVER is LINEAR]
    if asked.compensate or asked.budget:
        tokens = calibration_tokens(base, adapter, asked.rows)
        if isinstance(tokens, str):
            flag = "--compensate" if asked.compensate else "--bits-budget"
            instead = " instead of --no-compensate" if asked.compensate is False else ""
            raise InputError(f"{flag}: needs rows like those of the run, and {tokens}; give --compensate FILE{instead}")
        way = replace(way, tokens=tokens, compensate=asked.compensate is not False)
    elif linear and bits < FINE_BITS and asked.compensate is None:
        tokens = calibration_tokens(base, adapter, None)
        if isinstance(tokens, CalibrationTokens):
            way = replace(way, compensate=True, tokens=tokens)
    plain = [layer for layer in layers if not way.compensate or layer.OVER is not LINEAR]
    if (asked.bits or 0) >= FINE_BITS or not any(layer.base.mode == "affine" for layer in plain):
        return [way]
    grids = [way, replace(way, new_grid=True)]
    return grids[::-1] if way.budget and not way.compensate else grids  # more bits make a new grid's error smaller


def _keeps_more(one: Gain | None, other: Gain | None) -> bool:
    """Tell whether a fused model is closer to the adapted one than another: by its loss, on texts of its run."""
    if one is None or other is None:
        return False
    if other.kept is None and one.kl is not None and other.kl is not None:
        return one.kl < other.kl
    return one.loss_fused < other.loss_fused
