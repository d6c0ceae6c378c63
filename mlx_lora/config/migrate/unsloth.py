"""Read the file of Unsloth's command, with its parts `data:`, `training:`, `lora:` and `logging:`.

For what the file leaves out, its defaults are used: 4 bits, rank 64, alpha 16, 2 rows, 4 micro-batches a step, 2e-4 with linear decay.
"""

from __future__ import annotations

from mlx_lora.config.fields import source_text
from mlx_lora.config.migrate import common
from mlx_lora.config.migrate.common import Dialect, Names, Sheet

NAMES = Names(
    length="max_seq_length", held_out="eval_size", targets="target_modules", all_layers="all-linear", modules_to_save="modules_to_save",
    default_length=2048, epochs="num_epochs", rows="batch_size", default_rows=2,
)  # fmt: skip
ALL_LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chatml": "messages"}


def read(sheet: Sheet) -> None:
    """Read all parts."""
    training, lora, data, logs = (sheet.part(key) for key in ("training", "lora", "data", "logging"))
    kind = training.take("training_type") or "lora"
    lora.copy({"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}, Sheet.number)
    common.choose_method(
        lora, {"dora": "use_dora", "rslora": "use_rslora"}, {"full": None if kind == "lora" else "training_type"}
    )
    if kind == "lora":
        common.read_layers(lora, NAMES)
        sheet.assume(rank=64, alpha=16, target_modules=ALL_LAYERS)
        if training.rest.pop("load_in_4bit", True):
            common.put_bits(training, "load_in_4bit", 4)
    if lora.rest.get("use_loftq"):
        lora.refuse("use_loftq", "other first factors; pissa is here")
    for key in (
        "vision_all_linear",
        *(f"finetune_{part}" for part in ("language_layers", "attention_modules", "mlp_modules")),
    ):
        if lora.rest.get(key) is (key != "vision_all_linear"):
            lora.leave(key)
    lora.leave("finetune_vision_layers")  # of models with pictures, whose tower stays as it is
    sets = data.take("local_dataset") or common.texts(data.take("dataset"))
    if sets:
        sheet.found["data"] = ",".join(source_text({"path": one}) for one in sets)
    data.drop({"format_type": ("auto",)})
    if data.rest.get("format_type") in FORMATS:
        sheet.found["data_format"] = FORMATS[data.take("format_type")]
    sheet.found["mask_prompt"] = training.switch("train_on_completions")
    if not training.rest.get("max_steps"):
        training.take("max_steps")
    if not training.rest.get("num_epochs"):
        training.take("num_epochs")
    training.rest = {"warmup_steps": 5, "lr_scheduler_type": "linear", **training.rest}
    if training.rest.get("warmup_ratio"):
        training.take("warmup_steps")
    common.read_loop(training, NAMES)
    training.copy({
        "learning_rate": "learning_rate", "weight_decay": "weight_decay", "random_seed": "seed", "output_dir": "adapter_path",
        "gradient_accumulation_steps": "grad_accumulation_steps",
    })  # fmt: skip
    sheet.assume(grad_accumulation_steps=4, learning_rate=2e-4, weight_decay=0.01, seed=3407)
    if logs.rest.get("enable_wandb"):
        sheet.found |= {"report_to": "wandb", "project_name": logs.take("wandb_project")}
    logs.leave(*list(logs.rest))
    sheet.part("inference").rest.clear()  # how the studio writes answers
    for one in (training, lora, data):
        one.sort_rest()


UNSLOTH = Dialect(
    name="Unsloth",
    recognizes=lambda content: isinstance(content.get("training"), dict) and isinstance(content.get("lora"), dict),
    rules=(read,),
    names={"model": "model"},
    defaults={},
)
