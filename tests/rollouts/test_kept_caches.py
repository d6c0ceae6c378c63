"""Keys and values kept between the turns of episodes: the same answers and log-probabilities as computing all turns anew."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model
from tiny_recurrent import recurrent_model

from mlx_lora.models.generator import KeptCaches, SamplingOptions, answer_keys, sample_groups

PROMPTS = [[5, 9, 3, 7, 7], [4, 8]]
GROUP, ROWS = 3, 6
OPTIONS = SamplingOptions(GROUP, 12, temperature=2.0)


class Counting:
    """A model that counts the tokens that it computes."""

    def __init__(self, model):
        self.model, self.tokens = model, 0

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, tokens, **given):
        self.tokens += tokens.size
        return self.model(tokens, **given)


def turns(model, keeps: bool) -> tuple[list[list[int]], list[float], int]:
    """Return the tokens of episodes of three turns, the log-probabilities of the sampled ones, and tokens of the later turns."""
    ends = frozenset(range(200, 288))  # a third of all tokens ends an answer
    rows, logps, held, playing = [list(p) for p in PROMPTS for _ in range(GROUP)], [], {}, list(range(ROWS))
    counting = Counting(model)
    for turn in range(3):
        kept = KeptCaches([held[row] for row in playing if row in held]) if keeps else None
        given = PROMPTS if turn == 0 else [rows[row] for row in playing]
        options = OPTIONS if turn == 0 else SamplingOptions(1, 12, temperature=2.0)
        keys = answer_keys(1, 2, ROWS, turn)[mx.array(playing)]
        if turn == 1:
            counting.tokens = 0
        found, own = sample_groups(counting, given, options, ends, keys, kept=kept)
        held = {playing[row]: one for row, one in kept.ended.items()} if kept else {}
        for row, tokens, values in zip(playing, found, own, strict=True):
            rows[row] += [*tokens, *([7, 7, 9][: 1 + row % 3])]  # observations of unequal length
            logps += values
        playing = [row for row, tokens in zip(playing, found, strict=True) if tokens[-1] in ends]
        assert len(playing) > 2
    return rows, logps, counting.tokens


@pytest.mark.parametrize("make", [tiny_model, lambda: recurrent_model("granitemoehybrid")[0]], ids=["llama", "hybrid"])
def test_later_turns_go_on_where_earlier_ones_ended(make):
    model = make()
    model.eval()
    whole, kept = turns(model, keeps=False), turns(model, keeps=True)
    assert kept[0] == whole[0]
    np.testing.assert_allclose(kept[1], whole[1], rtol=1e-4, atol=1e-5)
    assert kept[2] < 0.8 * whole[2]


def test_what_is_kept_matters():
    """With another row's keys and values, the answers are others."""
    model = tiny_model()
    model.eval()
    kept = KeptCaches()
    ends, options = frozenset(range(288)), SamplingOptions(GROUP, 12)
    found, _ = sample_groups(model, PROMPTS, options, ends, answer_keys(0, 0, ROWS), kept=kept)
    rows = [[*PROMPTS[row // GROUP], *tokens, 7] for row, tokens in enumerate(found)]
    one = SamplingOptions(1, 1)
    right, wrong = (
        sample_groups(model, [rows[0]], one, frozenset(), answer_keys(0, 1, 1), kept=KeptCaches([held]))[1]
        for held in (kept.ended[0], (kept.ended[0][0], kept.ended[3][1]))
    )
    assert right != wrong
