"""Settings are rows: rules between them, the help, other trainers' words, and what a sweep varies."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import re
import subprocess
import sys

import pytest
from refusing import refuses
from run_cli import Ran, run

from mlx_lora.config.fields import flag_of, read_value, row_of
from mlx_lora.config.load import GONE, OTHER_NAMES, train_settings
from mlx_lora.config.objectives import OBJECTIVES
from mlx_lora.config.rules import IDLE, OWNERS, RULES, USUAL, Rule, given, holds, idle_notes, settings_problems
from mlx_lora.config.settings import FIELDS, ROWS, ServeSettings
from mlx_lora.config.sweep import (
    BUDGET,
    Rung,
    TooShort,
    candidates,
    check_long_enough,
    check_varied,
    read_budget,
    read_vary,
    rungs,
    with_candidate,
    without_last_round,
    words,
    work,
)
from mlx_lora.objectives.table import objective_of
from mlx_lora.utils.errors import InputError

# As they were when each was a table of its own: may a resumed run change it, may the ranks differ -> settings of then.
RULES_THEN = {
    (True, True): (
        "model revision trust_remote_code data strict resume_adapter_file adapter_path batch_parts max_restarts "
        "grad_checkpoint kernels memory_budget memory_check resume sample_tokens "
        "short_buffers report_to project_name force"
    ),
    (True, False): (
        "chat_date iters epochs steps_per_report steps_per_eval val_batches save_every keep keep_best "
        "early_stopping_patience early_stopping_threshold train test test_batches"
    ),
    (False, True): ("quantized_matmul chat_template"),
    (False, False): (
        "dtype data_format max_seq_length mask_prompt allow_special_tokens valid_fraction method loraplus_lr_ratio rank "
        "alpha rank_pattern alpha_pattern modules_to_save bias dropout target_modules num_layers adalora_init_rank "
        "adalora_tinit adalora_tfinal adalora_delta_t orth_reg_weight relora_every relora_warmup relora_prune_ratio "
        "optimizer learning_rate lr_schedule warmup weight_decay max_grad_norm batch_size batch_tokens "
        "grad_accumulation_steps seed"
    ),
}
ONE_METHOD = {
    "lora-plus": {"loraplus_lr_ratio"},
    "adalora": {"adalora_init_rank", "adalora_tinit", "adalora_tfinal", "adalora_delta_t", "orth_reg_weight"},
    "relora": {"relora_every", "relora_warmup", "relora_prune_ratio"},
}
SERVE = {f.name: f for f in dataclasses.fields(ServeSettings)}
ALL = FIELDS | SERVE
RANGED = [name for name, f in ALL.items() if (row_of(f).at_least, row_of(f).more_than) != (None, None)]


# Settings of earlier versions -> a value that meant something, and what the answer names.
WENT = {
    "fine_tune_type": ("dora", "'method'"),
    "length_normalize": (True, "--loss-type sigmoid_norm"),
    "rpo_alpha": (0.5, "--loss-type sigmoid,sft --loss-weights"),
    "clear_cache_threshold": ("2GB", "--memory-budget"),
}


@pytest.mark.parametrize("name", WENT)
def test_a_setting_that_went_is_answered_with_its_replacement(name):
    value, instead = WENT[name]
    for of_flags, of_file in (({name: value}, {}), ({}, {name: value})):
        refuses(f"{name}.*{re.escape(instead)}", train_settings, of_flags, of_file)
    for unchanged in GONE[name]:  # as run.yaml of an earlier version has it
        assert train_settings({}, {name: unchanged, "rank": 3}) == train_settings({"rank": 3})


def test_every_setting_that_went_has_an_answer():
    assert WENT.keys() == GONE.keys()
    assert not WENT.keys() & FIELDS.keys()
    for flag, instead in (("--rpo-alpha", "--loss-type sigmoid,sft"), ("--clear-cache-threshold", "--memory-budget")):
        ran = run("train", flag, 1)
        assert (ran.code, ran.lines[-1].count(flag), instead in ran.err) == (2, 1, True)


def test_mlx_lms_spelling_of_the_method_is_a_spelling_only():
    command = importlib.import_module("mlx_lora.cli.train").main
    option = next(one for one in command.params if one.name == "method")
    assert option.opts == ["--method", "--fine-tune-type"]
    refuses(r"--method 'lorax'", train_settings, {"method": "lorax"})


def test_not_to_train_is_answered_with_evaluate():
    asked = {"model": "m", "data": "d e", "adapter_path": "a", "train": False, "test": True}
    refuses(r"--no-train.*evaluate --model m --adapter-path a --data 'd e'", train_settings, asked)
    for asked in ({"test": True}, {"train": True}, {"train": True, "test": True}):
        train_settings(asked)


def test_what_follows_from_the_rows_is_as_it_was():
    for rules, names in RULES_THEN.items():
        for name in names.split():
            assert (ROWS[name].may_change, ROWS[name].per_machine) == rules, name
    for method, names in ONE_METHOD.items():
        assert {name for name, row in ROWS.items() if row.method == method} == names
    assert len(RANGED) >= 44
    assert sum(len(names.split()) for names in RULES_THEN.values()) == 70


@pytest.mark.parametrize("name", RANGED)
def test_a_range_holds_its_ends_and_nothing_beyond(name):
    f, row = ALL[name], row_of(ALL[name])
    above, below = (
        (math.nextafter(row.at_most, math.inf), row.more_than) if "float" in f.type else (row.at_most + 1, None)
    )
    if row.at_least is not None:
        assert read_value(f, row.at_least) == row.at_least
        below = row.at_least - 1
    assert read_value(f, row.at_most) == row.at_most
    for value in (above, below, math.nan):
        refuses(r"must be (at least|more than)|not a whole number", read_value, f, value, kind=ValueError)
    if f.default is not None:
        assert read_value(f, f.default) == f.default


def test_every_bad_value_is_told_at_once():
    with pytest.raises(InputError) as caught:
        train_settings(
            {"rank": 0, "dtype": "int8"}, {"alpha": 0, "seed": 1.5, "mask_prompt": "no", "lr": 1, "iters": 1}
        )
    said = str(caught.value).split("; ")
    assert said == [
        "--config: unknown setting 'lr'", "use 'learning_rate'", "--alpha 0.0: must be more than 0 and at most 1000000000",
        "--seed 1.5: not a whole number", "--mask-prompt 'no': not true or false",
        "--rank 0: must be at least 1 and at most 65536", "--dtype 'int8': not one of auto, float32, bfloat16, float16",
    ]  # fmt: skip


# The help.


def flags_in(text: str) -> set[str]:
    """The options that a help page lists: first words of its lines."""
    return {name.replace("[no-]", "") for name in re.findall(r"^  (?:-[ch], )?(--[\w\[\]-]+)", text, re.M)}


@pytest.mark.parametrize("command", ["train", "plan", "serve"])
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_help_shows_the_usual_options_and_help_all_all(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    short, full = run(command, "--help"), run(command, "--help-all")
    assert short.code == full.code == 0
    fields = FIELDS if command != "serve" else SERVE
    common = {flag_of(name) for name, f in fields.items() if row_of(f).common}
    assert common < flags_in(short.out) < flags_in(full.out)
    assert flags_in(full.out) >= {flag_of(name) for name in fields}
    assert len(flags_in(short.out)) <= 22
    assert f"--help-all lists all {len(flags_in(full.out))} options." in short.out
    assert "lists all" not in full.out
    for page in (short.out, full.out):
        assert max(map(len, page.splitlines())) <= columns
        assert "\xa0" not in page
        assert re.findall(r"^(\S.*):$", page, re.M)[0] == "Model and data"
    assert set(re.findall(r"^(\S.*):$", full.out, re.M)) >= {row_of(f).group for f in fields.values()}


def test_help_of_train_is_about_fifteen_options():
    assert 12 <= sum(row.common for row in ROWS.values()) <= 16  # and --config


def test_help_of_evaluate_leaves_what_objectives_need_to_help_all():
    short, full = run("evaluate", "--help"), run("evaluate", "--help-all")
    assert {"--data", "--adapter-path", "--forgetting", "--objective"} <= flags_in(short.out)
    assert "--divergence" not in flags_in(short.out)
    assert {"--divergence", "--group-size", "--chat-date"} <= flags_in(full.out)


def test_commands_with_few_options_show_all_of_them():
    ran = run("generate", "--help")
    assert {"--revision", "--trust-remote-code", "--prompt"} <= flags_in(ran.out.replace("-p, ", ""))
    assert "help-all" not in ran.out


def test_errors_point_to_the_help_that_has_the_option():
    assert "(--help-all lists the options)" in run("train", "--keep", "x").err
    assert "(--help lists the options)" in run("generate", "--max-tokens", "x").err


# Other trainers' words.


def one_line(ran: Ran) -> str:
    assert (ran.code, len(ran.lines)) == (2, 1)
    return ran.lines[0]


@pytest.mark.parametrize("theirs", [
    "lr", "lora-r", "lora-rank", "lora_r", "r", "lora-alpha", "lora-dropout", "max-steps", "num-train-epochs",
    "per-device-train-batch-size", "gradient-accumulation-steps", "max-length", "output-dir", "model-name-or-path", "dataset",
])  # fmt: skip
def test_another_trainers_option_is_answered_with_ours(theirs):
    name = theirs.replace("-", "_")
    ours = OTHER_NAMES[name]
    flag = f"--{theirs}" if theirs != "r" else "-r"
    assert one_line(run("train", flag, "1")) == f"Error: {flag}: no such option here; use {flag_of(ours)}"
    assert one_line(run("plan", flag, "1")).endswith(f"use {flag_of(ours)}")
    refuses(f"^--config: unknown setting '{name}'; use '{ours}'$", train_settings, {}, {name: 1})


def test_the_table_of_other_names_leads_to_settings_and_hides_none():
    assert set(OTHER_NAMES.values()) <= FIELDS.keys()
    assert OTHER_NAMES.keys().isdisjoint(FIELDS)


@pytest.mark.parametrize(("words", "answer"), [
    ("--learning-rte 1", "did you mean --learning-rate?"),
    ("--learning_rate 1", "did you mean --learning-rate?"),
    ("--no-mask-promt", "did you mean --no-mask-prompt?"),
    ("--zzzz", "--zzzz: "),
    ("--use-dora", "use --method dora"),
    ("--load-in-4bit", "use --bits 4"),
    ("--quantization-bit 4", "--quantization-bit: no such option here; use --bits"),
    ("--method qlora", "--method lora and --bits 4"),
    ("--method QLoRA", "--method lora and --bits 4"),
    ("--method lroa", "--method 'lroa': not one of lora, rslora"),
    ("--dtype bf16", "--dtype 'bf16': use bfloat16"),
    ("--parallel tensor", "--parallel 'tensor': tensor parallel training is gone; share a base that does not fit with --shard-base"),
])  # fmt: skip
def test_a_wrong_word_gets_one_line_that_helps(words, answer):
    assert answer in one_line(run("train", *words.split()))


def test_a_settings_file_gets_the_same_answers(tmp_path):
    file = tmp_path / "c.yaml"
    for text, answer in (
        ("use_dora: true\n", "unknown setting 'use_dora'; use --method dora"),
        ("parallel: tensor\n", "--shard-base"),
        ("method: qlora\n", "--method 'qlora': QLoRA is LoRA over a 4-bit base"),
        ("learning_rte: 1\n", "did you mean 'learning_rate'?"),
    ):
        file.write_text(text)
        assert answer in one_line(run("train", "--config", file))


def test_a_misspelled_command_is_answered(capsys):
    main = importlib.import_module("mlx_lora.__main__").main
    for word, answer in (
        ("trian", "did you mean train?"),
        ("zzzz", "convert, plan, train"),
    ):
        with pytest.raises(SystemExit) as ended:
            main.main([word], prog_name="mlx-lora")
        assert ended.value.code == 2
        assert answer in capsys.readouterr().err


def test_settings_are_resolved_without_the_other_trainers_files():
    code = "import sys, mlx_lora.config.{} as _; print([m for m in sys.modules if 'migrate' in m])"
    command = [sys.executable, "-c", code.format("load")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


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
    refuses(f"{flag_of(name)}.*--method {ROWS[name].method}", train_settings, {name: value})
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
    refuses(flag, train_settings, settings)


@pytest.mark.parametrize("rule", IDLE, ids=lambda rule: rule.names[0])
def test_an_idle_setting_is_told_if_it_was_given(rule):
    others = {} if rule.needed else {name: value_for(name, wanted) for name, wanted in rule.when.items()}
    name = rule.names[0]
    settings = USUAL | others | {name: value_for(name, given)}
    [note] = idle_notes(settings, {name})
    assert flag_of(name) in note
    assert all(flag_of(one) in note for one in rule.when)
    assert idle_notes(settings, set()) == []


def test_a_range_has_equal_ratios_and_both_ends():
    values = read_vary(["learning_rate=5e-5..2e-3/12"])["learning_rate"]
    assert (len(values), values[0], values[-1]) == (12, 5e-5, 2e-3)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert max(ratios) < 1.02 * min(ratios)


def test_a_range_without_a_count_about_doubles():
    assert read_vary(["rank=8..64"]) == {"rank": [8, 16, 32, 64]}
    values = read_vary(["--learning-rate=5e-5..2e-3"])["learning_rate"]
    assert all(1.6 < b / a < 2.5 for a, b in itertools.pairwise(values))


def test_lists_are_read_as_their_settings_are_and_combined():
    vary = read_vary(["rank=8, 16,8", "method=lora,dora", "learning_rate=1e-3"])
    assert vary == {"rank": [8, 16], "method": ["lora", "dora"], "learning_rate": [1e-3]}
    found = candidates(vary)
    assert len(found) == 4
    assert {"rank": 16, "method": "lora", "learning_rate": 1e-3} in found
    assert words(found[0]) == "--rank 8 --method lora --learning-rate 0.001"
    assert read_vary({"rank": [4, 8], "learning_rate": "1e-4..1e-3/2"}) == {
        "rank": [4, 8],
        "learning_rate": [1e-4, 1e-3],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate=2e-3..5e-5", "smaller to a larger"),
        ("learning_rate=1e-3..1e-3", "smaller to a larger"),
        ("learning_rate=0..1e-3", "above 0"),
        ("learning_rate=a..b", "not a range"),
        ("learning_rate=1e-4..1e-3/1", "from 2 to"),
        ("learning_rate=1e-4..1e-3/x", "not a range"),
        ("learning_rate", "no setting with values"),
        ("learning_rate=", "no setting with values"),
        ("learning_rate=,", "no values"),
        ("learning_rate=fast", "not a number"),
        ("rank=0,8", "at least 1"),
        ("method=lora..dora", "only numbers have a range"),
        ("method=lora,lara", "not one of"),
        ("lerning_rate=1e-3,1e-4", "learning_rate"),
        ("seed=1,2", "--seeds"),
        ("model=a,b", "vary another"),
        ("save_every=1,2", "vary another"),
        ("rank=1..65536/64", "64"),
    ],
)
def test_what_is_no_range_is_one_line(text, said):
    if text.startswith("rank=1.."):
        refuses("combinations", read_vary, [text, "alpha=1..100/64"])
        return
    refuses(said, read_vary, [text])


def test_a_setting_is_given_once():
    refuses("twice", read_vary, ["rank=8,16", "rank=32"])


@pytest.mark.parametrize(
    ("count", "seeds", "budget"), [(2, 1, 2.0), (6, 1, BUDGET), (12, 2, 6.0), (24, 3, 10.0), (256, 1, 20.0)]
)
def test_rounds_take_the_budget_and_end_with_few(count, seeds, budget):
    rounds = rungs(count, seeds, budget)
    assert work(rounds, seeds) + 1 == pytest.approx(budget)
    assert rounds[0].candidates == count
    assert rounds[-1].candidates <= 3
    assert all(a.share < b.share and a.candidates > b.candidates for a, b in itertools.pairwise(rounds))


def test_a_round_fewer_takes_the_same_work_and_makes_the_others_longer():
    rounds = rungs(12, 2, 6.0)  # a quarter of a grid of 12 rates and 2 seeds
    fewer = without_last_round(rounds, 2)
    assert [rung.candidates for rung in fewer] == [rung.candidates for rung in rounds[:-1]]
    assert work(fewer, 2) == pytest.approx(work(rounds, 2))
    assert all(longer.share > rung.share for longer, rung in zip(fewer, rounds, strict=False))
    assert [rung.steps(32) for rung in fewer] == [4, 12]


def test_rounds_never_go_beyond_a_whole_run():
    assert rungs(3, 1, 100) == [Rung(3, 1.0)]
    rounds = rungs(30, 1, 25)
    assert max(rung.share for rung in rounds) <= 1 + 1e-9
    assert work(rounds, 1) + 1 <= 25 + 1e-6
    assert [rung.steps(10) for rung in (Rung(2, 0.001), Rung(2, 1.0))] == [1, 10]


def test_budgets():
    assert read_budget("3x") == read_budget(3) == read_budget(" 3.0X") == 3
    for text in ("", "x", "-1x", "nan", "inf", "three"):
        refuses("3x", read_budget, text)
    refuses("give more", rungs, 4, 1, 1.0)


def test_rounds_that_are_too_short_say_what_would_do():
    rounds = rungs(12, 1, 2.0)
    with pytest.raises(TooShort, match=r"--budget (\d+)x") as refused:
        check_long_enough(rounds, 40, 1, 5)
    enough = float(str(refused.value).split("--budget ")[1].split("x")[0])
    check_long_enough(rungs(12, 1, enough), 40, 1, 5)


@pytest.mark.parametrize(
    ("vary", "given", "said"),
    [
        ({"batch_tokens": [64, 512]}, {"batch_size": 4}, "--batch-size 4"),
        ({"weight_decay": [0.0, 0.1]}, {"optimizer": "adam"}, "--optimizer adam"),
        ({"weight_decay": [0.01, 0.1], "optimizer": ["adam", "adamw"]}, {}, "--optimizer adam"),
        ({"rank": [4, 8]}, {"method": "full"}, "--method full"),
        ({"iters": [10, 20], "epochs": [1.0, 2.0]}, {}, "only one of the two"),
        ({"beta": [0.1, 0.3]}, {"objective": "dpo"}, "changes the loss"),
    ],
)
def test_what_changes_nothing_is_not_varied(vary, given, said):
    flat = train_settings(given).to_flat()
    with pytest.raises(InputError, match=said) as refused:
        check_varied(candidates(vary), flat)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("vary", "given"),
    [
        ({"batch_tokens": [64, 512]}, {}),
        ({"batch_size": [2, 4]}, {"batch_tokens": 512}),
        ({"weight_decay": [0.01, 0.1]}, {}),
        ({"rank": [4, 8]}, {}),
        ({"beta": [0.1, 0.3]}, {"objective": "dpo", "metric_for_best_model": "accuracy"}),
    ],
)
def test_what_changes_a_run_is_varied(vary, given):
    check_varied(candidates(vary), train_settings(given).to_flat())


@pytest.mark.parametrize(
    ("given", "varied"), [("iters", "epochs"), ("epochs", "iters"), ("batch_tokens", "batch_size")]
)
def test_a_candidate_overrides_the_setting_of_the_same_meaning(given, varied):
    flat = train_settings({given: 30, "rank": 3}).to_flat()
    found = train_settings(with_candidate(flat, {varied: 2})).to_flat()
    assert (found[given], found[varied], found["rank"]) == (None, 2, 3)
