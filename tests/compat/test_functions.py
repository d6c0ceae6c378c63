"""Calls are taken in one thread, for one place or one instance, and only inside the block: two threads compute what each computes alone."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import tiny_architecture
from conftest import TINY, quantized, tiny_model
from mlx_lm.models.cache import make_prompt_cache
from tiny_steps import batch, factors

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.compat.functions import answering, classes_put_back, exchanged, keeps_context, mix_in, original
from mlx_lora.config.settings import OptimizerSettings
from mlx_lora.kernels.choose import exchanging
from mlx_lora.kernels.quantized_matmul import use_measured_matmul
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.blocks import BlockWalk
from mlx_lora.models.folder import is_foreign
from mlx_lora.models.generator import TokenSteps
from mlx_lora.models.load import embedding_rows
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

HERE = sys.modules[__name__]


def double(number: int) -> int:
    """Return twice a number."""
    return 2 * number


class Layer:
    """A stand-in for a module."""

    def __call__(self, number: int) -> int:
        return number + 1


class Mixin:
    """Comes before a layer's class."""

    def __call__(self, number: int) -> int:
        return 100 * super().__call__(number)


class Silent:
    """Does not call what comes after it."""

    def __call__(self, number: int) -> int:
        return 0


def in_another_thread(function, *args):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def test_a_function_is_exchanged_inside_the_block_and_in_its_thread():
    own = double
    with exchanged({(HERE, "double"): lambda number: -number}):
        assert double(3) == -3
        assert in_another_thread(double, 3) == 6
        with exchanged({(HERE, "double"): lambda number: 0}):
            assert double(3) == 0
        assert double(3) == -3
        assert original(HERE, "double") is own
    with pytest.raises(ZeroDivisionError), exchanged({(HERE, "double"): lambda number: 1 / 0}):
        double(3)
    assert double(3) == 6
    assert original(HERE, "double") is own
    assert double.__name__ == "double"


def test_a_name_that_is_not_there_is_not_exchanged():
    with pytest.raises(KeyError), exchanged({(HERE, "nothing"): double}):
        pass
    assert original(HERE, "nothing") is None


def test_one_instance_answers_otherwise():
    one, other = Layer(), Layer()
    with answering((one, lambda own, number: 10 * own(number))):
        assert (one(1), other(1)) == (20, 2)
        assert in_another_thread(one, 1) == 2
        with answering((one, lambda own, number: own(number) + 3)):
            assert (one(1), other(1)) == (23, 2)
        assert type(one) is Layer
    assert one(1) == 2


def test_what_is_mixed_in_comes_first_or_is_taken_too():
    layer = Layer()
    mix_in(Mixin, layer)
    kind = type(layer)
    mix_in(Mixin, layer)
    assert type(layer) is kind
    assert type(Layer()) is Layer
    with answering((layer, lambda own, number: 7), below=Layer):
        assert layer(1) == 700
        with answering((layer, lambda own, number: own(number) + 1)):
            assert layer(1) == 701
    with classes_put_back([layer]):
        mix_in(Silent, layer)
        assert layer(1) == 0
    assert layer(1) == 200


def test_an_error_of_a_function_that_is_not_exchanged_now_is_not_taken_for_ours():
    with exchanged({(mx, "contiguous"): lambda array: array}):
        assert mx.contiguous("text") == "text"
    with pytest.raises(TypeError) as error:
        mx.contiguous("text")
    assert is_foreign(error.value)


def test_a_later_call_computes_with_what_was_exchanged():
    layer = Layer()
    with exchanged({(HERE, "double"): lambda number: -number}), answering((layer, lambda own, number: 5)):
        later = keeps_context(lambda number: (double(number), layer(number)))
    assert later(3) == (-3, 5)
    assert in_another_thread(later, 3) == (-3, 5)
    assert (double(3), layer(3)) == (6, 4)


Work = Callable[[int], list[bytes]]
TOKENS = 6


def tiny_base(bits: int | None) -> nn.Module:
    """Return the model that is trained, and that answers: each with modules of its own, and the same arrays."""
    model = tiny_model()
    if bits:
        use_measured_matmul(quantized(model, bits), "dense")
    mx.eval(model.parameters())
    return model


def training(base: nn.Module) -> Work:
    """Return what trains the model, with checkpointed blocks and ours for kernels, loss and last block."""

    def train(count: int) -> list[bytes]:
        model = copy.deepcopy(base)
        inject(model, select_targets(model).paths, rank=4, scale=2.0, seed=0)
        model.train()
        loss, tape = choose_loss(model, TINY, "ours"), apply_checkpointing(model, "block")
        assert loss.part_of_last
        settings = OptimizerSettings(learning_rate=1e-2, lr_schedule="constant", warmup=0.0)
        step = Step(
            model,
            build_optimizer(settings, count),
            loss.train,
            1.0,
            StepOptions(exchanging(tape.attend), compiled=False),
        )
        sums = [step([batch(2, 24, seed=number, share=0.3)]).loss_sum for number in range(count)]
        return [factors(model).tobytes(), *(repr(one.item()).encode() for one in sums)]

    return train


def answers(base: nn.Module) -> Work:
    """Return what answers prompts with a model, each token from the logits before."""

    def answer(count: int) -> list[bytes]:
        model, found = copy.deepcopy(base), []
        for number in range(count):
            assert embedding_rows(model, {}) == 288  # is found by watching the model's embedding
            walk = BlockWalk(model, [mx.array([[number % 250, 2, 3]])])
            assert [list(walk.step()) for _ in model.layers] == [[0]] * len(model.layers)
            steps, cache = TokenSteps(model), make_prompt_cache(model)
            tokens = mx.array([[number % 250, 7, 11, 3]])
            for _ in range(TOKENS):
                logits = steps(tokens, cache=cache)[:, -1]
                found.append(bytes(memoryview(logits.astype(mx.float32))))
                tokens = mx.argmax(logits, axis=-1)[None]
        return found

    return answer


def another() -> nn.Module:
    """Return a model of another architecture, which imports the same functions."""
    model = tiny_architecture("qwen3")
    mx.eval(model.parameters())
    return model


def together(*works: Work, count: int) -> list[list[bytes]]:
    """Return what several threads find that work at the same time."""
    found: list[list[bytes]] = [[] for _ in works]
    begin = threading.Barrier(len(works))

    def run(place: int) -> None:
        begin.wait()
        found[place] = works[place](count)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.long
@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("who", ["same", "quantized", "another"])
def test_each_computes_what_it_computes_alone(who, count):
    base = tiny_base(4 if who == "quantized" else None)
    train, answer = training(base), answers(another() if who == "another" else base)
    alone = [*together(train, count=count), *together(answer, count=count)]
    assert together(train, answer, count=count) == alone
    assert len(set(alone[0])) == count + 1  # each step has a loss of its own
    assert len(set(alone[1])) == count * TOKENS
