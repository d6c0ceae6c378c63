"""Which settings cannot be combined: a table with a row for each rule, and the check of all settings of a run.

    excludes("dropout", "a fused weight has no input of its own to drop", BOTH, qat=GIVEN)
    needs("jsd_beta", "only that uses it", divergence="jsd")

The first row refuses a --dropout with --qat, the second one a --jsd-beta without --divergence jsd. Which objectives and which
method have a setting is in its own row (`only` and `method` in config/settings.py and config/objectives.py). COMMANDS has the
rules of commands' own options, which are no settings of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from datetime import date
from typing import Any

from mlx_lora.config.fields import flag_of
from mlx_lora.config.objectives import (
    ANSWERED,
    COMPARED,
    EMBED_SCORED,
    IMITATION,
    LABELED,
    OBJECTIVES,
    PAIRS,
    RATED,
    SAMPLING,
    SMOOTHED,
    TAUGHT,
    VERIFIERS,
    WITHOUT_COLUMNS,
    ObjectiveSettings,
)
from mlx_lora.config.presets import OPTIMIZERS
from mlx_lora.config.settings import (
    COLUMNS,
    FIELDS,
    LOGGERS,
    ROWS,
    SHARDING,
    TURN_FIELDS,
    TURN_ROLES,
    DataSettings,
    parse_pattern,
    shard_parts,
    turn_names,
)
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import command_line

CHECKPOINTING = ("none", "auto", "selective", "block")
OWNERS = {name: row.only for name, row in ROWS.items() if row.only}  # setting -> the objectives that have it
USUAL = {name: one.default for name, one in FIELDS.items()}
LEAVE_OUT, BOTH, GIVE_BOTH = "leave it out", "leave out one of the two", "give both"
MOST_SHOWN = 40  # characters of a value in a message


def given(name: str, value: Any, usual: Mapping[str, Any] = USUAL) -> bool:
    """Tell whether a value of a setting asks for something: it is not the default, and not empty."""
    default = usual.get(name)
    return value != default and value not in (None, "", ()) and not (value is False and default is None)


GIVEN = given  # as a condition


def other_than(*values: Any) -> Callable[[Any], bool]:
    """Return the condition that a setting has none of some values."""
    return lambda value: value not in values


def without(*values: str) -> Callable[[Any], bool]:
    """Return the condition that a setting, a list by commas, has none of some values."""
    return lambda listed: not set(values) & set(str(listed).split(","))


def holds(settings: Mapping[str, Any], name: str, wanted: Any, usual: Mapping[str, Any] = USUAL) -> bool:
    """Tell whether a setting has a value, one of several, or what a function accepts."""
    value = settings.get(name)
    if wanted is GIVEN:
        return given(name, value, usual)
    return bool(wanted(value)) if callable(wanted) else value in (wanted if isinstance(wanted, tuple) else (wanted,))


def spelled(name: str, value: Any) -> str:
    """Return a setting with a value as on the command line."""
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(f"no_{name}")
    text = f"{value:g}" if isinstance(value, float) else " ".join(value) if isinstance(value, tuple) else str(value)
    return flag_of(name) if callable(value) or len(text) > MOST_SHOWN else f"{flag_of(name)} {text}"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        names: settings; those that are given, or have the value of `NAME=VALUE` (or list it), break the rule together.
        why: why not.
        do: what to do about it.
        when: other setting -> the value, or several, or a function that tells, with which the rule counts.
        needed: whether one of `when` must hold, and not all of them are forbidden together.
    """

    names: tuple[str, ...]
    why: str
    do: str
    when: Mapping[str, Any]
    needed: bool = False

    def problem(self, settings: Mapping[str, Any], usual: Mapping[str, Any] = USUAL) -> str | None:
        """Return what is wrong with settings, a line; None: they keep the rule. `usual` are their defaults."""
        held = [holds(settings, name, wanted, usual) for name, wanted in self.when.items()]
        if any(held) if self.needed else not all(held):
            return None
        asked = []
        for name, _, value in (one.partition("=") for one in self.names):
            own = settings.get(name)
            text = f"{own:g}" if isinstance(own, float) else str(own)
            if (value in text.split(",")) if value else given(name, own, usual):
                asked.append(spelled(name, own))
        if not asked:
            return None
        if self.needed:
            others = " or ".join(spelled(name, wanted) for name, wanted in self.when.items())
        else:
            told = [name for name in self.when if given(name, settings.get(name), usual)] or list(self.when)
            others = " and ".join(spelled(name, settings.get(name)) for name in told)
        return f"{' and '.join(asked)} {'without' if self.needed else 'with'} {others}: {self.why}; {self.do}"


