"""Embeddings: cached gradients, negatives that are none, records, and runs through the command."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from embedding_cases import bound, random_examples
from mlx.utils import tree_flatten
from resumed_runs import metrics
from run_cli import one_line, refused, run, succeeds

import mlx_lora
from mlx_lora.adapters.inject import inject
from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.data.batch import split_rows
from mlx_lora.data.examples import EmptyRecord, FormatError, MissingColumn
from mlx_lora.data.pairs import TextForm, TextPair, load_pairs, parse_texts
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.engine.adapter_store import read_factors
from mlx_lora.losses.scores import ContrastiveOptions, Texts, loss_and_gradient, losses_of, retrieval, spearman
from mlx_lora.models.load import load_base
from mlx_lora.objectives.embed import all_vectors, arrays_of, stored_choices
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils.errors import InputError

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj")
WORDS = (
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "river",
    "stone",
    "cloud",
    "rain",
    "sun",
    "moon",
)
QUICK = ("--iters", 6, "--learning-rate", "5e-3", "--rank", 4, "--steps-per-report", 1, "--val-batches", 1,
         "--steps-per-eval", 3)  # fmt: skip


def adapted(folder):
    """Return a tiny model with an adapter that already changes it."""
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    inject(base.model, PATHS, rank=4, scale=2.0)
    random = np.random.default_rng(1)
    moved = [
        (name, mx.array(random.normal(0, 0.05, value.shape).astype(np.float32)))
        for name, value in tree_flatten(base.model.trainable_parameters())
        if name.endswith("lora_b")
    ]
    base.model.load_weights(moved, strict=False)
    return base


def gradient_of(base, task, batches) -> tuple[float, dict[str, mx.array]]:
    """Return a step's loss and gradients."""
    differentiate = differentiation(base.model, task.loss.train)
    total, gradients = 0.0, {}
    for batch in task.prepare(batches, SINGLE_DEVICE):
        loss, _, _, found = differentiate(task.arrays_of(batch))
        total += loss.item()
        for name, value in tree_flatten(found):
            gradients[name] = gradients.get(name, 0) + value
        mx.eval(gradients)
    return total, gradients


@pytest.mark.parametrize(
    "settings", [{}, {"pooling": "mean", "matryoshka_dims": "64,16"}, {"embed_loss": "cosent"}], ids=str
)
def test_cached_gradients_are_those_of_one_batch(settings, tiny_folder):
    scored = settings.get("embed_loss") == "cosent"
    rows = random_examples(64, 0 if scored else 1, scored)
    base = adapted(tiny_folder)
    _, task = bound(base, rows, **settings)
    batch = BatchPlan(rows, batch_tokens=10**6, batch_size=64, seed=0).batch(0, 0)
    loss, plain = gradient_of(base, task, [batch])
    cached_loss, cached = gradient_of(base, task, split_rows(batch, 8))
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    apart = [gradient_of(base, task, [part]) for part in split_rows(batch, 8)]  # each with negatives of its own alone
    for name, value in plain.items():
        size = mx.linalg.norm(value)
        assert mx.linalg.norm(cached[name] - value) < 1e-5 * size, name
        assert mx.linalg.norm(sum(one[name] for _, one in apart) - value) > 1e-2 * size, name
    assert sum(one for one, _ in apart) != pytest.approx(loss, rel=1e-2)


