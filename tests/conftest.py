"""Fixtures: a two-layer model with a byte tokenizer, in memory and as a Hugging Face folder."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# First of all: it loads the fast BLAS, which must come before mlx.core.
# isort: off
from mlx_lora.utils import device
from mlx_lora.utils.files import cache_dir
from mlx_lora.kernels.measure import MLX, Kernel
from mlx_lora.kernels.measure import SWITCH
from mlx_lora.losses.cross_entropy import ROWS
from mlx_lora.losses.fused import LOSS_KERNELS

# isort: on
import jinja2
import mlx.core as mx
import mlx.nn as nn
import pytest
from byte_tokenizer import byte_tokenizer
from half_arrays import let_numpy_read_halves
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from traced_blocks import TRACE, remembered

from mlx_lora.config.settings import LoopSettings
from mlx_lora.planner import machine
from mlx_lora.trainer import callbacks as report_callback
from mlx_lora.trainer import fit as model_shape
from mlx_lora.trainer.run_folder import runs_file
from mlx_lora.utils import console

# The judges of ORPO, CPO and SimPO lie in TRL's experimental part, which warns; and warnings are errors here.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

FEW_TOKENS = 8
MEASURE = machine.measure_ceilings
TRACED_CHUNKS = model_shape.MOST_TRACED_CHUNKS
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 288,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


def pytest_addoption(parser):
    """Add an option for machines on which another kernel would be measured as the fastest."""
    parser.addoption("--kernels", help="Use this candidate wherever a kernel has it: mlx, tiled, polynomial, rows ...")
    parser.addoption("--rehearse", action="store_true", help="Run as on a Mac, as far as Linux can: tests/rehearsal.")


def pytest_configure(config):
    """With --rehearse, let this process be a Mac before any test is imported; and let numpy read what a GPU computes."""
    # Files are dealt to workers as `pytest_collection_modifyitems` orders them, not those of many tests first: a file of few tests
    # that start processes would come last and be waited for.
    config.option.loadscopereorder = False
    gc.disable()  # until all tests are collected: what is imported is no garbage, and looking for some takes a fifth of the time
    if config.getoption("--rehearse"):
        from rehearsal import installing

        installing.install_all()
    if device.on_gpu():
        let_numpy_read_halves()
    # A shell lets what it starts in the background ignore SIGINT, as would the commands that tests interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


# The helpers that a test file imports say what kind of tests it holds: the first tier of which it has a helper.
TIERS = {
    "page": {"browser", "page_blocks", "studio_browser"},
    "integration": {
        "changed_package",
        "hub_stand_in",
        "prepared",
        "ranks",
        "serving_process",
        "studio_client",
        "subprocess",
        "tinker_client",
    },
    "cli": {"run_cli"},
}


@cache
def tier_of(path: Path) -> str:
    """Return the tier of a test file."""
    imported = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return next((tier for tier, helpers in TIERS.items() if imported & helpers), "unit")


def pytest_collection_modifyitems(config, items):
    """Mark each test with its tier. A GPU, also one of a rehearsal, leaves out what only a CPU does, with its reason."""
    for item in items:
        item.add_marker(tier_of(item.path))
    if hasattr(config, "workerinput"):  # of several workers: the longest files first
        tests, order = Counter(item.path for item in items), ["integration", "page", "cli", "unit"]
        items.sort(key=lambda item: (order.index(tier_of(item.path)), -tests[item.path], str(item.path)))
    if device.on_gpu():
        for item in items:
            if mark := item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason=f"only on a CPU: {mark.args[0]}"))


def pytest_collection_finish():
    """Let Python's garbage collection leave alone what is loaded by now, and look less often: it takes a tenth of the time."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A rehearsed GPU computes a test of exact equality in float32; a fixture would be too late for those of a module."""
    with pytest.MonkeyPatch.context() as patch:
        if item.config.getoption("--rehearse") and item.get_closest_marker("float32"):
            patch.setenv("MLX_LORA_REHEARSE_FLOAT32", "1")
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _forced_kernels(request):
    """With --kernels NAME, let every kernel that has this candidate use it; programs that a test starts do not know of it."""
    name = request.config.getoption("--kernels")
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            _force(name, patch)
        yield


