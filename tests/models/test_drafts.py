"""Heads that draft tokens: texts are those without, whatever is drafted; conversions keep a head; `--train-mtp` trains one."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from architectures.build import tiny_config, write_architecture
from make_adapters import make_adapter
from mlx.utils import tree_flatten, tree_map
from run_cli import holds, lacks, one_line, run, succeeds
from serving_rows import Answer, asked, started

from mlx_lora.api.base import TextSettings, generated
from mlx_lora.config.settings import ModelSettings
from mlx_lora.models import drafts as of_drafts
from mlx_lora.models.draft_folder import FOLDER, TOKENS, read_draft, write_draft
from mlx_lora.models.drafts import Drafts, head_of, load_draft, new_config, new_draft
from mlx_lora.models.generator import Sampling
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

pytestmark = pytest.mark.float32("texts are compared: where two tokens are nearly as likely, bfloat16 takes either")
ROWS = [{"prompt": f"Say it {n}", "completion": " the quick brown fox jumps over the lazy dog."} for n in range(12)]


@pytest.fixture(scope="module", params=["llama", "qwen3_5", "gemma3_text"])
def folder(request, tmp_path_factory):
    """A model of each kind of cache: of all keys, of recurrent blocks, and of a sliding window."""
    config = tiny_config(request.param) | ({"sliding_window": 28} if request.param == "gemma3_text" else {})
    return write_architecture(tmp_path_factory.mktemp("drafts") / "model", request.param, config=config)


@pytest.fixture
def base(folder):
    return load_base(ModelSettings(model=str(folder)))


class Oracle:
    """A head that knows the text, and is wrong at every n-th token; it has the interface of mlx-vlm's drafters."""

    def __init__(self, prompt: list[int], text: list[int], wrong: int, count: int):
        self.prompt, self.text, self.wrong = prompt, text, wrong
        self.config = type("Config", (), {"block_size": count + 1})
        self.said: list[int] = []

    def reset(self, target):
        self.said = []

    def prefill_from_target_hidden(self, ids, hidden, bonus, sampler, greedy):
        assert ids.shape[1] == hidden.shape[1]
        self.said = [*ids[0, 1:].tolist(), bonus][len(self.prompt) - 2 :]

    def accept_verified_tokens(self, hidden, tokens, accepted, new, sampler, greedy=False):
        if new:
            assert hidden.shape[1] == accepted + 1
            self.said += [*tokens[0].tolist(), *new]

    def draft_block(self, bonus, hidden, cache, block, sampler, greedy):
        at = len(self.said) - 1  # the prompt's last token stands before the text
        assert self.said[1:] == self.text[:at]
        known = self.text[at : at + block - 1]
        return mx.array([[(t + 1) % 256 if (at + n) % self.wrong == 0 else t for n, t in enumerate(known)]])


def forced(base, prompt, text, wrong) -> Drafts:
    drafts = Drafts(head_of(base), Oracle(prompt, text + [0] * 9, wrong, 3), None)
    drafts.always = True
    return drafts


def tokens_of(base, prompt, drafts=None, **settings):
    settings = TextSettings(40, **settings)
    return [one.token for one in generated(base, prompt, 40, settings.sampler(base), drafts=drafts)]


@pytest.mark.parametrize("wrong", [1, 2, 5, 99])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 7}], ids=["likeliest", "sampled"])
def test_a_text_is_the_one_without_drafts(base, wrong, settings):
    prompt = [72, 101, 108, 108, 111, 32, 119]
    plain = tokens_of(base, prompt, **settings)
    drafts = forced(base, prompt, plain, wrong)
    assert tokens_of(base, prompt, drafts, **settings) == plain
    assert drafts.row.rounds > 0
    assert (drafts.row.made > drafts.row.rounds) == (wrong > 1)


