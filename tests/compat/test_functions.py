"""Calls are taken in one thread, for one place or one instance, and only inside the block."""

from __future__ import annotations

import sys
import threading

import mlx.core as mx
import pytest

from mlx_lora.compat.functions import answering, exchanged, keeps_context, original
from mlx_lora.compat.instances import classes_put_back, mix_in
from mlx_lora.models.folder import is_foreign

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
