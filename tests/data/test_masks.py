"""Masks, token by token, against what the templates' own marks say, and the models' own templates, with OpenAI's reader of harmony as the judge."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import pytest
from byte_tokenizer import GEMMA, HARMONY, MISTRAL, SPECIAL_TOKENS, byte_tokenizer, template
from made_conversations import (
    ASKED,
    CALL,
    HANDMADE,
    REFUSED,
    TOOLS,
    Reference,
    conversations,
    examples,
    rendered_by_both,
    rows_of,
    unmarked,
)
from tiers import by_default
from transformers import PreTrainedTokenizerFast

from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.formats import parse_record
from mlx_lora.data.tokenize import Encoder


def marked_chatml() -> str:
    """The built-in chatml with its assistant turns marked."""
    text, _ = resolve_template("chatml", byte_tokenizer())
    before = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    after = "{{- '<|im_end|>\\n' }}\n    {%- endif %}"
    assert text.count(before) == text.count(after) == 1
    start = "{% if message['role'] == 'assistant' %}"
    # A mark cannot stand in a condition of its own: the turn is written twice, once marked.
    head, tail = text.split(before)
    middle, tail = tail.split(after)
    plain = "{{- message['content'] }}" + middle + "{{- '<|im_end|>' }}"
    both = f"{start}{{% generation %}}{plain}{{% endgeneration %}}{{% else %}}{plain}{{% endif %}}"
    return head + "{{- '<|im_start|>' + message['role'] + '\\n' }}" + both + "{{- '\\n' }}\n    {%- endif %}" + tail


# name -> marked template, its special tokens, end token, has it a BOS, calls it shows of one turn
FAMILIES = {
    "chatml": (marked_chatml, (), "<|im_end|>", False, 9),
    "qwen3": (lambda: template("qwen3_thinking"), (), "<|im_end|>", False, 9),
    "qwen3_5": (lambda: template("qwen3_5"), (), "<|im_end|>", False, 9),
    "gemma4": (lambda: template("gemma4"), GEMMA, "<turn|>", True, 9),
    "llama3_2": (lambda: template("llama3_2"), (), "<|eot_id|>", True, 1),
    "mistral": (lambda: template("mistral_tools"), MISTRAL, "</s>", True, 9),
    "harmony": (lambda: template("harmony"), HARMONY, "<|return|>", False, 1),
}


def family(name: str):
    make, special, eos, bos, max_calls = FAMILIES[name]
    tokenizer = byte_tokenizer(unmarked(make()), bos=bos, eos=eos, special_tokens=(*SPECIAL_TOKENS, *special))
    return (
        tokenizer,
        Encoder(tokenizer, unmarked(make()), max_seq_length=10**6, allow_special_tokens=True),
        Reference(tokenizer, make(), max_calls, moves=name == "mistral"),
    )


def shown(tokenizer, row) -> str:
    """A row as text, what is trained between marks."""
    return "".join(
        tokenizer.decode([token for token, _ in part]).join("⟦⟧" if on else ("", ""))
        for on, part in itertools.groupby(zip(*row, strict=True), key=lambda pair: bool(pair[1]))
    )


def trained_in(tokenizer, rows) -> list[str]:
    """Return the trained texts of rows, one for each run of tokens."""
    return [part.split("⟧")[0] for row in rows for part in shown(tokenizer, row).split("⟦")[1:]]


def encoded_chat(encoder: Encoder, messages: list[dict], tools: list[dict] | None = TOOLS):
    return encoder.encode([parse_record({"messages": messages, "tools": tools})[1]])


@pytest.mark.parametrize("name", by_default(FAMILIES, "chatml", "qwen3_5"))
def test_every_token_and_mask_is_the_references(name):
    tokenizer, encoder, reference = family(name)
    compared, divided, calls, thoughts, context = 0, 0, 0, 0, 0
    count = 64 if FAMILIES[name][-1] == 1 else 44  # a third has several calls in one turn, which not all show
    for number, example in enumerate(examples(7, count, always_ids=name == "mistral")):
        expected = reference.rows(example.messages, example.tools)
        encoded = encoder.encode([example])
        if expected is None:
            assert list(encoded.dropped) == [0], f"record {number}"
            continue
        found = rows_of(encoded)
        words = [[shown(tokenizer, row) for row in rows] for rows in (found, expected)]
        assert words[0] == words[1], f"record {number}: {encoded.dropped}"
        assert found == expected
        compared += 1
        divided += len(found) > 1
        calls += any("tool_calls" in message for message in example.messages)
        thoughts += any("reasoning_content" in message for message in example.messages)
        context += any(message.get("weight") == 0 for message in example.messages)
    assert compared >= 40
    assert min(calls, thoughts, context) >= 10
    shows_all = ("chatml", "llama3_2")  # these rewrite nothing
    assert (divided == 0) == (name in shows_all)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_trained_token_is_of_another_message(name):
    """Without a reference: what others say is marked, and the mark is in every row and in no trained text."""
    tokenizer, encoder, _ = family(name)
    rows = 0
    for record in conversations(23, 18, always_ids=True):
        messages = [
            message if message["role"] == "assistant" else {**message, "content": f"SECRET {message['content']}"}
            for message in record["messages"]
        ]
        encoded = encoder.encode([parse_record({**record, "messages": messages})[1]])
        for row in rows_of(encoded):
            text = shown(tokenizer, row)
            assert "SECRET" in text
            assert "SECRET" not in "".join(trained_in(tokenizer, [row]))
            rows += 1
    assert rows >= 12


def test_the_comparison_sees_one_wrong_token():
    tokenizer, encoder, reference = family("gemma4")
    _, example = parse_record({"messages": HANDMADE[0], "tools": TOOLS})
    ((tokens, mask),) = rows_of(encoder.encode([example]))
    assert [(tokens, mask)] == reference.rows(example.messages, example.tools)
    text = tokenizer.decode(tokens)
    start = len(tokenizer.encode(text[: text.index("response:add")], add_special_tokens=False))
    assert not mask[start]
    assert mask[start - 1]  # the token that asks for the tool's answer
    # As it once was: from the call to the end of the turn, the tool's answer with it.
    once = [*mask[:start], *[True] * mask[start:].index(True), *mask[start + mask[start:].index(True) :]]
    assert (tokens, once) != (tokens, mask)
    assert "it is 7" in shown(tokenizer, (tokens, once)).split("⟧")[0]
    assert "it is 7" not in shown(tokenizer, (tokens, mask)).split("⟧")[0]


def test_a_call_is_cut_where_the_tools_answer_begins():
    """Gemma 4 shows the text beside a call behind the tool's answer: what stands there is not what the model wrote."""
    tokenizer, encoder, _ = family("gemma4")
    call = {"role": "assistant", "content": "I will add.", "tool_calls": [CALL]}
    messages = [ASKED, call, {"role": "tool", "content": "SECRET"}, {"role": "assistant", "content": "it is 7"}]
    encoded = encoded_chat(encoder, messages)
    (row,) = rows_of(encoded)
    assert trained_in(tokenizer, [row]) == ["<|tool_call>call:add{x:7}<tool_call|><|tool_response>", "it is 7<turn|>"]
    assert "SECRET" in shown(tokenizer, row)
    assert encoded.unshown == {"text beside a tool call": [0]}


