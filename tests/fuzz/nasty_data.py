"""Hand-made data files, settings files and chat templates."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.nasty import DEEP, LAUGHS, Nasty, laid
from fuzz.seeds import Seeds


def evaluated(file: Path, seeds: Seeds) -> tuple:
    """The command that reads data."""
    return ("evaluate", "--model", seeds.model, "--data", file, "--max-seq-length", 64)


def data(name: str, content: str | bytes) -> Nasty:
    """Feed a data file."""
    return laid(name, content, evaluated)


def row(**fields: Any) -> str:
    """One line of JSON."""
    return json.dumps(fields) + "\n"


DATA = [
    data("d.jsonl", '{"text": ' + DEEP + "}\n"),
    data("d.json", DEEP),
    data("d.json", '{"a":' * 50_000),
    data("d.jsonl", row(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], tools=DEEP)),
    data("d.jsonl", '{"prompt": "a", "completion": "b", "x": ' + "[" * 900 + "]" * 900 + "}\n"),
    data("d.jsonl", '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tools": [{"f": ' + "[" * 900 + "]" * 900 + "}]}\n"),
    data("d.jsonl", '{"messages": [{"role": "assistant", "content": "\\ud800"}]}\n'),
    data("d.jsonl", row(messages=[{"role": "assistant", "tool_calls": '[{"function": {"name": "\\ud83d", "arguments": {}}}]'}])),
    data("d.jsonl", row(conversations='[{"from": "gpt", "value": "\\udc00"}]')),
    data("d.jsonl", '{"text": ' + "9" * 10_000 + "}\n"),
    data("d.jsonl", '{"prompt": NaN, "completion": Infinity}\n'),
    data("d.jsonl", '{"prompt": "a", "completion": "b", "prompt": "c"}\n' * 2),
    data("d.jsonl", b"\xff\xfe" + row(text="x").encode("utf-16-le")),
    data("d.jsonl", b"\x00" * 4096),
    data("d.jsonl", "\n" * 100_000),
    data("d.jsonl", row(text="\0\x1b]0;title\x07\x1b[2J")),
    data("d.jsonl", row(text="a" * 300_000)),
    data("d.jsonl", row(prompt="<|im_end|>" * 500, completion="<|im_start|>" * 500)),
    data("d.jsonl", row(messages=[{"role": "assistant", "content": "x", "weight": [1]}])),
    data("d.jsonl", row(messages=[{"role": ["user"], "content": "x"}, {"role": {}, "content": "x"}])),
    data("d.jsonl", row(messages=[[], None, 1, "x"])),
    data("d.jsonl", row(messages=[{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 5000}}]}])),
    data("d.json", "[" + '{"text": "x"},' * 20_000),
    data("d.json", "\ufeff[]"),
    data("d.jsonl", "x"),
]  # fmt: skip


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    """Write rows as Parquet."""
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def parquet_bomb(count: int, text: str) -> bytes:
    """One text, told `count` times: a few kilobytes that unpack to gigabytes."""
    import pyarrow
    import pyarrow.parquet

    indices = pyarrow.array([0] * count, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), out, compression="zstd")
    return out.getvalue()


def parquet_columns(**columns: Any) -> bytes:
    """Write columns as Parquet, packed as tightly as it can."""
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, compression="zstd", use_dictionary=["x.list.element"])
    return out.getvalue()


def made(name: str, content: Callable[[], bytes]) -> Nasty:
    """Feed a data file that is made only when its case comes."""
    return lambda place, seeds: data(name, content())(place, seeds)


TABLES = [
    data("d.csv", "text\n" + "x" * (65 << 20)),
    data("d.csv", "a,b\n" + '"' * 100_001),
    data("d.csv", ",".join("abc") + "\n" + ",".join("abc") + "\n"),
    data("d.csv", "text\0\nx\0\n"),
    data("d.csv", "text,text\nx,y\n"),
    data("d.csv", b"prompt,completion\n\xff\xfe,b\n"),
    data("d.txt", b"\xff\xff\xff"),
    data("d.txt", "\0" * 1000),
    data("d.parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"),
    data("d.parquet", b"PAR1" + b"\x15\x04" * 400_000 + struct.pack("<I", 2**31 - 1) + b"PAR1"),
    made("d.parquet", lambda: parquet_bomb(200_000, "x" * 1_000_000)),
    made("d.parquet", lambda: parquet_bomb(20_000_000, "")),
    made("d.parquet", lambda: parquet_columns(text=["x" * (50 << 20)] * 10)),
    made("d.parquet", lambda: parquet_columns(text=["a"], x=[np.zeros(30_000_000, np.int64)])),
    made("d.parquet", lambda: parquet_columns(text=["a"], x=[["x" * (1 << 20)] * 300])),
    data("d.csv", "text\n" + "x y " * (15 << 20) + "\nb\n"),
    data("d.txt", "x y " * (15 << 20)),
    made("d.parquet", lambda: parquet([{"prompt": b"\xff", "completion": "b"}, {"prompt": b"a", "completion": "c"}])),
    made("d.parquet", lambda: parquet([{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"a": b"\xff"}]}])),
]  # fmt: skip


def settings(text: str | bytes) -> Nasty:
    """Feed a settings file."""
    return laid("c.yaml", text, lambda file, seeds: ("settings", "--config", file))


SETTINGS = [
    settings(LAUGHS + "rank: *a11\n"),
    settings(LAUGHS.replace("a0:", "target_modules:", 1).replace("a11:", "rank_pattern:")),
    settings("target_modules: &a [*a]\n"),
    settings("&a rank: *a\n"),
    settings("rank: " + "[" * 20_000),
    settings("{" * 20_000),
    settings("rank: 0x" + "f" * 6000),
    settings("0x" + "f" * 6000 + ": 1"),
    settings("rank: " + "9" * 6000),
    settings("data: 2001-99-99"),
    settings("rank: !!int x"),
    settings("rank: !!float x"),
    settings("rank: !!bool x"),
    settings("rank: !!timestamp x"),
    settings("rank: !!binary x"),
    settings("rank: !!python/object/apply:os.system ['touch pwned']"),
    settings('data: "\\ud800"'),
    settings('adapter_path: "a\\0b"'),
    settings("? [1, 2]\n: 3"),
    settings("? {a: 1}\n: 3"),
    settings("1: 2\nnull: 3\n~: 4\ntrue: 5\n2001-01-01: 6"),
    settings("rank: .inf\nalpha: .nan\nseed: 1e400"),
    settings("rank: 1:1:1:1:1:1:1:1:1:1"),
    settings(b"\xff\xfe"),
    settings("a" * 3_000_000 + ": 1"),
    settings("<<: [1, 2]\nrank: 1"),
    settings("rank_pattern: {q_proj: [1]}\nalpha_pattern: {1: {2: 3}}"),
    settings("base_model: x\nmicro_batch_size: [1]\nlr_scheduler: [x]\noptimizer: {a: 1}"),
    settings("base_model: x\nlora_r: 8\ndatasets: [{path: x, type: {a: 1}, roles: {a: [[1]]}}]"),
    settings("model_name_or_path: x\nstage: [sft]\nfinetuning_type: {}\ntemplate: []"),
    settings("lora_parameters: {rank: 0x" + "f" * 500 + "}"),
    settings("lr_schedule: {name: [x], arguments: [1]}"),
]  # fmt: skip


def rendered(file: Path, seeds: Seeds) -> tuple:
    """The command that reads a chat template."""
    return (*evaluated(seeds.root / "chats.jsonl", seeds), "--chat-template", file)


def template(text: str) -> Nasty:
    """Feed a chat template."""
    return laid("t.jinja", text, rendered)


TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = [
    template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + TURNS),
    template("{% for i in range(10 ** 12) %}x{% endfor %}" + TURNS),
    template("{{ 9 ** (9 ** 9) }}" + TURNS),
    template("{{ 'a' * 10 ** 10 }}" + TURNS),
    template("{{ 'a' * 9999999999 }}" + TURNS),
    template("{{ [0] * 9999999999 }}" + TURNS),
    template("{{ 'a'.ljust(9999999999) }}" + TURNS),
    template("{{ 'a' | center(9999999999) }}" + TURNS),
    template("{{ '%09999999999d' % 1 }}" + TURNS),
    template("{{ '%09999999999d' | format(1) }}" + TURNS),
    template("{{ '{:>9999999999}'.format(1) }}" + TURNS),
    template("{{ '{:>{n}}'.format(1, n=9999999999) }}" + TURNS),
    template("{{ lipsum(n=999999999) }}" + TURNS),
    template("{{ (9999999999 | string).rjust(('9' ~ '999999999') | int) }}" + TURNS),
    template("{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}" + TURNS),
    template("{% set ns = namespace(x='a' ) %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x ~ 'aaaaaaaa') %}{% endfor %}" + TURNS),
    template("{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}" + TURNS),
    template("{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = range(99999) | join(ns.x) %}{% endfor %}" + TURNS),
    template("{% set ns = namespace(x=3) %}{% for i in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}" + TURNS),
    template("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}" + TURNS),
    template("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}" + TURNS),
    template("{{ ''.__class__.__mro__[1].__subclasses__() }}" + TURNS),
    template("{{ messages.append(1) }}" + TURNS),
    template("{{ cycler.__init__.__globals__.os.system('touch pwned') }}" + TURNS),
    template("{% include '/etc/passwd' %}" + TURNS),
    template("{% import 'x' as y %}" + TURNS),
    template("{{ messages[10 ** 9] }}" + TURNS),
    template("{{ 1 / 0 }}" + TURNS),
    template("{{ undefined.x.y }}" + TURNS),
    template("{{ messages | tojson(indent=9999999999) }}" + TURNS),
    template("{{ messages | indent(9999999999) }}" + TURNS),
    template("{{ strftime_now('%' ~ '9999999d') }}" + TURNS),
    template("{% for %}"),
    template("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}" + TURNS),
    template("{{ " + "+".join("1" * 20_000) + " }}" + TURNS),
    template("\0" + TURNS),
    template("{{ '\\ud800' }}" + TURNS),
    template("{{ raise_exception(messages) }}"),
    template("{{ messages | map(attribute='content') | batch(9999999999) | list }}" + TURNS),
    template("{{ messages | slice(9999999999) | list }}" + TURNS),
    template("{{ 'a' | wordwrap(1, wrapstring='b' * 1000) }}" + TURNS),
]  # fmt: skip
