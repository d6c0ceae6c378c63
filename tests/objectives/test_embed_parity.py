"""Vectors, losses and gradients here, and those of sentence-transformers over transformers on torch; and a run of both."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from curves import cosine, step_of
from embedding_cases import bound, columns, random_examples
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.models.load import load_base

pytestmark = [
    pytest.mark.parity,
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")),
]
MODES = {"mean": "mean", "last": "lasttoken", "cls": "cls"}
DIMS = "64,32,16"
CASES = {
    "infonce, mean": ({"pooling": "mean"}, 0),
    "infonce, last": ({"pooling": "last", "embed_temp": 0.1}, 0),
    "infonce, negatives": ({"pooling": "mean"}, 2),
    "infonce, matryoshka": ({"pooling": "mean", "matryoshka_dims": DIMS}, 1),
    "triplet, last": ({"embed_loss": "triplet", "pooling": "last", "triplet_margin": 0.3}, 1),
    "triplet, matryoshka": ({"embed_loss": "triplet", "pooling": "mean", "matryoshka_dims": DIMS}, 1),
    "cosent, mean": ({"embed_loss": "cosent", "pooling": "mean"}, 0),
    "cosine, last": ({"embed_loss": "cosine", "pooling": "last"}, 0),
}


def judge(folder, settings: dict):
    """Return sentence-transformers' model and loss of these settings."""
    pytest.importorskip("sentence_transformers")
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling

    body = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.auto_model = body

        def forward(self, features):
            states = body(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
            return features | {"token_embeddings": states.last_hidden_state}

    width = body.config.hidden_size
    model = SentenceTransformer(modules=[Body(), Pooling(width, MODES[settings["pooling"]])], device="cpu")
    scale, kind = 1 / settings.get("embed_temp", 0.05), settings.get("embed_loss", "infonce")
    if kind == "infonce":
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale)
    elif kind == "triplet":
        loss = losses.TripletLoss(model, losses.TripletDistanceMetric.COSINE, settings.get("triplet_margin", 0.5))
    else:
        loss = losses.CoSENTLoss(model, scale=scale) if kind == "cosent" else losses.CosineSimilarityLoss(model)
    if dims := settings.get("matryoshka_dims"):
        loss = losses.MatryoshkaLoss(model, loss, [int(dim) for dim in dims.split(",")])
    return body, model, loss


def features(batch):
    import torch

    return [{"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)} for ids, mask in columns(batch)]


def scores_of(batch):
    import torch

    return torch.tensor(batch.columns["labels"][batch.numbers >= 0][:: batch.group])


def one_batch(rows, examples: int):
    return BatchPlan(rows, batch_tokens=10**6, batch_size=examples, seed=0).batch(0, 0)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_sentence_transformers(case, tiny_folder):
    settings, negatives = CASES[case]
    rows = random_examples(7, negatives, scored=settings.get("embed_loss") in ("cosent", "cosine"))
    base = load_base(ModelSettings(model=str(tiny_folder), dtype="float32"))
    _, task = bound(base, rows, **settings)
    base.model.unfreeze()
    batch = one_batch(rows, 7)
    (total, count, _), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(batch))
    assert count.item() == 7
    body, _, loss = judge(tiny_folder, settings)
    theirs = loss(features(batch), scores_of(batch))
    theirs.backward()
    assert (total / count).item() == pytest.approx(theirs.item(), rel=1e-4)
    gradients = {f"model.{name}": value.grad.numpy() for name, value in body.named_parameters()}
    found = {name: np.array(value / count) for name, value in tree_flatten(grads)}
    assert found.keys() == gradients.keys()
    for name, value in found.items():
        assert np.linalg.norm(gradients[name]) > 0, name
        assert np.linalg.norm(value - gradients[name]) < 1e-4 * np.linalg.norm(gradients[name]), name


def test_another_temperature_or_pooling_is_another_loss(tiny_folder):
    rows = random_examples(7)
    base = load_base(ModelSettings(model=str(tiny_folder), dtype="float32"))
    found = []
    for settings in ({}, {"embed_temp": 0.06}, {"pooling": "mean"}, {"pooling": "cls"}, {"matryoshka_dims": "64,32"}):
        task = bound(base, rows, **settings)[1]
        found.append(task.loss.train(base.model, task.arrays_of(one_batch(rows, 7)))[0].item())
    assert len(set(np.round(found, 3))) == len(found)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_run_of_thirty_steps_is_torchs(accumulated, tiny_folder):
    """The curve of LoRA with in-batch negatives, in one micro-batch or in four that share their negatives."""
    import peft
    import torch

    rows = random_examples(24, 1)
    settings = {"pooling": "mean"}
    base = load_base(ModelSettings(model=str(tiny_folder), dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=4, alpha=8.0), seed=1)
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    _, task = bound(base, rows, **settings)
    step = step_of(base.model, task)
    body, model, _ = judge(tiny_folder, settings)
    wrapped = peft.get_peft_model(body, peft.LoraConfig(r=4, lora_alpha=8, target_modules=r"layers\..*_proj"))
    trained = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    for name, value in trained.items():
        value.data = torch.tensor(initial[here(name)].T.copy())
    from sentence_transformers.sentence_transformer import losses

    judged = losses.MultipleNegativesRankingLoss(model)
    torch_optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.01)
    whole = BatchPlan(rows, batch_tokens=10**6, batch_size=8, seed=0)
    ours, theirs = [], []
    for number in range(30):
        batch = whole.batch(*divmod(number, len(whole)))
        size = len(batch.inputs) // accumulated
        result = step([batch.take(np.arange(size) + size * part, size) for part in range(accumulated)])
        ours.append(result.loss_sum.item() / result.count.item())
        loss = judged(features(batch), None)
        torch_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        torch_optimizer.step()
        theirs.append(loss.item())
    assert ours[-1] < 0.8 * ours[0]
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-3 * max(theirs)
    final = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    for name, value in trained.items():
        assert cosine(final[here(name)].T, value.detach().numpy()) > 0.9999, name


def here(name: str) -> str:
    """Return our name of one of PEFT's factors of a body."""
    plain = name.removeprefix("base_model.model.").replace(".default.weight", "")
    return "model." + plain.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def test_a_last_token_is_read_alone(tiny_folder):
    """The last block computes only the pooled tokens, and the vectors stay the same."""
    from mlx_lora.objectives.embed import Embedder, arrays_of

    rows = random_examples(5)
    base = load_base(ModelSettings(model=str(tiny_folder), dtype="float32"))
    arrays = arrays_of(one_batch(rows, 5))
    queries, lengths = arrays["queries"], arrays["queries_lengths"]
    whole, part = (Embedder.of(base.model, "last", part)(queries, lengths) for part in (False, True))
    assert mx.allclose(whole, part, atol=1e-5)
    assert not mx.allclose(whole, Embedder.of(base.model, "cls")(queries, lengths), atol=1e-2)
