"""Read Axolotl's settings file.

For what the file leaves out, Axolotl's defaults are used if they change the result: sequence_len 512, one row per
micro-batch, no weight decay, nothing held out, one epoch. Axolotl has no defaults for rank and alpha, so ours are used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migrate import common
from mlx_lora.config.migrate.common import RL_OF_AXOLOTL, ROLES, SHARED, Dialect, Names, Sheet, filled
from mlx_lora.config.objectives import RATED, SAMPLING
from mlx_lora.config.rules import OWNERS
from mlx_lora.utils.parsing import hashable

# Keys of its own: neither settings of ours, nor arguments of transformers' trainer, which other tools use too.
MARKS = (
    *("base_model", "micro_batch_size", "sequence_len", "sample_packing", "num_epochs", "val_set_size", "lora_r"),
    *("lora_target_linear", "adapter", "datasets"),
)
NAMES = Names(
    epochs="num_epochs", rows="micro_batch_size", length="sequence_len", packing="sample_packing", schedule="lr_scheduler",
    optimizer="optimizer", held_out="val_set_size", targets="lora_target_modules", all_layers="all-linear",
    modules_to_save="lora_modules_to_save", default_rows=1, default_length=512, default_epochs=1.0,
)  # fmt: skip
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
}
# ReLoRA's cycle. Jagged restarts without ReLoRA are another schedule, which is not supported.
RESTARTS = {
    "relora_steps": "relora_every",
    "jagged_restart_steps": "relora_every",
    "relora_warmup_steps": "relora_warmup",
    "jagged_restart_warmup_steps": "relora_warmup",
    "relora_prune_ratio": "relora_prune_ratio",
}
# The first word of a dataset's type -> our format.
FORMATS = {
    "alpaca": "alpaca", "alpaca_chat": "alpaca", "sharegpt": "sharegpt", "completion": "text", "pretrain": "text",
    "chat_template": "auto",
}  # fmt: skip
# The first word of a preference data set's type -> the chat template that it means; None: the model's own.
RECORD_TYPES = {"chatml": "chatml"} | dict.fromkeys(
    ("llama3", "chat_template", "user_defined", "zephyr", "passthrough", "bradley_terry")
)
# Values of a dataset that we do not need, because we detect its format.
DETECTED = {
    "ds_type": ("json", "parquet", "csv", "text", "arrow"),
    "split": ("train",),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
    "roles_to_train": (["assistant"], ["gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "chat_template": ("tokenizer_default",),
}
# Keys of a dataset that name columns -> our setting, and the names that need no setting.
FIELDS = {
    "field": ("text_column", ("text",)),
    "text_column": ("text_column", ("text",)),
    "field_messages": ("chat_column", ("messages", "conversations", "conversation")),
    "field_system": ("system_column", ("system",)),
}
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


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file has two of Axolotl's own keys, and not our key for the model."""
    return "model" not in content and sum(key in content for key in MARKS) >= 2


def read_kind(sheet: Sheet) -> None:
    """Set the objective; refuse training that is neither supervised nor on preferences."""
    asked = hashable(sheet.take("rl"))
    if asked and asked not in RL_OF_AXOLOTL:
        raise sheet.refusal(f"rl {asked}: only {', '.join(RL_OF_AXOLOTL)} are supported; use Axolotl for it")
    objective, loss = RL_OF_AXOLOTL.get(asked, (None, None))
    if objective in SAMPLING:
        read_sampling(sheet, objective)
        return
    if objective:
        more = sheet.part("trl")
        if "beta" in more.rest:  # it counts before the others there
            sheet.rest["rl_beta"] = more.take("beta")
        more.leave_rest()
        if loss:
            sheet.rest["dpo_loss_type"] = loss
        if objective in OWNERS["simpo_gamma"]:
            common.note_plain_simpo(sheet)
        common.put_objective(sheet, objective, RL_OPTIONS)
        common.turn_off_dropout(sheet)
        sheet.take("precompute_ref_log_probs")  # we always do
    if sheet.switch("reward_model"):
        common.put_objective(sheet, "reward", {"center_rewards_coefficient": "center_rewards"})
        common.turn_off_dropout(sheet)
    if asked := sheet.take("process_reward_model"):
        raise sheet.refusal(f"process_reward_model {asked}: only reward_model is supported; use Axolotl for it")


