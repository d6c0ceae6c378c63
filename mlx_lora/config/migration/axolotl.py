"""Read Axolotl's settings file.

For what the file leaves out, Axolotl's defaults are used if they change the result: sequence_len 512, one row per
micro-batch, no weight decay, nothing held out, one epoch. Axolotl has no defaults for rank and alpha, so ours are used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migration import hf, sampling_keys
from mlx_lora.config.migration.column_keys import ROLES, join_paths, put_turn_names, take_columns
from mlx_lora.config.migration.preference_keys import (
    put_objective,
    read_prompts_trained,
    say_plain_simpo,
    trains_on_chats,
)
from mlx_lora.config.migration.sheet import Dialect, Sheet, is_empty
from mlx_lora.utils.parsing import hashable

# Keys of its own: neither settings of ours, nor arguments of transformers' trainer, which other tools use too.
MARKS = (
    "base_model",
    "micro_batch_size",
    "sequence_len",
    "sample_packing",
    "num_epochs",
    "val_set_size",
    "lora_r",
    "lora_target_linear",
    "adapter",
    "datasets",
)
# The first word of a dataset's type -> our format.
FORMATS = {
    "alpaca": "alpaca",
    "alpaca_chat": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "chat_template": "auto",
}
# Settings of a dataset that we do not need, because we detect its format.
READ_ANYWAY = [
    ("ds_type", kind) for kind in ("json", "parquet", "csv", "text", "arrow")
] + [
    ("split", "train"),
    ("field_chosen", "chosen"),
    ("field_rejected", "rejected"),
    ("roles_to_train", ["assistant"]),
    ("roles_to_train", ["gpt"]),
    ("roles_to_train", ["gpt", "assistant"]),
    ("train_on_eos", "turn"),
    ("chat_template", "tokenizer_default"),
]  # fmt: skip
# Keys of a dataset that name columns -> our setting, and the names that need no setting.
FIELDS = {
    "field": ("text_column", "text"),
    "text_column": ("text_column", "text"),
    "field_messages": ("chat_column", ("messages", "conversations", "conversation")),
    "field_system": ("system_column", "system"),
}
# Keys of a type of one's own, whose prompt may be in two columns.
OWN_FIELDS = {"field_output": ("completion_column", "output"), "field_system": ("system_column", "system")}


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has two of Axolotl's own keys, and not our key for the model."""
    return "model" not in content and sum(key in content for key in MARKS) >= 2


# Axolotl's `rl` -> our objective.
RL = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo", "kto": "kto"}
# Its names of preference options -> ours.
RL_OPTIONS = {
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "orpo_alpha": "beta",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "simpo_gamma": "simpo_gamma",
    "cpo_alpha": "cpo_alpha",
    "rpo_alpha": "rpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
}
# The first word of a preference data set's type -> the chat template that it means; None: the model's own.
RECORD_TYPES = {"chatml": "chatml"} | dict.fromkeys(
    ("llama3", "chat_template", "user_defined", "zephyr", "passthrough", "bradley_terry")
)
# Columns of a user-defined type that we find by their names, or else by settings.
USER_COLUMNS = {
    "field_system": ("system_column", "system"),
    "field_prompt": ("prompt_column", ("prompt", "question", "instruction", "input")),
}
USER_FIELDS = {
    "field_chosen": ("chosen", "chosen_response"),
    "field_rejected": ("rejected", "rejected_response"),
    "field_label": ("label", "kto_tag"),
}


def read_kind(sheet: Sheet) -> None:
    """Set the objective; refuse training that is neither supervised nor on preferences."""
    asked = hashable(sheet.take("rl"))
    if asked:
        if asked not in (*RL, "grpo"):
            raise sheet.refusal(f"rl {asked}: only {', '.join((*RL, 'grpo'))} are supported; use Axolotl for it")
        more = sheet.part("trl")
        if asked == "grpo":
            read_sampling(sheet, more)
            return
        if "beta" in more.rest:  # it counts before the others there
            sheet.rest["rl_beta"] = more.take("beta")
        sheet.left_out += [f"trl.{key}" for key in more.rest]
        if asked == "ipo":
            sheet.rest["dpo_loss_type"] = "ipo"
        if asked == "simpo":
            say_plain_simpo(sheet)
        put_objective(sheet, RL[asked], "rl", RL_OPTIONS)
        sheet.take("precompute_ref_log_probs")  # we always do
    if sheet.switch("reward_model"):
        put_objective(sheet, "reward", "reward_model", {"center_rewards_coefficient": "center_rewards"})
    if asked := sheet.take("process_reward_model"):
        raise sheet.refusal(f"process_reward_model {asked}: only reward_model is supported; use Axolotl for it")


