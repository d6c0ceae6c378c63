"""Hand-made cases and what they are built from: each is a known way to break a reader."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.mutate import gguf_bytes, read_pieces, safetensors_bytes
from fuzz.seeds import Seeds

Nasty = Callable[[Path, Seeds], tuple]
DEEP = "[" * 50_000 + "]" * 50_000
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# Twelve lines that stand for 9^12 texts.
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


def on_copy(copy: Path, seeds: Seeds) -> tuple:
    """The command that reads a copied model."""
    return ("generate", "--model", copy, "--prompt", "x", "--max-tokens", 2)


def copying(kind: str, command: Callable[[Path, Seeds], tuple] = on_copy) -> Callable[[Callable[[Path], None]], Nasty]:
    """Make a case of a function that spoils a copied seed folder."""

    def decorate(spoil: Callable[[Path], None]) -> Nasty:
        def make(place: Path, seeds: Seeds) -> tuple:
            copy = Path(shutil.copytree(seeds.root / kind, place / "in" / "folder"))
            spoil(copy)
            return command(copy, seeds)

        return make

    return decorate


def folder(name: str, kind: str, command: Callable[[Path, Seeds], tuple] = on_copy, **changes: Any) -> Nasty:
    """Change keys of a JSON file in a copied seed folder; a value may be a function of the copy."""

    @copying(kind, command)
    def case(copy: Path) -> None:
        content = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        content |= {key: value(copy) if callable(value) else value for key, value in changes.items()}
        (copy / name).write_text(json.dumps({key: value for key, value in content.items() if value != "@gone"}))

    return case


def raw(name: str, kind: str, content: str | bytes, command: Callable[[Path, Seeds], tuple] = on_copy) -> Nasty:
    """Write a file into a copied seed folder."""

    @copying(kind, command)
    def case(copy: Path) -> None:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(as_bytes(content))

    return case


def laid(name: str, content: str | bytes, command: Callable[[Path, Seeds], tuple]) -> Nasty:
    """Feed one file."""

    def make(place: Path, seeds: Seeds) -> tuple:
        (place / "in" / name).write_bytes(as_bytes(content))
        return command(place / "in" / name, seeds)

    return make


def as_bytes(content: str | bytes) -> bytes:
    """A file's content, also of text that no file may have."""
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content


def absolute(name: str) -> Callable[[Path], str]:
    """A path out of the case's folder."""
    return lambda copy: str(copy.parents[3] / "outside" / name)


def on_model(copy: Path, seeds: Seeds) -> tuple:
    """Put a copied adapter on the good model."""
    return ("generate", "--model", seeds.model, "--adapter-path", copy, "--prompt", "x", "--max-tokens", 2)


def exported(copy: Path, seeds: Seeds) -> tuple:
    """Write a copied adapter in another form, with its card."""
    return ("export", "--model", seeds.model, "--adapter-path", copy, "--to", "peft", "--out", copy.parents[1] / "out")


def resumed(folder: Path, seeds: Seeds, at: object) -> tuple:
    """The command that goes on from a checkpoint."""
    return (
        "train", "--model", seeds.model, "--data", seeds.root / "data.jsonl", "--iters", 3, "--rank", 2,
        "--batch-tokens", 256, "--adapter-path", folder, "--save-every", 1, "--resume", at,
    )  # fmt: skip


def shape(**changes: Any) -> dict[str, Any]:
    """lora_parameters with something wrong."""
    return {"rank": 2, "scale": 16.0, "dropout": 0.0, "keys": ["self_attn.q_proj"], **changes}