def excludes(names: str | tuple[str, ...], why: str, do: str = LEAVE_OUT, **when: Any) -> Rule:
    """Return the rule that settings cannot be combined with others, all of `when` together."""
    return Rule((names,) if isinstance(names, str) else names, why, do, when)


def needs(names: str | tuple[str, ...], why: str, do: str = LEAVE_OUT, **when: Any) -> Rule:
    """Return the rule that settings need one of `when`."""
    return Rule((names,) if isinstance(names, str) else names, why, do, when, needed=True)


def is_verifiers(environment: str | None) -> bool:
    """Tell whether --environment or --data names an environment of the package verifiers."""
    return (environment or "").startswith(VERIFIERS)


OF_EMBED = ("data", "prompt_column", "completion_column", "max_seq_length", "valid_fraction", "strict")  # of the data
OF_TASKS = ("eval_metric", "eval_rows", "eval_max_tokens", "eval_chat_template")
NO_VALIDATION, IN_MEMORY = "no validation takes place", "sampling needs the whole base in one process"
BY_KEYS, ONLY_ANSWERS = "the format of these records is recognized by its keys", "only answers are trained"
DIVIDED: tuple[dict[str, Any], ...] = ({"shard_base": other_than("off", None)}, {"offload_base": "on"})
OWN_OPTIONS = tuple(one.name for one in fields(ObjectiveSettings) if one.name != "objective")
SCORED: tuple[dict[str, Any], ...] = ({"problem_type": "regression"}, {"embed_loss": EMBED_SCORED})
REPORTED_BY = {
    metric: tuple(name for name, row in OBJECTIVES.items() if metric in row.metrics)
    for metric in ROWS["metric_for_best_model"].choices or ()
    if metric not in ("loss", "task")
}
NOT_IMITATED: dict[str, Any] = {"objective": other_than(*IMITATION)}