def read_sampling(sheet: Sheet, more: Sheet) -> None:
    """Set what samples and rewards answers, from the keys under `trl:`; they are TRL's, with its defaults."""
    sampling_keys.put_sampling(sheet, "grpo", "rl", more)
    sampling_keys.put_rewards(sheet, more, sampling_keys.rewards_of_paths(sheet, more), "trl.reward_funcs")
    for name, value in (("group_size", 8), ("max_new_tokens", 512)):
        sheet.assume(name, value)
    for key in [key for key in more.rest if key in sampling_keys.WHOLE_ROLLOUT]:
        sheet.rest[key] = more.take(key)
    sheet.left_out += [f"trl.{key}" for key in more.rest]
    sampling_keys.keep_cycles(sheet)


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha and method; an empty `adapter` trains the model itself, as in Axolotl."""
    adapter = sheet.take("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise sheet.refusal(f"adapter {adapter}: not supported; use lora or qlora")
    for key, name in (("lora_r", "rank"), ("lora_alpha", "alpha")):
        if adapter and key in sheet.rest:
            sheet.put(name, sheet.number(key), key)
    ratio, init = sheet.number("loraplus_lr_ratio"), sheet.take("peft_init_lora_weights")
    restarts = {key: sheet.number(key) for key in ("relora_steps", "jagged_restart_steps")}
    on = {
        "dora": "peft_use_dora" if sheet.switch("peft_use_dora") else None,
        "rslora": "peft_use_rslora" if sheet.switch("peft_use_rslora") else None,
        "pissa": "peft_init_lora_weights" if str(init).startswith("pissa") else None,
        "relora": "relora" if sheet.switch("relora") or restarts["relora_steps"] else None,
        "lora-plus": "loraplus_lr_ratio" if ratio is not None else None,
        "full": None if adapter else "adapter",
    }
    if init not in (None, True) and not on["pissa"]:
        sheet.left_out.append("peft_init_lora_weights")
    hf.choose_method(sheet, {method: key for method, key in on.items() if key})
    if sheet.found.get("method") == "lora-plus":
        sheet.put("loraplus_lr_ratio", ratio, "loraplus_lr_ratio")
    read_restarts(sheet, restarts)
    quantized = {"load_in_4bit": 4, "load_in_8bit": 8}
    asked = [key for key in quantized if sheet.switch(key)] or (["adapter: qlora"] if adapter == "qlora" else [])
    if asked:
        hf.put_bits(sheet, asked[0], quantized.get(asked[0], 4))


def read_restarts(sheet: Sheet, restarts: dict[str, int | float | None]) -> None:
    """Set ReLoRA's cycle; jagged restarts without ReLoRA are another schedule, which is not supported."""
    settings = {
        "relora_every": restarts,
        "relora_warmup": {key: sheet.number(key) for key in ("relora_warmup_steps", "jagged_restart_warmup_steps")},
        "relora_prune_ratio": {"relora_prune_ratio": sheet.number("relora_prune_ratio")},
    }
    for name, stated in settings.items():
        for key, value in stated.items():
            if value is not None and sheet.found.get("method") == "relora":
                sheet.put(name, value, key)
            elif value is not None:
                sheet.left_out.append(key)


def read_targets(sheet: Sheet) -> None:
    """Set the target layers; lora_target_linear adds all linear layers to the named ones."""
    if sheet.switch("lora_target_linear"):
        sheet.take("lora_target_modules")
        sheet.put("target_modules", "all-linear", "lora_target_linear")
    hf.read_targets(sheet, "lora_target_modules", ("all-linear",))
    if sheet.rest.get("lora_modules_to_save"):
        names = sheet.take("lora_modules_to_save")
        sheet.put("modules_to_save", names, "lora_modules_to_save")