ADAPTERS = [
    *(folder("adapter_config.json", "run", on_model, lora_parameters=shape(**{key: value})) for key, value in (
        [("rank", v) for v in (10**9, True, 0, 2.0, "2", 10**30)]
        + [("scale", v) for v in (float("nan"), float("inf"), True, "x", 10**400)]
        + [("dropout", v) for v in ("x", [], float("nan"), -1, 2)]
        + [("keys", v) for v in (["../x"], [""], ["*"], ["a*" * 60], [1], "q_proj", {}, ["q_proj,k_proj"], ["self_attn.q_proj"] * 100_000)]
    )),
    *(folder("adapter_config.json", "run", on_model, **{key: value}) for key, value in (
        [("num_layers", v) for v in (True, 10**30, -10**30, "x", 1.0)]
        + [("fine_tune_type", v) for v in (["lora"], {}, "full", None, "dora")]
        + [("mlx_lora", v) for v in ("x", {"alpha": "x"}, {"full": 5}, {"full": [1]}, {"full": ["model.layers"]}, {"full": ["x"] * 1000}, {"chat_template": 5},
            {"chat_template": "{% for %}"}, {"method": "x"}, {"method": []}, {"base_model": []}, {"base_revision": {}}, {"base_fingerprint": []})]
        + [("peft_type", v) for v in ("LORA", None, [], "X")]
    )),
    folder("adapter_config.json", "run", exported, mlx_lora={"method": "../x", "base_model": {"a": 1}}),
    folder("adapter_config.json", "run", exported, mlx_lora={"base_model": "../../outside/x\n---\nlicense: evil"}),
    raw("adapter_config.json", "run", DEEP, on_model),
    raw("adapter_config.json", "run", "[]", on_model),
    raw("adapter_config.json", "run", b"\xff", on_model),
    raw("adapters.safetensors", "run", safetensors_bytes(b'{"../../x.lora_a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)), on_model),
    raw("adapters.safetensors", "run", safetensors_bytes(DEEP.encode(), bytes(8)), on_model),
]  # fmt: skip

PEFTS = [
    *(folder("adapter_config.json", "peft", on_model, **{key: value}) for key, value in (
        [("alpha_pattern", v) for v in ({r"(\w|\w\w|\w\w\w|\.)+\.q_pro": 1}, {"(a|a?)+$" : 1}, {"(": 1}, {"q_proj": "x"}, [], "x", {".*" * 500: 1}, {"q_proj": float("nan")})]
        + [("lora_alpha", v) for v in ("x", None, [], float("nan"), 10**400, 0, -1)]
        + [("r", v) for v in (10**9, "x", None, 0)]
        + [("lora_dropout", v) for v in ("x", [], 5)]
        + [("modules_to_save", v) for v in (5, "lm_head", [1], [""], [None], ["../x"])]
        + [("target_modules", v) for v in (5, "(.*)*x", [1])]
        + [("peft_type", v) for v in (5, "IA3", "ADALORA", [])]
        + [("use_rslora", v) for v in ("x", [])]
        + [("init_lora_weights", v) for v in (5, "pissa_niter_4", "pissa" * 1000)]
        + [("base_model_name_or_path", v) for v in (5, [], "../../outside", "x\n---\n")]
        + [("bias", v) for v in (5, "all", [])]
    )),
    folder("adapter_config.json", "peft", on_model, peft_type="ADALORA", init_r="x"),
    folder("adapter_config.json", "peft", on_model, auto_mapping={"base_model_class": "os", "parent_library": "os"}),
    raw("adapter_model.safetensors", "peft", safetensors_bytes(b'{"base_model.model.model.layers": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)), on_model),
    raw("adapter_model.safetensors", "peft", safetensors_bytes(b'{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', bytes(16)), on_model),
]  # fmt: skip


@PEFTS.append
@copying("peft", on_model)
def pickled_adapter(copy: Path) -> None:
    """A PEFT folder of a pickle alone."""
    (copy / "adapter_model.safetensors").unlink()
    (copy / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def newest_of(copy: Path) -> Path:
    """The newest checkpoint of a run folder."""
    return sorted((copy / "checkpoints").iterdir())[-1]


def gone_on(copy: Path, seeds: Seeds) -> tuple:
    """The command that goes on from the newest checkpoint."""
    return resumed(copy, seeds, newest_of(copy))


def state(**changes: Any) -> Nasty:
    """Change state.json of the newest checkpoint."""

    @copying("run", gone_on)
    def case(copy: Path) -> None:
        file = newest_of(copy) / "state.json"
        content = json.loads(file.read_text())
        for key, value in changes.items():
            content = {**content, key: {**content[key], **value} if isinstance(value, dict) else value}
        file.write_text(json.dumps(content))

    return case


def arrays(change: Callable[[dict, bytes], tuple[dict, bytes]]) -> Nasty:
    """Change state.safetensors of the newest checkpoint, checksum and all."""

    @copying("run", gone_on)
    def case(copy: Path) -> None:
        newest = newest_of(copy)
        content = (newest / "state.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header, rest = change(json.loads(content[8 : 8 + size]), content[8 + size :])
        (newest / "state.safetensors").write_bytes(safetensors_bytes(json.dumps(header).encode(), rest))
        told = json.loads((newest / "state.json").read_text())
        told["sha256"]["state.safetensors"] = hashlib.sha256((newest / "state.safetensors").read_bytes()).hexdigest()
        (newest / "state.json").write_text(json.dumps(told))

    return case


def renamed(header: dict, rest: bytes) -> tuple[dict, bytes]:
    """Arrays of layers that the model does not have."""
    return {name.replace("layers.0", "layers.7"): entry for name, entry in header.items()}, rest


def without_random(header: dict, rest: bytes) -> tuple[dict, bytes]:
    """A state without its random key, of the same bytes."""
    return {name.replace("random", "ransom"): entry for name, entry in header.items()}, rest


def as_ints(header: dict, rest: bytes) -> tuple[dict, bytes]:
    """Masters that are not floats."""
    return {
        name: {**entry, "dtype": "I32"} if entry and entry.get("dtype") == "F32" else entry
        for name, entry in header.items()
    }, rest


CHECKPOINTS = [
    state(sha256={"../../../../outside/secret.json": "0"}),
    state(sha256=[]),
    state(sha256={"state.safetensors": None}),
    state(position={"taken": -1}),
    state(position={"taken": "x"}),
    state(position={"taken": 10**30, "consumed": 10**30}),
    state(position={"consumed": None}),
    state(position={"best_loss": "x", "best_at": []}),
    state(identity=[]),
    state(identity={"price_epochs": "x"}),
    state(identity={"price_epochs": float("nan")}),
    state(identity={"price_epochs": -1}),
    state(version="1"),
    arrays(renamed),
    arrays(without_random),
    arrays(as_ints),
]


RUNS = [
    raw("metrics.jsonl", "run", DEEP, exported),
    raw("metrics.jsonl", "run", '{"step": 1, "val_loss": "x"}\n', exported),
    raw("metrics.jsonl", "run", '{"step": "x", "val_loss": 1}\n{"step": 2, "val_loss": 2}\n', exported),
    raw("metrics.jsonl", "run", '{"step": 1, "val_loss": NaN}\n', exported),
    raw("run.yaml", "run", "data: 2001-99-99", exported),
    raw("run.yaml", "run", "[" * 20_000, exported),
    raw("run.yaml", "run", "data: [1]", exported),
    raw("run.yaml", "run", LAUGHS + "data: *a11", exported),
    raw("run.yaml", "run", 'data: "x\\n---\\nlicense: evil\\n"', exported),
    raw("README.md", "run", b"\xff\xfe", exported),
]


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


def parquet(content: list[dict[str, Any]] | dict[str, Any], **options: Any) -> bytes:
    """Write rows, or columns, as Parquet."""
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    table = pyarrow.Table.from_pylist(content) if isinstance(content, list) else pyarrow.table(content)
    pyarrow.parquet.write_table(table, out, **options)
    return out.getvalue()


def parquet_bomb(count: int, text: str) -> bytes:
    """One text, told `count` times: a few kilobytes that unpack to gigabytes."""
    import pyarrow

    indices = pyarrow.array([0] * count, pyarrow.int32())
    return parquet({"text": pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))}, compression="zstd")


def parquet_columns(**columns: Any) -> bytes:
    """Write columns as Parquet, packed as tightly as it can."""
    return parquet(columns, compression="zstd", use_dictionary=["x.list.element"])


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


CONFIGS = [
    *(
        folder("config.json", kind, **{key: value})
        for kind, key, value in (
            [("model", key, value) for key in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size",
             "num_attention_heads", "num_key_value_heads") for value in (10**9, 0, -1, "64", 1.5, None, [2], 10**30)]
            + [("model", "model_type", value) for value in ("", "..", "../../outside/evil", "os", "base", "cache", ["llama"], {}, None, "a" * 5000)]
            + [("model", "quantization", value) for value in ({}, [], "x", {"bits": 0, "group_size": 64}, {"bits": 4}, {"bits": 4, "group_size": 10**12}, {"bits": 4, "group_size": 0}, {"bits": "4", "group_size": 32}, {"bits": 10**30, "group_size": 32})]
            + [("model4", "quantization", value) for value in ("@gone", {"bits": 3, "group_size": 32}, {"bits": 4, "group_size": 64, "mode": "../x"})]
            + [("model", "quantization_config", value) for value in ({}, {"quant_method": "bitnet"}, {"quant_method": "fp8"}, {"quant_method": []}, {"quant_method": "compressed-tensors"}, {"quant_method": "modelopt"}, {"quant_method": "gptq"})]
            + [("model", "eos_token_id", value) for value in ("x", {}, [[]], -1, 10**30, 1.5, ["a"])]
            + [("model", "head_dim", value) for value in (10**9, -3, "x")]
            + [("model", "rope_scaling", value) for value in ([], "x", {"type": "yarn"}, {"rope_type": "llama3"}, {"type": []}, {"type": "linear", "factor": "x"})]
            + [("model", "layer_types", value) for value in (["x"], [], "x", [None] * 10_000)]
            + [("model", "text_config", value) for value in ("x", {"num_hidden_layers": 10**9}, [], {"quantization_config": 1})]
            + [("model", "max_position_embeddings", value) for value in (10**18, -1, "x")]
            + [("model", "rope_theta", value) for value in ("x", 0, -1.0, 1e308)]
            + [("model", "rms_norm_eps", value) for value in ("x", -1, 1e308)]
        )
    ),
    folder("config.json", "model", auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}),
    folder("config.json", "model", model_file="evil.py"),
    folder("config.json", "model", model_file="../../../outside/evil.py"),
    folder("config.json", "model", architectures="x", torch_dtype=[], tokenizer_class=["x"]),
    folder("config.json", "model", model_type="mamba"),
    folder("config.json", "model", model_type="qwen3_moe", num_experts=10**9, num_experts_per_tok=10**9),
    folder("config.json", "model", model_type="gpt_oss"),
    folder("config.json", "model", model_type="deepseek_v3", n_routed_experts=10**9),
    folder("config.json", "model", model_type="gemma3_text", sliding_window_pattern=0),
    raw("config.json", "model", '{"model_type": "llama", "x": ' + DEEP + "}"),
    raw("config.json", "model", DEEP),
    raw("config.json", "model", b"\xff\xfe{}"),
    raw("config.json", "model", "[]"),
    raw("config.json", "model", ""),
    raw("hf_quant_config.json", "model", DEEP),
    raw("generation_config.json", "model", DEEP),
    raw("generation_config.json", "model", "[]"),
    raw("generation_config.json", "model", '{"eos_token_id": {"a": 1}}'),
    raw("model.safetensors.index.json", "model", '{"weight_map": {"x": "../../../outside/secret.safetensors"}}'),
    raw("model.safetensors.index.json", "model", DEEP),
]  # fmt: skip


def weights(
    header: bytes | str | dict, content: bytes = b"", kind: str = "model", name: str = "model.safetensors"
) -> Nasty:
    """Feed a model of one hand-made safetensors file."""
    text = json.dumps(header) if isinstance(header, dict) else header
    return raw(name, kind, safetensors_bytes(text.encode() if isinstance(text, str) else text, content))


@copying("model")
def linked_out(copy: Path) -> None:
    """A hub cache's own way: weights are links to blobs beside the snapshot, and must load."""
    (copy.parent / "blobs").mkdir()
    (copy / "model.safetensors").rename(copy.parent / "blobs" / "b")
    (copy / "model.safetensors").symlink_to("../blobs/b")


@copying("model")
def linked_round(copy: Path) -> None:
    """A link to itself where weights should be."""
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("model.safetensors")


@copying("model")
def pickles(copy: Path) -> None:
    """Weights as a pickle that would run code."""
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def two_names(first: str, second: str) -> Nasty:
    """The same key twice, in a JSON text that a dictionary cannot hold."""
    return weights("{" + f'"x": {first}, "x": {second}' + "}", bytes(8))


WEIGHTS = [
    linked_out,
    linked_round,
    pickles,
    weights({"x": {**F32, "shape": [1 << 40, 0], "data_offsets": [0, 0]}}),
    weights({"x": {**F32, "shape": [1 << 62], "data_offsets": [0, 1 << 63]}}),
    weights({"x": {**F32, "shape": [1 << 31], "data_offsets": [0, 8]}}, bytes(8)),
    weights({"x": {**F32, "dtype": "F64", "shape": [1]}}, bytes(8)),
    weights({"x": {**F32, "dtype": "F8_E5M2", "shape": [8]}}, bytes(8)),
    weights({"x": {**F32, "shape": [1] * 70 + [2]}}, bytes(8)),
    weights({"__metadata__": {"a": 1}, "x": F32}, bytes(8)),
    weights({"__metadata__": [1], "x": F32}, bytes(8)),
    weights('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "e": NaN}}', bytes(8)),
    weights('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "e": ' + DEEP + "}}", bytes(8)),
    weights(DEEP, bytes(8)),
    weights(json.dumps({"x": F32}).encode("utf-16"), bytes(8)),
    weights('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    weights({"x": F32, "y": F32}, bytes(8)),
    weights({"x": {**F32, "data_offsets": [8, 16]}}, bytes(16)),
    weights({"../../outside/x": F32}, bytes(8)),
    weights({"model..weight": F32}, bytes(8)),
    weights({"": F32}, bytes(8)),
    weights({"a." * 5000: F32}, bytes(8)),
    weights({f"x{n}": {**F32, "shape": [0], "data_offsets": [0, 0]} for n in range(50_000)}),
    two_names(json.dumps(F32), json.dumps({**F32, "shape": [1], "data_offsets": [0, 4]})),
    weights({}),
    weights("[]"),
    weights("", b""),
    raw("model.safetensors", "model", struct.pack("<Q", 2**64 - 1)),
    raw("model.safetensors", "model", struct.pack("<Q", 2**31) + b"{" * 100),
    raw("model2.safetensors", "model", safetensors_bytes(json.dumps({"model.norm.weight": F32}).encode(), bytes(8))),
]  # fmt: skip


@copying("model")
def remote_code(copy: Path) -> None:
    """A tokenizer that asks for the repository's own code, and code that would leave a trace."""
    (copy / "evil.py").write_text("import pathlib\npathlib.Path('pwned').touch()\nclass Evil: ...\n")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))


DOUBLED = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}


