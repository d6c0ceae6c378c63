"""Preference training here, and TRL's loss code over PEFT on torch: same factors, rows and optimizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bound import bind
from curves import ALPHA, RANK, RATE, STEPS, assert_same_curve, move_second_factors, our_curve, over_peft, torch_curve
from real_models import smollm2_gguf
from run_cli import run
from torch_judge import torch_base

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.batch import collate
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.load import load_base
from mlx_lora.models.prefix_attention import rotate_by_token
from mlx_lora.objectives.prefix_sharing import joined
from mlx_lora.objectives.reference import batch_sums, row_log_probabilities
from mlx_lora.objectives.table import objective_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

EXAMPLES = 12


def answers(seed: int = 0, rated: bool = False) -> EncodedSet:
    """Return random pairs (or rated answers with their partners): a shared prompt, then an answer."""
    random = np.random.default_rng(seed)
    rows, labels = [], []
    for number in range(EXAMPLES):
        prompt = random.integers(0, 288, int(random.integers(3, 9)))
        for side in range(2):
            answer = random.integers(0, 288, int(random.integers(2, 12)))
            mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
            rows.append((np.concatenate([prompt, answer]).astype(np.int32), mask))
            labels.append(float(number % 2) if rated and side == 0 else 0.0)
    return EncodedSet.from_rows(rows).grouped(2, np.array(labels))


def settings_of(name: str, **options) -> ObjectiveSettings:
    return ObjectiveSettings(objective=name, **{"beta": 0.3, **options})


def ours(
    folder, settings: ObjectiveSettings, rows: EncodedSet, steps: int = STEPS, shared: bool = False, rate: float = RATE
):
    """Train, with `shared` on rows that hold a prompt and both answers.

    Returns the curve, the initial factors, the reference and the batches of separate rows.
    """
    objective = objective_of(settings)
    base = load_base(ModelSettings(model=str(folder)))
    adapt_model(base.model, AdapterSettings(rank=RANK, alpha=ALPHA), seed=1)
    loss = choose_loss(base.model, base.config)
    rows = rows.with_whole_rows() if objective.likelihood == "rows" else rows
    reference = row_log_probabilities(base.model, batch_sums(loss.measure_tokens), rows, 256)
    rows = replace(rows, reference=reference if objective.options.row.reference else None)
    initial = move_second_factors(base.model)
    if shared:
        rotate_by_token(base.model)
    plan = BatchPlan(joined(rows) if shared else rows, batch_tokens=400, batch_size=4, seed=0)
    batches = [plan.batch(*divmod(number, len(plan))) for number in range(steps)]
    curve = our_curve(base.model, bind(objective, loss, base), batches, rate)
    if shared:
        assert all(batch.starts is not None for batch in batches)
        wide = int(rows.lengths.max())
        batches = [collate(rows, batch.numbers, wide, 8 * wide) for batch in batches]
    return curve, initial, reference, batches


CASES = {
    "dpo": settings_of("dpo"),
    "dpo hinge": settings_of("dpo", loss_type="hinge"),
    "dpo ipo": settings_of("dpo", loss_type="ipo"),
    "dpo robust": settings_of("dpo", loss_type="robust", label_smoothing=0.1),
    "dpo aot": settings_of("dpo", loss_type="aot"),
    "dpo apo_zero": settings_of("dpo", loss_type="apo_zero"),
    "dpo mixed": settings_of("dpo", loss_type="sigmoid,bco_pair,sft", loss_weights="0.8,0.2,0.5"),
    "orpo": settings_of("orpo"),
    "simpo": settings_of("simpo", simpo_gamma=0.4),
    "cpo": settings_of("cpo", cpo_alpha=0.7),
    "kto": settings_of("kto", undesirable_weight=0.6),
}
NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "chosen_rewards": "rewards/chosen",
         "rejected_rewards": "rewards/rejected", "chosen_logps": "logps/chosen"}  # fmt: skip


SHARED = ("dpo", "dpo mixed", "orpo", "simpo", "cpo")


@pytest.mark.parametrize(("case", "shared"), [*((case, False) for case in CASES), *((case, True) for case in SHARED)])
def test_losses_gradients_and_curves_are_trls(case, shared, tiny_folder):
    compare(tiny_folder, CASES[case], shared)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "float"
    assert run("convert", "--model", smollm2_gguf(), "--out", folder, "--no-quantize", "--dtype", "float32").code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_smollm2_trains_as_in_trl(case, smollm2):
    curve = case in ("dpo", "orpo", "simpo", "cpo", "kto")
    compare(smollm2, CASES[case], case != "kto", rate=3e-4, steps=STEPS if curve else 2, small=False)


def compare(
    folder, settings: ObjectiveSettings, shared: bool, rate: float = RATE, steps: int = STEPS, small: bool = True
) -> None:
    """Train here and with TRL's loss over PEFT, and compare losses, gradients, factors and reports.

    A model that is not `small` has wider bars: a loss is a difference of log-probabilities near 100, and after SmolLM2's 30
    blocks TRL's own float32 gradient of the worst factor is 3.6e-4 from its float64 one.
    """
    pytest.importorskip("trl")
    from trl_judge import preference_loss

    rows = answers(rated=settings.objective == "kto")
    found, initial, reference, batches = ours(folder, settings, rows, steps, shared, rate)
    model, trained = over_peft(torch_base(folder), initial)
    model.train()
    theirs = torch_curve(trained, lambda batch: preference_loss(settings, model, batch, reference), batches, rate)
    assert_same_curve(found, theirs, initial, 1e-5 if small else 1e-4, 1e-4 if small else 4e-4)
    mine, told = found.reports[0], theirs.reports[0]
    for name, other in NAMES.items():
        if name in mine and other in told:
            assert mine[name] == pytest.approx(told[other], rel=1e-4, abs=1e-5 if small else 2e-4), name


@pytest.mark.parametrize("case", ["dpo", "orpo", "simpo", "cpo", "kto"])
def test_a_swapped_pair_or_another_beta_is_another_loss(case, tiny_folder):
    settings = CASES[case]
    rows = answers(rated=case == "kto")

    def losses(rows: EncodedSet, settings: ObjectiveSettings = settings) -> list[float]:
        return ours(tiny_folder, settings, rows, steps=2)[0].losses

    right = losses(rows)
    assert right == losses(rows)
    assert not np.allclose(right, losses(rows, replace(settings, beta=0.5)), rtol=1e-4)
    if case == "kto":
        swapped = rows.grouped(2, 1 - rows.labels)
    else:
        swapped = EncodedSet.from_rows([rows.row(i ^ 1) for i in range(len(rows))]).grouped(2, rows.labels)
    assert not np.allclose(right, losses(swapped), rtol=1e-4)


def test_the_reference_is_torchs(tiny_folder):
    import torch

    rows = answers()
    reference = ours(tiny_folder, CASES["dpo"], rows, steps=1)[2]
    model = torch_base(tiny_folder)
    for number in range(0, len(rows), 5):
        tokens, mask = rows.row(number)
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor(tokens[None].astype(np.int64))).logits[0], dim=-1)
        wanted = sum(logps[i - 1, tokens[i]].item() for i in np.flatnonzero(mask))
        assert reference[number] == pytest.approx(wanted, rel=1e-5)
        assert reference[number] != pytest.approx(reference[number ^ 1], rel=1e-3)
