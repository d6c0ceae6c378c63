"""Read LLaMA-Factory's settings file, and its dataset_info.json.

For what the file leaves out, LLaMA-Factory's defaults are used if they change the result: rank 8, alpha twice the rank,
8 rows per micro-batch, three epochs at 5e-5 with linear decay and no warm-up, no weight decay, nothing held out.

LLaMA-Factory refers to datasets by name; dataset_info.json in dataset_dir (`data`) lists the file or hub id of each, and what
its columns, fields and roles are called. It is read if it exists, relative to the working folder as in LLaMA-Factory; without
it, give the data with --data. `--data FOLDER` reads the table of a folder, too: its only set, or `--data FOLDER/NAME`.

    {"shop": {"file_name": "shop.json", "columns": {"prompt": "frage", "query": "dazu", "response": "antwort"}},
     "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "dialog"},
               "tags": {"role_tag": "wer", "content_tag": "was", "user_tag": "kunde", "assistant_tag": "shop"}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lora.config.fields import source_text
from mlx_lora.config.migrate.common import (
    METHODS,
    PREFERENCE_LOSSES_OF_LLAMA_FACTORY,
    SHARED,
    STAGES_OF_LLAMA_FACTORY,
    TRANSFORMERS,
    VALUES,
    Dialect,
    Sheet,
    choose_method,
    put_objective,
    put_pair,
    put_turn_names,
    read_columns,
    read_loop,
    read_prompts_trained,
    read_reference,
    read_sets,
    read_template,
    texts,
    trains_on_chats,
    turn_off_dropout,
    two_of,
)
from mlx_lora.config.objectives import IMITATION, PAIRS, RATED, VERIFIERS
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import did_you_mean

KINDS = {kind: kind for kind in ("lora", "freeze", "full")}
PREFERENCE_OPTIONS = {
    "pref_loss": "loss_type",
    "pref_beta": "beta",
    "simpo_gamma": "simpo_gamma",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "ref_model_adapters": "reference_adapter",
}
TABLE = "dataset_info.json"
SETS = {"dataset": {}, "eval_dataset": {"as": "valid"}}
# Its templates with the text of one of ours, or of the model's own: those of which this was seen.
TEMPLATES = {
    **dict.fromkeys(("qwen3_nothink", "qwen3_5_nothink"), "chatml"),
    **dict.fromkeys(("qwen3", "qwen3_5", "qwen3_vl"), "chatml_thoughts"),
    **dict.fromkeys(
        ("qwen", "qwen2_vl", "qwen3_vl_nothink", "gemma", "gemma2", "gemma3", "falcon_h1", "deepseek3", "mistral"),
        "own",
    ),
}
SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url")
# What a set's columns and tags may say without a word from us, because we detect it.
COLUMNS = {
    "messages": ("conversations", "conversation", "messages", "completion"),
    "prompt": ("instruction", "question", "prompt", "input"),
    "query": ("input",),
    "response": ("output", "completion"),
    "history": ("history",),
    "system": ("system",),
    "tools": ("tools",),
    "images": ("images", "image"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "kto_tag": ("kto_tag", "label"),
}
TAGS = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
# A tag -> our role.
ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}


def read_kind(sheet: Sheet) -> None:
    """Set the objective, its loss and its options; `pref_loss` chooses among the losses on pairs."""
    if sheet.rest.get("stage") == "pt":
        sheet.found["data_format"] = "text"
        sheet.rest.setdefault("packing", True)  # the default in this stage
    objective = sheet.one_of("stage", STAGES_OF_LLAMA_FACTORY)
    if objective in (None, *IMITATION):
        return
    loss = sheet.rest.setdefault("pref_loss", "sigmoid")
    chosen, loss_type = sheet.one_of("pref_loss", PREFERENCE_LOSSES_OF_LLAMA_FACTORY) or (objective, None)
    if objective in PAIRS and objective != "reward":
        objective = chosen
        sheet.put(loss_type=loss_type)
        if objective in RATED:
            sheet.notes.append(f"pref_loss {loss}: each pair becomes a good and a bad answer for {objective}")
    put_objective(sheet, objective, PREFERENCE_OPTIONS)
    if objective != "reward":
        turn_off_dropout(sheet)
    read_reference(sheet, sheet.found.get("model"), "ref_model")


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha (twice the rank unless given) and method."""
    kind = sheet.one_of("finetuning_type", KINDS) or "lora"
    if kind == "lora":
        sheet.assume(rank=8)
        sheet.assume(alpha=2 * sheet.told("rank"))
    others = {"full": None if kind == "lora" else "finetuning_type"}
    choose_method(sheet, others, {**METHODS, "pissa_init": "pissa"})
    if kind == "freeze":  # which trains some last blocks in full
        sheet.rest.setdefault("freeze_trainable_layers", 2)
        blocks = sheet.number("freeze_trainable_layers") or 0
        if blocks < 1:
            raise sheet.refusal(f"freeze_trainable_layers {blocks}: training only the first blocks is not supported")
        modules = ",".join(texts(sheet.take("freeze_trainable_modules")))
        sheet.found |= {"num_layers": blocks, "target_modules": "*.layers.*" if modules in ("", "all") else modules}


