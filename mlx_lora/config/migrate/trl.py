"""Read the settings file of TRL's commands: `trl dpo --config`, `trl kto`, `trl reward`, `trl grpo`, `trl rloo`, `trl sft`;
and of its GKDTrainer.

The file does not say which command it is for; --objective says so, or else keys that only one command has. For what the
file leaves out, TRL's defaults are used if they change the result: the model itself is trained unless use_peft is set,
rank 16, alpha 32, dropout 0.05 where its trainer keeps dropout, 8 rows per micro-batch, three epochs with linear decay, 1,024 tokens, nothing held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.migrate import common
from mlx_lora.config.migrate.common import SHARED, UNCUT, Dialect, Names, Sheet
from mlx_lora.config.objectives import PAIRS, SAMPLING

MARKS = ("dataset_name", "dataset_train_split", "dataset_test_split", "use_peft", "lora_target_modules", "datasets")
NAMES = Names(
    length="max_length", held_out="test_split_size", targets="lora_target_modules", all_layers="all-linear",
    modules_to_save="lora_modules_to_save", default_length=1024,
)  # fmt: skip
# Objective -> keys that only its configuration has; the first that a file has decides.
OWN_KEYS = {
    "distill": ("teacher_model_name_or_path", "lmbda", "seq_kd"),
    "rloo": ("normalize_advantages", "reward_clip_range"),
    "grpo": (
        *("reward_funcs", "num_generations", "num_iterations", "scale_rewards", "importance_sampling_level"),
        *("mask_truncated_completions", "epsilon_high"),
    ),
    "reward": ("center_rewards_coefficient",),
    "kto": ("desirable_weight", "undesirable_weight"),
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
ADAPTER = {"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
# Defaults of answers that differ from ours.
ANSWERS = {
    "grpo": {"group_size": 8, "max_new_tokens": 512},
    "rloo": {"group_size": 2, "max_new_tokens": 512, "kl_beta": 0.05},
}
LEARNING_RATES = {"sft": 2e-5, "distill": 2e-5, "reward": 1e-4}
LEARNING_RATE = 1e-6
PEFT_TARGETS = "q_proj,v_proj"  # of most architectures
# Objective -> what `max_length: null` means in TRL; for the others, no row is cut.
NULL_LENGTHS = {"orpo": 512, "cpo": 512, "simpo": 512, "distill": 1024}
# Of GKD.
BETA, LMBDA = 0.5, 0.5  # its defaults
SHARES: dict[float, bool] = {0: False, 1: True}  # lmbda -> whether the answers are sampled during the run
DIVERGENCES: dict[float, str] = {0: "forward_kl", 1: "reverse_kl"}  # beta -> divergence; jsd between them


def recognizes(content: Mapping[str, Any]) -> bool:
    """Return whether a file names its model as TRL does, and has one of its own keys."""
    return "model_name_or_path" in content and "model" not in content and any(key in content for key in MARKS)


def read_kind(sheet: Sheet) -> None:
    """Set the objective and its options."""
    if "reward_model_path" in sheet.rest:  # of commands that we do not have
        raise sheet.refusal(
            "reward_model_path: only trl sft, dpo, kto, reward, grpo and rloo are supported, and ORPO and CPO; use TRL for it"
        )
    objective = _objective(sheet)
    if objective == "distill":
        read_distill(sheet)
    elif objective in SAMPLING:
        read_sampling(sheet, objective)
    else:
        read_preference(sheet, objective)


def _objective(sheet: Sheet) -> str:
    """Return the objective, by the flag, or by the keys that only one has."""
    if sheet.flags.get("objective") in COMMANDS:
        return sheet.flags["objective"]
    losses = sheet.rest.get("loss_type")
    for objective, keys in OWN_KEYS.items() if losses not in CHAT_LOSSES else ():
        key = next((key for key in keys if key in sheet.rest), None)
        if objective == "kto" and losses in ("kto", "apo_zero_unpaired"):
            key = "loss_type"
        if key:
            of = "TRL's GKDTrainer" if objective == "distill" else f"trl {objective}"
            sheet.note(f"{key}: read as a file of {of}; --objective chooses another")
            return objective
    sheet.note("read as a file of trl sft; give --objective dpo, kto, reward, grpo or rloo for those commands")
    return "sft"


def read_preference(sheet: Sheet, objective: str) -> None:
    """Set the objective of training on answers or pairs of them, its loss and its options."""
    losses = sheet.rest.get("loss_type")
    if isinstance(losses, list) and len(losses) == 1:
        sheet.rest["loss_type"] = losses = losses[0]
    if objective == "cpo" and losses in ("simpo", "alphapo"):
        sheet.take("loss_type")
        if losses == "alphapo" or sheet.number("alpha"):
            raise sheet.refusal("loss_type alphapo: not supported; use TRL for it")
        objective = "simpo"
    elif objective == "cpo" and losses not in (None, "sigmoid"):
        raise sheet.refusal(f"loss_type {losses} with CPO: only sigmoid and simpo are supported; use TRL for it")
    if losses == "dft":
        sheet.refuse("loss_type", common.CHANGES["use_dft_loss"])
    if losses in ("sigmoid", *CHAT_LOSSES) or (objective == "kto" and losses == "kto"):
        sheet.take("loss_type")
    if objective == "simpo":
        common.refuse_likelihood(sheet, 1)
    common.put_objective(sheet, objective, PREFERENCES)
    sheet.take("precompute_ref_log_probs")  # always done here
    sheet.drop({"truncation_mode": ("keep_start",), "max_prompt_length": (UNCUT,)})


def read_sampling(sheet: Sheet, objective: str) -> None:
    """Set what samples, rewards and compares answers; a reward model is none of ours."""
    common.put_sampling(sheet, objective)
    functions, model = common.rewards_of_paths(sheet), sheet.take("reward_model_name_or_path")
    key = "reward_funcs" if functions else "reward_model_name_or_path"
    common.put_rewards(sheet, functions | ({str(model): None} if model else {}), key)
    sheet.assume(**ANSWERS[objective])
    common.keep_cycles(sheet)


def read_distill(sheet: Sheet) -> None:
    """Set what TRL's GKDTrainer has in addition to the keys of `trl sft`: the teacher, the divergence, the share of sampled answers.

    Raises:
        InputError: the file has no teacher, or mixes given answers with sampled ones.
    """
    sheet.found["objective"] = "distill"
    if (
        "teacher_model_name_or_path" not in sheet.rest and sheet.flags.get("objective") != "distill"
    ):  # or the flag --teacher
        raise sheet.refusal("no teacher_model_name_or_path: GKD needs a teacher; add its model to the file")
    sheet.copy({"teacher_model_name_or_path": "teacher"})
    if sheet.switch("seq_kd"):
        raise sheet.refusal("seq_kd: not supported; leave it out, and train on answers that the teacher wrote")
    share = sheet.number("lmbda")
    share = LMBDA if share is None else share
    if share not in SHARES:
        raise sheet.refusal(
            f"lmbda {share:g}: a mixture of given and sampled answers; only 0 (those in the data) and 1 (sampled ones) are "
            "supported"
        )
    beta = sheet.number("beta")
    beta = BETA if beta is None else beta
    sheet.found["divergence"] = DIVERGENCES.get(beta, "jsd")
    if 0 < beta < 1 and sheet.told("divergence") == "jsd":
        sheet.found["jsd_beta"] = beta
    if SHARES[share]:
        sheet.found["on_policy"] = True
        sheet.copy({"temperature": "temp", "max_new_tokens": "max_new_tokens"}, Sheet.number)
        sheet.assume(temp=0.9, max_new_tokens=128)
    else:
        for key in ("temperature", "max_new_tokens"):  # of sampling, in TRL too
            sheet.take(key)
        sheet.note(
            "TRL compares all tokens of the vocabulary, here the teacher's 64 likeliest; --teacher-top-k 0 is all"
        )
    sheet.leave("teacher_model_init_kwargs")


def read_method(sheet: Sheet) -> None:
    """Set rank, alpha, dropout and method; without use_peft the model itself is trained, as in TRL.

    TRL's trainers of preferences, rewards and GKD turn off all dropout of the adapted model, unless the file says otherwise.
    """
    adapts = sheet.switch("use_peft")
    without = (
        sheet.switch("disable_dropout")
        if "disable_dropout" in sheet.rest
        else sheet.found["objective"] not in ("sft", *SAMPLING)
    )
    if adapts:
        if without:
            common.turn_off_dropout(sheet, "; disable_dropout: false keeps it")
        sheet.copy(ADAPTER, Sheet.number)
        sheet.assume(rank=16, alpha=32, dropout=0.0 if without else 0.05)
    switches = {"dora": "use_dora", "rslora": "use_rslora"}
    common.choose_method(sheet, switches, {"full": None if adapts else "use_peft"})
    common.read_layers(sheet, NAMES)
    if adapts:
        sheet.assume(target_modules=PEFT_TARGETS)
    common.read_bits(sheet)


def read_data(sheet: Sheet) -> None:
    """Set data from dataset_name, or datasets, and what is trained of its rows."""
    told = common.take_sets(sheet, "datasets")
    sets = [sheet.within(one, "datasets") for one in told]
    if told:
        sheet.leave("dataset_name", "dataset_config", "dataset_train_split")
    elif "dataset_name" in sheet.rest:
        keys = {"dataset_name": "path", "dataset_config": "name", "dataset_train_split": "split"}
        sets = [sheet.within({name: sheet.take(key) for key, name in keys.items() if key in sheet.rest}, "datasets")]
    sources = []
    for one in sets:
        sources.append({"path": common.take_path(one), "subset": one.take("name"), "split": one.take("split")})
        one.refuse("fraction", "shares of a mixture; give a weight, as in a.jsonl=0.5")
        one.leave("columns")
        one.sort_rest()
    if sources:
        common.put_sets(sheet, "datasets", sources, [{}] * len(sources))
    sheet.copy({"chat_template_path": "chat_template"})
    if (eos := sheet.take("eos_token")) is not None:
        sheet.found["special_tokens"] = f"eos_token={eos}"
    if common.trains_on_chats(sheet):
        common.read_columns(sheet, {"dataset_text_field": ("text_column", ("text",))})
        whole = sheet.rest.get("completion_only_loss") is False
        own = [key for key in ("assistant_only_loss", "completion_only_loss") if sheet.take(key)]
        if whole or own:
            sheet.found["mask_prompt"] = not whole
        elif sheet.found["objective"] != "distill":  # GKD trains on answers
            sheet.found["whole_chats"] = True


def read_loop(sheet: Sheet) -> None:
    """Set length, batch, schedule, optimizer, intervals."""
    for key in ("dtype", "torch_dtype"):
        kind = sheet.take(key)
        if kind in ("float32", *common.HALF_PRECISION):
            sheet.rest[kind] = True
    if "max_seq_length" in sheet.rest:  # its name until 2025
        sheet.rest["max_length"] = sheet.take("max_seq_length")
    if sheet.rest.get("max_length") == UNCUT:
        sheet.rest["max_length"] = NULL_LENGTHS.get(sheet.found["objective"], UNCUT)
    common.read_loop(sheet, NAMES)
    if "learning_rate" not in sheet.rest:
        sheet.assume(learning_rate=LEARNING_RATES.get(sheet.found["objective"], LEARNING_RATE))


TRL = Dialect(
    name="TRL",
    recognizes=recognizes,
    rules=(read_kind, read_method, read_data, read_loop),
    names={**SHARED, "model_name_or_path": "model", "model_revision": "revision", "overwrite_output_dir": "force"},
    defaults={"lr_schedule": "linear", "warmup": 0, "weight_decay": 0.0, "long_rows": "cut"},
    nulls={"max_length": UNCUT, "max_prompt_length": UNCUT, "max_grad_norm": 0},
)