@pytest.mark.parametrize("weight", [0, 1])
def test_a_turn_that_changes_what_stands_before_it_begins_behind_the_tools_answer(weight):
    """Gemma 4's template of July 2026 closes the model's turn behind text beside a call, and only at inference."""
    once = "{{ message.content | trim + '<turn|>\\n' }}"
    at_the_end = "{{ message.content | trim + ('<turn|>\\n' if loop.index + results.count == turns | length else '') }}"
    text = unmarked(template("gemma4"))
    assert text.count(once) == 1
    tokenizer = byte_tokenizer(
        text.replace(once, at_the_end), bos=True, eos="<turn|>", special_tokens=(*SPECIAL_TOKENS, *GEMMA)
    )
    encoder = Encoder(tokenizer, text.replace(once, at_the_end), max_seq_length=10**6)
    call = {"role": "assistant", "content": "I will add.", "tool_calls": [CALL], "weight": weight}
    messages = [ASKED, call, {"role": "tool", "content": "SECRET"}, {"role": "assistant", "content": "it is 7"}]
    trained = trained_in(tokenizer, rows_of(encoded_chat(encoder, messages)))
    assert trained == ["<|tool_call>call:add{x:7}<tool_call|><|tool_response>"] * weight + ["it is 7<turn|>"]


def test_text_of_another_message_within_a_turn_refuses_the_row():
    inside = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}</s>{% elif m.role == 'assistant' %}"
        "{{ m.content[:2] }}{% if not loop.last %}{{ messages[loop.index].content }}{% endif %}{{ m.content[2:] }}</s>"
        "{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(inside, eos="</s>")
    encoder = Encoder(tokenizer, inside, max_seq_length=999)
    talk = [
        ASKED,
        {"role": "assistant", "content": "once"},
        {"role": "user", "content": "SECRET"},
        {"role": "assistant", "content": "more"},
    ]
    encoded = encoder.encode([parse_record({"messages": talk})[1], parse_record({"messages": talk[:2]})[1]])
    assert encoded.dropped == {0: "the chat template puts message 3 into message 2"}
    assert encoded.source.tolist() == [1]


