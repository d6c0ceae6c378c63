"""What files from elsewhere cannot do here; the fuzzer (test_fuzz.py) has many more of them."""

from __future__ import annotations

import json
import shutil
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import jinja2
import pytest
from byte_tokenizer import TEMPLATES, byte_tokenizer
from made_conversations import conversations
from mask_reference import unmarked
from run_cli import run
from template_judge import REFUSED, rendered_by_both
from transformers.utils import chat_template_utils

from mlx_lora.data import sandbox
from mlx_lora.data.formats import parse_record
from mlx_lora.data.sandbox import render_chat
from mlx_lora.exporters import peft_experts as peft_patterns
from mlx_lora.exporters.card import plain
from mlx_lora.exporters.peft_experts import names_layer
from mlx_lora.models.config import check_config
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import parse_json, parse_yaml, read_json

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
    with pytest.raises(jinja2.TemplateError, match="not allowed"):
        render_chat(tokenizer, TURNS, costly)
    assert len(tokenizer.apply_chat_template(TURNS, chat_template=costly, tokenize=False)) == 20_000_000


COSTLY = {
    "power": "{{ 9 ** (9 ** 9) }}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "list": "{{ [0] * 9999999999 }}",
    "width": "{{ '%09999999999d' % 1 }}",
    "format": "{{ '{:>{n}}'.format(1, n=9999999999) }}",
    "method": "{{ 'a'.ljust(9999999999) }}",
    "filter": "{{ 'a' | center(9999999999) }}",
    "indent": "{{ messages | tojson(indent=9999999999) }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "join": "{{ range(99999) | join('b' * 9999) }}",
    "objects": "{{ ''.__class__.__mro__ }}",
    "files": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_templates_cannot_make_huge_things_or_reach_out(name):
    with pytest.raises((jinja2.TemplateError, TypeError), match=r"not allowed|unsafe|no loader"):
        render_chat(byte_tokenizer(), TURNS, COSTLY[name])


def test_what_templates_do_need_is_allowed():
    text = (
        "{{ '  ' * 3 }}{{ '%s-%5d' % ('a', 2) }}{{ 'a' | center(5) }}{{ ['a', 'b'] | join(', ') }}{{ 7 % 2 + 3 ** 2 }}"
    )
    assert render_chat(byte_tokenizer(), TURNS, text) == "      a-    2  a  a, b10"


@pytest.mark.parametrize("where", ["main thread", "another thread"])  # a server renders in another
@pytest.mark.parametrize("loop", ["{% for j in range(99999) %}{% endfor %}", "{% set ns.x = ns.x ~ ns.x %}"])
def test_templates_are_stopped(loop, where, monkeypatch):
    monkeypatch.setattr(sandbox, "RENDER_S", 0.3)
    monkeypatch.setattr(sandbox, "RENDER_BYTES", 64 << 20)
    start = time.monotonic()
    template = "{% set ns = namespace(x='aaaa') %}{% for i in range(99999) %}" + loop + "{% endfor %}"
    with ThreadPoolExecutor(1) as threads:
        elsewhere = lambda *given: threads.submit(render_chat, *given).result()  # noqa: E731
        render = render_chat if where == "main thread" else elsewhere
        with pytest.raises(InputError, match="takes more than"):
            render(byte_tokenizer(), TURNS, template)
    assert time.monotonic() - start < 20


def test_a_watch_in_another_thread_ends_with_its_rendering(monkeypatch):
    render_chat(byte_tokenizer(), TURNS, "x")  # the first imports and compiles
    monkeypatch.setattr(sandbox, "RENDER_S", 2.0)

    def render_and_stay() -> str:
        texts = {render_chat(byte_tokenizer(), TURNS, "x") for _ in range(20)}
        with sandbox.CLOCK.held():
            texts.add(render_chat(byte_tokenizer(), TURNS, "x"))
            for _ in range(250):
                time.sleep(0.01)  # where an exception that comes late would be raised
        return " ".join(texts)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(render_and_stay).result() == "x"
    time.sleep(2 * sandbox.TICK_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "mlx-lora-template"]


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
