"""Reward models through the commands: trained, resumed, measured, refused as a language model, and read by transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from conftest import tiny_model, write_folder
from run_cli import one_line, run, succeeds

from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Completion, Conversation
from mlx_lora.exporters.adapter_config import check_fusing, classifier_of, padding_token
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base, load_base
from mlx_lora.rollouts.reward_models import score_answers
from mlx_lora.utils.errors import InputError

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

QUICK = ("--iters", 4, "--learning-rate", "5e-3", "--batch-size", 4, "--sample-tokens", 4, "--kernels", "ours",
         "--val-batches", 1, "--steps-per-report", 1, "--rank", 4)  # fmt: skip
CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": text}]
    for n, text in ((1, "It is 1."), (2, "No idea!!!"), (3, ""), (4, "It is four, of course."))
]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A tiny model with an output head of its own."""
    config = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    return write_folder(tmp_path_factory.mktemp("untied"), tiny_model(tie_word_embeddings=False), config)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea" + "!" * (n % 5)} for n in range(24)
    ]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def trained(untied, data, tmp_path_factory):
    """A reward model's adapter."""
    folder = tmp_path_factory.mktemp("reward") / "a"
    train(untied, data, folder)
    return folder


@pytest.fixture(scope="module")
def imitated(untied, data, tmp_path_factory):
    """An adapter without a score head."""
    folder = tmp_path_factory.mktemp("orpo") / "a"
    train(untied, data, folder, "--sample-tokens", 0, objective="orpo")
    return folder


