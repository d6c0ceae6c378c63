"""What a sweep tries, and how much of a run each round of it takes.

    --vary learning_rate=5e-5..2e-3     values from low to high, each about twice the one before
    --vary learning_rate=5e-5..2e-3/12  twelve values, with equal ratios
    --vary rank=8,16,32                 these values

Candidates are all combinations. Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) gives all of them a small part of a run,
a third of them three times as much, and so on, until one is left. Rounds are chosen so that they and the winner's whole run take
`budget` runs of work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lora.config.fields import field_type, flag_of, read_value
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.rules import idle_notes
from mlx_lora.config.settings import FIELDS, ROWS, DataSettings, ModelSettings, other_names
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import closest, counted

# What a sweep writes into its folder, and `--learning-rate auto` into TRIALS in the run's.
SWEEP_FILE, PAGE_FILE, WINNER = "sweep.json", "sweep.html", "winner"
TRIALS = "trials"  # a folder of short runs that are compared (trainer/sweep.py); the list of runs leaves them out
ETA = 3  # of the candidates, this share goes on, and trains this many times as long
BUDGET = 3.0  # runs of work, the winner's own run included
MOST_CANDIDATES = 256
MOST_VALUES = 64
# Settings that change a result, though a resumed run may have others.
LENGTHS = ("iters", "epochs")
# Settings that the loss depends on: candidates that differ in one have losses of different kinds.
OF_LOSS = frozenset(ObjectiveSettings.__dataclass_fields__)
# Settings of the rows and the base, which all candidates have in common.
OF_ROWS = frozenset(ModelSettings.__dataclass_fields__) | frozenset(DataSettings.__dataclass_fields__)
# Settings of a run that a sweep sets for each of its runs.
SET_BY_SWEEP = ("adapter_path", "resume", "force", "train", "test", "test_batches", "max_restarts", "short_buffers")
_EXAMPLE = "write it like learning_rate=5e-5..2e-3 or rank=8,16,32"

Candidate = dict[str, Any]


# What is varied


def read_vary(given: Sequence[str] | Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of each setting that varies.

    Args:
        given: texts as --vary takes them; or setting -> a list of values, one value, or a range as text.

    Raises:
        InputError: a text or a value that cannot be used, or too many combinations.
    """
    pairs: list[tuple[str, Any]] = []
    if isinstance(given, Mapping):
        pairs += given.items()
    else:
        for text in given:
            name, _, values = text.partition("=")
            if not name.strip() or not values.strip():
                raise InputError(f"--vary {text}: has no setting with values; {_EXAMPLE}")
            pairs.append((name, values))
    found: dict[str, list[Any]] = {}
    for name, values in pairs:
        name = name.strip().lstrip("-").replace("-", "_")
        if name == "seed":
            raise InputError("--vary seed: a sweep sets it itself; give --seeds")
        if name not in FIELDS:
            near = closest(name, FIELDS)
            advice = f"did you mean {near[0]}?" if near else "mlx-lora train --help-all lists the settings"
            raise InputError(f"--vary {name}: no such setting; {advice}")
        if name in OF_ROWS or (ROWS[name].may_change and name not in LENGTHS):
            raise InputError(
                f"--vary {name}: it does not change what a run learns from the same rows; vary another setting"
            )
        if name in found:
            raise InputError(f"--vary {name}: given twice; give it once, with all values")
        found[name] = _values(name, values)
    count = math.prod(len(values) for values in found.values())
    if count > MOST_CANDIDATES:
        raise InputError(f"--vary: {count:,} combinations; at most {MOST_CANDIDATES} are allowed, so give fewer values")
    return found


def _values(name: str, given: Any) -> list[Any]:
    """Return the values of a setting, read and without repetitions, in their order."""
    texts = given if isinstance(given, (list, tuple)) else [given]
    if isinstance(given, str):
        texts = _range(name, given) if ".." in given else [part.strip() for part in given.split(",") if part.strip()]
    read = []
    for text in texts:
        try:
            read.append(read_value(FIELDS[name], text))
        except ValueError as error:
            raise InputError(f"--vary {name}: {error}") from None
    found = list(dict.fromkeys(read))
    if not found:
        raise InputError(f"--vary {name}: has no values; {_EXAMPLE}")
    return found


def _range(name: str, text: str) -> list[float]:
    """Return the values of LOW..HIGH or LOW..HIGH/COUNT."""
    if field_type(FIELDS[name]) not in (int, float):
        raise InputError(f"--vary {name}={text}: only numbers have a range; give the values, separated by commas")
    bounds, slash, amount = text.partition("/")
    low_text, _, high_text = bounds.partition("..")
    try:
        low, high, count = float(low_text), float(high_text), int(amount) if slash else 0
    except ValueError:
        raise InputError(f"--vary {name}={text}: not a range; {_EXAMPLE}") from None
    if not (0 < low < high < math.inf):
        advice = "from a smaller to a larger number, both above 0"
        raise InputError(f"--vary {name}={text}: not a range; write it {advice}, or give values, separated by commas")
    if slash and not 2 <= count <= MOST_VALUES:
        raise InputError(f"--vary {name}={text}: {count} values; from 2 to {MOST_VALUES} are allowed")
    count = count or max(2, round(math.log2(high / low)) + 1)
    numbers = [low * (high / low) ** (n / (count - 1)) for n in range(count)]
    if field_type(FIELDS[name]) is int:
        return [round(number) for number in numbers]
    return [float(f"{number:.2e}") for number in numbers]


