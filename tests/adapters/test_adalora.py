"""AdaLoRA here and in PEFT on torch: losses, budget, which ranks stay; and its parts by themselves."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from comparing import peak_bytes
from conftest import tiny_model
from tiny_steps import batch, losses_of, method_step
from torch_judge import name_here, torch_base, trained_in_torch

from mlx_lora.adapters.inject import adapt_model, adapter_layers, adapter_parameters
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, stored_parameters
from mlx_lora.models.load import load_base
from mlx_lora.trainer.schedules import BudgetSchedule, budget_schedule
from mlx_lora.utils.errors import InputError

STEPS = 30
# With a cut every 2nd or 4th step, two ranks come to within one rounding of the threshold in the end, and either
# side keeps another one; up to there the losses are equal to 1e-6 as well.
SETTINGS = AdapterSettings(
    method="adalora", rank=4, alpha=32.0, adalora_init_rank=6, adalora_tinit=5, adalora_tfinal=10, adalora_delta_t=3
)


def batches():
    return [batch(3, 17 + step % 4, seed=step) for step in range(STEPS)]


def trained(model, settings=SETTINGS):
    """Train and return losses, and the ranks that are on after each step."""
    step, on = method_step(model, settings, STEPS, 2e-2), []
    losses = []
    for one in batches():
        losses += losses_of(step, [one])
        on.append(sum((layer.lora_e != 0).sum().item() for layer in adapter_layers(model).values()))
    return losses, on


def in_peft(folder, initial):
    """Return losses, ranks that are on after each step, and the final parameters under our names."""
    import peft
    import torch

    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=5, tfinal=10, deltaT=3, lora_alpha=32, total_step=STEPS, lora_dropout=0.0,
        orth_reg_weight=0.5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(torch_base(folder), config).train()
    own = {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}
    assert own.keys() == initial.keys()
    for name, value in own.items():
        start = initial[name][:, None] if name.endswith("lora_e") else initial[name].T
        value.data = torch.tensor(start.copy())
    on = []

    def penalty():
        """Return that of AdaLoraModel.forward, which needs labels in PEFT's own shift."""
        factors = [(name, value) for name, value in own.items() if not name.endswith("lora_e")]
        grams = [value @ value.T if name.endswith("lora_a") else value.T @ value for name, value in factors]
        return 0.5 * sum(torch.norm(gram - torch.eye(len(gram)), p="fro") for gram in grams) / len(grams)

    def after(step: int) -> None:
        model.base_model.update_and_allocate(step)
        on.append(sum(int((value != 0).sum()) for name, value in own.items() if name.endswith("lora_e")))

    optimizer = torch.optim.AdamW(own.values(), lr=2e-2, weight_decay=0.01)
    losses = trained_in_torch(model, own, optimizer, batches(), penalty, after)
    return losses, on, {name: value.detach().numpy() for name, value in own.items()}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_losses_budget_and_ranks_are_pefts(tiny_folder):
    pytest.importorskip("peft")
    base = load_base(ModelSettings(model=str(tiny_folder)))
    adapt_model(base.model, SETTINGS, seed=1)
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    losses, on = trained(base.model)
    theirs, their_on, final = in_peft(tiny_folder, initial)
    assert np.abs(np.array(losses) / np.array(theirs) - 1).max() < 1e-4
    assert on == their_on
    assert on[0] == 6 * 14
    assert on[-1] == 4 * 14
    assert losses[-1] < losses[0] - 0.1
    for path, layer in adapter_layers(base.model).items():
        assert ((layer.lora_e != 0).tolist()) == (final[f"{path}.lora_e"][:, 0] != 0).tolist(), path
    # The penalty is in the gradient: without it the factors end elsewhere.
    base = load_base(ModelSettings(model=str(tiny_folder)))
    free = AdapterSettings(**{**SETTINGS.__dict__, "orth_reg_weight": 0.0})
    adapt_model(base.model, free, seed=1)
    assert not np.allclose(trained(base.model, free)[0], losses, rtol=1e-3)


def test_the_budget_is_a_cubic_between_two_plateaus():
    schedule = BudgetSchedule(initial=84, target=56, total_steps=100, warmup=10, final=30, every=5)
    curve = [schedule.budget(step) for step in range(1, 101)]
    assert curve[:10] == [84] * 10
    assert curve[70:] == [56] * 30
    assert all(a >= b for a, b in pairwise(curve))
    assert curve[39] == int((84 - 56) * 0.5**3 + 56)
    assert [step for step in range(1, 101) if schedule.cuts(step)] == [*range(15, 70, 5), 70]


def test_the_factors_come_closer_to_orthogonal():
    model = tiny_model()
    settings = AdapterSettings(**{**SETTINGS.__dict__, "orth_reg_weight": 10.0})
    adapt_model(model, settings, seed=1)

    def distance():
        grams = [layer.lora_a.T @ layer.lora_a for layer in adapter_layers(model).values()]
        return sum(mx.linalg.norm(gram - mx.eye(6)).item() for gram in grams)

    before = distance()
    trained(model, settings)
    assert distance() < 0.7 * before


def test_what_is_off_is_not_stored():
    model = tiny_model()
    setup = adapt_model(model, SETTINGS, seed=1)
    trained(model)
    info = AdapterInfo("adalora", 6, 32.0, setup.scale, 0.0, 2, setup.targets.keys, "x", None, "y")
    stored = stored_parameters(model, info)
    ranks = [value.shape[1] for name, value in stored.items() if name.endswith("lora_a")]
    on = [(layer.lora_e != 0).sum().item() for layer in adapter_layers(model).values()]
    assert ranks == [max(1, count) for count in on]
    assert len(set(ranks)) > 1
    for path, layer in adapter_layers(model).items():
        product = setup.scale * (stored[f"{path}.lora_a"] @ stored[f"{path}.lora_b"]).T
        assert np.allclose(product, layer.delta(), atol=1e-5)


def test_a_run_without_steps_for_cuts_is_refused():
    model = tiny_model()
    adapt_model(model, SETTINGS, seed=1)
    with pytest.raises(InputError, match="5 and 10 of 15 steps"):
        budget_schedule(SETTINGS, model, 15)


def test_the_penalty_takes_no_memory_to_speak_of():
    # Its gradient through a flat array would be as large as the array, once for each of the parameters.
    def peak(method: str) -> int:
        model = tiny_model(num_hidden_layers=8)
        settings = AdapterSettings(method=method, rank=32, alpha=32.0)
        adapt_model(model, settings, seed=1)
        step = method_step(model, settings, STEPS)
        return peak_bytes(lambda: step([batch(1, 16, seed=0)]), waits=False)

    parameters = 8 * 2 * 32 * (4 * 64 + 2 * 32 + 3 * (64 + 96)) * 4 // 2
    # Through the flat array it was 165 times that.
    assert peak("adalora") - peak("lora") < 40 * parameters
