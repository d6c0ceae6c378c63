"""Let another local model judge: which of two answers is better, asked in both orders.

The judge reads question and both answers in its chat template, and is not asked to write: the log-probabilities of "A" and
"B" as its next word are compared, so each question costs one batch row and always has an answer. A small judge often
prefers the first answer, or the second, whatever they are. So each pair is asked in both orders, an answer wins if it is
preferred in both, and all else is a tie. How often the two orders agree is reported; a judge with low agreement says little.

If all of this is longer than the judge's context, the answers and the expected one are cut at their ends, all at the same
length, and the question stays whole. Where it alone leaves no room for them, the pair is not judged.

Source: Zheng et al., arXiv 2306.05685, section 3.4 (position bias, swapping).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2

from mlx_lora.data.chat_template import chat_tokens
from mlx_lora.evaluation.models import BASE, Models, Scored
from mlx_lora.evaluation.paired import FEWEST_ROWS, Comparison, ModelScore, TaskScore, score_interval
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

QUESTION = """Here are a question and two answers to it, A and B.{reference}

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better: more correct, more helpful, and to the point? Reply with one letter, A or B."""
REFERENCE = "\nA correct answer, to compare with:\n\n[Reference]\n{expected}"
MOST_CHARACTERS = 6000  # of each text
LEAST_CHARACTERS = 100  # to which an answer is cut


@dataclass(frozen=True)
class AnswerPair:
    """A question with the base's answer and an adapter's, and the expected answer, empty if there is none."""

    question: str
    base: str
    other: str
    expected: str = ""


@dataclass(frozen=True)
class Judged:
    """What a judge said of pairs.

    Attributes:
        wins: of the adapter's answer.
        losses: of it.
        rows: all pairs but those that do not fit; the others are ties.
        asked: pairs whose answers differ; the others were not asked.
        agreed: of these, in which both orders prefer the same answer.
        verdicts: of each pair, 1, 0 (a tie) or -1; None if it does not fit the judge's context.
        shortened: pairs whose answers were cut.
    """

    wins: int
    losses: int
    rows: int
    asked: int
    agreed: int
    verdicts: tuple[int | None, ...]
    shortened: int = 0

    @property
    def agreement(self) -> float | None:
        """The share of asked pairs in which both orders agree; None if none was asked."""
        return self.agreed / self.asked if self.asked else None

    def notes(self, judge: str, adapter: str) -> list[str]:
        """Return what is said of the verdicts, in lines."""
        ties = self.rows - self.wins - self.losses
        words = f"judge {judge}, {adapter} against base: {self.wins} wins, {self.losses} losses, {ties} ties"
        if self.agreement is not None:
            words += f"; both orders agree on {self.agreement:.0%} of {self.asked} pairs"
            words += " (below two thirds, do not rely on it)" if self.agreement < 2 / 3 else ""
        cut = f"answers of {counted(self.shortened, 'pair')} were cut" if self.shortened else ""
        lost = f"{counted(len(self.verdicts) - self.rows, 'pair')} could not be judged" if None in self.verdicts else ""
        found = " and ".join(filter(None, (cut, lost)))
        return [words] + (
            [f"judge {judge}: {found}, to fit its context; choose one with a longer context"] if found else []
        )

    def score(self, task: str, judge: str, adapter: str) -> TaskScore:
        """Return the shares of wins as a score: of the base those that the adapter lost."""
        difference = (self.wins - self.losses) / max(1, self.rows)
        few = self.rows < FEWEST_ROWS
        low, high = (-float("inf"), float("inf")) if few else score_interval(self.wins, self.losses, self.rows)
        scores = {}
        for name, count in ((BASE, self.losses), (adapter, self.wins)):
            share = count / max(1, self.rows)
            scores[name] = ModelScore(share, (share * (1 - share) / max(1, self.rows - 1)) ** 0.5)
        compared = {adapter: Comparison(difference, low, high, self.rows)}
        return TaskScore(task, f"judge {judge}", True, self.rows, scores, {**compared})


def judge_pairs(judge: Models, pairs: Sequence[AnswerPair], stopped: Callable[[], bool] = lambda: False) -> Judged:
    """Let a model judge pairs of answers.

    Args:
        judge: its base alone is asked.
        pairs: with different or equal answers; equal ones are ties.
        stopped: asked before each batch whether to end.

    Raises:
        InputError: the judge has no chat template.
        KeyboardInterrupt: it was stopped.
    """
    # The tokens of the two letters, as an answer begins with them.
    letters = [judge.base.hf_tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "AB"]
    verdicts: list[int | None] = [0] * len(pairs)
    asked: list[Scored] = []
    differing, shortened = [], 0
    for number, pair in enumerate(pairs):
        if pair.base.strip() == pair.other.strip():
            continue
        contexts, cut = _contexts(judge, pair)
        if not contexts:
            verdicts[number] = None
            continue
        differing.append(number)
        shortened += cut
        asked += [Scored(BASE, context, (letter,)) for context in contexts for letter in letters]
    found, agreed = judge.log_likelihoods(asked, stopped), 0
    for at, number in enumerate(differing):
        one, two, three, four = (likelihood.total for likelihood in found[4 * at : 4 * at + 4])
        # Whether the adapter's answer is preferred: 1, -1, or 0, as logits of 16 bits are often equal.
        first_order, second_order = ((own > other) - (own < other) for own, other in ((two, one), (three, four)))
        if first_order == second_order != 0:
            agreed += 1
            verdicts[number] = first_order
    wins, losses = verdicts.count(1), verdicts.count(-1)
    rows = len(pairs) - verdicts.count(None)
    return Judged(wins, losses, rows, len(differing), agreed, tuple(verdicts), shortened)


def _contexts(judge: Models, pair: AnswerPair) -> tuple[list[tuple[int, ...]], bool]:
    """Return what the judge reads in both orders, nothing if it does not fit its context, and whether answers were cut for it."""
    most, cut = min(MOST_CHARACTERS, max(map(len, (pair.base, pair.other, pair.expected)))), False
    while True:
        orders = ((pair.base, pair.other), (pair.other, pair.base))
        contexts = [_context(judge, pair, *order, most) for order in orders]
        if max(map(len, contexts)) <= judge.context_tokens:
            return contexts, cut
        if most <= LEAST_CHARACTERS:
            return [], False
        most, cut = max(LEAST_CHARACTERS, most * 3 // 4), True


def _context(judge: Models, pair: AnswerPair, first: str, second: str, most: int) -> tuple[int, ...]:
    """Return what the judge reads: the question, and at most so many characters of each other text."""
    template = judge.templates[BASE]
    if template is None:
        raise InputError(f"--judge {judge.base.model_id}: it has no chat template; choose an instruction-tuned model")
    cut = {"question": pair.question[:MOST_CHARACTERS], "first": first[:most], "second": second[:most]}
    reference = REFERENCE.format(expected=pair.expected[:most]) if pair.expected else ""
    message = {"role": "user", "content": QUESTION.format(reference=reference, **cut)}
    try:
        return tuple(chat_tokens(judge.base.hf_tokenizer, [message], template))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(f"--judge {judge.base.model_id}: its chat template refuses the question ({error})") from None
