"""Play episodes of a verifiers environment in this process, with answers that the caller gives.

The package's own rollout runs: its environment, its tasks' hooks, its tool servers, and its scoring. All of that lives in an
event loop of a thread of its own. Two of its parts are replaced, through what the package has for that:

    Client        what a rollout asks for an answer (`AskingClient`): it waits until the caller gives one, as exact tokens
    NullHarness   the package's plain chat loop, which else is a process for each episode (`ChatHarness`), through the same
                  local endpoint

Nothing is rendered here, and no model is called: an episode stands still at each question, and the caller, who sees the
whole conversation in the question, answers the questions of all episodes together (rollouts/make_environment.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from mcp import MCPError  # pyright: ignore[reportMissingImports]
from verifiers.v1 import (  # pyright: ignore[reportMissingImports]
    AssistantMessage,
    ModelContext,
    ProviderError,
    Response,
    ToolCall,
    TrainClientConfig,
    TurnTokens,
    Usage,
)
from verifiers.v1.clients import Client  # pyright: ignore[reportMissingImports]
from verifiers.v1.clients.train import serialize_completion  # pyright: ignore[reportMissingImports]
from verifiers.v1.dialects import ChatDialect  # pyright: ignore[reportMissingImports]
from verifiers.v1.harnesses.null.harness import NullHarness  # pyright: ignore[reportMissingImports]
from verifiers.v1.harnesses.utils.compaction import bound_tool_message  # pyright: ignore[reportMissingImports]
from verifiers.v1.harnesses.utils.mcp import connect_mcp, mcp_content_to_chat_content  # pyright: ignore[reportMissingImports]
from verifiers.v1.runtimes import ProgramResult  # pyright: ignore[reportMissingImports]

from mlx_lora.compat.foreign import INTERCEPTION
from mlx_lora.data.task_sets import agent_of, one_line, plain
from mlx_lora.utils.errors import InputError

NO_ROOM = "the conversation has the maximum context length"  # the package's loops end an episode cleanly at these words
CLOSING_S = 5.0  # that an episode, or all of the environment, may take to end
MODEL = "policy"
ENDPOINT = TrainClientConfig(base_url="http://127.0.0.1:9/v1", api_key_var="MLX_LORA_NO_KEY")  # never called


# Questions and answers


@dataclass(frozen=True)
class Question:
    """What an episode asks the model.

    Attributes:
        messages: the conversation so far, in OpenAI's form.
        tail: the last of them that the model has not seen yet.
        tools: schemas of what it may call.
        before: the tokens that the package has kept of this conversation before the tail; None: it begins.
        reply: gets the answer.
    """

    messages: list[dict[str, Any]]
    tail: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    before: list[int] | None
    reply: asyncio.Future[Response]


@dataclass
class PlayedEpisode:
    """An episode in the event loop.

    Attributes:
        number: the caller's.
        ended: whether it is over and scored.
        question: that waits for an answer.
        trace: the package's record of it.
        problem: why it cannot be used; None: it can.
        cut_short: whether a time limit of the environment ended it.
        task: that plays it.
    """

    number: int
    ended: bool = False
    question: Question | None = None
    trace: Any = None
    problem: str | None = None
    cut_short: bool = False
    task: asyncio.Task[None] | None = None


class AskingClient(Client):
    """Hands each question to its episode, and returns the answer."""

    def __init__(self, host: Host):
        """Answer the questions of a host's episodes."""
        self.host = host

    async def get_response(
        self,
        dialect: Any,
        body: dict[str, Any],
        sampling: Any,
        session_id: str | None = None,
        turn: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        episode = self.host.of_trace.get(session_id or "")
        if episode is None or turn is None:
            raise ProviderError("no episode of this run asks", status_code=400)
        if not isinstance(dialect, ChatDialect):
            raise ProviderError("only chat completions are answered with exact tokens", status_code=400)
        if episode.question is not None:
            raise ProviderError("two questions at once in an episode", status_code=400)
        before = turn.previous_renderer_token_ids()
        try:
            messages, tail = plain(turn.prompt, "the environment"), plain(turn.tail, "the environment")
        except InputError as error:
            raise ProviderError(str(error), status_code=400) from error
        question = Question(
            messages=messages,
            tail=tail,
            tools=[
                {
                    "type": "function",
                    "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
                }
                for tool in turn.tools
            ],
            before=None if not turn.prefix_node_ids else [*before[0], *before[1]] if before else [],
            reply=asyncio.get_running_loop().create_future(),
        )
        self.host.changed(episode, question=question)
        try:
            response = await question.reply
        finally:
            if episode.question is question:
                self.host.changed(episode, question=None)
        response.raw = serialize_completion(response, MODEL)
        return response


def response_of(
    content: str, thinking: str, calls: Sequence[Mapping[str, Any]], before: list[int], own: list[int], ended: bool
) -> Response:
    """Return an answer as the package takes it.

    Args:
        content, thinking: its texts.
        calls: of tools, each with `id`, `name` and `arguments`.
        before: the tokens before it.
        own: its tokens.
        ended: whether an end token ends it.
    """
    made = []
    for one in calls:
        given = one["arguments"]
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False, default=str)
        made.append(ToolCall(id=one["id"], name=one["name"], arguments=text))
    return Response(
        id="",
        created=0,
        model=MODEL,
        message=AssistantMessage(content=content or None, reasoning_content=thinking or None, tool_calls=made or None),
        finish_reason="length" if not ended else "tool_calls" if made else "stop",
        usage=Usage(prompt_tokens=len(before), completion_tokens=len(own)),
        tokens=TurnTokens(prompt_ids=list(before), completion_ids=list(own)),
    )


