"""What files from elsewhere cannot do here; the fuzzer (test_fuzz.py) has many more of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import tracemalloc
from datetime import date
from pathlib import Path

import jinja2
import pytest
from byte_tokenizer import TEMPLATES, byte_tokenizer
from made_conversations import REFUSED, conversations, rendered_by_both, unmarked
from run_cli import one_line, run
from transformers.utils import chat_template_utils

from mlx_lora.config.fields import flag_of
from mlx_lora.config.load import keep_allowed, unknown_code
from mlx_lora.config.settings import ROWS
from mlx_lora.data import sandbox
from mlx_lora.data.formats import parse_record
from mlx_lora.data.sandbox import render_chat
from mlx_lora.exporters import peft as peft_patterns
from mlx_lora.exporters.card import plain
from mlx_lora.exporters.peft import names_layer, rank_problems
from mlx_lora.models.config import check_config
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import parse_json, parse_yaml, read_json
from mlx_lora.utils.text import peak_bytes

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize("file", sorted(TEMPLATES.iterdir()), ids=lambda file: file.stem)
def test_the_sandbox_renders_as_transformers_does(file):
    tokenizer, shown = byte_tokenizer(bos=True), 0
    for text in dict.fromkeys((file.read_text(), unmarked(file.read_text()))):
        for n, record in enumerate([{"messages": TURNS}, *conversations(3, 48, always_ids=True)]):
            turns = [{name: part for name, part in turn.items() if name != "weight"} for turn in record["messages"]]
            messages = parse_record({**record, "messages": turns})[1].messages
            ours, theirs = rendered_by_both(
                tokenizer, messages, text, tools=record.get("tools"), add_generation_prompt=n % 3 == 0
            )
            assert ours == theirs
            shown += not ours.startswith(REFUSED)
    assert shown >= 10


PROBES = {
    "plain": "{{ messages[0].content }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "variables": "{{ documents is none }}{{ documents is defined }}{{ tools is none }}{{ add_generation_prompt }}{{ x is defined }}",
    "white space": "{% for m in messages %}\n  {% if true %}\n  a\n  {% endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{% continue %}x{% endfor %}",
    "generation": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }} b\n{% endgeneration %}{{ a }}",
    "generation in a macro": "{% macro f(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}{{ f(messages[1]) }}",
    "unclosed": "{% generation %}x",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}{{ 'é<' | tojson(true) }}",
    "json of what is undefined": "{{ nothing | tojson }}",
    "namespace": "{% set n = namespace({'b': 2}, self=1) %}{% set n.c = 3 %}{{ n.self + n.b + n.c }}",
    "namespace of Python's names": "{% set n = namespace() %}{% set n.__call__ = 3 %}{{ n }}",
    "dict": "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', 0) }}",
    "exception": "{{ raise_exception('not you') }}",
    "items": "{% for k, v in messages[1].items() %}{{ k }}={{ v }};{% endfor %}",
    "change": "{{ messages.append(1) }}",
    "thinking": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.reasoning }}/{% endfor %}",
    "no text": "{% for m in messages %}{{ m.content is defined }}{% endfor %}",
    "odd values": "{{ messages[1].odd }}{{ messages[1].odd | tojson }}",
    "undefined": "{{ a.b }}",
    "syntax": "{% if %}",
}
SPOKEN = [
    {"role": "user", "content": "a é <b>"},
    {"role": "assistant", "content": None, "reasoning": "hm", "thinking": None, "odd": [date(2026, 1, 5), (1, 2.5), {"x": None}]},
    {"role": "assistant", "content": "b", "thinking": "so", "reasoning": "no", "reasoning_content": ""},
]  # fmt: skip


@pytest.mark.parametrize("name", PROBES)
def test_templates_find_what_transformers_gives_them(name):
    ours, theirs = rendered_by_both(byte_tokenizer(bos=True), SPOKEN, PROBES[name], add_generation_prompt=True)
    if name == "namespace of Python's names":  # refused by both, each in its own words
        ours, theirs = (text.split(":")[0] for text in (ours, theirs))
    assert ours == theirs
    assert rendered_by_both(byte_tokenizer(bos=True), SPOKEN[:1], "{{ messages | length }}", tools=[]) == ("1", "1")
    assert ours != "1"


def test_an_empty_conversation_is_refused_by_rendered_by_both():
    assert all(text.startswith(REFUSED) for text in rendered_by_both(byte_tokenizer(), [], "x"))


def test_transformers_keeps_its_own_sandbox():
    seen = []
    tokenizer, costly = byte_tokenizer(), "{{ 'a' * 20_000_000 }}"

    class Watched(dict):
        def items(self):
            seen.append(chat_template_utils.ImmutableSandboxedEnvironment)
            return super().items()

    render_chat(tokenizer, [Watched(TURNS[0])], "x")
    assert seen
    assert set(seen) == {jinja2.sandbox.ImmutableSandboxedEnvironment}
    with pytest.raises(InputError, match="writes 20,000,000 characters"):
        render_chat(tokenizer, TURNS, costly)
    assert len(tokenizer.apply_chat_template(TURNS, chat_template=costly, tokenize=False)) == 20_000_000


# Each takes hours or gigabytes, or reaches for what is not its own.
HOSTILE = {
    "comparison": "{{ ('a' * 9000000 ~ 'b') in (['a' * 9000000 ~ 'c'] * 100000) }}",
    "output in a loop": "{% for i in range(99999) %}{{ 'a' * 30000 }}{% endfor %}",
    "output": "{{ 'a' * 9000000 }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop that calls itself": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro of many calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "range": "{{ range(10 ** 12) | list }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "product": "{% set n = namespace(x=3) %}{% for i in range(99999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "number": "{{ ('9' * 4000000) | int }}{{ (10 ** 3000000) | string | length }}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "list": "{{ [0] * 9999999999 }}",
    "namespace": "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "width": "{{ '%09999999999d' % 1 }}",
    "format": "{{ '{:>{n}}'.format(1, n=9999999999) }}",
    "date": "{{ strftime_now('%Y' * 9999999) }}",
    "method": "{{ 'a'.ljust(9999999999) }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "indent": "{{ messages | tojson(indent=9999999999) }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 99999) }}",
    "join": "{{ range(99999) | join('b' * 9999) }}",
    "sort": "{{ (['a' * 9000000 ~ 'b', 'a' * 9000000 ~ 'a'] * 100000) | sort | length }}",
    "unique": "{% for i in range(99999) %}{{ range(99999) | map('string') | unique | list | length }}{% endfor %}",
    "sum": "{{ ([[0] * 10000] * 9999) | sum(start=[]) | length }}",
    "wrap": "{{ ('ab ' * 3000000) | wordwrap(1, wrapstring='x' * 1000) }}",
    "tags": "{{ ('<' * 3000000) | striptags }}",
    "links": "{{ ('a.' * 100000 ~ '@') | urlize }}",
    "cycler": "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set x = c.next() %}"
    "{% endfor %}{% endfor %}",
    "batch": "{{ range(99999) | batch(999999999, 'x') | list | length }}",
    "slice": "{{ messages | slice(999999999) | list | length }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "json": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "json of itself": "{% set n = namespace() %}{% set n.x = n %}{{ n | tojson }}",
    "error": "{{ raise_exception('a' * 9000000) }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "objects": "{{ ''.__class__.__mro__ }}",
    "attributes": "{{ messages | map(attribute='__class__.__init__.__globals__') | list }}",
    "attributes by a filter": "{{ ('' | attr('__class__')).mro() }}",
    "globals": "{{ lipsum.__globals__['os'].system('touch pwned') }}",
    "globals in a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "files": "{% include '/etc/passwd' %}",
    "modules": "{% import '/etc/passwd' as x %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused(name, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "RENDER_S", 0.3)
    monkeypatch.chdir(tmp_path)
    before = peak_bytes()
    with pytest.raises((InputError, jinja2.TemplateError, TypeError), match=r"\w") as refused:
        render_chat(byte_tokenizer(), TURNS, HOSTILE[name])
    assert len(str(refused.value)) < 300
    assert peak_bytes() - before < 200 << 20
    assert not list(tmp_path.iterdir())
    assert render_chat(byte_tokenizer(), TURNS, "{{ messages[0].content }}") == "a", "the next one is rendered"


def test_what_templates_do_need_is_allowed():
    text = (
        "{{ '  ' * 3 }}{{ '%s-%5d' % ('a', 2) }}{{ 'a' | center(5) }}{{ ['a', 'b'] | join(', ') }}{{ 7 % 2 + 3 ** 2 }}"
    )
    assert render_chat(byte_tokenizer(), TURNS, text) == "      a-    2  a  a, b10"
    long = [{"role": "user", "content": "é\n" * 10**6}]
    assert render_chat(byte_tokenizer(), long, "{{ messages | tojson }}").count("é") == 10**6


@pytest.mark.parametrize("command", ["generate", "train"])
def test_a_model_with_a_hostile_template_is_refused_in_one_line(command, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "RENDER_S", 0.5)
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": TURNS[:2]}) + "\n")
    words = {
        "generate": ("--prompt", "x", "--max-tokens", 1),
        "train": ("--data", data, "--adapter-path", tmp_path / "out", "--iters", 1),
    }
    for name in ("comparison", "output in a loop"):
        (folder / "chat_template.jinja").write_text(HOSTILE[name])
        one_line(run(command, "--model", folder, *words[command]), "the chat template takes more than")


def test_remote_code_is_never_asked_about(tiny_folder, tmp_path, monkeypatch):
    """Left to itself transformers asks on the terminal, and a yes runs the code."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "own.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Own: ...\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    ran = run("generate", "--model", folder, "--prompt", "x", "--max-tokens", 1)
    assert ran.code == 2
    assert not list(tmp_path.rglob("ran"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "model_file": "../own.py"}))
    assert "--trust-remote-code" in run("generate", "--model", folder, "--prompt", "x").lines[-1]
    ran = run("generate", "--model", folder, "--prompt", "x", "--trust-remote-code")
    assert "not in that folder" in ran.lines[-1]


