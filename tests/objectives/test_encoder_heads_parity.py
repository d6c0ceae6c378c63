"""Score heads of encoders, and transformers' models for sequence classification under PEFT on torch: scores, losses, gradients."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bound import bind, with_targets
from comparing import by_dtype
from mlx.utils import tree_unflatten
from run_cli import run, succeeds
from tiny_encoders import KINDS, tiny_encoder

import mlx_lora
from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, DataSettings, ModelSettings
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.exporters.peft import PREFIX, peft_path, write_peft
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.head import head_parameters, put_head
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of

pytestmark = [
    pytest.mark.parity,
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")),
]
LONG = "a longer document with more words than the row of an encoder of these sizes may ever have"
QUERIES = [
    {"query": "who is it", "positive": "the cat", "negatives": ["x", LONG]},
    {"query": "and where", "positive": "by the river, or under a bridge", "negatives": ["no"]},
    {"query": "why", "positives": ["because", "for it"], "negatives": ["[SEP] is spelled", "</s>"]},
]
LABELED = [
    {"premise": "the cat sleeps", "hypothesis": "it is awake", "label": "no"},
    {"premise": "the cat sleeps on the roof of the house of an old woman", "hypothesis": LONG, "label": "maybe"},
    {"premise": "x", "hypothesis": "y", "label": "yes"},
]
# ModernBERT also averages over all tokens.
CASES = [(kind, {}) for kind in KINDS] + [("modernbert", {"classifier_pooling": "mean"})]
IDS = [*KINDS, "modernbert, mean"]


def encoded(objective, records: list[dict], base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    settings = DataSettings(max_seq_length=base.model.args.longest)
    rows = load_eval_set(str(file), settings, base.hf_tokenizer, objective.options.records)
    rows = with_targets(objective, rows)
    return BatchPlan(rows, batch_tokens=4096, batch_size=3, seed=0).batch(0, 0)


def ours(objective, records, folder, tmp_path):
    """Return the loss and its gradients of an adapted encoder, which is also written for PEFT."""
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=4, alpha=8.0), seed=1)
    batch = encoded(objective, records, base, tmp_path)  # first, since labels decide how many outputs there are
    put_head(base, 1, objective.head.outputs)
    random = np.random.default_rng(5)
    moved = [
        (name, mx.array(random.normal(0, 0.1, value.shape).astype(np.float32)))
        for name, value in adapter_parameters(base.model).items()
        if "lora_b" in name
    ]
    base.model.update(tree_unflatten(moved))
    write_peft(tmp_path / "peft", base.model, str(folder), 0.0, head_parameters(base.model))
    bound = bind(objective, choose_loss(base.model, base.config), base)

    def loss(model, arrays):
        total, count, _ = bound.loss.train(model, arrays)
        return total / count

    found, gradients = nn.value_and_grad(base.model, loss)(base.model, bound.arrays_of(batch))
    base.model.update(gradients)
    return found.item(), {name: np.array(value) for name, value in adapter_parameters(base.model).items()}


def in_transformers(folder, peft_folder, outputs: int):
    """Return the model under PEFT, as it reads what we wrote, and the tokenizer."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    model = peft.PeftModel.from_pretrained(base, peft_folder, is_trainable=True).eval()  # eval: without dropout
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def scores_there(model, tokenizer, pairs):
    given = tokenizer(
        *map(list, zip(*pairs, strict=True)),
        padding=True,
        truncation=True,
        return_tensors="pt",
        split_special_tokens=True,
    )
    return model(**given).logits


def theirs_of(name: str, kind: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the name of a parameter in PEFT's model, and its value in its layout."""
    path, _, leaf = name.rpartition(".")
    side = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}.get(leaf)
    if side:
        return f"{PREFIX}{peft_path(path, kind)}.{side}", value.T
    return f"{PREFIX}{peft_path(path, kind)}.{leaf}", value


def check_gradients(model, gradients: dict[str, np.ndarray], kind: str):
    named = {name.replace(".modules_to_save.default", ""): value for name, value in model.named_parameters()}
    trained = {name for name, value in named.items() if value.requires_grad and value.grad is not None}
    expected = dict(theirs_of(name, kind, value) for name, value in gradients.items())
    assert expected.keys() == trained
    for name, value in expected.items():
        there = named[name].grad.numpy()
        assert np.linalg.norm(value - there) < 1e-4 * max(np.linalg.norm(there), 1e-2), name
        # The order of documents does not depend on what is added to all of their scores.
        assert np.linalg.norm(there) > 1e-6 or name.endswith(("classifier.bias", "out_proj.bias")), name


