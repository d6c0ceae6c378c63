"""Read Axolotl's settings file.

For what the file leaves out, Axolotl's defaults are used if they change the result: sequence_len 512, one row per
micro-batch, no weight decay, nothing held out, one epoch. Axolotl has no defaults for rank and alpha, so ours are used.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_lora.config.migrate import common
from mlx_lora.config.migrate.common import RL_OF_AXOLOTL, SHARED, Dialect, Sheet
from mlx_lora.config.objectives import RATED, SAMPLING

# Keys of its own: neither settings of ours, nor arguments of transformers' trainer, which other tools use too.
MARKS = (
    *("base_model", "micro_batch_size", "sequence_len", "sample_packing", "num_epochs", "val_set_size", "lora_r"),
    *("lora_target_linear", "adapter", "datasets"),
)
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
ADAPTERS = {"lora": None, "qlora": 4}  # -> bits
INIT = "peft_init_lora_weights"
# The first word of a dataset's type -> our format.
FORMATS = {
    "alpaca": "alpaca_sections",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "chat_template": "auto",
}
# The first word of a preference data set's type -> the chat template that it means; None: the model's own.
RECORD_TYPES = {"chatml": "chatml", "llama3": "llama3"} | dict.fromkeys(
    ("chat_template", "user_defined", "zephyr", "passthrough", "bradley_terry")
)
REASONING = ("thinking", "reasoning_content", "reasoning")
# Values of a dataset that we do not need, because we detect its format.
DETECTED = {
    "ds_type": ("json", "parquet", "csv", "text", "arrow"),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
    "roles_to_train": (["assistant"], ["gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "chat_template": ("tokenizer_default",),
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
# Keys of a type of one's own, whose prompt may be in two columns.
OWN_FIELDS = {"field_output": ("completion_column", ("output",)), "field_system": ("system_column", ("system",))}
# Columns of a user-defined type that we find by their names, or else by settings.
USER_COLUMNS = {
    "field_system": ("system_column", ("system",)),
    "field_prompt": ("prompt_column", ("prompt", "question", "instruction", "input")),
}
USER_FIELDS = {
    "field_chosen": ("chosen", "chosen_response"),
    "field_rejected": ("rejected", "rejected_response"),
    "field_label": ("label", "kto_tag"),
}


def read_kind(sheet: Sheet) -> None:
    """Set the objective; refuse training that is neither supervised nor on preferences."""
    objective, loss = sheet.one_of("rl", RL_OF_AXOLOTL) or (None, None)
    if sheet.switch("reward_model"):
        objective = "reward"
    if objective is None:
        return
    more = sheet.part("trl")
    if objective in SAMPLING:  # the keys are TRL's, with its defaults
        common.put_sampling(more, objective)
        common.put_rewards(more, common.rewards_of_paths(more), "trl.reward_funcs")
        sheet.assume(group_size=8, max_new_tokens=512)
        sheet.rest |= {key: more.take(key) for key in common.WHOLE_ROLLOUT if key in more.rest}
        return
    stated = {"rl_beta": more.take("beta"), "dpo_loss_type": loss}  # they count before the others there
    sheet.rest |= {key: value for key, value in stated.items() if value is not None}
    sheet.drop({"num_labels": (1,)})
    common.put_objective(sheet, objective, RL_OPTIONS)
    common.turn_off_dropout(sheet)


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha and method; an empty `adapter` trains the model itself, as in Axolotl."""
    adapts = "adapter" in sheet.rest
    bits = sheet.one_of("adapter", ADAPTERS)
    pissa = str(sheet.rest.get(INIT)).startswith("pissa") and sheet.take(INIT)
    sheet.drop({INIT: (True,)})
    sheet.refuse(INIT, "other first factors; pissa is here")
    restarts = "relora" if sheet.rest.get("relora_steps") else None
    common.choose_method(sheet, {"pissa": pissa, "relora": restarts, "full": None if adapts else "adapter"})
    if sheet.found["method"] == "relora":
        sheet.copy(RESTARTS)
    common.read_bits(sheet)
    if bits and "bits" not in sheet.found:
        common.put_bits(sheet, "adapter: qlora", bits)
    experts = sheet.rest.get("lora_target_parameters")
    if isinstance(experts, list) and all("experts." in str(name) for name in experts) and len(experts) > 1:
        sheet.take("lora_target_parameters")
        sheet.notes.append("lora_target_parameters: gate and up of the experts have factors of their own here")
        if (named := sheet.found.get("target_modules")) not in (None, "all-linear"):
            sheet.found["target_modules"] = f"{named},all-experts"
    whole = sheet.rest.get("unfrozen_parameters")
    if isinstance(whole, list) and len(whole) > 1 and all(WHOLE.fullmatch(str(one)) for one in whole):
        sheet.take("unfrozen_parameters")