def tokenizer_json(change: Callable[[dict], None]) -> Nasty:
    """Change the tokenizer's own file; the prompt is forty times its favorite letter."""

    @copying("model", lambda copy, seeds: ("generate", "--model", copy, "--prompt", "x" * 40, "--max-tokens", 2))
    def case(copy: Path) -> None:
        content = json.loads((copy / "tokenizer.json").read_text())
        change(content)
        (copy / "tokenizer.json").write_text(json.dumps(content))

    return case


TOKENIZERS = [
    remote_code,
    folder("tokenizer_config.json", "model", auto_map={"AutoTokenizer": ["other/repo--evil.Evil", None]}),
    folder("tokenizer_config.json", "model", auto_map="x"),
    folder("tokenizer_config.json", "model", auto_map=[]),
    folder("tokenizer_config.json", "model", tokenizer_file=absolute("secret.json")),
    folder("tokenizer_config.json", "model", vocab_file=absolute("secret.json"), merges_file="../../../outside/secret.json"),
    folder("tokenizer_config.json", "model", fast_tokenizer_files=["../../../outside/tokenizer.4.0.0.json"]),
    folder("tokenizer_config.json", "model", tool_parser_type="../evil"),
    folder("tokenizer_config.json", "model", tool_parser_type="nothing", chat_template_type="nothing"),
    folder("tokenizer_config.json", "model", chat_template=[1, 2]),
    folder("tokenizer_config.json", "model", chat_template={"a": 1}),
    folder("tokenizer_config.json", "model", tokenizer_class=["LlamaTokenizer"]),
    folder("tokenizer_config.json", "model", tokenizer_class="os"),
    folder("tokenizer_config.json", "model", added_tokens_decoder={"x": {}}),
    folder("tokenizer_config.json", "model", added_tokens_decoder={"1000000000": {"content": "<x>", "special": True}}),
    folder("tokenizer_config.json", "model", eos_token={"content": ["x"]}),
    folder("tokenizer_config.json", "model", eos_token=5, bos_token=[], pad_token={}),
    folder("tokenizer_config.json", "model", extra_special_tokens=5),
    folder("tokenizer_config.json", "model", chat_template="{% for %}"),
    folder("tokenizer_config.json", "model", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    raw("tokenizer_config.json", "model", DEEP),
    raw("tokenizer_config.json", "model", "[]"),
    raw("tokenizer.json", "model", DEEP),
    raw("tokenizer.json", "model", "{}"),
    raw("tokenizer.json", "model", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'),
    raw("tokenizer.json", "model", b"\xff"),
    tokenizer_json(lambda content: content.update(normalizer={"type": "Sequence", "normalizers": [DOUBLED] * 60})),
    tokenizer_json(lambda content: content.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x" * 5000})),
    tokenizer_json(lambda content: content.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False})),
    tokenizer_json(lambda content: content.update(padding={"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"})),
    tokenizer_json(lambda content: content.update(truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 10**9})),
    tokenizer_json(lambda content: content["added_tokens"].append({"id": 10**9, "content": "x", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True})),
    tokenizer_json(lambda content: content["model"].update(vocab={"x": 10**9})),
    tokenizer_json(lambda content: content["model"].update(type="Unigram", vocab=[["x", 0.0]], unk_id=10**9)),
    tokenizer_json(lambda content: content["model"].update(type="WordPiece", unk_token="y", max_input_chars_per_word=10**18)),
    raw("special_tokens_map.json", "model", DEEP),
    raw("added_tokens.json", "model", '{"x": "y"}'),
    raw("chat_template.jinja", "model", b"\xff\xfe"),
    raw("chat_template.jinja", "model", "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"),
    raw("tokenizer.model", "spm_only", b"\x0a" * 1000),
    raw("tokenizer.model", "spm_only", b""),
    raw("tokenizer_config.json", "spm_only", '{"added_tokens_decoder": {"x": 1}, "bos_token": []}'),
    raw("tokenizer_config.json", "spm_only", DEEP),
    raw("added_tokens.json", "spm_only", '{"a": "b", "c": null}'),
]  # fmt: skip


