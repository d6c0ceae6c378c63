"""Rows decoded together: each gets what it gets alone, and a model that cannot do this decodes one at a time."""

from __future__ import annotations

import mlx.core as mx
import pytest
from architectures.build import tiny_architecture, tiny_config, write_architecture
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model
from make_adapters import loaded
from serving_rows import Answer, asked, started

from mlx_lora.evaluation.models import Models, TextRequest
from mlx_lora.models.generator import SamplingOptions, answer_keys, check_rows, one_row_because, sample_groups
from mlx_lora.utils.errors import InputError

pytestmark = pytest.mark.float32("texts are compared: where two tokens are nearly as likely, bfloat16 takes either")

PROMPTS = ["O Romeo, wherefore art thou Romeo? Deny thy father", "Hi", "What light", "To be, or not to be"]
ALONE = ("gpt_bigcode", "phi3small", "afm7")  # of mlx-lm's architectures, those that mix up rows of unlike length
TOGETHER = ("llama", "gemma2", "nemotron-nas")


def with_heads(name: str, heads: int, kv_heads: int) -> dict:
    return tiny_config(name) | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}


def model_named(name: str):
    config = with_heads(name, 8, 4) if name == "gemma2" else None
    return tiny_architecture(name, tied=name in ("gemma2", "phi3small"), config=config)


@pytest.mark.parametrize("name", ALONE + TOGETHER)
def test_answers_sampled_in_a_group_are_those_of_each_prompt_alone(name):
    model, prompts, keys = model_named(name), [[5, 6, 7, 8, 9, 10, 11], [12, 13]], answer_keys(0, 0, 4)
    assert bool(one_row_because(model)) == (name in ALONE)
    together, _ = sample_groups(model, prompts, SamplingOptions(2, 6), frozenset(), keys)
    alone = []
    for row in range(4):
        of_row = [prompts[row // 2]], SamplingOptions(1, 6), frozenset(), keys[row : row + 1]
        alone += sample_groups(model, *of_row)[0]
    assert together == alone


@pytest.mark.parametrize(("name", "heads", "kv_heads"), [("gemma2", 8, 4), ("gemma2", 4, 2), ("gpt_bigcode", 4, 1)])
def test_the_server_answers_requests_at_once_as_alone(name, heads, kv_heads, tmp_path):
    config = with_heads(name, heads, kv_heads) if name == "gemma2" else None
    engine = started(write_architecture(tmp_path, name, name == "gemma2", 0, config))
    try:
        alone = [Answer(engine, asked(None, prompt, count=8)).text for prompt in PROMPTS]
        at_once = [Answer(engine, asked(None, prompt, count=8)) for prompt in PROMPTS]
        assert [answer.text for answer in at_once] == alone
        assert engine.limits.max_batch == (1 if name == "gpt_bigcode" else 16)
    finally:
        engine.close()


def test_a_layer_that_keeps_nothing_leaves_the_server_alive(tmp_path):
    engine = started(write_architecture(tmp_path, "nemotron-nas"))
    try:
        first, second = (Answer(engine, asked(None, count=5)) for _ in range(2))
        assert first.text == second.text
        again = Answer(engine, asked(None, count=5)).wait()
        assert again.end.usage.cached > 0
        assert engine.alive
    finally:
        engine.close()


def test_written_texts_of_a_task_are_those_of_each_prompt_alone(tmp_path):
    folder = write_architecture(tmp_path, "gpt_bigcode")
    asked_for = [TextRequest("base", tuple(byte_tokenizer().encode(prompt)), 6) for prompt in PROMPTS]
    with Models.opened(loaded(folder), {}) as models:
        assert models.texts(asked_for) == [models.texts([one])[0] for one in asked_for]


def test_a_model_that_fails_alone_is_refused():
    with pytest.raises(InputError, match="fails to generate"):
        one_row_because(tiny_architecture("gear"))


def test_caches_without_rows_are_refused():
    with pytest.raises(InputError, match="m/odel"):
        check_rows(tiny_architecture("llama4"), "m/odel", "choose another")


def test_a_model_in_16_bits_is_tried_with_room_for_rounding():
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    assert one_row_because(model) == ""
