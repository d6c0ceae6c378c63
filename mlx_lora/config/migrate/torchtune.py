"""Read a recipe's file of torchtune, whose parts are classes and functions with their arguments.

For what the file leaves out, torchtune's defaults are used if they change the result: a constant rate, no clip, nothing held out,
rows that are not cut. Its Alpaca data sets train prompts too, with Stanford's text as the question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migrate import common
from mlx_lora.config.migrate.common import LOSSES_OF_TORCHTUNE, UNCUT, Dialect, Sheet

PART = "_component_"
# Parts that change no result.
PARTS = ("metric_logger", "profiler", "collate_fn", "tensor_parallel_plan")
LOSSES = ("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss")
# The tokenizer's first word -> the chat template with its text. Others write chats without one, or as their model does.
TEMPLATES = {"llama3": "llama3", "qwen2": "chatml_ended", "qwen3": "chatml_ended"}
OWN_TEMPLATES = ("phi3", "phi4")
# Its data sets -> where they are, and what else they say.
DATA_SETS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "alpaca": ("tatsu-lab/alpaca", {"data_format": "alpaca_prompt", "mask_prompt": False}),
    "alpaca_cleaned": ("yahma/alpaca-cleaned", {"data_format": "alpaca_prompt", "mask_prompt": False}),
    "chat": (None, {}),
    "text_completion": (None, {"data_format": "text"}),
    "preference": (None, {}),
}
ATTENTION = {"output_proj": "o_proj"}
# Keys of its files for other commands -> what that command is here.
OTHER_COMMANDS = {"tasks": "evaluate", "prompt": "generate", "num_steps": "train with --reward"}


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has parts that name their class."""
    return any(isinstance(value, dict) and PART in value for value in content.values())


def filled_in(text: Any, content: Mapping[str, Any]) -> Any:
    """Return a value with the names of others, such as ${output_dir}, replaced by their values."""
    if isinstance(text, dict):
        return {key: filled_in(value, content) for key, value in text.items()}
    return (
        re.sub(r"\$\{(\w+)\}", lambda name: str(content.get(name[1], name[0])), text) if isinstance(text, str) else text
    )


def part(sheet: Sheet, key: str) -> tuple[str, Sheet]:
    """Take a part: the last word of its class, and its arguments."""
    own = sheet.part(key)
    return str(own.take(PART) or "").rpartition(".")[2], own


def read_kind(sheet: Sheet) -> None:
    """Refuse files of other commands, and set the objective from the loss."""
    for key, command in OTHER_COMMANDS.items():
        if key in sheet.rest:
            raise sheet.refusal(f"{key}: a file of another command; here it is mlx-lora {command}")
    sheet.rest = {key: filled_in(value, sheet.rest) for key, value in sheet.rest.items() if key not in PARTS}
    name, loss = part(sheet, "loss")
    if name in LOSSES_OF_TORCHTUNE:
        common.put_objective(loss, LOSSES_OF_TORCHTUNE[name], {"beta": "beta", "label_smoothing": "label_smoothing"})
    elif name and name not in LOSSES:
        sheet.refuse("loss", "another loss", name)
    for key in ("kd_ratio", "teacher_model", "kd_loss", "quantizer", "policy_model"):
        sheet.refuse(key, "a loss of two models, or rounded weights; see distill and --qat")
    loss.leave("num_output_chunks", "ignore_index")
    loss.sort_rest()


