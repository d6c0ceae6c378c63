"""Masks with the templates and tokenizers of the models themselves, and OpenAI's own reader of harmony as the judge.

`python scripts/get_templates.py` fetches what they need into the folder of the real models.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import pytest
from byte_tokenizer import GEMMA, HARMONY, SPECIAL_TOKENS, byte_tokenizer
from made_conversations import conversations, rows_of
from template_judge import REFUSED, rendered_by_both
from transformers import PreTrainedTokenizerFast

from mlx_lora.data.examples import EmptyRecord
from mlx_lora.data.formats import parse_record
from mlx_lora.data.tokenize import Encoder

pytestmark = [pytest.mark.slow, pytest.mark.parity]
DAY = date(2026, 1, 5)
THINKS = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "gptoss", "gemma4", "gemma4_v5", "lfm2_2_5")
# Template -> tokenizer (one of npm's, or the special tokens of one of bytes) and end token.
REAL: dict[str, tuple[Any, str]] = {
    "qwen3": ("qwen3", "<|im_end|>"),
    "qwen3_5_think": ("qwen3", "<|im_end|>"),
    "qwen3_5_nothink": ("qwen3", "<|im_end|>"),
    "qwen3_instruct_2507": ("qwen3", "<|im_end|>"),
    "qwen2_5": ("qwen3", "<|im_end|>"),
    "llama3_1": ("llama3_1", "<|eot_id|>"),
    "llama3_2": ("llama3_1", "<|eot_id|>"),
    "gptoss": ("gptoss", "<|return|>"),
    "gemma4": ((*GEMMA, "<|tool>", "<tool|>"), "<turn|>"),
    "gemma4_v5": ((*GEMMA, "<|tool>", "<tool|>"), "<turn|>"),
    "gemma3": ((), "<end_of_turn>"),
    "lfm2_2_5": (("<|tool_call_start|>", "<|tool_call_end|>"), "<|im_end|>"),
}


def place(name: str) -> Path:
    folder = Path(os.environ["MLX_LORA_TEST_MODELS"]) / "templates" / name
    if not folder.exists():
        pytest.skip(f"{folder} is not there; `python scripts/get_templates.py` fetches it")
    return folder


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    source, eos = REAL[name]
    template = place(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    if isinstance(source, tuple):
        return byte_tokenizer(template, bos=True, eos=eos, special_tokens=(*SPECIAL_TOKENS, *source))
    config = json.loads((place(source) / "tokenizer_config.json").read_text())
    bos = config.get("bos_token")
    made = PreTrainedTokenizerFast(tokenizer_file=str(place(source) / "tokenizer.json"), bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made


def as_at_inference(encoder: Encoder, messages: list[dict], tools: list | None, number: int) -> tuple[str, str] | None:
    """Return the prompt of a turn and what stands behind it when it is the last; None where the template refuses."""
    text = encoder.renderer._text
    try:
        prompt = text(messages[:number], tools, True)
        return prompt, text(messages[: number + 1], tools)
    except ValueError:
        return None


def runs_of(rows: list) -> list[tuple[list[int], list[int]]]:
    """Return (all tokens before it, its tokens) of each run of trained tokens."""
    runs = []
    for tokens, mask in rows:
        edges = [i for i, (a, b) in enumerate(itertools.pairwise([False, *mask, False])) if a != b]
        runs += [(tokens[:start], tokens[start:stop]) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return runs


@pytest.mark.parametrize("name", REAL)
def test_each_turn_is_what_the_model_writes_behind_its_prompt(name):
    """Text by text and token by token: the prompt as at inference, then what it writes, or the part of it that stands."""
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**6, day=DAY)
    counts = dict.fromkeys(("exact", "in part", "refused", "chats"), 0)
    for record in conversations(11, 48):
        try:
            _, example = parse_record(record)
        except EmptyRecord:
            continue
        encoded = encoder.encode([example])
        if encoded.dropped:
            reason = encoded.dropped[0]
            assert any(
                word in reason for word in ("only supports single", "1 of the", "must alternate", "No user query")
            )
            counts["refused"] += 1
            continue
        counts["chats"] += 1
        messages = example.messages
        runs = runs_of(rows_of(encoded))
        trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
        assert len(runs) == len(trained)
        texts = [(tokenizer.decode(before), tokenizer.decode(run)) for before, run in runs]
        for number in trained:
            sides = as_at_inference(encoder, messages, example.tools, number)
            if sides is None:
                continue
            prompt, last = sides
            written = last[len(prompt) :] if last.startswith(prompt) else None
            exact = [run for before, run in texts if before == prompt and written and written.rstrip() == run.rstrip()]
            counts["exact" if exact else "in part"] += 1
            if exact:
                whole = tokenizer(prompt + written, add_special_tokens=False)["input_ids"]
                assert any(whole[: len(b) + len(r)] == b + r for b, r in runs)
            else:
                # What stands is the end of what the model writes, or its beginning where the end is another token.
                # An answer that begins with line ends shares its first token with the prompt's.
                assert any(last.rstrip().endswith(run.strip()) or (written or "").startswith(run) for _, run in texts)
                own = "reasoning_content" in messages[number]
                assert not (own and name in THINKS and written), (record, number)
    assert counts["chats"] >= 20
    assert counts["exact"] >= counts["in part"] or name == "qwen3_5_nothink"  # its prompt closes the thinking


@pytest.fixture(scope="module")
def harmony():
    """OpenAI's own encoding of harmony, its vocabulary from the files we fetched."""
    sys.path.insert(0, str(place("harmony")))
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(place("o200k_base.tiktoken").parent)
    try:
        import openai_harmony

        yield openai_harmony, openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    finally:
        sys.path.remove(str(place("harmony")))
        del os.environ["TIKTOKEN_ENCODINGS_BASE"]