def read_data(sheet: Sheet) -> None:
    """Set the data from all datasets, each with its own form, and from those to validate on."""

    def read_set(one: Sheet, key: str) -> list[dict[str, Any]]:
        kind = one.rest.pop("type", "pretrain" if key == "pretraining_dataset" else None)
        read_format(one, kind, sheet)
        read_columns(one)
        if "chat_template" in one.rest:
            common.read_template(one, "chat_template", sheet.found.get("model"), TEMPLATES)
        one.drop(DETECTED)
        return [common.take_source(one)]

    key = "datasets" if "datasets" in sheet.rest else "pretraining_dataset"
    common.read_sets(sheet, {key: {}, "test_datasets": {"as": "valid"}}, read_set)


def read_columns(dataset: Sheet) -> None:
    """Set the columns, and the names of turns' fields and roles, that a dataset names."""
    chats = common.trains_on_chats(dataset) or dataset.found["objective"] in RATED
    if chats or dataset.rest.get("field_messages") in FIELDS["field_messages"][1]:  # a pair has no such column
        common.read_columns(dataset, FIELDS)
    mapped, told = (dataset.take(key) or {} for key in ("message_property_mappings", "roles"))
    if not (isinstance(mapped, dict) and mapped.keys() <= {"role", "content"}):
        dataset.refuse("message_property_mappings", "only role and content have other names", mapped)
        mapped = {}
    fields = mapped | {name: one for name in ("role", "content") if (one := dataset.take(f"message_field_{name}"))}
    older = {"input": "user", "output": "assistant"}  # of its older type sharegpt
    roles = {str(older.get(name, name)): one for name, one in told.items()}
    keys = {"field_human": "user", "field_model": "assistant"}
    roles |= {role: one for key, role in keys.items() if (one := dataset.take(key))}
    common.put_turn_names(dataset, fields, roles, "roles")


def read_format(dataset: Sheet, kind: Any, whole: Sheet) -> None:
    """Set the form of a dataset's records; alpaca rows keep the alpaca prompt, which Axolotl uses for every model."""
    if kind is None:
        return
    if isinstance(kind, dict):
        read_own_type(dataset, dataset.within(kind, "type"))
        return
    word, chats = re.split("[:.]", str(kind))[0], common.trains_on_chats(dataset)
    if (kind not in ("alpaca", word, f"{word}.default") and chats) or word not in (FORMATS if chats else RECORD_TYPES):
        dataset.refuse("type", "a form of records that is not here; write prompts and answers, or chats", kind)
        return
    if chats:
        dataset.found["data_format"] = FORMATS[word]
        template, own = "alpaca" if kind == "alpaca" else None, word == "sharegpt"
        if word == "chat_template" and not {"chat_template", "chat_template_jinja"} & whole.rest.keys():
            dataset.found["chat_template"] = "own"  # tokenizer_default
    else:  # the records' keys tell the rest
        template, own = RECORD_TYPES[word], word in ("llama3", "zephyr")
    if template:  # whatever the file's own key says
        dataset.found["chat_template"] = template
        whole.take("chat_template")
    elif own:
        dataset.notes.append(
            f"{dataset.prefix}type {kind}: rows are chats here, rendered with the model's own template"
        )