def test_drafts_that_do_not_pay_are_given_up(untied, monkeypatch):
    base, prompt = load_base(ModelSettings(model=str(untied))), [72, 101, 108]
    plain = tokens_of(base, prompt)
    drafts = Drafts(head_of(base), Oracle(prompt, plain + [0] * 9, 1, 3), None)
    monkeypatch.setattr(of_drafts, "CHECKED", 3)
    monkeypatch.setattr(
        of_drafts.time, "perf_counter", iter(range(10**6)).__next__
    )  # each step takes as long as another
    assert tokens_of(base, prompt, drafts) == plain
    assert drafts.count == 0


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_architecture(tmp_path_factory.mktemp("served") / "model", "qwen3_5")


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0, top_logprobs=2), Sampling(seed=3)], ids=["likeliest", "sampled"]
)
def test_the_engine_drafts_for_a_row_that_is_alone(untied, tmp_path, monkeypatch, sampling):
    adapter = make_adapter(untied, tmp_path / "own", rank=4, seed=1)
    (adapter / FOLDER).mkdir()
    engine = started(untied, {"own": adapter}, drafts=False)
    try:
        plain = {name: Answer(engine, asked(name, sampling=sampling)).wait() for name in (None, "own")}
    finally:
        engine.close()
    engine = started(untied, {"own": adapter})
    head, rounds = head_of(engine.base), []
    monkeypatch.setattr("mlx_lora.engine.engine.load_draft", lambda base, folder: drafts[folder])
    drafts = {None: of_text(head, plain[None]), adapter: of_text(head, plain["own"])}
    try:
        for name in (None, "own", None):
            found = Answer(engine, asked(name, sampling=sampling)).wait()
            assert found.text == plain[name].text
            assert found.end.usage == plain[name].end.usage or name is None  # a second time, its prompt is cached
            assert [one.text for one in found.reports] == [one.text for one in plain[name].reports]
            rounds.append(drafts[adapter if name else None].row.rounds)
        assert min(rounds) > 0
        together = [Answer(engine, asked(name, sampling=sampling)) for name in (None, "own", None)]
        assert [one.text for one in together] == [plain[name].text for name in (None, "own", None)]
    finally:
        engine.close()


def of_text(head, answer: Answer) -> Drafts:
    """Return a head that drafts an answer's tokens, which the byte tokenizer reads from its text, with some wrong."""
    text = list("".join(answer.pieces).encode())
    drafts = Drafts(head, Careless(text), None)
    drafts.always = True
    return drafts


class Careless(Oracle):
    """Drafts what it likes; no text depends on it."""

    def __init__(self, text):
        super().__init__([0, 0], text, 3, 2)

    def draft_block(self, bonus, hidden, cache, block, sampler, greedy):
        return mx.array([[*self.text, 1, 2, 3][len(self.said) % 7 :][: block - 1] or [1, 2]])


# Keeping


@pytest.fixture
def drafting(untied, tmp_path):
    """A model with a head of its own."""
    folder = shutil.copytree(untied, tmp_path / "drafting")
    base = load_base(ModelSettings(model=str(untied)))
    config = new_config(base, head_of(base))
    draft = new_draft(config)
    draft.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape, key=mx.random.key(1)), draft.parameters()))
    write_draft(folder, config, dict(tree_flatten(draft.parameters())))
    return folder


def test_conversions_keep_a_head_and_pack_it_like_the_model(drafting, tmp_path):
    succeeds("convert", "--model", drafting, "--out", tmp_path / "float", "--no-quantize")
    config, tensors = read_draft(tmp_path / "float")
    before = read_draft(drafting)[1]
    assert "quantization" not in config
    assert all(mx.array_equal(tensors[name], before[name]) for name in before)
    succeeds("convert", "--model", drafting, "--out", tmp_path / "packed", "--bits", 8)
    config, tensors = read_draft(tmp_path / "packed")
    assert config["quantization"]["bits"] == 8
    assert "fc.scales" in tensors
    base = load_base(ModelSettings(model=str(tmp_path / "packed")))
    own, floats = load_draft(base), of_drafts.draft_of(*read_draft(drafting), mx.float32)
    hidden, tokens = mx.random.normal((1, 5, 64)), mx.array([[3, 4, 5, 6, 7]])
    packed, exact = (of_drafts.drafted(one, own.target, hidden, tokens) for one in (own.draft, floats))
    assert mx.abs(packed - exact).max() < 0.1 * mx.abs(exact).max()
    adapter = make_adapter(tmp_path / "float", tmp_path / "adapter", rank=2, seed=1)
    succeeds("fuse", "--model", tmp_path / "float", "--adapter-path", adapter, "--out", tmp_path / "fused")
    assert read_draft(tmp_path / "fused")[1].keys() == before.keys()


