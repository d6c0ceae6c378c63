"""A Qwen3.5 with the head that drafts tokens, in transformers' layout: kept through every form, judged by mlx-vlm and llama.cpp."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import mlx.core as mx
import pytest
from byte_tokenizer import CHATML, byte_tokenizer
from mlx.utils import tree_flatten
from run_cli import succeeds

from mlx_lora.config.settings import ModelSettings
from mlx_lora.models import drafts as of_drafts
from mlx_lora.models.draft_folder import FOLDER, write_draft
from mlx_lora.models.load import load_base

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.float32("drafts are compared one by one")]

PROMPT = "<|im_start|>user\nSay it 77<|im_end|>\n<|im_start|>assistant\n"
ROWS = [
    {"prompt": f"Say it {n}", "completion": " the quick brown fox jumps over the lazy dog, and the dog sleeps."}
    for n in range(40)
]
TEXT = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "max_position_embeddings": 512, "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": False, "eos_token_id": 0, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
IDS, NEXT = [5, 9, 77, 300, 12, 41, 8, 100], 33


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The model as transformers saves it, and what its head gives in torch."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5TextRotaryEmbedding

    folder = tmp_path_factory.mktemp("published") / "model"
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=dict(TEXT), vision_config=dict(VISION), tie_word_embeddings=False)
    model = Qwen3_5ForConditionalGeneration(config).float().eval()
    own = copy.deepcopy(config.text_config)
    own.layer_types, own.num_hidden_layers = ["full_attention"], 1
    block = Qwen3_5DecoderLayer(own, 0).float().eval()
    with torch.no_grad():
        for p in (*model.parameters(), *block.parameters()):
            p.normal_(0, 0.08 if p.ndim > 1 else 0.02)
        head = {f"layers.0.{name}": p for name, p in block.state_dict().items()}
        head |= {
            f"{name}.weight": torch.randn(128) * 0.02
            for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        }
        head["fc.weight"] = torch.randn(128, 256) * 0.08

        def norm(x, name):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + own.rms_norm_eps) * (1 + head[f"{name}.weight"])

        hidden = model.model(input_ids=torch.tensor([IDS])).last_hidden_state
        embedded = model.get_input_embeddings()(torch.tensor([[*IDS[1:], NEXT]]))
        x = (
            torch.cat([norm(embedded, "pre_fc_norm_embedding"), norm(hidden, "pre_fc_norm_hidden")], -1)
            @ head["fc.weight"].T
        )
        at = torch.arange(len(IDS))[None]
        turned = Qwen3_5TextRotaryEmbedding(config.text_config)(x, at[None].expand(3, 1, -1))
        mask = torch.full((len(IDS), len(IDS)), float("-inf")).triu(1)[None, None]
        states = block(x, position_embeddings=turned, attention_mask=mask, position_ids=at)
        logits = model.lm_head(norm(states[0] if isinstance(states, tuple) else states, "norm"))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {f"mtp.{name}": p.detach().clone().contiguous() for name, p in head.items()}
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})
    # llama.cpp reads no tokenizer without merges; this one joins what no text here has.
    byte_tokenizer(chat_template=CHATML, merges=[("q", "z")]).save_pretrained(folder)
    return folder, mx.array(logits.numpy())


def drafted_logits(folder: Path) -> mx.array:
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    own = of_drafts.load_draft(base)
    hidden = own.head.hidden(mx.array([IDS]))
    return own.head.logits(of_drafts.drafted(own.draft, own.target, hidden, mx.array([[*IDS[1:], NEXT]])))


def test_a_head_gives_the_logits_of_torch_before_and_after_a_conversion(published, tmp_path):
    folder, expected = published
    succeeds("convert", "--model", folder, "--out", tmp_path / "float", "--no-quantize", "--dtype", "float32")
    for one in (folder, tmp_path / "float"):
        assert mx.abs(drafted_logits(one) - expected).max() < 1e-4


@pytest.fixture(scope="module")
def tuned(published, tmp_path_factory):
    """An adapter of the model, with a head that drafts what it says."""
    root = tmp_path_factory.mktemp("tuned")
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    adapter = root / "adapter"
    succeeds(
        "train", "--model", published[0], "--data", data, "--adapter-path", adapter, "--iters", 60, "--learning-rate", 5e-3,
        "--sample-tokens", 0, "--train-mtp",
    )  # fmt: skip
    return adapter, json.loads((adapter / "report.json").read_text())["drafts"]


def accepted_by_mlx_vlm(folder: Path) -> list[int]:
    from mlx_vlm import load, stream_generate
    from mlx_vlm.speculative.drafters import load_drafter

    own = folder / FOLDER
    model, processor = load(str(folder))
    drafter, kind = load_drafter(str(own if own.is_dir() else folder))
    list(
        stream_generate(model, processor, PROMPT, max_tokens=60, temperature=0.0, draft_model=drafter, draft_kind=kind)
    )
    return list(drafter.accept_lens)


@pytest.fixture(scope="module")
def merged(published, tuned, tmp_path_factory):
    """The model as it would be published again: transformers' layout, with the adapter and its head."""
    out = tmp_path_factory.mktemp("merged") / "hf"
    succeeds("export", "--model", published[0], "--adapter-path", tuned[0], "--to", "hf", "--out", out)
    return out


