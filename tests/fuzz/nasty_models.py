"""Hand-made model folders and GGUF files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.gguf_pieces import gguf_bytes, read_pieces
from fuzz.mutate import safetensors_bytes
from fuzz.nasty import DEEP, F32, Nasty, absolute, copying, folder, laid, raw
from fuzz.seeds import Seeds

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