@pytest.mark.parametrize(
    "change",
    [
        {TOKENS: [1, 10**6]},
        {TOKENS: "all"},
        {"text_config": {"mtp_num_hidden_layers": 10**9}},
        {"text_config": {}},
        None,
    ],
    ids=["tokens", "no tokens", "blocks", "other sizes", "file"],
)
def test_a_head_that_is_no_head_is_left_alone(drafting, change):
    own = drafting / FOLDER
    if change is None:
        (own / "model.safetensors").write_bytes(b"no tensors")
    else:
        config = json.loads((own / "config.json").read_text())
        change = {
            name: {**config[name], **value} if name == "text_config" and value else value
            for name, value in change.items()
        }
        (own / "config.json").write_text(json.dumps(config | change))
    assert load_draft(load_base(ModelSettings(model=str(drafting)))) is None
    holds(succeeds("generate", "--model", drafting, "-p", "x", "--max-tokens", 3).err, "without the head")


def test_what_cannot_be_kept_is_named(tmp_path):
    folder = write_architecture(tmp_path / "other", "mimo")
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        tensors | {"model.mtp_layers.0.fc.weight": mx.zeros((4, 4))},
        {"format": "mlx"},
    )
    ran = succeeds("convert", "--model", folder, "--out", tmp_path / "out", "--no-quantize")
    holds(ran.err, "without the head", "model.mtp_layers.0.fc.weight")
    assert not (tmp_path / "out" / FOLDER).exists()


def test_a_head_that_llama_cpp_has_no_place_for_is_named(tmp_path):
    folder = write_architecture(tmp_path / "llama", "llama")
    base = load_base(ModelSettings(model=str(folder)))
    config = new_config(base, head_of(base))
    write_draft(folder, {**config, TOKENS: [1, 2]}, dict(tree_flatten(new_draft(config).parameters())))
    ran = run("export", "--model", folder, "--to", "gguf", "--out", tmp_path / "m.gguf")
    holds(ran.err, "without the head that drafts tokens")


# Training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.mark.parametrize("bits", [None, 8])
def test_a_head_is_trained_after_the_adapter_or_alone(tmp_path, data, bits):
    folder = write_architecture(tmp_path / "model", "llama")
    if bits is not None:
        succeeds("convert", "--model", folder, "--out", tmp_path / "packed", "--bits", bits)
        folder = tmp_path / "packed"
    own = ("--model", folder, "--data", data, "--adapter-path", tmp_path / "run", "--sample-tokens", 0)
    succeeds("train", *own, "--iters", 4, "--learning-rate", 1e-2, "--train-mtp")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["drafts"]["before"] == 1
    assert report["drafts"]["after"] >= 1
    holds((tmp_path / "run" / "report.html").read_text(), "tokens a pass, drafted")
    weights = (tmp_path / "run" / "adapters.safetensors").read_bytes()
    first = (tmp_path / "run" / FOLDER / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / FOLDER)
    succeeds("train", *own, "--train-mtp")
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == weights
    assert len((tmp_path / "run" / FOLDER / "model.safetensors").read_bytes()) == len(first)
    text = ("--model", folder, "--adapter-path", tmp_path / "run", "-p", "Say it 3", "--max-tokens", 40)
    assert succeeds("generate", *text).out == succeeds("generate", *text, "--speculate", "off").out


def test_a_published_head_learns_by_lora(drafting, tmp_path, data):
    own = ("--model", drafting, "--data", data, "--adapter-path", tmp_path / "run", "--sample-tokens", 0)
    succeeds("train", *own, "--iters", 2, "--train-mtp")
    before, after = read_draft(drafting)[1], read_draft(tmp_path / "run")[1]
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed
    assert all(".self_attn." in name or ".mlp." in name for name in changed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--objective", "reward"), ("--train-mtp", "--objective reward")),
        (("--offload-base", "on"), ("--train-mtp", "--offload-base")),
    ],
)
def test_runs_that_have_no_use_for_a_head_are_refused(tiny_folder, data, tmp_path, flags, words):
    one_line(
        run("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", "--train-mtp", *flags),
        *words,
    )


def test_without_mlx_vlm_the_line_says_what_to_install(tiny_folder, data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlx_vlm.speculative.drafters", None)
    base = load_base(ModelSettings(model=str(tiny_folder)))
    with pytest.raises(InputError, match="mlx-lora\\[vision\\]"):
        new_draft(new_config(base, head_of(base)))
    lacks(succeeds("generate", "--model", tiny_folder, "-p", "x", "--max-tokens", 3).err, "mlx-vlm")
