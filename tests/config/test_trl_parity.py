"""A settings file of TRL here, and in TRL's own trainer: the same rows and initial factors give the same factors at the end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from run_cli import succeeds
from safetensors.numpy import load_file

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.adapter import adapt

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS, EXAMPLES = 40, 4
# Nothing follows the token that ends an answer; TRL would train it, too.
TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As a user has it, and what a CPU needs. All rows are one batch, so that both sides see the same batches.
FILE = {
    "use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "learning_rate": 1e-3, "max_steps": STEPS,
    "per_device_train_batch_size": EXAMPLES, "save_strategy": "no", "report_to": "none",
    "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model that TRL's command can load, whose tokenizer has a token of its own for padding."""
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.pad_token = "<|endoftext|>"
    config = {"architectures": ["LlamaForCausalLM"], "pad_token_id": tokenizer.pad_token_id}
    made = write_folder(tmp_path_factory.mktemp("trl") / "tiny", tiny_model(), config)
    tokenizer.save_pretrained(made)
    return made


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows_of(objective: str, longest: int) -> list[dict]:
    """Return pairs, or for KTO rated answers; the first answer has more bytes than `longest`."""
    rows = []
    for number in range(EXAMPLES):
        good, bad = "xyz" * (number + 2) + "!" * (longest if number == 0 else 0), "abc" * (9 - number)
        row = {"prompt": said("user", f"Say {number}.")}
        if objective == "kto":
            rows.append({**row, "completion": said("assistant", bad if number % 2 else good), "label": number % 2 == 0})
        else:
            rows.append({**row, "chosen": said("assistant", good), "rejected": said("assistant", bad)})
    return rows


def ours(file: Path, objective: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run `train --config`; return the initial and the final parameters."""
    out = file.with_name("ours")
    succeeds("train", "--config", file, "--objective", objective, "--adapter-path", out)
    settings = train_settings({}, read_settings(str(out / "run.yaml"), {}))
    base = load_base(settings.model)
    adapt(settings, base, objective_of(settings.objective), base.hf_tokenizer.chat_template)
    return {name: np.array(value) for name, value in adapter_parameters(base.model).items()}, load_file(
        out / WEIGHTS_FILE
    )


def in_trl(file: Path, objective: str, rows: list[dict], initial: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Train as `trl dpo --config` does, from our initial parameters; return the final ones."""
    trl, torch, datasets = (pytest.importorskip(name) for name in ("trl", "torch", "datasets"))
    classes = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "kto": (trl.KTOConfig, trl.KTOTrainer),
        "reward": (trl.RewardConfig, trl.RewardTrainer),
    }
    config, trainer_class = classes[objective]
    parser = trl.TrlParser((trl.ScriptArguments, config, trl.ModelConfig))
    _, arguments, model = parser.parse_args_and_config(["--config", str(file)])
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=trl.get_peft_config(model),
    )
    trained = {name_here(name): value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained.keys() == initial.keys()
    for name, value in trained.items():
        value.data = torch.tensor(turned(name, initial[name]).copy())
    torch.set_num_threads(1)
    trainer.train()
    return {name: turned(name, value.detach().numpy()) for name, value in trained.items()}


def name_here(name: str) -> str:
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    return plain.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")


def turned(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter in the other's orientation: factors are transposed, a head is not."""
    return value.T if name.endswith((".lora_a", ".lora_b")) else value


def apart(folder: Path, objective: str, here: Path, longest: int = 0, both: dict | None = None, **there) -> float:
    """Return the largest relative difference of a parameter; `there`: what only TRL's file says."""
    here.mkdir(exist_ok=True)
    rows, data, file = rows_of(objective, longest), here / "rows.jsonl", here / "trl.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model_name_or_path": str(folder),
        "dataset_name": str(data),
        "output_dir": str(here / "trl"),
        **FILE,
        **(both or {}),
    }
    file.write_text(yaml.safe_dump(content))
    initial, final = ours(file, objective)
    file.write_text(yaml.safe_dump({**content, **there}))
    # TRL compares KTO's answers with those of the row before, we with those of the row after.
    wanted = in_trl(file, objective, rows[::-1] if objective == "kto" else rows, initial)
    assert final.keys() == wanted.keys()
    assert all(np.abs(wanted[name] - value).max() > 5e-4 for name, value in initial.items())
    return max(np.linalg.norm(value - wanted[name]) / np.linalg.norm(wanted[name]) for name, value in final.items())


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_a_file_of_trl_trains_the_same_factors_as_trl(objective, folder, tmp_path):
    there = {"lora_task_type": "SEQ_CLS"} if objective == "reward" else {}  # the classifier that PEFT has to know of
    assert apart(folder, objective, tmp_path, **there) < 1e-4


def test_dropout_that_trl_keeps_gives_other_factors(folder, tmp_path):
    assert apart(folder, "dpo", tmp_path, disable_dropout=False) > 1e-2


def test_without_a_length_no_row_is_cut_on_either_side(folder, tmp_path):
    few = {"max_steps": 3, "max_length": None}  # TRL's default is 1,024
    assert apart(folder, "dpo", tmp_path / "uncut", longest=1100, both=few) < 1e-3
    assert apart(folder, "dpo", tmp_path / "cut", longest=1100, both=few, max_length=1024) > 1e-2
