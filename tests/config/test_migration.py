"""Settings files of Axolotl, LLaMA-Factory, TRL, mlx-lm-lora and mlx-lm: what each key becomes here, what is left out, and flags over a file."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml
from refusing import refuses
from run_cli import succeeds

from mlx_lora.config import settings as config
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.migrate import DIALECTS, common, find_dialect, migrate
from mlx_lora.config.migrate.common import UNCUT
from mlx_lora.config.objectives import OBJECTIVES, SMOOTHED
from mlx_lora.objectives.table import objective_of
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError

FOREIGN = Path(__file__).parents[1] / "foreign"
KNOWN = set(config.FIELDS)

AXOLOTL = "base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"
FACTORY = "model_name_or_path: m\nfinetuning_type: lora\nlora_rank: 8\n"
TRL = "model_name_or_path: m\ndataset_name: d\nuse_peft: true\n"
MLX_LM = "model: m\ndata: d\nlora_parameters: {rank: 8, scale: 2.0}\n"
LORA = "model: m\ndata: d\ntrain_type: lora\n"
# File -> what it must become, the keys that change no result, and those that are refused.
CASES = {
    "axolotl-qlora-packed.yml": (
        {
            "rank": 32, "alpha": 16, "method": "lora", "bits": 4, "target_modules": "all-linear",
            "data_format": "alpaca_sections", "chat_template": "alpaca", "data": "someone/alpaca_2k", "long_rows": "drop",
            "epochs": 4, "max_seq_length": 4096, "batch_tokens": 8192, "warmup": 0.1, "lr_schedule": "cosine", "warmup_init": 0,
            "warmup_rounding": "down", "optimizer": "adamw", "valid_fraction": 0.05, "steps_per_report": 1,
            "steps_per_eval": 0.0625, "save_every": 0.25, "grad_checkpoint": True, "learning_rate": 0.0002, "weight_decay": 0.0,
            "grad_accumulation_steps": 4, "adapter_path": "./outputs/qlora", "model": "someone/tiny-llama", "dropout": 0.05,
        },
        "tokenizer_type eval_sample_packing bf16 tf32 flash_attention",
        "",
    ),
    "axolotl-chat-template.yml": (
        {
            "rank": 8, "alpha": 16, "method": "lora", "bits": 8, "target_modules": "q_proj,v_proj", "data_format": "auto",
            "data": "someone/messages?split=train[:20%]", "chat_template": "llama3", "mask_prompt": False, "long_rows": "drop",
            "iters": 300, "max_seq_length": 2048, "batch_size": 4, "warmup": 10, "lr_schedule": "constant", "warmup_init": 0,
            "optimizer": "adamw", "valid_fraction": 0.1, "steps_per_eval": 0.1, "save_every": 50, "report_to": "wandb",
            "learning_rate": 5e-5, "max_grad_norm": 0.5, "adapter_path": "./out", "seed": 7,
            "model": "someone/llama-3-8b-instruct", "project_name": "chats", "weight_decay": 0.0,
        },
        "strict",
        "",
    ),
    "axolotl-dora-regex.yml": (
        {
            "rank": 16, "alpha": 128.0, "method": "dora", "target_modules": "up_proj,down_proj,q_proj",
            "data": "rows/train.jsonl,someone/more", "long_rows": "drop", "epochs": 1.0, "max_seq_length": 512, "batch_size": 1,
            "warmup": 0.03, "warmup_init": 0, "warmup_rounding": "down", "valid_fraction": 0.0, "learning_rate": 1e-4,
            "grad_accumulation_steps": 1, "model": "someone/qwen", "weight_decay": 0.0,
        },
        "liger_rope",
        "datasets lr_scheduler optimizer",
    ),
    "axolotl-loraplus.yml": (
        {
            "rank": 64, "alpha": 32, "method": "lora-plus", "loraplus_lr_ratio": 16, "target_modules": "all-linear",
            "data_format": "sharegpt", "data": "someone/chats@abc123,someone/held-out?as=valid", "long_rows": "drop",
            "grad_accumulation_steps": 8, "epochs": 1, "max_seq_length": 8192, "batch_size": 4, "warmup": 0,
            "lr_schedule": "linear", "valid_fraction": 0, "val_batches": 0, "steps_per_eval": 0, "save_every": 0,
            "trust_remote_code": True, "learning_rate": 0.0001, "weight_decay": 0.1, "model": "someone/mistral",
            "revision": "v0.3",
        },
        "fp16",
        "loraplus_lr_embedding neftune_noise_alpha",
    ),
    "axolotl-relora.yml": (
        {
            "rank": 8, "alpha": 16, "method": "relora", "relora_every": 150, "relora_warmup": 10, "relora_prune_ratio": 0.9,
            "bits": 4, "target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"],
            "data_format": "alpaca_sections", "chat_template": "alpaca", "data": "someone/instructions", "long_rows": "drop",
            "epochs": 4, "max_seq_length": 512, "batch_size": 4, "warmup": 0.03, "warmup_init": 0, "warmup_rounding": "down",
            "valid_fraction": 200, "learning_rate": 0.0002, "grad_accumulation_steps": 4, "model": "someone/llama",
            "weight_decay": 0.0,
        },
        "relora_cpu_offload",
        "",
    ),
    "axolotl-full.yaml": (
        {
            "method": "full", "target_modules": "*", "data_format": "text", "data": "corpus",
            "chat_template": "templates/mine.jinja", "long_rows": "drop", "epochs": 1, "max_seq_length": 8192,
            "batch_tokens": 8192, "warmup": 0.03, "lr_schedule": "cosine", "warmup_init": 0, "warmup_rounding": "down",
            "optimizer": "adamw", "valid_fraction": 0.0, "grad_checkpoint": False, "dtype": "float32", "learning_rate": 2e-5,
            "grad_accumulation_steps": 8, "model": "someone/llama", "weight_decay": 0.0,
        },
        "lora_dropout",
        "",
    ),
    "llama-factory-sft.yaml": (
        {
            "train_line_break": True, "train": True, "rank": 8, "alpha": 16, "method": "lora", "target_modules": "all-linear",
            "data": "{folder}/rows.json?split=train[:1000]", "chat_template": "llama3", "epochs": 3, "max_seq_length": 2048,
            "batch_size": 1, "warmup": 0.1, "lr_schedule": "cosine", "warmup_init": 0, "warmup_rounding": "up",
            "valid_fraction": 0.1, "steps_per_report": 10, "steps_per_eval": 500, "save_every": 500, "trust_remote_code": True,
            "learning_rate": 0.0001, "grad_accumulation_steps": 8, "adapter_path": "saves/llama3/lora/sft",
            "model": "someone/llama-3-8b-instruct", "force": True, "weight_decay": 0.0,
        },
        "report_to overwrite_cache preprocessing_num_workers plot_loss bf16 ddp_timeout per_device_eval_batch_size",
        "dataset",
    ),
    "llama-factory-qlora.yaml": (
        {
            "train_line_break": True, "rank": 16, "alpha": 16, "method": "rslora", "bits": 4, "target_modules": "q_proj,v_proj",
            "modules_to_save": "embed_tokens,lm_head", "data": "someone/hub-rows", "chat_template": "chatml", "iters": 200,
            "max_seq_length": 2048, "batch_size": 8, "lr_schedule": "cosine", "optimizer": "adamw", "valid_fraction": 0.0,
            "report_to": "tensorboard", "adapter_path": "saves/q", "model": "someone/qwen3-4b", "dropout": 0.1,
            "learning_rate": 5e-05, "warmup": 0, "weight_decay": 0.0,
        },
        "quantization_method",
        "",
    ),
    "llama-factory-loraplus-defaults.yaml": (
        {
            "train_line_break": True, "rank": 8, "alpha": 16, "method": "lora-plus", "loraplus_lr_ratio": 16, "chat_template": "alpaca", "epochs": 3.0,
            "max_seq_length": 1024, "batch_tokens": 8192, "valid_fraction": 0.0, "report_to": "swanlab",
            "adapter_path": "saves/plus", "model": "someone/llama", "project_name": "plus", "learning_rate": 5e-05,
            "lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0,
        },
        "swanlab_mode",
        "dataset",
    ),
    "llama-factory-pissa.yaml": (
        {
            "train_line_break": True, "rank": 8, "alpha": 16, "method": "pissa", "target_modules": "all-linear", "data": "{folder}/rows.json",
            "mask_prompt": False, "epochs": 3.0, "max_seq_length": 2048, "batch_size": 2, "warmup": 0, "lr_schedule": "constant",
            "valid_fraction": 0.0, "val_batches": 0, "grad_checkpoint": False, "weight_decay": 0.1, "max_grad_norm": 0.3,
            "adapter_path": "saves/pissa", "seed": 3, "model": "someone/llama", "learning_rate": 5e-05,
        },
        "pissa_iter pissa_convert",
        "",
    ),
    "llama-factory-pretrain.yaml": (
        {
            "train_line_break": True, "last_answer": True, "train": True, "rank": 8, "alpha": 16, "method": "dora", "target_modules": "all-linear", "data_format": "text",
            "data": "{folder}/text.txt", "epochs": 1, "max_seq_length": 512, "batch_tokens": 2048, "valid_fraction": 100,
            "learning_rate": 0.0001, "adapter_path": "saves/pt", "model": "someone/llama", "lr_schedule": "linear", "warmup": 0,
            "weight_decay": 0.0,
        },
        "",
        "",
    ),
    "llama-factory-freeze.yaml": (
        {
            "train_line_break": True, "train": True, "method": "full", "target_modules": "*.layers.*", "num_layers": 8, "optimizer": "muon",
            "data": "{folder}/rows.json", "chat_template": "llama3", "epochs": 3, "max_seq_length": 2048, "batch_size": 1,
            "valid_fraction": 0.0, "save_every": 0.3333333333333333, "learning_rate": 1e-05, "adapter_path": "saves/freeze",
            "model": "someone/llama", "lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0,
        },
        "lora_rank fp16",
        "use_llama_pro",
    ),
    "mlx-lm-example.yaml": (
        {
            "rank": 8, "alpha": 160, "dropout": 0.0, "target_modules": ["self_attn.q_proj", "self_attn.v_proj"],
            "lr_schedule": "constant", "warmup": 0, "optimizer": "adamw", "bias_correction": False, "model": "mlx_model",
            "train": True, "data": "training/data", "seed": 0, "num_layers": 16, "batch_size": 4, "iters": 1000,
            "val_batches": 25, "learning_rate": "1e-5", "steps_per_report": 10, "steps_per_eval": 200,
            "adapter_path": "adapters", "save_every": 100, "test": False, "test_batches": 100, "max_seq_length": 2048,
            "grad_checkpoint": False, "method": "lora", "max_grad_norm": 0.0, "mask_prompt": False, "valid_fraction": 0.0,
            "long_rows": "cut",
        },
        "",
        "",
    ),
    "mlx-lm-schedule.yaml": (
        {
            "last_answer": True, "rank": 8, "alpha": 160.0, "learning_rate": 0.0001, "warmup": 100, "warmup_init": 1e-07, "lr_schedule": "cosine",
            "decay_steps": 600, "min_lr_ratio": 0.009999999999999998, "optimizer": "adam", "bias_correction": False,
            "model": "someone/mistral-4bit", "train": True, "data": "data", "num_layers": -1, "iters": 600, "mask_prompt": True,
            "batch_size": 4, "max_grad_norm": 0.0, "valid_fraction": 0.0, "long_rows": "cut",
        },
        "",
        "",
    ),
    "mlx-lm-dora-config.yaml": (
        {
            "rank": 16, "alpha": 32, "dropout": 0.05, "lr_schedule": "constant", "warmup": 0, "optimizer": "adamw",
            "weight_decay": 0.05, "adam_beta1": 0.9, "adam_beta2": 0.98, "model": "someone/phi", "train": True, "test": True,
            "data": "data", "grad_checkpoint": True, "method": "dora", "num_layers": 16, "batch_size": 4, "iters": 1000,
            "learning_rate": 1e-05, "max_grad_norm": 0.0, "mask_prompt": False, "valid_fraction": 0.0, "long_rows": "cut",
        },
        "",
        "",
    ),
    "mlx-lm-hub-data.yaml": (
        {
            "rank": 8, "alpha": 80, "lr_schedule": "constant", "warmup": 0, "optimizer": "adam", "bias_correction": False,
            "data": "someone/summaries?split=train[:1000]&prompt_column=text&completion_column=summary,someone/summaries?split=train[-10%:]&as=valid&prompt_column=text&completion_column=summary,someone/more?split=train[:80%],someone/more?split=train[-10%:]&as=valid",
            "model": "someone/phi", "train": True, "report_to": "wandb", "project_name": "sums", "num_layers": 16,
            "batch_size": 4, "iters": 1000, "learning_rate": 1e-05, "max_grad_norm": 0.0, "mask_prompt": False,
            "valid_fraction": 0.0, "long_rows": "cut",
        },
        "",
        "lora_parameters.alpha",
    ),
    "mlx-lm-accumulation.yaml": (
        {
            "rank": 8, "alpha": 160.0, "learning_rate": 0.01, "warmup": 0, "optimizer": "sgd", "weight_decay": 0.0,
            "grad_accumulation_steps": 8, "iters": 100, "steps_per_report": 1, "steps_per_eval": 10, "save_every": 1,
            "model": "someone/phi", "train": True, "data": "data", "num_layers": 8, "batch_size": 4, "max_grad_norm": 0.0,
            "mask_prompt": False, "valid_fraction": 0.0, "long_rows": "cut",
        },
        "",
        "lr_schedule",
    ),
    "mlx-lm-full.yaml": (
        {
            "learning_rate": 1e-05, "warmup": 0, "lr_schedule": "linear", "decay_steps": 1000, "min_lr_ratio": 0.0,
            "optimizer": "adam", "bias_correction": False, "model": "someone/phi", "train": True, "data": "data",
            "num_layers": 4, "batch_tokens": 4096, "method": "full", "iters": 1000, "max_grad_norm": 0.0, "mask_prompt": False,
            "valid_fraction": 0.0, "long_rows": "cut",
        },
        "",
        "",
    ),
    "axolotl-dpo.yml": (
        {
            "objective": "dpo", "beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "rank": 8, "alpha": 16,
            "method": "lora", "bits": 4, "target_modules": "all-linear", "data": "someone/dialogues", "chat_template": "chatml",
            "epochs": 1, "max_seq_length": 2048, "batch_size": 2, "warmup": 0.03, "warmup_init": 0, "warmup_rounding": "down",
            "valid_fraction": 0.0, "learning_rate": 1e-5, "adapter_path": "./outputs/dpo",
            "model": "someone/llama-3-8b-instruct", "weight_decay": 0.0,
        },
        "train_on_inputs",
        "dpo_use_weighting",
    ),
    "llama-factory-reward.yaml": (
        {
            "train_line_break": True, "objective": "reward", "train": True, "rank": 8, "alpha": 16, "method": "lora", "target_modules": "all-linear",
            "turn_names": "user=questioner", "data": "{folder}/ranked.json", "chat_template": "chatml", "epochs": 3,
            "max_seq_length": 2048, "batch_size": 1, "warmup": 0.1, "lr_schedule": "cosine", "warmup_init": 0,
            "warmup_rounding": "up", "valid_fraction": 0.0, "learning_rate": 0.0001, "grad_accumulation_steps": 8,
            "adapter_path": "saves/reward", "model": "someone/qwen3-4b", "weight_decay": 0.0,
        },
        "plot_loss",
        "",
    ),
    "mlx-lm-lora-dpo.yaml": (
        {
            "bits": 4, "report_to": "wandb", "project_name": "pairs", "objective": "dpo", "beta": 0.3, "loss_type": "hinge",
            "rank": 16, "alpha": 160.0, "dropout": 0.0, "lr_schedule": "constant", "warmup": 0, "optimizer": "adam",
            "bias_correction": False, "grad_accumulation_steps": 4, "steps_per_report": 2, "steps_per_eval": 10,
            "save_every": 25, "model": "someone/qwen2.5-0.5b", "train": True, "data": "./preference_data", "batch_size": 2,
            "epochs": 2, "learning_rate": "5e-6", "method": "dora", "max_grad_norm": 0.0, "valid_fraction": 0.0,
        },
        "alpha mask_prompt",
        "delta efficient_long_context",
    ),
    "trl-dpo.yaml": (
        {
            "objective": "dpo", "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.2,
            "rank": 32, "alpha": 32, "dropout": 0.0, "method": "lora", "target_modules": "q_proj,v_proj", "bits": 4,
            "data": "someone/ultrafeedback", "iters": 100, "max_seq_length": 512, "batch_size": 2, "valid_fraction": 0.0,
            "val_batches": 0, "report_to": "wandb", "learning_rate": 1e-06, "grad_accumulation_steps": 8,
            "adapter_path": "out/dpo", "model": "someone/qwen2.5-0.5b", "lr_schedule": "linear", "warmup": 0,
            "weight_decay": 0.0, "long_rows": "cut",
        },
        "dtype dataset_test_split num_processes",
        "label_smoothing max_prompt_length",
    ),
    "trl-grpo.yaml": (
        {
            "objective": "grpo", "group_size": 4, "max_new_tokens": 128, "temp": 0.9, "top_p": 0.95, "min_p": 0.02,
            "epsilon": 0.1, "epsilon_high": 0.28, "kl_beta": 0.001, "updates_per_rollout": 3, "mask_truncated": True,
            "grpo_loss": "dr_grpo", "scale_rewards": "none",
            "reward": "regex:(?sm)\\A<think>(?!.*<think>)(.*?)</think>.*$,my_lib/rewards.py:right_number",
            "reward_weights": "0.5,1.0", "save_every": 102, "steps_per_eval": 201, "rank": 32, "alpha": 32, "dropout": 0.05,
            "method": "lora", "target_modules": "q_proj,v_proj", "data": "someone/gsm8k", "iters": 90, "batch_size": 1,
            "grad_accumulation_steps": 4, "max_seq_length": 256, "valid_fraction": 0.0, "learning_rate": 1e-05,
            "adapter_path": "out/grpo", "model": "someone/qwen3-0.6b", "lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0,
            "long_rows": "cut",
        },
        "use_vllm log_completions",
        "",
    ),
    "axolotl-grpo.yml": (
        {
            "objective": "grpo", "group_size": 4, "max_new_tokens": 200, "kl_beta": 0.01, "grpo_loss": "gspo",
            "reward": "rewards.py:right,rewards.py:short", "reward_weights": "1.0,0.1", "rank": 16, "alpha": 32,
            "method": "lora", "target_modules": "all-linear", "data": "someone/gsm8k", "iters": 50, "batch_size": 2,
            "grad_accumulation_steps": 2, "warmup": 0.03, "warmup_init": 0, "warmup_rounding": "down", "valid_fraction": 0.0,
            "learning_rate": 1e-5, "adapter_path": "./outputs/grpo", "model": "someone/qwen2.5-0.5b", "weight_decay": 0.0,
        },
        "sequence_len trl.use_vllm",
        "datasets.type steps_per_generation",
    ),
    "mlx-lm-lora-grpo.yaml": (
        {
            "objective": "grpo", "group_size": 6, "max_new_tokens": 100, "temp": 0.7, "epsilon": 0.1, "epsilon_high": 0.3,
            "kl_beta": 0.05, "grpo_loss": "bnpo", "reward": "mine.py:right_answer,mine.py:short_answer",
            "reward_weights": "1.0,0.5", "rank": 8, "alpha": 32, "lr_schedule": "constant", "warmup": 0, "optimizer": "adamw",
            "bias_correction": False, "model": "someone/qwen3-0.6b", "train": True, "data": "/path/to/data", "num_layers": 16,
            "batch_size": 2, "iters": 300, "learning_rate": "2e-4", "adapter_path": "adapters", "method": "lora",
            "max_grad_norm": 0.0, "valid_fraction": 0.0,
        },
        "mask_prompt",
        "use_chat_template",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A LLaMA-Factory data folder."""
    table = {
        "rows": {"file_name": "rows.json"},
        "hub_rows": {"hf_hub_url": "someone/hub-rows", "split": "train"},
        "text": {"file_name": "text.txt", "columns": {"prompt": "text"}},
        "ranked": {
            "file_name": "ranked.json",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
            "tags": {"role_tag": "from", "user_tag": "questioner"},
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(table))
    return tmp_path


def read(name: str, folder: Path) -> tuple[common.Sheet, list[str]]:
    """Read a file of tests/foreign; return it and what is said of it."""
    content = yaml.safe_load((FOREIGN / name).read_text().replace("{folder}", str(folder)))
    said: list[str] = []
    sheet = find_dialect(content).read(content, name)
    with console.log_to(said.append), contextlib.suppress(InputError):
        migrate(content, {}, name)
    return sheet, said


def refused(text: str, flags=MappingProxyType({})) -> str:
    """Return why a file is not taken; empty: it is."""
    try:
        migrate(yaml.safe_load(text), flags, "f")
    except InputError as error:
        return str(error)
    return ""


def from_file(file: Path, flags=MappingProxyType({})) -> config.TrainSettings:
    """Resolve settings as the commands do."""
    return train_settings(flags, read_settings(str(file), flags))


def flat_of(text: str, flags: dict) -> dict:
    return train_settings(flags, migrate(yaml.safe_load(text), flags, "f")).to_flat()


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_translated_harmless_or_refused(name, folder):
    wanted, harmless, refused_keys = CASES[name]
    sheet, said = read(name, folder)
    texts = {
        key: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
        for key, value in wanted.items()
    }
    assert sheet.found == texts
    assert sheet.harmless == harmless.split()
    assert [line.split(" ")[0] for line in sheet.refused] == refused_keys.split()
    trainer = name.split("-")[0]
    assert trainer in said[0].lower().replace("llama-factory", "llama").split(" settings file of ")[1]
    assert train_settings(sheet.found).model.model.startswith(("someone/", "mlx_model"))
    content = yaml.safe_load((FOREIGN / name).read_text())
    assert sum(dialect.recognizes(content) for dialect in DIALECTS) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (AXOLOTL + "neftune_noise_alpha: 5\n", "noise on the embeddings"),
        (AXOLOTL + "lr_scheduler: rex\n", "lr_scheduler rex: only cosine"),
        (AXOLOTL + "optimizer: lion_8bit\n", "optimizer lion_8bit: only AdamW"),
        (AXOLOTL + "chat_template: phi_3\n", "nor is it that of m"),
        (AXOLOTL + "datasets: [{path: d, type: chat_template, roles_to_train: [user]}]\n", "datasets.roles_to_train"),
        (AXOLOTL + "datasets: [{path: d, type: jeopardy}]\n", "datasets.type jeopardy: a form of records"),
        (AXOLOTL + "datasets: [{path: d, type: {field_prompt: q, prompt_format: '[INST]{prompt}'}}]\nrl: orpo\n", "prompt_format"),
        (AXOLOTL + "plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\n", "a program of its own"),
        (AXOLOTL + "lora_target_modules: '(a|b).*[0-9]'\n", "a regular expression"),
        (AXOLOTL + "rl: simpo\n", "cpo_alpha 1: a likelihood of chosen answers"),
        (AXOLOTL + "whatever: 3\n", "whatever 3: not known here"),
        (FACTORY + "dataset: nowhere\n", "dataset nowhere: not in"),
        (FACTORY + "template: qwen3\nenable_thinking: false\n", "the empty thought"),
        (FACTORY + "mix_strategy: interleave_under\ninterleave_probs: 0.7,0.3\n", "mix_strategy interleave_under"),
        (FACTORY + "stage: dpo\ndpo_label_smoothing: 0.1\n", "dpo_label_smoothing 0.1: of dpo's losses only"),
        (FACTORY + "export_dir: out\n", "trains nothing"),
        (TRL + "loss_type: dft\n", "another loss"),
        (TRL + "num_generations: 4\nnormalize_advantages: true\n", "normalize_advantages"),
        (TRL + "num_generations: 8\nsteps_per_generation: 4\n", "answers are sampled for one step"),
        (TRL + "reward_model_name_or_path: org/scores\nnum_generations: 8\n", "reward_model_name_or_path org/scores: no function"),
        (MLX_LM + "lr_schedule: {name: exponential_decay, arguments: [1e-5, 0.9]}\n", "lr_schedule exponential_decay"),
        (LORA + "train_mode: grpo\nreward_functions: r1_int_reward_func\n", "r1_int_reward_func: no function"),
    ],
)  # fmt: skip
def test_what_changes_the_result_and_is_not_here_is_refused(text, why):
    assert why in refused(text)


