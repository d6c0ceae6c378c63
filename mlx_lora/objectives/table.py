"""Look up an objective by name and build it from a run's settings. A new objective is one more row in `OBJECTIVES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches

import mlx.core as mx

from mlx_lora.config.objectives import SAMPLING, ObjectiveSettings
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.divergence import FORWARD_KL, REVERSE_KL, SAMPLED_KL, DivergenceOptions
from mlx_lora.losses.policy import PolicyOptions
from mlx_lora.losses.preference import (
    PAIR_LOSSES,
    RATED_LOSSES,
    PairLoss,
    PairOptions,
    Pairs,
    RatedOptions,
    Ratings,
    bradley_terry,
    preferred,
)
from mlx_lora.objectives.base import AnswerSums, Objective
from mlx_lora.rollouts.rewards import KNOWN, NO_SPREAD, SPREAD, means_of_known, own_reports, reward_names
from mlx_lora.utils.errors import InputError

RATED_REPORTS = ("rewards_good", "rewards_bad", "good", "divergence")
REWARD_REPORTS: tuple[str, ...] = ("accuracy", "margin", "chosen_rewards", "rejected_rewards")
POLICY_REPORTS = ("reward", SPREAD, NO_SPREAD, "length", "truncated", "kl", "clipped")
# Settings of objectives that sample answers, of which some are used for a teacher's answers, and of those that reward them.
OF_SAMPLING = ("group_size", "max_new_tokens", "temp", "top_p", "min_p", "mask_truncated", "updates_per_rollout")
OF_REWARDS = ("reward", "reward_weights", "reward_errors", "reward_timeout", "epsilon", "epsilon_high", "kl_beta")
DISTILL_REPORTS = ("kl",)
ON_POLICY_REPORTS = ("kl", "length", "truncated", "answers")
OF_TEACHER = ("teacher", "teacher_prompt", "teacher_top_k", "divergence", "jsd_beta", "distill_temp", "on_policy")
OF_WRITING = ("max_new_tokens", "temp", "top_p", "min_p")  # these are used for a teacher's answers too
PAIR_REPORTS = (*REWARD_REPORTS, "chosen_logps", "rejected_logps")


def objective_of(settings: ObjectiveSettings) -> Objective:
    """Return the objective that the settings ask for.

    Raises:
        InputError: an unknown objective or loss type, or an option that the objective does not have.
    """
    build = OBJECTIVES.get(settings.objective)
    if build is None:
        raise InputError(f"--objective {settings.objective!r}: {_instead(settings.objective, OBJECTIVES)}")
    _refuse_foreign(settings)
    return build(settings)


def _sft(settings: ObjectiveSettings) -> Objective:
    return Objective("sft")


def _dpo(settings: ObjectiveSettings) -> Objective:
    names = _names(settings.loss_type, PAIR_LOSSES)
    weights = _weights(settings.loss_weights, names)
    smoothed = [name for name in names if name in SMOOTHED]
    if settings.label_smoothing and not smoothed:
        raise InputError(
            f"--label-smoothing with --loss-type {settings.loss_type}: only {', '.join(SMOOTHED)} use it; leave it out"
        )
    if settings.discopop_tau != ObjectiveSettings.discopop_tau and "discopop" not in names:
        raise InputError(f"--discopop-tau with --loss-type {settings.loss_type}: only discopop uses it; leave it out")
    if "exo_pair" in names and not settings.label_smoothing:
        raise InputError("--loss-type exo_pair requires --label-smoothing above 0 (the paper uses 0.001)")
    parts = [(weight, PAIR_LOSSES[name]) for name, weight in zip(names, weights, strict=True)]
    words = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)
    )
    return _pairwise("dpo", settings, words, parts, reference=True, likelihood="answers" if "sft" in names else "none")


def _orpo(settings: ObjectiveSettings) -> Objective:
    parts = [(1.0, pair_losses.odds_ratio), (1.0, pair_losses.sft)]
    return _pairwise("orpo", settings, "odds ratio and likelihood", parts, likelihood="rows", per_token=True)


def _simpo(settings: ObjectiveSettings) -> Objective:
    return _pairwise("simpo", settings, f"margin {settings.simpo_gamma:g}", [(1.0, pair_losses.simpo)], per_token=True)


def _cpo(settings: ObjectiveSettings) -> Objective:
    parts = [(1.0, pair_losses.cpo)] + ([(settings.cpo_alpha, pair_losses.sft)] if settings.cpo_alpha else [])
    words = f"likelihood weight {settings.cpo_alpha:g}"
    return _pairwise("cpo", settings, words, parts, likelihood="answers" if settings.cpo_alpha else "none")


def _kto(settings: ObjectiveSettings) -> Objective:
    name, *others = _names("kto" if settings.loss_type == "sigmoid" else settings.loss_type, RATED_LOSSES)
    if others:
        raise InputError(
            f"--loss-type {settings.loss_type}: --objective kto has one loss; give {' or '.join(RATED_LOSSES)}"
        )
    options = RatedOptions(settings.beta, settings.desirable_weight, settings.undesirable_weight)
    function = RATED_LOSSES[name]

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        ratings = Ratings(sums.logps - sums.reference, sums.labels, sums.divergence)
        rewards = options.beta * ratings.ratio
        divergence = mx.broadcast_to(sums.divergence, rewards.shape)
        reports = (rewards * sums.labels, rewards * (1 - sums.labels), sums.labels, divergence)
        return function(ratings, options), dict(zip(RATED_REPORTS, reports, strict=True))

    words = f"kto: {name}, beta {settings.beta:g}"
    return Objective(
        "kto", "rated", words, loss, True, divergence=name == "kto", reports=RATED_REPORTS, finish=_rated_means
    )


def _rated_means(means: dict[str, float]) -> dict[str, float]:
    """Convert means over all answers to the mean reward of the good answers and of the bad ones; NaN without any."""
    good = means["good"]
    chosen = means["rewards_good"] / good if good else math.nan
    rejected = means["rewards_bad"] / (1 - good) if good < 1 else math.nan
    return {
        "margin": chosen - rejected,
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "divergence": means["divergence"],
    }


def _reward(settings: ObjectiveSettings) -> Objective:
    center = settings.center_rewards

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        good, bad = chosen.logps, rejected.logps
        reports = (preferred(good, bad, mx.abs(good) + mx.abs(bad)), good - bad, good, bad)
        named = dict(zip(REWARD_REPORTS, reports, strict=True))
        return bradley_terry(good, bad, chosen.labels, center), named

    words = "reward: Bradley-Terry" + (f", centered with weight {center:g}" if center else "")
    return Objective("reward", "pairs", words, loss, scores=True, reports=REWARD_REPORTS)


def _policy(settings: ObjectiveSettings) -> Objective:
    name = settings.objective
    if settings.group_size == 1:
        raise InputError(
            f"--group-size 1 with --objective {name}: it compares the answers to a prompt; give at least 2"
        )
    loss = name if name == "rloo" else settings.grpo_loss
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    # The penalty of rloo is taken from the reward, as in TRL; that of the others is part of the loss.
    beta = 0.0 if name == "rloo" else settings.kl_beta
    options = PolicyOptions(loss, settings.epsilon, high, beta, settings.kl_beta > 0, settings.max_new_tokens)
    words = f"{name}: {'' if name == loss else f'{loss} loss, '}groups of {settings.answers_per_prompt}"
    words += f", divergence weight {settings.kl_beta:g}" if settings.kl_beta else ""
    room, own = (settings.answers_per_prompt, settings.max_new_tokens), own_reports(reward_names(settings))
    reports = (*POLICY_REPORTS, *own, *(KNOWN + one for one in own))
    return Objective(name, "prompts", words, reports=reports, policy=options, room=room, finish=means_of_known)


def _distill(settings: ObjectiveSettings) -> Objective:
    name = settings.divergence or (REVERSE_KL if settings.on_policy else FORWARD_KL)
    options = DivergenceOptions(
        name, settings.jsd_beta, settings.distill_temp, settings.teacher_top_k, reports_reverse=settings.on_policy
    )
    words = f"distill: {name}"
    words += f" {settings.jsd_beta:g}" if name == "jsd" else ""
    words += f", temperature {settings.distill_temp:g}" if settings.distill_temp != 1 else ""
    if not settings.on_policy:
        _refuse_sampling(settings)
        return Objective("distill", description=words, distills=options, reports=DISTILL_REPORTS)
    if name == SAMPLED_KL:
        _refuse_beside_sampled_kl(settings)
    group = settings.answers_per_prompt
    words += f", {group} sampled answer{'s' * (group > 1)} to each prompt"
    return Objective(
        "distill", "prompts", words, distills=options, room=(group, settings.max_new_tokens), reports=ON_POLICY_REPORTS,
        finish=_per_answer,
    )  # fmt: skip


def _per_answer(means: dict[str, float]) -> dict[str, float]:
    """Convert means over trained tokens to means over answers, where that is what they are about."""
    answers = means.get("answers")
    return {
        "kl": means["kl"],
        **{name: means[name] / answers if answers else math.nan for name in ("length", "truncated")},
    }


def _refuse_sampling(settings: ObjectiveSettings) -> None:
    """Refuse options of sampling for a run that samples nothing."""
    if settings.divergence == SAMPLED_KL:
        raise InputError(f"--divergence {SAMPLED_KL}: it needs sampled answers; add --on-policy, or give reverse_kl")
    for name in [one for one in OF_SAMPLING if one not in OF_WRITING]:  # a teacher may write answers
        if getattr(settings, name) != getattr(ObjectiveSettings, name):
            raise InputError(f"--{name.replace('_', '-')} without --on-policy: nothing is sampled; leave it out")


def _refuse_beside_sampled_kl(settings: ObjectiveSettings) -> None:
    """Refuse options that change what is sampled or compared: the estimate holds for the student's own probabilities."""
    for name in ("temp", "top_p", "min_p", "distill_temp", "teacher_top_k"):
        if getattr(settings, name) != getattr(ObjectiveSettings, name):
            raise InputError(
                f"--{name.replace('_', '-')} with --divergence {SAMPLED_KL}: it compares the probabilities of tokens sampled "
                "as the student itself would; leave it out, or give reverse_kl"
            )