# Settings of strangers that run code

EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
def score(completions, **columns): return [1.0] * len(completions)
def tool(a: int) -> int:
    \"\"\"
    Add.

    Args:
        a: A number.
    \"\"\"
    return a
class Game:
    def reset(self, seed, **columns): return None
    def step(self, completion): return None, 1.0, True
"""
OWN_FILES = (
    {"trust_remote_code": True},
    {"reward": "evil.py:score"},
    {"reward": ["number_match", "evil.py:score"]},
    {"tools": "evil.py", "reward": "number_match"},
    {"tools": "evil.py:tool", "reward": "number_match"},
    {"environment": "evil.py:Game"},
    {"environment": "verifiers:evil"},
    {"environment": "verifiers:evil.toml"},
    {"data": "verifiers:evil"},
    {"eval_tasks": "rows.jsonl", "eval_metric": "evil.py:score"},
    {"eval_tasks": "task.yaml"},
)


@pytest.fixture
def strangers(tiny_folder, chats, tmp_path, monkeypatch, own_cache):
    """Return a function that writes a stranger's settings file, and the file that its code makes."""
    theirs, mark = tmp_path / "theirs", tmp_path / "ran"
    shutil.copytree(tiny_folder, theirs / "model")
    (theirs / "evil.py").write_text(EVIL.format(mark=str(mark)))
    shutil.copyfile(theirs / "evil.py", theirs / "model" / "own.py")
    config = json.loads((theirs / "model" / "config.json").read_text())
    (theirs / "model" / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    (theirs / "evil.toml").write_text("[env.taskset]\nid = 'evil'\n")
    (theirs / "task.yaml").write_text("task: evil\ndoc_to_text: !function evil.score\n")
    shutil.copyfile(chats, theirs / "rows.jsonl")
    monkeypatch.chdir(theirs)
    monkeypatch.syspath_prepend(str(theirs))

    def write(name="x.yaml", **settings):
        model = "model" if settings.get("trust_remote_code") else str(tiny_folder)
        usual = {
            "model": model,
            "data": "rows.jsonl",
            "iters": 2,
            "max_seq_length": 64,
            "sample_tokens": 0,
            "val_batches": 1,
        }
        if {"reward", "tools", "environment"} & settings.keys():
            usual |= {"objective": "grpo", "group_size": 2, "max_new_tokens": 2, "save_every": 1}
        (theirs / name).write_text(json.dumps({**usual, "adapter_path": str(tmp_path / name[:-5]), **settings}))
        return theirs / name

    return write, mark


@pytest.mark.parametrize("settings", OWN_FILES, ids=str)
def test_a_file_of_settings_runs_no_code_without_a_word_on_the_command_line(strangers, settings, tmp_path):
    write, mark = strangers
    file, other = write(**settings), write("y.yaml")
    for words in (
        ("train", "--config", file),
        ("train", "--config", file, "--dry-run"),
        ("train", "--runs", other, file),
        ("plan", "--config", file),
        ("sweep", "--config", file, "--out", tmp_path / "swept"),
    ):
        ran = run(*words)
        assert not mark.exists(), words
        assert ran.code == 2, words
        assert "--allow-code" in ran.lines[-1], words
        runs = [name for name, value in settings.items() if ROWS[name].runs and re.search(ROWS[name].runs, str(value))]
        assert all(flag_of(name) in ran.lines[-1] for name in runs)
        assert not (tmp_path / "x").exists()


def test_other_trainers_files_and_tables_of_data_run_no_code_either(strangers, tmp_path):
    _, mark = strangers
    trl = "model_name_or_path: m\ndataset_name: rows.jsonl\nreward_funcs: [evil.score]\nnum_generations: 2\nuse_peft: true\n"
    axolotl = "base_model: m\nrl: grpo\nmicro_batch_size: 8\ndatasets: [{path: rows.jsonl}]\ntrl: {reward_funcs: [evil.score]}\n"
    factory = "model_name_or_path: model\nstage: sft\ntemplate: qwen\ntrust_remote_code: true\n"
    for text in (trl, axolotl, factory):
        (tmp_path / "c.yaml").write_text(text)
        ran = run("train", "--config", tmp_path / "c.yaml")
        assert (ran.code, "--allow-code" in ran.lines[-1]) == (2, True)
    (tmp_path / "table").mkdir()
    for source in ({"hf_hub_url": "verifiers:evil"}, {"file_name": "rows.jsonl,verifiers:evil"}):
        (tmp_path / "table" / "dataset_info.json").write_text(json.dumps({"x": source}))
        assert run("train", "--model", "model", "--data", tmp_path / "table" / "x").code == 2
    assert not mark.exists()


def test_flags_and_a_persons_word_run_the_code_of_a_file(strangers, tmp_path, monkeypatch):
    write, mark = strangers
    file = write(reward="evil.py:score", data="q.jsonl")
    (file.parent / "q.jsonl").write_text("".join(f'{{"prompt": "{n}?", "answer": "1"}}\n' for n in range(12)))
    assert run("train", "--config", file, "--reward", "evil.py:score", "--dry-run").code == 0, "the flag names it"
    asked = []
    monkeypatch.setattr(
        "mlx_lora.utils.console.agreed", lambda question, usual: asked.append((question, usual)) or True
    )
    for _ in range(2):
        assert run("train", "--config", file, "--dry-run").code == 0
    [(question, usual)] = asked
    assert str(file) in question
    assert str(file.parent / "evil.py") in question
    assert not usual, "the return key is no yes"
    (file.parent / "evil.py").write_text(EVIL.format(mark=str(mark)) + "# other code\n")
    assert run("train", "--config", file, "--dry-run").code == 0
    write(reward="evil.py:score", tools="evil.py", data="q.jsonl")
    run("train", "--config", file, "--dry-run")
    assert len(asked) == 3, "code that changed, and code that is new, are asked about again"
    assert "--reward" not in asked[2][0]
    monkeypatch.undo()
    one_line(run("train", "--model", "m", "--data", "d", "--allow-code"), "--config")


def test_a_run_of_this_machine_goes_on_without_a_question_and_a_copy_does_not(strangers, tmp_path, monkeypatch):
    write, mark = strangers
    (tmp_path / "theirs" / "q.jsonl").write_text("".join(f'{{"prompt": "{n}?"}}\n' for n in range(12)))
    file = write(reward="evil.py:score", data="q.jsonl")
    assert run("train", "--config", file, "--allow-code").code == 0
    (tmp_path / "theirs" / "evil.py").write_text(EVIL.format(mark=str(mark)) + "# mended\n")
    shutil.copytree(tmp_path / "x", tmp_path / "copy")
    words = ("--resume", "--iters", 3)
    assert run("train", "--config", tmp_path / "x" / "run.yaml", *words).code == 0, "its own reward may be mended"
    mark.unlink()
    (tmp_path / "theirs" / "evil.py").write_text(EVIL.format(mark=str(mark)) + "# run anew in this process\n")
    copied = ("--config", tmp_path / "copy" / "run.yaml", "--adapter-path", tmp_path / "copy", *words)
    one_line(run("train", *copied), "--allow-code", str(tmp_path / "theirs" / "evil.py"))
    monkeypatch.setattr("mlx_lora.config.load.cache_dir", lambda kind: tmp_path / "theirs" / "evil.py" / kind)
    one_line(run("train", "--config", tmp_path / "x" / "run.yaml", *words), "--allow-code")
    assert not mark.exists()
    assert run("train", *copied, "--allow-code").code == 0
    assert mark.exists()


def test_what_is_agreed_to_is_bounded(tmp_path, monkeypatch, own_cache):
    monkeypatch.setattr("mlx_lora.config.load.MOST_ALLOWED", 3)
    files = [tmp_path / f"{n}.yaml" for n in range(5)]
    for file in files:
        keep_allowed(file, {"reward": "a.py:f"})
        for one in (tmp_path / "cache" / "code").iterdir():
            os.utime(one, (one.stat().st_atime, one.stat().st_mtime - 10))
    assert [bool(unknown_code(file, {"reward": "a.py:f"})) for file in files] == [True, True, False, False, False]


@pytest.mark.long
def test_the_candidates_of_a_resumed_sweep_are_those_of_its_flags(strangers, tmp_path):
    write, mark = strangers
    words = ("sweep", "--config", write(iters=12), "--vary", "rank=2,4", "--budget", "3x", "--out", tmp_path / "out")
    assert run(*words).code == 0
    state = json.loads((tmp_path / "out" / "sweep.json").read_text())
    state["candidates"] = [
        {**one, "eval_tasks": "rows.jsonl", "eval_metric": "evil.py:score"} for one in state["candidates"]
    ]
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(state))
    shutil.rmtree(tmp_path / "out" / "winner")
    run(*words, "--resume")
    assert (tmp_path / "out" / "winner" / "run.yaml").exists()
    assert not mark.exists()


