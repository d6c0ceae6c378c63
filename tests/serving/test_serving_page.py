"""The server's page in a browser: two models side by side, as a person uses it."""

from __future__ import annotations

import json
import shlex
import time

import httpx
import pytest
from browser import Live
from make_adapters import make_adapter
from serving_process import Server

pytestmark = pytest.mark.slow
KEY = "correct horse"
FIRST, SECOND = "Wherefore art thou?", "And who am I?"
COUNT = 20
DONE = "!document.querySelector('[aria-busy]') && document.getElementById('stop').disabled"
TEXTS = "[...document.querySelectorAll('.text')].map(e => e.raw || '')"  # as the server sent them
SHOWN = "[...document.querySelectorAll('.text')].map(e => e.textContent)"
FIGURES = "[...document.querySelectorAll('.figures')].map(e => e.textContent)"
ERRORS = "[...document.querySelectorAll('.error')].map(e => e.textContent).filter(Boolean)"


@pytest.fixture(scope="module")
def folder(long_context_folder):
    return long_context_folder


@pytest.fixture(scope="module")
def arguments(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    made = {name: make_adapter(folder, root / name, seed=n + 1) for n, name in enumerate(("bard", "tutor"))}
    return ("--model", folder, *(flag for name in made for flag in ("--adapter", f"{name}={made[name]}")))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with Live(tmp_path_factory.mktemp("profile")) as live:
        yield live


@pytest.fixture(scope="module")
def server(arguments, tmp_path_factory):
    with Server(*arguments, "--max-tokens", 10**5, log=tmp_path_factory.mktemp("log") / "log") as server:
        yield server


@pytest.fixture
def page(live, server):
    """The page, with models to choose from."""
    live.open(server.url)
    live.wait("document.getElementById('model-b').length")
    yield live
    live.no_more_answers()


def fill(live: Live, **values: object) -> None:
    for name, value in values.items():
        live.run(f"document.getElementById('{name.replace('_', '-')}').value = {json.dumps(str(value))}")


def ask(live: Live, question: str) -> None:
    """Ask as a person does, with the keyboard."""
    live.run("document.getElementById('question').focus()")
    live.type(question)
    live.press("Enter")


def told(server: Server, model: str, *turns: str, count: int = COUNT) -> str:
    """What the server says to a whole conversation."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": count}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    return answer.json()["choices"][0]["message"]["content"]


def stream_of(*texts: str) -> str:
    """A stream of an answer, as the server sends one."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    end = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    end.append({"choices": [], "usage": {"completion_tokens": len(texts)}})
    return "".join(f"data: {json.dumps(one)}\n\n" for one in chunks + end) + "data: [DONE]\n\n"


def test_it_loads_from_the_server_alone_and_without_a_complaint(page, server):
    assert page.problems == []
    assert {url for _, url, _ in page.requests} <= {f"{server.url}/", f"{server.url}/v1/models", "data:,"}
    names = "[...document.getElementById('model-{}').options].map(o => o.textContent)"
    assert page.run(names.replace("{}", "a")) == ["tiny", "bard", "tutor"]
    assert page.run(names.replace("{}", "b")) == ["tiny", "bard", "tutor", "none"]
    assert page.run("[document.getElementById('model-a').value, document.getElementById('model-b').value]") == [
        "tiny",
        "bard",
    ]
    unnamed = "[...document.querySelectorAll('input,select,textarea,button')].filter(e => !(e.labels && e.labels.length) && !e.textContent.trim()).length"
    assert page.run(unnamed) == 0, "every control has a name for screen readers"
    assert page.run("document.documentElement.lang") == "en"


def test_two_models_answer_side_by_side_and_remember(page, server):
    fill(page, model_a="bard", model_b="tutor", temperature=0, most=COUNT)
    ask(page, FIRST)
    page.wait(f"document.querySelectorAll('.text').length === 2 && {DONE}")
    first = page.run(TEXTS)
    assert first == [told(server, name, FIRST) for name in ("bard", "tutor")]
    assert first[0] != first[1]
    assert page.run("[...document.querySelectorAll('.answer h2')].map(e => e.textContent)") == ["bard", "tutor"]
    assert all(line.startswith(f"{COUNT} tokens, ") for line in page.run(FIGURES)), page.run(FIGURES)
    assert all(
        " tokens/s with 2 answers at once, first token in " in line and "stopped at Max tokens" in line
        for line in page.run(FIGURES)
    )
    # The left side goes on with another model, and each side with its own history.
    fill(page, model_a="tiny")
    ask(page, SECOND)
    page.wait(f"document.querySelectorAll('.text').length === 4 && {DONE}")
    meant = [told(server, name, FIRST, text, SECOND) for name, text in zip(("tiny", "tutor"), first, strict=True)]
    assert page.run(TEXTS)[2:] == meant
    assert page.problems == []


def test_one_model_alone_and_reset(page, server):
    fill(page, model_a="bard", model_b="", temperature=0, most=COUNT)
    for _ in range(2):
        ask(page, FIRST)
        page.wait(f"document.querySelectorAll('.text').length === 1 && {DONE}")
        assert page.run(TEXTS) == [told(server, "bard", FIRST)], "after a reset nothing is remembered"
        page.run("document.getElementById('reset').click()")
        assert page.run("document.querySelectorAll('.turn').length") == 0
        assert page.run("document.getElementById('hint').hidden") is False
    assert page.run("document.activeElement.id") == "question"


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_keeps_what_was_said(page, server, how):
    fill(page, model_a="bard", model_b="tutor", temperature=0, most=10**5)
    ask(page, FIRST)
    page.wait(f"{TEXTS}.every(text => text.length > 30)")
    live_rates = page.run(FIGURES)
    assert all("tokens/s" in line for line in live_rates), "while it comes"
    if how == "Escape":
        page.press("Escape")
    else:
        page.run("document.getElementById('stop').click()")
    page.wait(DONE)
    parts = page.run(TEXTS)
    assert all(line.endswith(", stopped") for line in page.run(FIGURES))
    deadline = time.monotonic() + 30
    while "mlx_lora_unfinished 0" not in httpx.get(f"{server.url}/metrics").text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "mlx_lora_unfinished 0" in httpx.get(f"{server.url}/metrics").text, "the server's rows are free"
    assert page.run(TEXTS) == parts, "nothing comes after it"
    fill(page, most=COUNT)
    ask(page, SECOND)
    page.wait(f"document.querySelectorAll('.text').length === 4 && {DONE}")
    meant = [told(server, name, FIRST, text, SECOND) for name, text in zip(("bard", "tutor"), parts, strict=True)]
    assert page.run(TEXTS)[2:] == meant


def test_reset_while_it_answers(page, server):
    fill(page, model_a="bard", model_b="", temperature=0, most=10**5)
    ask(page, FIRST)
    page.wait(f"{TEXTS}.every(text => text.length > 30)")
    page.run("document.getElementById('reset').click()")
    page.wait(DONE)
    fill(page, most=COUNT)
    ask(page, FIRST)
    page.wait(f"document.querySelectorAll('.text').length === 1 && {DONE}")
    assert page.run(TEXTS) == [told(server, "bard", FIRST)]


def test_an_error_is_one_line_and_the_question_is_not_lost(page, server):
    fill(page, model_a="bard", model_b="tutor", temperature=0, most=10**6)
    ask(page, FIRST)
    page.wait(f"document.querySelectorAll('.answer').length === 2 && {DONE}")
    assert page.run(ERRORS) == ["Error: max_tokens 1000000: this server allows at most 100000"] * 2
    assert page.run("document.getElementById('question').value") == FIRST
    fill(page, most=COUNT)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.answer').length === 4 && {DONE}")
    assert page.run(TEXTS)[2:] == [told(server, name, FIRST) for name in ("bard", "tutor")], "it was no turn"
    # In the middle of a stream, and one that ends without its end.
    error = json.dumps({"error": {"message": "not done within 5 s"}})
    begun = stream_of("ab").split("\n\n")[0] + "\n\n"
    for body, words in ((f"data: {error}\n\n", "not done within 5 s"), ("", "the answer ended before it was complete")):
        page.answer_for("/v1/chat/completions", 200, "text/event-stream", begun + body)
        ask(page, SECOND)
        page.wait(f"{DONE} && {ERRORS}.slice(-2).every(text => text === 'Error: {words}')")
        assert page.run(TEXTS)[-2:] == ["ab", "ab"], "what had come stays"
        page.no_more_answers()


def test_what_a_model_says_is_text(page):
    evil = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b>"
    page.answer_for("/v1/chat/completions", 200, "text/event-stream", stream_of(evil, evil))
    fill(page, model_a="bard", model_b="tutor")
    ask(page, evil)
    page.wait(f"document.querySelectorAll('.text').length === 2 && {DONE}")
    assert page.run(SHOWN) == [evil * 2] * 2
    assert page.run("document.querySelector('.question').textContent") == evil
    assert page.run("document.querySelectorAll('#log img, #log script, #log b').length") == 0
    assert page.run("document.title") == "mlx-lora chat"
    assert page.problems == []


MARKDOWN = """# Two *ways*

Say **it** with `a < b` or
- one
- two
  1. deeper <b>x</b>

```python
print("<i>")  # **not bold**
```
> quoted
2 * 3 * 4"""


def test_markdown_is_shown_as_elements_and_only_as_those(page):
    page.answer_for("/v1/chat/completions", 200, "text/event-stream", stream_of(*MARKDOWN.splitlines(keepends=True)))
    fill(page, model_a="bard", model_b="")
    ask(page, "How?")
    page.wait(f"document.querySelectorAll('.text').length === 1 && {DONE}")
    assert page.run(TEXTS) == [MARKDOWN]
    shape = "[...document.querySelector('.text').children].map(e => e.tagName)"
    assert page.run(shape) == ["H3", "P", "UL", "PRE", "BLOCKQUOTE", "P"]
    texts = "(selector) => [...document.querySelectorAll('.text ' + selector)].map(e => e.textContent)"
    for selector, found in {
        "strong": ["it"],
        "em": ["ways"],
        "p code": ["a < b"],
        "pre code": ['print("<i>")  # **not bold**'],
        "ul > li > ol > li": ["deeper <b>x</b>"],
        "blockquote": ["quoted"],
        "b, i": [],
    }.items():
        assert page.run(f"({texts})({json.dumps(selector)})") == found, selector
    assert "2 * 3 * 4" in page.run(SHOWN)[0]
    assert "mono" in page.run("getComputedStyle(document.querySelector('.text pre code')).fontFamily")
    assert page.problems == []


def test_copy_regenerate_and_a_system_prompt(page, server):
    page.run("document.execCommand = () => true")
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.run("document.getElementById('system-open').click()")
    fill(page, model_a="bard", model_b="", temperature=0, most=COUNT, system="You're short.")
    ask(page, FIRST)
    page.wait(f"document.querySelectorAll('.text').length === 1 && {DONE}")
    (said,) = page.run(TEXTS)
    messages = [{"role": "system", "content": "You're short."}, {"role": "user", "content": FIRST}]
    body = {"model": "bard", "messages": messages, "temperature": 0, "max_tokens": COUNT}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert said == answer["choices"][0]["message"]["content"]
    assert said != told(server, "bard", FIRST)
    page.run("document.querySelector('.actions .copy').click()")
    page.wait("window.copied")
    assert page.run("window.copied") == said
    page.run("document.querySelector('.actions .curl').click()")
    page.wait("window.copied.startsWith('curl')")
    *_, data = shlex.split(page.run("window.copied"))
    assert json.loads(data) == body
    # Another answer takes the place of this one, in the page and in what the model remembers.
    fill(page, model_a="tutor", system="")
    page.run("document.querySelector('.actions .again').click()")
    page.wait(f"{DONE} && document.querySelector('.answer h2').textContent === 'tutor'")
    assert page.run(TEXTS) == [told(server, "tutor", FIRST)]
    ask(page, SECOND)
    page.wait(f"document.querySelectorAll('.text').length === 2 && {DONE}")
    assert page.run(TEXTS)[1] == told(server, "tutor", FIRST, page.run(TEXTS)[0], SECOND)
    assert page.run("[...document.querySelectorAll('.again')].map(e => e.hidden)") == [True, False]
    assert page.problems == []


def test_the_policy_stops_what_is_not_the_pages_own(page):
    tries = {
        "document.body.innerHTML = '<b>x</b>'": "TypeError",
        "eval('1')": "Error",
        "document.createElement('script').text = 'document.title = 1'": "TypeError",
        "fetch('http://127.0.0.1:1/')": "TypeError",
    }
    for code, error in tries.items():
        caught = f"(async () => {{ try {{ await ({code}); return 'done' }} catch (error) {{ return error.name }} }})()"
        assert error in page.run(caught), code
    page.run("document.body.append(Object.assign(document.createElement('img'), {src: '/health'}))")
    page.run("document.body.append(Object.assign(document.createElement('iframe'), {src: '/'}))")
    page.run(
        "document.body.append(Object.assign(document.createElement('style'), {textContent: 'body { color: red }'}))"
    )
    assert page.run("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    page.wait("true")
    for rule in ("connect-src", "img-src", "default-src", "style-src"):
        assert any(rule in line for line in page.problems), (rule, page.problems)


def test_a_key_stays_in_memory(live, arguments, tmp_path):
    with Server(*arguments, log=tmp_path / "log", environment={"MLX_LORA_API_KEY": KEY}) as server:
        live.open(server.url)
        live.wait("!document.getElementById('key-form').hidden")
        assert live.run("document.activeElement.id") == "key"
        assert live.run(ERRORS) == []
        for typed, outcome in (("wrong", "Error: the server does not accept this API key"), (KEY, None)):
            live.type(typed)
            live.press("Enter")
            if outcome:
                live.wait(f"{ERRORS}.includes({json.dumps(outcome)})")
        live.wait("document.getElementById('model-b').length === 4")
        assert live.run(ERRORS) == []
        assert live.run("document.getElementById('key-form').hidden")
        fill(live, temperature=0, most=COUNT)
        ask(live, FIRST)
        live.wait(f"document.querySelectorAll('.text').length === 2 && {DONE}")
        assert all(live.run(TEXTS))
        kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href, document.getElementById('key').value]"
        assert live.run(kept) == [0, 0, "", f"{server.url}/", ""]
        assert KEY not in live.run("document.documentElement.outerHTML")
        assert not any(KEY.split()[0] in url for _, url, _ in live.requests)
        live.open(server.url)
        live.wait("!document.getElementById('key-form').hidden")
        assert server.stop() == 0
        live.run("document.getElementById('reset').click()")
        live.wait(f"{ERRORS}.includes('Error: the server does not answer; is it still running?')")


def test_everything_can_be_reached_with_the_keyboard(page):
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(8):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id"))
    assert reached == ["model-a", "model-b", "temperature", "most", "system-open", "question", "send", "reset"]
    fill(page, most=1, temperature=0, model_b="")
    page.run("document.getElementById('question').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.run("document.getElementById('question').value") == "one\ntwo"
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.text').length === 1 && {DONE}")
    assert page.run("document.activeElement.id") == "question", "the next question can be typed at once"


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_wide_and_narrow_light_and_dark(live, server, width, dark):
    live.open(server.url, width, 844, dark)
    live.wait("document.getElementById('model-b').length")
    live.answer_for("/v1/chat/completions", 200, "text/event-stream", stream_of("word " * 80, "x" * 400))
    fill(live, model_a="bard", model_b="tutor")
    ask(live, "y" * 300)
    live.wait(f"document.querySelectorAll('.text').length === 2 && {DONE}")
    live.no_more_answers()
    assert live.run("innerWidth") == width
    assert live.run("document.documentElement.scrollWidth") <= width
    clipped = "[...document.querySelectorAll('h1,h2,p,label,button,select')].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline').length"
    assert live.run(clipped) == 0
    left, right = live.run(
        "[...document.querySelectorAll('.answer')].map(e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.bottom]; })"
    )
    if width == 390:
        assert right[1] == right[2] == 0, "the other model's answer is behind a tab"
        assert left[2] > left[1]
        live.run("document.getElementById('tab-b').click()")
        shown = "[...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().height > 0)"
        assert live.run(shown) == [False, True]
        assert live.run("document.getElementById('tab-b').textContent") == "tutor"
    else:
        assert right[1] == left[1]
        assert right[0] > left[0]
    assert (live.run("getComputedStyle(document.body).backgroundColor") == "rgb(245, 245, 247)") is not dark
    assert live.problems == []
