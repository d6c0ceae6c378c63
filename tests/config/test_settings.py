"""Settings are rows: what follows from them is what it was, the help shows them, and other trainers' words get an answer."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import subprocess
import sys

import pytest
from refusing import refuses
from run_cli import Ran, run

from mlx_lora.config.fields import flag_of, read_value, row_of
from mlx_lora.config.load import GONE, OTHER_NAMES, train_settings
from mlx_lora.config.settings import FIELDS, ROWS, ServeSettings
from mlx_lora.utils.errors import InputError

# As they were when each was a table of its own: may a resumed run change it, may the ranks differ -> settings of then.
RULES = {
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
        with pytest.raises(InputError) as caught:
            train_settings(of_flags, of_file)
        assert name in str(caught.value)
        assert instead in str(caught.value)
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
    with pytest.raises(InputError, match=r"evaluate --model m --adapter-path a --data 'd e'") as caught:
        train_settings({"model": "m", "data": "d e", "adapter_path": "a", "train": False, "test": True})
    assert "--no-train" in str(caught.value)
    for given in ({"test": True}, {"train": True}, {"train": True, "test": True}):
        train_settings(given)


def test_what_follows_from_the_rows_is_as_it_was():
    for rules, names in RULES.items():
        for name in names.split():
            assert (ROWS[name].may_change, ROWS[name].per_machine) == rules, name
    for method, names in ONE_METHOD.items():
        assert {name for name, row in ROWS.items() if row.method == method} == names
    assert len(RANGED) >= 44
    assert sum(len(names.split()) for names in RULES.values()) == 70


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
    assert ran.code == 2
    assert len(ran.lines) == 1
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