def test_held_out_rows_of_an_adapter_are_never_made_by_code(strangers, tiny_folder, tmp_path):
    write, mark = strangers
    assert run("train", "--config", write()).code == 0
    settings = parse_yaml((tmp_path / "x" / "run.yaml").read_text())
    (tmp_path / "x" / "run.yaml").write_text(json.dumps({**settings, "data": "verifiers:evil"}))
    (tmp_path / "theirs" / "verifiers:evil").write_text("{}")
    assert run("evaluate", "--model", tiny_folder, "--adapter-path", tmp_path / "x").code == 2
    assert not mark.exists()


def test_every_setting_that_runs_code_says_so_in_its_row():
    named = {
        name
        for name, row in ROWS.items()
        if re.search(r"\.py\b|FILE\.py|VERIFIERS|verifiers:|own tokenizer code|YAML file", row.help)
    }
    metrics = {"eval_metric", "ask"}  # their help refers to those of `evaluate --metric` and --data
    assert {name for name, row in ROWS.items() if row.runs} == named | metrics


def test_token_ids_beyond_the_embedding_are_not_looked_up(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    last = content["added_tokens"][-1]
    content["added_tokens"] += [{**last, "id": last["id"] + n, "content": f"Q{n:02}Q"} for n in range(1, 41)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert run("generate", "--model", folder, "--prompt", "x", "--max-tokens", 1).code == 0
    assert run("generate", "--model", folder, "--prompt", "Q40Q", "--max-tokens", 1).code == 0, (
        "in a message it is text"
    )
    ran = run("generate", "--model", folder, "--prompt", "Q40Q", "--max-tokens", 1, "--ignore-chat-template")
    assert ran.code == 2
    assert "has token" in ran.lines[-1]


def test_a_pattern_of_ranks_that_is_a_list_is_a_problem():
    header = {"a": {"shape": [8, 4]}}
    assert rank_problems({"rank_pattern": {"q_proj": 8}}, {"q_proj": {"A": "a"}}, header) == []
    assert len(rank_problems({"rank_pattern": ["q_proj"]}, {"q_proj": {"A": "a"}}, header)) == 1


def test_patterns_that_never_end_are_given_up(monkeypatch):
    monkeypatch.setattr(peft_patterns, "PATTERN_S", 0.01)
    layer = "model.layers.0.self_attn.q_proj"
    assert names_layer("q_proj", layer)
    assert not names_layer("k_proj", layer)
    with pytest.raises(InputError, match="takes too long"):
        names_layer(r"(\w|\w\w|\w\w\w|\.)+\.q_pro", layer)


def test_names_in_a_card_are_no_commands():
    assert plain("org/model-1.5:Q4_K_M.gguf") == "org/model-1.5:Q4_K_M.gguf"
    assert plain('x"); import os; os.system("rm') == "x__; import os; os.system__rm".replace(";", "_")
    assert plain("a`b$(c)\n| d") == "a_b__c___ d"


def test_parsed_text_is_bounded():
    assert parse_json(b'\xef\xbb\xbf{"a": "[[[["}') == {"a": "[[[["}
    assert parse_json("[" * 100 + "]" * 100)
    for text in ("[" * 101 + "]" * 101, "[" * 50_000, '"\\ud800"', '{"\\udc00": 1}', b"\xff", "9" * 5000):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
    assert parse_yaml("a: &x [1, 2]\nb: *x\n<<: {c: 3}") == {"a": [1, 2], "b": [1, 2], "c": 3}
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    for text in (laughs, "a: &a [*a]", "a: !!bool x", "a: 2001-99-99", "[" * 20_000, "a: 0x" + "f" * 6000, 'a: "\\0"'):
        with pytest.raises(ValueError, match=r"."):
            parse_yaml(text)


def test_an_error_is_one_printable_line(tmp_path):
    ran = run("train", "--model", "m", "--data", "d", "--config", tmp_path / ("\x1b[2Jx\u202ey" + "z" * 2000))
    assert ran.code == 2
    assert "\\x1b[2Jx\\x202ey" in ran.lines[-1]
    assert all(c.isprintable() for c in ran.lines[-1])
    assert len(ran.lines[-1]) < 950


def test_links_of_a_hub_cache_are_followed(tiny_folder, tmp_path):
    snapshot = Path(shutil.copytree(tiny_folder, tmp_path / "snapshots" / "c0ffee"))
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert run("generate", "--model", snapshot, "--prompt", "x", "--max-tokens", 1).code == 0


def test_configs_of_published_models_pass():
    published = {
        "model_type": "qwen3_moe", "num_hidden_layers": 94, "num_experts": 128, "num_attention_heads": 64, "n_vocab": 151_936,
        "vocab_size": 262_208, "max_position_embeddings": 10_485_760, "n_positions": 1_048_576, "sliding_window": 2**31 - 1,
        "eos_token_id": [151_645, 151_643], "head_dim": None, "moe_intermediate_size": 1536, "rope_theta": 10**9,
        "text_config": {"num_hidden_layers": 94, "layer_types": ["full_attention"] * 94}, "decoder_sparse_step": 1,
    }  # fmt: skip
    check_config(published, Path("config.json"), n_tensors=1000)
    for wrong in (
        {"num_hidden_layers": 1001},
        {"num_experts": 10**9},
        {"text_config": {"n_layer": 5000}},
        {"vocab_size": "9"},
    ):
        with pytest.raises(InputError, match=next(iter(wrong.get("text_config", wrong)))):
            check_config({**published, **wrong}, Path("config.json"), n_tensors=1000)


def test_a_small_json_file_takes_little_memory(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    tracemalloc.start()
    assert read_json(tmp_path / "a.json", "use another") == {"a": 1}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
