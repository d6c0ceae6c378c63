"""A user's turn that a model writes: where the template begins and ends it, and which ones are usable."""

from __future__ import annotations

import mlx.core as mx
import pytest
from byte_tokenizer import byte_tokenizer, template
from conftest import tiny_model

from mlx_lora.models.generator import SamplingOptions, answer_keys, sample_groups
from mlx_lora.objectives.synthetic_prompts import TurnFilter, user_turn
from mlx_lora.utils.errors import InputError

LLAMA = "{{ '<s>' }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_the_turn_begins_after_the_system_text_and_ends_with_its_token():
    tokenizer = byte_tokenizer()
    turn = user_turn(tokenizer, None, None, frozenset([7]))
    assert tokenizer.decode(turn.before) == "<|im_start|>user\n"
    assert turn.ends == {7, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    other = user_turn(byte_tokenizer(LLAMA), None, None, frozenset())
    assert tokenizer.decode(other.before) == "<s>[INST] "
    assert other.ends == {tokenizer.convert_tokens_to_ids("[/INST]")}


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_known_templates_permit_it(name):
    tokenizer = byte_tokenizer(template(name))
    turn = user_turn(tokenizer, None, None, frozenset())
    assert "user" in tokenizer.decode(turn.before)[-40:]


@pytest.mark.parametrize(("chat", "asked"), [(None, None), (BARE, None), (None, "alpaca")])
def test_other_models_are_refused(chat, asked):
    with pytest.raises(InputError, match="--data persona-distill"):
        user_turn(byte_tokenizer(chat), asked, None, frozenset())


def test_a_turn_is_read_up_to_its_end_and_no_further():
    tokenizer = byte_tokenizer()
    turn = user_turn(tokenizer, None, None, frozenset())
    end, start = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|im_start|>"))
    said = tokenizer.encode("How do I bake?")
    assert turn.read([*said, end], tokenizer) == ("How do I bake?", True)
    assert turn.read(said, tokenizer) == ("How do I bake?", False)
    assert turn.read([*said, start, *said, end], tokenizer) == ("", True)


LEFT_OUT = {
    "": "empty",
    "  \n": "empty",
    "Why so": "too short",
    "ねえ": "too short",
    "1 + 2 = 3, 4 * 5 = 20, 6": "no text",
    "How do I \ufffd bake bread?": "no text",
    "How do I bake bread?\nAssistant: First": "several turns",
    "the bread and the bread and the bread and the bread and the bread": "repetitive",
}


@pytest.mark.parametrize("text", LEFT_OUT)
def test_what_no_user_would_say_is_left_out(text):
    found = TurnFilter()
    found.take(text, True)
    assert not found.kept
    assert dict(found.left_out) == {LEFT_OUT[text]: 1}


def test_each_turn_is_kept_once_and_only_if_it_ended():
    found = TurnFilter()
    for text in (" How do I bake bread? ", "how do I bake bread", "Wie backe ich Brot?", "パンの焼き方を教えて"):
        found.take(text, True)
    found.take("How do I bake a cake?", False)
    assert found.kept == ["How do I bake bread?", "Wie backe ich Brot?", "パンの焼き方を教えて"]
    assert dict(found.left_out) == {"twice": 1, "too long": 1}


def test_a_beginning_that_prompts_share_changes_no_answer():
    model, common = tiny_model(), list(range(40))
    prompts = [[*common, 5, 9], [*common, 7], [*common, 5, 9, 3, 3]]
    options, keys = SamplingOptions(2, 10), answer_keys(0, 0, 6)
    together = sample_groups(model, prompts, options, frozenset(), keys)
    for number, prompt in enumerate(prompts):
        part = slice(2 * number, 2 * number + 2)
        alone = sample_groups(model, [prompt], options, frozenset(), keys[part])
        assert alone[0] == together[0][part]
        assert mx.allclose(mx.array(alone[1]), mx.array(together[1][part]), atol=1e-5)
    other = sample_groups(model, [[*common[:-1], 1, 5, 9]], options, frozenset(), keys[:2])
    assert not mx.allclose(mx.array(other[1]), mx.array(together[1][:2]), atol=1e-3)