OBJECTIVES: dict[str, Callable[[ObjectiveSettings], Objective]] = {
    "sft": _sft,
    "dpo": _dpo,
    "orpo": _orpo,
    "simpo": _simpo,
    "cpo": _cpo,
    "kto": _kto,
    "reward": _reward,
    "grpo": _policy,
    "rloo": _policy,
    "distill": _distill,
}
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # the losses of DPO's family that use --label-smoothing
# Options that only some objectives use; with any other objective they are refused, because they would be ignored.
OWN_OPTIONS = {
    "loss_type": ("dpo", "kto"),
    "loss_weights": ("dpo",),
    "beta": ("dpo", "orpo", "simpo", "cpo", "kto"),
    "label_smoothing": ("dpo", "simpo", "cpo"),
    "discopop_tau": ("dpo",),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "shared_prefix": ("dpo", "orpo", "simpo", "cpo", "reward", *SAMPLING),
    "reference_adapter": ("dpo", "kto"),
    "center_rewards": ("reward",),
    "grpo_loss": ("grpo",),
    "scale_rewards": ("grpo",),
    **dict.fromkeys(OF_REWARDS, SAMPLING),
    **dict.fromkeys(OF_SAMPLING, (*SAMPLING, "distill")),
    "own_prompts": ("distill",),
    **dict.fromkeys(OF_TEACHER, ("distill",)),
}