def candidates(vary: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """Return all combinations of the values."""
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def with_candidate(flat: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    """Return a run's settings with a candidate's instead, which also override those of the same meaning (`iters` with `epochs`)."""
    others = {other for name in candidate for other in other_names(name)}
    return {name: value for name, value in flat.items() if name not in others} | candidate


def check_varied(found: Sequence[Candidate], flat: Mapping[str, Any]) -> None:
    """Refuse to vary what has no effect on a run, or what the loss itself depends on.

    Otherwise a sweep would recommend one of several runs that are the same, or whose held-out losses mean different things.

    Args:
        found: the candidates.
        flat: all settings of a run, before anything is varied.

    Raises:
        InputError: says what to vary instead.
    """
    names = list(found[0])
    for name in names:
        if name == "objective" or (name in OF_LOSS and flat["metric_for_best_model"] == "loss"):
            advice = "vary another setting" + (
                "" if name == "objective" else ", or for preferences compare with --metric-for-best-model accuracy"
            )
            raise InputError(f"--vary {name}: changes the loss itself, so held-out losses cannot be compared; {advice}")
        if twice := other_names(name) & set(names):
            raise InputError(f"--vary {name} and {twice.pop()}: a run has only one of the two; vary one of them")
    for candidate in found:
        if idle := idle_notes({**flat, **candidate}, names):
            raise InputError(f"--vary: {idle[0]}; leave it out, or change the other setting")


def order_of(error: float, loss: float, found: Sequence[Candidate]) -> tuple[float, float]:
    """Return what a candidate is ordered by, the least first.

    Args:
        error: 1 minus the number that decides; 0 if the loss does, infinite if there is none.
        loss: on held-out rows, which decides between equal errors, if it means the same for all candidates.
        found: all candidates.
    """
    comparable = not found or OF_LOSS.isdisjoint(found[0])
    # The mean over seeds of equal numbers may differ in its last digits.
    return round(error, 9), loss if comparable or not math.isfinite(loss) else 0.0


def words(candidate: Candidate) -> str:
    """Return a candidate's settings as flags."""
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in candidate.items()}
    return " ".join(f"{flag_of(name)} {text}" for name, text in texts.items())


# How far each round goes


@dataclass(frozen=True)
class Rung:
    """A round of successive halving.

    Attributes:
        candidates: that take part.
        share: of a run's steps, up to which they are trained.
    """

    candidates: int
    share: float

    def steps(self, total: int) -> int:
        """Return the step at which a run of so many ends this round."""
        return min(total, max(1, round(self.share * total)))


def rungs(count: int, seeds: int, budget: float) -> list[Rung]:
    """Return the rounds for so many candidates.

    Args:
        count: candidates, at least two.
        seeds: runs of each.
        budget: runs of work for all rounds and the winner's whole run.

    Raises:
        InputError: the budget is too small.
    """
    if budget <= 1:
        raise InputError(
            f"--budget {budget:g}x: leaves nothing to try, since the best run alone takes 1x; give more, such as 3x"
        )
    sizes = [count]
    while (smaller := math.ceil(sizes[-1] / ETA)) > 1:
        sizes.append(smaller)
    if (budget - 1) >= count * seeds:  # all of them whole
        return [Rung(count, 1.0)]
    return _rounds(sizes, seeds, budget - 1)


def without_last_round(rounds: Sequence[Rung], seeds: int) -> list[Rung]:
    """Return one round fewer with the same work, so that each is longer."""
    return _rounds([rung.candidates for rung in rounds[:-1]], seeds, work(rounds, seeds))


def _rounds(sizes: Sequence[int], seeds: int, wanted: float) -> list[Rung]:
    """Return rounds of so many candidates, each ETA times as long as the one before or less, whose work is `wanted` whole runs."""

    def reaching(first: float, factor: float) -> list[Rung]:
        return [Rung(size, first * factor**place) for place, size in enumerate(sizes)]

    first = wanted / work(reaching(1.0, ETA), seeds)
    if first * ETA ** (len(sizes) - 1) <= 1:
        return reaching(first, ETA)
    # The last round would be longer than a run: it is a whole run, and the first one as long as the budget allows.
    low, high = 0.0, 1.0
    for _ in range(60):
        first = (low + high) / 2
        more = work(reaching(first, (1 / first) ** (1 / max(1, len(sizes) - 1))), seeds) > wanted
        low, high = (low, first) if more else (first, high)
    return reaching(low, (1 / low) ** (1 / max(1, len(sizes) - 1)))


def work(rounds: Sequence[Rung], seeds: int) -> float:
    """Return the work of some rounds in whole runs."""
    shares = [0.0, *(rung.share for rung in rounds)]
    return seeds * sum(rung.candidates * (rung.share - before) for rung, before in zip(rounds, shares, strict=False))


def read_budget(text: str | float) -> float:
    """Return the number in `3x` or `3`.

    Raises:
        InputError: there is none.
    """
    try:
        budget = float(str(text).strip().lower().removesuffix("x"))
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise InputError(f"--budget {text}: not an amount of work; write it like 3x, for three times that of one run")
    return budget


class TooShort(InputError):
    """Refuses rounds that are too short to tell candidates apart."""


def check_long_enough(rounds: Sequence[Rung], total: int, seeds: int, least: int) -> None:
    """Refuse rounds that are too short to tell candidates apart.

    Args:
        rounds: of the sweep.
        total: steps of a run.
        seeds: runs of each candidate.
        least: steps that the first round should have.

    Raises:
        TooShort: saying what would do.
    """
    if rounds[0].share * total >= least:
        return
    wanted = 1 + work(rounds, seeds) * least / (rounds[0].share * total)
    raise TooShort(
        f"--budget: {counted(rounds[0].candidates, 'candidate')} get {counted(rounds[0].steps(total), 'step')} each in the first round, "
        f"too few to tell them apart; give --budget {math.ceil(wanted)}x, fewer values, or longer runs"
    )
