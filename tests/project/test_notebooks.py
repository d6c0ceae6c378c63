"""The notebooks: valid, without outputs, of names that exist; and, in the slow tests, executed in a kernel of their own."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure
from nbclient import NotebookClient
from real_models import smollm2_gguf

import mlx_lora
from mlx_lora.api.train import shown_figure
from mlx_lora.config.settings import FIELDS
from mlx_lora.utils.console import in_notebook
from mlx_lora.utils.hub import TerminalBar

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("quickstart", "colab")
TINY_PARAMETERS = """
MODEL = {model!r}
PROMPT = "Say 1."
STEPS = 100
DATA = [{{"prompt": f"Say {{n}}.", "completion": "abcabc"}} for n in range(40)]
"""
WITHOUT_WIDGETS = "IProgress not found"  # tqdm's only note, where the `notebook` extra is not installed


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(cell: nbformat.NotebookNode) -> ast.Module:
    """Return a cell's code without the lines for IPython."""
    lines = cell.source.splitlines()
    return ast.parse("\n".join("" if line.startswith("%") or " = !" in line else line for line in lines))


def wrong_names(tree: ast.AST) -> list[str]:
    """Return the names of mlx_lora that do not exist, and the arguments that its functions do not have."""
    wrong = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value) == "mlx_lora"
            and not hasattr(mlx_lora, node.attr)
        ):
            wrong.append(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and hasattr(mlx_lora, node.func.attr):
            function = getattr(mlx_lora.Base, node.func.attr, getattr(mlx_lora, node.func.attr))
            parameters = inspect.signature(function).parameters
            takes = {*parameters, *(FIELDS if "settings" in parameters else ())}
            wrong += [f"{node.func.attr}({word.arg})" for word in node.keywords if word.arg not in takes]
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_has_no_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs
        assert cell.execution_count is None
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == nbformat.writes(notebook, indent=1) + "\n"  # so that a saved notebook has no other changes


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_that_tests_and_readers_need(name):
    cells = code_cells(read(name))
    (parameters,) = [cell for cell in cells if "parameters" in tags(cell)]
    assert parameters is next(cell for cell in cells if "skip-test" not in tags(cell))
    assigned = {node.targets[0].id for node in python_of(parameters).body if isinstance(node, ast.Assign)}
    assert {"MODEL", "DATA", "PROMPT"} <= assigned


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_package_in_a_notebook_exists(name):
    trees = [python_of(cell) for cell in code_cells(read(name))]
    assert [wrong for tree in trees for wrong in wrong_names(tree)] == []
    used = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"load", "train", "generate", "evaluate", "plan", "export", "plot"} <= used
    assert {*wrong_names(ast.parse("mlx_lora.trian(base)\nmlx_lora.load(MODEL, bit=4)"))} == {"trian", "load(bit)"}


def test_a_notebook_shows_our_figure_as_a_picture_without_pyplot():
    shown = [DisplayFormatter().format(figure())[0] for figure in (shown_figure, Figure)]
    assert shown[0]["image/png"].startswith(b"\x89PNG")
    assert "image/png" not in shown[1]


@pytest.mark.slow
def test_the_package_can_be_used_without_matplotlib():
    """It is an extra, which only `plot` needs."""
    without = "import sys; sys.modules['matplotlib'] = None; import mlx_lora; print(mlx_lora.train, mlx_lora.evaluate)"
    subprocess.run([sys.executable, "-c", without], check=True, capture_output=True, timeout=120)


def test_a_notebook_shows_the_bar_of_a_download(monkeypatch, capsys):
    """Standard error is no terminal in a notebook, nor here."""
    assert TerminalBar(total=1).disable
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook()
    bar = TerminalBar(total=1)
    bar.close()
    assert "0/1" in capsys.readouterr().err
    shell.__dict__.clear()  # IPython on a terminal
    assert not in_notebook()


def executed(name: str, parameters: str, folder: Path, timeout_s: int) -> dict[str, list[nbformat.NotebookNode]]:
    """Run a notebook in a folder with other parameters, and return the outputs by cell id."""
    notebook = read(name)
    notebook.cells = [cell for cell in notebook.cells if "skip-test" not in tags(cell)]
    at = next(n for n, cell in enumerate(notebook.cells) if "parameters" in tags(cell)) + 1
    notebook.cells.insert(at, nbformat.v4.new_code_cell(parameters, id="injected"))
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=timeout_s, resources=resources)
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    return {cell.id: cell.outputs for cell in code_cells(notebook)}


def printed(outputs: list[nbformat.NotebookNode], stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == stream)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model whose tokenizer has merges, which a GGUF file needs."""
    tokenizer = byte_tokenizer(merges=[("a", "b"), ("ab", "c")])
    path = write_folder(tmp_path_factory.mktemp("tiny"), tiny_model(), {"eos_token_id": tokenizer.eos_token_id})
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def private_kernel(tmp_path, monkeypatch):
    """Return a folder to work in; IPython's own files stay out of the user's."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, folder, private_kernel):
    outputs = executed(name, TINY_PARAMETERS.format(model=str(folder)), private_kernel, timeout_s=300)
    before, after = printed(outputs["load"]).strip(), printed(outputs["after"]).splitlines()[-1]
    assert after.removeprefix("After:").strip() == "abcabc"
    assert "abcabc" not in before
    assert "fits: True" in printed(outputs["plan"])

    (live,) = [output for output in outputs["train"] if output.output_type == "display_data"]  # one, updated in place
    assert live.data["text/html"].count("<polyline") == 2
    assert '<progress value="100" max="100">' in live.data["text/html"]
    (figure,) = outputs["figure"]
    assert len(figure.data["image/png"]) > 5000

    losses = [float(line.split()[2].rstrip(",")) for line in printed(outputs["evaluate"]).splitlines()]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    errors = [line for cell in outputs.values() for line in printed(cell, "stderr").splitlines() if line.strip()]
    assert [line for line in errors if WITHOUT_WIDGETS not in line and "tqdm" not in line] == []
    assert (private_kernel / "pirate.gguf").read_bytes()[:4] == b"GGUF"
    assert (private_kernel / "pirate-peft" / "adapter_model.safetensors").is_file()
    assert (private_kernel / "pirate" / "report.html").is_file() == (name == "colab")


@pytest.mark.slow
def test_the_quickstart_teaches_the_embedded_model_to_answer_as_a_pirate(private_kernel):
    """With the notebook's own data and settings, on a question that is not among the data."""
    outputs = executed("quickstart", f"MODEL = {str(smollm2_gguf())!r}", private_kernel, timeout_s=1800)
    assert "Arr" not in printed(outputs["load"])
    assert printed(outputs["after"]).splitlines()[-1].removeprefix("After:").strip().startswith("Arr")
    base, adapter = [float(line.split()[2].rstrip(",")) for line in printed(outputs["evaluate"]).splitlines()]
    assert adapter < base
