"""Episodes with tools against TRL: the loss and every gradient over PEFT on torch, what it reads as calls, and what it puts back."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace

import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from byte_tokenizer import byte_tokenizer, template
from frozen_answers import ALPHA, RANK, moved_base
from mlx.utils import tree_flatten
from tool_files import answer_text, call_text
from torch_judge import name_here, torch_base

from mlx_lora.config.load import train_settings
from mlx_lora.data.assistant_spans import common_prefix
from mlx_lora.data.batch import collate
from mlx_lora.data.prompts import encode_prompts, parse_prompt
from mlx_lora.data.tokenize import Encoder
from mlx_lora.losses.agree import choose_loss
from mlx_lora.objectives.policy_arrays import ADVANTAGES, OLD, REFERENCE, REWARDS, token_logps
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.rollouts.environment import Agent, Toolbox, ToolEnv, play, tool_schemas
from mlx_lora.rollouts.rewards import Reward
from mlx_lora.rollouts.rollout import Rollouts
from mlx_lora.rollouts.tool_calls import CallReader, ToolTurns

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
QWEN, GROUP, ROOM = "qwen3_thinking", 3, 400


def near(count: int) -> str:
    """Near.

    Args:
        count: n
    """
    return "." * count


def frozen_episodes():
    """Return a batch of two prompts with three episodes each, of one to three turns, as a run makes it; and where episodes end."""
    tokenizer = byte_tokenizer(template(QWEN))
    settings = train_settings(
        {
            "model": "m",
            "data": "d",
            "objective": "grpo",
            "reward": "exact_match",
            "group_size": GROUP,
            "max_new_tokens": ROOM,
        }
    )
    toolbox = Toolbox([near], None, tool_schemas([near], None))
    zeros = Reward("zeros", lambda completions, **more: [0.0] * len(completions))
    env = ToolEnv([zeros], settings, tokenizer, toolbox=toolbox, ends=frozenset([tokenizer.eos_token_id]))
    encoder = Encoder(tokenizer, tokenizer.chat_template, max_seq_length=10**4)
    prompts = encode_prompts(
        encoder, [parse_prompt({"prompt": text}) for text in ("a?", "And b?")], tools=toolbox.schemas
    ).rows
    draw = random.Random(3)
    answers = [
        [*(call_text(QWEN, "near", {"count": draw.randint(1, 9)}) for _ in range(number % 3)), answer_text(QWEN, "ok")]
        for number in range(2 * GROUP)
    ]

    def sample(turn, episodes, before, left):
        return [tokenizer.encode(answers[number][turn], add_special_tokens=False) for number in episodes]

    tokens = [prompts.row(number)[0].tolist() for number in range(2)]
    played = play(env, Agent(sample, ROOM, env.ends), tokens, prompts.facts, [0, 1], GROUP)
    width = max(map(len, tokens)) + ROOM
    planned = collate(prompts.with_room(GROUP, ROOM), np.arange(2), width, 2 * GROUP * ROOM)
    rows = np.flatnonzero(planned.real)
    sampling = Rollouts(None, settings, env, None, {})  # pyright: ignore[reportArgumentType] # what is called needs no model
    return sampling._filled(planned, rows, played)


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "rloo"])
def test_loss_and_every_gradient_are_trls(name, tiny_folder):
    import peft
    import torch
    from trl_policy_judge import policy_objective

    batch, begins, ends = frozen_episodes()
    base, initial = moved_base(tiny_folder)
    loss = choose_loss(base.model, base.config)
    draw = np.random.default_rng(9)
    old = token_logps(base.model, loss, batch)
    old += draw.normal(0, 0.2, old.shape).astype(np.float32) * batch.mask
    reference = old + draw.normal(0, 0.3, old.shape).astype(np.float32) * batch.mask
    rows = len(batch.inputs)
    advantages = draw.normal(0, 1, rows).astype(np.float32)
    more = {OLD: old, REFERENCE: reference, ADVANTAGES: advantages, REWARDS: np.ones(rows, np.float32)}
    batch = batch.with_columns(**more)
    beta = 0.0 if name == "rloo" else 0.2
    asked = {"objective": "rloo"} if name == "rloo" else {"objective": "grpo", "grpo_loss": name, "kl_beta": beta}
    asked |= {"model": "m", "data": "d", "reward": "exact_match", "max_new_tokens": ROOM}
    task = bind(objective_of(train_settings(asked).objective), loss, base)
    [ready] = task.prepare([batch], SINGLE_DEVICE)
    (total, count, _), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(ready))
    ours = {key: np.array(value / count) for key, value in tree_flatten(grads)}

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(torch_base(tiny_folder), config).train()
    trained = {name_here(key): value for key, value in model.named_parameters() if value.requires_grad}
    for key, value in trained.items():
        value.data = torch.tensor(initial[key].T.copy())
    inputs, targets = (torch.tensor(values.astype(np.int64)) for values in (batch.inputs, batch.targets))
    logps = torch.log_softmax(model(inputs).logits, dim=-1).gather(2, targets[..., None]).squeeze(2)
    columns = np.arange(batch.inputs.shape[1])
    completion = torch.tensor((columns >= begins[:, None]) & (columns < ends[:, None]))  # with what tools returned
    own = torch.tensor(batch.mask)
    assert 0 < int(own.sum()) < int(completion.sum()) - 100
    old_t, reference_t, advantages_t = map(torch.tensor, (old, reference, advantages))
    options = {"beta": beta, "longest": ROOM}
    if name == "rloo":  # TRL has no tools there: its mask has the sampled tokens alone
        wanted, _ = policy_objective(logps, old_t, reference_t, own, advantages_t, name, **options)
        other, _ = policy_objective(logps, old_t, reference_t, completion, advantages_t, name, **options)
    else:
        wanted, _ = policy_objective(
            logps, old_t, reference_t, completion, advantages_t, name, tool_mask=own, **options
        )
        other, _ = policy_objective(logps, old_t, reference_t, completion, advantages_t, name, **options)
    assert (total / count).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert (total / count).item() != pytest.approx(other.item(), rel=1e-3)  # trained results would be another loss
    wanted.backward()
    for key, value in trained.items():
        theirs = value.grad.numpy().T
        assert np.linalg.norm(ours[key] - theirs) < 1e-4 * np.linalg.norm(theirs), key
        assert np.linalg.norm(theirs) > 0


# Files of TRL's chat_templates, which are the models' own -> end tokens of the model.
TEMPLATES = {
    "qwen2_5": ("<|im_end|>",), "qwen3_instruct_2507": ("<|im_end|>",), "qwen3_5_think": ("<|im_end|>",),
    "qwen3_5_nothink": ("<|im_end|>",), "llama3_1": ("<|eot_id|>",), "llama3_2": ("<|eot_id|>",),
    "gptoss": ("<|return|>", "<|call|>"), "gemma4_v2": ("<turn|>", "<|tool_response>"), "lfm2_2_5": ("<|im_end|>",),
    "nemotron_3_nano": ("<|im_end|>",),
}  # fmt: skip
SPECIAL = re.compile(r'<\|[^<>|\n]{1,40}\|>|<\|[a-z_]+>|<[a-z_]+\|>|<\|"\|>')


def real_template(name: str):
    """Return a byte tokenizer with a model's own template, and its end tokens."""
    import trl

    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    ends = TEMPLATES[name]
    tokenizer = byte_tokenizer(text, eos=ends[0], special_tokens=sorted({*SPECIAL.findall(text), *ends, '<|"|>'}))
    return tokenizer, frozenset(tokenizer.convert_tokens_to_ids(list(ends)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_models_own_templates_give_trls_calls_and_results(name):
    from trl.chat_template_utils import add_response_schema, parse_response
    from trl.trainer.grpo_trainer import GRPOTrainer

    tokenizer, ends = real_template(name)
    schemas = tool_schemas([near], None)
    turns = ToolTurns(tokenizer, tokenizer.chat_template, ends, schemas)
    reader = CallReader.of(turns)
    messages = [{"role": "tool", "name": "near", "content": "three dots"}]
    trainer = SimpleNamespace(
        _is_vlm=False, processing_class=tokenizer, _tokenizer=tokenizer, chat_template=None, chat_template_kwargs={}
    )
    assert turns.tokens([{"name": "near"}], ["three dots"]) == GRPOTrainer._get_tool_suffix_ids(trainer, messages)

    judge = add_response_schema(tokenizer)
    call = {"type": "function", "function": {"name": "near", "arguments": {"count": 3}}}
    asked = [{"role": "user", "content": "dots"}]
    said = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}, *messages]
    prompt = tokenizer.apply_chat_template(
        asked, tools=schemas, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    before = tokenizer.apply_chat_template(asked, tools=schemas, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(said, tools=schemas, tokenize=False)
    answer = whole[common_prefix(before, whole) :]
    end = min(answer.index(text) + len(text) for text in TEMPLATES[name] if text in answer)
    tokens = tokenizer.encode(answer[:end], add_special_tokens=False)
    theirs = parse_response(judge, tokens, prefix=prompt, tools=schemas)
    ours = reader(tokens).message
    assert ours["tool_calls"] == theirs["tool_calls"] == [call]
    assert ours["content"].strip() == theirs["content"].strip()
    broken = tokenizer.encode(answer[: answer.index("3")], add_special_tokens=False)
    assert "tool_calls" not in reader(broken).message