def read_sampling(sheet: Sheet, objective: str) -> None:
    """Set what samples and rewards answers, from the keys under `trl:`; they are TRL's, with its defaults."""
    more = sheet.part("trl")
    common.put_sampling(more, objective)
    common.put_rewards(more, common.rewards_of_paths(more), "trl.reward_funcs")
    sheet.assume(group_size=8, max_new_tokens=512)
    sheet.rest |= {key: more.take(key) for key in common.WHOLE_ROLLOUT if key in more.rest}
    more.leave_rest()
    common.keep_cycles(sheet)


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha and method; an empty `adapter` trains the model itself, as in Axolotl."""
    adapter = sheet.take("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise sheet.refusal(f"adapter {adapter}: not supported; use lora or qlora")
    if adapter:
        sheet.copy({"lora_r": "rank", "lora_alpha": "alpha"}, Sheet.number)
    restarts, init = {key: sheet.number(key) for key in RESTARTS}, sheet.take("peft_init_lora_weights")
    pissa = "peft_init_lora_weights" if str(init).startswith("pissa") else None
    if init not in (None, True) and not pissa:
        sheet.left_out.append("peft_init_lora_weights")
    common.choose_method(
        sheet,
        {"dora": "peft_use_dora", "rslora": "peft_use_rslora", "relora": "relora"},
        {
            "pissa": pissa,
            "relora": "relora" if restarts["relora_steps"] else None,
            "full": None if adapter else "adapter",
        },
    )
    stated = {key: value for key, value in restarts.items() if value is not None}
    if sheet.found["method"] == "relora":
        sheet.found |= {RESTARTS[key]: value for key, value in stated.items()}
    else:
        sheet.left_out += stated
    common.read_bits(sheet)
    if adapter == "qlora" and "bits" not in sheet.found:
        common.put_bits(sheet, "adapter: qlora", 4)
    if sheet.switch("lora_target_linear"):  # beside the layers that are named
        sheet.rest[NAMES.targets] = "all-linear"
    common.read_layers(sheet, NAMES)


def read_data(sheet: Sheet) -> None:
    """Set data, format and template from the first dataset."""
    key = "datasets" if "datasets" in sheet.rest else "pretraining_dataset"
    sets = common.take_sets(sheet, key)
    told = sets or [{}]
    common.put_sets(sheet, key, [data_path(one) for one in told], all(one == told[0] for one in told))
    first = sheet.within(told[0], key)
    kind = first.rest.pop("type", "pretrain" if key == "pretraining_dataset" and sets else None)
    read_format(sheet, kind, f"{key}.type")
    read_columns(first)
    if kind == "chat_template" and "chat_template" in first.rest:
        sheet.rest["chat_template"] = first.take("chat_template")
    first.drop(DETECTED)
    first.leave_rest()


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


def read_columns(dataset: Sheet) -> None:
    """Set the columns, and the names of turns' fields and roles, that a dataset names."""
    chats = common.trains_on_chats(dataset) or dataset.found["objective"] in RATED
    if chats or dataset.rest.get("field_messages") in FIELDS["field_messages"][1]:  # a pair has no such column
        common.read_columns(dataset, FIELDS)
    fields: dict[str, Any] = {}
    mapped = dataset.rest.get("message_property_mappings")
    if isinstance(mapped, dict) and mapped.keys() <= {"role", "content"}:
        fields |= dataset.take("message_property_mappings")
    for name in ("role", "content"):
        if isinstance(dataset.rest.get(f"message_field_{name}"), str):
            fields[name] = dataset.take(f"message_field_{name}")
    roles: dict[str, Any] = {}
    told = dataset.rest.get("roles")
    if isinstance(told, dict) and told.keys() <= set(ROLES):
        roles |= dataset.take("roles")
    elif isinstance(told, dict) and told.keys() <= {"input", "output"}:  # of its older type sharegpt
        roles |= {{"input": "user", "output": "assistant"}[name]: one for name, one in dataset.take("roles").items()}
    for name, role in (("field_human", "user"), ("field_model", "assistant")):
        if isinstance(dataset.rest.get(name), str):
            roles[role] = dataset.take(name)
    common.put_turn_names(dataset, fields, roles, f"{dataset.prefix}roles")


