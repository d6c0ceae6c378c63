"""The first lines of a report: what a run did for held-out text, whether it overfits, and its texts as a conversation."""

from __future__ import annotations

import pytest
from byte_tokenizer import CHATML, GEMMA, HARMONY, MISTRAL, SPECIAL_TOKENS, TEMPLATES, byte_tokenizer

from mlx_lora.artifacts.verdict import BAD, GOOD, PLAIN, verdict
from mlx_lora.data.spoken import spoken_turns, without_markers

MESSAGES = [
    {"role": "user", "content": "Who\nare you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "user\nof what?"},
]
TURNS = [("User", "Who\nare you?"), ("Assistant", "A model."), ("User", "user\nof what?")]


def record(step, loss=None, val_loss=None, **more):
    return {"step": step, "loss": loss, "val_loss": val_loss, "skipped_steps": 0, **more}


@pytest.mark.parametrize(
    ("losses", "headline", "tone"),
    [
        ((3.7377, 3.3142), "Held-out perplexity 42.0 to 27.5, 35% lower", GOOD),
        ((2.0, 2.1), "Held-out perplexity 7.39 to 8.17, 11% higher", BAD),
        ((2.0, 9.0), "Held-out perplexity 7.39 to 8,103, 1.1e+03 times as high", BAD),
        ((2.0, 2.001), "Held-out perplexity 7.39 to 7.40, unchanged", PLAIN),
        ((2.0,), "Held-out perplexity 7.39, measured once", PLAIN),
    ],
)
def test_the_headline_is_about_text_that_was_held_out(losses, headline, tone):
    found = verdict([record(10 * n, None, loss) for n, loss in enumerate(losses)], {})
    assert (found.headline, found.tone) == (headline, tone)


def test_without_held_out_rows_it_claims_no_effect():
    found = verdict([record(1, 3.0), record(2, 2.0)], {})
    assert found.headline == "Training loss 3.000 to 2.000"
    assert "No held-out data" in found.notes[0]
    assert verdict([], {}).headline == "No step has been reported yet"


def run_of(held_out, training):
    return [record(0, None, held_out[0])] + [
        one for n in range(1, len(held_out)) for one in (record(10 * n, training[n]), record(10 * n, None, held_out[n]))
    ]


def test_overfitting_is_told_with_its_step_and_what_to_do():
    falling = [0, 3.0, 2.0, 1.0, 0.5]
    overfit = run_of([4.0, 3.0, 2.8, 3.1, 3.4], falling)
    (note,) = verdict(overfit, {}).notes
    assert "lowest at step 20 (2.800) and rose to 3.400" in note
    assert "--iters 20" in note
    assert "--keep-best" in note
    # Not where both fall, where the rise is noise, or where the training loss rises as well.
    assert not verdict(run_of([4.0, 3.0, 2.8, 2.7, 2.6], falling), {}).notes
    assert not verdict(run_of([4.0, 3.0, 2.8, 2.805, 2.806], falling), {}).notes
    assert not verdict(run_of([4.0, 3.0, 2.8, 3.1, 3.4], [0, 2.0, 2.0, 3.0, 3.0]), {}).notes
    (worse,) = verdict(run_of([2.0, 3.0, 3.1, 3.2, 3.3], falling), {}).notes
    assert "lowest before training" in worse
    assert "lower --learning-rate" in worse


def test_keep_best_is_the_adapter_that_the_headline_is_about():
    records = run_of([4.0, 3.0, 2.8, 3.1, 3.4], [0, 3.0, 2.0, 1.0, 0.5])
    ended, running = (verdict(records, {"keep_best": True}, ended) for ended in (True, False))
    assert "54.6 to 16.4" in ended.headline
    assert any("kept the adapter of step 20" in note for note in ended.notes)
    assert "54.6 to 30.0" in running.headline
    assert not any("kept the adapter" in note for note in running.notes)


def test_preference_training_is_judged_by_accuracy_and_margin():
    found = [record(n, None, 0.7, margin=margin, accuracy=a) for n, margin, a in ((0, 0.0, 0.5), (9, 1.238, 0.78))]
    assert verdict(found, {}).headline == "Held-out accuracy 50% to 78%, reward margin 0.00 to 1.24"
    assert verdict(found, {}).tone == GOOD
    assert verdict(found[::-1], {}).tone == BAD
    rated = [{k: v for k, v in one.items() if k != "accuracy"} for one in found]
    assert verdict(rated, {}).headline == "Held-out reward margin 0.00 to 1.24"
    # KTO whose held-out answers are all good: no margin.
    alike = [one | {"margin": None, "val_loss": loss} for one, loss in zip(rated, (0.5, 0.25), strict=True)]
    assert verdict(alike, {}).headline == "Held-out loss 0.50 to 0.25"
    assert [verdict(some, {}).tone for some in (alike, alike[::-1])] == [GOOD, BAD]


def test_skipped_updates_are_told():
    assert verdict([record(1, 2.0) | {"skipped_steps": 2}], {}).notes[-1].startswith("2 updates were skipped")


@pytest.mark.parametrize(
    "name", ["gemma", "gemma4", "harmony", "llama3", "llama3_2", "mistral", "qwen3_5", "qwen3_thinking", "chatml"]
)
def test_a_rendered_conversation_is_told_without_markers(name):
    template = CHATML if name == "chatml" else (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = byte_tokenizer(template, special_tokens=(*SPECIAL_TOKENS, *HARMONY, *GEMMA, *MISTRAL))
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    for specials in (tokenizer.all_special_tokens, ()):
        turns = spoken_turns(text, specials)
        assert [turn for turn in turns if turn[0] != "System"][-3:] == TURNS
        assert not any(marker in content for _, content in turns for marker in ("<|", "<start", "[INST"))


def test_plain_text_and_alpaca():
    assert spoken_turns("ROMEO:\nuser\nof") == [("", "ROMEO:\nuser\nof")]
    text = "Below is a task.\n\n### Instruction:\nSing.\n\n### Response:\n"
    assert spoken_turns(text) == [("", "Below is a task."), ("User", "Sing.")]
    assert without_markers("<|channel|>final<|message|>Yes.<|end|>") == "Yes."
    assert without_markers("a < b and <b>c</b>") == "a < b and <b>c</b>"
    assert without_markers("") == ""
