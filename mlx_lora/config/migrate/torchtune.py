"""Read a recipe's file of torchtune, whose parts are classes and functions with their arguments.

For what the file leaves out, torchtune's defaults are used if they change the result: a constant rate, no clip, nothing held out,
rows that are not cut. Its Alpaca data sets train prompts too, with Stanford's text as the question.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_lora.config.migrate.common import (
    LOSSES_OF_TORCHTUNE,
    UNCUT,
    Dialect,
    Sheet,
    put_objective,
    read_sets,
    take_source,
    texts,
)

PART = "_component_"
# Parts that change no result.
PARTS = ("metric_logger", "profiler", "collate_fn", "tensor_parallel_plan")
LOSSES = ("", "LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss")
# The tokenizer's first word -> the chat template with its text. Others write chats without one, or as their model does.
TEMPLATES = {"llama3": "llama3", "qwen2": "chatml_ended", "qwen3": "chatml_ended", "phi3": "own", "phi4": "own"}
# Its data sets -> where they are, and what else they say.
DATA_SETS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "alpaca": ("tatsu-lab/alpaca", {"data_format": "alpaca_prompt", "mask_prompt": False}),
    "alpaca_cleaned": ("yahma/alpaca-cleaned", {"data_format": "alpaca_prompt", "mask_prompt": False}),
    "chat": (None, {}),
    "text_completion": (None, {"data_format": "text"}),
    "preference": (None, {}),
}
MODULES = {"output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
SETS = {"dataset": {}, "dataset_val": {"as": "valid"}}
# Keys of a data set -> our setting, or what their values mean.
OF_SETS = {"column": "text_column", "conversation_column": "chat_column"}
VALUES_OF_SETS = {
    "train_on_input": {True: {"mask_prompt": False}, False: {"mask_prompt": True}},
    "conversation_style": {"openai": {}, "sharegpt": {}},
    "add_eos": {True: {}},
}
PACKED = "rows are joined; rows of similar length share a batch here (--batch-tokens)"
# Of the machine, of how the model is computed, and of files that come with the model.
NO_RESULT = {
    "shuffle", "dtype", "device", "compile", "optimizer_in_bwd", "custom_sharded_layers", "batch_size_val", "tensor_parallel_dim",
    "low_cpu_ram", "data_parallel_shard_dim", "data_parallel_replicate_dim", "ac_mode", "ac_option", "memory_efficient_fsdp_wrap",
    "enable_activation_offloading", "resume_from_checkpoint", "use_distributed_state_dict", "ref_checkpointer",
    "teacher_checkpointer", "save_adapter_weights_only", "loss.num_output_chunks", "loss.ignore_index", "tokenizer.path",
    "tokenizer.merges_file", "tokenizer.merges_path", "tokenizer.vocab_path", "tokenizer.image_size", "tokenizer.max_num_tiles",
}  # fmt: skip
TWO_MODELS = "a loss of two models, or rounded weights; see distill and --qat"
CHANGES = {
    **dict.fromkeys(("kd_ratio", "teacher_model", "kd_loss", "quantizer", "policy_model"), TWO_MODELS),
    "checkpointer.adapter_checkpoint": "an adapter to begin with; give it as --resume-adapter-file",
    **{f"{part}.packed": PACKED for part in SETS},
    "max_steps_per_epoch": "an epoch ends early; give --iters, or a split such as train[:1000]",
}


def part(sheet: Sheet, key: str) -> tuple[str, Sheet]:
    """Take a part: the last word of its class, and its arguments."""
    own = sheet.part(key)
    return str(own.take(PART) or "").rpartition(".")[2], own


def read_kind(sheet: Sheet) -> None:
    """Set the objective from the loss."""
    sheet.rest = {key: value for key, value in sheet.rest.items() if key not in PARTS}
    name, loss = part(sheet, "loss")
    if name in LOSSES_OF_TORCHTUNE:
        put_objective(loss, LOSSES_OF_TORCHTUNE[name], {"beta": "beta", "label_smoothing": "label_smoothing"})
    elif name not in LOSSES:
        sheet.refuse("loss", "another loss", name)


def read_model(sheet: Sheet) -> None:
    """Set model, method and layers."""
    files = sheet.part("checkpointer")
    files.rest = {key: value for key, value in files.rest.items() if key == "adapter_checkpoint"}
    name, model = part(sheet, "model")
    attention, mlp, head = (model.take(f) for f in ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"))
    adapts = name.startswith(("lora_", "qlora_"))
    sheet.found.setdefault("method", "lora" if adapts else "full")
    if adapts:
        sheet.assume(rank=8, alpha=16)
    names = [MODULES.get(one, one) for one in texts(attention)] + MLP * bool(mlp) + ["lm_head"] * bool(head)
    sheet.found["target_modules"] = ",".join(names) if adapts else "*"
    sheet.put(bits=4 if name.startswith("qlora_") else None)
    for key, value in model.rest.items():
        if key not in ("max_seq_len", "image_size") and value:
            model.refuse(key, "an argument of the model", value)
    model.rest.clear()


def read_data(sheet: Sheet) -> None:
    """Set data, template and length."""

    def read_set(own: Sheet, key: str) -> list[dict[str, Any]]:
        name = str(own.take(PART) or "").rpartition(".")[2]
        path, settings = DATA_SETS.get(name.removesuffix("_dataset"), (None, None))
        source = take_source(own, "source", "subset")
        source["path"] = source["path"] or path
        if settings is None or source["path"] is None:
            sheet.refuse(key, "a form of rows that is not here", name)
            return []
        own.found = {**settings, **own.found}
        return [source]

    name, tokenizer = part(sheet, "tokenizer")
    word = re.split("[_.]", name)[0]
    sheet.found["max_seq_length"] = tokenizer.number("max_seq_len") or UNCUT
    sheet.put(chat_template=TEMPLATES.get(word))
    if word not in TEMPLATES:
        sheet.refuse("tokenizer", "chats are written without the model's template there", name)
    read_sets(sheet, SETS, read_set)


def read_optimizer(sheet: Sheet) -> None:
    """Set optimizer and schedule."""
    name, optimizer = part(sheet, "optimizer")
    adam = "AdamW" in name
    sheet.put(optimizer="adamw" if adam else "sgd" if name == "SGD" else None)
    if "optimizer" not in sheet.found:
        sheet.refuse("optimizer", "another optimizer", name or None)
    sheet.assume(weight_decay=0.01 if adam else 0.0)
    sheet.found |= dict(zip(("adam_beta1", "adam_beta2"), optimizer.take("betas") or (), strict=False))
    name, _ = part(sheet, "lr_scheduler")
    if name == "get_cosine_schedule_with_warmup":
        sheet.found |= {"lr_schedule": "cosine", "warmup_init": 0}
    elif name:
        sheet.refuse("lr_scheduler", "another schedule", name)
    if sheet.rest.get("shuffle") is False:
        sheet.refuse("shuffle", "rows keep their order")


TORCHTUNE = Dialect(
    name="torchtune",
    recognizes=lambda content: any(isinstance(value, dict) and PART in value for value in content.values()),
    names={
        "epochs": "epochs",
        "batch_size": "batch_size",
        "gradient_accumulation_steps": "grad_accumulation_steps",
        "clip_grad_norm": "max_grad_norm",
        "output_dir": "adapter_path",
        "seed": "seed",
        "log_every_n_steps": "steps_per_report",
        "run_val_every_n_steps": "steps_per_eval",
        "enable_activation_checkpointing": "grad_checkpoint",
        "checkpointer.checkpoint_dir": "model",
        "model.lora_rank": "rank",
        "model.lora_alpha": "alpha",
        "model.lora_dropout": "dropout",
        "optimizer.lr": "learning_rate",
        "optimizer.weight_decay": "weight_decay",
        "lr_scheduler.num_warmup_steps": "warmup",
        **{f"{part}.{key}": name for part in SETS for key, name in OF_SETS.items()},
    },
    values={
        "model.use_dora": {True: {"method": "dora"}},
        "model.quantize_base": {True: {"bits": 4}},
        "optimizer.fused": {True: {}},
        **{f"{part}.{key}": known for part in SETS for key, known in VALUES_OF_SETS.items()},
    },
    rules=(read_kind, read_model, read_data, read_optimizer),
    defaults={
        **{"epochs": 1.0, "learning_rate": 1e-3, "lr_schedule": "constant", "warmup": 0, "max_grad_norm": 0.0},
        **{"valid_fraction": 0.0},
    },
    changes=CHANGES,
    harmless=NO_RESULT,
    others={
        "tasks": "a file of another command; here it is mlx-lora evaluate",
        "prompt": "a file of another command; here it is mlx-lora generate",
        "num_steps": "a file of another command; here it is mlx-lora train with --reward",
    },
)
