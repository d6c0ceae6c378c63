"""What a run knows while it is built: its settings, its model, and what has been decided and written down so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

from mlx_lora.config.settings import TrainSettings
from mlx_lora.models.load import Base
from mlx_lora.objectives.compute import Compute
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.planner.memory import MemoryPlan

if TYPE_CHECKING:
    from mlx_lora.objectives.base import Objective


@dataclass
class RunRecord:
    """What a run's header says, and what a resumed run must have in common with its checkpoint.

    Attributes:
        identity: name -> JSON value.
        shared: name -> JSON value that all ranks must have in common, beside the identity.
        lines: header lines of the objective.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


@dataclass
class RunContext:
    """A run, or a measurement, while it is built.

    Attributes:
        settings: replaced as open settings are chosen.
        objective: of the run.
        base: the model; an adapter is put on it.
        ranks: the processes that train together.
        functions: rewards that were given in Python, by what --reward calls them.
        today: what chat templates show as today, unless --chat-date names a day; None: the day of the call.
        trains: False: an adapter is only measured.
        untrained: the model without an adapter, if `base` already has one.
        resumed: the identity of the checkpoint to go on from; None: the run begins.
        compute: what computes the numbers; None: not chosen yet.
        memory: the plan; None: not planned yet.
        record: what is said and kept.
    """

    settings: TrainSettings
    objective: Objective
    base: Base
    ranks: Ranks = ALONE
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    today: date | None = None
    trains: bool = True
    untrained: Base | None = None
    resumed: Mapping[str, Any] | None = None
    compute: Compute | None = None
    memory: MemoryPlan | None = None
    record: RunRecord = field(default_factory=RunRecord)

    @property
    def plain_base(self) -> Base:
        """The model without an adapter; until the run puts one on it, that is `base`."""
        return self.untrained or self.base

    @property
    def chosen(self) -> Compute:
        """What computes the numbers.

        Raises:
            ValueError: it is not chosen yet.
        """
        if self.compute is None:
            raise ValueError("nothing has chosen what computes the run's numbers")
        return self.compute
