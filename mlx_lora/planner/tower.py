"""What the vision tower of a run holds in memory, and when.

A trained tower sees the pictures of a batch before the language model reads them, and is differentiated after it: what it keeps is
in memory all that time. A frozen one sees one picture at a time, before the batch, and keeps nothing. The numbers are read
from the tower's graph (objectives/tower_memory.py).
"""

from __future__ import annotations

from mlx_lora.planner.shapes import Machine, ModelShape, RunShape, TowerBytes, TowerShape

SINGLE = 4  # bytes of a float32


def pictures_kept(tower: TowerShape | None, run: RunShape, machine: Machine) -> dict[str, int]:
    """Return the bytes that a trained tower keeps of a batch's pictures, by the name of the part; nothing if it is frozen."""
    kept = int(_bytes_of(tower, run, machine).kept)
    return {"pictures": kept} if kept else {}


def tower_phase(shape: ModelShape, run: RunShape, machine: Machine) -> dict[str, dict[str, int]]:
    """Return the phase in which the tower decides, and its parts beside what is held and what `pictures_kept` says.

    Its backward pass is `tower`, which begins when the blocks' gradients are there; the forward pass of a frozen one is `pictures`.
    """
    found = _bytes_of(shape.tower, run, machine)
    if shape.tower is None or not found.window:
        return {}
    ahead = {"work ahead": int(found.window)}
    if not shape.tower.trained:
        return {"pictures": ahead}
    # Its own gradients are part of the window, unless those of earlier micro-batches are there.
    return {"tower": {"gradients": SINGLE * (shape.trained - shape.tower.trained * (not run.accumulates)), **ahead}}


def _bytes_of(tower: TowerShape | None, run: RunShape, machine: Machine) -> TowerBytes:
    if tower is None:
        return TowerBytes(0, 0)
    return tower.memory.at(-(-run.rows // tower.rows_each), machine.backend != "cpu")