def converted(file: Path, seeds: Seeds) -> tuple:
    """The command that reads a GGUF file."""
    return ("convert", "--model", file, "--out", file.parents[1] / "out")


def gguf(change: Callable[[list, list, dict], None], seed: str = "bpe.gguf") -> Nasty:
    """Feed a GGUF file with one thing changed."""

    def make(place: Path, seeds: Seeds) -> tuple:
        pieces, lies = read_pieces(str(seeds.root / seed)), dict[str, int]()
        change(pieces["pairs"], pieces["tensors"], lies)
        return laid("m.gguf", gguf_bytes(pieces["pairs"], pieces["tensors"], lies), converted)(place, seeds)

    return make


def pair(key: str, kind: int, item: int | None, value: Any, seed: str = "bpe.gguf") -> Nasty:
    """Set one metadata pair."""

    def change(pairs: list, tensors: list, lies: dict) -> None:
        pairs[:] = [one for one in pairs if one[0] != key] + [[key, kind, item, value]]

    return gguf(change, seed)


def lie(**lies: int) -> Nasty:
    """Say something false in the header."""
    return gguf(lambda pairs, tensors, told: told.update(lies))


NESTED = (
    b"GGUF\x03\0\0\0" + struct.pack("<QQQ", 0, 1, 1) + b"x" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
)
GGUFS = [
    *(lie(**{key: value}) for key in ("tensors", "pairs", "string", "array", "dims", "offset", "version") for value in (2**64 - 1, 2**31, 0)),
    laid("m.gguf", NESTED, converted),
    laid("m.gguf", b"GGUF", converted),
    *(pair("general.alignment", 4, None, value) for value in (0, 1, 3, 2**31)),
    *(pair("general.architecture", *kind) for kind in ((4, None, 1), (9, 4, [1]), (8, None, ""), (8, None, "../x"))),
    *(pair(f"llama.{key}", 10, None, value) for key in ("block_count", "embedding_length", "attention.head_count", "feed_forward_length") for value in (0, 2**31, 2**63)),
    *(pair(f"tokenizer.ggml.{key}", *kind, seed) for seed in ("bpe.gguf", "spm.gguf") for key in ("tokens", "token_type", "scores", "merges", "bos_token_id", "pre", "model")
      for kind in ((4, None, 1), (9, 4, [1, 2]), (8, None, "x"), (9, 8, ["a", "b", "a"]))),
    pair("tokenizer.chat_template", 4, None, 1),
    pair("tokenizer.chat_template", 8, None, "{% for %}"),
    pair("split.count", 9, 4, [1, 2]),
    pair("tokenizer.ggml.tokens", 9, 8, ["a" * 2_000_000, "b"], "spm.gguf"),
    pair("tokenizer.ggml.scores", 9, 6, [float("nan")] * 460, "spm.gguf"),
]  # fmt: skip
