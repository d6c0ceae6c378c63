"""A client's model: gradients of our own step, Adam of torch, and checkpoints from which training goes on exactly."""

from __future__ import annotations

import json
import math
import shutil

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from training_examples import LIMITS, examples, factors, gradients, loaded, trained_model

from mlx_lora.api.plan_clients import ALPHA, LoraShape
from mlx_lora.data.batch import Batch
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.losses.cross_entropy import plain_loss
from mlx_lora.trainer.step import Step
from mlx_lora.training_server.worker import AdamNumbers, CheckpointFolder, Place, TrainedModel
from mlx_lora.utils.errors import InputError

RUN = f"{'0' * 31}a:train:0"
ADAM = AdamNumbers(1e-2, 0.9, 0.95, 1e-8, 0.1)


@pytest.fixture(scope="module")
def base(tiny_folder):
    return loaded(tiny_folder)


def steps(model: TrainedModel, first: int, last: int) -> None:
    for number in range(first, last):
        model.forward_backward(examples(number), "cross_entropy", {})
        model.optim_step(ADAM)


@pytest.mark.float32("sums of the same rows in another order are compared within float32's rounding")
def test_cross_entropy_has_the_gradient_of_train(base):
    """Loss and gradient of a request are those of `mlx-lora train`'s step over the same rows, before it divides by the tokens."""
    model, data = trained_model(base), examples(1)
    output = model.forward_backward(data, "cross_entropy", {})
    ours = gradients(model)
    width = max(len(one.tokens) for one in data)
    inputs, targets = (np.zeros((len(data), width), np.int32) for _ in range(2))
    mask = np.zeros(inputs.shape, bool)
    for row, one in enumerate(data):
        length = len(one.tokens)
        inputs[row, :length], targets[row, :length], mask[row, :length] = one.tokens, one.targets, True
    step = Step(model.model, optim.Adam(1e-3), plain_loss, 0.0)
    sums = step.forward_backward([Batch.of(inputs, targets, mask)])
    theirs = step.masters.by_name(sums.gradients)
    assert output.loss_sum == pytest.approx(sums.loss_sum.item(), rel=1e-6)
    size = max(mx.abs(value).max().item() for value in theirs.values())
    assert max(mx.abs(ours[name] - theirs[name]).max().item() for name in theirs) < 1e-6 * size
    halved = [
        type(one)(one.tokens, one.targets, {"weights": np.full(len(one.tokens), 0.5, np.float32)}) for one in data
    ]
    assert trained_model(base).forward_backward(halved, "cross_entropy", {}).loss_sum == pytest.approx(
        output.loss_sum / 2
    )


@pytest.mark.parity
@pytest.mark.parametrize("numbers", [ADAM, AdamNumbers(3e-3, 0.8, 0.99, 1e-12, 0.0, 0.5)])
def test_steps_are_those_of_torchs_adamw(numbers, base):
    import torch

    model = trained_model(base)
    own = {name: torch.tensor(value, requires_grad=True) for name, value in factors(model).items()}
    judge = torch.optim.AdamW(
        own.values(),
        lr=numbers.learning_rate,
        betas=(numbers.beta1, numbers.beta2),
        eps=numbers.eps,
        weight_decay=numbers.weight_decay,
    )
    for number in range(3):
        model.forward_backward(examples(number), "cross_entropy", {})
        for name, gradient in gradients(model).items():
            own[name].grad = torch.tensor(np.array(gradient))
        if numbers.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(own.values(), numbers.max_grad_norm)
        judge.step()
        model.optim_step(numbers)
        found = factors(model)
        assert all(np.abs(found[name] - value.detach().numpy()).max() < 2e-5 for name, value in own.items())
    before = factors(trained_model(base))
    assert max(np.abs(found[name] - before[name]).max() for name in found) > 1e-3


def test_a_step_without_a_gradient_is_refused(base):
    model = trained_model(base)
    with pytest.raises(InputError, match="call forward_backward first"):
        model.optim_step(ADAM)
    model.forward_backward(examples(), "cross_entropy", {}, backward=False)
    with pytest.raises(InputError, match="call forward_backward first"):
        model.optim_step(ADAM)