def test_openai_reads_in_our_trained_tokens_what_the_record_says(harmony):
    """Channels, thinking, calls and answers, by the parser that OpenAI serves GPT-OSS with."""
    library, encoding = harmony
    tokenizer = tokenizer_of("gptoss")
    encoder = Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**6, day=DAY)
    read = {"analysis": 0, "commentary": 0, "final": 0}
    for record in conversations(5, 96):
        try:
            _, example = parse_record(record)
        except EmptyRecord:
            continue
        encoded = encoder.encode([example])
        if encoded.dropped:
            continue
        expected = []
        for message in example.messages:
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            said = [("analysis", None, message["reasoning_content"])] if "reasoning_content" in message else []
            for call in message.get("tool_calls", []):
                function = call["function"]
                said.append(("commentary", f"functions.{function['name']}", function["arguments"]))
            said += [] if "tool_calls" in message else [("final", None, message["content"])]
            expected.append(said)
        if any("<|" in str(said) for said in expected):
            continue  # special tokens within a text are tokens to one side, and text to the other
        found = []
        for _, run in runs_of(rows_of(encoded)):
            whole = run if run[-1] in encoding.stop_tokens() else [*run, *tokenizer.encode("<|return|>")]
            said = []
            for message in encoding.parse_messages_from_completion_tokens(whole, library.Role.ASSISTANT):
                text = message.content[0].text
                said.append((message.channel, message.recipient, json.loads(text) if message.recipient else text))
                read[message.channel] += 1
            found.append(said)
        assert sorted(map(str, found)) == sorted(map(str, expected))
    assert min(read.values()) >= 10