def test_the_head_drafts_more_after_it_was_trained(tuned):
    assert tuned[1]["after"] > tuned[1]["before"] + 0.3


def test_the_merged_model_is_the_adapted_one_in_transformers(published, tuned, merged):
    from transformers import Qwen3_5ForConditionalGeneration

    from mlx_lora.exporters.adapter_folder import load_adapter

    base = load_base(ModelSettings(model=str(published[0]), dtype="float32"))
    load_adapter(base, tuned[0])
    with torch.no_grad():
        model = Qwen3_5ForConditionalGeneration.from_pretrained(merged, dtype=torch.float32).eval()
        logits = model(input_ids=torch.tensor([IDS])).logits
    assert mx.abs(base.model(mx.array([IDS])) - mx.array(logits.numpy())).max() < 1e-3
    before, after = (mx.load(str(one / "model.safetensors")) for one in (published[0], merged))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before if ".visual." in name)


def test_mlx_vlm_and_llama_cpp_accept_the_same_drafts_of_every_form(merged, tmp_path):
    expected = accepted_by_mlx_vlm(merged)
    assert sum(expected) > 10
    succeeds("convert", "--model", merged, "--out", tmp_path / "mlx", "--no-quantize", "--dtype", "float32")
    assert accepted_by_mlx_vlm(tmp_path / "mlx") == expected
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for base in (merged, tmp_path / "mlx"):  # an adapter that changes next to nothing
        adapter = tmp_path / f"of-{base.name}"
        still = ("--iters", 1, "--learning-rate", 1e-9, "--sample-tokens", 0)
        succeeds("train", "--model", base, "--data", data, "--adapter-path", adapter, *still)
    succeeds("fuse", "--model", tmp_path / "mlx", "--adapter-path", tmp_path / "of-mlx", "--out", tmp_path / "fused")
    assert accepted_by_mlx_vlm(tmp_path / "fused") == expected
    succeeds(
        "export", "--model", merged, "--adapter-path", tmp_path / "of-hf", "--to", "hf", "--out", tmp_path / "again"
    )
    assert accepted_by_mlx_vlm(tmp_path / "again") == expected
    succeeds("convert", "--model", merged, "--out", tmp_path / "packed", "--bits", 4, "--dtype", "float32")
    assert sum(accepted_by_mlx_vlm(tmp_path / "packed")) > 10

    pytest.importorskip("xllamacpp")
    from parity.llamacpp import start_llamacpp

    file = tmp_path / "model.gguf"
    succeeds("export", "--model", tmp_path / "mlx", "--to", "gguf", "--gguf-type", "f32", "--out", file)
    asked = {"prompt": PROMPT, "n_predict": 60, "temperature": 0, "cache_prompt": False}
    timings = start_llamacpp(file, drafts=2).handle_completions(asked)["timings"]
    assert abs(timings["draft_n"] - 2 * len(expected)) <= 8  # near the text's end it drafts fewer
    assert abs(timings["draft_n_accepted"] - sum(expected)) <= 2


def test_a_head_of_a_model_without_one_is_a_drafter_of_mlx_vlm(tmp_path):
    from mlx_vlm.speculative.drafters import load_drafter

    base = load_base(ModelSettings(model=str(write_llama(tmp_path / "llama"))))
    config = of_drafts.new_config(base, of_drafts.head_of(base))
    draft = of_drafts.new_draft(config)
    write_draft(tmp_path, config, dict(tree_flatten(draft.parameters())))
    loaded, kind = load_drafter(str(tmp_path / FOLDER))
    assert kind == "mtp"
    assert all(
        mx.array_equal(a, b)
        for (_, a), (_, b) in zip(tree_flatten(loaded.parameters()), tree_flatten(draft.parameters()), strict=True)
    )


def write_llama(folder: Path) -> Path:
    from architectures.build import write_architecture

    return write_architecture(folder, "llama")
