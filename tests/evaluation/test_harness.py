"""lm-eval's tasks on our models: the numbers of its own backend, several models at once, and bad input in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import tiny_model, write_folder
from make_adapters import make_adapter
from run_cli import one_line, run
from tiers import by_default

from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.evaluation.models import BASE, Models
from mlx_lora.models.load import load_base

pytest.importorskip("lm_eval", reason="the extra eval")
harness = pytest.importorskip("mlx_lora.evaluation.harness")

PACKAGE = Path(harness.__file__).parents[1]
HEAD = (
    "dataset_path: json\ntest_split: test\nfewshot_split: test\ndataset_kwargs: {{data_files: {{test: {0}.jsonl}}}}\n"
)
TASKS = {
    "animals": 'task: animals\noutput_type: multiple_choice\ndoc_to_text: "{{q}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\n'
    "doc_to_target: right\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "letters": 'task: letters\nnum_fewshot: 1\noutput_type: multiple_choice\ndoc_to_text: "{{q}} A or B?"\n'
    'doc_to_choice: ["A", "B"]\ndoc_to_target: "{{right % 2}}"\nmetric_list: [{metric: acc}]\n',
    "sums": 'task: sums\noutput_type: generate_until\ndoc_to_text: "{{q}} ="\ndoc_to_target: "{{choices[0]}}"\n'
    'generation_kwargs: {until: ["\\n", "b"], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "texts": 'task: texts\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}} {{choices[0]}}"\n'
    "metric_list: [{metric: word_perplexity}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Path]:
    """Tasks in YAML files, with their data beside them."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"What does animal {n} say?", "choices": ["moo", "meow now", "woof woof woof"], "right": n % 3}
        for n in range(8)
    ]
    for name, text in TASKS.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (root / f"{name}.yaml").write_text(HEAD.format(name) + text)
    return {name: root / f"{name}.yaml" for name in TASKS}


@pytest.fixture(scope="module")
def adapters(untied_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(untied_folder, root / name, rank=4, seed=seed) for name, seed in (("one", 1), ("two", 2))
    }


def measured(untied_folder, tasks, adapters=None, **options):
    sources = {name: AdapterSource(folder=path) for name, path in (adapters or {}).items()}
    with Models.opened(load_base(ModelSettings(model=str(untied_folder))), sources) as models:
        return harness.run_tasks(models, [str(path) for path in tasks], **options)


def scores_of(found):
    return {(one.task, one.metric): {name: score.value for name, score in one.scores.items()} for one in found.scores}


@pytest.mark.float32("scores are compared: where two choices are nearly as likely, bfloat16 takes either")
def test_models_together_score_as_each_alone(untied_folder, tasks, adapters):
    chosen = [tasks[name] for name in ("animals", "sums", "texts")]
    together = scores_of(measured(untied_folder, chosen, adapters, limit=6))
    assert all(list(own) == [BASE, "one", "two"] for own in together.values())
    for name, path in adapters.items():
        alone = scores_of(measured(untied_folder, chosen, {name: path}, limit=6))
        for key, own in alone.items():
            assert own[name] == pytest.approx(together[key][name], rel=1e-4), key
    perplexities = together["texts", "word_perplexity"]
    assert len({round(value / perplexities[BASE], 3) for value in perplexities.values()}) == 3


def test_options_change_what_is_asked(untied_folder, tasks):
    plain = measured(untied_folder, [tasks["animals"]], limit=3)
    shots = measured(untied_folder, [tasks["animals"]], limit=3, fewshot=2)
    chat = measured(untied_folder, [tasks["animals"]], limit=3, chat_template=True)
    questions = [found.answers["animals"][0].question for found in (plain, shots, chat)]
    assert questions[0] == "What does animal 0 say?\nAnswer:"
    assert questions[1].count("Answer:") == 3
    assert questions[2].startswith("<|im_start|>")
    assert len(plain.answers["animals"]) == plain.scores[0].rows == 3
    assert {row.answers[BASE] for row in plain.answers["animals"]} <= {"moo", "meow now", "woof woof woof"}
    assert [row.expected for row in plain.answers["animals"]] == ["moo", "meow now", "woof woof woof"]