def read_data(sheet: Sheet) -> None:
    """Set data, format and template from the first dataset."""
    key = "datasets" if "datasets" in sheet.rest else "pretraining_dataset"
    asked = sheet.take(key)
    sets = asked if isinstance(asked, list) else [] if asked is None else [asked]
    sets = [{"path": one} if isinstance(one, str) else one for one in sets]
    if not all(isinstance(one, dict) for one in sets):
        raise sheet.refusal(f"{key} has no mappings with a path; fix the file")
    told = [{name: value for name, value in one.items() if not is_empty(value)} for one in sets] or [{}]
    paths, first = [data_path(one) for one in told], told[0]
    alike = all(one == first for one in told)
    if paths[0]:
        sheet.put("data", join_paths(paths) if alike else paths[0], f"{key}.path")
    if not alike:
        sheet.note(
            f"{key}: {len(sets)} sets that are read differently, only the first ({paths[0]}) is used; join them in one "
            "file to use all of them"
        )
    kind = first.pop("type", "pretrain" if key == "pretraining_dataset" and sets else None)
    read_format(sheet, kind, f"{key}.type")
    read_columns(sheet, first, key)
    own_template = first.get("chat_template")
    if own_template and kind == "chat_template":
        sheet.rest["chat_template"] = first.pop("chat_template")
    sheet.left_out += [f"{key}.{name}" for name, value in first.items() if not read_anyway(name, value)]


def read_columns(sheet: Sheet, dataset: dict[str, Any], prefix: str) -> None:
    """Set the columns, and the names of turns' fields and roles, that a dataset names."""
    chats = trains_on_chats(sheet) or sheet.found["objective"] == "kto"
    if chats or dataset.get("field_messages") in FIELDS["field_messages"][1]:  # a pair has no such column
        take_columns(sheet, dataset, FIELDS, f"{prefix}.")
    fields: dict[str, Any] = {}
    mapped = dataset.get("message_property_mappings")
    if isinstance(mapped, dict) and mapped.keys() <= {"role", "content"}:
        fields |= dataset.pop("message_property_mappings")
    for name in ("role", "content"):
        if isinstance(dataset.get(f"message_field_{name}"), str):
            fields[name] = dataset.pop(f"message_field_{name}")
    roles: dict[str, Any] = {}
    told = dataset.get("roles")
    if isinstance(told, dict) and told.keys() <= set(ROLES):
        roles |= dataset.pop("roles")
    elif isinstance(told, dict) and told.keys() <= {"input", "output"}:  # of its older type sharegpt
        roles |= {{"input": "user", "output": "assistant"}[name]: value for name, value in dataset.pop("roles").items()}
    for name, role in (("field_human", "user"), ("field_model", "assistant")):
        if isinstance(dataset.get(name), str):
            roles[role] = dataset.pop(name)
    put_turn_names(sheet, fields, roles, f"{prefix}.roles")


def read_own_type(sheet: Sheet, kind: dict[str, Any], key: str) -> None:
    """Set the columns that a type of one's own names; the text around them is the chat template's here."""
    told = {name: value for name, value in kind.items() if not is_empty(value)}
    question = [told.pop(name) for name in ("field_instruction", "field_input") if isinstance(told.get(name), str)]
    if question and question not in (["instruction"], ["instruction", "input"]):
        sheet.put("prompt_column", ",".join(question), f"{key}.field_instruction")
    take_columns(sheet, told, OWN_FIELDS, f"{key}.")
    if "prompt_column" in sheet.found:
        sheet.assume("completion_column", "output")
    sheet.left_out += [f"{key}.{name}" for name in told]
    sheet.note(f"{key}: --chat-template gives the text around prompt and answer")


def read_anyway(name: str, value: Any) -> bool:
    """Return whether a dataset's setting is not needed, because we detect its format."""
    return (name, hashable(value)) in READ_ANYWAY or (name, value) in READ_ANYWAY


def data_path(dataset: dict[str, Any]) -> str | None:
    """Return a dataset's path, or its one file if the path is only the name of a format; remove it from `dataset`."""
    path, files = dataset.pop("path", None), dataset.get("data_files")
    files = [files] if isinstance(files, str) else files if isinstance(files, list) else []
    if path in ("json", "csv", "parquet", "text") and files:
        if len(files) == 1:
            dataset.pop("data_files")
        return str(files[0])
    revision = dataset.pop("revision", None)
    return f"{path}@{revision}" if path and revision else path


def read_format(sheet: Sheet, kind: Any, key: str) -> None:
    """Set the record format; alpaca rows keep the alpaca prompt, which Axolotl uses for every model."""
    if kind is None:
        return
    word = re.split("[:.]", kind)[0] if isinstance(kind, str) else None
    if not trains_on_chats(sheet):
        read_record_type(sheet, "user_defined" if isinstance(kind, dict) else word, kind, key)
        return
    if isinstance(kind, dict):
        read_own_type(sheet, kind, key)
        return
    if word not in FORMATS:
        sheet.left_out.append(key)
        sheet.note(f"{key}: has no counterpart here; the format is detected from the records' keys")
        return
    sheet.put("data_format", FORMATS[word], key)
    if kind == "alpaca":
        sheet.put("chat_template", "alpaca", key)
        sheet.take("chat_template")
        sheet.note(f"{key} alpaca: rows get the alpaca prompt, as in Axolotl; --chat-template sets another")
    elif word in ("alpaca", "alpaca_chat", "sharegpt"):
        sheet.note(f"{key} {kind}: rows are chats here, rendered with the model's own template")


