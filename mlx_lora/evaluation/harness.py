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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from mlx_lora.data.sandbox import render_chat
from mlx_lora.evaluation.models import LogLikelihood, Models, Scored, TextRequest
from mlx_lora.evaluation.paired import compare_weighted
from mlx_lora.evaluation.paired import Answered, ModelScore, TaskResults, TaskScore
from mlx_lora.models.folder import FOREIGN_ERRORS, short
from mlx_lora.serving.batch import Sampling
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import closest

NEW_TOKENS = 256  # of an answer, where a task does not say, as in lm-eval
MOST_QUESTION = 2000  # characters of a question that are shown
SEED, FEWSHOT_SEED = 0, 1234  # lm-eval's own
NO_FILTER = "none"
YAML = (".yaml", ".yml")
NAMES_SHOWN = 8


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    Attributes:
        chat_template: ask in the form of the chat template.
        fewshot: solved examples before each question; None: as the task says.
        limit: rows of each task, from its first on; None: all.
        system_prompt: system message, with the chat template.
    """

    chat_template: bool = False
    fewshot: int | None = None
    limit: int | None = None
    system_prompt: str | None = None


def run_tasks(
    models: Models, asked: Sequence[str], options: TaskOptions, stopped: Callable[[], bool] = lambda: False
) -> TaskResults:
    """Return what the models score in tasks.

    Args:
        models: a base and adapters.
        asked: names of lm-eval's tasks and groups, or YAML files.
        options: how.
        stopped: asked before each batch whether to end.

    Raises:
        InputError: a task is not known, or its data cannot be loaded.
        KeyboardInterrupt: it was stopped.
    """
    with _without_bars():
        loaded = load_tasks(asked, options)
        found = _evaluated(models, loaded, " ".join(asked), options, stopped)
    return _measured(loaded, found)


def _evaluated(
    models: Models, loaded: dict[str, Any], asked: str, options: TaskOptions, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Let lm-eval evaluate one model after another, on what was computed for all."""
    done, found = _Done(models, stopped), {}
    for name in models.names:
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with _own_seeds(), _foreign(f"--tasks {asked}"):
            found[name] = lm_eval.evaluator.evaluate(
                lm=HarnessModel(models, name, done, options.chat_template), task_dict=loaded, limit=options.limit,
                bootstrap_iters=0, apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template, system_instruction=options.system_prompt,
            )  # fmt: skip
    return found


@contextmanager
def _own_seeds() -> Iterator[None]:
    """Begin the process's random streams as lm-eval does, and leave them as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


# Which tasks there are


def known_tasks() -> list[str]:
    """Return the names of all tasks, groups and tags of lm-eval."""
    with _without_bars():
        return TaskManager().all_tasks


def load_tasks(asked: Sequence[str], options: TaskOptions) -> dict[str, Any]:
    """Return lm-eval's dictionary of tasks and groups.

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
        if own is None or (options.fewshot is not None and own != 0):  # a task may forbid examples by 0
            task.set_config(key="num_fewshot", value=options.fewshot or 0)
    return loaded


def _own_task(text: str, path: Path) -> dict[str, Any]:
    """Return the task or group of a YAML file, with data files that lie beside it found there."""
    if not path.is_file():
        raise InputError(f"--tasks {text}: there is no such file; give its path")
    if not path.read_bytes().strip():
        raise InputError(f"--tasks {text}: the file is empty; docs/is-my-model-better.md shows a task")
    with _foreign(f"--tasks {text}"):
        spec = load_yaml(path)
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
    logger, before = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level, shown = logger.level, not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = before
        if shown:
            datasets.enable_progress_bars()
        logger.setLevel(level)


# The model that lm-eval sees


class _Done:
    """What the models were asked so far, and the results."""

    def __init__(self, models: Models, stopped: Callable[[], bool]):
        self._models, self._stopped = models, stopped
        self._likelihoods: dict[Scored, LogLikelihood] = {}
        self._texts: dict[TextRequest, str] = {}

    def log_likelihoods(self, names: Sequence[str], pairs: Sequence[tuple[Any, Any]]) -> list[LogLikelihood]:
        """Return the log-likelihoods of the first model, and compute those of the others with it."""
        own = [Scored(names[0], tuple(context), tuple(continuation)) for context, continuation in pairs]
        if any(one not in self._likelihoods for one in own):
            new = {one._replace(model=name): None for one in own for name in names}
            missing = [one for one in new if one not in self._likelihoods]
            found = self._models.log_likelihoods(missing, self._stopped)
            self._likelihoods |= dict(zip(missing, found, strict=True))
        return [self._likelihoods[one] for one in own]

    def texts(self, names: Sequence[str], prompts: Sequence[TextRequest]) -> list[str]:
        """Return the texts of the first model, and write those of the others with it."""
        own = [replace(prompt, model=names[0]) for prompt in prompts]
        if any(one not in self._texts for one in own):
            new = {replace(one, model=name): None for one in own for name in names}
            missing = [one for one in new if one not in self._texts]
            written = self._models.texts(missing, self._stopped)
            self._texts |= {prompt: one.text for prompt, one in zip(missing, written, strict=True)}
        return [self._texts[one] for one in own]