RULES: tuple[Rule, ...] = (
    # Data
    *(
        excludes(
            "rephrase",
            "the base writes the wordings, for which one process needs all of it in memory",
            "give --rephrase-model, or leave out one of the two",
            rephrase_model=None,
            **dividing,
        )
        for dividing in (*DIVIDED, {"parallel": other_than("data")})
    ),
    needs("rephrase_model", "say how many wordings of each question, as in --rephrase 3", rephrase=GIVEN),
    excludes("data_format", BY_KEYS, **NOT_IMITATED),
    excludes("data_format", BY_KEYS, on_policy=True),
    excludes(COLUMNS, "the columns already determine the format", "leave --data-format out", data_format=GIVEN),
    excludes("speaker", "a chat export is recognized by its content", "leave --data-format out", data_format=GIVEN),
    needs("conversation_gap", "only that uses it", speaker=GIVEN),
    excludes(("mask_prompt", "whole_chats", "last_answer"), ONLY_ANSWERS, **NOT_IMITATED),
    excludes(("mask_prompt", "whole_chats", "last_answer"), ONLY_ANSWERS, on_policy=True),
    excludes(("completion_column", "chat_column", "text_column"), "it reads no such column", objective=PAIRS),
    excludes("text_column", "it reads no such column", objective=RATED),
    excludes(("prompt_column", "completion_column", "system_column"), "it reads no such column", objective=LABELED),
    excludes(COLUMNS, "it reads no such column", objective=WITHOUT_COLUMNS),
    excludes(
        tuple(one.name for one in fields(DataSettings) if one.name not in OF_EMBED),
        "texts are read as they are",
        objective="embed",
    ),
    # Adapter
    excludes(
        ("rank_pattern", "alpha_pattern", "modules_to_save", "dropout", "bias"),
        "it trains the modules in --target-modules and nothing else",
        method="full",
    ),
    excludes(("train_connector=lora", "train_vision=lora"), "it trains whole layers", "give full", method="full"),
    excludes(("train_connector", "train_vision"), "a tower stays in float, and is not rounded", BOTH, qat=GIVEN),
    excludes("qat", "it trains float weights, which are not rounded", method="full"),
    excludes("qat", "it fuses without rounding", method="qa-lora"),
    excludes("dropout", "a fused weight has no input of its own to drop", BOTH, qat=GIVEN),
    excludes("dropout", "a step computes each vector twice, and dropout would make them differ", objective="embed"),
    excludes(
        "resume_adapter_file",
        "it cannot start from LoRA weights",
        "continue with --method lora and the file's rank",
        method=("pissa", "relora"),
    ),
    excludes(
        "resume_adapter_file",
        "it cannot start from LoRA weights",
        "fuse them, and train on the fused model",
        method="adalora",
    ),
    excludes("rank_pattern", "it reduces all ranks from one initial rank to --rank", method="adalora"),
    # What is trained towards
    *(
        needs(
            f"objective={name}",
            "there is no teacher",
            "give --teacher MODEL, or --teacher-prompt FILE to make the untrained model with that prompt the teacher",
            teacher=GIVEN,
            teacher_prompt=GIVEN,
        )
        for name in TAUGHT
    ),
    excludes("own_prompts", "the prompts are in the data", BOTH, data=GIVEN),
    excludes(
        "label_smoothing",
        f"of dpo's losses only {', '.join(SMOOTHED)} have it",
        objective=COMPARED,
        loss_type=without(*SMOOTHED),
    ),
    excludes("discopop_tau", "no other loss has it", objective=COMPARED, loss_type=without("discopop")),
    needs("loss_type=exo_pair", "it is defined by its smoothing", "give 0.001, as in its paper", label_smoothing=bool),
    needs("jsd_beta", "only that uses it", divergence="jsd"),
    excludes("teacher_prompt", "the two see other prompts, so only answers can be compared", mask_prompt=False),
    needs("divergence=sampled_kl", "it needs sampled answers", "add it, or give reverse_kl", on_policy=True),
    excludes(
        ("temp", "top_p", "min_p", "distill_temp", "teacher_top_k"),
        "it compares the probabilities of tokens sampled as the student itself would",
        "leave it out, or give reverse_kl",
        divergence="sampled_kl",
    ),
    excludes(
        ("group_size", "mask_truncated", "updates_per_rollout"),
        "nothing is sampled without --on-policy",
        objective=TAUGHT,
        on_policy=False,
    ),
    excludes("group_size=1", "it compares the answers to a prompt", "give at least 2", objective=SAMPLING),
    excludes(
        "kl_beta",
        "relora merges its finished cycles into the model, so the untrained model is gone",
        BOTH,
        method="relora",
    ),
    needs("shared_prefix", "there is one answer to a prompt", objective=(*PAIRS, *SAMPLING), images=True),
    excludes("shared_prefix=on", "each answer is computed with its prompt's pictures", images=True),
    excludes(("environment", "tools"), "an answer about pictures is one turn", "give --reward instead", images=True),
    excludes(("reward", "tools"), "the environment has its own rewards and tools", BOTH, environment=is_verifiers),
    excludes("embed_temp", "it has no temperature", embed_loss="triplet"),
    needs("triplet_margin", "only that has a margin", embed_loss="triplet"),
    excludes(("embed_loss=cosent", "embed_loss=cosine"), "a score is for two texts", BOTH, negatives=bool),
    excludes(("labels", "class_weights"), "numbers have none", problem_type="regression"),
    # Length, validations, the best one
    excludes("iters", "both say how long the run is", "keep one", epochs=GIVEN),
    excludes("val_batches=0", NO_VALIDATION, BOTH, keep_best=True),
    excludes("val_batches=0", NO_VALIDATION, BOTH, early_stopping_patience=bool),
    excludes("val_batches=0", NO_VALIDATION, BOTH, metric_for_best_model=GIVEN),
    excludes("val_batches=0", NO_VALIDATION, BOTH, eval_tasks=GIVEN),
    *(
        excludes("steps_per_eval=0", "the only validation is at the end", "give a number of steps", **asking)
        for asking in ({"keep_best": True}, {"early_stopping_patience": bool}, {"metric_for_best_model": GIVEN})
    ),
    excludes("save_every=0", "there is no checkpoint to go back to", BOTH, keep_best=True),
    *(
        needs(
            f"metric_for_best_model={metric}",
            "no other reports it",
            "leave it out to keep the validation with the lowest loss",
            objective=reporting,
        )
        for metric, reporting in REPORTED_BY.items()
    ),
    *(
        excludes(
            tuple(f"metric_for_best_model={metric}" for metric in REPORTED_BY), "numbers have only a loss", **scored
        )
        for scored in SCORED
    ),
    needs("metric_for_best_model=task", "there is no score", GIVE_BOTH, eval_tasks=GIVEN),
    needs(OF_TASKS, "there is no task", eval_tasks=GIVEN),
    needs("early_stopping_threshold", "nothing ends the run early", GIVE_BOTH, early_stopping_patience=bool),
    # Where the base and what is kept of it are
    excludes("shard_base", "it decides what each process has", BOTH, parallel="auto"),
    excludes("shard_base", "a teacher needs the whole base in one process", objective=TAUGHT, on_policy=False),
    excludes(("shard_base", "parallel"), "each is another way to divide the base", BOTH, offload_base="on"),
    excludes(("shard_base", "parallel"), "only training shares a base", test=True, train=(None, False)),
    needs("offload_activations", "works with it only", "add it, or leave this out", offload_base="on"),
    excludes("cache_trunk=on", "works in a single process only", shard_base=GIVEN),
    excludes("cache_trunk=on", "the tower's output is kept instead", images=True),
    excludes("cache_trunk=on", "a row holds several texts", objective="embed"),
    *(
        excludes(divided, why, do, **when)
        for divided in ("shard_base", "offload_base=on")
        for why, do, when in (
            (
                "each block must be computed again in the backward pass",
                "give block or selective, or leave it out",
                {"grad_checkpoint": lambda mode: mode not in ("auto", "selective", "block", "1")},
            ),
            ("it needs or changes whole weights", "use lora or dora", {"method": ("pissa", "full", "relora")}),
            ("it computes each layer's whole fused weight", BOTH, {"qat": GIVEN}),
            ("weights that are trained cannot be shared", BOTH, {"modules_to_save": GIVEN}),
            (IN_MEMORY, LEAVE_OUT, {"objective": SAMPLING}),
            (IN_MEMORY, LEAVE_OUT, {"objective": TAUGHT, "on_policy": True}),
            ("the whole base computes the reference", BOTH, {"reference_adapter": GIVEN}),
            ("no process has the whole weights", BOTH, {"decode_weights": "dense"}),
            ("a task needs the whole base", BOTH, {"eval_tasks": GIVEN}),
            ("only whole bases see pictures", BOTH, {"images": True}),
        )
    ),
)
# These are not refused: a run of an earlier version has them in its run.yaml and in its identity, and other programs' files too.
IDLE: tuple[Rule, ...] = (
    excludes("weight_decay", "", optimizer=tuple(name for name, row in OPTIMIZERS.items() if not row.takes_decay)),
    excludes(
        ("adam_beta1", "adam_beta2", "adam_epsilon", "bias_correction"),
        "",
        optimizer=tuple(name for name, row in OPTIMIZERS.items() if not row.takes_betas),
    ),
    excludes(("min_lr_ratio", "decay_steps"), "the rate does not fall", lr_schedule="constant"),
    excludes(("rank", "alpha"), "", method="full"),
    excludes(("long_rows", "train_line_break"), "", objective=(*SAMPLING, *LABELED)),
    needs("project_name", "", report_to=GIVEN),
    excludes("batch_tokens", "", batch_size=GIVEN),
    needs("test_batches", "", test=True),
)

