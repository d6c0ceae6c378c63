"""Tinker's own client, unmodified, against the training server: every public method that trains, samples, saves and lists."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
import tinker_client  # skips without the package
from comparing import by_dtype
from tinker_client import IGNORED, TrainingServer, adam, datums, trainer
from training_examples import examples, loaded, trained_model

from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.training_server.worker import AdamNumbers
from mlx_lora.utils.errors import InputError

tinker = pytest.importorskip("tinker")
types = tinker.types
NUMBERS = AdamNumbers(1e-2, 0.9, 0.95, 1e-8)
SECONDS = 120
pytestmark = IGNORED


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    with TrainingServer(tiny_folder, tmp_path_factory.mktemp("training") / "checkpoints", body_bytes=20_000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    client = server.client()
    yield client
    client.close("success").result(SECONDS)


@pytest.fixture(scope="module")
def base(tiny_folder):
    return loaded(tiny_folder)


def steps(model, first: int, last: int) -> None:
    """Take steps here, or through the client."""
    for number in range(first, last):
        if isinstance(model, tinker.TrainingClient):
            futures = model.forward_backward(datums(examples(number)), "cross_entropy"), model.optim_step(adam())
            assert [future.result(SECONDS) for future in futures]
        else:
            model.forward_backward(examples(number), "cross_entropy", {})
            model.optim_step(NUMBERS)


def same(found, wanted, tolerance: float = 1e-6) -> bool:
    return all(np.abs(a - b).max() <= tolerance for a, b in zip(found, wanted, strict=True))


def logprobs_of(output) -> list[np.ndarray]:
    return [np.array(one["logprobs"].tolist(), np.float32) for one in output.loss_fn_outputs]


def test_the_server_says_what_it_has(server, client):
    found = server.rest().get_server_capabilities().result(SECONDS).supported_models
    assert [(one.model_name, one.max_context_length, one.trainable) for one in found] == [("tiny", 512, True)]
    model = trainer(client, rank=7)
    info = model.get_info()
    assert (info.lora_rank, info.model_data.model_name, info.model_data.arch) == (7, "tiny", "llama")
    assert model.get_tokenizer().decode(model.get_tokenizer().encode("héllo")) == "héllo"


LOSSES = {
    "cross_entropy": ({"weights": "normal"}, None),
    "importance_sampling": ({"logprobs": "likely", "advantages": "normal"}, None),
    "ppo": ({"logprobs": "likely", "advantages": "normal"}, {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4}),
    "cispo": ({"logprobs": "likely", "advantages": "normal"}, None),
    "dro": ({"logprobs": "likely", "advantages": "normal"}, {"beta": 0.3}),
    "gspo": ({"logprobs": "likely", "advantages": "normal", "sequence_ratio_mask": "ones"}, None),
}
MAKE = {
    "normal": lambda random, shape: random.normal(0, 1, shape),
    "likely": lambda random, shape: random.normal(-5.5, 0.4, shape),
    "ones": lambda random, shape: np.ones(shape),
}


def test_each_loss_arrives_and_comes_back(client, base):
    """What the client gets is what the model computes here, to the last bit."""
    remote, here = trainer(client), trained_model(base, move_b=False)
    for name, (given, config) in LOSSES.items():
        data = examples(1, **{key: MAKE[kind] for key, kind in given.items()})
        wanted = here.forward_backward(data, name, config or {})
        forward = remote.forward(datums(data), name, config).result(SECONDS)
        found = remote.forward_backward(datums(data), name, config).result(SECONDS)
        assert found.metrics == {"loss:sum": wanted.loss_sum} == forward.metrics
        assert same(logprobs_of(found), wanted.logprobs, 0.0)
        here.optim_step(NUMBERS)
        assert remote.optim_step(adam()).result(SECONDS).metrics["unclipped_grad_l2:mean"] > 0
    data = examples(2)
    after = remote.forward(datums(data), "cross_entropy").result(SECONDS).metrics["loss:sum"]
    assert after == here.forward_backward(data, "cross_entropy", {}, backward=False).loss_sum
    assert (
        after != trained_model(base, move_b=False).forward_backward(data, "cross_entropy", {}, backward=False).loss_sum
    )


def test_targets_with_several_columns_are_sent_sparse_or_dense(client, base):
    torch = pytest.importorskip("torch")
    data = examples(3, columns=8, weights=lambda random, shape: random.normal(0, 1, shape) * (np.arange(8) < 2))
    wanted = trained_model(base, move_b=False).forward_backward(data, "cross_entropy", {}, backward=False)
    sparse = [
        types.Datum(
            model_input=types.ModelInput.from_ints(one.tokens.tolist()),
            loss_fn_inputs={"target_tokens": torch.tensor(one.targets), "weights": torch.tensor(one.given["weights"])},
        )
        for one in data
    ]
    assert sparse[0].loss_fn_inputs["weights"].sparse_crow_indices is not None
    model = trainer(client)
    for sent in (datums(data), sparse):
        output = model.forward(sent, "cross_entropy").result(SECONDS)
        assert output.metrics["loss:sum"] == pytest.approx(wanted.loss_sum, rel=1e-6)
        assert same(logprobs_of(output), wanted.logprobs, 1e-6)


def test_many_examples_come_in_several_requests_and_go_back_in_order(client, base):
    """The body limit becomes the client's size of a request, and its parts may arrive in any order."""
    data = [one for seed in range(60) for one in examples(seed)]
    remote, here = trainer(client), trained_model(base, move_b=False)
    wanted = here.forward_backward(data, "cross_entropy", {})
    assert len(remote._chunked_requests(datums(data))) > 1
    remote = trainer(client)
    found = remote.forward_backward(datums(data), "cross_entropy").result(SECONDS)
    assert same(logprobs_of(found), wanted.logprobs, 1e-5)
    assert found.metrics["loss:sum"] == pytest.approx(wanted.loss_sum, rel=1e-6)