def test_a_gradient_that_is_not_finite_changes_nothing(base):
    model = trained_model(base)
    before = factors(model)
    data = examples(weights=lambda random, shape: np.full(shape, np.inf))
    model.forward_backward(data, "cross_entropy", {})
    with pytest.raises(InputError, match="not finite"):
        model.optim_step(ADAM)
    assert all(np.array_equal(before[name], value) for name, value in factors(model).items())
    steps(model, 0, 1)
    assert not all(np.array_equal(before[name], value) for name, value in factors(model).items())


@pytest.mark.parametrize(
    "numbers", [AdamNumbers(-1, 0.9, 0.9, 0), AdamNumbers(1, 1.0, 0.9, 0), AdamNumbers(1, 0.9, float("nan"), 0)]
)
def test_numbers_of_a_step_are_checked(numbers, base):
    with pytest.raises(InputError, match="out of range"):
        trained_model(base).optim_step(numbers)


def kinds(model: TrainedModel) -> set[str]:
    return {path.rpartition(".")[2] for path in model.targets.paths}


def test_a_client_chooses_layers_rank_and_seed(base):
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert kinds(TrainedModel(base, LoraShape(4, 0, mlp=False, unembed=False), LIMITS)) == attention
    assert kinds(TrainedModel(base, LoraShape(4, 0, attention=False, unembed=False), LIMITS)) == mlp
    whole = TrainedModel(base, LoraShape(4, 0), LIMITS)
    assert kinds(whole) == attention | mlp | {"embed_tokens"}  # the head is tied to it
    assert whole.info().scale == ALPHA / 4
    one, same, other = (factors(trained_model(base, move_b=False, seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)
    for wrong, words in ((LoraShape(0, 0), "rank 0"), (LoraShape(4, 0, False, False, False), "leave no layer")):
        with pytest.raises(InputError, match=words):
            TrainedModel(base, wrong, LIMITS)


# Checkpoints


def test_training_goes_on_exactly_from_a_checkpoint(base, tmp_path):
    """Four steps give the same bytes as two, a checkpoint, and two more in another model."""
    through, folder = trained_model(base, unembed=True), CheckpointFolder(tmp_path, "tiny")
    steps(through, 0, 2)
    stored = folder.save(through, Place.of(RUN, "weights", "two"), {})
    steps(through, 2, 4)
    again = TrainedModel(base, stored.shape, LIMITS)
    again.restore(folder.arrays(stored), stored.taken, optimizer=True)
    steps(again, 2, 4)
    wanted = through.state()
    assert all(np.array_equal(np.array(value), np.array(wanted[name])) for name, value in again.state().items())
    assert again.taken == 4
    # Without the moments, other steps follow.
    fresh = TrainedModel(base, stored.shape, LIMITS)
    fresh.restore(folder.arrays(stored), stored.taken, optimizer=False)
    steps(fresh, 2, 4)
    assert not all(np.array_equal(np.array(value), np.array(wanted[name])) for name, value in fresh.state().items())


def test_a_checkpoint_is_an_adapter_folder(base, tmp_path):
    model, folder = trained_model(base), CheckpointFolder(tmp_path, "tiny")
    steps(model, 0, 2)
    for kind in ("weights", "sampler_weights", "external_weights"):
        place = Place.of(RUN, kind, "one")
        folder.save(model, place, {})
        with base.lent() as own:
            load_adapter(own, tmp_path / RUN.replace(":", ".") / kind / "one")
            tokens = mx.array([[1, 2, 3]])
            found, wanted = own.model(tokens), model.model(tokens)
            assert mx.abs(found - wanted).max().item() < 1e-4
            assert mx.abs(found - base.model(tokens)).max().item() > 1e-2
    assert [one.place.kind for one in folder.listed()] == ["external_weights", "sampler_weights", "weights"]


def test_a_checkpoint_of_other_layers_is_refused(base, tmp_path):
    folder = CheckpointFolder(tmp_path, "tiny")
    stored = folder.save(trained_model(base, rank=2), Place.of(RUN, "weights", "one"), {})
    with pytest.raises(InputError, match="other layers"):
        trained_model(base).restore(folder.arrays(stored), 0, optimizer=True)
    sampler = folder.save(trained_model(base), Place.of(RUN, "sampler_weights", "one"), {})
    with pytest.raises(InputError, match="for sampling only"):
        folder.arrays(sampler)


def test_damage_is_noticed_and_names_are_kept(base, tmp_path):
    folder, place = CheckpointFolder(tmp_path, "tiny"), Place.of(RUN, "weights", "one")
    model = trained_model(base)
    stored = folder.save(model, place, {})
    with pytest.raises(InputError, match="exists already"):
        folder.save(model, place, {})
    folder.save(model, place, {"expires": 5.0}, overwrite=True)
    own = tmp_path / RUN.replace(":", ".") / "weights" / "one"
    for name in ("state.safetensors", "adapters.safetensors", "adapter_config.json"):
        whole = (own / name).read_bytes()
        (own / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{name} is missing or damaged"):
            folder.arrays(stored)
        (own / name).write_bytes(whole)
    folder.arrays(stored)
    state = (own / "state.json").read_text()
    for shape in ([1], {"rank": "x", "seed": 0}, {"rank": 2, "seed": 0, "mlp": "yes"}):
        (own / "state.json").write_text(json.dumps(json.loads(state) | {"shape": shape}))
        with pytest.raises(InputError, match="damaged or of another version"):
            folder.read(place)
    assert folder.listed() == []
    (own / "state.json").write_text(state)
    folder.read(place)
    for damaged in (
        {"expires": "soon"}, {"expires": [1]}, {"expires": 1e300}, {"expires": math.nan}, {"created": "now"}, {"created": None},
        {"created": {}}, {"user_metadata": "a"}, {"user_metadata": {"a": 1}}, {"user_metadata": [1]},
    ):  # fmt: skip
        (own / "about.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="damaged"):
            folder.read(place)
        assert folder.listed() == folder.delete_expired(200.0) == []
    shutil.rmtree(own)
    with pytest.raises(InputError, match="no such checkpoint"):
        folder.read(place)


def test_checkpoints_whose_time_is_over_are_deleted(base, tmp_path):
    folder, model = CheckpointFolder(tmp_path, "tiny"), trained_model(base)
    for name, expires in (("kept", None), ("soon", 100.0), ("later", 300.0)):
        folder.save(model, Place.of(RUN, "weights", name), {"expires": expires})
    assert [place.name for place in folder.delete_expired(200.0)] == ["soon"]
    folder.set_expiry(Place.of(RUN, "weights", "kept"), 150.0)
    assert [place.name for place in folder.delete_expired(200.0)] == ["kept"]
    assert [one.place.name for one in folder.listed()] == ["later"]


@pytest.mark.parametrize(
    "path",
    [
        f"tinker://{RUN}/weights/../../../etc/passwd", f"tinker://{RUN}/weights/..", f"tinker://{RUN}/weights/.hidden",
        f"tinker://{RUN}/../weights/a", "tinker://../weights/a", "tinker://a/weights/b", f"{RUN}/weights/a", f"tinker://{RUN}/logs/a",
        f"tinker://{RUN}/weights/a\0b", f"tinker://{RUN}/weights/" + "a" * 129, f"tinker://{RUN}/weights/é", f"tinker://{RUN}/weights/a/b",
        f"tinker://{RUN}/weights/", f"file://{RUN}/weights/a", "", f"tinker://{RUN}\n/weights/a",
    ],
)  # fmt: skip
def test_a_name_is_no_path(path):
    assert Place.parse(f"tinker://{RUN}/weights/a").path == f"tinker://{RUN}/weights/a"
    with pytest.raises(InputError):
        Place.parse(path)


def test_the_base_stays_as_it_is(base):
    before = {name: np.array(value) for name, value in tree_flatten(base.model.parameters())}
    model = trained_model(base, unembed=True)
    steps(model, 0, 2)
    after = dict(tree_flatten(base.model.parameters()))
    assert before.keys() == after.keys()
    assert all(np.array_equal(value, np.array(after[name])) for name, value in before.items())