@pytest.mark.parametrize("most", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_examples_of_a_step(most, tiny_folder):
    """A step's peak grows by the vectors, their gradient and a chunk's similarities alone."""
    base = adapted(tiny_folder)
    peaks = {}
    for count in (64, most):
        rows = random_examples(count, seed=count)
        _, task = bound(base, rows)
        batches = list(BatchPlan(rows, batch_tokens=10**6, batch_size=64, seed=0).batches())
        gradient_of(base, task, batches[:1])
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        gradient_of(base, task, batches)
        peaks[count] = mx.get_peak_memory() - before
    of_vectors, similarities = most * 2 * 64 * 4, 256 * most * 4
    assert peaks[most] < peaks[64] + 5 * of_vectors + 8 * similarities
    assert peaks[most] < most / 64 * peaks[64] / 2  # what all at once would take


def test_what_is_no_negative():
    """Equal documents, the query's own text, another document of the same query, and absent negatives."""
    vectors = mx.array(np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32))
    different = np.arange(12, dtype=np.float32).reshape(4, 3)
    plain = losses_of(vectors, Texts(mx.array(different), mx.ones(4)), ContrastiveOptions())[0]

    def changed(place: tuple[int, int], number: float) -> mx.array:
        numbers = different.copy()
        numbers[place] = number
        return losses_of(vectors, Texts(mx.array(numbers), mx.ones(4)), ContrastiveOptions())[0]

    units = np.array(vectors) / np.linalg.norm(np.array(vectors), axis=-1, keepdims=True)
    cosines = (units[:, 0] @ units[:, 1:].reshape(8, 8).T) / 0.05  # (4, 8)

    def expected(left_out: list[tuple[int, int]]) -> np.ndarray:
        kept = cosines.copy()
        for row, column in left_out:
            kept[row, column] = -np.inf
        top = kept.max(axis=1)
        return np.log(np.exp(kept - top[:, None]).sum(axis=1)) + top - cosines[np.arange(4), 2 * np.arange(4)]

    assert np.allclose(plain, expected([]), atol=1e-4)
    assert np.allclose(changed((3, 1), different[0, 1]), expected([(0, 6), (3, 0)]), atol=1e-4)  # the same document
    assert np.allclose(changed((3, 2), different[0, 0]), expected([(0, 7)]), atol=1e-4)  # the query itself
    same_query = changed((2, 0), different[0, 0])
    assert np.allclose(same_query, expected([(0, 4), (2, 0)]), atol=1e-4)
    assert np.allclose(changed((1, 2), -1), expected([(row, 3) for row in range(4)]), atol=1e-4)
    assert not np.allclose(plain, same_query, atol=1e-4)


def test_padding_has_no_part_in_it():
    """An example of padding, whose vectors are zeros, changes neither losses nor gradients."""
    random = np.random.default_rng(0)
    vectors, numbers = random.normal(size=(5, 2, 8)).astype(np.float32), np.arange(10, dtype=np.float32).reshape(5, 2)
    for options in (ContrastiveOptions(), ContrastiveOptions("cosent"), ContrastiveOptions("cosine")):
        whole = loss_and_gradient(mx.array(vectors[:4]), Texts(mx.array(numbers[:4]), mx.ones(4)), options)
        vectors[4], numbers[4] = 0, 0
        real = mx.array([1.0, 1, 1, 1, 0])
        padded = loss_and_gradient(mx.array(vectors), Texts(mx.array(numbers), real), options)
        assert mx.allclose(padded.losses[:4], whole.losses, atol=1e-5)
        assert mx.allclose(padded.gradient[:4], whole.gradient, atol=1e-5)
        assert not padded.gradient[4].any()


def test_a_triplet_counts_the_negatives_that_are_there():
    vectors = mx.array(np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32))
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    options = ContrastiveOptions("triplet", margin=1.5)
    whole = losses_of(vectors, Texts(mx.array(numbers), mx.ones(3)), options)[0]
    numbers[0, 3] = -1
    fewer = losses_of(vectors, Texts(mx.array(numbers), mx.ones(3)), options)[0]
    alone = losses_of(vectors[:, :3], Texts(mx.array(numbers[:, :3]), mx.ones(3)), options)[0]
    assert fewer[0].item() == pytest.approx(alone[0].item())
    assert fewer[0].item() != pytest.approx(whole[0].item())
    assert mx.allclose(fewer[1:], whole[1:])