OF_CLIENTS = ("model", "revision", "bits", "dtype", "rank", "max_seq_length", "memory_budget")  # of a training server
NAMED = "each names the machines in another way"
OF_A_FILE = needs("allow_code", "only a settings file may need it", config=GIVEN, runs=GIVEN)
# Rules of the options of commands, by command.
COMMANDS: dict[str, tuple[Rule, ...]] = {
    "convert": (
        excludes(("bits", "group_size", "mode"), "nothing is quantized", BOTH, no_quantize=True),
        excludes("calibrate", "nothing is quantized", BOTH, no_quantize=True),
        needs("quantizer", "it learns from rows", "give --calibrate DATA", calibrate=GIVEN),
        excludes("quantizer", "mlx-lm's only learn affine layers", "leave --mode out", mode=other_than("affine", None)),
        excludes(
            "quantizer=gptq",
            "mlx-lm's gptq has 2, 4 and 8 bits",
            "give one of them, or --quantizer dwq",
            bits=other_than(2, 4, 8, None),
        ),
        excludes(
            "quantizer=dwq", "mlx-lm's dwq trains layers of less than 8 bits", "give fewer, or no --quantizer", bits=8
        ),
    ),
    "doctor": (
        excludes("kernels", "the group kernels checks them all", full=True),
        needs(
            ("quick", "group", "again", "minutes", "out", "send"),
            "only that uses it",
            "add it, or leave this out",
            full=True,
        ),
    ),
    "embed": (
        excludes("document_prompt", "the texts are queries", "give --query-prompt", query=True),
        needs("query_prompt", "the texts are documents", "add it, or give --document-prompt", query=True),
    ),
    "evaluate": (
        excludes("show", "it asks questions of its own", BOTH, forgetting=True),
        needs("forgetting", "there is nothing to compare", "give it", adapter_path=GIVEN),
        excludes(("corpus", *OWN_OPTIONS), "it measures the loss of texts", forgetting=True),
        excludes("forgetting", "it measures the loss of texts", objective=other_than(*ANSWERED, None)),
        needs(("against", "general_text", "general_chat"), "only that uses it", "add it", forgetting=True),
        needs("objective=embed", "it measures queries and their documents", "name some", data=GIVEN),
        excludes(("report", "show"), "it writes no text", objective="embed"),
        *(
            excludes("report", "only imitation with the whole base has a page", "drop it, or use --json", **otherwise)
            for otherwise in ({"objective": other_than(*ANSWERED, None)}, {"images": True}, *DIVIDED)
        ),
        needs("corpus", "only that searches in one", objective="embed"),
        *(excludes(("forgetting", "objective=embed"), "it needs the whole base", BOTH, **one) for one in DIVIDED),
    ),
    "export": (
        excludes("data", "only a merged model is measured", to=other_than("gguf", "hf", "ollama", "lmstudio")),
        excludes("data", "only a merged model is measured", ollama_base=GIVEN),
        needs("data", "there is no adapter to measure", adapter_path=GIVEN),
    ),
    "fuse": (
        excludes("compensate", "each says the opposite", BOTH, no_compensate=True),
        excludes("fused_bits", "a float model has no bits", BOTH, dequantize=True),
        excludes(("compensate", "bits_budget"), "a float model is not rounded", BOTH, dequantize=True),
        excludes("bits_budget", "the budget chooses the bits", BOTH, fused_bits=GIVEN),
    ),
    "generate": (
        excludes(("tools", "ignore_chat_template"), "the chat template shows pictures", image=GIVEN),
        *(excludes("image", "only a whole model sees pictures", BOTH, **one) for one in DIVIDED),
    ),
    "merge": (excludes("data", "nothing is measured", BOTH, no_evaluate=True),),
    "plan": (
        OF_A_FILE,
        *(
            excludes("sweep", "it is planned for one machine", BOTH, **{name: GIVEN})
            for name in ("macs", "hostfile", "all_chips")
        ),
        needs("link_gbit", "there is no link", "add one of them, or leave it out", macs=GIVEN, hostfile=GIVEN),
        excludes(
            ("config", "macs", "hostfile", "all_chips", "sweep", *(name for name in ROWS if name not in OF_CLIENTS)),
            "the clients of a training server bring it",
            clients=GIVEN,
        ),
        excludes(("chip", "memory_gb", "hostfile"), NAMED, "keep one", macs=GIVEN),
        excludes(("chip", "memory_gb", "all_chips"), NAMED, "keep one", hostfile=GIVEN),
        excludes(
            "all_chips",
            NAMED,
            "keep one, or write --macs 2 --all-chips for pairs",
            macs=lambda macs: bool(macs) and not macs.isdecimal(),
        ),
    ),
    "predict": (
        excludes("text", "each brings the texts", BOTH, data=GIVEN),
        needs("adapter_path", "there is no text to label", "give one of the two", text=GIVEN, data=GIVEN),
    ),
    "serve": (
        excludes(("allow_origin", "allow_hub"), "pages and the hub play no part in it", training=True),
        excludes(
            ("adapter", "blend", "adapters_from", "images_from"),
            "clients create their adapters themselves, and show no pictures",
            training=True,
        ),
        excludes(("prompt_cache", "request_timeout", "max_waiting"), "it has no use there", training=True),
        needs(
            ("model_name", "checkpoints", "join_clients", "max_sessions", "session_timeout"),
            "only that uses it",
            training=True,
        ),
    ),
    "sweep": (OF_A_FILE,),
    "train": (
        OF_A_FILE,
        excludes(("config", "dry_run", "adapter_path"), "each run's own file says that", runs=GIVEN),
        excludes("json", "it prints the lines of one run", runs=GIVEN),
        excludes("dry_run", "nothing would be trained", "give --train too", test=True, train=(None, False)),
    ),
}


