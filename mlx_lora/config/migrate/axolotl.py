"""Read Axolotl's settings file.

For what the file leaves out, Axolotl's defaults are used if they change the result: sequence_len 512, one row per
micro-batch, no weight decay, nothing held out, one epoch. Axolotl has no defaults for rank and alpha, so ours are used.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_lora.config.migrate.common import (
    LIKELIHOOD_OF_SIMPO,
    RL_OF_AXOLOTL,
    SHARED,
    VALUES,
    WHOLE_ROLLOUT,
    Dialect,
    Sheet,
    choose_method,
    put_objective,
    put_pair,
    put_rewards,
    put_sampling,
    put_turn_names,
    read_columns,
    read_loop,
    read_prompts_trained,
    read_sets,
    read_template,
    rewards_of_paths,
    take_source,
    texts,
    trains_on_chats,
    turn_off_dropout,
    two_of,
)
from mlx_lora.config.objectives import RATED, SAMPLING

# Its names of preference options -> ours.
RL_OPTIONS = {
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "orpo_alpha": "beta",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "simpo_gamma": "simpo_gamma",
    "cpo_alpha": "cpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
    "center_rewards_coefficient": "center_rewards",
}
# ReLoRA's cycle. Jagged restarts without ReLoRA are another schedule, which is not supported.
RESTARTS = {
    "relora_steps": "relora_every",
    "jagged_restart_steps": "relora_every",
    "relora_warmup_steps": "relora_warmup",
    "jagged_restart_warmup_steps": "relora_warmup",
    "relora_prune_ratio": "relora_prune_ratio",
}
ADAPTERS = {"lora": "lora", "qlora": "qlora"}
INIT = "peft_init_lora_weights"
# The first word of a dataset's type -> what its records are read with. Alpaca's rows keep the alpaca prompt for every model.
TYPES = {
    "alpaca": {"data_format": "alpaca_sections", "chat_template": "alpaca"},
    "sharegpt": {"data_format": "sharegpt"},
    "completion": {"data_format": "text"},
    "pretrain": {"data_format": "text"},
    "chat_template": {"data_format": "auto"},
}
# The same of preferences, whose records' keys tell the rest.
TYPES_OF_PAIRS = {
    "chatml": {"chat_template": "chatml"},
    "llama3": {"chat_template": "llama3"},
    **{word: {} for word in ("chat_template", "user_defined", "zephyr", "passthrough", "bradley_terry")},
}
REASONING = ("thinking", "reasoning_content", "reasoning")
SETS = ("datasets", "test_datasets", "pretraining_dataset")
# Values of a dataset that we do not need, because we detect its format.
DETECTED = {
    "ds_type": ("json", "parquet", "csv", "text", "arrow"),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
    "roles_to_train": ("['assistant']", "['gpt']", "['gpt', 'assistant']"),
    "train_on_eos": ("turn",),
    "train_on_eot": ("turn",),
    "field_thinking": REASONING,
    "template_thinking_key": REASONING,
}
# Keys of a dataset that name columns -> our setting, and the names that need no setting.
FIELDS = {
    "field": ("text_column", ("text",)),
    "text_column": ("text_column", ("text",)),
    "field_messages": ("chat_column", ("messages", "conversations", "conversation")),
    "field_system": ("system_column", ("system",)),
}
# Parameters to train that are all those of a language model, without its towers.
WHOLE = re.compile(r"\^?(model\.language_model|lm_head|embed_tokens)(\.\*|\.weight\$)?")
# Templates of the model itself.
TEMPLATES = {
    "tokenizer_default": "own",
    "tokenizer_default_fallback_chatml": "own",
    "tokenizer_default_fallback_alpaca": None,
}
# Plugins that make a run faster or log it.
PLUGINS = ("CutCrossEntropyPlugin", "LigerPlugin", "KernelsPlugin", "SwanLabPlugin", "ExpertParallelPlugin")
# Columns of a type of one's own that we find by their names, or else by settings; those of preferences.
OWN_COLUMNS = {"field_system": ("system_column", ("system",))}
PAIR_COLUMNS = {
    **OWN_COLUMNS,
    "field_prompt": ("prompt_column", ("prompt", "question", "instruction", "input")),
    "field_completion": ("completion_column", ("completion",)),
}
PAIR_FIELDS = {
    "field_chosen": ("chosen", "chosen_response"),
    "field_rejected": ("rejected", "rejected_response"),
    "field_label": ("label", "kto_tag"),
}
FORMATS = (
    *("field", "format", "no_input_format", "system_prompt", "system_format", "prompt_format", "chosen_format"),
    *("rejected_format", "completion_format"),
)
# Roles and keys of the older type sharegpt -> role.
OLDER_ROLES = {"input": "user", "output": "assistant"}
SIDES = {"field_human": "user", "field_model": "assistant"}


def read_kind(sheet: Sheet) -> None:
    """Set the objective; refuse training that is neither supervised nor on preferences."""
    objective, loss = sheet.one_of("rl", RL_OF_AXOLOTL) or (None, None)
    if sheet.switch("reward_model"):
        objective = "reward"
    if objective is None:
        return
    more = sheet.part("trl")
    if objective in SAMPLING:  # the keys are TRL's, with its defaults
        put_sampling(more, objective)
        put_rewards(more, rewards_of_paths(more), "trl.reward_funcs")
        sheet.assume(group_size=8, max_new_tokens=512)
        sheet.rest |= {key: more.take(key) for key in WHOLE_ROLLOUT if key in more.rest}
        return
    stated = {"rl_beta": more.take("beta"), "dpo_loss_type": loss}  # they count before the others there
    sheet.rest |= {key: value for key, value in stated.items() if value is not None}
    sheet.drop({"num_labels": (1,)})
    put_objective(sheet, objective, RL_OPTIONS)
    turn_off_dropout(sheet)


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha and method; an empty `adapter` trains the model itself, as in Axolotl."""
    adapter = sheet.one_of("adapter", ADAPTERS)
    pissa = str(sheet.rest.get(INIT)).startswith("pissa") and sheet.take(INIT)
    sheet.refuse(INIT, "other first factors; pissa is here")
    restarts = "relora" if sheet.rest.get("relora_steps") else None
    others = {"pissa": pissa, "relora": restarts, "full": None if adapter else "adapter"}
    choose_method(sheet, others, {"peft_use_dora": "dora", "peft_use_rslora": "rslora", "relora": "relora"})
    if sheet.found["method"] == "relora":
        sheet.copy(RESTARTS)
    sheet.put(bits=sheet.found.get("bits", 4) if adapter == "qlora" else None)
    if sheet.switch("lora_target_linear"):  # beside the layers that are named
        sheet.found["target_modules"] = "all-linear"
    experts = texts(sheet.rest.get("lora_target_parameters"))
    if len(experts) > 1 and all("experts." in name for name in experts):
        sheet.take("lora_target_parameters")
        sheet.notes.append("lora_target_parameters: gate and up of the experts have factors of their own here")
        if (named := sheet.found.get("target_modules")) not in (None, "all-linear"):
            sheet.found["target_modules"] = f"{named},all-experts"
    whole = texts(sheet.rest.get("unfrozen_parameters"))
    if len(whole) > 1 and all(WHOLE.fullmatch(one) for one in whole):
        sheet.take("unfrozen_parameters")