def read_model(sheet: Sheet) -> None:
    """Set model, method and layers."""
    _, files = part(sheet, "checkpointer")
    files.copy({"checkpoint_dir": "model"})
    files.refuse("adapter_checkpoint", "an adapter to begin with; give it as --resume-adapter-file")
    for key in ("ref_checkpointer", "teacher_checkpointer", "save_adapter_weights_only"):
        sheet.leave(key)
    name, model = part(sheet, "model")
    attention, mlp, head = (model.take(f) for f in ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"))
    adapts = name.startswith(("lora_", "qlora_"))
    sheet.found["method"] = "dora" if model.switch("use_dora") else "lora" if adapts else "full"
    model.copy({"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}, Sheet.number)
    if adapts:
        sheet.assume(rank=8, alpha=16)
        names = [ATTENTION.get(one) or str(one) for one in attention or ()]
        names += ["gate_proj", "up_proj", "down_proj"] * bool(mlp) + ["lm_head"] * bool(head)
        sheet.found["target_modules"] = ",".join(names)
    else:
        sheet.found["target_modules"] = "*"
    if name.startswith("qlora_") or model.switch("quantize_base"):
        common.put_bits(sheet, "model", 4)
    for key, value in list(model.rest.items()):
        if key not in ("max_seq_len", "image_size") and value:
            model.refuse(key, "an argument of the model", value)


def read_data(sheet: Sheet) -> None:
    """Set data, template and length."""
    name, tokenizer = part(sheet, "tokenizer")
    word = re.split("[_.]", name)[0]
    sheet.found["max_seq_length"] = tokenizer.number("max_seq_len") or UNCUT
    if (template := TEMPLATES.get(word)) or word in OWN_TEMPLATES:
        sheet.found["chat_template"] = template or "own"
    else:
        sheet.refuse("tokenizer", "chats are written without the model's template there", name)
    tokenizer.leave("path", "merges_file", "merges_path", "vocab_path", "image_size", "max_num_tiles")
    tokenizer.sort_rest()
    sources = []
    for key, options in (("dataset", {}), ("dataset_val", {"as": "valid"})):
        name, own = part(sheet, key)
        path, settings = DATA_SETS.get(name.removesuffix("_dataset"), (None, {}))
        source = {
            "path": common.take_path(own, "source") or path,
            "split": own.take("split"),
            "subset": own.take("subset"),
            **options,
        }
        if name and (name.removesuffix("_dataset") not in DATA_SETS or source["path"] is None):
            sheet.refuse(key, "a form of rows that is not here", name)
        elif name:
            sheet.found |= settings
            trained = own.take("train_on_input")
            sheet.found |= {} if trained is None else {"mask_prompt": not trained}
            own.copy({"column": "text_column", "conversation_column": "chat_column"})
            own.drop({"conversation_style": ("openai", "sharegpt"), "add_eos": (True,)})
            sources.append(source)
        if own.switch("packed"):
            sheet.refuse(key, "rows are joined; rows of similar length share a batch here (--batch-tokens)", "packed")
        own.sort_rest()
    if sources:
        common.put_sets(sheet, "dataset", sources, [{}] * len(sources))


def read_loop(sheet: Sheet) -> None:
    """Set optimizer, schedule and length."""
    name, optimizer = part(sheet, "optimizer")
    if "AdamW" in name or name == "SGD":
        sheet.found["optimizer"] = "adamw" if "AdamW" in name else "sgd"
    else:
        sheet.refuse("optimizer", "another optimizer", name or None)
    optimizer.copy({"lr": "learning_rate", "weight_decay": "weight_decay"}, Sheet.number)
    sheet.assume(learning_rate=1e-3, weight_decay=0.01 if "AdamW" in name else 0.0)
    betas = optimizer.take("betas")
    sheet.found |= dict(zip(("adam_beta1", "adam_beta2"), betas or (), strict=False))
    optimizer.drop({"fused": (True, False)})
    optimizer.sort_rest()
    name, schedule = part(sheet, "lr_scheduler")
    if name == "get_cosine_schedule_with_warmup":
        sheet.found |= {"lr_schedule": "cosine", "warmup": schedule.number("num_warmup_steps") or 0, "warmup_init": 0}
    elif name:
        sheet.refuse("lr_scheduler", "another schedule", name)
    sheet.assume(lr_schedule="constant", warmup=0, max_grad_norm=0.0, valid_fraction=0.0)
    schedule.sort_rest()
    sheet.refuse("max_steps_per_epoch", "an epoch ends early; give --iters, or a split such as train[:1000]")
    if sheet.rest.get("shuffle") is False:
        sheet.refuse("shuffle", "rows keep their order")
    sheet.copy({"enable_activation_checkpointing": "grad_checkpoint"})
    sheet.leave("shuffle", "dtype", "device", "compile", "optimizer_in_bwd", "custom_sharded_layers", "batch_size_val", "tensor_parallel_dim",
                "low_cpu_ram", "data_parallel_shard_dim", "data_parallel_replicate_dim", "memory_efficient_fsdp_wrap", "enable_activation_offloading",
                "ac_mode", "ac_option", "resume_from_checkpoint", "use_distributed_state_dict")  # fmt: skip


TORCHTUNE = Dialect(
    name="torchtune",
    recognizes=recognizes,
    rules=(read_kind, read_model, read_data, read_loop),
    names={
        "epochs": "epochs",
        "batch_size": "batch_size",
        "gradient_accumulation_steps": "grad_accumulation_steps",
        "clip_grad_norm": "max_grad_norm",
        "output_dir": "adapter_path",
        "seed": "seed",
        "log_every_n_steps": "steps_per_report",
        "run_val_every_n_steps": "steps_per_eval",
    },
    defaults={"epochs": 1.0},
)