def check_options(command: str, options: Mapping[str, Any]) -> None:
    """Refuse what a command's options cannot have together.

    Args:
        command: a key of COMMANDS.
        options: values by name; those that are not there are not given.

    Raises:
        InputError: with all problems.
    """
    if problems := [problem for rule in COMMANDS[command] if (problem := rule.problem(options, {}))]:
        raise InputError("; ".join(problems))


def problems_with(settings: Mapping[str, Any], name: str, value: Any) -> list[str]:
    """Return what would be wrong if a run's settings had another value of one of them."""
    asked = {**settings, name: value}
    about = [rule for rule in RULES if name in {*rule.when, *(one.partition("=")[0] for one in rule.names)}]
    return [problem for rule in about if (problem := rule.problem(asked))]


def settings_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return every problem in a run's settings, those of the table and of values with a form of their own.

    Args:
        settings: all of them by field name, with the right types.
    """
    problems, objective, method = [], settings["objective"], settings["method"]
    for name, row in ROWS.items():
        if not given(name, settings[name]):
            continue
        if row.only and objective not in row.only:
            use = "use" if row.only[1:] else "uses"
            asked = f"{spelled(name, settings[name])} with --objective {objective}"
            problems.append(f"{asked}: only {', '.join(row.only)} {use} it; leave it out")
        if row.method and row.method != method:
            asked = f"{spelled(name, settings[name])} with --method {method}"
            problems.append(f"{asked}: only --method {row.method} uses it; leave it out")
    problems += [problem for rule in RULES if (problem := rule.problem(settings))]
    mode, shared, day, first = (
        settings[name] for name in ("grad_checkpoint", "shard_base", "chat_date", "adalora_init_rank")
    )
    loggers = {name.strip().lower() for name in settings["report_to"].split(",")} if settings["report_to"] else set()
    data, environment = settings["data"], settings["environment"] or ""
    measured = {flag_of(name): settings[name] for name in ("model", "adapter_path", "data")}
    words = ["evaluate", *(word for flag, value in measured.items() if value for word in (flag, value))]
    checks = {
        f"--grad-checkpoint {mode!r}: not one of {', '.join(CHECKPOINTING)}, or a number of at least 1": (
            mode not in CHECKPOINTING and not (mode.isdecimal() and 1 <= int(mode) < 10**6)
        ),
        f"--chat-date {day!r}: not a date; write it like 2026-11-26": day is not None and not is_day(day),
        f"--shard-base {shared!r}: not off, {', '.join(SHARDING)}, or parts by rank such as 3:1": (
            shared not in (*SHARDING, "off") and shard_parts(shared) is None
        ),
        f"--report-to {settings['report_to']}: only {', '.join(LOGGERS)}, by comma": not loggers <= set(LOGGERS),
        f"--no-train: to measure an adapter, run `{command_line(words)}`; or give --test alone": settings["train"]
        is False,
        f"--adalora-init-rank {first} with --rank {settings['rank']}: ranks are only reduced; leave it out": (
            method == "adalora" and first is not None and first < settings["rank"]
        ),
        f"--data {data} with --environment {environment}: the environment has its own tasks; leave --data out, or give "
        f"{environment}:1000 for that many": (
            is_verifiers(environment) and data and environment not in (data, data.rpartition(":")[0])
        ),
    }
    problems += [problem for problem, is_one in checks.items() if is_one]
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        try:
            values = parse_pattern(settings[name])
        except ValueError as error:
            problems.append(f"{flag_of(name)} {error}: write name=number, separated by commas")
            continue
        if bad := [key for key, value in values.items() if not 0 < value < 1e9 or value != kind(value)]:
            must = "a whole number of at least 1" if kind is int else "more than 0"
            problems.append(f"{flag_of(name)} {', '.join(bad)}: must be {must}")
    try:
        turn_names(settings["turn_names"])
    except ValueError as error:
        names = " or ".join((*TURN_FIELDS, *TURN_ROLES))
        problems.append(f"--turn-names {error}: write {names}, then = and the name in the data")
    # Nothing is saved, and no run ends, between two updates on the same answers.
    updates = settings["updates_per_rollout"]
    for name in ("iters", "save_every", "steps_per_eval"):
        if settings[name] and settings[name] >= 1 and settings[name] % updates:
            problems.append(
                f"{spelled(name, settings[name])} with --updates-per-rollout {updates}: give a multiple of {updates}"
            )
    return problems


def idle_notes(settings: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Return a line for each setting that the user gave and that another one makes idle.

    Args:
        settings: all of them by field name.
        names: of those that the user gave as flags.
    """
    notes = []
    for rule in IDLE:
        held = any(holds(settings, name, wanted) for name, wanted in rule.when.items())
        for name in rule.names if held != rule.needed else ():
            if name in names and settings[name] != 0:
                others = " or ".join(
                    spelled(other, wanted if rule.needed else settings[other]) for other, wanted in rule.when.items()
                )
                notes.append(
                    f"{spelled(name, settings[name])} has no effect {'without' if rule.needed else 'with'} {others}"
                )
    return notes


def is_day(text: str) -> bool:
    """Tell whether a text is a date in the form 2026-11-26."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
