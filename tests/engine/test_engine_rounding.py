"""What a shared batch may change in the dtype that a machine computes in: the last bits of a logit, and so near ties."""

from __future__ import annotations

import pytest
from comparing import by_dtype
from conftest import tiny_model, write_folder
from make_adapters import make_adapter
from serving_rows import Answer, asked, started

from mlx_lora.models.generator import Sampling


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("untied")
    folder = write_folder(root / "base", tiny_model(tie_word_embeddings=False), {"tie_word_embeddings": False})
    named = {f"a{seed}": make_adapter(folder, root / f"a{seed}", rank=2 + seed, seed=seed) for seed in range(6)}
    engine = started(folder, named)
    yield engine
    engine.close()


def same_tokens(one: Answer, other: Answer) -> list[tuple[float, float]]:
    """Return the log probabilities of both answers as far as they chose the same tokens, and those of the first other ones."""
    pairs = []
    for mine, theirs in zip(one.wait().reports, other.wait().reports, strict=False):
        pairs.append((mine.logprob, theirs.logprob))
        if mine.text != theirs.text:
            break
    return pairs


def test_a_crowd_changes_no_more_than_rounding(engine):
    sampling = Sampling(temperature=0, top_logprobs=3)
    names = list(engine.store.cards)
    alone = {name: Answer(engine, asked(name, sampling=sampling)).wait() for name in names}
    crowd = {name: Answer(engine, asked(name, sampling=sampling)) for name in names}
    pairs = {name: same_tokens(crowd[name], alone[name]) for name in names}
    assert sum(map(len, pairs.values())) > 4 * len(names)
    # Where greedy answers part, both took a token that was likeliest but for rounding.
    for name, found in pairs.items():
        for mine, theirs in found:
            assert mine == pytest.approx(theirs, abs=by_dtype(1e-4, 0.1)), name
    # Adapters differ by more than rounding does: an answer by another one would be found.
    others = [same_tokens(alone[one], alone[other]) for one in names for other in names if one < other]
    assert max(abs(mine - theirs) for found in others for mine, theirs in found) > 0.3