def _pairwise(
    name: str,
    settings: ObjectiveSettings,
    words: str,
    parts: list[tuple[float, PairLoss]],
    reference: bool = False,
    likelihood: str = "none",
    per_token: bool = False,
) -> Objective:
    """Return an objective whose loss is a weighted sum of pairwise losses; with `per_token`, rewards are means per token."""
    options = PairOptions(settings.beta, settings.label_smoothing, settings.simpo_gamma, settings.discopop_tau)

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        pairs = Pairs(
            chosen.logps, rejected.logps, chosen.reference, rejected.reference, chosen.tokens, rejected.tokens,
            chosen.likelihood, chosen.real,
        )  # fmt: skip
        losses = [weight * function(pairs, options) for weight, function in parts]
        of_good, of_bad = (
            options.beta / (mx.maximum(tokens, 1) if per_token else 1)
            for tokens in (pairs.chosen_tokens, pairs.rejected_tokens)
        )
        good, bad = of_good * pairs.chosen_ratio, of_bad * pairs.rejected_ratio
        magnitude = of_good * (mx.abs(pairs.chosen) + mx.abs(pairs.reference_chosen))
        magnitude += of_bad * (mx.abs(pairs.rejected) + mx.abs(pairs.reference_rejected))
        reports = (preferred(good, bad, magnitude), good - bad, good, bad, pairs.chosen, pairs.rejected)
        named = {name: report.astype(mx.float32) for name, report in zip(PAIR_REPORTS, reports, strict=True)}
        return sum(losses[1:], losses[0]), named

    description = f"{name}: {words}, beta {settings.beta:g}"
    return Objective(name, "pairs", description, loss, reference, likelihood, reports=PAIR_REPORTS)


def _names(text: str, known: dict) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"--loss-type {name!r}: {_instead(name, known)}")
    if not names:
        raise InputError(f"--loss-type is empty; give one of {', '.join(known)}")
    return names


def _instead(name: str, known: dict) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"not one of {', '.join(known)}"


def _weights(text: str | None, names: list[str]) -> list[float]:
    if text is None:
        return [1.0] * len(names)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--loss-weights {text!r}: write numbers separated by commas, as in 0.8,0.2") from None
    if len(weights) != len(names) or not all(0 <= weight < 1e6 for weight in weights):
        raise InputError(f"--loss-weights {text!r}: give {len(names)} numbers of at least 0, one for each --loss-type")
    return weights


def _refuse_foreign(settings: ObjectiveSettings) -> None:
    """Refuse options that the objective does not use."""
    defaults = ObjectiveSettings()
    for name, owners in OWN_OPTIONS.items():
        if settings.objective not in owners and getattr(settings, name) != getattr(defaults, name):
            flag = "--" + name.replace("_", "-")
            only = f"{', '.join(owners)} {'use' if owners[1:] else 'uses'}"
            raise InputError(f"{flag} with --objective {settings.objective}: only {only} it; leave it out")
