"""Run the tasks of lm-eval on several models at once (extra `eval`; nothing else imports lm-eval, and nothing here torch).

lm-eval builds the requests of a task, and asks a model for log-likelihoods and texts. It knows one model at a time, so it
runs once for each model; what it asks first is computed for all models together, and the later runs find it done. Requests
of a model whose chat template is another one are computed when it asks.

Data sets of the hub need the network once; then they are in the cache of `datasets`. Tasks in YAML files with local data
need none: `dataset_path: json` with `data_files`, which may lie beside the YAML file.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jinja2
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
from lm_eval import utils as lm_eval_utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from mlx_lora.compat.foreign import BARS, LOAD_YAML
from mlx_lora.compat.functions import exchanged
from mlx_lora.data.sandbox import render_chat
from mlx_lora.evaluation.models import BASE, LogLikelihood, Models, Scored, TextRequest
from mlx_lora.evaluation.paired import MOST_QUESTION, Answered, ModelScore, TaskResults, TaskScore, compare_weighted
from mlx_lora.models.folder import FOREIGN_ERRORS, short
from mlx_lora.models.generator import Sampling
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import closest

NEW_TOKENS = 256  # of an answer, where a task does not say, as in lm-eval
SEED, FEWSHOT_SEED = 0, 1234  # lm-eval's own
NO_FILTER = "none"
NUMBERS = (bool, int, float, np.number)
YAML = (".yaml", ".yml")
NAMES_SHOWN = 8


def run_tasks(
    models: Models,
    asked: Sequence[str],
    chat_template: bool = False,
    fewshot: int | None = None,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> TaskResults:
    """Return what the models score in tasks: lm-eval's results, with our own standard errors and comparisons.

    Args:
        models: a base and adapters.
        asked: names of lm-eval's tasks and groups, or YAML files.
        chat_template: ask in the form of the chat template.
        fewshot: solved examples before each question; None: as the task says.
        limit: rows of each task, from its first on; None: all.
        stopped: asked before each batch whether to end.

    Raises:
        InputError: a task is not known, or its data cannot be loaded.
        KeyboardInterrupt: it was stopped.
    """
    found, done, random_streams = {}, {}, (random.getstate(), np.random.get_state())
    with _without_bars():
        loaded = load_tasks(asked, fewshot)
        for name in models.names:  # one after another, on what was computed for all
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            random.seed(SEED)  # as lm-eval does
            np.random.seed(FEWSHOT_SEED)
            try:
                with _foreign(f"--tasks {' '.join(asked)}"):
                    found[name] = lm_eval.evaluator.evaluate(
                        lm=HarnessModel(models, name, done, chat_template, stopped), task_dict=loaded, limit=limit,
                        bootstrap_iters=0, apply_chat_template=chat_template, fewshot_as_multiturn=chat_template,
                    )  # fmt: skip
            finally:
                random.setstate(random_streams[0])
                np.random.set_state(random_streams[1])
    measured, by_task = TaskResults(), {}
    for name, task in loaded["tasks"].items():
        rows: dict[str, dict[int, dict[str, Mapping[str, Any]]]] = {model: {} for model in found}  # by row and filter
        for model, result in found.items():
            for sample in result["samples"][name]:
                rows[model].setdefault(sample["doc_id"], {})[sample["filter"]] = sample
        for key in (key for key in found[BASE]["results"][name] if "," in key and "_stderr," not in key):
            metric, _, kind = key.partition(",")
            values = {model: [row[kind][metric] for row in own.values()] for model, own in rows.items()}
            aggregate = task.aggregation().get(metric)
            if aggregate is lm_eval.api.metrics.mean and all(
                isinstance(one, NUMBERS) for own in values.values() for one in own
            ):
                aggregate = None
            better = task.higher_is_better().get(metric) is not False
            score = TaskScore.of(name, _label(metric, kind), values, better, aggregate)
            for model, result in found.items():  # the number is lm-eval's own, to its last digit
                score.scores[model] = replace(score.scores[model], value=result["results"][name][key])
            measured.scores.append(score)
            by_task[name, key] = score
        measured.answers[name] = _answers(task, rows)
    measured.scores += _groups(loaded, found, by_task)
    return measured


def _label(metric: str, kind: str) -> str:
    return metric if kind == NO_FILTER else f"{metric} ({kind})"


# Which tasks there are


def known_tasks() -> list[str]:
    """Return the names of all tasks, groups and tags of lm-eval."""
    with _without_bars():
        return TaskManager().all_tasks


def load_tasks(asked: Sequence[str], fewshot: int | None = None) -> dict[str, Any]:
    """Return lm-eval's dictionary of tasks and groups; arguments as for `run_tasks`.

    Raises:
        InputError: a task is not known, or its data cannot be loaded.
    """
    specs: list[Any] = []
    folders, named = [], []
    for text in asked:
        path = Path(text).expanduser()
        if path.suffix in YAML:
            own = _own_task(text, path)
            specs.append(own.get("group", own))  # its folder is in the index of names
            folders += [path.parent] if "group" in own else []
        else:
            specs.append(text)
            named.append(text)
    manager = TaskManager(include_path=[*map(str, folders)] or None, include_defaults=bool(named))  # pyright: ignore[reportArgumentType] # a list of texts
    for text in named:
        if text not in manager.task_index:
            alike = [name for name in manager.all_tasks if name[:2] == text[:2]]  # of 14,000 names
            near = closest(text, alike, NAMES_SHOWN)
            hint = f"did you mean {' or '.join(near)}?" if near else "give a YAML file of your own, or a name"
            raise InputError(f"--tasks {text}: lm-eval has no such task; {hint} `--tasks list` prints all names")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for text, spec in zip(asked, specs, strict=True):
        # The tasks of a group find data that lies beside them.
        here = chdir(Path(text).expanduser().parent) if text not in named and isinstance(spec, str) else nullcontext()
        with _foreign(f"--tasks {text}"), here:
            for kind, entries in manager.load([spec]).items():
                loaded[kind] |= entries  # pyright: ignore[reportOperatorIssue] # each is a dictionary
    for name, task in loaded["tasks"].items():
        with _foreign(f"--tasks {name}"):
            if not len(task.eval_docs):
                raise InputError(f"--tasks {name}: its data has no rows; give a file with rows")
        own = task.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):  # a task may forbid examples by 0
            task.set_config(key="num_fewshot", value=fewshot or 0)
    return loaded


def _own_task(text: str, path: Path) -> dict[str, Any]:
    """Return the task or group of a YAML file, with data files that lie beside it found there."""
    if not path.is_file():
        raise InputError(f"--tasks {text}: there is no such file; give its path")
    if not path.read_bytes().strip():
        raise InputError(f"--tasks {text}: the file is empty; docs/is-my-model-better.md shows a task")
    with _foreign(f"--tasks {text}"):
        spec = LOAD_YAML.of()(path)
    if "task" not in spec and "group" not in spec:
        raise InputError(f"--tasks {text}: it has neither `task` nor `group`; docs/is-my-model-better.md shows a task")

    def beside(value: Any) -> Any:
        if isinstance(value, str):
            own = path.parent / value
            return str(own) if not Path(value).exists() and own.exists() else value
        if isinstance(value, dict):
            return {key: beside(one) for key, one in value.items()}
        return [beside(one) for one in value] if isinstance(value, list) else value

    given = spec.get("dataset_kwargs") or {}
    for key in given.keys() & {"data_files", "data_dir"}:
        given[key] = beside(given[key])
    return spec


@contextmanager
def _foreign(what: str) -> Iterator[None]:
    """Turn errors of lm-eval, `datasets` and a task's own code into one line."""
    try:
        yield
    except InputError:
        raise
    except (*FOREIGN_ERRORS, StopIteration) as error:  # `datasets` raises StopIteration for a file without rows
        if _needs_network(error):
            raise InputError(
                f"{what}: its data is on the hub, which cannot be reached ({short(error, 120)}); run it once with "
                "network, or use a YAML file with local data"
            ) from error
        raise InputError(f"{what}: lm-eval cannot run it ({type(error).__name__}: {short(error, 200)})") from error


