"""Environments of verifiers 0.4 as packages have them: one answer, several turns, tools, and what cannot be trained on."""

from __future__ import annotations

from pathlib import Path

SINGLE = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str

class Word(vf.Task[Data]):
    @vf.reward
    async def says(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 20)

    @vf.metric
    async def characters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))

class Words(vf.Taskset[Word]):
    def load(self):
        for word in ("apple", "pear", "plum", "fig"):
            yield Word(Data(prompt=f"Say {word}", system_prompt="Be brief.", answer=word), self.config.task)

__all__ = ["Words"]
"""

TURNS = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    secret: int

class Guess(vf.Task[Data]):
    @vf.reward
    async def found(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.secret))

class Guesses(vf.Taskset[Guess]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            yield Guess(Data(prompt=f"Guess {number}", secret=number % 9 + 1), self.config.task)
            number += 1

class Hints(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            segment = await talk.turn()
            for _ in range(2):
                said = segment.last_reply
                if segment.terminated or said == str(task.data.secret):
                    return
                hint = "higher" if said.isdigit() and int(said) < task.data.secret else "lower"
                segment = await talk.turn(hint)

__all__ = ["Guesses", "Hints"]
"""

TOOLS = '''
import sys
import verifiers.v1 as vf

COLORS = {"apple": "red", "pear": "green"}

class Shelf(vf.Toolset[vf.SharedToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def look_up(self, word: str) -> str:
        """Look up the color of a thing."""
        return sys.exit(1) if word == "exit" else COLORS[word]

class Data(vf.TaskData):
    color: str

class Color(vf.Task[Data]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.color in trace.last_reply)

    @vf.metric
    async def looked(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))

class Config(vf.TasksetConfig):
    tools: vf.SharedToolsetConfig = vf.SharedToolsetConfig()

class Colors(vf.Taskset[Color, Config]):
    def load(self):
        for word, color in COLORS.items():
            yield Color(Data(prompt=f"Color of {word}?", color=color), self.config.task)

    @classmethod
    def toolsets(cls, config):
        return [Shelf(config.tools)]

__all__ = ["Colors"]

if __name__ == "__main__":
    Shelf.run()
'''


# The task of tool_model.py: colors of things; which words are asked about is a setting.
SHELF = '''
import verifiers.v1 as vf

WORDS = [f"word{number:02d}" for number in range(12)]

def color(word):
    return f"color{(WORDS.index(word) * 5 + 3) % 8:02d}" if word in WORDS else "nothing"

class Shelf(vf.Toolset[vf.SharedToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def look_up(self, word: str) -> str:
        """Look up the color of a thing."""
        return color(word)

class Data(vf.TaskData):
    color: str

class Ask(vf.Task[Data]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.color)

class Config(vf.TasksetConfig):
    words: str = "train"
    tools: vf.SharedToolsetConfig = vf.SharedToolsetConfig()

class Things(vf.Taskset[Ask, Config]):
    def load(self):
        for word in WORDS[:8] if self.config.words == "train" else WORDS[8:]:
            yield Ask(Data(prompt=f"Which color has {word}", color=color(word)), self.config.task)

    @classmethod
    def toolsets(cls, config):
        return [Shelf(config.tools)]

__all__ = ["Things"]

if __name__ == "__main__":
    Shelf.run()
'''

