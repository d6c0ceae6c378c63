"""Read LLaMA-Factory's settings file.

For what the file leaves out, LLaMA-Factory's defaults are used if they change the result: rank 8, alpha twice the rank,
8 rows per micro-batch, three epochs at 5e-5 with linear decay and no warm-up, no weight decay, nothing held out.

LLaMA-Factory refers to datasets by name; dataset_info.json in dataset_dir (`data`) lists the file or hub id of each. That
table is read if it exists, relative to the working folder as in LLaMA-Factory; without it, give the data with --data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lora.config.migration import hf
from mlx_lora.config.migration.dataset_info import find_dataset
from mlx_lora.config.migration.preference_keys import put_objective, read_prompts_trained, read_reference
from mlx_lora.config.migration.sheet import Dialect, Sheet
from mlx_lora.utils.parsing import hashable

# Keys of its own; those of transformers' trainer (per_device_train_batch_size) are used by other tools too.
MARKS = (
    "model_name_or_path",
    "stage",
    "finetuning_type",
    "template",
    "cutoff_len",
    "lora_rank",
    "lora_target",
    "dataset",
    "dataset_dir",
    "quantization_bit",
)


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has two of LLaMA-Factory's own keys, and not our key for the model."""
    return "model" not in content and sum(key in content for key in MARKS) >= 2


# LLaMA-Factory's `pref_loss` -> our objective and its loss type.
PREFERENCE_LOSSES = {
    "sigmoid": ("dpo", None),
    "hinge": ("dpo", "hinge"),
    "ipo": ("dpo", "ipo"),
    "orpo": ("orpo", None),
    "simpo": ("simpo", None),
    "kto_pair": ("kto", None),
}
PREFERENCE_OPTIONS = {
    "pref_loss": "loss_type",
    "pref_beta": "beta",
    "simpo_gamma": "simpo_gamma",
    "dpo_label_smoothing": "label_smoothing",
    "pref_ftx": "rpo_alpha",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "ref_model_adapters": "reference_adapter",
}
STAGES = ("sft", "pt", "rm", "dpo", "kto")


def read_kind(sheet: Sheet) -> None:
    """Set the objective; refuse training that is not supervised, on plain text or on preferences."""
    stage = sheet.take("stage")
    if stage not in (None, *STAGES):
        raise sheet.refusal(f"stage {stage}: only {', '.join(STAGES)} are supported; use LLaMA-Factory for it")
    if stage == "rm":
        put_objective(sheet, "reward", "stage", {})
    elif stage in ("dpo", "kto"):
        read_preference(sheet, stage)
    if stage == "pt":
        sheet.put("data_format", "text", "stage")
        sheet.rest.setdefault("packing", True)  # the default in this stage
    if "do_train" in sheet.rest:
        sheet.put("train", sheet.switch("do_train"), "do_train")