def test_a_clients_own_loss_is_differentiated(client, base):
    torch = pytest.importorskip("torch")
    data, weights = examples(4), [np.linspace(-1, 1, len(one.tokens)).astype(np.float32) for one in examples(4)]

    def loss(_, logprobs):
        total = -sum((one * torch.tensor(weight)).sum() for one, weight in zip(logprobs, weights, strict=True))
        return total, {"mine": total.item()}

    remote, here = trainer(client), trained_model(base, move_b=False)
    weighted = [
        type(one)(one.tokens, one.targets, {"weights": weight}) for one, weight in zip(data, weights, strict=True)
    ]
    wanted = here.forward_backward(weighted, "cross_entropy", {})
    found = remote.forward_backward_custom(datums(data), loss).result(SECONDS)
    assert found.metrics["mine"] == pytest.approx(wanted.loss_sum, rel=1e-5)
    remote.optim_step(adam()).result(SECONDS)
    here.optim_step(NUMBERS)
    after = remote.forward(datums(data), "cross_entropy").result(SECONDS)
    assert same(logprobs_of(after), here.forward_backward(data, "cross_entropy", {}, backward=False).logprobs, 1e-5)


def test_a_request_that_fails_says_why_and_the_next_one_runs(client):
    model = trainer(client)
    data = datums(examples())
    wrong = [
        (lambda: model.forward_backward(data, "ppo"), "ppo needs logprobs, advantages"),
        (lambda: model.forward_backward(data, "stable_reinforce"), "not published"),
        (lambda: model.optim_step(types.AdamParams(learning_rate=-1.0)), "learning_rate -1.0 is out of range"),
        (lambda: model.optim_step(types.DimuonParams(learning_rate=1.0)), "Adam alone"),
        (lambda: model.optim_step(adam()), "call forward_backward first"),
        (lambda: model.save_state("../outside"), "must be at most 128 letters"),
    ]
    for ask, words in wrong:
        with pytest.raises(tinker.RequestFailedError, match=words) as error:
            ask().result(SECONDS)
        assert error.value.category is types.RequestErrorCategory.User
    assert model.forward_backward(data, "cross_entropy").result(SECONDS).metrics["loss:sum"] > 0
    with pytest.raises(tinker.NotFoundError, match="this server has tiny"):
        client.create_lora_training_client(base_model="other/model").result(SECONDS)
    with pytest.raises(tinker.RequestFailedError, match="rank 0"):
        trainer(client, rank=0)


