"""What a teacher sees of a student's rows, and when two models have one tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import SPECIAL_TOKENS, byte_tokenizer, template

from mlx_lora.data.examples import Completion, Conversation, FormatError, Text
from mlx_lora.data.prompts import parse_prompt, read_teacher_prompt, seen_by_teacher, with_prompt
from mlx_lora.data.read import encode_entries
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.folder import model_sample
from mlx_lora.objectives.teacher import as_seen, check_tokenizers, tokenizer_difference
from mlx_lora.utils.errors import InputError

PROMPT = "You are a pirate."
CHAT = Conversation(
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No more."},
    ]
)
NO_SYSTEM = """\
{%- for message in messages %}{%- if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def encoder_of(chat_template: str | None = "chatml", longest: int = 400) -> Encoder:
    tokenizer = byte_tokenizer() if chat_template == "chatml" else byte_tokenizer(chat_template=chat_template)
    text = tokenizer.chat_template
    return Encoder(tokenizer, text, max_seq_length=longest, plain_completions=text is None)


def texts(encoder: Encoder, rows) -> list[str]:
    return [encoder.tokenizer.decode(rows.row(i)[0]) for i in range(len(rows))]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", NO_SYSTEM])
def test_the_teacher_sees_the_prompt_and_the_same_targets(name):
    own = template(name) if name in ("llama3", "gemma", "mistral") else name
    encoder = encoder_of(own)
    single = Completion("What is 2?", "A number.")
    encoded = encode_entries(encoder, [CHAT, single], teacher_prompt=PROMPT)
    rows, seen = encoded.rows, encoded.rows.teacher
    assert not encoded.dropped
    assert seen is not None
    assert len(seen) == len(rows) >= 2
    for number in range(len(rows)):
        (tokens, mask), (theirs, trained) = rows.row(number), seen.row(number)
        assert np.array_equal(tokens[mask], theirs[trained])
        assert trained[-1]
    assert all(PROMPT in text for text in texts(encoder, seen))
    assert not any(PROMPT in text for text in texts(encoder, rows))


def test_a_rows_own_system_message_stays_behind_the_prompt():
    turns = [{"role": "system", "content": "Be brief."}, *CHAT.messages]
    seen = with_prompt(turns, PROMPT)
    assert seen[0] == {"role": "system", "content": f"{PROMPT}\n\nBe brief."}
    assert seen[1:] == CHAT.messages
    assert turns[0]["content"] == "Be brief."  # the student's row is not changed


def test_without_a_system_role_the_first_user_turn_begins_with_the_prompt():
    encoder = encoder_of(NO_SYSTEM)
    assert encoder.renderer is not None
    assert not encoder.renderer.shows_system
    seen = seen_by_teacher(CHAT, PROMPT, encoder)
    assert isinstance(seen, Conversation)
    assert [turn["content"] for turn in seen.messages] == [f"{PROMPT}\n\nHi", "Hello.", "And?", "No more."]
    assert encoder_of("chatml").renderer.shows_system


def test_without_a_template_the_prompt_stands_before_the_text():
    encoder = encoder_of(None)
    encoded = encode_entries(encoder, [Completion("Q: ", "A")], teacher_prompt=PROMPT)
    assert texts(encoder, encoded.rows.teacher) == [f"{PROMPT}\n\nQ: A<|im_end|>"]
    with pytest.raises(FormatError, match="a text without turns"):
        seen_by_teacher(Text("some text"), PROMPT, encoder)
    dropped = encode_entries(encoder, [Text("some text"), Completion("Q: ", "A")], teacher_prompt=PROMPT)
    assert list(dropped.dropped) == [0]
    assert len(dropped.rows) == 1


def test_rows_cut_at_the_length_have_as_many_targets_for_the_teacher():
    encoder = encoder_of("chatml", longest=60)
    long = Completion("Say it.", "word " * 30)
    encoded = encode_entries(encoder, [long], teacher_prompt=PROMPT * 10)
    (tokens, mask), (theirs, trained) = encoded.rows.row(0), encoded.rows.teacher.row(0)
    assert len(tokens) == 60
    assert 0 < mask.sum() == trained.sum()
    assert np.array_equal(tokens[mask], theirs[trained])


def test_chosen_rows_keep_their_teachers_rows():
    rows = encode_entries(encoder_of(), [Completion(f"{n}?", f"{n}!") for n in range(5)], teacher_prompt=PROMPT).rows
    chosen = rows.select([3, 1])
    assert [chosen.teacher.row(i)[0].tolist() for i in range(2)] == [rows.teacher.row(i)[0].tolist() for i in (3, 1)]
    other = encode_entries(encoder_of(), [Completion(f"{n}?", f"{n}!") for n in range(5)], teacher_prompt="Else.").rows
    assert np.array_equal(rows.tokens, other.tokens)
    assert rows.fingerprint != other.fingerprint


def test_sampled_answers_stand_behind_the_teachers_prompt():
    """What on-policy distillation needs: the student's batch, with the teacher's prompts."""
    encoder = encoder_of()
    prompts = [parse_prompt({"prompt": "a" * n}) for n in (2, 9, 4)]
    rows = encode_entries(encoder, prompts, teacher_prompt=PROMPT).rows.with_room(2, 6)
    batch = BatchPlan(rows, batch_tokens=10**4, batch_size=3, seed=0).batch(0, 0)
    answered = batch.targets.copy()
    random = np.random.default_rng(0)
    answered[batch.mask] = random.integers(0, 256, int(batch.mask.sum()))
    mask = batch.mask.copy()
    mask[1] = False  # an answer that is not trained
    batch = replace(batch, targets=answered, mask=mask)
    seen = as_seen(batch, rows)
    assert np.array_equal(seen.targets[seen.mask], batch.targets[batch.mask])
    assert np.array_equal(seen.mask.sum(axis=1), batch.mask.sum(axis=1))
    for row in range(len(mask)):
        if mask[row].any():
            begin = int(np.argmax(seen.mask[row]))
            text = encoder.tokenizer.decode(seen.inputs[row, : begin + 1])
            assert PROMPT in text
            assert text.endswith("assistant\n")


def test_one_tokenizer_is_one_whatever_its_padding():
    assert tokenizer_difference(byte_tokenizer(), byte_tokenizer(chat_template=None)) is None
    padded = byte_tokenizer(special_tokens=[*SPECIAL_TOKENS, "[PAD268]", "[PAD269]"])
    assert tokenizer_difference(byte_tokenizer(), padded) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            byte_tokenizer(special_tokens=[*SPECIAL_TOKENS, "<think>"]),
            "token 268 is none for the student and '<think>'",
        ),
        (
            byte_tokenizer(
                special_tokens=[*SPECIAL_TOKENS[:3], SPECIAL_TOKENS[4], SPECIAL_TOKENS[3], *SPECIAL_TOKENS[5:]]
            ),
            "token 259 is '<|im_start|>' for the student and '<|im_end|>' for the teacher",
        ),
    ],
)
def test_the_first_difference_is_named(other, words):
    with pytest.raises(InputError, match="--teacher big: another tokenizer") as caught:
        check_tokenizers(byte_tokenizer(), other, "big")
    assert words in str(caught.value)


