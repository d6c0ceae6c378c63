"""Check settings and their combinations before anything is loaded, and report all problems at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import date
from typing import Any

from mlx_lora.config.fields import flag_of
from mlx_lora.config.objectives import IMITATION, LABELED, PAIRS, RANKED, SAMPLING, VERIFIERS
from mlx_lora.config.optimizers import OPTIMIZERS
from mlx_lora.config.presets import PRESETS, START_ANEW
from mlx_lora.config.settings import FIELDS, LOGGERS, ROWS, SHARDING, parse_pattern
from mlx_lora.utils.text import command_line

COLUMNS = ("prompt_column", "completion_column", "system_column", "chat_column", "text_column")
TURN_FIELDS, TURN_ROLES = ("role", "content"), ("system", "user", "assistant", "tool")
CONVERSATION_GAP = FIELDS["conversation_gap"].default
CHECKPOINTING = ("none", "auto", "selective", "block")


def is_day(text: str) -> bool:
    """Return whether a text is a date in the form 2026-11-26."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def settings_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return every problem in a run's settings; settings are spelled as flags.

    Args:
        settings: all of them by field name, with the right types.
    """
    problems, mode = [], settings["grad_checkpoint"]
    if mode not in CHECKPOINTING and not (mode.isdecimal() and 1 <= int(mode) < 10**6):
        problems.append(f"--grad-checkpoint {mode!r}: not one of {', '.join(CHECKPOINTING)}, or a number of at least 1")
    if settings["chat_date"] is not None and not is_day(settings["chat_date"]):
        problems.append(f"--chat-date {settings['chat_date']!r}: not a date; write it like 2026-11-26")
    problems += _adapter_problems(settings)
    problems += sharing_problems(settings)
    asked, shared = settings["parallel"], settings["shard_base"]
    if asked != "data" and shared != "off":
        problems.append(
            f"--shard-base {shared} with --parallel {asked}: it decides what each process has; leave out one of the two"
        )
    if settings["train"] is False:
        flags = {flag_of(name): settings[name] for name in ("model", "adapter_path", "data")}
        words = ["evaluate", *(word for flag, value in flags.items() if value for word in (flag, value))]
        problems.append(f"--no-train: to measure an adapter, run `{command_line(words)}`; or give --test alone")
    if settings["iters"] is not None and settings["epochs"] is not None:
        problems.append("--iters and --epochs: both given; keep one")
    loggers = [name.strip().lower() for name in (settings["report_to"] or "").split(",")]
    if settings["report_to"] and not set(loggers) <= set(LOGGERS):
        problems.append(f"--report-to {settings['report_to']}: only {', '.join(LOGGERS)}, by comma")
    problems += _data_problems(settings) + _validation_problems(settings)
    return problems + _rollout_problems(settings) + _teacher_problems(settings)


def idle_notes(settings: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Return a line for each setting that the user gave and that another one makes idle.

    They are not refused: a run of an earlier version has them in its run.yaml and in its identity, and other programs' files too.

    Args:
        settings: all of them by field name.
        given: names of those that the user gave as flags.
    """
    notes, optimizer = [], settings["optimizer"]
    if (
        "weight_decay" in given
        and settings["weight_decay"]
        and optimizer in OPTIMIZERS
        and not OPTIMIZERS[optimizer].takes_decay
    ):
        notes.append(
            f"--weight-decay {settings['weight_decay']:g} has no effect with --optimizer {optimizer}; adamw has it"
        )
    if settings["method"] == "full":
        notes += [
            f"{flag_of(name)} has no effect with --method full, which has no adapter weights"
            for name in ("rank", "alpha")
            if name in given
        ]
    if "project_name" in given and not settings["report_to"]:
        notes.append("--project-name has no effect without --report-to")
    if "test_batches" in given and not settings["test"]:
        notes.append("--test-batches has no effect without --test")
    return notes