# Samples


def prompt(*tokens: int):
    return types.ModelInput.from_ints(list(tokens))


def sample(sampler, tokens, count: int = 1, **params):
    how = {key: params.pop(key) for key in list(params) if key not in types.SamplingParams.model_fields}
    how["sampling_params"] = types.SamplingParams(**{"max_tokens": 6, "temperature": 1.0, "seed": 1, **params})
    return sampler.sample(prompt(*tokens), count, **how).result(SECONDS)


@pytest.fixture(scope="module")
def trained(client):
    model = trainer(client)
    steps(model, 0, 3)
    return model


@pytest.fixture(scope="module")
def sampler(trained):
    return trained.save_weights_and_get_sampling_client().result(SECONDS)


def test_log_probabilities_of_samples_are_those_that_training_sees(trained, sampler):
    tokens, within = [5, 6, 7, 8], by_dtype(1e-4, 5e-2)
    answer = sample(sampler, tokens, 3, include_prompt_logprobs=True)
    assert len({tuple(one.tokens) for one in answer.sequences}) > 1, "each sample has a random stream of its own"
    for one in answer.sequences:
        whole = tokens + one.tokens
        datum = types.Datum(prompt(*whole[:-1]), {"target_tokens": np.array(whole[1:])})
        likelihoods = trained.forward([datum], "cross_entropy").result(SECONDS).loss_fn_outputs[0]["logprobs"].data
        assert np.allclose(likelihoods[len(tokens) - 1 :], one.logprobs, atol=within)
        assert answer.prompt_logprobs[0] is None
        assert np.allclose(likelihoods[: len(tokens) - 1], answer.prompt_logprobs[1:], atol=within)
    assert np.allclose(sampler.compute_logprobs(prompt(*whole)).result(SECONDS)[1:], likelihoods, atol=within)


def test_a_seed_gives_the_same_samples_whatever_else_is_sampled(sampler):
    alone = sample(sampler, [5, 6, 7], 2)
    together = [sampler.sample(prompt(5, 6, 7), 2, types.SamplingParams(max_tokens=6, seed=seed)) for seed in (2, 1, 3)]
    again = [one.result(SECONDS) for one in together]
    tokens = [[list(one.tokens) for one in answer.sequences] for answer in again]
    assert tokens[1] == [list(one.tokens) for one in alone.sequences]
    assert tokens[0] != tokens[1]
    ids = [one.sequence_id for answer in again for one in answer.sequences]
    assert len(set(ids)) == len(ids)


def test_the_likeliest_tokens_are_reported(sampler):
    answer = sample(
        sampler,
        [5, 6, 7],
        temperature=0.0,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        include_prompt_logprobs=True,
    )
    one = answer.sequences[0]
    assert [row[0][0] for row in one.topk_logprobs] == one.tokens, "greedy takes the first"
    assert np.allclose([row[0][1] for row in one.topk_logprobs], one.logprobs, atol=1e-6)
    assert answer.topk_prompt_logprobs[0] is None
    assert all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in answer.topk_prompt_logprobs[1:])
    last = sample(sampler, [5, 6, 7, 8], include_prompt_logprobs=True, prompt_logprobs_last_n=1).prompt_logprobs
    assert last[:3] == [None] * 3
    assert last[3] == pytest.approx(
        sample(sampler, [5, 6, 7, 8], include_prompt_logprobs=True).prompt_logprobs[3], abs=1e-5
    )


