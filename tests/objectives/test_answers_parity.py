"""Losses on answers here and on torch over PEFT, with every factor's gradient: TRL's policy losses and GKD, and their definitions.

Rollouts, rewards and teachers are frozen. The judge of whole distributions is TRL's GKD, that of sampled tokens the definition, and
that of bins their sum."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from conftest import tiny_model, write_folder
from curves import assert_same_gradients, over_peft
from frozen_answers import LONGEST, frozen_batch, moved_base
from mlx.utils import tree_flatten
from torch_judge import torch_base

from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.divergence import DivergenceOptions, divergence_of_logits, likeliest
from mlx_lora.losses.grpo import RATIO_OF
from mlx_lora.models.load import load_base
from mlx_lora.objectives.distill import with_teacher
from mlx_lora.objectives.on_policy import TeacherScorer
from mlx_lora.objectives.policy_arrays import ADVANTAGES, OLD, REFERENCE, token_logps
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.teacher import Teacher
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.parallel.strategy import SINGLE_DEVICE

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
# rloo takes the divergence from the reward.
POLICIES = [(name, beta) for name in RATIO_OF for beta in (0.0, 0.2) if name != "rloo" or not beta]


@pytest.mark.parametrize(("name", "beta"), POLICIES)
def test_loss_and_every_gradient_are_trls(name, beta, tiny_folder):
    import torch
    from trl_policy_judge import policy_objective

    base, initial = moved_base(tiny_folder)
    loss = choose_loss(base.model, base.config)
    batch = frozen_batch()
    random = np.random.default_rng(9)
    old = token_logps(base.model, loss, batch)
    old += random.normal(0, 0.2, old.shape).astype(np.float32) * batch.mask
    reference = old + random.normal(0, 0.3, old.shape).astype(np.float32) * batch.mask
    batch = batch.with_columns(**{OLD: old, REFERENCE: reference})
    asked = ObjectiveSettings("rloo") if name == "rloo" else ObjectiveSettings("grpo", grpo_loss=name, kl_beta=beta)
    asked = replace(asked, epsilon=0.15, epsilon_high=0.25, max_new_tokens=LONGEST, reward="exact_match")
    task = bind(objective_of(asked), loss, base)
    [ready] = task.prepare([batch], SINGLE_DEVICE)
    (total, count, _), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(ready))
    ours = {key: np.array(value / count) for key, value in tree_flatten(grads)}

    model, trained = over_peft(torch_base(tiny_folder), initial)
    model.train()
    inputs, targets = (torch.tensor(values.astype(np.int64)) for values in (batch.inputs, batch.targets))
    logps = torch.log_softmax(model(inputs).logits, dim=-1).gather(2, targets[..., None]).squeeze(2)
    others = [torch.tensor(values) for values in (old, reference, batch.mask, batch.columns[ADVANTAGES])]
    options = {"beta": beta, "low": 0.15, "high": 0.25, "longest": LONGEST}
    wanted, _ = policy_objective(logps, *others, name, **options)
    wanted.backward()
    assert (total / count).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert_same_gradients(ours, trained)


TINY_VOCABULARY = 288
BETAS = {"forward_kl": 0.0, "jsd": 0.3, "reverse_kl": 1.0}
DIVERGENCES = [*((name, 0) for name in BETAS), ("reverse_kl", 7), ("sampled_kl", 64)]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("teacher") / "tiny", tiny_model(seed=7))


def torch_loss(name, top_k, logits, teacher, targets, mask, old):
    """Return the loss of a student's logits (B, T, V), a mean over trained tokens, from the definition or TRL's code."""
    import torch
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    if name != "sampled_kl" and not top_k:
        return GKDTrainer.generalized_jsd_loss(logits, teacher, torch.where(mask, targets, -100), beta=BETAS[name])
    ours, theirs = torch.log_softmax(logits, -1)[mask], torch.log_softmax(teacher, -1)[mask]  # (N, V)
    if name == "sampled_kl":
        own, other = (values.gather(1, targets[mask][:, None]).squeeze(1) for values in (ours, theirs))
        advantages = other - old[mask]
        return -(torch.exp(own - old[mask]) * advantages).mean()
    ids = theirs.topk(top_k, dim=1).indices

    def bins(logps):
        kept = logps.gather(1, ids).exp()
        return torch.cat([kept, 1 - kept.sum(1, keepdim=True)], dim=1)

    p, q = bins(ours), bins(theirs)
    return (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize(("name", "top_k"), DIVERGENCES)
def test_sampled_distillation_has_the_loss_and_every_gradient(name, top_k, tiny_folder, teacher_folder):
    import torch

    base, initial = moved_base(tiny_folder)
    theirs = load_base(ModelSettings(model=str(teacher_folder)))
    loss, batch = choose_loss(base.model, base.config), frozen_batch()
    asked = ObjectiveSettings("distill", teacher="tiny", divergence=name, teacher_top_k=top_k, on_policy=True)
    objective = objective_of(replace(asked, jsd_beta=BETAS["jsd"]))
    scorer = TeacherScorer.of(
        Teacher(theirs, choose_loss(theirs.model, theirs.config)), objective.compared, TINY_VOCABULARY
    )
    scored = scorer.scored(batch, EncodedSet.from_rows([]), np.arange(len(batch.inputs)), ALONE)
    old = token_logps(base.model, loss, batch)
    old += np.random.default_rng(9).normal(0, 0.2, old.shape).astype(np.float32) * batch.mask
    if name == "sampled_kl":
        scored = scored.with_columns(**{OLD: old})
    objective.scorer = scorer
    task = bind(objective, loss, base)
    (total, count, reports), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(scored))
    ours = {key: np.array(value / count) for key, value in tree_flatten(grads)}
    assert count.item() == batch.mask.sum()
    assert reports["length"].item() == batch.mask.sum()
    assert reports["answers"].item() == len(batch.inputs)

    model, trained = over_peft(torch_base(tiny_folder), initial)
    model.train()
    inputs, targets = (torch.tensor(values.astype(np.int64)) for values in (batch.inputs, batch.targets))
    with torch.no_grad():
        teacher = torch_base(teacher_folder)(inputs).logits
    logits = model(inputs).logits
    wanted = torch_loss(name, top_k, logits, teacher, targets, torch.tensor(batch.mask), torch.tensor(old))
    wanted.backward()
    assert (total / count).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert_same_gradients(ours, trained)
    if name != "sampled_kl":  # what is reported is KL(student, teacher), whatever is trained
        shown = torch_loss("reverse_kl", top_k, logits, teacher, targets, torch.tensor(batch.mask), None)
        assert (reports["kl"] / count).item() == pytest.approx(shown.item(), rel=1e-4)


def test_without_a_further_update_the_loss_is_the_estimate_of_the_kl(tiny_folder, teacher_folder):
    """Then the student is the one that sampled: the ratio is 1, and the loss what is reported."""
    base, _ = moved_base(tiny_folder)
    theirs = load_base(ModelSettings(model=str(teacher_folder)))
    loss, batch = choose_loss(base.model, base.config), frozen_batch()
    objective = objective_of(ObjectiveSettings("distill", teacher="tiny", divergence="sampled_kl", on_policy=True))
    teacher = Teacher(theirs, choose_loss(theirs.model, theirs.config))
    scorer = TeacherScorer.of(teacher, objective.compared, TINY_VOCABULARY)
    scored = scorer.scored(batch, EncodedSet.from_rows([]), np.arange(len(batch.inputs)), ALONE)
    objective.scorer = scorer
    task = bind(objective, loss, base)
    for function in (task.loss.train, task.loss.measure):
        total, count, reports = function(base.model, task.arrays_of(scored))
        away = (token_logps(base.model, loss, batch) - teacher.logps(batch))[batch.mask].mean()
        assert (total / count).item() == pytest.approx(away, rel=1e-4)
        assert reports["kl"].item() == pytest.approx(total.item(), rel=1e-6)


POSITIONS, VOCABULARY = 40, 300
NAMES = {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}


def frozen(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (POSITIONS, VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", NAMES)
def test_loss_and_gradient_of_frozen_logits_are_trls(beta, temperature):
    import torch
    from trl.experimental.gkd import GKDTrainer

    student, teacher = frozen(0), frozen(1)
    options = DivergenceOptions(NAMES[beta], beta, temperature, top_k=0)

    def mean(logits):
        return divergence_of_logits(logits, likeliest(mx.array(teacher), options), options)[0].mean()

    loss, gradient = mx.value_and_grad(mean)(mx.array(student))
    logits = torch.tensor(student, requires_grad=True)
    labels = torch.zeros((1, POSITIONS), dtype=torch.long)
    theirs = GKDTrainer.generalized_jsd_loss(
        logits[None], torch.tensor(teacher)[None], labels, beta=beta, temperature=temperature
    )
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-4)
    wanted = logits.grad.numpy()
    assert np.linalg.norm(np.array(gradient) - wanted) < 1e-4 * np.linalg.norm(wanted)


def bins_in_torch(logits, ids):
    """Return log-probabilities of the bins from the definition: the sum of the others' probabilities."""
    import torch

    if ids is None:
        return torch.log_softmax(logits, -1)
    powers = torch.softmax(logits, -1)
    return torch.cat([powers.gather(-1, ids), powers.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1).log()


def divergence_in_torch(teacher, student, beta: float):
    """Return the mean of the generalized Jensen-Shannon divergence, written from its definition."""
    import torch

    p, q = teacher.exp(), student.exp()
    if beta == 0:
        return (p * (teacher - student)).sum(-1).mean()
    if beta == 1:
        return (q * (student - teacher)).sum(-1).mean()
    mixed = torch.log(beta * p + (1 - beta) * q)
    return (beta * (p * (teacher - mixed)).sum(-1) + (1 - beta) * (q * (student - mixed)).sum(-1)).mean()


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("beta", NAMES)
def test_bins_are_those_of_the_definition(beta, top_k):
    import torch

    student, teacher = frozen(2), frozen(3)
    options = DivergenceOptions(NAMES[beta], beta, 1.0, top_k)

    def mean(logits):
        return divergence_of_logits(logits, likeliest(mx.array(teacher), options), options)[0].mean()

    loss, gradient = mx.value_and_grad(mean)(mx.array(student))
    logits, other = torch.tensor(student, requires_grad=True, dtype=torch.float64), torch.tensor(teacher).double()
    ids = other.topk(top_k, dim=-1).indices
    theirs = divergence_in_torch(bins_in_torch(other, ids), bins_in_torch(logits, ids), beta)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-4)
    wanted = logits.grad.numpy()
    assert np.linalg.norm(np.array(gradient) - wanted) < 1e-4 * np.linalg.norm(wanted)


