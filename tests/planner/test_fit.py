"""What a run chooses by its memory, and what it advises where that is too little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_lora.config.load import train_settings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.models.meta import outline_for
from mlx_lora.parallel.strategy import Strategy
from mlx_lora.planner.fit import advice, fit
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.shapes import KernelTerms
from mlx_lora.trainer.fit import fit_settings
from mlx_lora.trainer.model_shape import outlined_shape
from mlx_lora.utils import device


class BesideAnother(Strategy):
    """A rank beside one that has chosen `other` tokens."""

    def __init__(self, other: int):
        super().__init__()
        self.other = other

    def everyone(self, measured: Any) -> list[Any]:
        return [measured, self.other]


def test_the_rank_with_the_least_memory_decides_an_open_batch(tiny_folder: Path):
    rows = EncodedSet.from_rows([(np.ones(40, np.int32), np.arange(40) > 0)] * 64)
    splits: Any = SimpleNamespace(train=rows, valid=None, chat_day=None)
    chosen: Any = SimpleNamespace(terms=KernelTerms())

    def batch_tokens(strategy: Strategy, **flags: object) -> int | None:
        settings = train_settings({"model": str(tiny_folder), **flags})
        shape = outlined_shape(outline_for(settings.model, device.compute_dtype()), settings)
        return fit_settings(settings, shape, splits, chosen, strategy)[0].loop.batch_tokens

    alone = batch_tokens(Strategy())
    assert alone is not None
    assert alone > 100
    assert batch_tokens(BesideAnother(100)) == 100
    assert batch_tokens(BesideAnother(2 * alone)) == alone
    assert batch_tokens(BesideAnother(100), batch_tokens=200) == 200


def test_the_advice_for_a_batch_of_examples_is_fewer_of_them(tiny_folder: Path):
    settings = train_settings({"model": str(tiny_folder), "batch_size": 32})
    shape, machine = outlined_shape(outline_for(settings.model, device.compute_dtype()), settings), this_machine("auto")

    def fits(examples: int, budget: int) -> bool:
        few = replace(settings, loop=replace(settings.loop, batch_size=examples))
        return fit(few, shape, replace(machine, working_set_bytes=budget), 200).memory.fits

    def advised(budget: int) -> str:
        return advice(settings, shape, replace(machine, working_set_bytes=budget), 200)

    least = next(budget for budget in range(10**6, 10**8, 10**5) if fits(1, budget))
    enough = next(budget for budget in range(least, 10**8, 10**5) if fits(5, budget))
    most = max(examples for examples in range(1, 32) if fits(examples, enough))
    assert advised(enough) == f"try --batch-size {most}"
    shorter = advised(least - 10**5)
    assert "--max-seq-length" in shorter
    assert "--batch-tokens" not in shorter