def test_an_answer_ends_at_a_stop(sampler, trained):
    free = sample(sampler, [5, 6, 7], stop=[], max_tokens=20).sequences[0]
    assert (len(free.tokens), free.stop_reason) == (20, "length")
    stop = free.tokens[4]
    ended = sample(sampler, [5, 6, 7], stop=[stop], max_tokens=20).sequences[0]
    assert ended.tokens == free.tokens[: free.tokens.index(stop) + 1], "the stop token is the last"
    assert ended.stop_reason == "stop"
    letters = [token for token in free.tokens if 97 <= token < 123]
    text = trained.get_tokenizer().decode(free.tokens)
    assert text
    if letters:
        words = sample(sampler, [5, 6, 7], stop=trained.get_tokenizer().decode(letters[:1]), max_tokens=20).sequences[0]
        assert len(words.tokens) <= 20
    with pytest.raises(tinker.RequestFailedError, match="max_tokens 1000"):
        sample(sampler, [5], max_tokens=1000)
    with pytest.raises(tinker.RequestFailedError, match="token 300 is not in the model's vocabulary"):
        sample(sampler, [300])


def test_a_snapshot_stays_and_inflight_weights_follow(trained):
    snapshot = trained.save_weights_and_get_sampling_client().result(SECONDS)
    flying = trained.save_weights_and_get_sampling_client(kind="inflight").result(SECONDS)
    before = sampler_logprobs(snapshot)
    assert sampler_logprobs(flying) == before
    steps(trained, 10, 12)
    trained.save_weights_and_get_sampling_client(kind="inflight").result(SECONDS)
    assert sampler_logprobs(snapshot) == before
    assert sampler_logprobs(flying) != before


def sampler_logprobs(sampler) -> list[float]:
    return sampler.compute_logprobs(prompt(1, 2, 3, 4, 5)).result(SECONDS)[1:]


def test_the_base_can_be_sampled(client, base):
    import mlx.core as mx

    sampler = client.create_sampling_client(base_model="tiny").result(SECONDS)
    logits = base.model(mx.array([[1, 2, 3, 4]]))[0].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert np.allclose(
        sampler_logprobs(sampler), [logprobs[i, token] for i, token in enumerate((2, 3, 4, 5))], atol=1e-4
    )


# Checkpoints


@pytest.mark.long
def test_weights_are_saved_listed_loaded_and_deleted(server, client, base):
    model, rest = trainer(client, user_metadata={"study": "one"}), server.rest()
    steps(model, 0, 2)
    state = model.save_state("two", user_metadata={"note": "good"}).result(SECONDS).path
    weights = model.save_weights_for_sampler("two").result(SECONDS).path
    assert (state, weights) == (
        f"tinker://{model.model_id}/weights/two",
        f"tinker://{model.model_id}/sampler_weights/two",
    )
    here = trained_model(base, move_b=False)
    steps(here, 0, 4)
    resumed = client.create_training_client_from_state_with_optimizer(state).result(SECONDS)
    steps(resumed, 2, 4)
    wanted = here.forward_backward(examples(9), "cross_entropy", {}, backward=False).loss_sum
    assert resumed.forward(datums(examples(9)), "cross_entropy").result(SECONDS).metrics["loss:sum"] == wanted
    fresh = client.create_training_client_from_state(state).result(SECONDS)
    steps(fresh, 2, 4)
    assert fresh.forward(datums(examples(9)), "cross_entropy").result(SECONDS).metrics["loss:sum"] != wanted
    assert fresh.get_info().lora_rank == 4

    sampler = client.create_sampling_client(model_path=weights).result(SECONDS)
    own = model.save_weights_and_get_sampling_client().result(SECONDS)
    assert np.allclose(sampler_logprobs(sampler), sampler_logprobs(own), atol=1e-5)

    listed = rest.list_checkpoints(model.model_id).result(SECONDS).checkpoints
    assert {one.tinker_path for one in listed} == {state, weights}
    assert next(one for one in listed if one.tinker_path == state).user_metadata == {"note": "good"}
    run = rest.get_training_run_by_tinker_path(state).result(SECONDS)
    assert (run.training_run_id, run.lora_rank, run.user_metadata) == (model.model_id, 4, {"study": "one"})
    assert (run.last_checkpoint.tinker_path, run.last_sampler_checkpoint.tinker_path) == (state, weights)
    runs = rest.list_training_runs(limit=1000).result(SECONDS)
    assert model.model_id in [one.training_run_id for one in runs.training_runs]
    info = rest.get_weights_info_by_tinker_path(state).result(SECONDS)
    assert (info.base_model, info.lora_rank, info.train_unembed, info.train_attn) == ("tiny", 4, False, True)
    assert state in [one.tinker_path for one in rest.list_user_checkpoints().result(SECONDS).checkpoints]
    rest.set_checkpoint_ttl_from_tinker_path(state, 7200).result(SECONDS)
    assert rest.list_checkpoints(model.model_id).result(SECONDS).checkpoints[-1].expires_at is not None
    rest.delete_checkpoint_from_tinker_path(weights).result(SECONDS)
    assert [one.tinker_path for one in rest.list_checkpoints(model.model_id).result(SECONDS).checkpoints] == [state]
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path=weights).result(SECONDS)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_are_loaded_into_a_model_that_there_is(client):
    model, other = trainer(client), trainer(client, seed=4)
    steps(model, 0, 2)
    path = model.save_state("here").result(SECONDS).path
    other.load_state(path).result(SECONDS)
    found, wanted = (one.forward(datums(examples()), "cross_entropy").result(SECONDS).metrics for one in (other, model))
    assert found == wanted
    with pytest.raises(tinker.RequestFailedError, match="no such checkpoint"):
        other.load_state_with_optimizer(path + "x").result(SECONDS)