# The chat loop


class ChatHarness(NullHarness):
    """The package's plain chat loop, in this process: asks, makes the calls of tools, and asks again.

    Attributes:
        failures: takes the record's id, the tool's name, and why a call failed.
    """

    failures: Callable[[str, str, str], None]

    async def setup(self, runtime: Any) -> None:
        """Do nothing: there is no program to prepare."""

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
        tool_interception_url: str | None = None,
    ) -> ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else plain(prompt or [], "the environment")
        )
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        async with contextlib.AsyncExitStack() as stack:
            timeout = httpx.Timeout(None, connect=CLOSING_S)
            headers = {"Authorization": f"Bearer {secret}"}
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=timeout, headers=headers, trust_env=False))
            tools, calls = await self._tools(mcp_urls, stack)
            while True:
                asked = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
                reply = await http.post(f"{endpoint}/chat/completions", json=asked)
                if reply.status_code == 400 and NO_ROOM in reply.text:
                    return ProgramResult(0, "", "")
                if reply.status_code >= 400:
                    return ProgramResult(1, "", reply.text)
                message = reply.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return ProgramResult(0, "", "")
                for call in message["tool_calls"]:
                    result = await self._denied(http, tool_interception_url, call)
                    messages.append(result or await self._result(trace.id, calls, call))

    async def _tools(self, urls: dict[str, str], stack: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the tools of all servers, and by name what calls them."""
        if not urls:
            return [], {}
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in urls.items()}
        tools, names, connected = await connect_mcp({"mcpServers": servers}, stack)
        return tools, {full: (connected[server], name) for full, (server, name) in names.items()}

    async def _denied(self, http: Any, url: str | None, call: dict[str, Any]) -> dict[str, Any] | None:
        """Ask whether the environment allows a call; return what the model reads instead of a result, or None."""
        if not url:
            return None
        function = call["function"]
        about = {"tool_call_id": call["id"], "name": function["name"], "arguments": _read(function["arguments"])}
        verdict = (await http.post(url, json=about)).raise_for_status().json()
        if verdict["action"] == "stop":
            raise RuntimeError(verdict["reason"])
        return bound_tool_message(verdict["message"]) if verdict["action"] == "deny" else None

    async def _result(self, trace: str, tools: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        """Return what a call gives, or what went wrong in it, as a message."""
        name, arguments = call["function"]["name"], _read(call["function"]["arguments"])
        failed: str | None = None
        content: Any = ""
        if name not in tools:
            failed = f"unknown tool {name!r}"
        elif not isinstance(arguments, dict):
            failed = "the arguments are no JSON object"
        else:
            server, raw = tools[name]
            try:
                called = server.run(lambda client: client.call_tool(raw, arguments))
                result = await asyncio.wait_for(called, self.config.tool_timeout)
                content = mcp_content_to_chat_content(result.content)
                failed = str(content) if result.is_error else None
            except TimeoutError:
                failed = f"{name} took longer than {self.config.tool_timeout:g} s"
            except MCPError as error:  # the server's own: the tool ended its process, for example
                failed = f"{name} failed ({error.message})"
        if failed is not None:
            self.failures(trace, name, failed)
            content = content or f"error: {failed}"
        return bound_tool_message({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})


def _read(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


# Episodes


@dataclass
class Host:
    """An environment that is served in a thread, and its episodes.

    Attributes:
        environment: the package's.
        failed: takes an episode's number, the name of a tool and why its call failed, for each call that failed.
        episodes: that were begun last, by number.
        of_trace: the same by the id of their record.
    """

    environment: Any
    failed: Callable[[int, str, str], None] = lambda number, name, why: None
    episodes: dict[int, PlayedEpisode] = field(default_factory=dict)
    of_trace: dict[str, PlayedEpisode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Set up; nothing is started yet."""
        self._moved = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._close = lambda: None
        before = self.environment.setup

        def failed_call(trace: str, name: str, why: str) -> None:
            if (episode := self.of_trace.get(trace)) is not None:
                self.failed(episode.number, name, why)

        async def setup(agents: Any) -> None:  # lets the plain chat loop run in this process, if the agent has that one
            await before(agents)
            agent = getattr(agents, agent_of(self.environment)[0])
            if type(agent.harness) is NullHarness:
                agent.harness = ChatHarness(agent.harness.config)
                agent.harness.failures = failed_call

        self.environment.setup = setup

    def start(self, limit_s: float) -> None:
        """Serve the environment, unless it is served.

        Raises:
            TimeoutError: it takes longer.
            Exception: whatever the environment raised.
        """
        if self._loop is not None:
            return
        # Servers of tools, processes in other folders, are to find the module of its class, and what PYTHONPATH has.
        kind = type(self.environment.taskset)
        file = Path(sys.modules[kind.__module__].__file__ or "").resolve()
        root = file.parents[kind.__module__.count(".") + (file.name == "__init__.py")]
        known = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        if root.name not in ("site-packages", "dist-packages"):
            known += [str(root)] if str(root) not in known else []
        if known:
            os.environ["PYTHONPATH"] = os.pathsep.join(known)
        loop, ready, closing = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
        outcome: list[BaseException] = []

        async def serve() -> None:
            try:
                async with self.environment.serving():
                    # Which client answers is the server's: it makes one for each endpoint, and finds ours there.
                    INTERCEPTION.of(self.environment).clients[ENDPOINT.model_dump_json()] = AskingClient(self)
                    ready.set()
                    await closing.wait()
                    await self._stop_all()
            except BaseException as error:  # told to the caller, who waits in another thread
                outcome.append(error)
            finally:
                ready.set()

        def run() -> None:
            asyncio.set_event_loop(loop)
            serving = loop.create_task(serve())
            while not serving.done():
                with contextlib.suppress(SystemExit):  # of an episode, which ends with it
                    loop.run_until_complete(serving)
            loop.close()

        thread = threading.Thread(target=run, name="verifiers", daemon=True)
        thread.start()
        self._loop = loop
        self._close = weakref.finalize(self, _close, loop, closing, thread)
        if not ready.wait(limit_s):
            self.close()
            raise TimeoutError(f"it does not start within {limit_s:g} s")
        if outcome:
            self._loop = None
            raise outcome[0]

    def close(self) -> None:
        """End all episodes, and stop serving."""
        self._close()
        self._loop = None

    def begin(self, tasks: Mapping[int, Any]) -> None:
        """Begin an episode for each task, by its number; those that were begun before end."""
        loop = self._running()
        asyncio.run_coroutine_threadsafe(self._stop_all(), loop).result(2 * CLOSING_S)
        self.episodes = {number: PlayedEpisode(number) for number in tasks}
        self.of_trace = {}

        def begin() -> None:
            for number, task in tasks.items():
                episode = self.episodes[number]
                episode.task = loop.create_task(self._play(episode, task))

        loop.call_soon_threadsafe(begin)

    def settle(self, numbers: Sequence[int], limit_s: float) -> list[int]:
        """Wait until these episodes ask something or are over; return those that do neither in time."""
        until = time.monotonic() + limit_s

        def moving() -> list[int]:
            return [n for n in numbers if not self.episodes[n].ended and self.episodes[n].question is None]

        with self._moved:
            while moving() and (left := until - time.monotonic()) > 0:
                self._moved.wait(left)
            return moving()

    def answer(self, number: int, response: Response) -> None:
        """Answer an episode's question."""
        self._reply(number, lambda reply: reply.set_result(response))

    def end(self, number: int) -> None:
        """Tell an episode that there is no room for an answer, so that it is scored as it is."""
        self._reply(number, lambda reply: reply.set_exception(ProviderError(NO_ROOM, status_code=400)))

    def drop(self, number: int, why: str) -> None:
        """Give an episode up."""
        episode = self.episodes[number]
        self.changed(episode, ended=True, problem=episode.problem or why, question=None)
        if episode.task is not None:
            self._running().call_soon_threadsafe(episode.task.cancel)

    def changed(self, episode: PlayedEpisode, **values: Any) -> None:
        """Change an episode, and wake who waits for that."""
        with self._moved:
            for name, value in values.items():
                setattr(episode, name, value)
            self._moved.notify_all()

    def _reply(self, number: int, give: Callable[[asyncio.Future[Response]], None]) -> None:
        question = self.episodes[number].question
        if question is None:
            return
        self.changed(self.episodes[number], question=None)
        self._running().call_soon_threadsafe(lambda: None if question.reply.done() else give(question.reply))

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise ValueError("an environment that is not served")
        return self._loop

    async def _play(self, episode: PlayedEpisode, task: Any) -> None:
        def begun(trace: Any) -> None:
            if episode.trace is not None:
                episode.problem = "it holds several conversations in an episode, and only one is trained"
                raise ValueError(episode.problem)
            episode.trace = trace
            self.of_trace[trace.id] = episode

        problem, cut_short = None, False
        try:
            found = await self.environment.run_episode(task, ModelContext(MODEL, ENDPOINT), on_trace=begun)
            errors = [*found.errors, *(error for trace in found.traces for error in trace.errors)]
            if not found.ok:
                words = f"{errors[0].type}: {errors[0].message}" if errors else "it failed"
                # Of a program's own report, its end says what happened.
                first, *more = [line for line in words.splitlines() if line.strip()]
                problem = f"{first} {more[-1].strip()}" if more else first
            cut_short = found.is_timeout or any(trace.is_timeout for trace in found.traces)
        except asyncio.CancelledError:
            problem = "it was ended"
        except (Exception, SystemExit) as error:  # the package keeps what an environment raises; not all of it
            problem = one_line(error)
        self.changed(episode, ended=True, problem=episode.problem or problem, cut_short=cut_short, question=None)

    async def _stop_all(self) -> None:
        tasks = [one.task for one in self.episodes.values() if one.task is not None and not one.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSING_S)


def _close(loop: asyncio.AbstractEventLoop, closing: asyncio.Event, thread: threading.Thread) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended by itself
        loop.call_soon_threadsafe(closing.set)
    if thread is not threading.current_thread():
        thread.join(2 * CLOSING_S)
