"""PEFT folders both ways, against PEFT itself on torch."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, write_folder
from make_adapters import TOKENS, adapt_and_save, as_peft, loaded, make_adapter, our_logits
from run_cli import holds, one_line, run, succeeds
from torch_judge import torch_base

from mlx_lora.exporters.peft import PEFT_CONFIG, PEFT_WEIGHTS
from mlx_lora.utils.errors import InputError

# PEFT calls what transformers has deprecated, and has advice of its own on tied layers.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

CLOSE = 1e-4
FAR = 1e-2


@pytest.fixture(scope="session")
def biased_folder(tmp_path_factory):
    config = {"tie_word_embeddings": False, "attention_bias": True, "architectures": ["LlamaForCausalLM"]}
    model = tiny_model(tie_word_embeddings=False, attention_bias=True)
    return write_folder(tmp_path_factory.mktemp("biased"), model, config)


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.array(TOKENS))).logits.numpy()


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def peft_logits(folder, adapter) -> np.ndarray:
    model = pytest.importorskip("peft").PeftModel.from_pretrained(torch_base(folder), adapter)
    return torch_logits(model.eval())


# Ten adapters with odd settings, as PEFT makes them.
ODD = {
    "all-linear": {"target_modules": "all-linear"},
    "two names": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7},
    "rslora": {"target_modules": ["o_proj", "down_proj"], "r": 5, "use_rslora": True},
    "rank pattern": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}},
    "alpha pattern": {"target_modules": "all-linear", "alpha_pattern": {"v_proj": 1, "layers.0.mlp.*": 31}},
    "both patterns, rslora": {
        "target_modules": ["k_proj", "gate_proj"],
        "rank_pattern": {"model.layers.0.self_attn.k_proj": 7},
        "alpha_pattern": {"gate_proj": 5},
        "use_rslora": True,
    },
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.down_proj)"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora, rank pattern": {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"k_proj": 2}},
}


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_adapters_that_peft_made_load_here(peft, name, tied, tiny_folder, untied_folder, tmp_path):
    import torch

    folder = tiny_folder if tied else untied_folder
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **ODD[name]}
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(0)
    for key, value in model.named_parameters():
        if "magnitude" in key:
            value.data *= 1 + 0.1 * torch.randn(value.shape)
        elif "lora_" in key:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path / "a")
    if tied and name == "head":  # MLX's tied head is the embedding itself
        with pytest.raises(InputError, match="adapts the tied head separately"):
            our_logits(folder, tmp_path / "a")
        return
    expected = torch_logits(model)
    assert np.allclose(our_logits(folder, tmp_path / "a"), expected, atol=CLOSE)
    assert not np.allclose(our_logits(folder), expected, atol=FAR)


@pytest.mark.parity
@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize(
    ("targets", "layers"),
    [("all-linear", -1), ("q_proj,v_proj", 1), ("all-linear,embed_tokens", -1), ("layers.0.mlp.*,k_proj", -1)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_our_adapters_load_in_peft_and_come_back(targets, layers, tied, tiny_folder, untied_folder, tmp_path):
    folder = tiny_folder if tied else untied_folder
    expected = as_peft(folder, tmp_path, targets, layers)
    assert np.allclose(peft_logits(folder, tmp_path / "p"), expected, atol=CLOSE)
    assert not np.allclose(torch_logits(torch_base(folder)), expected, atol=FAR)
    assert np.allclose(our_logits(folder, tmp_path / "p"), expected, atol=1e-5)


@pytest.mark.parity
def test_a_merged_folder_gives_transformers_our_logits(tiny_folder, tmp_path):
    expected = np.array(adapt_and_save(tiny_folder, tmp_path / "ours"))
    succeeds(
        "export", "--model", tiny_folder, "--adapter-path", tmp_path / "ours", "--to", "hf", "--out", tmp_path / "hf"
    )
    assert np.allclose(torch_logits(torch_base(tmp_path / "hf")), expected, atol=CLOSE)


def test_an_embedding_alone_leaves_the_tied_head(tiny_folder, tmp_path):
    as_peft(tiny_folder, tmp_path, "embed_tokens")
    both = our_logits(tiny_folder, tmp_path / "p")
    stored = mx.load(str(tmp_path / "p" / PEFT_WEIGHTS))
    kept = {name: value for name, value in stored.items() if "lm_head" not in name}
    assert len(kept) < len(stored)
    mx.save_safetensors(str(tmp_path / "p" / PEFT_WEIGHTS), kept)
    assert not np.allclose(our_logits(tiny_folder, tmp_path / "p"), both, atol=FAR)
    ran = run("fuse", "--model", tiny_folder, "--adapter-path", tmp_path / "p", "--out", tmp_path / "f")
    one_line(ran, "changes the embedding but not the tied head")


FULL = {
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding and norms": {
        "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens", "norm", "input_layernorm"],
    },
    "all biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "head and biases": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
}


def loads_here(model, folder, out):
    """Change what a PEFT model trains, save it, check that it loads here with the same logits, and return them."""
    import torch

    torch.manual_seed(0)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn(value.shape)
    model.save_pretrained(out)
    expected = torch_logits(model)
    assert np.allclose(our_logits(folder, out), expected, atol=CLOSE)
    assert not np.allclose(our_logits(folder), expected, atol=FAR)
    return expected


@pytest.mark.parity
@pytest.mark.parametrize("name", FULL)
def test_what_peft_trained_in_full_loads_here_and_goes_back(peft, name, biased_folder, tmp_path):
    model = peft.get_peft_model(torch_base(biased_folder), peft.LoraConfig(r=4, lora_alpha=6, **FULL[name])).eval()
    expected = loads_here(model, biased_folder, tmp_path / "a")
    succeeds(
        "export", "--model", biased_folder, "--adapter-path", tmp_path / "a", "--to", "peft", "--out", tmp_path / "b"
    )
    assert np.allclose(peft_logits(biased_folder, tmp_path / "b"), expected, atol=CLOSE)
    for to in ("mlx-lm", "gguf-adapter"):
        ran = run(
            "export", "--model", biased_folder, "--adapter-path", tmp_path / "a", "--to", to, "--out", tmp_path / "c"
        )
        assert (ran.code, f"--to {to}" in ran.err) == (2, True), ran.err


@pytest.mark.parity
@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"], ["lm_head"]])
def test_what_peft_trained_in_full_and_tied_loads_here(peft, saved, tiny_folder, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)
    model = peft.get_peft_model(torch_base(tiny_folder), config).eval()
    loads_here(model, tiny_folder, tmp_path / "a")


@pytest.mark.parity
@pytest.mark.usefixtures("peft")
def test_transformers_itself_reads_our_dora(tiny_folder, tmp_path):
    """It loads PEFT's folders with a loader of its own, and not the magnitudes under the name that PEFT writes."""
    make_adapter(tiny_folder, tmp_path / "p", form="dora", peft=True)
    model = torch_base(tiny_folder)
    model.load_adapter(str(tmp_path / "p"))
    found = torch_logits(model.eval())
    assert np.allclose(found, our_logits(tiny_folder, tmp_path / "p"), atol=CLOSE)
    assert not np.allclose(found, our_logits(tiny_folder), atol=FAR)
    assert np.allclose(peft_logits(tiny_folder, tmp_path / "p"), found, atol=CLOSE)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 6])