def read_format(sheet: Sheet, kind: Any, key: str) -> None:
    """Set the record format; alpaca rows keep the alpaca prompt, which Axolotl uses for every model."""
    if kind is None:
        return
    if isinstance(kind, dict):
        read_own_type(sheet, sheet.within(filled(kind), key), key)
        return
    word, chats = re.split("[:.]", str(kind))[0], common.trains_on_chats(sheet)
    if word not in (FORMATS if chats else RECORD_TYPES):
        sheet.left_out.append(key)
        sheet.note(f"{key}: has no counterpart here; the format is detected from the records' keys")
        return
    if chats:
        sheet.found["data_format"] = FORMATS[word]
        template, own = "alpaca" if kind == "alpaca" else None, word in ("alpaca", "alpaca_chat", "sharegpt")
    else:  # the records' keys tell the rest
        template, own = RECORD_TYPES[word], word in ("llama3", "zephyr")
    if template:  # whatever the file's own key says
        sheet.found["chat_template"] = template
        sheet.take("chat_template")
        sheet.note(f"{key} {kind}: rows get the {template} prompt, as in Axolotl; --chat-template sets another")
    elif own:
        sheet.note(f"{key} {kind}: rows are chats here, rendered with the model's own template")


def read_own_type(sheet: Sheet, kind: Sheet, key: str) -> None:
    """Set the columns that a type of one's own names; the text around them is the chat template's here."""
    if common.trains_on_chats(sheet):
        asked = [name for name in ("field_instruction", "field_input") if isinstance(kind.rest.get(name), str)]
        question = [kind.take(name) for name in asked]
        if question and question not in (["instruction"], ["instruction", "input"]):
            sheet.found["prompt_column"] = ",".join(question)
        common.read_columns(kind, OWN_FIELDS)
        if "prompt_column" in sheet.found:
            sheet.assume(completion_column="output")
        sheet.note(f"{key}: --chat-template gives the text around prompt and answer")
    else:
        answer = {"field_completion": ("completion_column", ("completion",))}
        common.read_columns(kind, USER_COLUMNS | (answer if sheet.found["objective"] in RATED else {}))
        kind.drop(USER_FIELDS)
        if kind.rest:
            sheet.note(f"{key}: columns are found by their names, and --chat-template gives the text around them")
    kind.leave_rest()


def read_template(sheet: Sheet) -> None:
    """Set the chat template; Jinja text inside the file is not supported, because ours must be in its own file."""
    jinja = sheet.take("chat_template_jinja")
    if jinja and re.search(r"[{\n]", str(jinja)):
        sheet.left_out.append("chat_template_jinja")
        sheet.note("chat_template_jinja: put the text into a file and give it as --chat-template")
    elif jinja:
        sheet.found["chat_template"] = jinja
    if jinja:
        sheet.take("chat_template")
    name = str(sheet.rest.get("chat_template") or "")
    if name.startswith("tokenizer_default_fallback_"):
        sheet.take("chat_template")
        sheet.note(f"chat_template {name}: the model's own template is used, or alpaca if it has none")
    common.read_template(sheet, "chat_template", "tokenizer_default")
    common.read_prompts_trained(sheet, "train_on_inputs")


def read_loop(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    rows = sheet.rest.get("micro_batch_size")
    if not common.samples(sheet):  # whose batches are counted in prompts here
        rows = sheet.told("batch_size", rows)
    if "gradient_accumulation_steps" in sheet.rest or not isinstance(rows, int) or rows < 1:
        sheet.leave("batch_size")  # rows of the whole step, which the other two keys decide
    elif "batch_size" in sheet.rest:
        sheet.found["grad_accumulation_steps"] = max(1, round((sheet.number("batch_size") or 0) / rows))
    common.read_loop(sheet, NAMES)
    if sheet.rest.get("evals_per_epoch") == 0:
        sheet.take("evals_per_epoch")
        sheet.found["val_batches"] = 0
    if sheet.rest.get("wandb_project"):
        sheet.found["report_to"] = "wandb"


AXOLOTL = Dialect(
    name="Axolotl",
    recognizes=recognizes,
    rules=(read_kind, read_method, read_data, read_template, read_loop),
    names={
        **SHARED,
        "base_model": "model",
        "revision_of_model": "revision",
        "lora_dropout": "dropout",
        "wandb_project": "project_name",
    },
    defaults={"weight_decay": 0.0},
)
