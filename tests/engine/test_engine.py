"""The engine: every row its own adapter, and each answers as `generate` does."""

from __future__ import annotations

import ctypes
import json
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from architectures.build import write_architecture
from conftest import quantized, tiny_model, write_folder
from make_adapters import make_adapter
from run_cli import run, succeeds
from serving_rows import PROMPT, Answer, asked, started, tokens_of

from mlx_lora.engine import adapter_store
from mlx_lora.engine.adapter_store import AdapterSource, UnknownAdapter
from mlx_lora.engine.engine import QueueFull, Stopped
from mlx_lora.models.generator import Sampling
from mlx_lora.utils.errors import InputError

pytestmark = pytest.mark.float32(
    "texts are compared: where two tokens are nearly as likely, bfloat16 takes either (test_engine_rounding)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a head of its own: a tied one repeats its prompt's last token, whatever the adapter."""
    model = tiny_model(tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("untied"), model, {"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Adapters of every served kind, by name."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = {
        "four": {"rank": 4, "seed": 1},
        "four-too": {"rank": 4, "seed": 2},
        "eleven": {"rank": 11, "seed": 3},
        "one-block": {"rank": 2, "seed": 4, "num_layers": 1},
        "dora": {"rank": 4, "seed": 5, "form": "dora", "strength": 4.0},
        "peft": {"rank": 3, "seed": 6, "peft": True},
        "embedding": {"rank": 4, "seed": 7, "targets": "all-linear,embed_tokens", "strength": 0.1},
    }
    return {name: make_adapter(folder, root / name, **kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def engine(folder, adapters):
    engine = started(folder, adapters)
    yield engine
    engine.close()


@pytest.fixture
def start():
    """Start an engine, which ends with the test; arguments as of `started`."""
    with ExitStack() as ends:

        def begun(*given, **limits):
            engine = started(*given, **limits)
            ends.callback(engine.close)
            return engine

        yield begun


def generated(folder, adapter, prompt=PROMPT, count=24) -> str:
    """What the command says."""
    extra = ("--adapter-path", adapter) if adapter else ()
    ran = run(
        "generate", "--model", folder, *extra, "--prompt", prompt, "-m", count, "--ignore-chat-template", "--json"
    )
    return json.loads(ran.out)["text"]


@pytest.mark.long
def test_alone_and_mixed_every_adapter_says_what_generate_says(engine, folder, adapters):
    names = [None, *adapters]
    meant = {name: generated(folder, adapters.get(name)) for name in names}
    assert len(set(meant.values())) == len(names), "the adapters must differ for this to show anything"
    assert {name: Answer(engine, asked(name)).text for name in names} == meant
    mixed = [(name, Answer(engine, asked(name))) for name in [*names, *reversed(names)]]
    assert [(name, answer.text) for name, answer in mixed] == [(name, meant[name]) for name, _ in mixed]


def test_a_quantized_base_answers_as_generate_does(tmp_path):
    config = {"tie_word_embeddings": False, "quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    folder = write_folder(tmp_path / "base", quantized(tiny_model(tie_word_embeddings=False)), config)
    named = {
        "lora": make_adapter(folder, tmp_path / "lora", rank=3),
        "dora": make_adapter(folder, tmp_path / "dora", form="dora", strength=4.0),
    }
    engine = started(folder, named)
    answers = {name: Answer(engine, asked(name)) for name in (None, *named)}
    texts = {name: answer.text for name, answer in answers.items()}
    engine.close()
    assert texts == {name: generated(folder, named.get(name)) for name in texts}
    assert len(set(texts.values())) == 3


def test_rows_join_and_leave_between_steps(engine, adapters):
    names = [None, *adapters]
    alone = {(name, count): Answer(engine, asked(name, count=count)).text for name in names for count in (3, 17)}
    answers = []
    for turn in range(3):
        answers += [(key, Answer(engine, asked(key[0], count=key[1]))) for key in alone]
        answers[turn * 7][1].first()  # let some steps pass before more come
    assert [(key, answer.text) for key, answer in answers] == [(key, alone[key]) for key, _ in answers]
    assert engine.unfinished == 0


def test_log_probabilities_in_a_mixed_batch_are_those_alone(engine, adapters):
    sampling = Sampling(temperature=0, top_logprobs=3)
    alone = {name: Answer(engine, asked(name, sampling=sampling)).wait().reports for name in adapters}
    mixed = {name: Answer(engine, asked(name, sampling=sampling)) for name in adapters}
    for name, answer in mixed.items():
        for one, other in zip(answer.wait().reports, alone[name], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.top[0] == (one.text, one.logprob, one.data), "greedy takes the likeliest"
            assert len(one.top) == 3


def test_a_seed_gives_the_same_text_whoever_shares_the_batch(engine, adapters):
    def drawn(seed):
        return asked("four", sampling=Sampling(temperature=1.5, top_p=0.95, top_k=60, seed=seed))

    alone = Answer(engine, drawn(7)).text
    crowd = [Answer(engine, asked(name, sampling=Sampling(temperature=2.0))) for name in adapters]
    assert Answer(engine, drawn(7)).text == alone
    assert Answer(engine, drawn(8)).text != alone
    assert all(answer.text is not None for answer in crowd)


def test_stop_sequences_end_the_text_before_them(engine):
    whole = Answer(engine, asked("eleven", count=40)).text
    stop = whole[10:13]
    answer = Answer(engine, asked("eleven", count=40, stops=("not in it", stop)))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.end.finish == "stop"
    assert Answer(engine, asked("eleven", count=40, stops=("not in it",))).text == whole


def test_prompts_are_computed_once_for_each_adapter(engine):
    prompt = "Many words that were said before. " * 4
    first = Answer(engine, asked("four", prompt)).wait()
    again = Answer(engine, asked("four", prompt)).wait()
    longer = Answer(engine, asked("four", prompt + "More")).wait()
    other = Answer(engine, asked("eleven", prompt)).wait()
    count = len(tokens_of(prompt))
    assert [a.end.usage.cached for a in (first, again, longer, other)] == [0, count - 1, count, 0]
    assert again.text == first.text


def test_reload_and_removal_leave_rows_in_flight_alone(start, folder, adapters, tmp_path):
    shutil.copytree(adapters["four"], tmp_path / "moving")
    engine = start(folder, {"moving": tmp_path / "moving"})
    before, after = (Answer(engine, asked("moving", count=64)).text for _ in range(2))
    assert before == after
    running = Answer(engine, asked("moving", count=64)).first()
    make_adapter(folder, tmp_path / "moving", rank=6, seed=99)
    assert engine.call(lambda store: store.reload("moving")).result(60).rank == 6
    changed = Answer(engine, asked("moving", count=64)).text
    assert running.text == before
    assert changed == generated(folder, tmp_path / "moving", count=64) != before
    running = Answer(engine, asked("moving", count=64)).first()
    engine.call(lambda store: store.remove("moving")).result(60)
    assert running.text == changed
    gone = Answer(engine, asked("moving")).wait()
    assert isinstance(gone.end.error, UnknownAdapter)
    assert (engine.store.nbytes, len(engine.prompt_cache)) == (0, 0)


def test_the_least_recently_used_adapters_leave_when_memory_is_full(start, folder, adapters):
    sizes = {name: card.nbytes for name, card in started_cards(folder, adapters).items()}
    budget = sizes["four"] + sizes["four-too"] + sizes["one-block"]
    names = ("four", "four-too", "one-block")
    engine = start(folder, {name: adapters[name] for name in names}, adapter_bytes=budget)
    meant = {name: generated(folder, adapters[name]) for name in names}
    Answer(engine, asked("four")).wait()
    engine.call(lambda store: store.add({"peft": AdapterSource(adapters["peft"])})).result(60)
    resident = {name for name, card in engine.store.cards.items() if card.resident}
    assert "four" in resident
    assert "four-too" not in resident, "the least recently used goes first"
    assert {name: Answer(engine, asked(name)).text for name in names} == meant, "who left comes back when asked for"
    assert engine.store.nbytes <= budget
    assert engine.store.evictions >= 2
    big = AdapterSource(blend=dict.fromkeys((*names, "peft"), 1.0))
    with pytest.raises(InputError, match="raise --adapter-memory"):
        engine.call(lambda store: store.add({"big": big})).result(60)


def started_cards(folder, adapters):
    engine = started(folder, adapters)
    engine.close()
    return engine.store.cards


def test_more_adapters_than_fit_wait_for_rows_to_end(start, folder, adapters, monkeypatch):
    names = ("four", "four-too", "peft")
    engine = start(folder, adapter_bytes=started_cards(folder, {"four": adapters["four"]})["four"].nbytes)
    for name in names:
        engine.call(lambda store, name=name: store.add({name: AdapterSource(adapters[name])})).result(60)
    meant, reads = {name: generated(folder, adapters[name]) for name in names}, []
    read = adapter_store.read_factors
    monkeypatch.setattr(adapter_store, "read_factors", lambda *given: reads.append(given[1].name) or read(*given))
    answers = [(name, Answer(engine, asked(name))) for name in names * 2]
    assert [a.text for _, a in answers] == [meant[name] for name, _ in answers]
    assert len(reads) <= len(answers), "a row that waits does not read its files again at every step"


def test_a_blend_adds_what_its_parts_add(engine, folder, adapters):
    engine.call(
        lambda store: store.add({
            "half": AdapterSource(blend={"four": 0.5, "eleven": 0.5}),
            "all-four": AdapterSource(blend={"four": 1.0, "eleven": 0.0}),
        })
    ).result(60)  # fmt: skip
    assert Answer(engine, asked("all-four")).text == generated(folder, adapters["four"])
    half = Answer(engine, asked("half")).text
    assert half not in (generated(folder, adapters["four"]), generated(folder, adapters["eleven"]))
    for blend, words in (
        ({"dora": 1.0}, "a DoRA's update is not a sum"),
        ({"half": 1.0}, "itself a blend"),
        ({"nobody": 1.0}, "not loaded"),
    ):
        with pytest.raises(InputError, match=words):
            engine.call(lambda store, blend=blend: store.add({"bad": AdapterSource(blend=blend)})).result(60)


def test_what_a_row_cannot_have_is_refused_with_a_reason(start, folder, tmp_path):
    succeeds(
        "train", "--model", folder, "--data", write_rows(tmp_path), "--adapter-path", tmp_path / "full",
        "--modules-to-save", "lm_head", "--iters", 1, "--batch-size", 1, "--val-batches", 0,
    )  # fmt: skip
    make_adapter(folder, tmp_path / "dora", form="dora", targets="embed_tokens")
    engine = start(folder)
    for name, words in (("full", "trains 1 parameters in full"), ("dora", "DoRA over an embedding")):
        with pytest.raises(InputError, match=words):
            engine.call(lambda store, name=name: store.add({name: AdapterSource(tmp_path / name)})).result(60)
    with pytest.raises(InputError, match="letters, digits"):
        engine.call(lambda store: store.add({"../x": AdapterSource(tmp_path)})).result(60)
    assert not engine.store.cards


def write_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} of a few"}) + "\n" for n in range(30)))
    return path


def test_a_canceled_request_frees_its_row(start, folder, adapters):
    engine = start(folder, {"four": adapters["four"]}, max_batch=1)
    long = Answer(engine, asked("four", count=100_000, ignore_eos=True)).first()
    short = Answer(engine, asked("four", count=2))
    long.ticket.canceled.set()
    assert short.wait().end.finish == "length"
    assert (engine.counts.canceled, engine.unfinished) == (1, 0)


def test_a_full_queue_refuses_and_the_end_tells_everyone(folder):
    engine = started(folder, max_batch=1, max_waiting=1)
    answers = [Answer(engine, asked(None, count=100_000, ignore_eos=True)) for _ in range(2)]
    with pytest.raises(QueueFull):
        Answer(engine, asked(None))
    engine.close()
    assert all(isinstance(answer.wait().end.error, Stopped) for answer in answers)
    with pytest.raises(Stopped):
        Answer(engine, asked(None))


def test_a_defect_ends_the_engine_and_nobody_waits_for_ever(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda defect: shown.append(defect.exc_type))
    engine = started(folder)
    told = []
    engine.on_failure = lambda: told.append(True)
    running = Answer(engine, asked(None, count=100_000, ignore_eos=True)).first()
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda store: 1 // 0).result(60)
    assert isinstance(running.wait().end.error, Stopped)
    assert isinstance(engine.failure, ZeroDivisionError)
    assert (engine.alive, told) == (False, [True])
    with pytest.raises(Stopped):
        engine.call(lambda store: None)
    engine.close()
    assert shown == [ZeroDivisionError], "with its traceback on standard error"


def test_long_prompts_do_not_hold_up_running_rows(start, folder):
    engine = start(folder, prefill_tokens=8)
    running = Answer(engine, asked(None, count=1000, ignore_eos=True)).first()
    steps = engine.counts.steps
    late = Answer(engine, asked(None, prompt="x" * 300, count=1)).wait()
    assert late.end.finish == "length"
    assert engine.counts.steps - steps >= 300 // 8 - 1, "a step of the batch after every part of the prompt"
    running.ticket.canceled.set()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system's threads are in /proc on Linux")
def test_a_closed_engine_wants_nothing_more_of_python(folder):
    """MLX drops a thread's compiled functions when the system ends it, and without an interpreter that aborts."""
    for _ in range(10):
        engine = started(folder)
        Answer(engine, asked(None, count=3)).wait()
        thread = Path("/proc/self/task", str(engine._thread.native_id))
        assert thread.exists()
        engine.close()
        ctypes.PyDLL(None).usleep(100_000)  # holds Python's lock, as the end of a process does
        assert not thread.exists()


def test_loading_fails_as_a_command_fails(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        started(tmp_path / "nothing")


def test_a_blend_that_is_read_again_has_the_parts_it_was_made_of(start, folder, adapters):
    size = started_cards(folder, {"four": adapters["four"]})["four"].nbytes
    engine = start(folder, {"a": adapters["four"], "b": adapters["four-too"]}, adapter_bytes=int(4.5 * size))
    engine.call(lambda store: store.add({"mix": AdapterSource(blend={"a": 0.5, "b": 0.5})})).result(60)
    before = Answer(engine, asked("mix")).text
    engine.call(lambda store: store.add({"a": AdapterSource(adapters["one-block"])})).result(60)
    engine.call(lambda store: store.remove("b")).result(60)
    for name in "xyzw":
        engine.call(lambda store, name=name: store.add({name: AdapterSource(adapters["four-too"])})).result(60)
    assert not engine.store.cards["mix"].resident
    assert Answer(engine, asked("mix")).text == before
    with pytest.raises(InputError, match="'b', which is not loaded"):  # asked to blend anew, of what they are now
        engine.call(lambda store: store.reload("mix")).result(60)


def test_an_adapter_that_cannot_be_read_never_ends_the_engine(start, folder, adapters, tmp_path, monkeypatch):
    shutil.copytree(adapters["four"], tmp_path / "four")
    engine = start(folder, {"four": tmp_path / "four"}, adapter_bytes=10**9)
    config = json.loads((tmp_path / "four" / "adapter_config.json").read_text())
    config["mlx_lora"]["alpha"] = None  # as if it were not there
    (tmp_path / "four" / "adapter_config.json").write_text(json.dumps(config))
    engine.call(lambda store: store.reload("four")).result(60)

    def broken(*given):
        raise TypeError("one of many")

    monkeypatch.setattr(adapter_store, "read_factors", broken)
    engine.call(lambda store: store._retire("four")).result(60)  # as if evicted
    failed = Answer(engine, asked("four")).wait().end.error
    assert isinstance(failed, InputError)
    assert "one of many" in str(failed)
    with pytest.raises(InputError, match="one of many"):
        engine.call(lambda store: store.reload("four")).result(60)
    assert Answer(engine, asked(None)).text


def test_an_embedding_whose_weight_the_head_reads_takes_adapters(start, tmp_path):
    folder = write_architecture(tmp_path / "base", "seed_oss", True)
    adapter = make_adapter(folder, tmp_path / "a", targets="embed_tokens,q_proj")
    engine = start(folder, {"a": adapter})
    for name, path in ((None, None), ("a", adapter)):
        assert Answer(engine, asked(name, count=6)).text == generated(folder, path, count=6)


def test_experts_that_are_called_with_single_tokens_are_refused(start, tmp_path):
    folder = write_architecture(tmp_path / "base", "dbrx")
    make_adapter(folder, tmp_path / "experts")
    make_adapter(folder, tmp_path / "attention", targets="Wqkv,out_proj")
    engine = start(folder, {"attention": tmp_path / "attention"})
    with pytest.raises(InputError, match="experts"):
        engine.call(lambda store: store.add({"a": AdapterSource(tmp_path / "experts")})).result(60)
