"""The losses of Tinker's protocol: against torch through the whole model, and what is refused."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from torch_judge import name_here, torch_base
from training_examples import LIMITS, examples, factors, gradients, loaded, trained_model

from mlx_lora.training_server.worker import LOSSES, Example, check_examples, find_loss, micro_batches
from mlx_lora.utils.errors import InputError


def normal(random, shape):
    return random.normal(0, 1, shape)


def likely(random, shape):
    return random.normal(-5.5, 0.4, shape)


def some(random, shape):
    return (np.arange(shape[0]) >= shape[0] // 2).astype(float)


def low(random, shape):
    return random.uniform(0.7, 0.95, shape)


SAMPLED = {"logprobs": likely, "advantages": normal}
# name -> what its examples bring, and the request's numbers
CASES = {
    "cross_entropy": ({"weights": normal}, {}),
    "importance_sampling": (SAMPLED, {}),
    "ppo": (SAMPLED, {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4}),
    "cispo": ({**SAMPLED, "clip_low_threshold": low}, {}),
    "dro": (SAMPLED, {"beta": 0.3}),
    "gspo": ({**SAMPLED, "sequence_ratio_mask": some}, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.3}),
}


def naive(torch, name, logprobs, given, config):
    """Return the loss of one example as Tinker's documentation writes it."""
    if name == "cross_entropy":
        return -(logprobs * given["weights"]).sum()
    ratio = torch.exp(logprobs - given["logprobs"])
    advantages = given["advantages"]
    bounds = [
        given.get(key, torch.tensor(config.get(key, default)))
        for key, default in (("clip_low_threshold", 0.8), ("clip_high_threshold", 1.2))
    ]
    if name == "importance_sampling":
        return -(ratio * advantages).sum()
    if name == "ppo":
        return -torch.min(ratio * advantages, torch.clamp(ratio, *bounds) * advantages).sum()
    if name == "cispo":
        clipped = torch.minimum(torch.maximum(ratio, bounds[0]), bounds[1]).detach()
        return -(clipped * logprobs * advantages).sum()
    if name == "dro":
        return -(logprobs * advantages - 0.5 * config["beta"] * (logprobs - given["logprobs"]) ** 2).sum()
    inside = given["sequence_ratio_mask"] != 0
    log_ratio = (logprobs.detach() - given["logprobs"])[inside].mean()
    ratio = torch.exp(log_ratio + logprobs - logprobs.detach())
    return -torch.min(ratio * advantages, torch.clamp(ratio, *bounds) * advantages).sum()