def _needs_network(error: BaseException) -> bool:
    """Return whether an error, or what caused it, is one of the network."""
    words = ("connect", "offline", "resolve", "couldn't reach", "max retries", "couldn't find cache", "hub")
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError) or any(word in str(seen).lower() for word in words):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep lm-eval from writing bars and lines of its own; ours show the progress."""
    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        with exchanged({(lm_eval.api.task, BARS.name): partial(tqdm, disable=True)}):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        logger.setLevel(level)


# The model that lm-eval sees


class HarnessModel(TemplateLM):
    """One of several models, as lm-eval asks it; tokens, limits and defaults are those of its Hugging Face backend."""

    def __init__(
        self, models: Models, name: str, done: dict[Any, Any], chat: bool, stopped: Callable[[], bool] = lambda: False
    ):
        """Take a model.

        Args:
            models: all models.
            name: of this one.
            done: what any of them was asked so far, and the results.
            chat: whether requests have the form of the chat template.
            stopped: asked before each batch whether to end.
        """
        super().__init__()
        self.tokenizer: Any = models.base.hf_tokenizer
        self._models, self._name, self._done, self._stopped = models, name, done, stopped
        # What this model is asked, these are asked, too.
        self._alike = [other for other in models.names if not chat or models.templates[other] == models.templates[name]]

    def _results(self, asked: list[Any], compute: Callable[[list[Any], Callable[[], bool]], list[Any]]) -> list[Any]:
        """Return what this model answers, and compute with it what those that are asked the same answer.

        Args:
            asked: of this model.
            compute: returns the results of many models.
        """
        if any(one not in self._done for one in asked):
            all_asked = dict.fromkeys(one._replace(model=name) for one in asked for name in self._alike)
            missing = [one for one in all_asked if one not in self._done]
            self._done |= dict(zip(missing, compute(missing, self._stopped), strict=True))
        return [self._done[one] for one in asked]

    def _likelihoods(self, pairs: Iterable[tuple[Any, Any]]) -> list[LogLikelihood]:
        asked = [Scored(self._name, tuple(context), tuple(continuation)) for context, continuation in pairs]
        return self._results(asked, self._models.log_likelihoods)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self._models.context_tokens

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps requests under."""
        return f"{self._models.base.model_id}--{self._name}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text, with the tokenizer's own special tokens unless it begins with one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, up to where the model answers, or in the middle of its answer."""
        template = self._models.templates[self._name]
        if template is None:
            raise InputError(f"--apply-chat-template: {self._name} has no chat template; leave it out")
        messages: list[dict[str, Any]] = [dict(one) for one in chat_history]
        try:
            text = render_chat(self.tokenizer, messages, template, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError:  # as in lm-eval: the template may take no system message
            others = [message for message in messages if message["role"] != "system"]
            text = render_chat(self.tokenizer, others, template, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request's continuation."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._likelihoods((context, rest) for _, context, rest in requests)
        return [(one.total, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the model's context."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            cut = lm_eval_utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            own = [lm_eval_utils.make_disjoint_window(window) for window in cut]
            windows += own
            counts.append(len(own))
        found = iter(self._likelihoods(windows))
        return [sum(next(found).total for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the text that the model writes for each request."""
        end, seen = str(self.tokenizer.decode(self.eot_token_id)), Counter[str]()
        prompts = []
        for context, given in (request.args for request in requests):
            how: dict[str, Any] = dict(normalize_gen_kwargs(given, NEW_TOKENS))
            stops = tuple(stop for stop in handle_stop_sequences(how.get("until"), eos=end) if stop)
            most = int(how["max_gen_toks"])
            room = self.max_length - most
            if room < 1:
                raise InputError(f"--tasks: asks for {most} new tokens, and the model takes {self.max_length} in all")
            # As in lm-eval: the whole prompt begins with special tokens unless it has them.
            tokens = self.tok_encode(context)[-room:]
            sampling = Sampling(temperature=0)
            if how.get("do_sample") and how.get("temperature"):
                key = f"{context}{how}"
                seen[key] += 1  # of repeated requests each has its own stream
                sampling = Sampling(
                    how["temperature"], how.get("top_p", 1.0), how.get("top_k", 0) or 0, seed=SEED + seen[key]
                )
            prompts.append(TextRequest(self._name, tuple(tokens), most, stops, sampling))
        return [one.text for one in self._results(prompts, self._models.texts)]


# What lm-eval found


def _answers(task: Any, rows: Mapping[str, dict[int, dict[str, Mapping[str, Any]]]]) -> list[Answered]:
    """Return what the models answered in a task."""
    found = []
    for number in rows[BASE]:
        samples = {model: next(iter(own[number].values())) for model, own in rows.items()}
        values: dict[str, dict[str, float]] = {}
        for model, own in rows.items():
            for kind, sample in own[number].items():
                for metric in sample["metrics"]:
                    if isinstance(sample[metric], NUMBERS):
                        values.setdefault(_label(metric, kind), {})[model] = float(sample[metric])
        first, target = samples[BASE], samples[BASE]["target"]
        question, choices = str(first["arguments"][0][0]), first["arguments"]
        if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int) and 0 <= target < len(choices):
            target = str(choices[target][1]).strip()
        shown = question if len(question) <= MOST_QUESTION else "… " + question[-MOST_QUESTION:]
        answers = {model: _answer(task, sample) for model, sample in samples.items()}
        found.append(Answered(shown, str(target), answers, values))
    return found


def _answer(task: Any, sample: Mapping[str, Any]) -> str:
    """Return a model's answer as text: of a multiple choice, the likeliest choice; of log-likelihoods, the numbers."""
    if task.OUTPUT_TYPE == "multiple_choice":
        totals = [own[0][0] for own in sample["resps"]]
        best = max(range(len(totals)), key=totals.__getitem__)
        return str(sample["arguments"][best][1]).strip()
    if task.OUTPUT_TYPE == "generate_until":
        return str(sample["filtered_resps"][0])
    return ", ".join(f"{one[0][0]:.2f}" if isinstance(one[0], tuple) else f"{one[0]:.2f}" for one in sample["resps"])


def _groups(
    loaded: Mapping[str, Any], found: Mapping[str, Any], by_task: Mapping[tuple[str, str], TaskScore]
) -> list[TaskScore]:
    """Return the scores of groups, which lm-eval makes of their tasks' scores."""
    scores = []
    for name, group in loaded.get("groups", {}).items():
        results = {model: result.get("groups", {}).get(name, {}) for model, result in found.items()}
        for rule in group.aggregate_metric_list or ():
            for key in (key for key in results[BASE] if key.startswith(f"{rule.metric},")):
                tasks = [one.task_name for one in group.get_all_tasks()]
                parts = [by_task[task, key] for task in tasks if (task, key) in by_task]
                total = sum(part.rows for part in parts)
                weights = [part.rows / total if rule.weight_by_size else 1 / len(parts) for part in parts]
                score = TaskScore(name, _label(*key.split(",", 1)), parts[0].better, total, {})
                for model, result in results.items():
                    errors = [w * (part.scores[model].error or 0.0) for w, part in zip(weights, parts, strict=True)]
                    score.scores[model] = ModelScore(result[key], sum(error**2 for error in errors) ** 0.5)
                for model in parts[0].compared:
                    compared = [(w, part.compared[model]) for w, part in zip(weights, parts, strict=True)]
                    score.compared[model] = compare_weighted([(w, one) for w, one in compared if one])
                scores.append(score)
    return scores