def test_queries_and_documents_have_widths_of_their_own(tiny_folder):
    rows = random_examples(6)
    batch = BatchPlan(rows, batch_tokens=10**6, batch_size=6, seed=0).batch(0, 0)
    arrays = arrays_of(batch)
    queries, documents = arrays["queries"], arrays["documents"]
    assert queries.shape[1] <= 8 < documents.shape[1] == batch.inputs.shape[1]
    base = adapted(tiny_folder)
    objective, _ = bound(base, rows, pooling="mean")
    from mlx_lora.objectives.embed import Embedder

    embedder = Embedder.of(base.model, objective.options.pooling)
    together, _ = all_vectors(base.model, embedder, [batch])
    for place, number in enumerate(batch.numbers.tolist()):
        tokens = rows.row(number)[0][:-1]
        alone = embedder(mx.array(tokens[None]), mx.array([len(tokens)]))
        assert mx.allclose(together[place // 2, place % 2], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    ("pooled", "modules", "found"),
    [
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
            ["models.Transformer", "models.Pooling"],
            "mean",
        ),
        ({"pooling_mode": "lasttoken"}, [], "last"),
        ({}, [], None),
        ({"pooling_mode_weightedmean_tokens": True}, [], "pools by weightedmean_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, [], "pools by mean_tokens and cls_token"),
        ({"pooling_mode_cls_token": True}, ["models.Transformer", "models.Pooling", "models.Dense"], "has Dense"),
    ],
)
def test_a_model_whose_vectors_are_computed_otherwise_is_refused(pooled, modules, found, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 8, **pooled}))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.{one}"} for one in modules]))
    if found in (None, "mean", "last"):
        assert stored_choices(tmp_path).get("pooling") == found
        return
    with pytest.raises(InputError, match=found):
        stored_choices(tmp_path)


def test_measures_of_ranking():
    found = retrieval([np.array([0]), np.array([4]), np.array([12]), np.array([1, 30])])
    assert found["accuracy"] == 0.25
    assert found["recall_at_10"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["mrr_at_10"] == pytest.approx((1 + 1 / 5 + 0 + 1 / 2) / 4)
    ideal = 1 + 1 / math.log2(3)
    assert found["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(6) + 0 + 1 / math.log2(3) / ideal) / 4)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 25, 90])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 2, 4]), np.array([4.0, 3, 3, 1])) == pytest.approx(-1)
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))