def _force(name: str, patch: pytest.MonkeyPatch) -> None:
    plain, of_loss = Kernel.__init__, ROWS if name == MLX else name

    def made(self: Kernel, *args, **named) -> None:
        plain(self, *args, **named)
        if name in self.candidates:
            object.__setattr__(self, "assumed", name)

    patch.setattr(Kernel, "__init__", made)
    if of_loss in LOSS_KERNELS:
        patch.setattr("mlx_lora.losses.agree.choose_kernel", lambda figures: of_loss)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep tests out of the user's cache, except for the real models that scripts/get_models.py put there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LORA_TEST_MODELS", os.environ.get("MLX_LORA_TEST_MODELS") or str(cache_dir("models")))
        patch.setenv("MLX_LORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        # Kernels as the table has them: the clock of a busy machine must not decide what a test runs.
        patch.setenv(SWITCH, "0")
        # A plan looks for the longest row that fits, and the graphs of its MLPs in up to 16 chunks took nearly all of its time.
        patch.setattr(model_shape, "MOST_TRACED_CHUNKS", 4)
        # After each run, 4 trained questions instead of 32 are asked, and 2 in new words, which takes a fifth of a tiny run.
        patch.setattr("mlx_lora.trainer.ask.MOST_OWN", 4)
        patch.setattr("mlx_lora.trainer.ask.MOST_NEW", 2)
        # One text before and after each run instead of three, and a few words of it unless a test says how many.
        patch.setattr("mlx_lora.trainer.callbacks.TEXTS", 1)
        patch.setattr(report_callback, "greedy_text", _short_text)
        # Each run waits for the disk some ten times, which takes a tiny one a third of its time; no test pulls the plug.
        patch.setattr(os, "fsync", lambda file: None)
        # The card of each run is of one template, whose compilation is a tenth of a tiny run.
        patch.setattr(jinja2.Environment, "compile", cache(jinja2.Environment.compile))
        yield


def _short_text(base, prompt: list[int], max_tokens: int, *pictures, whole=report_callback.greedy_text) -> str:
    return whole(base, prompt, FEW_TOKENS if max_tokens == LoopSettings().sample_tokens else max_tokens, *pictures)


@pytest.fixture(autouse=True, scope="session")
def _remembered_traces():
    """Trace a block's memory once for all runs of this process; the tests of tracing ask for `traced_anew`."""
    with remembered():
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_measurement():
    """Measure this machine's rates once for each test process, and not again for each test with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "measure_ceilings", cache(MEASURE))
        yield


@pytest.fixture(autouse=True)
def remembered_checks(request):
    """Check loss and kernels once per model, as users' runs do, though nothing is measured here.

    A test that replaces something checks anew: a check is remembered by the model and the package's source, not by patches.
    """
    if "monkeypatch" in request.fixturenames:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_lora.losses.agree.may_measure", lambda: True)
        yield


@pytest.fixture
def all_chunks_traced(monkeypatch):
    """Trace as many chunks of an MLP as a user's plan does."""
    monkeypatch.setattr(model_shape, "MOST_TRACED_CHUNKS", TRACED_CHUNKS)


@pytest.fixture
def traced_anew(monkeypatch):
    """Trace every block, known or not."""
    monkeypatch.setattr(model_shape, "_read_block", TRACE)


def tiny_model(seed: int = 0, **changes) -> llama.Model:
    """A two-layer llama with random weights; pass `tie_word_embeddings=False` and the like to change it."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs(**{**TINY, **changes}))
    # Norm weights of one are a special case: fingerprints and gradients should see others.
    for name, value in tree_flatten(model.parameters()):
        if name.endswith("norm.weight"):
            model.load_weights([(name, value + 0.1 * mx.random.normal(value.shape))], strict=False)
    model.eval()
    return model


def quantized(model: nn.Module, bits: int = 4, group_size: int = 32, mode: str = "affine") -> nn.Module:
    """Quantize in place and return the model."""
    nn.quantize(model, group_size, bits, mode=mode)
    return model


def write_folder(
    folder: Path, model: nn.Module, config: dict | None = None, chat_template: str | None = "chatml"
) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer() if chat_template else byte_tokenizer(chat_template=None)
    tokenizer.save_pretrained(folder)
    content = {**TINY, "eos_token_id": tokenizer.eos_token_id, **(config or {})}
    (folder / "config.json").write_text(json.dumps(content))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return folder


@pytest.fixture(autouse=True)
def compiled_again():
    """A short run on a CPU turns compiling off for its process; the next test has it on."""
    yield
    device.compile_for(device.COMPILE_FROM_STEPS)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that the package logs during the test."""
    lines: list[str] = []
    with console.log_to(lines.append):
        yield lines


@pytest.fixture(autouse=True)
def own_memory_limit():
    """Bring back MLX's memory limit: a base that is read from its files lowers it for its process, and so peaks of later tests."""
    with device.own_memory_limit():
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def uncompiled():
    """Compiling every family's kernels takes minutes; `compiled_again` turns it on again."""
    mx.disable_compile()


@pytest.fixture
def own_runs_list():
    """Begin with an empty list of noted runs, which the studio's real server would show."""
    runs_file().unlink(missing_ok=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A float32 tiny model as a folder."""
    return write_folder(tmp_path_factory.mktemp("tiny"), tiny_model())


@pytest.fixture(scope="session")
def long_context_folder(tmp_path_factory) -> Path:
    """A tiny model with a head of its own, made for a million tokens, so that answers go on until they are stopped."""
    config = {"tie_word_embeddings": False, "max_position_embeddings": 10**6}
    return write_folder(tmp_path_factory.mktemp("long") / "tiny", tiny_model(tie_word_embeddings=False), config)


@pytest.fixture(scope="session")
def tiny_4bit_folder(tmp_path_factory) -> Path:
    """The same model in 4-bit."""
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    return write_folder(tmp_path_factory.mktemp("tiny4"), quantized(tiny_model()), config)


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory) -> Path:
    """A tiny model with an output head of its own."""
    config = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    return write_folder(tmp_path_factory.mktemp("untied"), tiny_model(tie_word_embeddings=False), config)


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """Forty short chats the tiny model can learn by heart."""
    path = tmp_path_factory.mktemp("chats") / "train.jsonl"
    rows = [{"instruction": f"Say {n % 7}.", "input": "", "output": "abc" * (1 + n % 5)} for n in range(40)]
    # Unique instructions: duplicates share a split by design.
    for n, row in enumerate(rows):
        row["instruction"] += f" #{n}"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def browser():
    """A browser for the studio's page."""
    from studio_browser import chromium  # few tests need it

    with chromium() as one:
        yield one
