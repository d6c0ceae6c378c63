"""Every row of the tables of settings refuses what it is about, and nothing less; and what a rule cannot say is refused too."""

from __future__ import annotations

import pytest

from mlx_lora.config.fields import flag_of, read_value
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import OBJECTIVES
from mlx_lora.config.rules import (
    IDLE,
    OWNERS,
    RULES,
    USUAL,
    Rule,
    given,
    holds,
    idle_notes,
    settings_problems,
)
from mlx_lora.config.settings import FIELDS, ROWS
from mlx_lora.objectives.table import objective_of
from mlx_lora.utils.errors import InputError

VALUES = (True, False, 2, 0.25, 1, 0, 64, "even", "none", "dpo", "grpo", "lora", "a=2", "a", "verifiers:a")


def value_for(name, wanted):
    """A value of a setting that a condition accepts, other than the default where there is one."""
    values = [*(wanted if isinstance(wanted, tuple) else (wanted,)), *(ROWS[name].choices or ()), *VALUES]
    found = []
    for value in values:
        try:
            read = value if callable(value) or value is None else read_value(FIELDS[name], value)
        except ValueError:
            continue
        if not callable(read) and holds(USUAL | {name: read}, name, wanted):
            found.append(read)
    return next((value for value in found if value != USUAL[name]), found[0])


def parts(rule: Rule):
    """The settings that break a rule, each alone: name, value."""
    for name, _, value in (one.partition("=") for one in rule.names):
        yield name, read_value(FIELDS[name], value) if value else value_for(name, given)


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{rule.names[0]}-{'needs' if rule.needed else 'or'}-{'-'.join(rule.when)}"
)
def test_a_rule_refuses_what_it_is_about(rule):
    others = {name: value_for(name, wanted) for name, wanted in rule.when.items()}
    for name, value in parts(rule):
        said = rule.problem(USUAL | ({} if rule.needed else others) | {name: value})
        assert said, name
        assert said.startswith(flag_of(name)) or said.startswith(flag_of(f"no_{name}"))
        shown = [one for one in others if rule.needed or others[one] != USUAL[one]]
        assert all(flag_of(one)[2:] in said for one in shown)
        assert rule.problem(USUAL | (others if rule.needed else {}) | {name: value}) is None
    if not any("=" in name for name in rule.names):
        assert rule.problem(USUAL | ({} if rule.needed else others)) is None


@pytest.mark.parametrize("name", OWNERS)
def test_an_option_is_refused_by_objectives_that_do_not_have_it(name):
    value, other = value_for(name, given), next(one for one in OBJECTIVES if one not in OWNERS[name])
    with pytest.raises(InputError) as caught:
        train_settings({"objective": other, name: value})
    assert flag_of(name) in str(caught.value)
    assert f"--objective {other}" in str(caught.value)
    assert all(owner in str(caught.value) for owner in OWNERS[name])
    problems = settings_problems(USUAL | {"objective": OWNERS[name][0], name: value})
    assert not any(
        flag_of(name) in problem and f"with --objective {OWNERS[name][0]}: only" in problem for problem in problems
    )


def test_the_objectives_of_the_rows_are_there():
    assert {owner for owners in OWNERS.values() for owner in owners} <= OBJECTIVES.keys()
    assert objective_of(train_settings({"objective": "dpo", "beta": 0.2}).objective).options.objective == "dpo"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.method])
def test_an_option_of_one_method_is_refused_with_others(name):
    value = value_for(name, given)
    with pytest.raises(InputError, match=f"{flag_of(name)}.*--method {ROWS[name].method}"):
        train_settings({name: value})
    train_settings({name: value, "method": ROWS[name].method, "rank": 1})


@pytest.mark.parametrize(("settings", "flag"), [
    ({"grad_checkpoint": "some"}, "--grad-checkpoint"),
    ({"chat_date": "26.11.2026"}, "--chat-date"),
    ({"shard_base": "3:x"}, "--shard-base"),
    ({"report_to": "wandb,mlflow"}, "--report-to"),
    ({"method": "adalora", "rank": 8, "adalora_init_rank": 4}, "--adalora-init-rank"),
    ({"rank_pattern": "q_proj"}, "--rank-pattern"),
    ({"rank_pattern": "q_proj=x"}, "--rank-pattern"),
    ({"rank_pattern": "=3"}, "--rank-pattern"),
    ({"rank_pattern": "q_proj=1.5"}, "--rank-pattern"),
    ({"alpha_pattern": "q_proj=0"}, "--alpha-pattern"),
    ({"turn_names": "speaker=x"}, "--turn-names"),
    ({"objective": "grpo", "environment": "verifiers:a", "data": "b.jsonl"}, "--environment"),
    ({"objective": "grpo", "updates_per_rollout": 4, "save_every": 6}, "--updates-per-rollout"),
])  # fmt: skip
def test_what_no_row_can_say_is_refused(settings, flag):
    with pytest.raises(InputError, match=flag):
        train_settings(settings)


@pytest.mark.parametrize("rule", IDLE, ids=lambda rule: rule.names[0])
def test_an_idle_setting_is_told_if_it_was_given(rule):
    others = {} if rule.needed else {name: value_for(name, wanted) for name, wanted in rule.when.items()}
    name = rule.names[0]
    settings = USUAL | others | {name: value_for(name, given)}
    [note] = idle_notes(settings, {name})
    assert flag_of(name) in note
    assert all(flag_of(one) in note for one in rule.when)
    assert idle_notes(settings, set()) == []
