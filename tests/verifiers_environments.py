"""Environments of verifiers 0.4 as packages have them: one answer, several turns, tools, and what cannot be trained on."""

from __future__ import annotations

from pathlib import Path

SINGLE = '''
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
'''

TURNS = '''
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
'''

TOOLS = '''
import verifiers.v1 as vf

COLORS = {"apple": "red", "pear": "green"}

class Shelf(vf.Toolset[vf.SharedToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def look_up(self, word: str) -> str:
        """Look up the color of a thing."""
        return COLORS[word]

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


def write_environments(folder: Path, **sources: str) -> Path:
    """Write environments as modules, by name."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return folder
