"""Flags over another trainer's settings file: what is computed from a setting follows the flag, and its own defaults the file."""

from __future__ import annotations

import pytest
import yaml
from refusing import refuses

from mlx_lora.config.load import train_settings
from mlx_lora.config.migrate import migrate

AXOLOTL = "base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"
FACTORY = "model_name_or_path: m\nfinetuning_type: lora\nlora_rank: 8\n"
TRL = "model_name_or_path: m\ndataset_name: d\nuse_peft: true\n"
MLX_LM = "model: m\ndata: d\nlora_parameters: {rank: 8, scale: 2.0}\n"
LORA = "model: m\ndata: d\ntrain_type: lora\n"
GRPO = TRL + "reward_funcs: [a.f]\nper_device_train_batch_size: 8\n"


def flat_of(text: str, flags: dict) -> dict:
    return train_settings(flags, migrate(yaml.safe_load(text), flags, "f")).to_flat()


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
