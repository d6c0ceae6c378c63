"""Read the file of Unsloth's command, with its parts `data:`, `training:`, `lora:` and `logging:`.

For what the file leaves out, its defaults are used: 4 bits, rank 64, alpha 16, 2 rows, 4 micro-batches a step, 2e-4 with linear decay.
"""

from __future__ import annotations

from mlx_lora.config.fields import source_text
from mlx_lora.config.migrate.common import SHARED, TRANSFORMERS, VALUES, Dialect, Sheet, choose_method, read_loop, texts

ALL_LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
FORMATS = {"auto": None, "alpaca": "alpaca", "sharegpt": "sharegpt", "chatml": "messages"}
# What is trained unless the file has another value.
TRAINED = {
    "finetune_language_layers": True, "finetune_attention_modules": True, "finetune_mlp_modules": True, "vision_all_linear": False,
}  # fmt: skip


def read(sheet: Sheet) -> None:
    """Read all parts."""
    training, lora, data, logs = (sheet.part(key) for key in ("training", "lora", "data", "logging"))
    if not sheet.found.get("epochs"):
        sheet.found.pop("epochs", None)
    kind = training.take("training_type") or "lora"
    if kind == "lora":
        sheet.put(bits=4 if training.rest.pop("load_in_4bit", True) else None)
        sheet.assume(rank=64, alpha=16, target_modules=ALL_LAYERS)
    choose_method(lora, {"full": None if kind == "lora" else "training_type"})
    lora.leave(*(key for key, usual in TRAINED.items() if lora.rest.get(key) is usual))
    sets = data.take("local_dataset") or texts(data.take("dataset"))
    sheet.put(
        data=",".join(source_text({"path": one}) for one in sets) or None,
        data_format=data.one_of("format_type", FORMATS),
        mask_prompt=training.switch("train_on_completions"),
    )
    training.rest.setdefault("warmup_steps", 5)
    if training.rest.get("warmup_ratio"):
        training.take("warmup_steps")
    read_loop(training)
    if logs.rest.get("enable_wandb"):
        sheet.put(report_to="wandb", project_name=logs.take("wandb_project"))
    logs.leave(*list(logs.rest))
    sheet.take("inference")  # how the studio writes answers


UNSLOTH = Dialect(
    name="Unsloth",
    recognizes=lambda content: isinstance(content.get("training"), dict) and isinstance(content.get("lora"), dict),
    names={
        "model": "model",
        **{f"training.{key}": name for key, name in {**SHARED, **TRANSFORMERS}.items()},
        "training.max_seq_length": "max_seq_length",
        "training.eval_size": "valid_fraction",
        "training.num_epochs": "epochs",
        "training.batch_size": "batch_size",
        "training.random_seed": "seed",
        "lora.lora_r": "rank",
        "lora.lora_alpha": "alpha",
        "lora.lora_dropout": "dropout",
        "lora.target_modules": "target_modules",
        "lora.modules_to_save": "modules_to_save",
    },
    values={f"training.{key}": known for key, known in VALUES.items()},
    rules=(read,),
    defaults={
        **{
            "grad_accumulation_steps": 4,
            "learning_rate": 2e-4,
            "weight_decay": 0.01,
            "seed": 3407,
            "lr_schedule": "linear",
        },
        **{"epochs": 3.0, "batch_size": 2, "max_seq_length": 2048, "valid_fraction": 0.0},
    },
    harmless=("lora.finetune_vision_layers",),  # of models with pictures, whose tower stays as it is
    changes={"lora.use_loftq": "other first factors; pissa is here"},
)