# An environment whose tasks go wrong in ways that their prompts name.
WRONG = """
import asyncio
import sys
import verifiers.v1 as vf

class Data(vf.TaskData):
    what: str = ""

class Odd(vf.Task[Data]):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        if self.data.what == "setup":
            raise KeyError("no such shelf")
        if self.data.what == "slow":
            await asyncio.sleep(30)

    @vf.intercept
    async def rewritten(self, response: vf.Response) -> vf.Response | None:
        if self.data.what == "rewritten":
            return response.model_copy(update={"message": vf.AssistantMessage(content="Something else.")})
        return None

    @vf.reward
    async def judged(self, trace: vf.Trace) -> float | dict:
        if self.data.what == "reward" and trace.last_reply == "bad":
            raise ValueError("cannot judge this")
        if self.data.what == "exits" and trace.last_reply == "bad":
            sys.exit(0)
        return {"other": 1.0} if self.data.what == "names" else 1.0

class Odds(vf.Taskset[Odd]):
    def load(self):
        for what in ("fine", "setup", "slow", "rewritten", "reward", "names", "twice", "begins", "forgets", "picture", "exits"):
            yield Odd(Data(prompt=what, what=what), self.config.task)

class Play(vf.Env[vf.SingleAgentEnvConfig]):
    count = 0

    async def run(self, task, agents):
        await self._play(task, agents)
        if task.data.what == "twice":
            await agents.agent.run(task)

    async def _play(self, task, agents):
        if task.data.what == "begins":
            Play.count += 1
            task = task.with_data(prompt=f"begins {Play.count}")
        if task.data.what == "picture":
            seen = vf.UserMessage(content=[vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url="data:,"))])
            task = task.with_data(prompt=[seen])
        if task.data.what != "forgets":
            await agents.agent.run(task)
            return

        class Forgetful(type(agents.agent.harness)):
            async def resume(self, ctx, trace, runtime, endpoint, secret, urls, data, messages, *more):
                data = data.model_copy(update={"prompt": messages})
                return await self.launch(ctx, trace, runtime, endpoint, secret, urls, data, *more)

        agents.agent.harness = Forgetful(agents.agent.harness.config)
        async with agents.agent.interaction(task) as talk:
            await talk.turn()
            await talk.turn("and now?")

__all__ = ["Odds", "Play"]
"""
# Tasks of two classes, whose rewards have different names.
TWO_KINDS = """
import verifiers.v1 as vf

class Word(vf.Task):
    @vf.reward
    async def says(self, trace: vf.Trace) -> float:
        return 1.0

class Sum(Word):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return 1.0

class Both(vf.Taskset[vf.Task]):
    def load(self):
        yield Word(vf.TaskData(prompt="Say apple"))
        yield Word(vf.TaskData(prompt="Say pear"))
        yield Sum(vf.TaskData(prompt="1+1"))

__all__ = ["Both"]
"""
TWO_AGENTS = """
import verifiers.v1 as vf

class Config(vf.EnvConfig):
    solver: vf.AgentConfig = vf.AgentConfig()
    checker: vf.AgentConfig = vf.AgentConfig()

class Pairs(vf.Env[Config]):
    async def run(self, task, agents):
        await agents.solver.run(task)
        await agents.checker.run(task)

class Tasks(vf.Taskset[vf.Task]):
    def load(self):
        yield vf.Task(vf.TaskData(prompt="?"))

__all__ = ["Tasks", "Pairs"]
"""
# An environment with settings of its own for its agent.
OWN = SINGLE.replace(
    '__all__ = ["Words"]',
    """
class Config(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(sampling=vf.Sampling(temperature=0.1), retries={"max_retries": 3}, max_turns=6)

class Own(vf.Env[Config]):
    async def run(self, task, agents):
        await agents.agent.run(task)

__all__ = ["Words", "Own"]
""",
)
# An environment with a program of its own.
PROGRAM = SINGLE.replace(
    '__all__ = ["Words"]',
    """
class Program(vf.Harness[vf.HarnessConfig]):
    NEEDS_CONTAINER = False

    async def launch(self, *arguments):
        raise NotImplementedError

__all__ = ["Words", "Program"]
""",
)
PLAIN = """
import verifiers.v1 as vf

class One(vf.Task):
    NEEDS_CONTAINER = {container}

    @vf.reward
    async def one(self, trace: vf.Trace) -> float:
        return 1.0

class Ones(vf.Taskset[One]):
    def load(self):
        {tasks}

__all__ = ["Ones"]
"""


def plain(tasks: str = "yield One(vf.TaskData(prompt='?'), self.config.task)", container: bool = False) -> str:
    """Return an environment with a given body of its task set's `load`."""
    return PLAIN.format(tasks=tasks, container=container)


def write_environments(folder: Path, **sources: str) -> Path:
    """Write environments as modules, by name."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return folder
