"""A task scored at each validation: the number that `evaluate` finds afterward, which chooses the best adapter and changes no step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resumed_runs import command, stopped_after, weights
from run_cli import one_line, run, succeeds

from mlx_lora.trainer.validation_task import ValidationTask, chosen_score

SCORES = {0: 0.5, 4: 0.25, 8: 0.75, 12: 0.5}  # by step
# The longest beginning of "abcabc..." in an answer, as a share of six letters.
METRIC = """
def letters(prompts, completions, **columns):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [max(n for n in range(7) if "abcabc"[:n] in text) / 6 for text in texts]
"""


@pytest.fixture(scope="module")
def asked(chats, tmp_path_factory) -> tuple:
    """The flags of a task of rows."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(chats.read_text().splitlines(keepends=True)[:6]))
    (folder / "own.py").write_text(METRIC)
    metric = f"{folder / 'own.py'}:letters"
    return ("--eval-tasks", folder / "rows.jsonl", "--eval-metric", metric, "--eval-max-tokens", 8)


def trained(folder: Path, model: Path, data: Path, *flags) -> list[dict]:
    succeeds(*command(model, data, folder, "--iters", 12, "--dropout", 0.1, *flags))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["val_loss"] is not None]


def test_a_run_finds_what_evaluate_finds_and_is_not_changed(asked, tiny_folder, chats, tmp_path):
    found = trained(tmp_path / "a", tiny_folder, chats, *asked)
    trained(tmp_path / "plain", tiny_folder, chats)
    assert weights(tmp_path / "a") == weights(tmp_path / "plain")
    measured = succeeds("evaluate", "--model", tiny_folder, "--adapter", f"mine={tmp_path / 'a'}", "--data", asked[1],
                   "--metric", asked[3], "--max-tokens", 8, "--json")  # fmt: skip
    [score] = json.loads(measured.out)["tasks"]
    assert found[0]["task"] == pytest.approx(score["models"]["base"]["score"])
    assert found[-1]["task"] == pytest.approx(score["models"]["mine"]["score"])
    assert found[-1]["task"] > found[0]["task"]


@pytest.fixture
def scripted(monkeypatch):
    """Let validations find `SCORES`."""

    def score(task: ValidationTask, stopped) -> float:
        return SCORES[steps.pop(0)]

    steps = list(SCORES)
    monkeypatch.setattr(ValidationTask, "_score", score)
    return steps


@pytest.mark.parametrize(("metric", "best"), [("task", 8), ("loss", 12)])
def test_the_best_adapter_is_that_of_the_best_score(metric, best, scripted, asked, tiny_folder, chats, tmp_path):
    more = ("--save-every", 4, "--keep-best", "--metric-for-best-model", metric)
    trained(tmp_path / "a", tiny_folder, chats, *asked, *more)
    kept = (tmp_path / "a/checkpoints" / f"step-{best:06d}/adapters.safetensors").read_bytes()
    assert weights(tmp_path / "a") == kept
    state = json.loads((tmp_path / "a/checkpoints/step-000012/state.json").read_text())["position"]
    assert (state["best_score"], state["best_at"]) == ((0.75, 8) if metric == "task" else (None, 12))


def test_a_run_that_was_cut_ends_with_the_same_bytes(scripted, asked, tiny_folder, chats, tmp_path):
    more = (*asked, "--save-every", 4, "--keep", 0, "--keep-best", "--metric-for-best-model", "task",
            "--early-stopping-patience", 1)  # fmt: skip
    scripted[:] = [0, 8, 4]  # better at step 4 than before, worse at step 8: the run ends there
    whole = trained(tmp_path / "whole", tiny_folder, chats, *more)
    assert [line["step"] for line in whole] == [0, 4, 8]
    scripted[:] = [4]
    cut = stopped_after(tmp_path / "whole", tmp_path / "cut", 4)
    (cut / "adapters.safetensors").unlink()
    trained(cut, tiny_folder, chats, *more, "--resume")
    assert weights(cut) == weights(tmp_path / "whole")
    assert weights(cut) == (cut / "checkpoints/step-000004/adapters.safetensors").read_bytes()


def test_a_task_of_lm_eval(tiny_folder, chats, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra eval")
    rows = [{"q": f"Say {n}.", "choices": ["abcabc", "xyz"], "right": 0} for n in range(4)]
    (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: letters.jsonl}}\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: right\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    asked = ("--eval-tasks", tmp_path / "letters.yaml", "--eval-rows", 3, "--eval-metric", "acc_norm", "--iters", 4)
    found = trained(tmp_path / "a", tiny_folder, chats, *asked)
    assert [line["step"] for line in found] == [0, 4]
    assert all(line["task"] in (0, 1 / 3, 2 / 3, 1) for line in found)
    trained(tmp_path / "plain", tiny_folder, chats, "--iters", 4)
    assert weights(tmp_path / "a") == weights(tmp_path / "plain")


def test_the_score_of_a_task_that_is_compared():
    from mlx_lora.evaluation.paired import TaskScore

    found = [TaskScore("one", "acc", True, 3, {}), TaskScore("two", "word_perplexity", False, 3, {}),
             TaskScore("two", "exact_match (strict)", True, 3, {})]  # fmt: skip
    assert chosen_score(found, None, "two.yaml") is found[2]
    assert chosen_score(found, "exact_match", "two.yaml") is found[2]
    assert chosen_score(found, None, "one") is found[0]  # a group that holds another one


def test_a_run_without_held_out_rows_says_so_before_its_first_step(asked, tiny_folder, chats, tmp_path):
    ran = run(*command(tiny_folder, chats, tmp_path / "a", *asked, "--valid-fraction", 0))
    assert ran.code == 2
    assert "no held-out rows" in ran.lines[-1]
    assert not (tmp_path / "a/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--eval-tasks", "none.jsonl"), "there is no such file"),
        (("--eval-tasks", "{rows}", "--eval-metric", "exactmatch"), "--eval-metric exactmatch: did you mean exact_match"),
        (("--eval-tasks", "{rows}", "--eval-chat-template"), "--eval-chat-template"),
        (("--eval-tasks", "{rows}", "--objective", "embed"), "writes no text"),
        (("--metric-for-best-model", "macro_f1"), "only classify report"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(flags, said, asked, tiny_folder, chats, tmp_path):
    given = [str(flag).format(rows=asked[1]) for flag in flags]
    one_line(run(*command(tiny_folder, chats, tmp_path / "a", *given)), said)