def test_calls_get_ids_of_the_kind_that_mistral_takes():
    tokenizer, encoder, _ = family("mistral")
    long = [{"id": f"call_{n}_of_openai", **CALL} for n in range(2)]
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": long},
                {"role": "tool", "content": "2nd", "tool_call_id": "call_1_of_openai"},
                {"role": "tool", "content": "1st", "tool_call_id": "call_0_of_openai"}, {"role": "assistant", "content": "7"}]  # fmt: skip
    without = [{key: value for key, value in message.items() if key != "tool_call_id"} for message in messages]
    without[1] = {**without[1], "tool_calls": [CALL]}
    without = [*without[:3], without[4]]
    for turns in (messages, without):
        (row,) = rows_of(encoded_chat(encoder, turns))
        text = shown(tokenizer, row)
        asked = re.findall(r'"id": "(\w{9})"', text)
        answered = re.findall(r'"call_id": "(\w{9})"', text)
        assert sorted(asked) == sorted(answered)
        assert len(set(asked)) == len(turns[1]["tool_calls"])
        if turns is messages:
            assert answered == asked[::-1]


def test_a_template_that_shows_the_first_of_several_calls_refuses_them():
    _, encoder, _ = family("harmony")
    two = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    result = {"role": "tool", "content": "7"}
    messages = [ASKED, two, result, result, {"role": "assistant", "content": "7"}]
    encoded = encoded_chat(encoder, messages)
    assert encoded.dropped == {0: "the chat template shows 1 of the 2 tool calls of message 2; write one call per turn"}


def test_harmony_by_its_own_words():
    """The three channels, written out: earlier thinking is gone, and no turn is trained to end with <|end|>."""
    tokenizer, encoder, _ = family("harmony")
    trained = trained_in(tokenizer, rows_of(encoded_chat(encoder, HANDMADE[4])))
    to_add = " to=functions.add<|channel|>commentary json<|message|>"
    assert trained == [
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>7<|return|>",
        f'<|channel|>analysis<|message|>call it<|end|><|start|>assistant{to_add}{{"x": 7}}<|call|>',
        f'<|channel|>analysis<|message|>again<|end|><|start|>assistant{to_add}{{"x": 7}}<|call|>',
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>hm<|return|>",
    ]
    plain = [ASKED, {"role": "assistant", "content": "one"}, ASKED, {"role": "assistant", "content": "two"}]
    trained = trained_in(tokenizer, rows_of(encoded_chat(encoder, plain, None)))
    assert trained == ["<|channel|>final<|message|>one", "<|channel|>final<|message|>two<|return|>"]


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


def of_the_models(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs the models' own templates, which `python scripts/get_templates.py` fetches."""
    return pytest.mark.slow(pytest.mark.parity(test))


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


@of_the_models
@pytest.mark.parametrize("name", REAL)
def test_each_turn_is_what_the_model_writes_behind_its_prompt(name):
    """Text by text and token by token: the prompt as at inference, then what it writes, or the part of it that stands."""
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**6, day=DAY)
    counts = dict.fromkeys(("exact", "in part", "refused", "chats"), 0)
    for example in examples(11, 48):
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
                assert not (own and name in THINKS and written), (example, number)
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


@of_the_models
def test_openai_reads_in_our_trained_tokens_what_the_record_says(harmony):
    """Channels, thinking, calls and answers, by the parser that OpenAI serves GPT-OSS with."""
    library, encoding = harmony
    tokenizer = tokenizer_of("gptoss")
    encoder = Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**6, day=DAY)
    read = {"analysis": 0, "commentary": 0, "final": 0}
    for example in examples(5, 96):
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


@of_the_models
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


@of_the_models
def test_every_real_template_renders_as_in_transformers():
    """All that trl's wheel has, the marked ones included: our sandbox against transformers' own rendering."""
    tokenizer, shown = byte_tokenizer(bos=True), []
    files = sorted(place("chat_templates").glob("*.jinja"))
    for file in files:
        text = file.read_text(encoding="utf-8")
        for example in examples(19, 24):
            given = {"tools": example.tools, "add_generation_prompt": len(example.messages) % 2 == 0}
            ours, theirs = rendered_by_both(tokenizer, example.messages, text, **given)
            assert ours == theirs, file.name
            shown += [] if ours.startswith(REFUSED) else [file]
    assert len(files) > len(REAL)
    assert len(set(shown)) > 0.9 * len(files)  # some take no tools or no turn but the two roles


@of_the_models
def test_the_real_templates_say_the_same_of_an_unmarked_and_a_marked_form():
    """GPT-OSS's template with trl's marks renders as without them: what we read off is the published one."""
    tokenizer = tokenizer_of("gptoss")
    marked = place("chat_templates/gptoss_training.jinja").read_text(encoding="utf-8")
    for example in examples(3, 24):
        given = {"tools": example.tools, "tokenize": False}
        with contextlib.suppress(jinja2.TemplateError):
            plain = tokenizer.apply_chat_template(example.messages, **given)
            assert plain == tokenizer.apply_chat_template(example.messages, **given, chat_template=marked)
    assert all(token in tokenizer.get_vocab() for token in HARMONY)