def test_an_adapter_folder_can_be_downloaded(server, trained, base, tmp_path):
    path = trained.save_weights_external("download").result(SECONDS).path
    urls = server.rest().get_external_weights_urls(path).result(SECONDS).urls
    assert set(urls) == {"adapter_config.json", "adapters.safetensors"}
    for name, url in urls.items():
        with urllib.request.urlopen(
            url, timeout=20
        ) as answer:  # without a key, as the command `tinker checkpoint download` does
            (tmp_path / name).write_bytes(answer.read())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 8.0
    with base.lent() as own:
        assert load_adapter(own, tmp_path).rank == 4
    with pytest.raises(InputError):
        load_adapter(base, tmp_path / "nothing")


# Sessions


def test_a_session_that_ends_frees_its_models(server):
    client = server.client()
    model = trainer(client)
    sampler = model.save_weights_and_get_sampling_client().result(SECONDS)
    assert sampler_logprobs(sampler)
    session = server.rest().get_session(client.holder.get_session_id()).result(SECONDS)
    assert session.training_run_ids == [model.model_id]
    assert session.sampler_ids == [sampler._sampling_session_id]
    assert client.holder.get_session_id() in server.rest().list_sessions().result(SECONDS).sessions
    assert model.model_id in server.worker.models
    held = [name for name in server.worker.weights._factors if name.startswith(model.model_id)]
    assert held
    client.close("success").result(SECONDS)
    tinker_client.wait_until(lambda: model.model_id not in server.worker.models)
    tinker_client.wait_until(lambda: held[0] not in server.worker.weights)


@pytest.mark.long
def test_two_clients_get_what_each_gets_alone(server, base):
    """Their requests are under way together, and each trains as if alone."""
    clients = [server.client(f"tml-{name}") for name in "ab"]
    models = [trainer(client, seed=seed, rank=rank) for client, seed, rank in zip(clients, (1, 2), (4, 6), strict=True)]
    futures = []
    for number in range(4):
        for place, model in enumerate(models):
            futures += [
                model.forward_backward(datums(examples(10 * place + number)), "cross_entropy"),
                model.optim_step(adam()),
            ]
    assert all(future.result(SECONDS) for future in futures)
    for place, (model, seed, rank) in enumerate(zip(models, (1, 2), (4, 6), strict=True)):
        here = trained_model(base, move_b=False, seed=seed, rank=rank)
        steps(here, 10 * place, 10 * place + 4)
        wanted = here.forward_backward(examples(30), "cross_entropy", {}, backward=False)
        found = model.forward(datums(examples(30)), "cross_entropy").result(SECONDS)
        assert same(logprobs_of(found), wanted.logprobs, 1e-6)
    for client in clients:
        client.close("success").result(SECONDS)