def read_data(sheet: Sheet) -> None:
    """Set the data from all datasets, each with its own form, and from those to validate on."""

    def read_set(one: Sheet, key: str) -> list[dict[str, Any]]:
        read_type(one, one.rest.pop("type", "pretrain" if key == "pretraining_dataset" else None), sheet)
        read_names(one)
        read_template(one, "chat_template", sheet.found.get("model"), TEMPLATES)
        return [take_source(one)]

    key = "datasets" if "datasets" in sheet.rest else "pretraining_dataset"
    read_sets(sheet, {key: {}, "test_datasets": {"as": "valid"}}, read_set)


def read_names(dataset: Sheet) -> None:
    """Set the columns, and the names of turns' fields and roles, that a dataset names."""
    chats = trains_on_chats(dataset) or dataset.found["objective"] in RATED
    if chats or dataset.rest.get("field_messages") in FIELDS["field_messages"][1]:  # a pair has no such column
        read_columns(dataset, FIELDS)
    mapped, told = dataset.part("message_property_mappings"), dataset.part("roles").rest
    names = {"role": "message_field_role", "content": "message_field_content"}
    fields = {name: one for name, key in names.items() for one in (mapped.take(name), dataset.take(key)) if one}
    roles = {str(OLDER_ROLES.get(name, name)): told.pop(name) for name in list(told)}
    roles |= {role: dataset.take(key) for key, role in SIDES.items() if key in dataset.rest}
    put_turn_names(dataset, fields, roles, "roles")


def read_type(dataset: Sheet, kind: Any, whole: Sheet) -> None:
    """Set the form of a dataset's records, and the chat template that it means, whatever the key of the file says."""
    if isinstance(kind, dict):
        read_own_type(dataset, dataset.within(kind, "type"))
    if kind is None or isinstance(kind, dict):
        return
    chats, word = trains_on_chats(dataset), re.split("[:.]", str(kind))[0]
    known = TYPES if chats else TYPES_OF_PAIRS
    if word not in known or (chats and kind not in (word, f"{word}.default")):
        dataset.refuse("type", "a form of records that is not here; write prompts and answers, or chats", kind)
        return
    dataset.found |= known[word]
    if "chat_template" in known[word]:
        whole.take("chat_template")
    elif word in ("sharegpt", "zephyr"):
        dataset.notes.append(
            f"{dataset.prefix}type {kind}: rows are chats here, rendered with the model's own template"
        )
    elif chats and word == "chat_template" and not {"chat_template", "chat_template_jinja"} & whole.rest.keys():
        dataset.found["chat_template"] = "own"  # tokenizer_default