def test_the_tokens_are_openais_own_where_the_template_follows_it(harmony):
    """Prompt and answers of chats without tools: ours, token by token, are what OpenAI's renderer makes."""
    library, encoding = harmony
    tokenizer = tokenizer_of("gptoss")
    encoder = Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**6, day=DAY)
    said = library.Message.from_role_and_content
    system = library.SystemContent.new().with_conversation_start_date(DAY.isoformat())
    head = [said(library.Role.SYSTEM, system)]
    developer = library.DeveloperContent.new().with_instructions("be brief")
    compared = 0
    for thinking, told, turns in itertools.product(["", "hm\n\n Añ 😀"], [False, True], [1, 2, 3]):
        messages = [{"role": "developer", "content": "be brief"}] if told else []
        theirs = [*head, *([said(library.Role.DEVELOPER, developer)] if told else [])]
        prompts, answers = [], []
        for n in range(turns):
            messages.append({"role": "user", "content": f"q {n}?"})
            messages.append(
                {"role": "assistant", "content": f"a {n}\n ☃"} | ({"thinking": thinking} if thinking else {})
            )
            theirs.append(said(library.Role.USER, f"q {n}?"))
            talk = library.Conversation.from_messages(theirs)
            prompts.append(encoding.render_conversation_for_completion(talk, library.Role.ASSISTANT))
            own = [said(library.Role.ASSISTANT, thinking).with_channel("analysis")] if thinking else []
            own.append(said(library.Role.ASSISTANT, f"a {n}\n ☃").with_channel("final"))
            whole = library.Conversation.from_messages([*theirs, *own])
            config = library.RenderConversationConfig(auto_drop_analysis=False)
            text = encoding.decode(encoding.render_conversation(whole, config))
            start = text.rindex("<|start|>user<|message|>")
            start = text.index("<|start|>assistant", start) + len("<|start|>assistant")
            answers.append(text[start:].removesuffix("<|end|>"))
            theirs.append(own[-1])
        runs = runs_of(rows_of(encoder.encode([parse_record({"messages": messages})[1]])))
        if not told:  # the template puts an empty line behind instructions, and OpenAI's renderer none
            assert [before for before, _ in runs] == prompts
        ends = ["<|return|>" if thinking or n == turns - 1 else "" for n in range(turns)]
        wanted = [encoding.encode(a + end, allowed_special="all") for a, end in zip(answers, ends, strict=True)]
        assert [run for _, run in runs] == wanted
        compared += turns
    assert compared == 24
    # The paired inequality: another day is another prompt.
    other = Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**6, day=date(2026, 1, 6))
    assert runs_of(rows_of(other.encode([parse_record({"messages": messages})[1]])))[0][0] != prompts[0]


def test_every_real_template_renders_as_in_transformers():
    """All that trl's wheel has, the marked ones included: our sandbox against transformers' own rendering."""
    tokenizer, shown = byte_tokenizer(bos=True), []
    files = sorted(place("chat_templates").glob("*.jinja"))
    for file in files:
        text = file.read_text(encoding="utf-8")
        for record in conversations(19, 24):
            try:
                _, example = parse_record(record)
            except EmptyRecord:
                continue
            given = {"tools": example.tools, "add_generation_prompt": len(example.messages) % 2 == 0}
            ours, theirs = rendered_by_both(tokenizer, example.messages, text, **given)
            assert ours == theirs, file.name
            shown += [] if ours.startswith(REFUSED) else [file]
    assert len(files) > len(REAL)
    assert len(set(shown)) > 0.9 * len(files)  # some take no tools or no turn but the two roles


def test_the_real_templates_say_the_same_of_an_unmarked_and_a_marked_form():
    """GPT-OSS's template with trl's marks renders as without them: what we read off is the published one."""
    tokenizer = tokenizer_of("gptoss")
    marked = place("chat_templates/gptoss_training.jinja").read_text(encoding="utf-8")
    for record in conversations(3, 24):
        try:
            _, example = parse_record(record)
            plain = tokenizer.apply_chat_template(example.messages, tools=example.tools, tokenize=False)
        except (EmptyRecord, jinja2.TemplateError):
            continue
        assert plain == tokenizer.apply_chat_template(
            example.messages, tools=example.tools, tokenize=False, chat_template=marked
        )
    assert all(token in tokenizer.get_vocab() for token in HARMONY)