def answered_rows(seed: int = 0) -> EncodedSet:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(6):
        tokens = random.integers(0, 268, int(random.integers(8, 20))).astype(np.int32)
        rows.append((tokens, np.arange(len(tokens)) >= random.integers(3, 7)))
    return EncodedSet.from_rows(rows)


@pytest.mark.parametrize("top_k", [0, 8])
@pytest.mark.parametrize("beta", NAMES)
def test_the_adapters_gradients_are_torchs(beta, top_k, tiny_folder, tmp_path):
    """From the teacher's table on disk to every factor; what 16 bits round is the only difference."""
    import torch

    loud = tiny_model(seed=3)
    loud.model.embed_tokens.weight = loud.model.embed_tokens.weight * 3
    folder = write_folder(tmp_path / "teacher", loud)
    asked = ObjectiveSettings(
        "distill", teacher=str(folder), teacher_top_k=top_k, divergence=NAMES[beta], jsd_beta=beta, distill_temp=2.0
    )
    asked = replace(asked, jsd_beta=beta if NAMES[beta] == "jsd" else 0.5)
    settings = replace(train_settings({"model": str(tiny_folder)}), objective=asked)
    plain = load_base(ModelSettings(model=str(tiny_folder)))
    rows = with_teacher(settings, plain, {"train": answered_rows()}, objective_of(settings.objective).compared).sets[
        "train"
    ]
    base, initial = moved_base(tiny_folder)
    task = bind(objective_of(asked), choose_loss(base.model, base.config), base, rows)
    batch = BatchPlan(rows, batch_tokens=10**4, batch_size=6, seed=0).batch(0, 0)
    (total, count, reports), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(batch))
    ours = {key: np.array(value / count) for key, value in tree_flatten(grads)}

    model, trained = over_peft(torch_base(tiny_folder), initial)
    model.train()
    inputs, mask = torch.tensor(batch.inputs.astype(np.int64)), torch.tensor(batch.mask)
    with torch.no_grad():
        other = torch_base(folder)(inputs).logits[mask].double() / 2.0
    student = model(inputs).logits[mask].double() / 2.0
    ids = other.topk(top_k, dim=-1).indices if top_k else None
    wanted = divergence_in_torch(bins_in_torch(other, ids), bins_in_torch(student, ids), beta)
    wanted.backward()
    assert (total / count).item() == pytest.approx(wanted.item(), rel=1e-3)
    assert (reports["kl"] / count).item() > 0
    assert_same_gradients(ours, trained, 2e-3)