def _teacher_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the problems of a run with a teacher."""
    problems = []
    if settings["objective"] != "distill":
        return problems  # the objective refuses settings of a teacher
    if not settings["teacher"] and not settings["teacher_prompt"]:
        problems.append(
            "--objective distill without a teacher: give --teacher MODEL, or --teacher-prompt FILE to make the untrained "
            "model with that prompt the teacher"
        )
    if settings["own_prompts"] and settings["data"]:
        problems.append("--own-prompts with --data: the prompts are in the data; leave out one of the two")
    if settings["jsd_beta"] != 0.5 and settings["divergence"] != "jsd":
        problems.append("--jsd-beta without --divergence jsd: only that uses it; leave it out")
    if settings["teacher_prompt"] and not settings["mask_prompt"]:
        problems.append(
            "--no-mask-prompt with --teacher-prompt: the two see other prompts, so only answers can be compared; leave it out"
        )
    return problems


def shard_parts(text: str) -> list[float] | None:
    """Return the parts by rank that --shard-base names, such as 3:1; None for other texts."""
    parts = text.split(":")
    if len(parts) < 2 or not all(part.isdecimal() and 1 <= int(part) <= 10**6 for part in parts):
        return None
    return [float(part) for part in parts]


def sharing_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return what a run whose base is shared by its processes cannot do."""
    shared, problems = settings["shard_base"], _offload_problems(settings)
    if shared not in (*SHARDING, "off") and shard_parts(shared) is None:
        problems.append(f"--shard-base {shared!r}: not off, {', '.join(SHARDING)}, or parts by rank such as 3:1")
    if shared == "off":
        return problems
    with_it = f"with --shard-base {shared}"
    if settings["objective"] == "distill" and not settings["on_policy"]:
        problems.append(f"--objective distill {with_it}: a teacher needs the whole base in one process; leave it out")
    if settings["cache_trunk"] == "on":
        problems.append(f"--cache-trunk on {with_it}: works in a single process only; leave it out")
    return problems + divided_problems(settings, with_it)


def _offload_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return what a run that reads its base from files cannot do."""
    if settings["offload_base"] == "on":
        return offload_problems(settings)
    if settings["offload_activations"]:
        return [
            "--offload-activations: works with --offload-base on; add that flag, or leave --offload-activations out"
        ]
    return []


def offload_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return why a run cannot read its base from files."""
    with_it = "with --offload-base on"
    problems = divided_problems(settings, with_it)
    if settings["reference_adapter"]:
        problems.append(
            f"--reference-adapter {with_it}: its answers are computed with the whole base in memory; leave it out to compare with "
            "the model as it is, or leave --offload-base out"
        )
    if settings["shard_base"] != "off" or settings["parallel"] != "data":
        other = "--shard-base" if settings["shard_base"] != "off" else "--parallel"
        problems.append(f"{other} {with_it}: each is another way to divide the base; leave out one of the two")
    return problems


def divided_problems(settings: Mapping[str, Any], with_it: str) -> list[str]:
    """Return what a run that has a block's weights only while it computes the block cannot do; `with_it` names its flag."""
    problems = []
    if settings["grad_checkpoint"] not in ("auto", "selective", "block", "1"):
        problems.append(
            f"--grad-checkpoint {settings['grad_checkpoint']} {with_it}: each block must be computed again in the "
            "backward pass; give block or selective, or leave it out"
        )
    method = settings["method"]
    if method in ("pissa", "full", "relora"):
        problems.append(f"--method {method} {with_it}: it needs or changes whole weights; use lora or dora")
    if settings["qat"]:
        problems.append(f"--qat {with_it}: it computes each layer's whole fused weight; leave out one of the two")
    if settings["modules_to_save"]:
        problems.append(
            f"--modules-to-save {with_it}: weights that are trained cannot be shared; leave out one of the two"
        )
    if settings["objective"] in SAMPLING or (settings["objective"] == "distill" and settings["on_policy"]):
        problems.append(
            f"--objective {settings['objective']} {with_it}: sampling needs the whole base in one process; leave it out"
        )
    if settings["reference_adapter"]:
        problems.append(
            f"--reference-adapter {with_it}: it is put on the whole base; leave out one of the two (without it, the "
            "untrained model is the reference)"
        )
    if settings["decode_weights"] == "dense":
        problems.append(f"--decode-weights dense {with_it}: no process has the whole weights; leave out one of the two")
    return problems


def _rollout_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the problems of a run that samples its answers.

    These are intervals that would save or end it between two updates on the same answers, and a reference that it cannot
    go back to.
    """
    updates, problems = settings["updates_per_rollout"], _task_problems(settings)
    if settings["objective"] not in SAMPLING and not settings["on_policy"]:
        return problems
    if settings["kl_beta"] and settings["method"] == "relora":
        problems.append(
            "--kl-beta with --method relora: relora merges its finished cycles into the model, so the untrained model is gone; leave out one of the two"
        )
    if updates == 1:
        return problems
    return problems + [
        f"{flag_of(name)} {settings[name]} with --updates-per-rollout {updates}: give a multiple of {updates}"
        for name in ("iters", "save_every", "steps_per_eval")
        if settings[name] and settings[name] % updates
    ]


def _task_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the problem of data that are not the tasks of the run's environment."""
    data, environment = settings["data"], settings["environment"] or ""
    of_environment = data == environment or str(data).rpartition(":")[0] == environment
    if data and environment.startswith(VERIFIERS) and not of_environment:
        words = f"the environment has its own tasks; leave --data out, or give {environment}:1000 for that many"
        return [f"--data {data} with --environment {environment}: {words}"]
    return []