def read_own_type(sheet: Sheet, kind: Sheet) -> None:
    """Set the columns that a type of one's own names; the text around them is the chat template's here."""
    if common.trains_on_chats(sheet):
        question = [
            kind.take(name) for name in ("field_instruction", "field_input") if isinstance(kind.rest.get(name), str)
        ]
        if question and question not in (["instruction"], ["instruction", "input"]):
            sheet.found["prompt_column"] = ",".join(question)
        common.read_columns(kind, OWN_FIELDS)
        if "prompt_column" in sheet.found:
            sheet.assume(completion_column="output")
    else:
        answer = {"field_completion": ("completion_column", ("completion",))}
        common.read_columns(kind, USER_COLUMNS | (answer if sheet.found["objective"] in RATED else {}))
        kind.drop(USER_FIELDS)
    for key in list(kind.rest):
        kind.refuse(key, "the text around prompt and answer is a chat template's here; write it as --chat-template")


def read_template(sheet: Sheet) -> None:
    """Set the chat template, and check the special tokens; Jinja text inside the file has to be in a file of its own here."""
    jinja = str(sheet.rest.get("chat_template_jinja", ""))
    if jinja and not re.search(r"[{\n]", jinja):
        sheet.rest["chat_template"] = sheet.take("chat_template_jinja")
    common.read_template(sheet, "chat_template", sheet.found.get("model"), TEMPLATES)
    common.read_prompts_trained(sheet, "train_on_inputs")
    tokens = sheet.part("special_tokens").rest
    tokens.pop("pad_token", None)
    sheet.put(special_tokens=",".join(f"{name}={tokens.pop(name)}" for name in list(tokens)) or None)
    sheet.leave("eot_tokens", "remove_unused_columns")  # the end of a turn is always trained with it
    plugins = sheet.take("plugins") or []
    for name in plugins if isinstance(plugins, list) else [plugins]:
        if not str(name).endswith(PLUGINS):
            sheet.refuse("plugins", "a program of its own", name)
    if common.trains_on_chats(sheet) and sheet.rest.get("excess_length_strategy") != "truncate":
        sheet.assume(long_rows="drop")
    sheet.drop({"excess_length_strategy": ("truncate", "drop")})


def read_loop(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    whole, rows = sheet.number("batch_size"), sheet.found.get("batch_size")
    if sheet.found.get("objective") not in SAMPLING:  # whose batches are counted in prompts here
        rows = sheet.flags.get("batch_size", rows)
    if "grad_accumulation_steps" in sheet.found or not isinstance(rows, int) or rows < 1:
        sheet.harmless += ["batch_size"] * (
            whole is not None
        )  # rows of the whole step, which the other two keys decide
    elif whole is not None:
        sheet.found["grad_accumulation_steps"] = max(1, round(whole / rows))
    if "warmup_steps" not in sheet.rest:
        sheet.rest.setdefault("warmup_ratio", 0.03)
    common.read_loop(sheet)
    if "warmup_rounding" in sheet.found:
        sheet.found["warmup_rounding"] = "down"
    if sheet.rest.get("freeze_mm_modules") is True:
        sheet.leave("freeze_mm_modules")
    sheet.leave("eta_min", "full_finetune", "test_value")  # which Axolotl does not read
    kind = str(sheet.take("model_type") or "")
    if kind.endswith("Classification") and "objective" not in sheet.found:
        sheet.refuse("model_type", "a head for labels; use --objective classify", kind)
    if "project_name" in sheet.found:
        sheet.found["report_to"] = "wandb"


AXOLOTL = Dialect(
    name="Axolotl",
    recognizes=lambda content: common.two_of(MARKS, content),
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
    rules=(read_kind, read_method, read_data, read_template, read_loop),
    defaults={"weight_decay": 0.0, "epochs": 1.0, "batch_size": 1, "max_seq_length": 512, "valid_fraction": 0.0},
    changes={
        **dict.fromkeys(RESTARTS, "restarts without relora"),
        "chat_template_jinja": "put the text into a file and give it as --chat-template",
        "excess_length_strategy": "a run does not stop at long rows",
        "process_reward_model": "only reward_model is supported; use Axolotl for it",
    },
)