def test_each_template_is_asked_in_its_own_form(untied_folder, tasks, tmp_path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    other = make_adapter(untied_folder, tmp_path / "other", rank=4, seed=5, chat_template=template)
    sources = {"other": AdapterSource(folder=other)}
    with Models.opened(load_base(ModelSettings(model=str(untied_folder))), sources) as models:
        own, base = (harness.HarnessModel(models, name, {}, True) for name in ("other", BASE))
        history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        assert own.apply_chat_template(history[:1]) == "[user] Hi\n[assistant] "
        assert own.apply_chat_template(history, add_generation_prompt=False) == "[user] Hi\n[assistant] Ho"
        assert base.apply_chat_template(history[:1]) != own.apply_chat_template(history[:1])
        assert own._alike == ["other"]
        assert harness.HarnessModel(models, "other", {}, False)._alike == [BASE, "other"]


def test_a_group_has_the_score_of_its_tasks(untied_folder, tasks, adapters):
    root = tasks["animals"].parent
    (root / "both.yaml").write_text(
        "group: both\ntask: [animals, letters]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = measured(untied_folder, [root / "both.yaml"], {"one": adapters["one"]}, limit=6)
    by_name = {(one.task, one.metric): one for one in found.scores}
    parts, whole = [by_name[name, "acc"] for name in ("animals", "letters")], by_name["both", "acc"]
    assert whole.rows == 12
    for model in (BASE, "one"):
        assert whole.scores[model].value == pytest.approx(sum(part.scores[model].value for part in parts) / 2)
    difference = whole.scores["one"].value - whole.scores[BASE].value
    assert whole.compared["one"].difference == pytest.approx(difference)
    assert whole.compared["one"].low < difference < whole.compared["one"].high


BAD = {
    "a task that is not there": (["--tasks", "hellaswagg"], ["hellaswag", "--tasks list"]),
    "no such file": (["--tasks", "{root}/gone.yaml"], ["no such file"]),
    "an empty file": (["--tasks", "{root}/empty.yaml"], ["is empty"]),
    "not a task": (["--tasks", "{root}/other.yaml"], ["neither `task` nor `group`"]),
    "data without rows": (["--tasks", "{root}/norows.yaml"], ["--tasks", "norows.yaml"]),
    "data that is not there": (["--tasks", "{root}/nodata.yaml"], ["--tasks", "nodata.yaml"]),
    "an unknown metric": (["--data", "{root}/rows.jsonl", "--metric", "exact_mach"], ["did you mean exact_match"]),
    "a metric without rows": (["--metric", "exact_match"], ["--data"]),
    "rows without a metric": (["--tasks", "{root}/empty.yaml", "--data", "{root}/rows.jsonl"], ["--metric"]),
    "a judge without an adapter": (["--data", "{root}/rows.jsonl", "--judge", "x"], ["--adapter"]),
    "rows without answers": (["--data", "{root}/prompts.jsonl", "--metric", "rouge_l"], ["rouge_l"]),
    "an empty data file": (["--data", "{root}/none.jsonl", "--metric", "json"], ["none.jsonl"]),
    "no template": (["--tasks", "{tasks}/animals.yaml", "--apply-chat-template"], ["chat template"]),
}


@pytest.mark.parametrize("case", by_default(BAD, *[case for case in BAD if case != "a task that is not there"]))
def test_bad_input_is_answered_in_one_line(case, untied_folder, tasks, tmp_path):
    (tmp_path / "empty.yaml").write_text("\n")
    (tmp_path / "other.yaml").write_text("model: x\n")
    (tmp_path / "norows.jsonl").write_text("")
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    for name in ("norows", "nodata"):
        (tmp_path / f"{name}.yaml").write_text(HEAD.format(name) + TASKS["animals"])
    given, words = BAD[case]
    given = [text.format(root=tmp_path, tasks=tasks["animals"].parent) for text in given]
    model = untied_folder
    if case == "no template":
        model = write_folder(tmp_path / "plain", tiny_model(), chat_template=None)
    one_line(run("evaluate", "--model", model, *given), *words)


def test_lm_eval_is_only_imported_where_it_is_needed():
    importing = [
        path.name for path in PACKAGE.rglob("*.py") if re.search(r"^\s*(from|import) lm_eval", path.read_text(), re.M)
    ]
    assert importing == ["harness.py"]
    assert not re.search(r"^(from|import) .*harness", (PACKAGE / "api" / "evaluate.py").read_text(), re.M)


@pytest.mark.parity
@pytest.mark.parametrize("chat", [False, True])
def test_numbers_are_those_of_lm_evals_own_backend(untied_folder, tasks, chat):
    """Log-likelihoods within 1e-4, the same texts and scores."""
    import lm_eval.evaluator
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    found = {}
    with Models.opened(load_base(ModelSettings(model=str(untied_folder), dtype="float32")), {}) as models:
        ours = harness.HarnessModel(models, BASE, {}, chat)
        theirs = HFLM(pretrained=str(untied_folder), device="cpu", dtype="float32", batch_size=4)
        for name, model in (("ours", ours), ("theirs", theirs)):
            loaded = harness.load_tasks([str(path) for path in tasks.values()])
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=harness.FEWSHOT_SEED)
            found[name] = lm_eval.evaluator.evaluate(
                lm=model, task_dict=loaded, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
            )
    compared = 0
    for task, theirs in found["theirs"]["samples"].items():
        for one, other in zip(found["ours"]["samples"][task], theirs, strict=True):
            assert one["arguments"] == other["arguments"]
            for mine, own in zip(one["resps"], other["resps"], strict=True):
                if isinstance(own[0], str):
                    assert mine == own
                elif isinstance(own[0], tuple):
                    assert mine[0][0] == pytest.approx(own[0][0], abs=1e-4)
                    assert mine[0][1] == own[0][1]
                else:
                    assert mine[0] == pytest.approx(own[0], abs=1e-4)
                compared += 1
        for key, value in found["theirs"]["results"][task].items():
            if isinstance(value, float):
                assert found["ours"]["results"][task][key] == pytest.approx(value, rel=1e-4)
    assert compared > 50
