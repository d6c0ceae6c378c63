"""An option that would have no effect is refused, or what it decides is taken from the run."""

from __future__ import annotations

import json

import pytest
from run_cli import one_line, run, succeeds

import mlx_lora
from mlx_lora.__main__ import load_command
from mlx_lora.config.fields import flag_of
from mlx_lora.config.rules import COMMANDS, Rule
from mlx_lora.utils.errors import InputError

SHORT = ("--iters", 1, "--rank", 2, "--batch-tokens", 256, "--sample-tokens", 0)


@pytest.fixture(scope="module")
def two_columns(tmp_path_factory):
    path = tmp_path_factory.mktemp("columns") / "two.jsonl"
    rows = [{"prompt": f"Say {n}", "completion": f"long answer {n}", "short": f"S{n}"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def adapter_of_chats(tiny_folder, chats, tmp_path_factory):
    return trained(tiny_folder, chats, tmp_path_factory.mktemp("chats") / "a", "--val-batches", 0)


def trained(tiny_folder, data, folder, *flags):
    succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", folder, *SHORT, *flags)
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "--prompt", "Hi", "--top-p", 0.8), "--temp"),
        (("chat", "--top-p", 0.5), "--temp"),
        (("evaluate", "--tasks", "arc_easy", "--prompt-column", "q"), "--data"),
        (("evaluate", "--metric", "exact_match", "--data", "chats", "--num-fewshot", 3), "--tasks"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_an_option_without_effect_is_one_line(words, said, tiny_folder, chats, tmp_path):
    command, *rest = (chats if word == "chats" else word for word in words)
    data = ("--data", chats, "--adapter-path", tmp_path / "a") if command == "train" else ()
    one_line(run(command, "--model", tiny_folder, *data, *rest), said)


# What an option of a command takes, where any text does not do; and what a command cannot be without.
VALUES = {
    "--macs": "M1:16,M2:16",
    "--to": "peft",
    "--mode": "mxfp4",
    "--shard-base": "even",
    "--sweep": "4x",
    "--bits-budget": "+10%",
    "--objective": "dpo",
}
REQUIRED = {
    "embed": ("--data", "FILE", "--out", "v.npy"), "export": ("--to", "gguf", "--out", "o"), "generate": ("--prompt", "Hi"),
    "predict": ("--adapter-path", "ADAPTER"), "sweep": ("--out", "o", "--vary", "rank=4,8"), "convert": ("--out", "o"), "fuse": ("--out", "o", "--adapter-path", "ADAPTER"), "merge": ("--adapter", "a=1", "--out", "o"),
}  # fmt: skip
ALONE = {"doctor", "merge", "train"}  # commands that take no --model, or need none


def words_of(command, name, wanted, file):
    """The words of a command line that give one of its options a value that a rule is about."""
    main = load_command(command)
    flag = flag_of(name)
    option = next(one for one in main.params if flag in (*one.opts, *one.secondary_opts))
    if isinstance(wanted, tuple) and None in wanted:
        return []
    if option.is_flag:
        return [flag]
    if isinstance(wanted, str | int) and not isinstance(wanted, bool):
        return [flag, wanted]
    if flag in VALUES:
        return [flag, VALUES[flag]]
    choices = getattr(option.type, "choices", None)
    return [flag, choices[0] if choices else 3 if option.type.name.startswith(("int", "float")) else file]


@pytest.mark.parametrize(
    ("command", "rule"), [(command, rule) for command, rules in COMMANDS.items() for rule in rules],
    ids=lambda one: f"{one.names[0]}-{'needs' if one.needed else 'or'}-{'-'.join(one.when)}" if isinstance(one, Rule) else one,
)  # fmt: skip
def test_a_command_refuses_what_its_rules_are_about(command, rule, tiny_folder, chats, adapter_of_chats):
    words = [] if command in ALONE else ["--model", tiny_folder]
    stands = {"FILE": chats, "ADAPTER": adapter_of_chats}
    words += [stands.get(word, word) for word in REQUIRED.get(command, ())]
    name, _, value = rule.names[0].partition("=")
    words += words_of(command, name, value or None, chats)
    for other, wanted in () if rule.needed else rule.when.items():
        words += words_of(command, other, wanted, chats)
    one_line(run(command, *words), flag_of(name), *([] if rule.needed else map(flag_of, rule.when)))


def test_python_refuses_settings_that_it_would_not_use(tiny_folder, chats):
    base = mlx_lora.load(str(tiny_folder))
    with pytest.raises(InputError, match="rank"):
        mlx_lora.evaluate(base, str(chats), rank=64)
    with pytest.raises(InputError, match="nonsense"):
        mlx_lora.evaluate_tasks(base, "arc_easy", nonsense=3)
    with pytest.raises(InputError, match=r"top[-_]p"):
        base.generate("Hi", top_p=0.5)
    assert mlx_lora.evaluate(base, str(chats), mask_prompt=False)["loss"] > 0


def test_a_training_flag_without_effect_is_told(tiny_folder, chats, tmp_path):
    flags = (
        "--optimizer",
        "adam",
        "--weight-decay",
        0.1,
        "--project-name",
        "p",
        "--test-batches",
        3,
        "--val-batches",
        0,
    )
    ran = succeeds("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", *SHORT, *flags)
    told = [line for line in ran.lines if "no effect" in line]
    assert [line.split()[1] for line in told] == ["--weight-decay", "--project-name", "--test-batches"]
    succeeds("train", "--config", tmp_path / "a" / "run.yaml", "--adapter-path", tmp_path / "b")


def test_evaluate_counts_the_tokens_that_the_run_trained(tiny_folder, chats, tmp_path):
    adapter = trained(tiny_folder, chats, tmp_path / "a", "--no-mask-prompt", "--val-batches", 0)
    given = ("evaluate", "--model", tiny_folder, "--adapter-path", adapter, "--data", chats, "--json")
    found, masked = run(*given), run(*given, "--mask-prompt")
    assert "--no-mask-prompt" in found.err
    assert json.loads(found.out)["supervised_tokens"] > 2 * json.loads(masked.out)["supervised_tokens"]


def test_answers_are_compared_with_the_column_that_the_run_trained(tiny_folder, two_columns, tmp_path):
    columns = ("--prompt-column", "prompt", "--completion-column", "short")
    adapter = trained(tiny_folder, two_columns, tmp_path / "a", *columns, "--val-batches", 0)
    other = trained(tiny_folder, two_columns, tmp_path / "b", "--val-batches", 0)
    given = (
        "evaluate",
        "--model",
        tiny_folder,
        "--data",
        two_columns,
        "--metric",
        "exact_match",
        "--max-tokens",
        2,
        "--json",
    )
    ran = succeeds(*given, "--adapter", adapter)
    assert "--completion-column short" in ran.err
    assert '"S' in ran.out
    assert "long answer" not in ran.out
    refused = run(*given, "--adapter", adapter, "--adapter", other)
    assert refused.code == 2
    assert "columns" in refused.lines[-1]


@pytest.mark.slow
def test_a_plan_for_several_macs_keeps_to_the_budget(tiny_folder):
    given = ("plan", "--model", tiny_folder, "--macs", "M4 Pro:48,M2 Max:32", "--json")
    free, tight = (json.loads(run(*given, *more).out) for more in ((), ("--memory-budget", 0.001)))
    assert json.dumps(free) != json.dumps(tight)
    assert str(free).count("True") > str(tight).count("True")