def test_a_flag_may_say_what_a_file_cannot():
    asked = (
        AXOLOTL + "lr_scheduler: rex\noptimizer: lion_8bit\nchat_template: phi_3\nlora_target_modules: '(a|b).*[0-9]'\n"
    )
    flags = {"lr_schedule": "linear", "optimizer": "adamw", "chat_template": "chatml", "target_modules": "q_proj"}
    assert not refused(asked, flags)
    assert not refused(FACTORY + "dataset: nowhere\n", {"data": "rows.jsonl"})


TUNE = """
output_dir: out
model: {_component_: torchtune.models.qwen2_5.lora_qwen2_5_0_5b, lora_attn_modules: [q_proj, output_proj], apply_lora_to_mlp: true, lora_rank: 4}
tokenizer: {_component_: torchtune.models.qwen2_5.qwen2_5_tokenizer, max_seq_len: null}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: models/qwen, output_dir: "${output_dir}"}
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, split: "train[:95%]"}
dataset_val: {_component_: torchtune.datasets.alpaca_cleaned_dataset, split: "train[95%:]"}
optimizer: {_component_: torch.optim.AdamW, lr: 3e-4, fused: true}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
batch_size: 2
device: cuda
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: "${output_dir}/logs"}
"""
SLOTH = """
model: someone/qwen
data: {dataset: someone/alpaca}
training: {max_steps: 0, num_epochs: 2, packing: false, gradient_checkpointing: unsloth, save_steps: 0}
lora: {lora_r: 8, use_loftq: false, vision_all_linear: false, finetune_vision_layers: true}
logging: {enable_wandb: false, wandb_project: p}
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (TUNE, {
            "model": "models/qwen", "method": "lora", "rank": 4, "alpha": 16, "target_modules": "q_proj,o_proj,gate_proj,up_proj,down_proj",
            "data": "yahma/alpaca-cleaned?split=train[:95%],yahma/alpaca-cleaned?split=train[95%:]&as=valid", "mask_prompt": False,
            "data_format": "alpaca_prompt", "chat_template": "chatml_ended", "learning_rate": 3e-4, "lr_schedule": "cosine", "warmup": 100,
            "warmup_init": 0, "weight_decay": 0.01, "max_grad_norm": 0, "batch_size": 2, "epochs": 1, "adapter_path": "out", "valid_fraction": 0,
        }),
        (TUNE.replace("qwen2_5.lora_", "qwen2_5.").replace("lora_attn_modules: [q_proj, output_proj], apply_lora_to_mlp: true, lora_rank: 4", ""),
         {"method": "full", "target_modules": "*"}),
        (SLOTH, {
            "model": "someone/qwen", "data": "someone/alpaca", "rank": 8, "alpha": 16, "bits": 4, "epochs": 2, "iters": None, "warmup": 5,
            "lr_schedule": "linear", "learning_rate": 2e-4, "batch_size": 2, "grad_accumulation_steps": 4, "mask_prompt": False, "seed": 3407,
            "save_every": 0, "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        }),
    ],
)  # fmt: skip
def test_files_with_parts_are_read(text, wanted):
    found = flat_of(text, {})
    assert {name: found[name] for name in wanted} == wanted
    assert sum(dialect.recognizes(yaml.safe_load(text)) for dialect in DIALECTS) == 1
    if text is TUNE:
        for ours, theirs, key in (
            ("max_seq_len: null", "prompt_template: torchtune.data.AlpacaTemplate", "tokenizer.prompt_template"),
            ("lora_rank: 4", "lora_rank: 4, attn_dropout: 0.1", "model.attn_dropout"),
            ("LinearCrossEntropyLoss", "LinearCrossEntropyLoss, label_smoothing: 0.1", "loss.label_smoothing"),
        ):
            assert key in refused(text.replace(ours, theirs))
    for key, value in (
        (("kd_ratio", "0.5"), ("clever", "true"), ("max_steps_per_epoch", "10"))
        if text is not SLOTH
        else (("clever", "true"),)
    ):
        assert key in refused(f"{text}{key}: {value}\n")


def test_flags_beat_the_file_and_its_trainers_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\nlora_parameters: {rank: 4, scale: 2.0}\nfine_tune_type: dora\nbatch_size: 8\n")
    said: list[str] = []
    flags = {"epochs": 2.0, "learning_rate": 1e-3, "method": "rslora", "batch_tokens": 512, "mask_prompt": True}
    with console.log_to(said.append):
        settings = from_file(file, flags)
    assert (settings.loop.iters, settings.loop.epochs, settings.adapter.method) == (None, 2.0, "rslora")
    assert (settings.loop.batch_size, settings.loop.batch_tokens) == (None, 512)
    assert (settings.adapter.rank, settings.adapter.alpha) == (4, 8.0)
    defaults = next(line for line in said if "defaults" in line)
    for name in ("iters", "learning_rate", "mask_prompt"):
        assert name not in defaults
    assert "max_grad_norm 0" in defaults


@pytest.mark.parametrize(
    "text",
    [
        "model: m\ndata: d\niters: 5\nnum_layers: 4\nadapter_path: a\n",  # flags of both: ours
        "model: m\nmethod: lora\nfine_tune_type: null\n",  # run.yaml of an earlier version
        "model: m\ndata: d\nlr_schedule: cosine\nrank: 4\n",
        "model: m\nlora_r: 4\nsequence_len: 5\n",
        "rank: 4\nlora_r: 4\n",
        "learning_rate: 1\n",
        "model_name_or_path: m\nper_device_train_batch_size: 1\nlearning_rate: 1\nlora_r: 8\n",
    ],
)
def test_other_files_are_ours(text):
    content = yaml.safe_load(text)
    assert find_dialect(content) is None
    said: list[str] = []
    with console.log_to(said.append):
        assert migrate(content, {}, "f") == content
    assert said == []


def test_no_dialect_takes_our_own_run_yaml():
    assert find_dialect(train_settings({}).to_flat()) is None


def test_tables_name_settings_that_exist():
    tables = [name for dialect in DIALECTS for name in (*dialect.names.values(), *dialect.defaults)]
    assert len(tables) > 40
    assert not set(tables) - KNOWN
    assert {"lora_alpha"} - KNOWN  # another trainer's name is none of ours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 4\nlora_alpha: 8\n", "unknown setting 'lora_alpha'"),  # a file of ours
        ("base_model: m\ndatasets: [{path: p}]\nrl: gdpo\n", "rl gdpo: only dpo, ipo, orpo, simpo, kto, grpo"),
        ("base_model: m\nadapter: lora\nrl: grpo\nmicro_batch_size: 6\ntrl: {num_generations: 4}\n",
         "6 answers in a step cannot be divided into groups of 4"),
        ("model_name_or_path: m\ndataset_name: d\nnum_generations: 8\nloss_type: cispo\n", "loss_type cispo: only grpo, bnpo"),
        ("model_name_or_path: m\ndataset_name: d\nscale_rewards: [1]\n", "scale_rewards [1]: only group, batch"),
        ("model_name_or_path: m\ndataset_name: d\nimportance_sampling_level: word\n", "importance_sampling_level word: only"),
        ("model: m\ntrain_mode: grpo\ngrpo_loss_type: mine\n", "grpo_loss_type mine: only grpo"),
        ("base_model: m\nadapter: llama-adapter\n", "adapter llama-adapter"),
        ("base_model: m\nadapter: lora\nlora_r: many\n", "lora_r 'many': not a number"),
        ("base_model: m\nadapter: lora\npeft_use_dora: 3\n", "neither true nor false"),
        ("base_model: m\nadapter: lora\ndatasets: [3]\n", "datasets has no mappings"),
        ("model_name_or_path: m\nstage: ppo\n", "stage ppo: only sft, pt, rm, dpo, kto"),
        ("model_name_or_path: m\nstage: dpo\npref_loss: other\n", "pref_loss other: only sigmoid"),
        ("model_name_or_path: m\nfinetuning_type: oft\n", "finetuning_type oft"),
        ("model_name_or_path: m\nfinetuning_type: freeze\nfreeze_trainable_layers: -2\n", "freeze_trainable_layers -2"),
        ("model: m\nlr_schedule: {name: cosine_decay}\n", "lr_schedule has no arguments"),
        ("model: m\nlr_schedule: {name: cosine_decay, arguments: [null]}\n", "lr_schedule has no arguments"),
        ("base_model: m\nadapter: lora\nrl: [dpo]\n", "rl ['dpo']: only dpo"),
        ("model_name_or_path: m\nstage: dpo\npref_loss: [ipo]\n", "pref_loss ['ipo']: only sigmoid"),
        ("base_model: m\nadapter: lora\nprocess_reward_model: true\n", "process_reward_model True"),
        ("model_name_or_path: m\nstage: dpo\nref_model: other\n", "ref_model other: it is --model itself"),
        *((f"model: m\ntrain_mode: {mode}\n", f"train_mode {mode.replace('-', '_')}: only sft, dpo, orpo, cpo, grpo")
          for mode in ("online_dpo", "xpo", "rlhf", "rlhf-reinforce", "ppo", "ftpo")),
        ("model: m\ntrain_mode: dpo\ndpo_cpo_loss_type: dpop\n", "dpo_cpo_loss_type dpop with train_mode dpo"),
        ("model: m\ntrain_mode: cpo\ndpo_cpo_loss_type: hinge\n", "dpo_cpo_loss_type hinge with train_mode cpo"),
        ("model: m\ntrain_mode: dpo\nreference_model_path: n\n", "reference_model_path n: it is --model"),
        ("model_name_or_path: m\ndataset_name: d\nreward_model_path: r\n", "reward_model_path: only trl sft, dpo, kto"),
        ("model_name_or_path: m\ndataset_name: d\ncpo_alpha: 1\nloss_type: ipo\n", "loss_type ipo with CPO"),
        ("model_name_or_path: m\ndataset_name: d\nsimpo_gamma: 1\nloss_type: alphapo\n", "loss_type alphapo"),
        ("model_name_or_path: m\ndataset_name: d\nteacher_model_name_or_path: big\n", "lmbda 0.5: a mixture of given"),
        ("model_name_or_path: m\ndataset_name: d\nlmbda: 0\n", "no teacher_model_name_or_path"),
        ("model_name_or_path: m\ndataset_name: d\nteacher_model_name_or_path: big\nseq_kd: true\n", "seq_kd"),
        ("model: m\nlora_parameters: {rank: 8}\noptimizer_config: [1]\n", "not a mapping"),
        ("model: m\nlora_parameters: {rank: 8}\nlearning_rate: fast\n", "--learning-rate 'fast'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    refuses(re.escape(message), from_file, file)


@pytest.mark.long
def test_train_runs_an_axolotl_file(tiny_folder, chats, tmp_path):
    file = tmp_path / "axolotl.yaml"
    file.write_text(
        f"base_model: {tiny_folder}\ndatasets:\n  - path: {chats}\n    type: alpaca\nadapter: lora\nlora_r: 4\nlora_alpha: 8\n"
        f"lora_target_modules: [q_proj, v_proj]\nsequence_len: 320\nmicro_batch_size: 4\nmax_steps: 3\nlearning_rate: 1e-3\n"
        f"output_dir: {tmp_path / 'run'}\nlogging_steps: 1\nflash_attention: true\nval_set_size: 0.1\n"
    )
    ran = succeeds("train", "--config", file, "--learning-rate", "2e-3")
    assert "flash_attention" in ran.err
    assert ran.out == ""
    written = yaml.safe_load((tmp_path / "run/run.yaml").read_text())
    assert written["model"] == str(tiny_folder)
    assert (written["rank"], written["alpha"], written["iters"], written["learning_rate"]) == (4, 8.0, 3, 2e-3)
    assert written.keys() <= KNOWN
    again = succeeds("train", "--config", tmp_path / "run/run.yaml", "--adapter-path", tmp_path / "again")
    assert "counterpart" not in again.err
    one, two = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("run", "again"))
    assert one == two


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("base_model: m\nadapter: lora\nlora_r: 8\nrl: dpo\nrl_beta: 0.2\nrpo_alpha: 1\n", {"objective": "dpo", "beta": 0.2, "loss_type": "sigmoid,sft", "loss_weights": "1,1"}),
        ("base_model: m\nadapter: lora\nlora_r: 8\nrl: ipo\n", {"objective": "dpo", "loss_type": "ipo", "beta": 0.1}),
        ("base_model: m\nadapter: lora\nlora_r: 8\nrl: orpo\norpo_alpha: 0.3\n", {"objective": "orpo", "beta": 0.3}),
        ("base_model: m\nadapter: lora\nlora_r: 8\nrl: kto\nkto_undesirable_weight: 0.2\n", {"objective": "kto", "undesirable_weight": 0.2}),
        ("model_name_or_path: m\nstage: dpo\nlora_rank: 8\npref_beta: 0.3\npref_loss: hinge\n", {"objective": "dpo", "loss_type": "hinge", "beta": 0.3}),
        ("model_name_or_path: m\nstage: dpo\nlora_rank: 8\npref_loss: simpo\nsimpo_gamma: 0.7\n", {"objective": "simpo", "simpo_gamma": 0.7}),
        ("model_name_or_path: m\nstage: kto\nlora_rank: 8\npref_beta: 0.3\n", {"objective": "kto", "beta": 0.3}),
        ("model_name_or_path: m\nstage: dpo\nlora_rank: 8\npref_loss: kto_pair\n", {"objective": "kto", "loss_type": "sigmoid"}),
        ("model_name_or_path: m\nstage: dpo\nlora_rank: 8\npref_ftx: 0.5\nref_model: m\n", {"objective": "dpo", "loss_type": "sigmoid,sft", "loss_weights": "1,0.5"}),
        ("model_name_or_path: m\ndataset_name: d\nrpo_alpha: 0.3\nloss_type: [ipo, hinge]\nloss_weights: [2, 1]\n",
         {"objective": "dpo", "loss_type": "ipo,hinge,sft", "loss_weights": "2,1,0.3"}),
        ("model_name_or_path: m\ndataset_name: d\nrpo_alpha: 0\nloss_type: ipo\n", {"loss_type": "ipo", "loss_weights": None}),
        ("model: m\nfine_tune_type: dora\nlearning_rate: 1e-4\n", {"method": "dora", "alpha": 160, "learning_rate": 1e-4}),
        ("model_name_or_path: m\nstage: dpo\nlora_rank: 8\npref_loss: orpo\n", {"objective": "orpo", "loss_type": "sigmoid"}),
        ("model_name_or_path: m\nstage: kto\nkto_chosen_weight: 2\nkto_rejected_weight: 3\nref_model_adapters: a\n",
         {"objective": "kto", "desirable_weight": 2, "undesirable_weight": 3, "reference_adapter": "a"}),
        ("model_name_or_path: m\nstage: dpo\nlora_rank: 8\ndpo_label_smoothing: 0\n", {"objective": "dpo", "label_smoothing": 0}),
        ("model_name_or_path: m\nstage: dpo\nlora_rank: 8\ntrain_on_prompt: true\n", {"objective": "dpo", "mask_prompt": True}),
        ("base_model: m\nadapter: lora\nrl: simpo\ncpo_alpha: 0\nsimpo_gamma: 1.5\n", {"objective": "simpo", "simpo_gamma": 1.5, "cpo_alpha": 1}),
        ("base_model: m\nadapter: lora\nrl: dpo\ntrl: {beta: 0.4}\nrl_beta: 0.2\n", {"objective": "dpo", "beta": 0.4}),
        ("base_model: m\nadapter: lora\nrl: dpo\ndpo_label_smoothing: 0.1\ndpo_loss_type: [robust]\n",
         {"objective": "dpo", "label_smoothing": 0.1, "loss_type": "robust"}),
        ("base_model: m\nadapter: lora\nreward_model: true\n", {"objective": "reward"}),
        ("model: m\ntrain_mode: orpo\nbeta: 0.2\n", {"objective": "orpo", "beta": 0.2, "mask_prompt": True}),
        ("model: m\ntrain_mode: cpo\n", {"objective": "cpo", "cpo_alpha": 0, "alpha": 80}),
        ("model: m\ntrain_mode: sft\nbeta: 0.2\nalpha: 1e-5\n", {"objective": "sft", "beta": 0.1, "alpha": 80, "mask_prompt": False}),
        ("model: m\ntrain_type: full\niters: 8\nepochs: 3\n", {"objective": "sft", "method": "full", "iters": 8, "epochs": None}),
        ("model_name_or_path: m\ndataset_name: d\nuse_peft: true\ndesirable_weight: 2\n", {"objective": "kto", "desirable_weight": 2, "rank": 16}),
        ("model_name_or_path: m\ndataset_name: d\ncenter_rewards_coefficient: 0.01\n", {"objective": "reward", "method": "full", "learning_rate": 1e-4}),
        ("model_name_or_path: m\ndataset_name: d\ncpo_alpha: 0\nsimpo_gamma: 1\nloss_type: simpo\n", {"objective": "simpo", "simpo_gamma": 1}),
        ("model_name_or_path: m\ndataset_name: d\ncpo_alpha: 0.3\n", {"objective": "cpo", "cpo_alpha": 0.3}),
        ("model_name_or_path: m\ndataset_name: d\nloss_type: [ipo]\n", {"objective": "dpo", "loss_type": "ipo"}),
        ("model_name_or_path: m\ndataset_name: d\nteacher_model_name_or_path: big\nlmbda: 0\nuse_peft: true\nlora_dropout: 0.1\n",
         {"objective": "distill", "teacher": "big", "divergence": "jsd", "jsd_beta": 0.5, "dropout": 0, "rank": 16,
          "learning_rate": 2e-5, "on_policy": False, "mask_prompt": True, "max_new_tokens": 256}),
        ("model_name_or_path: m\ndataset_name: d\nteacher_model_name_or_path: big\nlmbda: 0.0\nbeta: 1\ntemperature: 0.7\n",
         {"objective": "distill", "divergence": "reverse_kl", "jsd_beta": 0.5, "distill_temp": 1, "temp": 1}),
        ("model_name_or_path: m\ndataset_name: d\nteacher_model_name_or_path: big\nlmbda: 1\nbeta: 1\n",
         {"objective": "distill", "on_policy": True, "temp": 0.9, "max_new_tokens": 128, "divergence": "reverse_kl"}),
        ("model_name_or_path: m\ndatasets: [{path: d}]\nloss_type: nll\n", {"objective": "sft", "data": "d", "learning_rate": 2e-5}),
        ("model_name_or_path: m\nstage: sft\nlora_rank: 8\n", {"objective": "sft", "beta": 0.1}),
        ("model: m\ntrain_mode: sft\ngroup_size: 4\nepsilon: 1e-4\ntemperature: 0.8\nreward_weights: '1'\n",
         {"objective": "sft", "group_size": None, "reward_weights": None}),
    ],
)  # fmt: skip
def test_files_of_preference_training_are_read(text, wanted):
    settings = train_settings({}, migrate(yaml.safe_load(text), {}, "f"))
    found = settings.to_flat()
    assert {name: found[name] for name in wanted} == wanted
    if settings.objective.objective in OBJECTIVES:
        assert objective_of(settings.objective).options.objective == settings.objective.objective


TRL_FILE = "model_name_or_path: m\ndataset_name: d\n"


@pytest.mark.parametrize(
    ("text", "wanted", "told"),
    [
        (TRL_FILE + "reward_funcs: my.lib.f\n", {"reward": "my/lib.py:f", "group_size": 8, "max_new_tokens": 512, "batch_size": 1, "kl_beta": 0},
         "read as a file of trl grpo"),
        (TRL_FILE + "num_generations: 4\nnormalize_advantages: false\n",
         {"objective": "rloo", "group_size": 4, "kl_beta": 0.05, "batch_size": 2}, "read as a file of trl rloo"),
        (TRL_FILE + "reward_funcs: [accuracy_reward, my.f]\nreward_weights: [1, 2]\n", {"objective": "grpo", "reward": "math-verify,my.py:f", "reward_weights": "1,2"},
         "read as a file of trl grpo"),
        (TRL_FILE + "num_generations: 8\nimportance_sampling_level: sequence\n", {"grpo_loss": "gspo"}, "which takes every answer once"),
        (TRL_FILE + "num_generations: 8\nscale_rewards: true\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 4\n",
         {"scale_rewards": "group", "batch_size": 1, "grad_accumulation_steps": 2}, "answers there, prompts here"),
        ("model: m\ntrain_mode: grpo\n", {"objective": "grpo", "group_size": 4, "epsilon": 1e-4, "kl_beta": 0.1, "grpo_loss": "grpo", "batch_size": 4},
         "reward_functions: not named"),
    ],
)  # fmt: skip
def test_files_of_training_on_rewards_are_read(text, wanted, told, logged):
    found = flat_of(text, {})
    assert {name: found[name] for name in wanted} == wanted
    assert any(told in line for line in logged), logged


def test_a_run_starts_from_trls_grpo_file(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").write_text(
        "def f(completions, **c):\n    return [float(len(x)) for x in completions]\n"
    )
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}?"}) for n in range(12)))
    (tmp_path / "c.yaml").write_text(
        f"model_name_or_path: {tiny_folder}\ndataset_name: p.jsonl\nuse_peft: true\nreward_funcs: [mine.own.f]\n"
        "num_generations: 4\nmax_completion_length: 4\nnum_iterations: 2\nmax_steps: 2\noutput_dir: out\n"
    )
    ran = succeeds("train", "--config", "c.yaml", "--sample-tokens", 0, "--allow-code")
    assert "groups of 4" in ran.err or "2 steps done" in ran.err
    written = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (written["objective"], written["reward"], written["batch_size"]) == ("grpo", "mine/own.py:f", 2)


TRL_FILE = "model_name_or_path: m\ndataset_name: d\nuse_peft: true\nlora_dropout: 0.1\n"
AXOLOTL_FILE = "base_model: m\nadapter: lora\nlora_r: 8\nlora_dropout: 0.1\n"
FACTORY_FILE = "model_name_or_path: m\nfinetuning_type: lora\nlora_rank: 8\nlora_dropout: 0.1\n"


@pytest.mark.parametrize(
    ("text", "objective", "dropout"),
    [
        *((TRL_FILE, name, 0) for name in ("dpo", "orpo", "cpo", "kto", "reward")),
        (TRL_FILE + "cpo_alpha: 0\n", "simpo", 0),
        *((TRL_FILE, name, 0.1) for name in ("sft", "grpo", "rloo")),
        (TRL_FILE + "disable_dropout: false\n", "dpo", 0.1),
        (TRL_FILE + "disable_dropout: true\nnum_generations: 8\n", "grpo", 0),
        (TRL_FILE.replace("lora_dropout: 0.1\n", ""), "kto", 0),
        (TRL_FILE.replace("lora_dropout: 0.1\n", "disable_dropout: false\n"), "kto", 0.05),
        (TRL_FILE + "teacher_model_name_or_path: big\nlmbda: 0\ndisable_dropout: false\n", None, 0.1),
        *((AXOLOTL_FILE + f"rl: {name}\n", None, 0) for name in ("dpo", "ipo", "orpo", "kto")),
        (AXOLOTL_FILE + "rl: simpo\ncpo_alpha: 0\n", None, 0),
        (AXOLOTL_FILE + "reward_model: true\n", None, 0),
        (AXOLOTL_FILE + "rl: grpo\nmicro_batch_size: 8\n", None, 0.1),
        (AXOLOTL_FILE, None, 0.1),
        *((FACTORY_FILE + f"stage: dpo\npref_loss: {name}\n", None, 0) for name in ("sigmoid", "orpo", "simpo", "kto_pair")),
        (FACTORY_FILE + "stage: kto\n", None, 0),
        (FACTORY_FILE + "stage: rm\n", None, 0.1),
        (FACTORY_FILE + "stage: sft\n", None, 0.1),
    ],
)  # fmt: skip
def test_dropout_is_off_where_the_files_trainer_turns_it_off(text, objective, dropout, logged):
    flags = {"objective": objective} if objective else {}
    assert flat_of(text, flags)["dropout"] == dropout
    assert flat_of(text, {**flags, "dropout": 0.2})["dropout"] == 0.2
    assert any("lora_dropout 0.1: not used" in line for line in logged) == (dropout == 0 and "lora_dropout" in text)


@pytest.mark.parametrize(
    ("text", "objective", "name", "value"),
    [
        *((TRL_FILE + "max_length: null\n", one, "max_seq_length", UNCUT) for one in ("sft", "dpo", "kto", "reward")),
        (TRL_FILE + "max_length: None\n", "dpo", "max_seq_length", UNCUT),
        (TRL_FILE + "max_length: null\n", "orpo", "max_seq_length", 512),  # of TRL, which then warns
        (TRL_FILE, "dpo", "max_seq_length", 1024),
        (TRL_FILE + "max_prompt_length: null\n", "dpo", "max_seq_length", 1024),
        (TRL_FILE + "max_prompt_length: null\nnum_generations: 8\n", "grpo", "max_seq_length", UNCUT),
        (TRL_FILE + "max_grad_norm: null\n", "dpo", "max_grad_norm", 0),
        (FACTORY_FILE + "max_grad_norm: null\n", None, "max_grad_norm", 0),
        (AXOLOTL_FILE + "max_grad_norm: null\n", None, "max_grad_norm", 1),  # it hands on what is not empty
    ],
)  # fmt: skip
def test_null_is_what_it_is_there(text, objective, name, value, logged):
    flags = {"objective": objective} if objective else {}
    assert flat_of(text, flags)[name] == value
    assert not any("max_prompt_length" in line for line in logged)


def test_the_flag_says_what_a_file_of_trl_is_for(tmp_path, logged):
    file = tmp_path / "trl.yaml"
    file.write_text("model_name_or_path: m\ndataset_name: d\nbeta: 0.2\n")
    found = {}
    for objective in (None, "orpo", "kto", "rloo"):
        flags = {"objective": objective} if objective else {}
        logged.clear()
        found[objective] = train_settings(flags, read_settings(str(file), flags)).objective
        assert any("read as a file of trl dpo" in line for line in logged) == (objective is None)
    assert [(one.objective, one.beta, one.kl_beta) for one in found.values()] == [
        ("dpo", 0.2, 0),
        ("orpo", 0.2, 0),
        ("kto", 0.2, 0),
        ("rloo", 0.1, 0.2),
    ]


def test_the_losses_with_label_smoothing_are_those_of_the_objective():
    assert common.SMOOTHED == SMOOTHED


@pytest.mark.parametrize(
    ("kind", "template", "told"),
    [
        ("chatml.intel", "chatml", None),
        ("llama3.ultra", "llama3", None),
        ("zephyr.nectar", None, "model's own template"),
        ("bradley_terry.chat_template", None, None),
        ("{field_prompt: question, field_chosen: chosen, field_rejected: rejected}", None, None),
    ],
)  # fmt: skip
def test_types_of_axolotls_preference_data(kind, template, told, logged):
    content = yaml.safe_load(
        f"base_model: m\nadapter: lora\nrl: orpo\nval_set_size: 0\ndatasets: [{{path: d, type: {kind}}}]\n"
    )
    found = migrate(content, {}, "f")
    assert (found.get("chat_template"), found.get("data_format")) == (template, None)
    assert any((told or "datasets.type") in line for line in logged) == bool(told)


AXOLOTL_SET = "base_model: m\nadapter: lora\ndatasets: [{{path: d, {}}}]\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (AXOLOTL_SET.format("type: chat_template, field_messages: dialog, message_property_mappings: {role: speaker, content: text}, roles: {user: [customer], assistant: [agent, gpt]}"),
         {"chat_column": "dialog", "turn_names": "role=speaker,content=text,user=customer,assistant=agent"}),
        (AXOLOTL_SET.format("type: sharegpt, field_human: Kunde, field_model: Berater, message_field_role: wer"),
         {"turn_names": "role=wer,user=Kunde,assistant=Berater"}),
        (AXOLOTL_SET.format("type: completion, field: body"), {"text_column": "body"}),
        (AXOLOTL_SET.format("type: {field_instruction: frage, field_input: dazu, field_output: antwort, field_system: rolle}"),
         {"prompt_column": "frage,dazu", "completion_column": "antwort", "system_column": "rolle"}),
        (AXOLOTL_SET.format("type: {field_instruction: frage}"), {"prompt_column": "frage", "completion_column": "output"}),
        (AXOLOTL_SET.format("type: {field_instruction: instruction, field_output: output}"), {}),
        (AXOLOTL_SET.format("type: {field_prompt: frage}") + "rl: orpo\n", {"prompt_column": "frage"}),
        ("model: m\nprompt_feature: q\nhf_dataset: {path: d, completion_feature: a}\n", {"prompt_column": "q", "completion_column": "a"}),
        ("model: m\nprompt_feature: q\n", {"prompt_column": "q", "completion_column": "completion"}),
        ("model: m\nhf_dataset: {path: d, chat_feature: dialog}\n", {"chat_column": "dialog"}),
        ("model: m\nhf_dataset: {path: d, text_feature: text, prompt_feature: prompt}\n", {}),
        ("model_name_or_path: m\ndataset_name: d\ndataset_text_field: body\n", {"text_column": "body"}),
        ("model_name_or_path: m\ndataset_name: d\ndataset_text_field: text\n", {}),
    ],
)  # fmt: skip
def test_names_of_columns_and_turns_are_read(text, wanted):
    said: list[str] = []
    with console.log_to(said.append):
        found = migrate(yaml.safe_load(text), {}, "f")
    names = ("prompt_column", "completion_column", "system_column", "chat_column", "text_column", "turn_names")
    assert {name: found[name] for name in names if name in found} == wanted
    train_settings(found)  # nothing excludes another thing


def test_sets_that_are_read_alike_are_joined():
    two = "base_model: m\nadapter: lora\ndatasets: [{path: a, type: alpaca}, {path: b, type: %s}]\n"
    assert migrate(yaml.safe_load(two % "alpaca"), {}, "f")["data"] == "a,b"
    assert "unlike chat templates" in refused(two % "sharegpt")
    one = "{path: a, type: completion}, {path: b, type: sharegpt, split: 'train[:5%]'}, {path: b, name: en, type: completion, field: body}"
    unlike = f"base_model: m\nadapter: lora\ndatasets: [{one}]\ntest_datasets: [{{path: c, split: test, type: completion}}]\n"
    assert migrate(yaml.safe_load(unlike), {}, "f")["data"] == (
        "a?data_format=text,b?split=train[:5%]&data_format=sharegpt,b?subset=en&text_column=body,c?split=test&as=valid&data_format=text"
    )


GRPO = TRL + "reward_funcs: [a.f]\nper_device_train_batch_size: 8\n"


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (AXOLOTL, {"epochs": 1}),
        (AXOLOTL + "num_epochs: 4\n", {"epochs": 4}),
        (AXOLOTL + "max_steps: 30\n", {"iters": 30}),
        (FACTORY, {"epochs": 3}),
        (TRL, {"epochs": 3}),
        (TRL + "max_steps: 30\n", {"iters": 30}),
        (MLX_LM, {"iters": 1000}),
        (MLX_LM + "epochs: 2\n", {"epochs": 2}),  # a setting of ours, which excludes the default
    ],
)
def test_a_file_without_a_length_has_that_of_its_trainer(text, length):
    found = flat_of(text, {})
    assert {name: found[name] for name in ("epochs", "iters")} == {"epochs": None, "iters": None, **length}


@pytest.mark.parametrize(
    ("text", "flags", "without", "with_flag"),
    [
        (FACTORY, {"rank": 32}, {"alpha": 16}, {"alpha": 64}),
        (FACTORY + "lora_alpha: 8\n", {"rank": 32}, {"alpha": 8}, {"alpha": 8}),
        (FACTORY, {"rank": 32, "alpha": 5.0}, {"alpha": 16}, {"alpha": 5}),
        (TRL + "lora_r: 8\n", {"rank": 32}, {"alpha": 32}, {"alpha": 32}),
        (MLX_LM, {"rank": 32}, {"alpha": 16}, {"alpha": 64}),
        (MLX_LM + "rank: 4\n", {}, {"rank": 4, "alpha": 8}, {"rank": 4, "alpha": 8}),
        (LORA, {"rank": 32}, {"alpha": 80}, {"alpha": 320}),
        (AXOLOTL + "peft_use_rslora: true\npeft_use_dora: true\n", {"rank": 16}, {"alpha": 16 * 8**0.5}, {"alpha": 64}),
        (AXOLOTL + "peft_use_rslora: true\npeft_use_dora: true\n", {"method": "rslora"}, {}, {"alpha": 16}),
        (AXOLOTL + "sample_packing: true\nmicro_batch_size: 2\n", {"max_seq_length": 64}, {"batch_tokens": 1024}, {"batch_tokens": 128}),
        (AXOLOTL + "micro_batch_size: 2\nbatch_size: 64\n", {"batch_size": 8}, {"grad_accumulation_steps": 32}, {"grad_accumulation_steps": 8}),
        (TRL + "lr_scheduler_type: constant\nwarmup_steps: 7\n", {"lr_schedule": "cosine"}, {"warmup": 0}, {"warmup": 7}),
        (MLX_LM + "iters: 80\n", {"grad_accumulation_steps": 4}, {"iters": 80}, {"iters": 20}),
        (MLX_LM + "grad_accumulation_steps: 2\n", {"grad_accumulation_steps": 4}, {"iters": 500}, {"iters": 250}),
        (
            MLX_LM + "optimizer: adam\noptimizer_config: {adamw: {weight_decay: 0.3}}\n", {"optimizer": "adamw"},
            {"optimizer": "adam"}, {"weight_decay": 0.3},
        ),
        (GRPO + "num_generations: 8\n", {"group_size": 4}, {"batch_size": 1}, {"batch_size": 2}),
        (GRPO + "num_iterations: 4\n", {"updates_per_rollout": 3}, {"save_every": 100}, {"save_every": 102}),
    ],
)  # fmt: skip
def test_what_is_computed_from_a_setting_follows_its_flag(text, flags, without, with_flag):
    for given, wanted in (({}, without), (flags, with_flag)):
        found = flat_of(text, given)
        assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_prompts_of_a_batch_need_not_be_in_the_file():
    text = GRPO + "num_generations: 3\n"
    refuses("--batch-size", flat_of, text, {})
    assert flat_of(text, {"batch_size": 2})["batch_size"] == 2