def test_other_merges_are_another_tokenizer():
    one, other = (byte_tokenizer(merges=merges) for merges in ([("a", "b"), ("c", "d")], [("c", "d"), ("a", "b")]))
    assert "for the student" in (tokenizer_difference(one, other) or "")


def test_the_prompts_file(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbf  Be a pirate.\n")
    assert read_teacher_prompt(str(file)) == "Be a pirate."
    assert read_teacher_prompt(None) is None
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_teacher_prompt(str(file))
    file.write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        read_teacher_prompt(str(file))
    with pytest.raises(InputError, match="cannot be read"):
        read_teacher_prompt(str(tmp_path / "none.txt"))


def test_a_models_sample_changes_with_its_weights_and_its_config(tiny_folder, tmp_path):
    """A merged adapter changes no norm, and another base of RoPE no weight: what is kept for a model is kept under both."""
    same, config, weights = (shutil.copytree(tiny_folder, tmp_path / name) for name in ("same", "config", "weights"))
    (config / "config.json").write_text(
        json.dumps(json.loads((config / "config.json").read_text()) | {"rope_theta": 5.0})
    )
    stored = mx.load(str(weights / "model.safetensors"))
    mx.eval(stored)  # before its file is written over
    name = next(name for name in stored if name.endswith("down_proj.weight"))
    mx.save_safetensors(str(weights / "model.safetensors"), {**stored, name: stored[name] + 0.001})
    first = model_sample(tiny_folder)
    assert [model_sample(folder) == first for folder in (same, config, weights)] == [True, False, False]