@pytest.mark.float32
@pytest.mark.parametrize(("kind", "config"), CASES, ids=IDS)
def test_a_reranker_has_transformers_loss_and_gradients(kind, config, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tiny_encoder(kind, tmp_path / "model", 1, **config)
    found, gradients = ours(objective_of(ObjectiveSettings("rerank")), QUERIES, folder, tmp_path)
    model, tokenizer = in_transformers(folder, tmp_path / "peft", 1)
    parts = []
    for row in QUERIES:
        good = row.get("positives") or [row["positive"]]
        scores = scores_there(model, tokenizer, [(row["query"], text) for text in (*good, *row["negatives"])])[:, 0]
        apart = scores[len(good) :][None] - scores[: len(good)][:, None]
        parts.append(torch.nn.functional.softplus(apart).flatten() / np.log(2))
    loss = torch.cat(parts).mean()
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-5)
    check_gradients(model, gradients, kind)


@pytest.mark.float32
@pytest.mark.parametrize(("kind", "config"), CASES, ids=IDS)
def test_a_classifier_of_pairs_has_transformers_loss_and_gradients(kind, config, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tiny_encoder(kind, tmp_path / "model", 3, **config)
    objective = objective_of(ObjectiveSettings("classify"))
    found, gradients = ours(objective, LABELED, folder, tmp_path)
    model, tokenizer = in_transformers(folder, tmp_path / "peft", 3)
    logits = scores_there(model, tokenizer, [(row["premise"], row["hypothesis"]) for row in LABELED])
    targets = torch.tensor([objective.questions[0].labels.index(row["label"]) for row in LABELED])
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-5)
    check_gradients(model, gradients, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_gives_the_scores_of_a_fused_reranker(kind, tmp_path):
    torch, there = pytest.importorskip("torch"), pytest.importorskip("sentence_transformers")
    folder, out = tiny_encoder(kind, tmp_path / "model", 1), tmp_path / "hf"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, QUERIES * 3)))
    common = ("--model", folder, "--adapter-path", tmp_path / "a")
    succeeds("train", *common, "--data", tmp_path / "rows.jsonl", "--objective", "rerank", "--iters", 4, "--learning-rate", "1e-2",
              "--rank", 4, "--kernels", "ours")  # fmt: skip
    assert run("export", *common, "--to", "hf", "--out", out).code == 0
    documents = ["the cat", "x", LONG]
    model = there.CrossEncoder(str(out), device="cpu", activation_fn=torch.nn.Sigmoid())
    wanted = model.predict([("who is it", text) for text in documents])
    found = {one["index"]: one["score"] for one in mlx_lora.rerank(folder, "who is it", documents, tmp_path / "a")}
    assert [found[n] for n in range(3)] == pytest.approx(list(wanted), abs=by_dtype(1e-5, 2e-2))
    before = there.CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Sigmoid())
    assert np.abs(wanted - before.predict([("who is it", text) for text in documents])).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_peft_trained_gives_its_scores_here(kind, tmp_path):
    """PEFT saves the last layer by itself; what is before it is the checkpoint's own."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = tiny_encoder(kind, tmp_path / "model", 1)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    layers = ["query", "value"] if kind != "modernbert" else ["Wqkv"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=layers, task_type="SEQ_CLS"))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in (value for value in model.parameters() if value.requires_grad):
            value += 0.1 * torch.randn_like(value)
    model.eval().save_pretrained(tmp_path / "peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = ["the cat", "x", LONG]
    with torch.no_grad():
        wanted = scores_there(model, tokenizer, [("who is it", text) for text in documents])[:, 0].sigmoid().tolist()
    found = {one["index"]: one["score"] for one in mlx_lora.rerank(folder, "who is it", documents, tmp_path / "peft")}
    assert [found[n] for n in range(3)] == pytest.approx(wanted, abs=by_dtype(1e-5, 2e-2))