def read_own_type(sheet: Sheet, kind: Sheet) -> None:
    """Set the columns that a type of one's own names; the text around them is the chat template's here."""
    if trains_on_chats(sheet):
        question = [kind.take(key) for key in ("field_instruction", "field_input") if key in kind.rest]
        answer = kind.take("field_output")
        if question not in ([], ["instruction"], ["instruction", "input"]) or answer not in (None, "output"):
            put_pair(sheet, question, answer)
    read_columns(kind, OWN_COLUMNS if trains_on_chats(sheet) else PAIR_COLUMNS)
    kind.drop(PAIR_FIELDS)


def read_chats(sheet: Sheet) -> None:
    """Set the chat template, and check the special tokens; Jinja text inside the file has to be in a file of its own here."""
    jinja = str(sheet.rest.get("chat_template_jinja", ""))
    if jinja and not re.search(r"[{\n]", jinja):
        sheet.rest["chat_template"] = sheet.take("chat_template_jinja")
    read_template(sheet, "chat_template", sheet.found.get("model"), TEMPLATES)
    read_prompts_trained(sheet, "train_on_inputs")
    tokens = sheet.part("special_tokens").rest
    named = [f"{name}={tokens.pop(name)}" for name in list(tokens)]
    sheet.put(special_tokens=",".join(one for one in named if not one.startswith("pad_token=")) or None)
    plugins = [name for name in texts(sheet.take("plugins")) if not name.endswith(PLUGINS)]
    sheet.refuse("plugins", "a program of its own", ", ".join(plugins) or None)
    if trains_on_chats(sheet) and sheet.rest.get("excess_length_strategy") != "truncate":
        sheet.assume(long_rows="drop")
    sheet.drop({"excess_length_strategy": ("truncate", "drop")})


def read_run(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    given = sheet.found if sheet.found.get("objective") in SAMPLING else {**sheet.found, **sheet.flags}
    rows, whole = given.get("batch_size"), sheet.number("batch_size")  # of a micro-batch, and of the whole step
    if "grad_accumulation_steps" in sheet.found or not isinstance(rows, int) or rows < 1:
        sheet.harmless += ["batch_size"] * (whole is not None)
    elif whole is not None:
        sheet.found["grad_accumulation_steps"] = max(1, round(whole / rows))
    if "warmup_steps" not in sheet.rest:
        sheet.rest.setdefault("warmup_ratio", 0.03)
    read_loop(sheet)
    if "warmup_rounding" in sheet.found:
        sheet.found["warmup_rounding"] = "down"
    kind = str(sheet.take("model_type") or "")
    if kind.endswith("Classification") and "objective" not in sheet.found:
        sheet.refuse("model_type", "a head for labels; use --objective classify", kind)
    sheet.put(report_to="wandb" if "project_name" in sheet.found else None)


AXOLOTL = Dialect(
    name="Axolotl",
    # By keys of its own: neither settings of ours, nor arguments of transformers' trainer, which other tools use too.
    recognizes=two_of(
        *("base_model", "micro_batch_size", "sequence_len", "sample_packing", "num_epochs", "val_set_size", "lora_r"),
        *("lora_target_linear", "adapter", "datasets"),
    ),
    names={
        **SHARED,
        "base_model": "model",
        "revision_of_model": "revision",
        "lora_r": "rank",
        "lora_target_modules": "target_modules",
        "lora_modules_to_save": "modules_to_save",
        "sequence_len": "max_seq_length",
        "micro_batch_size": "batch_size",
        "num_epochs": "epochs",
        "lr_scheduler": "lr_schedule",
        "optimizer": "optimizer",
        "val_set_size": "valid_fraction",
        "wandb_project": "project_name",
    },
    values={
        **VALUES,
        INIT: {True: {}},
        **{f"{part}.{key}": {one: {} for one in usual} for part in SETS for key, usual in DETECTED.items()},
    },
    rules=(read_kind, read_method, read_data, read_chats, read_run),
    defaults={"weight_decay": 0.0, "epochs": 1.0, "batch_size": 1, "max_seq_length": 512, "valid_fraction": 0.0},
    # The end of a turn is always trained with it; the towers are frozen; and what Axolotl does not read.
    harmless=("eot_tokens", "freeze_mm_modules", "eta_min", "full_finetune", "test_value"),
    changes={
        "cpo_alpha": LIKELIHOOD_OF_SIMPO,
        **dict.fromkeys(RESTARTS, "restarts without relora"),
        **{f"datasets.type.{key}": "the text around prompt and answer is --chat-template's here" for key in FORMATS},
        "chat_template_jinja": "put the text into a file and give it as --chat-template",
        "excess_length_strategy": "a run does not stop at long rows",
        "process_reward_model": "only reward_model is supported; use Axolotl for it",
    },
)