def read_data(sheet: Sheet) -> None:
    """Set the data from the table's sets, the first rows of each, those to validate on, mask_prompt, and the chat template."""
    folder, most = Path(str(sheet.take("dataset_dir") or "data")), sheet.number("max_samples")

    def read_set(one: Sheet, key: str) -> list[dict[str, Any]]:
        name = str(one.take("path"))
        one.prefix = ""  # of the table's keys
        path, part = (None, {}) if "data" in sheet.flags else find_dataset(one, name, folder)
        if path is None:
            one.refuse(key, f"not in {folder / TABLE}; give the file itself as --data", name, "data")
            return []
        return [{"path": path, **part} | ({"split": f"{part.get('split', 'train')}[:{most}]"} if most else {})]

    sheet.rest |= {key: list(filter(None, texts(sheet.take(key)))) for key in SETS if key in sheet.rest}
    read_sets(sheet, SETS, read_set)
    sheet.take("interleave_probs")
    read_prompts_trained(sheet, "train_on_prompt")
    text = {"empty": None} if sheet.found.get("data_format") == "text" else {}
    read_template(sheet, "template", "", TEMPLATES | text)
    sheet.put(last_answer=(trains_on_chats(sheet) and sheet.switch("mask_history")) or None)
    if sheet.rest.get("enable_thinking") is False:
        sheet.refuse("enable_thinking", "the empty thought before an answer is not trained")