def test_an_adalora_that_peft_made_loads_here(peft, steps, untied_folder, tmp_path):
    import torch

    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=1, tfinal=2, deltaT=1, lora_alpha=32, total_step=6, task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(torch_base(untied_folder), config).train()
    torch.manual_seed(0)
    trained = [value for value in model.parameters() if value.requires_grad]
    for value in trained:
        value.data = 0.3 * torch.randn(value.shape)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(torch.randint(0, 200, (2, 16))).logits.square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    model.eval().save_pretrained(tmp_path / "a")
    expected = torch_logits(model)
    assert np.allclose(our_logits(untied_folder, tmp_path / "a"), expected, atol=CLOSE)
    assert not np.allclose(our_logits(untied_folder), expected, atol=FAR)


REFUSED = {
    "dora without magnitudes": ({"use_dora": True}, "has A and B, not A and B and m"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, "peft_type PREFIX_TUNING"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_over_is_named(name, tiny_folder, tmp_path):
    as_peft(tiny_folder, tmp_path)
    config = json.loads((tmp_path / "p" / PEFT_CONFIG).read_text())
    changes, words = REFUSED[name]
    (tmp_path / "p" / PEFT_CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=words):
        our_logits(tiny_folder, tmp_path / "p")


def test_foreign_and_misshapen_tensors_are_gathered(tiny_folder, tmp_path):
    as_peft(tiny_folder, tmp_path, "q_proj")
    stored = mx.load(str(tmp_path / "p" / PEFT_WEIGHTS))
    first, second = sorted(name for name in stored if "lora_A" in name)
    stored.pop(first)
    stored |= {
        second: mx.zeros((4, 3)),
        "base_model.model.model.layers.0.self_attn.q_proj.bias": mx.zeros((4,)),
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": mx.zeros((4, 64)),
        "base_model.model.lm_head.lora_A.weight": mx.zeros((4, 64)),
    }
    mx.save_safetensors(str(tmp_path / "p" / PEFT_WEIGHTS), stored)
    with pytest.raises(InputError) as raised:
        our_logits(tiny_folder, tmp_path / "p")
    holds(
        str(raised.value),
        "q_proj.bias is not a LoRA factor",
        "layers.7.self_attn.q_proj is not in the model",
        "layers.0.self_attn.q_proj has B, not A and B",
        "layers.1.self_attn.q_proj has adapter weights for 3 -> 64",
    )


def test_a_changed_copy_of_the_embedding_is_refused(tiny_folder, tmp_path):
    as_peft(tiny_folder, tmp_path, "embed_tokens")
    stored, own = mx.load(str(tmp_path / "p" / PEFT_WEIGHTS)), mx.load(str(tiny_folder / "model.safetensors"))
    before, weight = our_logits(tiny_folder, tmp_path / "p"), own["model.embed_tokens.weight"]
    for copy, words in ((weight, None), (weight[:200], "resized"), (weight * 1.1, "trained in full")):
        stored["base_model.model.model.embed_tokens.base_layer.weight"] = copy
        mx.save_safetensors(str(tmp_path / "p" / PEFT_WEIGHTS), stored)
        if words is None:
            assert np.allclose(our_logits(tiny_folder, tmp_path / "p"), before, atol=1e-6)
            continue
        with pytest.raises(InputError, match=words):
            our_logits(tiny_folder, tmp_path / "p")


def test_pickles_are_refused(tiny_folder, tmp_path):
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match="pickled"):
        our_logits(tiny_folder, tmp_path)


@pytest.mark.parity
@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("pissa", {}),
        ("adalora", {"adalora_tinit": 2, "adalora_tfinal": 2, "adalora_delta_t": 1}),
        ("relora", {"relora_every": 3}),
        ("lora", {"rank_pattern": "q_proj=2,*.mlp.*=6", "alpha_pattern": "layers.1.*=3", "modules_to_save": "lm_head"}),
    ],
)
def test_every_methods_run_goes_to_peft_as_a_plain_lora(method, extra, untied_folder, chats, tmp_path):
    flags = [word for name, value in extra.items() for word in (f"--{name.replace('_', '-')}", value)]
    succeeds(
        "train", "--model", untied_folder, "--data", chats, "--adapter-path", tmp_path / "ours", "--method", method,
        "--iters", 8, "--rank", 4, "--batch-tokens", 256, "--learning-rate", 2e-2, "--val-batches", 0, *flags,
    )  # fmt: skip
    expected = our_logits(untied_folder, tmp_path / "ours")
    assert not np.allclose(our_logits(untied_folder), expected, atol=1e-3)
    succeeds(
        "export", "--model", untied_folder, "--adapter-path", tmp_path / "ours", "--to", "peft", "--out", tmp_path / "p"
    )
    assert np.allclose(peft_logits(untied_folder, tmp_path / "p"), expected, atol=2e-4 * max(1, np.abs(expected).max()))
    assert np.allclose(our_logits(untied_folder, tmp_path / "p"), expected, atol=1e-4)


