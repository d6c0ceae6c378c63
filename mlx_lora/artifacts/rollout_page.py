"""What a run's page shows of sampled answers: curves, and the answers to fixed prompts at every validation.

answers.jsonl has one line for each fixed prompt at each validation: `step`, `number`, `prompt`, `answer`, `length`,
`truncated`, `reward`, `rewards`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.artifacts.plots import Series, number
from mlx_lora.system.files import replacing_file

ANSWERS_FILE = "answers.jsonl"
MOST_PROMPTS, MOST_VALIDATIONS = 3, 10  # on the page
MOST_CHARACTERS, MOST_OF_TURN = 600, 800  # of an answer, and of a prompt's turn, on the page
MOST_REWARDS = 12  # charts of single rewards

Record = dict[str, Any]
Chart = tuple[str, list[Series], str, bool]


@dataclass(frozen=True)
class ShownAnswer:
    """One row of a prompt's table.

    Attributes:
        step: of the validation.
        reward: the sum, as text.
        own: (name, value as text) of each reward, if there are several.
        text: of the answer, of bounded length.
        about: how long the whole answer is.
    """

    step: str
    reward: str
    own: list[tuple[str, str]]
    text: str
    about: str


@dataclass(frozen=True)
class ShownPrompt:
    """A fixed prompt, as (role, content) of each turn, with its answers in the order of the validations."""

    turns: list[tuple[str, str]]
    answers: list[ShownAnswer]


def keep_answers(file: Path, resumed_at: int | None) -> None:
    """Begin the file of a run.

    Args:
        file: answers.jsonl.
        resumed_at: keep the lines up to this step; None: none.
    """
    if resumed_at is None:
        file.unlink(missing_ok=True)
        return
    kept = [record for record in read_answers(file) if record["step"] <= resumed_at]
    if file.exists():
        with replacing_file(file) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8", errors="replace")


def add_answers(file: Path, step: int, answers: Sequence[Record]) -> None:
    """Append the answers of one validation."""
    with file.open("a", encoding="utf-8", errors="replace") as out:
        out.writelines(_line({"step": step, "number": place, **one}) for place, one in enumerate(answers))


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def read_answers(file: Path) -> list[Record]:
    """Return the lines of answers.jsonl that are whole; none without the file."""
    found = []
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and {"prompt", "answer"} <= record.keys():
            found.append(record)
    return found


def shown_answers(records: Sequence[Record]) -> list[ShownPrompt]:
    """Return what the page shows: of each prompt at most ten validations, the first and the last among them."""
    by_prompt: dict[str, list[Record]] = {}
    for record in records:
        by_prompt.setdefault(json.dumps(record["prompt"], default=str), []).append(record)
    # A resumed run whose data differ has other prompts; the last ones are shown.
    latest = sorted(by_prompt.values(), key=lambda one: one[-1]["step"])[-MOST_PROMPTS:]
    latest.sort(key=lambda one: one[-1].get("number", 0))
    return [ShownPrompt(_turns(one[0]["prompt"]), [_shown(record) for record in _thinned(one)]) for one in latest]


def _turns(prompt: Any) -> list[tuple[str, str]]:
    """Return a prompt, a text or messages, as (role, content)."""
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return [
        (str(turn.get("role", "")).capitalize(), _cut(str(turn.get("content", "")), MOST_OF_TURN)) for turn in turns
    ]


def _thinned(records: list[Record]) -> list[Record]:
    if len(records) <= MOST_VALIDATIONS:
        return records
    places = [round(place * (len(records) - 1) / (MOST_VALIDATIONS - 1)) for place in range(MOST_VALIDATIONS)]
    return [records[place] for place in places]


def _shown(record: Record) -> ShownAnswer:
    own = record.get("rewards") or {}
    size = f"{record.get('length', 0):,} {'token' if record.get('length') == 1 else 'tokens'}"
    return ShownAnswer(
        f"{record['step']:,}",
        _value(record.get("reward")),
        [(name, _value(value)) for name, value in own.items()] if len(own) > 1 else [],
        _cut(record["answer"].strip(), MOST_CHARACTERS) or "(empty text)",
        f"{size}, cut off" if record.get("truncated") else size,
    )


def _value(value: float | None) -> str:
    return "–" if value is None else number(round(value, 3))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} ..."


def first_and_kept(records: Sequence[Record], kept_step: int | None) -> list[tuple[Record, Record]]:
    """Return the first answer to each prompt, and the one at the step whose adapter is kept; None: at the last step."""
    step = records[-1]["step"] if records and kept_step is None else kept_step
    last = [record for record in records if record["step"] == step]
    return [(next(one for one in records if one["prompt"] == end["prompt"]), end) for end in last]


def rollout_charts(records: list[Record], of: Callable[..., Series]) -> list[Chart]:
    """Return charts of what an objective reports that samples answers; none for other runs.

    Args:
        records: of metrics.jsonl.
        of: makes a series of a legend's name, a metric, and the records that have it.
    """
    trained, held_out = ([r for r in records if r[key] is not None and "length" in r] for key in ("loss", "val_loss"))
    rewarded = any("reward" in r for r in trained + held_out)
    own = dict.fromkeys(name for r in records for name in r if name.startswith("reward/"))
    wanted = [("Reward", "reward", False)]
    wanted += [(f"Reward: {name.removeprefix('reward/')}", name, False) for name in list(own)[:MOST_REWARDS]]
    wanted += [
        ("Spread of a prompt's rewards", "reward_std", True),
        ("Prompts whose answers all have the same reward", "frac_reward_zero_std", True),
        ("Tokens of an answer", "length", True),
        ("Answers cut at --max-new-tokens", "truncated", True),
        *([("Divergence from the untrained model", "kl", True)] if rewarded else []),  # else from a teacher
        ("Ratios beyond --epsilon", "clipped", True),
        ("Share of the time in rollouts", "rollout_share", True),
    ]
    charts = []
    for title, name, from_zero in wanted:
        having = [
            (when, [r for r in rows if r.get(name) is not None])
            for when, rows in (("training", trained), ("held out", held_out))
        ]
        if from_zero and not any(r[name] for _, rows in having for r in rows):
            continue  # nothing but zeros, as of a divergence that is not measured
        series = [of(when, name, rows) for when, rows in having if rows]
        charts += [(title, series, "", from_zero)] if series else []
    return charts
