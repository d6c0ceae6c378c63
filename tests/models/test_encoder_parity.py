"""Hidden states and gradients of our encoders, and those of transformers, for rows of several lengths in one batch."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from real_models import minilm

import mlx_lora
from mlx_lora.models.config import ENCODERS, OWN_ARCHITECTURES
from mlx_lora.models.encoder import ModelArgs
from mlx_lora.models.folder import load_weights

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
LENGTHS = (7, 23, 40, 1)
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
CASES = {
    "bert": {"max_position_embeddings": 64},
    "roberta": {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 3, "pad_token_id": 0},
}


def saved(kind: str, folder, heads: bool = False):
    """Write a random model of transformers, and return its body."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL, **CASES[kind])
    made = transformers.AutoModelForMaskedLM if heads else transformers.AutoModel
    model = made.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:  # norms of one and biases of zero are special cases
                value += 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    return model.base_model if heads else model


def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    ids = random.integers(2, SMALL["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    return ids, mask


@pytest.mark.parametrize("heads", [False, True], ids=["body", "with its head"])
@pytest.mark.parametrize("kind", CASES)
def test_hidden_states_and_gradients_are_transformers(kind, heads, tmp_path):
    import torch

    theirs = saved(kind, tmp_path, heads)
    model, _ = load_weights(tmp_path, trust_remote_code=False)
    ids, mask = batch()
    padding = CASES[kind].get("pad_token_id", 0)
    inputs = torch.tensor(np.where(mask, ids, padding))
    states = theirs(input_ids=inputs, attention_mask=torch.tensor(mask.astype(np.int64))).last_hidden_state
    direction = np.random.default_rng(1).normal(size=states.shape) * mask[..., None]
    (states * torch.tensor(direction, dtype=torch.float32)).sum().backward()

    def along(model):
        found = model.model(mx.array(ids.astype(np.int32) * mask), mx.array(np.array(LENGTHS)))
        return (found * mx.array(direction.astype(np.float32))).sum(), found

    model.unfreeze()
    (_, found), grads = nn.value_and_grad(model, along)(model)
    expected = states.detach().numpy()
    assert np.abs((np.array(found) - expected)[mask]).max() < 1e-5
    gradients = {f"model.{name}": value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    ours = dict(tree_flatten(grads))
    assert ours.keys() == gradients.keys()
    for name, value in gradients.items():
        size = np.linalg.norm(value.numpy())
        assert np.linalg.norm(np.array(ours[name]) - value.numpy()) < 1e-4 * max(size, 1e-2), name
    whole = np.array(model.model(mx.array(ids.astype(np.int32) * mask)))  # as if padding were text
    assert np.abs((whole - expected)[mask]).max() > 1e-2


def test_what_no_encoder_of_ours_can_be_is_refused():
    plain = {"model_type": "bert", **SMALL}
    assert ModelArgs.from_dict(plain).longest == 512
    for change in ({"is_decoder": True}, {"position_embedding_type": "relative_key"}, {"hidden_act": "odd"}):
        with pytest.raises(ValueError, match=r"decoder|activation"):
            ModelArgs.from_dict(plain | change)
    assert set(CASES) < set(ENCODERS)
    assert {name for name, module in OWN_ARCHITECTURES.items() if module == "encoder"} == set(ENCODERS)


@pytest.mark.slow
def test_vectors_of_minilm_are_those_of_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = minilm()
    texts = ["Where is my parcel?", "Orders > Delivery: the mail with its number has a link.", "x", "word " * 400]
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(
        texts, normalize_embeddings=True
    )
    ours = mlx_lora.embed(str(folder), texts)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(mlx_lora.embed(str(folder), texts, pooling="cls") - theirs).max() > 1e-2