def read_preference(sheet: Sheet, stage: str) -> None:
    """Set the objective of stage dpo or kto, its loss and its options."""
    loss = hashable(sheet.take("pref_loss")) or "sigmoid"
    if loss not in PREFERENCE_LOSSES:
        known = ", ".join(PREFERENCE_LOSSES)
        raise sheet.refusal(f"pref_loss {loss}: only {known} are supported; use LLaMA-Factory for it")
    objective, loss_type = PREFERENCE_LOSSES[loss] if stage == "dpo" else ("kto", None)
    if loss_type:
        sheet.rest["pref_loss"] = loss_type
    put_objective(sheet, objective, "stage", PREFERENCE_OPTIONS)
    read_reference(sheet, "model_name_or_path", "ref_model")
    if stage == "dpo" and objective == "kto":
        sheet.note("pref_loss kto_pair: each pair becomes a good and a bad answer for kto")


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha (twice the rank unless given) and method."""
    kind = sheet.take("finetuning_type") or "lora"
    if kind not in ("lora", "full", "freeze"):
        raise sheet.refusal(f"finetuning_type {kind}: not supported; use lora, freeze or full")
    ratio = sheet.number("loraplus_lr_ratio")
    if kind == "lora":
        for key, name in (("lora_rank", "rank"), ("lora_alpha", "alpha")):
            if key in sheet.rest:
                sheet.put(name, sheet.number(key), key)
        sheet.assume("rank", 8)
        sheet.assume("alpha", 2 * sheet.found["rank"])
    on = {
        "dora": "use_dora" if sheet.switch("use_dora") else None,
        "rslora": "use_rslora" if sheet.switch("use_rslora") else None,
        "pissa": "pissa_init" if sheet.switch("pissa_init") else None,
        "lora-plus": "loraplus_lr_ratio" if ratio is not None else None,
        "full": None if kind == "lora" else "finetuning_type",
    }
    hf.choose_method(sheet, {method: key for method, key in on.items() if key})
    if sheet.found.get("method") == "lora-plus":
        sheet.put("loraplus_lr_ratio", ratio, "loraplus_lr_ratio")
    if kind == "freeze":
        read_freeze(sheet)
    bits = sheet.take("quantization_bit")
    if bits:
        hf.put_bits(sheet, "quantization_bit", bits)
    if sheet.switch("use_muon"):
        sheet.put("optimizer", "muon", "use_muon")


def read_freeze(sheet: Sheet) -> None:
    """Set the number of last blocks that freeze-tuning trains in full."""
    blocks = sheet.number("freeze_trainable_layers")
    blocks = 2 if blocks is None else blocks
    if blocks < 1:
        raise sheet.refusal(f"freeze_trainable_layers {blocks}: training only the first blocks is not supported")
    sheet.put("num_layers", blocks, "freeze_trainable_layers")
    hf.read_targets(sheet, "freeze_trainable_modules", ("all",))


def read_targets(sheet: Sheet) -> None:
    """Set the target layers, and further modules that are trained in full."""
    hf.read_targets(sheet, "lora_target", ("all",))
    if sheet.rest.get("additional_target"):
        names = sheet.take("additional_target")
        sheet.put("modules_to_save", names, "additional_target")


def read_data(sheet: Sheet) -> None:
    """Set data from the first dataset's name."""
    asked, folder = sheet.take("dataset"), Path(str(sheet.take("dataset_dir") or "data"))
    names = asked if isinstance(asked, list) else [name.strip() for name in str(asked or "").split(",") if name.strip()]
    if not names:
        return
    if len(names) > 1:
        sheet.note(
            f"dataset: {len(names)} sets, only the first ({names[0]}) is used; join them in one file to use all of them"
        )
    path = find_dataset(sheet, str(names[0]), folder)
    if path:
        sheet.put("data", path, "dataset")
    else:
        sheet.left_out.append("dataset")
        sheet.note(f"dataset {names[0]}: not in {folder / 'dataset_info.json'}; give the file itself as --data")


def read_prompts(sheet: Sheet) -> None:
    """Set mask_prompt, the opposite of train_on_prompt, and the chat template."""
    read_prompts_trained(sheet, "train_on_prompt")
    hf.read_template(sheet, "template", ("empty",) if sheet.found.get("data_format") == "text" else ())


def read_loop(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    hf.read_length(sheet, "num_train_epochs")
    if "iters" not in sheet.found:
        sheet.assume("epochs", 3.0)
    if sheet.switch("neat_packing"):
        sheet.rest["packing"] = True
    hf.read_batch(sheet, "per_device_train_batch_size", "cutoff_len", "packing", defaults=(8, 2048))
    hf.read_warmup(sheet, "lr_scheduler_type")
    hf.read_optimizer(sheet, "optim")
    hf.read_held_out(sheet, "val_size")
    hf.read_intervals(sheet)
    hf.read_precision(sheet)
    if "gradient_checkpointing" in sheet.rest:
        sheet.put("grad_checkpoint", sheet.switch("gradient_checkpointing"), "gradient_checkpointing")
    if sheet.switch("disable_gradient_checkpointing"):
        sheet.put("grad_checkpoint", False, "disable_gradient_checkpointing")


LLAMA_FACTORY = Dialect(
    name="LLaMA-Factory",
    recognizes=recognizes,
    rules=(read_kind, read_method, read_targets, read_data, read_prompts, read_loop, hf.read_loggers),
    names=(
        "model_name_or_path",
        "model_revision",
        "trust_remote_code",
        "lora_dropout",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "gradient_accumulation_steps",
        "output_dir",
        "overwrite_output_dir",
        "swanlab_project",
        "seed",
    ),
    defaults={"learning_rate": 5e-5, "lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0},
)
