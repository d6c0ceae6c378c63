"""Read what TRL's GKDTrainer has beside the keys of `trl sft`: the teacher, the divergence, the share of sampled answers."""

from __future__ import annotations

from mlx_lora.config.migration.sheet import Sheet

OWN_KEYS = ("teacher_model_name_or_path", "lmbda", "seq_kd")
NAME = "distill"
BETA, LMBDA = 0.5, 0.5  # TRL's defaults
# lmbda -> whether the answers are sampled during the run.
SHARES: dict[float, bool] = {0: False, 1: True}
NAMES: dict[float, str] = {0: "forward_kl", 1: "reverse_kl"}  # beta -> divergence; jsd between them


def read_distill(sheet: Sheet) -> None:
    """Set teacher and divergence.

    Raises:
        InputError: the file has no teacher, or mixes given answers with sampled ones.
    """
    teacher = sheet.take("teacher_model_name_or_path")
    if teacher is not None:
        sheet.put("teacher", teacher, "teacher_model_name_or_path")
    elif sheet.objective != NAME:  # with --objective distill, the teacher may be a flag too
        raise sheet.refusal("no teacher_model_name_or_path: GKD needs a teacher; add its model to the file")
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
    sheet.put("divergence", NAMES.get(beta, "jsd"), "beta")
    if 0 < beta < 1:
        sheet.put("jsd_beta", beta, "beta")
    if SHARES[share]:
        sheet.put("on_policy", True, "lmbda")
        for theirs, name in (("temperature", "temp"), ("max_new_tokens", "max_new_tokens")):
            if theirs in sheet.rest:
                sheet.put(name, sheet.number(theirs), theirs)
        sheet.assume("temp", 0.9)
        sheet.assume("max_new_tokens", 128)
    else:
        for key in ("temperature", "max_new_tokens"):  # of sampling, in TRL too
            sheet.take(key)
        sheet.note(
            "TRL compares all tokens of the vocabulary, here the teacher's 64 likeliest; --teacher-top-k 0 is all"
        )
    if sheet.take("disable_dropout") is not False:
        sheet.leave("lora_dropout")  # TRL turns it off
        sheet.assume("dropout", 0.0)
    sheet.leave("teacher_model_init_kwargs")