@pytest.mark.parity
def test_two_adapters_merged_in_peft_are_the_sum_of_both_here(untied_folder, tmp_path):
    """The steps of docs/merge-adapters.md."""
    from peft import PeftModel

    for seed, name in enumerate(("bard", "tutor"), start=1):
        adapter = make_adapter(untied_folder, tmp_path / name, rank=2 + seed, seed=seed, strength=0.1)
        out = tmp_path / f"{name}-peft"
        succeeds("export", "--model", untied_folder, "--adapter", adapter, "--to", "peft", "--out", out)
    model = PeftModel.from_pretrained(torch_base(untied_folder), tmp_path / "bard-peft", adapter_name="bard")
    model.load_adapter(tmp_path / "tutor-peft", adapter_name="tutor")
    model.add_weighted_adapter(["bard", "tutor"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    model.save_pretrained(tmp_path / "both-peft", selected_adapters=["both"])
    merged = loaded(untied_folder, tmp_path / "both-peft" / "both", ignore_fingerprint=True)
    both = np.array(merged.model(TOKENS))
    assert np.allclose(both, torch_logits(model.eval()), atol=CLOSE)
    # Half of each update is added to the weights.
    change = mx.zeros(1)
    for name in ("bard", "tutor"):
        base = loaded(untied_folder, tmp_path / name)
        change = change + 0.5 * base.model.model.layers[0].self_attn.q_proj.delta()
    assert np.allclose(merged.model.model.layers[0].self_attn.q_proj.delta(), change, atol=1e-5)
    assert not np.allclose(both, our_logits(untied_folder, tmp_path / "bard"), atol=FAR)