# Records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"anchor": "q", "positive": "d"}, [TextPair("q", "d")]),
        ({"anchor": "q", "positive": "d", "negative": "n"}, [TextPair("q", "d", ("n",))]),
        ({"anchor": "q", "positive": "d", "negative_1": "n", "negative_2": "m"}, [TextPair("q", "d", ("n", "m"))]),
        ({"query": "q", "pos": ["d", "e"], "neg": ["n"]}, [TextPair("q", "d", ("n",)), TextPair("q", "e", ("n",))]),
        ({"Question": "q", "Answer": "d"}, [TextPair("q", "d")]),
        ({"sentence1": "q", "sentence2": "d", "score": 0.5}, [TextPair("q", "d", score=0.5)]),
        ({"sentence1": "q", "sentence2": "d", "score": "0.5"}, [TextPair("q", "d", score=0.5)]),  # as a table has it
        ({"query": "q", "document": "d", "hard_negatives": [], "id": 3}, [TextPair("q", "d")]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_records(record, expected):
    assert parse_texts(record) == expected


@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        ({"anchor": "q", "negative": "n"}, MissingColumn, "has no document"),
        ({"text": "q"}, MissingColumn, "has no query"),
        ({"anchor": " ", "positive": "d"}, EmptyRecord, "anchor is empty"),
        ({"anchor": "q", "positive": "d", "negative": ""}, EmptyRecord, "negative is empty"),
        ({"query": "q", "pos": [], "neg": ["n"]}, EmptyRecord, "pos is empty"),
        ({"anchor": "q", "positive": 3}, FormatError, "positive is no text"),
        ({"sentence1": "q", "sentence2": "d", "score": "high"}, FormatError, "must be a number"),
        ({"sentence1": "q", "sentence2": "d", "score": "nan"}, FormatError, "must be a number"),
        ({"query": "q", "pos": "d", "neg": "n", "score": 1}, FormatError, "without negatives"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_records_that_cannot_be_used(record, error, words):
    with pytest.raises(error, match=words):
        parse_texts(record)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_examples_that_share_a_text_are_on_one_side(tmp_path, tiny_folder):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    rows = [{"query": f"q{n}", "positive": f"d{n // 4}"} for n in range(80)]
    data = DataSettings(data=str(write(tmp_path / "a.jsonl", rows)), valid_fraction=0.2)
    splits, scored = load_pairs(data, TextForm("Q: ", "D: "), base.hf_tokenizer, 0)
    assert not scored
    decode = base.hf_tokenizer.decode
    documents = [
        {decode(part.row(row)[0][:-1]) for row in range(1, len(part), 2)} for part in (splits.train, splits.valid)
    ]
    assert documents[1]
    assert documents[0].isdisjoint(documents[1])
    assert all(text.startswith("D: d") for text in documents[0])
    assert len(set(splits.train.labels[1::2])) == len(documents[0])  # equal texts, one number


def test_fewer_negatives_than_others_are_marked(tmp_path, tiny_folder):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    rows = [{"query": "q", "pos": "d", "neg": ["n", "m"]}, {"query": "r", "pos": "e"}, {"query": "s", "pos": "f"}]
    data = DataSettings(data=str(write(tmp_path / "a.jsonl", rows)), valid_fraction=0)
    splits, _ = load_pairs(data, TextForm(), base.hf_tokenizer, 0)
    assert splits.train.group == 4
    assert (splits.train.labels.reshape(3, 4) < 0).tolist() == [
        [False] * 4,
        [False, False, True, True],
        [False, False, True, True],
    ]
    fewer, _ = load_pairs(data, TextForm(negatives=1), base.hf_tokenizer, 0)
    assert fewer.train.group == 3


def test_a_table_has_scores_as_text_and_cells_without_negatives(tmp_path, tiny_folder):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    (tmp_path / "a.csv").write_text("sentence1,sentence2,score\nq,d,0.25\nr,e,1\n")
    splits, scored = load_pairs(
        DataSettings(data=str(tmp_path / "a.csv"), valid_fraction=0), TextForm(), base.hf_tokenizer, 0
    )
    assert scored
    assert splits.train.labels[::2].tolist() == [0.25, 1.0]
    (tmp_path / "b.csv").write_text("query,positive,negative_1,negative_2\nq,d,n,\nr,e,m,o\ns,f,,\n,g,,\n")
    splits, scored = load_pairs(
        DataSettings(data=str(tmp_path / "b.csv"), valid_fraction=0), TextForm(), base.hf_tokenizer, 0
    )
    assert not scored
    assert (splits.train.labels.reshape(3, 4) < 0).sum(axis=1).tolist() == [1, 0, 2]
    assert (splits.report.dropped, splits.report.empty) == (1, 1)  # the one without a query


def test_a_text_of_exactly_the_most_tokens_is_not_cut(tmp_path, tiny_folder):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    rows = [{"query": "q", "pos": "x" * 12}, {"query": "r", "pos": "y" * 13}, {"query": "s" * 13, "pos": "z"}]
    data = DataSettings(data=str(write(tmp_path / "a.jsonl", rows)), valid_fraction=0)
    splits, _ = load_pairs(data, TextForm(max_length=12), base.hf_tokenizer, 0)
    assert max(splits.train.lengths) == 12 + 1  # and what marks the end
    assert (splits.report.truncated, [row.line for row in splits.report.truncated_rows]) == (2, [2, 3])


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    rows = []
    for number in range(64):
        one, two = random.choice(WORDS, 2, replace=False)
        rows.append(
            {
                "query": f"Where is {one} {number}?",
                "positive": f"{one} {number} is by the {two}.",
                "negative": f"No {two} {number}.",
            }
        )
    return write(tmp_path_factory.mktemp("embed") / "data.jsonl", rows)


def train(model, data, folder, *more):
    succeeds("train", "--objective", "embed", "--model", model, "--data", data, "--adapter-path", folder, *QUICK, *more)
    return metrics(folder)


@pytest.fixture(scope="module")
def trained(tiny_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "a"
    train(tiny_folder, data, folder, "--save-every", 2, "--batch-size", 8, "--grad-accumulation-steps", 2)
    return folder


def test_a_run_learns_and_keeps_what_its_vectors_are(trained):
    lines = metrics(trained)
    validations = [line for line in lines if line["val_loss"] is not None]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert {"accuracy", "recall_at_10", "mrr_at_10", "ndcg_at_10"} <= validations[-1].keys()
    assert next(line["examples"] for line in lines if line["val_loss"] is None) in (
        15,
        16,
    )  # the last of 61 is one less
    settings = (trained / "run.yaml").read_text()
    assert "pooling: last" in settings
    assert "embed_loss: infonce" in settings


@pytest.mark.long
def test_a_run_that_starts_from_an_adapter_keeps_what_its_vectors_are(tiny_folder, data, tmp_path):
    """It went on with the model's own pooling and without prompts, so that its first vectors were not those of the start."""
    train(tiny_folder, data, tmp_path / "a", "--pooling", "mean", "--query-prompt", "query: ")
    more = ("--resume-adapter-file", tmp_path / "a", "--iters", 1, "--learning-rate", "1e-9")
    found, said = (train(tiny_folder, data, tmp_path / name, *more, *flags)[0]["val_loss"]
                   for name, flags in (("b", ()), ("c", ("--pooling", "mean", "--query-prompt", "query: "))))  # fmt: skip
    assert found == said
    for line in ("pooling: mean", "query_prompt: 'query: '"):
        assert line in (tmp_path / "b/run.yaml").read_text()
    train(tiny_folder, data, tmp_path / "d", *more, "--pooling", "last")
    assert "pooling: last" in (tmp_path / "d/run.yaml").read_text()


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        ({"passage": "p: ", "corpus": "c: "}, {"document_prompt": "p: "}),
        ({"corpus": "c: ", "document": "d: ", "query": "q: "}, {"query_prompt": "q: ", "document_prompt": "d: "}),
        (["p: "], {}),
    ],
)
def test_a_models_document_prompt_may_have_three_names(prompts, found, tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    assert stored_choices(tmp_path) == found


def test_its_adapter_writes_no_text(trained, tiny_folder, tmp_path):
    says = "gives vectors, not text"
    one_line(run("generate", "--model", tiny_folder, "--adapter-path", trained, "--prompt", "x"), says)
    rows = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "d"}])  # an example of either objective
    measured = ("evaluate", "--model", tiny_folder, "--adapter-path", trained, "--data", rows)
    one_line(run(*measured), says)
    one_line(run(*measured, "--forgetting"), says)
    assert run(*measured, "--objective", "embed").code == 0
    with pytest.raises(InputError, match=says):
        mlx_lora.load(tiny_folder).generate("x", adapter=trained)
    with pytest.raises(InputError, match=says):  # chat, evaluate --tasks, POST /v1/adapters
        read_factors(load_base(ModelSettings(model=str(tiny_folder))), trained, mx.float32)