def _data_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return a problem for each setting of the data that the objective would ignore."""
    objective, problems = settings["objective"], _column_problems(settings)
    imitates = objective in IMITATION and not settings["on_policy"]
    if settings["pairs"] != "best" and objective not in PAIRS:
        problems.append(
            f"--pairs {settings['pairs']} with --objective {objective}: it reads no pairs; leave --pairs out"
        )
    if settings["rephrase"] is not None and objective != "sft":
        problems.append(
            f"--rephrase with --objective {objective}: only sft trains on rephrased questions; leave it out"
        )
    if settings["rephrase_model"] is not None and settings["rephrase"] is None:
        problems.append(
            "--rephrase-model without --rephrase: say how many wordings of each question, as in --rephrase 3"
        )
    if settings["fetch_images"] and objective != "vision_sft" and not settings["images"]:
        problems.append(
            f"--fetch-images with --objective {objective}: pictures are only shown with --objective vision_sft or --images; "
            "leave it out"
        )
    if not imitates and settings["data_format"] != "auto":
        what = "prompts" if objective in (*SAMPLING, "distill") else "preference data"
        what = (
            "texts with labels" if objective in LABELED else "queries with documents" if objective in RANKED else what
        )
        problems.append(
            f"--data-format {settings['data_format']} with --objective {objective}: the format of {what} is "
            "recognized by its keys; leave out --data-format"
        )
    if settings["speaker"] is not None and settings["data_format"] != "auto":
        problems.append(
            f"--speaker with --data-format {settings['data_format']}: a chat export is recognized by its content; leave "
            "--data-format out"
        )
    if settings["conversation_gap"] != CONVERSATION_GAP and settings["speaker"] is None:
        problems.append("--conversation-gap without --speaker: only that uses it; leave it out")
    if settings["label_column"] is not None and objective not in LABELED:
        problems.append(
            f"--label-column with --objective {objective}: only {', '.join(LABELED)} reads labels; leave it out"
        )
    if not imitates and not settings["mask_prompt"]:
        problems.append(f"--no-mask-prompt with --objective {objective}: only answers are trained; leave it out")
    return problems


def _column_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the named columns that the objective or the format does not read, and names that are none."""
    objective, problems = settings["objective"], []
    given = [name for name in COLUMNS if settings[name]]
    if given and settings["data_format"] != "auto":
        flags = " and ".join(map(flag_of, given))
        problems.append(
            f"{flags} with --data-format {settings['data_format']}: the columns already determine the format; leave --data-format out"
        )
    read = ("prompt_column", "system_column") if objective in PAIRS else COLUMNS
    read = ("text_column", "chat_column") if objective in LABELED else () if objective in RANKED else read
    read = [name for name in read if objective != "kto" or name != "text_column"]
    if objective not in IMITATION and (unread := [flag_of(name) for name in given if name not in read]):
        problems.append(f"{' and '.join(unread)} with --objective {objective}: it reads no such column; leave it out")
    try:
        turn_names(settings["turn_names"])
    except ValueError as error:
        problems.append(
            f"--turn-names {error}: write {' or '.join((*TURN_FIELDS, *TURN_ROLES))}, then = and the name in the data"
        )
    return problems


def turn_names(text: str | None) -> dict[str, dict[str, str]]:
    """Read `role=speaker,user=customer` as the fields {speaker: role} and the roles {customer: user}.

    Raises:
        ValueError: a part is not written like this; the message has it.
    """
    found: dict[str, dict[str, str]] = {"fields": {}, "roles": {}}
    for part in (text or "").split(","):
        ours, _, theirs = (word.strip() for word in part.partition("="))
        kind = "fields" if ours in TURN_FIELDS else "roles" if ours in TURN_ROLES else None
        if part.strip() and (kind is None or not theirs):
            raise ValueError(repr(part.strip()))
        if kind:
            found[kind][theirs] = ours
    return found


