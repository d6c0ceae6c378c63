"""Calls of a user's code: one event loop for all of them, and what ends a call."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import mlx.core as mx
import pytest

from mlx_lora.rollouts import user_code as user_calls
from mlx_lora.rollouts.environment import called
from mlx_lora.rollouts.user_code import TooLong, at_most, awaited


def in_this_thread(function):
    return function()


def in_a_notebook(function):
    """Call a function where a loop runs already, as in a notebook."""

    async def cell():
        return function()

    with asyncio.Runner() as other:
        return other.run(cell())


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


PLACES = [in_this_thread, in_a_notebook, in_another_thread]
MAIN = PLACES[:2]


CLIENTS = []  # live as long as their loop


class Client:
    """Keeps what belongs to a loop from call to call, as HTTP clients do."""

    def __init__(self):
        CLIENTS.append(self)
        self.waiting: asyncio.Queue[int] | None = None
        self.loops = set()

    async def ask(self) -> int:
        self.loops.add(asyncio.get_running_loop())
        if self.waiting is None:
            self.waiting, inside = asyncio.Queue(), asyncio.Queue()
            self.server = asyncio.create_task(self._answer(self.waiting, inside))
            self.inside = inside
        await self.waiting.put(1)
        return await self.inside.get()

    async def _answer(self, asked, replies):
        while True:
            await replies.put(await asked.get() + 1)


@pytest.mark.parametrize("place", PLACES)
def test_what_belongs_to_a_loop_works_in_every_call(place):
    client = Client()
    assert [place(lambda: awaited(client.ask())) for _ in range(3)] == [2, 2, 2]
    assert len(client.loops) == 1


@pytest.mark.parametrize("place", MAIN)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_time_limit_interrupts_and_the_next_call_works(place, blocks, monkeypatch):
    monkeypatch.setattr(user_calls, "GRACE_S", 0.1)
    ended = []

    async def slow():
        try:
            time.sleep(30) if blocks else await asyncio.sleep(30)
        finally:
            ended.append(True)

    async def quick():
        return 4

    def limited():
        with at_most(0.1):
            awaited(slow())

    start = time.perf_counter()
    with pytest.raises(TooLong):
        place(limited)
    assert time.perf_counter() - start < 20
    assert ended or blocks  # it does not go on beside the next one
    assert place(lambda: awaited(quick())) == 4


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("part", [False, True])
def test_an_exit_is_a_failure_and_the_next_call_works(place, part):
    async def ends():
        sys.exit(0)

    async def both():
        await asyncio.gather(asyncio.sleep(0.01), ends())

    tools = {"stop": both if part else ends, "plain": lambda: sys.exit(0)}
    for name in tools:
        found = place(lambda name=name: called(tools, {"name": name, "arguments": {}}, 10.0))
        assert found.failed.startswith("SystemExit")

    async def quick():
        return 4

    assert place(lambda: awaited(quick())) == 4


@pytest.mark.parametrize("place", MAIN)
def test_ctrl_c_is_no_failure(place):
    async def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place(lambda: called({"a": interrupted}, {"name": "a", "arguments": {}}, 10.0))


def test_arrays_of_this_thread_may_be_used():
    waiting = mx.arange(3) + 1  # not computed yet, and only its own thread can

    async def doubled():
        await asyncio.sleep(0)
        return waiting * 2

    assert awaited(doubled()).tolist() == [2, 4, 6]


def test_a_forked_process_has_a_loop_of_its_own():
    client = Client()
    assert awaited(client.ask()) == 2
    child = os.fork()
    if not child:
        found = 1
        try:
            found = 0 if awaited(Client().ask()) == 2 else 2
        finally:
            os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert awaited(client.ask()) == 2


def test_the_interpreter_ends_with_waiting_tasks():
    """Without a word on them, and at once."""
    code = """
import asyncio, sys
from mlx_lora.rollouts.user_code import awaited
async def leaves():
    asyncio.get_running_loop().left = asyncio.create_task(asyncio.sleep(600))
    await asyncio.sleep(0)
awaited(leaves())
async def cell():
    awaited(leaves())
with asyncio.Runner() as other:
    other.run(cell())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_task_that_takes_no_notice_does_not_hold_the_interpreter():
    code = """
import asyncio
from mlx_lora.rollouts.user_code import awaited
async def stays():
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
async def leaves():
    asyncio.get_running_loop().left = asyncio.create_task(stays())
    await asyncio.sleep(0)
awaited(leaves())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
