"""Settings of a run's objective: what it trains towards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lora.config.fields import setting
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import unknown_name

OBJECTIVE = "Objective"  # heading of the help
# Settings of sampling that are used for a teacher's answers too.
OF_WRITING = ("max_new_tokens", "temp", "top_p", "min_p")
PROBLEMS = ("auto", "single_label_classification", "multi_label_classification", "regression")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # of dpo's losses, those with label smoothing
EMBED_SCORED = ("cosent", "cosine")  # losses of pairs with a score (losses/scores.py)
EMBED_LOSSES = ("infonce", "triplet", *EMBED_SCORED)
POOLINGS = ("mean", "last", "cls")
TASK_SETS = "reasoning-gym:"  # before the name of a set of tasks of that package, in --data
VERIFIERS = "verifiers:"  # before the name of an environment of that package, in --environment and --data
# --grpo-loss -> of what the probabilities are compared: each token, or the mean of an answer.
RATIOS = {"grpo": "token", "bnpo": "token", "dapo": "token", "dr_grpo": "token", "gspo": "mean"}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "sampled_kl")


@dataclass(frozen=True)
class ObjectiveRow:
    """What is known of an objective before its code is imported.

    Attributes:
        made_by: file in mlx_lora/objectives and what takes `ObjectiveSettings` there.
        records: the kind of records that the data must have: `examples`, `pairs`, `rated`, `prompts`, `labeled` or `candidates`.
        imitates: whether answers are trained token by token, so that a loss is a mean over tokens.
        rewarded: whether answers are sampled during the run, and rewarded.
        leaves_one_out: whether an answer is compared with the others to its prompt, and the divergence is taken from its reward.
        taught: whether a teacher says how likely each token is. Such a run can also write its own data.
        reference: whether the loss compares the model with a reference model.
        scores: whether a score head reads each row's last token.
        vectors: whether the model gives vectors of texts.
        on_encoders: whether the model may be an encoder, because the padding is masked.
        pictures: whether prompts may have pictures.
        together: whether runs on one base may be computed together (`train_several`).
        group: rows of an example that stay together in a batch, if the settings do not say more.
        trained: how many of these are trained; the others are only measured.
        examples_per_step: how many a step has if the settings leave open how large it is; None: as many as fit.
        metrics: numbers of a validation by which the best one may be chosen, the higher the better; the first two are shown.
        named_columns: whether settings may name the columns of its records.
    """

    made_by: str
    records: str = "examples"
    imitates: bool = False
    rewarded: bool = False
    leaves_one_out: bool = False
    taught: bool = False
    reference: bool = False
    scores: bool = False
    vectors: bool = False
    on_encoders: bool = False
    pictures: bool = False
    together: bool = False
    group: int = 1
    trained: int | None = None
    examples_per_step: int | None = None
    metrics: tuple[str, ...] = ()
    named_columns: bool = True

    @property
    def scores_texts(self) -> bool:
        """Whether a score of each text is trained, and no token or pair of answers."""
        return self.scores and self.on_encoders

    @property
    def of_answers(self) -> bool:
        """Whether the answers of the data are all that is trained toward, so that what a model says may be compared with them."""
        return self.imitates and not self.taught

    @property
    def writes(self) -> bool:
        """Whether its model writes text, and does not only score or embed it."""
        return not self.scores and not self.vectors


_PREFERENCE: dict[str, Any] = {"records": "pairs", "group": 2, "metrics": ("accuracy",)}
_OF_ANSWERS: dict[str, Any] = {"pictures": True, "together": True}
# A new objective is a row here, and its file.
OBJECTIVES = {
    "sft": ObjectiveRow("sft.SFT", imitates=True, pictures=True, together=True),
    "dpo": ObjectiveRow("dpo.dpo", reference=True, **_PREFERENCE, **_OF_ANSWERS),
    "orpo": ObjectiveRow("dpo.orpo", **_PREFERENCE, **_OF_ANSWERS),
    "simpo": ObjectiveRow("dpo.simpo", **_PREFERENCE, **_OF_ANSWERS),
    "cpo": ObjectiveRow("dpo.cpo", **_PREFERENCE, **_OF_ANSWERS),
    "kto": ObjectiveRow("ratings.kto", "rated", reference=True, group=2, trained=1, **_OF_ANSWERS),
    "reward": ObjectiveRow("ratings.reward", scores=True, **_PREFERENCE),
    "grpo": ObjectiveRow("grpo.policy", "prompts", rewarded=True, pictures=True),
    "rloo": ObjectiveRow("grpo.policy", "prompts", rewarded=True, leaves_one_out=True, pictures=True),
    "distill": ObjectiveRow("distill.distill", imitates=True, taught=True),
    "classify": ObjectiveRow(
        "classify.classify",
        "labeled",
        scores=True,
        on_encoders=True,
        pictures=True,
        metrics=("accuracy", "macro_f1"),
    ),
    "rerank": ObjectiveRow(
        "rerank.Rerank",
        "candidates",
        scores=True,
        on_encoders=True,
        metrics=("accuracy", "mrr", "ndcg"),
        named_columns=False,
    ),
    "embed": ObjectiveRow(
        "embed.embed", "pairs", vectors=True, on_encoders=True, group=2, examples_per_step=32, metrics=("accuracy",)
    ),
}
# What an example of each kind of records is, and how metrics are written.
UNITS = {"examples": "rows", "pairs": "pairs", "rated": "rated answers", "prompts": "prompts", "labeled": "texts",
         "candidates": "query lists"}  # fmt: skip
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "mrr": "MRR", "ndcg": "nDCG"}
SHOWN_METRICS = tuple(dict.fromkeys(name for row in OBJECTIVES.values() for name in row.metrics[:2]))
GONE = {"vision_sft": "sft, which sees the pictures in the data"}


def row_of(name: str | None) -> ObjectiveRow:
    """Return the row of an objective; None: of the default.

    Raises:
        InputError: there is none of this name.
    """
    name = ObjectiveSettings.objective if name is None else name
    if name in GONE:
        raise InputError(f"--objective {name}: give {GONE[name]}")
    if name not in OBJECTIVES:
        raise InputError(f"--objective {name!r}: {unknown_name(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def names_of(fact: str, value: Any = True) -> tuple[str, ...]:
    """Return the names of the objectives in whose row a fact has a value."""
    return tuple(name for name, row in OBJECTIVES.items() if getattr(row, fact) == value)


SAMPLING, IMITATION, ANSWERED, TAUGHT = map(names_of, ("rewarded", "imitates", "of_answers", "taught"))
LABELED, RANKED, RATED = (names_of("records", records) for records in ("labeled", "candidates", "rated"))
VECTORS, COMPARED, WITH_IMAGES = map(names_of, ("vectors", "reference", "pictures"))
PAIRS = tuple(name for name in names_of("records", "pairs") if name not in VECTORS)
MAY_SAMPLE = (*SAMPLING, *TAUGHT)
(CLASSIFY,), (RERANK,) = LABELED, RANKED  # which have functions of their own: predict, rerank
SCORED_RECORDS = frozenset(row.records for row in OBJECTIVES.values() if row.scores_texts)
WITHOUT_COLUMNS = names_of("named_columns", False)


# fmt: off
@dataclass(frozen=True)
class ObjectiveSettings:
    """What the run trains toward. Names and defaults are TRL's."""

    objective: str = setting("sft",
        "What to train toward. sft: imitate answers; dpo, orpo, simpo, cpo: prefer the chosen answer of each pair; "
        "kto: answers rated good or bad; reward: a reward model, which scores answers; grpo, rloo: sample answers to "
        "prompts, and learn from their rewards; distill: give each token the probabilities that a teacher gives it; "
        "classify: give each text its label, or a number; rerank: order documents by how well they answer a query; "
        "embed: give texts that belong together similar vectors, for search.",
        OBJECTIVE, common=True)
    images: bool = setting(False, "Prompts may have pictures, and --model is a vision-language model. Needed if only "
        "later rows than the first 20 have pictures, if the data are on the Hub, and to plan without data.", OBJECTIVE, only=WITH_IMAGES)
    loss_type: str = setting("sigmoid",
        "dpo: loss on the pairs, by TRL's names (sigmoid, sigmoid_norm, hinge, ipo ...); several, by commas, are added, "
        "such as sigmoid,sft, which also imitates the chosen answers. "
        "kto: kto or apo_zero_unpaired.", OBJECTIVE, only=("dpo", "kto"))
    loss_weights: str | None = setting(None,
        "dpo: weights of several losses in --loss-type, separated by commas (default 1 each).", OBJECTIVE, only=("dpo",))
    beta: float = setting(0.1,
        "How strongly the model is kept close to the reference; for orpo, the weight of the loss on pairs.",
        OBJECTIVE, more_than=0, at_most=1000, only=("dpo", "orpo", "simpo", "cpo", "kto"))
    label_smoothing: float = setting(0.0, "Share of pairs that are assumed to have swapped labels (exo_pair, robust, "
        "aot, cpo, simpo).", OBJECTIVE, at_least=0, at_most=0.49, only=("dpo", "simpo", "cpo"))
    discopop_tau: float = setting(0.05, "dpo: temperature of --loss-type discopop.",
        OBJECTIVE, more_than=0, at_most=1000, only=("dpo",))
    simpo_gamma: float = setting(0.5, "simpo: margin by which the chosen answer should win.",
        OBJECTIVE, at_least=0, at_most=1000, only=("simpo",))
    cpo_alpha: float = setting(1.0, "cpo: weight of the chosen answers' likelihood.",
        OBJECTIVE, at_least=0, at_most=1000, only=("cpo",))
    desirable_weight: float = setting(1.0, "kto: weight of good answers.", OBJECTIVE, at_least=0, at_most=1000, only=RATED)
    undesirable_weight: float = setting(1.0, "kto: weight of bad answers.", OBJECTIVE, at_least=0, at_most=1000, only=RATED)
    shared_prefix: str = setting("auto", "Compute a prompt once for all its answers (a pair's, or the sampled ones): "
        "on, off, or auto, if it saves work and the model supports it.", OBJECTIVE, choices=("auto", "on", "off"), may_change=True)
    center_rewards: float = setting(0.0, "reward: weight of the squared sum of a pair's scores, which keeps them near 0.",
        OBJECTIVE, at_least=0, at_most=1000, only=("reward",))
    reference_adapter: str | None = setting(None,
        "Adapter folder whose model is the reference (default: the model at the start of the run).",
        OBJECTIVE, may_change=True, per_machine=True, only=COMPARED)
    reward: str | None = setting(None,
        "grpo, rloo: what rewards an answer: FILE.py:FUNCTION with TRL's signature, the folder of a reward model, or "
        "exact_match, number_match, math-verify, reasoning-gym, think_format, length:N, regex:PATTERN, json_schema:FILE; several are separated by "
        "commas and added.", OBJECTIVE, runs=r"\.py:", only=SAMPLING)
    environment: str | None = setting(None, "grpo, rloo: a class as FILE.py:CLASS, whose reset begins an episode of several "
        "turns. Its step answers the model and rewards it, instead of --reward; without step, its public methods are tools, "
        "as in TRL's environment_factory. verifiers:NAME, or verifiers:FILE.toml: an environment of that package, which brings its "
        "own tasks, tools, and rewards.", OBJECTIVE, runs=rf"\.py:|{VERIFIERS}", only=SAMPLING)
    tools: str | None = setting(None, "grpo, rloo: functions that the model may call, as FILE.py or FILE.py:NAME,NAME; --reward "
        "rewards the whole episode.", OBJECTIVE, runs=r"\.py", only=SAMPLING)
    max_turns: int = setting(10, "With --environment or --tools: maximum number of the model's answers in an episode; "
        "--max-new-tokens limits all of them together.", OBJECTIVE, at_least=1, at_most=10**6, only=SAMPLING)
    reward_weights: str | None = setting(None, "Weights of several rewards, separated by commas (default 1 each).",
        OBJECTIVE, only=SAMPLING)
    reward_errors: str = setting("stop", "If a reward fails: stop the run, or skip its answers.",
        OBJECTIVE, choices=("stop", "skip"), may_change=True, only=SAMPLING)
    reward_timeout: float = setting(60.0, "Seconds that a reward function may take for the answers of a batch.",
        OBJECTIVE, more_than=0, at_most=86400, may_change=True, only=SAMPLING)
    group_size: int | None = setting(None, "grpo, rloo, --on-policy: answers that are sampled to each prompt (default 8; "
        "with --on-policy 1).", OBJECTIVE, at_least=1, at_most=1024, only=MAY_SAMPLE)
    max_new_tokens: int = setting(256, "grpo, rloo, distill: maximum number of tokens of a sampled answer.",
        OBJECTIVE, at_least=1, at_most=10**6, only=MAY_SAMPLE)
    temp: float = setting(1.0, "grpo, rloo, distill: temperature of sampling.", OBJECTIVE, more_than=0, at_most=100,
        only=MAY_SAMPLE)
    top_p: float = setting(1.0, "grpo, rloo, distill: sample from the most likely tokens whose probabilities add up to this.",
        OBJECTIVE, more_than=0, at_most=1, only=MAY_SAMPLE)
    min_p: float = setting(0.0, "grpo, rloo, distill: leave out tokens less likely than this share of the most likely token.",
        OBJECTIVE, at_least=0, at_most=1, only=MAY_SAMPLE)
    grpo_loss: str = setting("dapo", "grpo: how the losses of tokens are averaged (grpo, bnpo, dapo, dr_grpo), or gspo, "
        "which takes one ratio for an answer.", OBJECTIVE, choices=tuple(RATIOS), only=("grpo",))
    epsilon: float = setting(0.2, "grpo, rloo: clip the ratio of the new probability to the old this far below 1.",
        OBJECTIVE, more_than=0, at_most=1, only=SAMPLING)
    epsilon_high: float | None = setting(None, "grpo, rloo: clip the ratio this far above 1 (default: as --epsilon).",
        OBJECTIVE, more_than=0, at_most=1000, only=SAMPLING)
    kl_beta: float = setting(0.0, "grpo, rloo: weight of the divergence from the untrained model (TRL's beta).",
        OBJECTIVE, at_least=0, at_most=1000, only=SAMPLING)
    scale_rewards: str = setting("group", "grpo: divide advantages by the standard deviation of the rewards of the "
        "prompt's group, of the whole step's batch, or not at all.", OBJECTIVE, choices=("group", "batch", "none"),
        only=("grpo",))
    mask_truncated: bool = setting(False, "grpo, rloo, --on-policy: do not train answers that were cut at --max-new-tokens.",
        OBJECTIVE, only=MAY_SAMPLE)
    updates_per_rollout: int = setting(1, "grpo, rloo, --on-policy: how often each sampled answer is trained on.",
        OBJECTIVE, at_least=1, at_most=1000, only=MAY_SAMPLE)
    teacher: str | None = setting(None,
        "distill: the teacher, a model given as for --model and with the same tokenizer (default: --model itself, "
        "untrained, which then needs --teacher-prompt).", OBJECTIVE, may_change=True, per_machine=True, only=TAUGHT)
    teacher_prompt: str | None = setting(None, "distill: text file that only the teacher sees, as a system message in "
        "every chat.", OBJECTIVE, may_change=True, per_machine=True, only=TAUGHT)
    own_prompts: int | None = setting(None, "distill without --data: prompts that the model writes itself, and the teacher "
        "answers (default 200).", OBJECTIVE, at_least=8, at_most=10**6, only=TAUGHT)
    teacher_top_k: int = setting(64, "distill: keep the teacher's probabilities of this many likeliest tokens, and of all "
        "others together; 0: of every token.", OBJECTIVE, at_least=0, at_most=10**6, only=TAUGHT)
    divergence: str | None = setting(None, "distill: the divergence to minimize. forward_kl: KL(teacher, student), reverse_kl: "
        "KL(student, teacher), jsd: between the two, as in TRL's GKD; sampled_kl: with --on-policy, reverse_kl from the "
        "sampled tokens alone (default forward_kl; with --on-policy reverse_kl).", OBJECTIVE, choices=DIVERGENCES,
        only=TAUGHT)
    jsd_beta: float = setting(0.5, "distill: place of --divergence jsd between forward_kl (0) and reverse_kl (1).",
        OBJECTIVE, at_least=0, at_most=1, only=TAUGHT)
    distill_temp: float = setting(1.0, "distill: divide the logits of teacher and student by this.",
        OBJECTIVE, more_than=0, at_most=100, only=TAUGHT)
    problem_type: str = setting("auto", "classify: whether a text has one label, several, or a number, by transformers' names; auto: "
        "lists are several labels, and numbers that are not all whole are numbers.", OBJECTIVE, choices=PROBLEMS, only=LABELED)
    labels: str | None = setting(None, "classify: the labels in the order of the head's outputs, separated by commas (default: "
        "those of the training data, sorted).", OBJECTIVE, only=LABELED)
    class_weights: str | None = setting(None, "classify: weights of labels in the loss, such as spam=2,ham=1, or balanced, which "
        "gives rare labels as much weight as common ones (default 1 each).", OBJECTIVE, only=LABELED)
    rerank_loss: str = setting("pairwise", "rerank: what is compared with the grades of documents. pairwise: each pair of a better and a "
        "worse one (RankNet); listwise: the scores of all documents of a query (ListNet); binary: each document by itself.",
        OBJECTIVE, choices=("pairwise", "listwise", "binary"), only=RANKED)
    candidates: int = setting(8, "rerank: maximum number of documents of a query; those with the best grades are used.", OBJECTIVE, at_least=2,
        at_most=1000, only=RANKED)
    on_policy: bool = setting(False, "distill: sample the answers to the prompts in --data from the model as it is "
        "trained; the teacher stays in memory.", OBJECTIVE, only=TAUGHT)

    embed_loss: str | None = setting(None, "embed: the loss. infonce: a query's own document against all others of a step; triplet: "
        "against its own negatives; cosent, cosine: pairs with a score (default: infonce, or cosent for scores).",
        OBJECTIVE, choices=EMBED_LOSSES, only=VECTORS)
    embed_temp: float = setting(0.05, "embed: divide cosines by this (infonce, cosent).", OBJECTIVE, more_than=0, at_most=100,
        only=VECTORS)
    triplet_margin: float = setting(0.5, "embed: cosine distance by which a negative should be farther away than the document (triplet).",
        OBJECTIVE, more_than=0, at_most=2, only=VECTORS)
    negatives: int | None = setting(None, "embed: maximum number of negatives of an example (default: all).",
        OBJECTIVE, at_least=0, at_most=1000, only=VECTORS)
    matryoshka_dims: str | None = setting(None, "embed: train vectors whose first numbers also work alone, for these counts, such as 384,128,64.",
        OBJECTIVE, only=VECTORS)
    pooling: str | None = setting(None, "embed: what becomes a text's vector: the mean of its tokens' states, or that of the last or the "
        "first token (default: as the model's own files say, else last; mean for an encoder).", OBJECTIVE, choices=POOLINGS,
        only=VECTORS)
    query_prompt: str | None = setting(None, "embed: text before each query, such as 'query: ' (default: as the model's own files say, "
        "else none).", OBJECTIVE, only=VECTORS)
    document_prompt: str | None = setting(None, "embed: text before each document.", OBJECTIVE, only=VECTORS)

    @property
    def row(self) -> ObjectiveRow:
        """What is known of the objective; an InputError if there is none of this name."""
        return row_of(self.objective)

    @property
    def records(self) -> str:
        """The kind of records that the data must have."""
        return "prompts" if self.samples else self.row.records

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers to a prompt may share its row (--shared-prefix)."""
        return self.objective in (*PAIRS, *SAMPLING) and not self.images

    @property
    def rows_per_example(self) -> int:
        """Rows that stay together in a batch: one, a pair's two answers, or a rated answer and one to compare it with.

        With --shared-prefix on, which a run sets when it has decided, all answers to a prompt are one row.
        """
        if self.shared_prefix == "on":
            return 1
        return self.answers_per_prompt if self.samples else self.row.group + (self.negatives or 0)

    @property
    def trained_rows_per_example(self) -> int:
        """The number of these rows that are trained; the others are only measured."""
        return self.row.trained or self.rows_per_example

    @property
    def rewarded(self) -> bool:
        """Whether sampled answers are rewarded."""
        return self.row.rewarded

    @property
    def samples(self) -> bool:
        """Whether the answers are sampled during the run."""
        return self.rewarded or self.on_policy

    @property
    def has_episodes(self) -> bool:
        """Whether an environment or tools reply to the model's answers, which then go on."""
        return bool(self.environment or self.tools)

    @property
    def answers_per_prompt(self) -> int:
        """The number of answers that are sampled to each prompt."""
        return self.group_size or (8 if self.rewarded else 1)

    @property
    def updates(self) -> int:
        """Steps on the same batches; a run is saved and ended between them only."""
        return self.updates_per_rollout if self.samples else 1