class HarnessModel(TemplateLM):
    """One of several models, as lm-eval asks it; tokens, limits and defaults are those of its Hugging Face backend."""

    def __init__(self, models: Models, name: str, done: _Done, chat: bool):
        """Take a model.

        Args:
            models: all models.
            name: of this one.
            done: what was computed so far.
            chat: whether requests have the form of the chat template.
        """
        super().__init__()
        self.tokenizer: Any = models.base.hf_tokenizer
        self._models, self._done, self._name = models, done, name
        # What this model is asked, these are asked, too; it comes first.
        alike = [other for other in models.names if not chat or models.templates[other] == models.templates[name]]
        self._alike = [name, *(other for other in alike if other != name)]

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
        try:
            text = self._rendered(chat_history, template, add_generation_prompt)
        except jinja2.TemplateError:  # as in lm-eval: the template may take no system message
            others = [message for message in chat_history if message["role"] != "system"]
            text = self._rendered(others, template, add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def _rendered(self, messages: list[dict[str, str]], template: str, asks: bool) -> str:
        return render_chat(self.tokenizer, [dict(one) for one in messages], template, add_generation_prompt=asks)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request's continuation."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._done.log_likelihoods(self._alike, [(context, rest) for _, context, rest in requests])
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
        found = iter(self._done.log_likelihoods(self._alike, windows))
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
        return self._done.texts(self._alike, prompts)


# What lm-eval found


def _measured(loaded: Mapping[str, Any], found: Mapping[str, Any]) -> TaskResults:
    """Return lm-eval's results of all models, with our own standard errors and comparisons."""
    measured, by_task = TaskResults(), {}
    for name, task in loaded["tasks"].items():
        rows = {model: _by_row(result["samples"][name]) for model, result in found.items()}
        first = next(iter(found.values()))
        for key in (key for key in first["results"][name] if "," in key and "_stderr," not in key):
            metric, _, kind = key.partition(",")
            values = {model: [row[kind][metric] for row in own.values()] for model, own in rows.items()}
            aggregate = task.aggregation().get(metric)
            mean = aggregate is lm_eval.api.metrics.mean and all(
                _is_number(one) for own in values.values() for one in own
            )
            score = TaskScore.of(
                name, metric if kind == NO_FILTER else f"{metric} ({kind})", values,
                task.higher_is_better().get(metric) is not False, None if mean else aggregate,
            )  # fmt: skip
            # The number is lm-eval's own, to its last digit.
            own = {
                model: replace(score.scores[model], value=result["results"][name][key])
                for model, result in found.items()
            }
            measured.scores.append(replace(score, scores=own))
            by_task[name, key] = measured.scores[-1]
        measured.answers[name] = _answers(task, rows)
    measured.scores += _groups(loaded, found, by_task)
    return measured


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number)


def _by_row(samples: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Return lm-eval's samples by row and filter."""
    rows: dict[int, dict[str, Mapping[str, Any]]] = {}
    for sample in samples:
        rows.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    return rows


def _answers(task: Any, rows: Mapping[str, dict[int, dict[str, Mapping[str, Any]]]]) -> list[Answered]:
    """Return what the models answered in a task."""
    found = []
    for number in next(iter(rows.values())):
        samples = {model: next(iter(own[number].values())) for model, own in rows.items()}
        values: dict[str, dict[str, float]] = {}
        for model, own in rows.items():
            for kind, sample in own[number].items():
                for metric in sample["metrics"]:
                    if _is_number(sample[metric]):
                        name = metric if kind == NO_FILTER else f"{metric} ({kind})"
                        values.setdefault(name, {})[model] = float(sample[metric])
        first = next(iter(samples.values()))
        answers = {model: _answer(task, sample) for model, sample in samples.items()}
        found.append(Answered(_question(first), _expected(task, first), answers, values))
    return found


def _question(sample: Mapping[str, Any]) -> str:
    """Return a row's question: what the model was given, or its end."""
    text = str(sample["arguments"][0][0])
    return text if len(text) <= MOST_QUESTION else "… " + text[-MOST_QUESTION:]


def _expected(task: Any, sample: Mapping[str, Any]) -> str:
    """Return the right answer as text: of a multiple choice, the choice."""
    target = sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int) and 0 <= target < len(sample["arguments"]):
        return str(sample["arguments"][target][1]).strip()
    return str(target)


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
        for rule in group.aggregate_metric_list or ():
            for key in (
                key
                for key in next(iter(found.values())).get("groups", {}).get(name, {})
                if key.startswith(f"{rule.metric},")
            ):
                parts = [
                    by_task[one.task_name, key] for one in group.get_all_tasks() if (one.task_name, key) in by_task
                ]
                total = sum(part.rows for part in parts)
                weights = [part.rows / total if rule.weight_by_size else 1 / len(parts) for part in parts]
                compared = {
                    model: compare_weighted(
                        [(w, one) for w, part in zip(weights, parts, strict=True) if (one := part.compared[model])]
                    )
                    for model in parts[0].compared
                }
                own = {}
                for model, result in found.items():
                    errors = [w * (part.scores[model].error or 0.0) for w, part in zip(weights, parts, strict=True)]
                    own[model] = ModelScore(result["groups"][name][key], sum(error**2 for error in errors) ** 0.5)
                metric, _, kind = key.partition(",")
                label = metric if kind == NO_FILTER else f"{metric} ({kind})"
                scores.append(TaskScore(name, label, parts[0].better, total, own, {**compared}))
    return scores
