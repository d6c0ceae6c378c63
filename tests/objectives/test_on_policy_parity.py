"""Frozen answers and two models: the loss of on-policy distillation here and on torch over PEFT, with every factor's gradient.

The judge of whole distributions is TRL's GKD, that of sampled tokens the definition, and that of bins their sum.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from conftest import tiny_model, write_folder
from curves import assert_same_gradients, over_peft
from frozen_answers import frozen_batch, moved_base
from mlx.utils import tree_flatten
from torch_judge import torch_base

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.losses.check import choose_loss
from mlx_lora.models.load import load_base
from mlx_lora.objectives.on_policy import TeacherScorer
from mlx_lora.objectives.policy_arrays import OLD, token_logps
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.teacher import Teacher
from mlx_lora.parallel.ranks import ALONE

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
VOCABULARY = 288
BETAS = {"forward_kl": 0.0, "jsd": 0.3, "reverse_kl": 1.0}
CASES = [*((name, 0) for name in BETAS), ("reverse_kl", 7), ("sampled_kl", 64)]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("teacher") / "tiny", tiny_model(seed=7))


def torch_loss(name, top_k, logits, teacher, targets, mask, old):
    """Return the loss of a student's logits (B, T, V), a mean over trained tokens, from the definition or TRL's code."""
    import torch
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    if name != "sampled_kl" and not top_k:
        labels = torch.where(mask, targets, -100)
        return GKDTrainer.generalized_jsd_loss(logits, teacher, labels, beta=BETAS[name])
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


@pytest.mark.parametrize(("name", "top_k"), CASES)
def test_loss_and_every_gradient(name, top_k, tiny_folder, teacher_folder):
    import torch

    base, initial = moved_base(tiny_folder)
    theirs = load_base(ModelSettings(model=str(teacher_folder)))
    loss, batch = choose_loss(base.model, base.config), frozen_batch()
    asked = ObjectiveSettings("distill", teacher="tiny", divergence=name, teacher_top_k=top_k, on_policy=True)
    objective = objective_of(replace(asked, jsd_beta=BETAS["jsd"]))
    scorer = TeacherScorer.of(Teacher(theirs, choose_loss(theirs.model, theirs.config)), objective.compared, VOCABULARY)
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
    scorer = TeacherScorer.of(teacher, objective.compared, VOCABULARY)
    scored = scorer.scored(batch, EncodedSet.from_rows([]), np.arange(len(batch.inputs)), ALONE)
    objective.scorer = scorer
    task = bind(objective, loss, base)
    for function in (task.loss.train, task.loss.measure):
        total, count, reports = function(base.model, task.arrays_of(scored))
        away = (token_logps(base.model, loss, batch) - teacher.logps(batch))[batch.mask].mean()
        assert (total / count).item() == pytest.approx(away, rel=1e-4)
        assert reports["kl"].item() == pytest.approx(total.item(), rel=1e-6)