LLAMA_FACTORY = Dialect(
    name="LLaMA-Factory",
    # By keys of its own; those of transformers' trainer (per_device_train_batch_size) are used by other tools too.
    recognizes=two_of(
        *("model_name_or_path", "stage", "finetuning_type", "template", "cutoff_len", "lora_rank", "lora_target"),
        *("dataset", "dataset_dir", "quantization_bit"),
    ),
    names={
        **SHARED,
        **TRANSFORMERS,
        "model_name_or_path": "model",
        "model_revision": "revision",
        "lora_rank": "rank",
        "lora_target": "target_modules",
        "additional_target": "modules_to_save",
        "cutoff_len": "max_seq_length",
        "val_set_size": "valid_fraction",
        "val_size": "valid_fraction",
        "early_stopping_steps": "early_stopping_patience",
        "adapter_name_or_path": "resume_adapter_file",
        "image_max_pixels": "max_pixels",
        "do_train": "train",
        "overwrite_output_dir": "force",
        "swanlab_project": "project_name",
        "quantization_bit": "bits",
    },
    values={
        **VALUES,
        "use_muon": {True: {"optimizer": "muon"}},
        "disable_gradient_checkpointing": {True: {"grad_checkpoint": False}},
        "freeze_vision_tower": {False: {"train_vision": "full"}, True: {}},
        "freeze_multi_modal_projector": {False: {"train_connector": "full"}, True: {}},
        "mix_strategy": {"concat": {}},
    },
    rules=(read_kind, read_method, read_data, read_loop),
    defaults={
        **{"learning_rate": 5e-5, "lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0, "train_line_break": True},
        **{"epochs": 3.0, "batch_size": 8, "max_seq_length": 2048, "valid_fraction": 0.0},
    },
    nulls={"max_grad_norm": 0},
    changes={"mix_strategy": "sets are joined here; a.jsonl=0.5 sets their shares"},
    harmless=("mask_history", "enable_thinking"),  # of preferences; and true is the default
    others={
        "export_dir": "a file of llamafactory-cli export, which trains nothing; here fuse",
        "infer_backend": "a file of llamafactory-cli chat, which trains nothing; here chat",
        "sample_backend": "a file of llamafactory-cli chat, which trains nothing; here chat",
        "do_predict": "a file of a prediction, which trains nothing; here evaluate",
    },
)


# dataset_info.json


def find_dataset(sheet: Sheet, name: str, folder: Path) -> tuple[str | None, dict[str, str]]:
    """Find a set in the table of a folder, and set what it says of columns, fields and roles.

    Returns:
        Its file or hub id, None if the table or the entry is missing; and the options that name a part of it.

    Raises:
        InputError: the table is not a JSON object, or names no text as the source.
    """
    table = folder / TABLE
    entry = read_json(table, "fix it, or give --data").get(name) if table.is_file() else None
    if not isinstance(entry, dict):
        return None, {}
    source = entry.get("file_name") or entry.get("hf_hub_url")
    if source is not None and (not isinstance(source, str) or VERIFIERS in source):  # which would run code
        raise InputError(f"{table}: the source of {name} is no file and no hub id; fix it, or give --data")
    part = {key: entry[key] for key in ("subset", "split") if entry.get(key) not in (None, "train")}
    for key in ("num_samples", "folder"):
        sheet.refuse(f"{TABLE} {name}.{key}", "a sample of the set", entry.get(key))
    columns = _names(sheet, entry.get("columns"), COLUMNS, f"{TABLE} {name}.columns")
    tags = _names(sheet, entry.get("tags"), TAGS, f"{TABLE} {name}.tags")
    if sheet.found.get("data_format") == "text":  # LLaMA-Factory's prompt is the text there
        read_columns(columns, {"prompt": ("text_column", ("text",))})
    elif columns.rest:
        question = [columns.take(key) for key in ("prompt", "query") if key in columns.rest]
        if entry.get("ranking") or sheet.found.get("objective") in PAIRS:  # whose answers have usual names
            sheet.put(prompt_column=",".join(question) or None)
        else:
            sheet.put(chat_column=columns.take("messages"))
            put_pair(sheet, question, columns.take("response"))
        sheet.put(system_column=columns.take("system"))
        sheet.found.pop("data_format", None)  # the columns tell it
    fields = {tag.removesuffix("_tag"): tags.take(tag) for tag in ("role_tag", "content_tag") if tag in tags.rest}
    roles = {role: tags.take(tag) for tag, role in ROLES.items() if tag in tags.rest}
    put_turn_names(sheet, fields, roles, f"{TABLE} {name}.tags")
    for one in (columns, tags):
        one.drop(COLUMNS | TAGS)
        one.sort_rest()
    return (str(folder / source) if source and entry.get("file_name") else source), part


def _names(sheet: Sheet, given: Any, usual: Mapping[str, tuple[str, ...]], key: str) -> Sheet:
    """Return the names in a table's mapping as a sheet; it is empty if all are detected from the records, or none can be read."""
    given = given or {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        sheet.refuse(key, "no names of columns", given)
        given = {}
    detected = all(name in usual.get(part, ()) for part, name in given.items())
    return sheet.within({} if detected else given, key)


def settings_of_table(data: str) -> dict[str, Any]:
    """Return the settings that a folder's table has for `--data`: the set's file and its columns.

    Args:
        data: a folder with a table, or such a folder and the name of a set in it; for anything else the result is empty.

    Raises:
        InputError: the table has several sets and none is named, or no such set.
    """
    path = Path(data).expanduser()
    folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
    if path.is_file() or not (folder / TABLE).is_file() or any(folder.glob("train[.-]*")):
        return {}
    entries = read_json(folder / TABLE, "fix it, or name a data file as --data")
    sets = [one for one, entry in entries.items() if isinstance(entry, dict) and any(key in entry for key in SOURCES)]
    if not sets:  # datasets writes a file of this name too
        return {}
    if name is None:
        here = [one for one in sets if (folder / str(entries[one].get("file_name", ""))).is_file()]
        if len(here) != 1:
            listed = ", ".join(sets[:8]) + (f" and {len(sets) - 8} more" if len(sets) > 8 else "")
            raise InputError(f"--data {data}: {TABLE} there has the sets {listed}; name one as {folder / sets[0]}")
        name = here[0]
    elif name not in sets:
        if not path.suffix and folder != Path() and (hint := did_you_mean(name, sets)):
            raise InputError(f"--data {data}: no set {name!r} in {folder / TABLE}{hint}")
        return {}  # another file of that folder, or no name of a set at all
    sheet = Sheet(str(folder / TABLE), {})
    source, part = find_dataset(sheet, name, folder)
    if source is None:
        raise InputError(f"--data {data}: {TABLE} there names no file and no hub id for {name}; name a data file")
    return {**sheet.found, "data": source_text({"path": source, **part})}