def train(model, data, folder, *more, objective="reward"):
    succeeds(
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--objective", objective, *QUICK, *more
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def base_with(model, adapter) -> Base:
    base = load_base(ModelSettings(model=str(model)))
    load_adapter(base, adapter, scores=True)
    return base


def scores_of(model, adapter) -> np.ndarray:
    return score_answers(base_with(model, adapter), [Conversation(chat) for chat in CHATS])


def torch_scores(model, tokenizer) -> np.ndarray:
    """Return transformers' scores of the chats, padded to one batch."""
    import torch

    inputs = tokenizer.apply_chat_template(CHATS, return_dict=True, return_tensors="pt", padding=True)
    assert (inputs["attention_mask"] == 0).any()
    with torch.no_grad():
        return model.eval()(**inputs).logits.squeeze(1).numpy()


def test_the_only_target_of_a_row_is_behind_its_last_token():
    rows = EncodedSet.from_rows(
        [(np.arange(1, 4), np.array([0, 1, 1], bool)), (np.arange(7, 9), np.array([0, 1], bool))]
    )
    ends = rows.grouped(2).with_end_scores()
    assert [ends.row(i)[0].tolist() for i in range(2)] == [[1, 2, 3, 0], [7, 8, 0]]
    assert [ends.row(i)[1].tolist() for i in range(2)] == [[False] * 3 + [True], [False] * 2 + [True]]
    assert ends.group == 2


def test_evaluate_measures_what_was_trained(untied, data, trained):
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["mlx_lora"]["full"] == [SCORE_WEIGHT]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    ran = run(
        "evaluate", "--model", untied, "--adapter-path", trained, "--data", data, "--objective", "reward", "--json"
    )
    found = json.loads(ran.out)
    assert found["accuracy"] > 0.9
    assert found["margin"] == pytest.approx(found["chosen_rewards"] - found["rejected_rewards"], abs=1e-4)
    assert found["margin"] > lines[0]["margin"] + 0.1
    assert found["loss"] < lines[0]["val_loss"]
    assert (found["rows"], found["supervised_tokens"]) == (24, 48)
    assert "Before and after" not in (trained / "report.html").read_text()
    assert "scores answers and does not write text" in (trained / "README.md").read_text()


def test_a_reward_model_is_refused_where_text_is_wanted(untied, data, trained, tmp_path):
    common = ("--model", untied, "--adapter-path", trained)
    says = "this adapter is a reward model, which gives scores, not text"
    one_line(run("generate", *common, "--prompt", "x"), says)
    one_line(run("chat", "--model", untied, "--adapter", f"r={trained}"), says)
    one_line(run("serve", "--model", untied, "--adapter", f"r={trained}"), says)
    one_line(run("evaluate", *common, "--data", data, "--objective", "orpo"), says)
    one_line(run("evaluate", *common, "--data", data, "--forgetting"), says)
    for to in ("gguf", "gguf-adapter", "ollama", "mlx-lm"):
        one_line(run("export", *common, "--to", to, "--out", tmp_path / to), says)
    train = ("--model", untied, "--data", data, "--adapter-path", tmp_path / "b", *QUICK, "--resume-adapter-file")
    ran = run("train", *train, trained / "adapters.safetensors", "--objective", "orpo")
    assert ran.code == 2
    assert says in ran.lines[-1]


def test_what_a_reward_model_cannot_be_is_one_line(untied, data, trained, imitated, tmp_path):
    one_line(run("evaluate", "--model", untied, "--data", data, "--objective", "reward"), "no score head")
    common = ("--model", untied, "--data", data, "--objective", "reward")
    one_line(run("evaluate", *common, "--adapter-path", imitated), "has no score head")
    more = ("--adapter-path", tmp_path / "b", *QUICK)
    ran = run("train", *common, *more, "--target-modules", "q_proj,lm_head")
    assert (ran.code, "hidden states of this model cannot be read" in ran.lines[-1]) == (2, True)
    with pytest.raises(InputError, match="no such class"):
        classifier_of("kimi_linear")
    base = base_with(untied, trained)
    answers = [Completion("a", "b"), Completion("a" * 200, "b")]
    with pytest.raises(InputError, match="answer 1: no trained token"):
        score_answers(base, answers, DataSettings(max_seq_length=100))
    with pytest.raises(InputError, match="has no score head"):
        score_answers(load_base(ModelSettings(model=str(untied))), answers)


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(untied, data, tmp_path):
    more = ("--save-every", 2, "--dropout", 0.1)
    train(untied, data, tmp_path / "whole", *more)
    train(untied, data, tmp_path / "cut", *more)
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000004")
    train(untied, data, tmp_path / "cut", *more, "--resume")
    whole, cut = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert whole != (tmp_path / "cut/checkpoints/step-000002/adapters.safetensors").read_bytes()


def test_a_run_starts_from_a_reward_model_or_from_another_adapter(untied, data, trained, imitated, tmp_path):
    fresh = train(untied, data, tmp_path / "b", "--iters", 1)
    again = train(untied, data, tmp_path / "c", "--iters", 1, "--resume-adapter-file", trained / "adapters.safetensors")
    assert again[0]["val_loss"] < fresh[0]["val_loss"] - 0.05
    file = imitated / "adapters.safetensors"
    other = train(untied, data, tmp_path / "d", "--iters", 1, "--resume-adapter-file", file)
    assert other[0]["val_loss"] not in (fresh[0]["val_loss"], again[0]["val_loss"])


def test_the_head_is_seeded_and_every_factor_and_the_head_move(untied, data, trained, tmp_path):
    train(untied, data, tmp_path / "b")
    mine, same = (mx.load(str(folder / "adapters.safetensors")) for folder in (trained, tmp_path / "b"))
    assert all(mx.array_equal(value, same[name]) for name, value in mine.items())
    assert mine[SCORE_WEIGHT].dtype == mx.float32
    train(untied, data, tmp_path / "c", "--seed", 1)
    other = mx.load(str(tmp_path / "c/adapters.safetensors"))
    assert not mx.allclose(other[SCORE_WEIGHT], mine[SCORE_WEIGHT], atol=1e-3)
    assert all(mx.abs(value).max() > 0 for name, value in mine.items() if name.endswith("lora_b"))


def test_peft_reads_it_and_we_read_pefts(untied, trained, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "peft"
    assert run("export", "--model", untied, "--adapter-path", trained, "--to", "peft", "--out", out).code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(untied)
    tokenizer.pad_token = "<|endoftext|>"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        untied, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    wanted = scores_of(untied, trained)
    assert np.ptp(wanted) > 0.1
    assert np.abs(torch_scores(base, tokenizer) - wanted).max() > 1e-2  # without the adapter
    found = torch_scores(peft.PeftModel.from_pretrained(base, out), tokenizer)
    assert np.abs(found - wanted).max() < by_dtype(1e-4, 3e-2)
    assert np.abs(scores_of(untied, out) - wanted).max() < 1e-5
    one_line(run("generate", "--model", untied, "--adapter-path", out, "--prompt", "x"), "is a reward model")


@pytest.mark.parametrize("command", [("fuse",), ("export", "--to", "hf")])
def test_transformers_reads_the_fused_model(command, untied, trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    out = tmp_path / "fused"
    succeeds(command[0], "--model", untied, "--adapter-path", trained, *command[1:], "--out", out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    wanted = scores_of(untied, trained)
    assert np.abs(torch_scores(model, tokenizer) - wanted).max() < by_dtype(1e-4, 3e-2)
    model.score.weight.data *= 1.1
    assert np.abs(torch_scores(model, tokenizer) - wanted).max() > 1e-2
    stored = mx.load(str(out / "model.safetensors"))
    assert SCORE_WEIGHT in stored
    assert "lm_head.weight" not in stored
    one_line(run("generate", "--model", out, "--prompt", "x"), "gives scores, not text")


def test_a_fused_reward_model_is_in_float_and_in_transformers_layout(untied):
    base = load_base(ModelSettings(model=str(untied)))
    packed = replace(base, config={**base.config, "quantization": {"bits": 4, "group_size": 32}})
    with pytest.raises(InputError, match="give --dequantize"):
        check_fusing(packed, dequantize=False)
    check_fusing(packed, dequantize=True)
    for kind, why in (("mixtral", "another layout"), ("kimi_linear", "no such class")):
        with pytest.raises(InputError, match=why):
            check_fusing(replace(base, config={**base.config, "model_type": kind}), dequantize=True)


def test_padding_is_a_token_that_ends_no_text(untied):
    base = load_base(ModelSettings(model=str(untied)))
    tokenizer = base.hf_tokenizer
    assert padding_token(tokenizer, base.config) == "<|endoftext|>"
    assert padding_token(tokenizer, {"eos_token_id": [256, 257]}) not in ("<|endoftext|>", "<s>", tokenizer.eos_token)
    assert padding_token(tokenizer, {"eos_token_id": list(range(300))}) is None


def test_answers_are_scored_in_their_order_whatever_the_batch(untied, trained):
    base = base_with(untied, trained)
    answers = [Conversation(chat) for chat in CHATS]
    whole = score_answers(base, answers)
    assert np.abs(score_answers(base, answers, batch_tokens=48) - whole).max() < 1e-5
    assert np.abs(score_answers(base, answers[::-1])[::-1] - whole).max() < 1e-5
    assert np.abs(np.diff(whole)).min() > 1e-3
    plain = replace(base)
    plain.hf_tokenizer.chat_template = None
    assert score_answers(plain, [Completion("a ", "b")]) != pytest.approx(whole[0], abs=1e-3)