def _validation_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return a problem for each setting that needs validations or checkpoints if the run has none."""
    problems = []
    asking = [name for name in ("keep_best", "early_stopping_patience") if settings[name]]
    asking += ["metric_for_best_model"] if settings["metric_for_best_model"] != "loss" else []
    asking += ["eval_tasks"] if settings["eval_tasks"] and settings["val_batches"] == 0 else []
    for flag in map(flag_of, asking):
        if settings["val_batches"] == 0:
            problems.append(f"{flag} with --val-batches 0: no validation takes place; leave out one of the two")
        elif settings["steps_per_eval"] == 0:
            problems.append(
                f"{flag} with --steps-per-eval 0: the only validation is at the end; give a number of steps"
            )
    if settings["metric_for_best_model"] == "task" and not settings["eval_tasks"]:
        problems.append("--metric-for-best-model task without --eval-tasks: there is no score; give both")
    of_tasks = ("eval_metric", "eval_rows", "eval_max_tokens", "eval_chat_template")
    if not settings["eval_tasks"] and (given := [n for n in of_tasks if settings[n] != FIELDS[n].default]):
        flags = " and ".join(map(flag_of, given))
        problems.append(f"{flags} without --eval-tasks: there is no task; leave it out")
    if settings["keep_best"] and settings["save_every"] == 0:
        problems.append(
            "--keep-best with --save-every 0: there is no checkpoint to go back to; leave out one of the two"
        )
    if settings["early_stopping_threshold"] and not settings["early_stopping_patience"]:
        problems.append(
            "--early-stopping-threshold without --early-stopping-patience: nothing ends the run early; give both"
        )
    return problems


def _tower_problems(settings: Mapping[str, Any], way: str) -> list[str]:
    """Return why a vision tower or its connector cannot be trained as these settings say."""
    problems, method = [], settings["method"]
    if settings["objective"] != "vision_sft" and not settings["images"]:
        problems.append(
            f"with --objective {settings['objective']}: pictures are only shown with --objective vision_sft or --images; "
            "leave it out"
        )
    if way == "lora" and method == "full":
        problems.append("with --method full: it trains whole layers; give full")
    if settings["qat"]:
        problems.append("with --qat: a tower stays in float, and is not rounded; leave one of them out")
    return problems


def _adapter_problems(adapter: Mapping[str, Any]) -> list[str]:
    """Return a problem for each setting that the method would ignore or does not support."""
    method, problems = adapter["method"], []
    for owner in PRESETS:
        given = [name for name, row in ROWS.items() if row.method == owner != method and adapter[name] is not None]
        if given:
            flags = " and ".join(map(flag_of, given))
            problems.append(f"{flags} with --method {method}: only --method {owner} uses it; leave it out")
    if method == "full":
        given = [name for name in ("rank_pattern", "alpha_pattern", "modules_to_save") if adapter[name]]
        given += [name for name in ("dropout",) if adapter[name]]
        given += ["bias"] if adapter["bias"] != "none" else []
        if given:
            flags = " and ".join(map(flag_of, given))
            problems.append(
                f"{flags} with --method full: it trains the modules in --target-modules and nothing else; leave it out"
            )
    problems += [
        f"--{name} {adapter[name.replace('-', '_')]} {with_it}"
        for name in ("train-connector", "train-vision")
        if adapter[name.replace("-", "_")]
        for with_it in _tower_problems(adapter, adapter[name.replace("-", "_")])
    ]
    if adapter["qat"] and method == "full":
        problems.append("--qat with --method full: it trains float weights, which are not rounded; leave it out")
    if adapter["qat"] and method == "qa-lora":
        problems.append("--qat with --method qa-lora: it fuses without rounding; leave --qat out")
    if adapter["qat"] and adapter["dropout"]:
        problems.append(
            f"--dropout {adapter['dropout']:g} with --qat: a fused weight has no input of its own to drop; leave one of them out"
        )
    if method in START_ANEW and adapter["resume_adapter_file"]:
        problems.append(
            f"--resume-adapter-file with --method {method}: it cannot start from LoRA weights; "
            + (
                "fuse them, and train on the fused model"
                if method == "adalora"
                else "continue with --method lora and the file's rank"
            )
        )
    if method == "adalora" and (
        adapter["rank_pattern"] or (adapter["adalora_init_rank"] or adapter["rank"]) < adapter["rank"]
    ):
        what = "--rank-pattern" if adapter["rank_pattern"] else f"--adalora-init-rank {adapter['adalora_init_rank']}"
        problems.append(
            f"{what} with --method adalora: it reduces all ranks from one initial rank to --rank; leave it out"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        try:
            values = parse_pattern(adapter[name])
        except ValueError as error:
            problems.append(f"{flag_of(name)} {error}: write name=number, separated by commas")
            continue
        whole = name == "rank_pattern"
        bad = [key for key, value in values.items() if not 0 < value < 1e9 or (whole and value != int(value))]
        if bad:
            kind = "a whole number of at least 1" if whole else "more than 0"
            problems.append(f"{flag_of(name)} {', '.join(bad)}: must be {kind}")
    return problems
