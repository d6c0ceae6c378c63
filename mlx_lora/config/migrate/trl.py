"""Read the settings file of TRL's commands: `trl dpo --config`, `trl kto`, `trl reward`, `trl grpo`, `trl rloo`, `trl sft`;
and of its GKDTrainer.

The file does not say which command it is for; --objective says so, or else keys that only one command has. For what the
file leaves out, TRL's defaults are used if they change the result: the model itself is trained unless use_peft is set,
rank 16, alpha 32, dropout 0.05 where its trainer keeps dropout, 8 rows per micro-batch, three epochs with linear decay, 1,024 tokens, nothing held out.
"""

from __future__ import annotations

from mlx_lora.config.migrate.common import (
    CHANGES,
    LIKELIHOOD_OF_SIMPO,
    SHARED,
    TRANSFORMERS,
    UNCUT,
    VALUES,
    Dialect,
    Sheet,
    choose_method,
    put_objective,
    put_rewards,
    put_sampling,
    read_columns,
    read_loop,
    read_sets,
    rewards_of_paths,
    take_source,
    trains_on_chats,
    turn_off_dropout,
    two_of,
)
from mlx_lora.config.objectives import PAIRS, SAMPLING

WITH_OWN = two_of(
    *(
        "model_name_or_path",
        "dataset_name",
        "dataset_train_split",
        "dataset_test_split",
        "use_peft",
        "lora_target_modules",
    ),
    "datasets",
)
# Objective -> keys that only its configuration has; the first that a file has decides.
OWN_KEYS = {
    "distill": ("teacher_model_name_or_path", "lmbda", "seq_kd"),
    "rloo": ("normalize_advantages", "reward_clip_range"),
    "grpo": (
        *("reward_funcs", "num_generations", "num_iterations", "scale_rewards", "importance_sampling_level"),
        *("mask_truncated_completions", "epsilon_high"),
    ),
    "reward": ("center_rewards_coefficient",),
    "kto": ("desirable_weight", "undesirable_weight", "loss_type kto", "loss_type apo_zero_unpaired"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "dpo": (
        *("loss_weights", "precompute_ref_log_probs", "discopop_tau", "f_divergence_type", "ld_alpha", "rpo_alpha"),
        *("use_weighting", "sync_ref_model", "loss_type", "label_smoothing", "max_prompt_length", "beta"),
    ),
}
COMMANDS = ("sft", *PAIRS, "kto", *SAMPLING, "distill")  # objectives
CHAT_LOSSES = ("nll", "chunked_nll", "dft")  # of `trl sft`
# Options of preference training, most of which have TRL's names here.
PREFERENCES = {name: name for name in (
    "loss_type", "loss_weights", "beta", "label_smoothing", "discopop_tau", "simpo_gamma", "cpo_alpha",
    "desirable_weight", "undesirable_weight",
)} | {"center_rewards_coefficient": "center_rewards"}  # fmt: skip
CPO_LOSSES = {"sigmoid": "cpo", "simpo": "simpo"}
# Its defaults for an objective, if they differ from ours.
DEFAULTS = {
    "grpo": {"group_size": 8, "max_new_tokens": 512},
    "rloo": {"group_size": 2, "max_new_tokens": 512, "kl_beta": 0.05},
    "sft": {"learning_rate": 2e-5},
    "distill": {"learning_rate": 2e-5},
    "reward": {"learning_rate": 1e-4},
}
PEFT_TARGETS = "q_proj,v_proj"  # of most architectures
# Objective -> what `max_length: null` means in TRL; for the others, no row is cut.
NULL_LENGTHS = {"orpo": 512, "cpo": 512, "simpo": 512, "distill": 1024}
GKD = {"beta": 0.5, "lmbda": 0.5}  # its defaults
SOURCE = {"dataset_name": "path", "dataset_config": "name", "dataset_train_split": "split"}
SHARES = {"lmbda": {0: {}, 1: {"on_policy": True}}}  # of answers that are sampled during the run
DIVERGENCES: dict[float, str] = {0: "forward_kl", 1: "reverse_kl"}  # beta -> divergence; jsd between them


def read_kind(sheet: Sheet) -> None:
    """Set the objective and its options."""
    objective = _objective(sheet)
    if objective == "distill":
        read_distill(sheet)
    elif objective in SAMPLING:
        put_sampling(sheet, objective)
        functions, model = rewards_of_paths(sheet), sheet.take("reward_model_name_or_path")
        key = "reward_funcs" if functions else "reward_model_name_or_path"
        put_rewards(sheet, functions | ({str(model): None} if model else {}), key)
    else:
        read_preference(sheet, objective)
    sheet.assume(**DEFAULTS.get(objective, {}))


def _objective(sheet: Sheet) -> str:
    """Return the objective, by the flag, or by the keys that only one has."""
    if sheet.flags.get("objective") in COMMANDS:
        return sheet.flags["objective"]
    loss = sheet.rest.get("loss_type")
    given = {*sheet.rest, f"loss_type {loss}"} if loss not in CHAT_LOSSES else set[str]()
    own = [(objective, key) for objective, keys in OWN_KEYS.items() for key in keys if key in given]
    for objective, key in own[:1]:
        of = "TRL's GKDTrainer" if objective == "distill" else f"trl {objective}"
        sheet.notes.append(f"{key}: read as a file of {of}; --objective chooses another")
        return objective
    sheet.notes.append("read as a file of trl sft; give --objective dpo, kto, reward, grpo or rloo for those commands")
    return "sft"


def read_preference(sheet: Sheet, objective: str) -> None:
    """Set the objective of training on answers or pairs of them, its loss and its options."""
    losses = sheet.rest.get("loss_type")
    if isinstance(losses, list) and len(losses) == 1:
        sheet.rest["loss_type"] = losses = losses[0]
    if objective == "cpo":
        objective = sheet.one_of("loss_type", CPO_LOSSES, " with CPO") or objective
    if losses == "dft":
        sheet.refuse("loss_type", CHANGES["use_dft_loss"])
    sheet.drop({"loss_type": ("sigmoid", *CHAT_LOSSES, *(["kto"] if objective == "kto" else []))})
    put_objective(sheet, objective, PREFERENCES)
    sheet.drop({"max_prompt_length": (UNCUT,)})


def read_distill(sheet: Sheet) -> None:
    """Set what TRL's GKDTrainer has in addition to the keys of `trl sft`: the teacher, the divergence, the share of sampled answers.

    Raises:
        InputError: the file has no teacher.
    """
    sheet.found["objective"] = "distill"
    if "teacher_model_name_or_path" not in sheet.rest and sheet.flags.get("objective") != "distill":  # or --teacher
        raise sheet.refusal("no teacher_model_name_or_path: GKD needs a teacher; add its model to the file")
    sheet.copy({"teacher_model_name_or_path": "teacher"})
    sheet.rest = GKD | sheet.rest
    sheet.turn(SHARES)
    why = "a mixture of given and sampled answers; only 0 (those in the data) and 1 (sampled ones) are supported"
    sheet.refuse("lmbda", why)
    beta = sheet.number("beta") or 0
    sheet.found["divergence"] = DIVERGENCES.get(beta, "jsd")
    if 0 < beta < 1 and sheet.told("divergence") == "jsd":
        sheet.found["jsd_beta"] = beta
    if "on_policy" in sheet.found:
        sheet.copy({"temperature": "temp", "max_new_tokens": "max_new_tokens"})
        sheet.assume(temp=0.9, max_new_tokens=128)
    else:
        sheet.leave("temperature", "max_new_tokens")  # of sampling, in TRL too
        sheet.notes.append(
            "TRL compares all tokens of the vocabulary, here the teacher's 64 likeliest; --teacher-top-k 0 is all"
        )


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha, dropout and method; without use_peft the model itself is trained, as in TRL.

    TRL's trainers of preferences, rewards and GKD turn off all dropout of the adapted model, unless the file says otherwise.
    """
    adapts = sheet.switch("use_peft")
    sheet.rest.setdefault("disable_dropout", sheet.found["objective"] not in ("sft", *SAMPLING))
    without = sheet.switch("disable_dropout")
    if adapts:
        if without:
            turn_off_dropout(sheet, "; disable_dropout: false keeps it")
        sheet.assume(rank=16, alpha=32, dropout=0.0 if without else 0.05, target_modules=PEFT_TARGETS)
    choose_method(sheet, {"full": None if adapts else "use_peft"})


def read_data(sheet: Sheet) -> None:
    """Set data from dataset_name, or datasets, and what is trained of its rows."""

    if "datasets" not in sheet.rest and "dataset_name" in sheet.rest:
        sheet.rest["datasets"] = {name: sheet.take(key) for key, name in SOURCE.items()}
    read_sets(sheet, {"datasets": {}}, lambda one, _: [take_source(one)])
    eos = sheet.take("eos_token")
    sheet.put(special_tokens=None if eos is None else f"eos_token={eos}")
    if trains_on_chats(sheet):
        read_columns(sheet, {"dataset_text_field": ("text_column", ("text",))})
        whole = sheet.rest.get("completion_only_loss") is False
        own = [key for key in ("assistant_only_loss", "completion_only_loss") if sheet.take(key)]
        if whole or own:
            sheet.found["mask_prompt"] = not whole
        elif sheet.found["objective"] != "distill":  # GKD trains on answers
            sheet.found["whole_chats"] = True


def read_run(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    objective = sheet.found["objective"]
    if sheet.found.get("max_seq_length") == UNCUT:
        sheet.found["max_seq_length"] = NULL_LENGTHS.get(objective, UNCUT)
    read_loop(sheet)


TRL = Dialect(
    name="TRL",
    recognizes=lambda content: "model_name_or_path" in content and WITH_OWN(content),
    names={
        **SHARED,
        **TRANSFORMERS,
        "model_name_or_path": "model",
        "model_revision": "revision",
        "chat_template_path": "chat_template",
        "lora_r": "rank",
        "lora_target_modules": "target_modules",
        "lora_modules_to_save": "modules_to_save",
        "max_length": "max_seq_length",
        "max_seq_length": "max_seq_length",  # until 2025
        "test_split_size": "valid_fraction",
        "overwrite_output_dir": "force",
    },
    values={
        **VALUES,
        "dtype": {"float32": {"dtype": "float32"}},
        "torch_dtype": {"float32": {"dtype": "float32"}},
        "truncation_mode": {"keep_start": {}},
    },
    rules=(read_kind, read_method, read_data, read_run),
    defaults={
        "learning_rate": 1e-6,
        **{"lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0, "long_rows": "cut", "epochs": 3.0},
        **{"batch_size": 8, "max_seq_length": 1024, "valid_fraction": 0.0},
    },
    nulls={"max_length": UNCUT, "max_prompt_length": UNCUT, "max_grad_norm": 0},
    harmless=(
        *SOURCE,
        "datasets.columns",
        "teacher_model_init_kwargs",
        "dtype",
    ),  # if datasets has the rest; of the machine
    changes={
        "cpo_alpha": LIKELIHOOD_OF_SIMPO,
        "datasets.fraction": "shares of a mixture; give a weight, as in a.jsonl=0.5",
        "seq_kd": "answers that the teacher writes during the run; train on those that it wrote before",
    },
    others={
        "reward_model_path": "only trl sft, dpo, kto, reward, grpo and rloo are supported, and ORPO and CPO; use TRL for it"
    },
)