@pytest.mark.long
def test_a_batch_in_parts_takes_the_same_steps(trained, tiny_folder, data, tmp_path):
    """Where memory is short, a step's batches run in parts; the negatives stay those of the whole step."""
    folder = tmp_path / "parts"
    train(tiny_folder, data, folder, "--batch-size", 8, "--grad-accumulation-steps", 2, "--batch-parts", 4)
    whole, parts = (mx.load(str(one / "adapters.safetensors")) for one in (trained, folder))
    for name, value in whole.items():
        assert mx.linalg.norm(value - parts[name]) <= by_dtype(1e-4, 1e-1) * mx.linalg.norm(value), name


TWO = [{"anchor": f"q{n}", "positive": f"d{n}"} for n in range(8)]
SCORED = [{"sentence1": "a", "sentence2": f"b{n}", "score": n / 8} for n in range(8)]


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        (TWO, ("--embed-loss", "triplet"), "no negative"),
        ([{"anchor": "q", "positive": ""}], (), "positive is empty"),
        ([{"anchor": "q", "negative": "n"}], (), "has no document"),
        (TWO, ("--embed-loss", "cosent"), "the rows have no score"),
        (SCORED, ("--embed-loss", "infonce"), "the rows have a score"),
        ([*TWO, *SCORED], (), "some rows have a score"),
        (TWO, ("--matryoshka-dims", "128,64"), "64 numbers"),
        (TWO, ("--matryoshka-dims", "big"), "whole numbers"),
    ],
)
def test_bad_input_is_one_line(rows, flags, words, tiny_folder, tmp_path):
    common = ("--objective", "embed", "--model", tiny_folder, "--adapter-path", tmp_path / "a", *QUICK)
    refused(run("train", *common, "--data", write(tmp_path / "bad.jsonl", rows), *flags), words)