def torch_result(folder, model, data, name, config):
    """Return loss, log-probabilities and gradients of the same adapter in PEFT, on torch."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    adapted = peft.get_peft_model(torch_base(folder), peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
    own = factors(model)
    trained = {name_here(key): value for key, value in adapted.named_parameters() if "lora_" in key}
    assert trained.keys() == own.keys()
    for key, value in trained.items():
        value.data = torch.tensor(own[key].T)
    total, likelihoods = torch.tensor(0.0), []
    for example in data:
        logits = adapted(torch.tensor(example.tokens[None].astype(np.int64))).logits[0]
        logprobs = torch.log_softmax(logits, -1)[torch.arange(len(example.tokens)), torch.tensor(example.targets)]
        likelihoods.append(logprobs.detach().numpy())
        given = {key: torch.tensor(value) for key, value in example.given.items()}
        total = total + naive(torch, name, logprobs, given, config)
    total.backward()
    return total.item(), likelihoods, {key: value.grad.numpy().T for key, value in trained.items()}


@pytest.fixture(scope="module")
def base(tiny_folder):
    return loaded(tiny_folder)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_torch(name, tiny_folder, base):
    given, config = CASES[name]
    model, data = trained_model(base), examples(1, **given)
    wanted, likelihoods, gradients = torch_result(tiny_folder, model, data, name, config)
    output = model.forward_backward(data, name, config)
    assert output.loss_sum == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    for found, expected in zip(output.logprobs, likelihoods, strict=True):
        assert np.abs(found - expected).max() < 1e-4
    size = max(np.abs(value).max() for value in gradients.values())
    for key, value in gradients(model).items():
        assert np.abs(np.array(value) - gradients[key]).max() < 1e-4 * size
    # And the judge sees a small change.
    key = "weights" if "weights" in given else "advantages"
    changed = [Example(one.tokens, one.targets, {**one.given, key: one.given[key] + 0.05}) for one in data]
    assert abs(model.forward_backward(changed, name, config, backward=False).loss_sum - wanted) > 1e-2


@pytest.mark.float32("sums of the same rows in another order are compared within float32's rounding")
@pytest.mark.parametrize("name", CASES)
def test_a_request_may_be_cut_between_its_examples(name, base):
    """Losses are sums: two requests before a step are one with the examples of both, whatever shares a micro-batch."""
    given, config = CASES[name]
    whole, parts, data = trained_model(base), trained_model(base), examples(2, **given)
    total = whole.forward_backward(data, name, config)
    parts._most_positions = 1  # each row by itself
    pieces = [parts.forward_backward([one], name, config) for one in data]
    assert sum(one.loss_sum for one in pieces) == pytest.approx(total.loss_sum, rel=1e-5)
    one, other = gradients(whole), gradients(parts)
    size = max(mx.abs(value).max().item() for value in one.values())
    assert all(mx.abs(one[key] - other[key]).max().item() < 1e-5 * size for key in one)
    assert whole.forward_backward(data[:1], name, config, backward=False).loss_sum != total.loss_sum


@pytest.mark.float32("sums of the same rows in another order are compared within float32's rounding")
def test_several_targets_of_a_position_are_rows_of_their_own(base):
    model, data = trained_model(base), examples(3, columns=2, weights=normal)
    both = model.forward_backward(data, "cross_entropy", {})
    gradient = gradients(model)
    again = trained_model(base)
    alone = [
        again.forward_backward(
            [Example(one.tokens, one.targets[:, k], {"weights": one.given["weights"][:, k]}) for one in data],
            "cross_entropy",
            {},
        )
        for k in range(2)
    ]
    assert both.loss_sum == pytest.approx(sum(one.loss_sum for one in alone), rel=1e-5)
    assert [one.shape for one in both.logprobs] == [one.targets.shape for one in data]
    assert np.allclose(both.logprobs[1][:, 1], alone[1].logprobs[1], atol=1e-5)
    assert all(
        np.allclose(np.array(gradient[key]), np.array(value), atol=1e-4) for key, value in gradients(again).items()
    )


def test_weights_may_be_left_out(base):
    model, data = trained_model(base), examples(4)
    ones = [Example(one.tokens, one.targets, {"weights": np.ones(len(one.tokens), np.float32)}) for one in data]
    plain = model.forward_backward(data, "cross_entropy", {}, backward=False)
    assert plain.loss_sum == model.forward_backward(ones, "cross_entropy", {}, backward=False).loss_sum
    assert plain.loss_sum == pytest.approx(-sum(one.sum() for one in plain.logprobs), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("sft", {}, "no such loss"),
        ("stable_reinforce", {}, "not published"),
        ("custom", {"loss_id": "x"}, "run in the client"),
        ("dro", {}, "beta is missing"),
        ("ppo", {"epsilon": 0.2}, "clip_low_threshold"),
        ("ppo", {"clip_low_threshold": "0.8"}, "not a number"),
        ("importance_sampling", {"beta": 1.0}, "takes nothing"),
    ],
)
def test_a_loss_that_is_not_here_is_named(name, config, words):
    with pytest.raises(InputError, match=words):
        find_loss(name, config)


def one(length: int = 4, **changes) -> Example:
    given = {"logprobs": np.zeros(length, np.float32), "advantages": np.zeros(length, np.float32)}
    return Example(
        **{"tokens": np.arange(length, dtype=np.int32), "targets": np.arange(length), "given": given, **changes}
    )


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (one(0), "has 0 tokens"),
        (one(600), "give 1 to 512"),
        (one(tokens=np.array([0, 1, 2, 288], np.int32)), "token 288 is not in the model's vocabulary"),
        (one(tokens=np.array([0, -1, 2, 3], np.int32)), "token -1"),
        (one(targets=np.array([0, 1, 2, 10**12])), "token 1000000000000"),
        (one(targets=np.arange(3)), "give as many"),
        (one(targets=np.zeros((4, 2), np.int64)), "cross_entropy"),
        (one(given={"logprobs": np.zeros(4, np.float32)}), "needs advantages"),
        (
            one(given={"logprobs": np.zeros(4, np.float32), "advantages": np.zeros(3, np.float32)}),
            "one for each target",
        ),
        (one(given={**one().given, "rewards": np.zeros(4, np.float32)}), "does not take 'rewards'"),
    ],
)
def test_an_example_that_does_not_fit_is_named(example, words):
    check_examples([one()], "ppo", LOSSES["ppo"], LIMITS)
    with pytest.raises(InputError, match=words) as error:
        check_examples([one(), example], "ppo", LOSSES["ppo"], LIMITS)
    assert "data[1]" in str(error.value)


def test_rows_of_similar_length_share_a_batch():
    data = [one(n) for n in (3, 8, 5, 8, 2)]
    batches = list(micro_batches(data, LOSSES["ppo"], 16))
    assert [[row[0] for row in batch.rows] for batch in batches] == [[1, 3], [2, 0, 4]]
    assert all(batch.inputs.size <= 16 for batch in batches)
    assert batches[1].positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