def read_record_type(sheet: Sheet, word: str | None, kind: Any, key: str) -> None:
    """Set the template that a type of preference records means; the records' keys tell the rest."""
    if isinstance(kind, dict):
        told = {name: value for name, value in kind.items() if not is_empty(value)}
        columns = dict(USER_COLUMNS)
        if sheet.found["objective"] == "kto":
            columns["field_completion"] = ("completion_column", "completion")
        take_columns(sheet, told, columns, f"{key}.")
        unknown = [name for name, value in told.items() if hashable(value) not in USER_FIELDS.get(name, ())]
        sheet.left_out += [f"{key}.{name}" for name in unknown]
        if unknown:
            sheet.note(f"{key}: columns are found by their names, and --chat-template gives the text around them")
    elif word not in RECORD_TYPES:
        sheet.left_out.append(key)
        sheet.note(f"{key}: has no counterpart here; the type is detected from the records' keys")
    elif template := RECORD_TYPES[word]:
        sheet.put("chat_template", template, key)
        sheet.take("chat_template")
        sheet.note(f"{key} {kind}: rows get the {template} prompt, as in Axolotl; --chat-template sets another")
    elif word in ("llama3", "zephyr"):
        sheet.note(f"{key} {kind}: rows are chats here, rendered with the model's own template")


def read_template(sheet: Sheet) -> None:
    """Set the chat template; Jinja text inside the file is not supported, because ours must be in its own file."""
    jinja = sheet.take("chat_template_jinja")
    if jinja and re.search(r"[{\n]", str(jinja)):
        sheet.left_out.append("chat_template_jinja")
        sheet.note("chat_template_jinja: put the text into a file and give it as --chat-template")
    elif jinja:
        sheet.put("chat_template", jinja, "chat_template_jinja")
    if jinja:
        sheet.take("chat_template")
    name = str(sheet.rest.get("chat_template") or "")
    if name.startswith("tokenizer_default_fallback_"):
        sheet.take("chat_template")
        sheet.note(f"chat_template {name}: the model's own template is used, or alpaca if it has none")
    hf.read_template(sheet, "chat_template", ("tokenizer_default",))


def read_prompts(sheet: Sheet) -> None:
    """Set mask_prompt, the opposite of train_on_inputs."""
    read_prompts_trained(sheet, "train_on_inputs")


def read_loop(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    hf.read_length(sheet, "num_epochs")
    rows = sheet.rest.get("micro_batch_size")
    if "gradient_accumulation_steps" in sheet.rest or not isinstance(rows, int) or rows < 1:
        sheet.leave("batch_size")  # rows of the whole step, which the other two keys decide
    elif "batch_size" in sheet.rest:
        sheet.put("grad_accumulation_steps", max(1, round((sheet.number("batch_size") or 0) / rows)), "batch_size")
    if sampling_keys.reads(sheet.found.get("objective")):
        sampling_keys.read_prompts(sheet, "micro_batch_size", 1)
        sheet.leave("sequence_len", "sample_packing")
    else:
        hf.read_batch(sheet, "micro_batch_size", "sequence_len", "sample_packing", defaults=(1, 512))
    hf.read_warmup(sheet, "lr_scheduler")
    hf.read_optimizer(sheet, "optimizer")
    hf.read_held_out(sheet, "val_set_size")
    hf.read_intervals(sheet)
    hf.read_precision(sheet)
    if sheet.rest.get("evals_per_epoch") == 0:
        sheet.take("evals_per_epoch")
        sheet.put("val_batches", 0, "evals_per_epoch")
    checkpointing = sheet.take("gradient_checkpointing")
    if checkpointing is not None:
        sheet.put("grad_checkpoint", bool(checkpointing), "gradient_checkpointing")
    if sheet.rest.get("wandb_project"):
        sheet.put("report_to", "wandb", "wandb_project")


AXOLOTL = Dialect(
    name="Axolotl",
    recognizes=recognizes,
    rules=(read_kind, read_method, read_targets, read_data, read_template, read_prompts, read_loop),
    names=(
        "base_model",
        "revision_of_model",
        "trust_remote_code",
        "lora_dropout",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "gradient_accumulation_steps",
        "output_dir",
        "wandb_project",
        "seed",
    ),
    defaults={"weight_decay": 0.0},
)
