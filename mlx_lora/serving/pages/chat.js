// The chat page: two models side by side. The server puts this script and markdown.js into the page.
// Everything that comes from the server or the user goes into the page as text (textContent), never as markup.
const part = (id) => document.getElementById(id);
const made = (tag, kind, text = "") =>
  Object.assign(document.createElement(tag), { className: kind, textContent: text });
const LONGEST = 50000; // characters; a longer answer is shown as it is
const sides = ["a", "b"].map((name) => ({ name, select: part("model-" + name), messages: [] }));
let key = null; // in this variable only: no storage, no URL
let stopping = null; // the AbortController of the answers on their way

class Refused extends Error {}
class KeyWanted extends Refused {}

// fetch's own mode, "cors", is wanted: with no-referrer any other sends `Origin: null`, which the server refuses.
async function call(path, body, signal) {
  const headers = {};
  if (key !== null) headers.Authorization = "Bearer " + key;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      signal,
      body: body && JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server does not answer; is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    part("key-form").hidden = false;
    part("key").focus();
    if (key === null) throw new KeyWanted("the server needs an API key");
    throw new Refused("the server does not accept this API key");
  }
  let message = "status " + response.status;
  try {
    message = (await response.json()).error.message;
  } catch {
    /* no JSON: the status has to do */
  }
  throw new Refused(message);
}

// The JSON objects of a stream of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const whole = rest.split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
    if (done) throw new Refused("the answer ended before it was complete");
  }
}

async function readModels() {
  const { data } = await (await call("/v1/models")).json();
  const names = data.map((model) => model.id);
  part("base").textContent = `${names[0]} and ${names.length - 1} adapter${names.length === 2 ? "" : "s"}`;
  for (const { name, select } of sides) {
    const before = select.length ? select.value : name === "a" ? names[0] : names[1];
    const none = Object.assign(made("option", "", "none"), { value: "" });
    const options = names.map((id) => Object.assign(made("option", "", id), { value: id }));
    select.replaceChildren(...(name === "b" ? [...options, none] : options));
    select.value = names.includes(before) ? before : name === "b" ? "" : names[0];
  }
}

async function tryModels() {
  say("");
  try {
    await readModels();
  } catch (error) {
    if (!(error instanceof KeyWanted)) say(error.message); // the form that appears says it
  }
  showTabs();
}

function showTabs() {
  const [a, b] = sides.map((side) => side.select.value);
  document.querySelector(".tabs").hidden = !b;
  for (const { name } of sides) {
    part("tab-" + name).textContent = name === "a" ? a || "Model A" : b || "Model B";
    part("tab-" + name).setAttribute("aria-selected", String(document.body.dataset.side === name));
  }
}

function say(problem) {
  part("problem").textContent = problem && "Error: " + problem;
}

function figuresOf(count, first, last, start, atOnce) {
  const rate = count > 1 && last > first ? `, ${(((count - 1) / (last - first)) * 1000).toFixed(1)} tokens/s` : "";
  const speed = rate && atOnce > 1 ? `${rate} with ${atOnce} answers at once` : rate;
  return `${count} token${count === 1 ? "" : "s"}${speed}, first token in ${((first - start) / 1000).toFixed(2)} s`;
}

// Shows a text as Markdown, at most ten times a second: a long answer is not laid out again for each of its tokens.
function show(text, said, now) {
  text.raw = said;
  if (!now && performance.now() - (text.shown || 0) < 100) return;
  text.shown = performance.now();
  text.replaceChildren(...(said.length > LONGEST ? [made("p", "plain", said)] : markdown(said)));
}

// What the model thought before its answer, as a quotation. It is shown, and is not part of the conversation.
function quoted(thought) {
  return thought && thought.replace(/^/gm, "> ") + "\n\n";
}

// Streams one side's answer into its box, and makes it a turn of that side's conversation. Returns false when the
// message was refused and has to be sent again.
async function answer(side, question, box, signal, atOnce) {
  const [text, figures, problem] = ["div.text", "p.figures", "p.error"].map((one) => box.querySelector(one));
  const messages = [...side.messages, { role: "user", content: question }];
  const system = part("system").value.trim();
  box.request = {
    model: side.select.value || box.request.model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: part("temperature").valueAsNumber,
    max_tokens: part("most").valueAsNumber,
  };
  box.taken = false;
  const start = performance.now();
  let said = "";
  let thought = "";
  let count = 0;
  let first = 0;
  let last = 0;
  let ending = "";
  box.setAttribute("aria-busy", "true");
  try {
    const response = await call(
      "/v1/chat/completions",
      {
        ...box.request,
        stream: true,
        stream_options: { include_usage: true },
      },
      signal,
    );
    for await (const event of events(response)) {
      if (event.error) throw new Refused(event.error.message);
      const [choice] = event.choices;
      const follow = atEnd();
      if (event.usage) count = event.usage.completion_tokens;
      else if (choice.delta.content || choice.delta.reasoning_content) {
        last = performance.now();
        first = first || last;
        count += 1;
        thought += choice.delta.reasoning_content || "";
        said += choice.delta.content || "";
        show(text, quoted(thought) + said);
      }
      if (choice && choice.finish_reason === "length") ending = ", stopped at Max tokens";
      if (first) figures.textContent = figuresOf(count, first, last, start, atOnce) + ending;
      if (follow) toEnd();
    }
  } catch (error) {
    const aborted = error.name === "AbortError";
    const sofar = first ? figuresOf(count, first, last, start, atOnce) : "";
    figures.textContent = aborted ? (sofar && sofar + ", ") + "stopped" : sofar;
    if (!aborted) problem.textContent = "Error: " + error.message;
    if (!said) return aborted;
  } finally {
    show(text, quoted(thought) + said, true);
    box.removeAttribute("aria-busy");
  }
  if (!box.isConnected) return true; // the conversation was reset meanwhile
  side.messages = [...messages, { role: "assistant", content: said }];
  box.taken = true;
  return true;
}

// The clipboard is open to pages from this machine and to https; elsewhere an old way has to do.
async function copy(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = Object.assign(made("textarea", ""), { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
}

// The request as a shell command. The key is not in it, but a variable that may hold it.
function curl(request) {
  const quoted = (text) => "'" + text.replaceAll("'", "'\\''") + "'";
  const bearer = key === null ? "" : ' -H "Authorization: Bearer $MLX_LORA_API_KEY"';
  const url = quoted(location.origin + "/v1/chat/completions");
  return `curl ${url} -H 'Content-Type: application/json'${bearer} -d ${quoted(JSON.stringify(request))}`;
}

function actions(side, question, box) {
  const row = made("div", "actions");
  const names = [
    ["copy", "Copy"],
    ["again", "Regenerate"],
    ["curl", "Copy as curl"],
  ];
  const [plain, again, command] = names.map(([kind, words]) =>
    Object.assign(made("button", kind, words), { type: "button" }),
  );
  plain.addEventListener("click", () => copy(plain, box.querySelector(".text").raw || ""));
  command.addEventListener("click", () => copy(command, curl(box.request)));
  again.addEventListener("click", async () => {
    if (stopping) return;
    if (box.taken) side.messages = side.messages.slice(0, -2); // the message and the answer that is replaced
    const own = side.select.value || box.request.model;
    box.querySelector("h2").textContent = own;
    box.setAttribute("aria-label", "Answer of " + own);
    show(box.querySelector(".text"), "", true);
    box.querySelector(".figures").textContent = "waiting";
    box.querySelector(".error").textContent = "";
    await streamed([[side, box]], question);
  });
  row.append(plain, again, command);
  return row;
}

// Streams answers into their boxes at once; Stop and Escape end them all.
async function streamed(pairs, question) {
  stopping = new AbortController();
  running(true);
  const { signal } = stopping;
  const kept = await Promise.all(pairs.map(([side, box]) => answer(side, question, box, signal, pairs.length)));
  stopping = null;
  running(false);
  return kept;
}

const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 40;
const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

async function ask(question) {
  const asked = sides.filter((side) => side.select.value);
  const turn = made("section", "turn");
  const answers = made("div", "answers");
  const boxes = asked.map((side) => {
    const box = made("article", "answer " + side.name);
    const name = side.select.value;
    box.setAttribute("aria-label", "Answer of " + name);
    box.append(
      made("h2", "", name),
      made("div", "text"),
      made("p", "figures", "waiting"),
      made("p", "error"),
      actions(side, question, box),
    );
    return box;
  });
  // Only the last answer can be another.
  for (const earlier of document.querySelectorAll("#log .again")) earlier.hidden = true;
  answers.append(...boxes);
  turn.append(made("p", "question", question), answers);
  part("hint").hidden = true;
  part("log").append(turn);
  toEnd();
  part("question").value = "";
  const kept = await streamed(
    asked.map((side, n) => [side, boxes[n]]),
    question,
  );
  // The message was refused: it stays, to be sent again.
  if (!kept.includes(true) && turn.isConnected && !part("question").value) part("question").value = question;
}

function running(yes) {
  const at = document.activeElement;
  part("send").disabled = yes;
  part("stop").disabled = !yes;
  if (yes && at === part("send")) part("stop").focus();
  if (!yes && (at === part("stop") || at === document.body)) part("question").focus({ preventScroll: true });
}

part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = part("question").value;
  if (stopping || !question.trim()) return;
  if (![part("temperature"), part("most")].every((field) => field.reportValidity())) return;
  if (sides.every((side) => !side.select.value)) return say("choose a model first");
  say("");
  ask(question);
});
part("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  part("ask").requestSubmit();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && stopping) stopping.abort();
});
part("stop").addEventListener("click", () => stopping?.abort());
part("reset").addEventListener("click", () => {
  if (stopping) stopping.abort();
  part("log").replaceChildren(part("hint"));
  part("hint").hidden = false;
  for (const side of sides) side.messages = [];
  part("question").focus();
  tryModels(); // adapters may have come and gone
});
part("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!/^[!-~]+( [!-~]+)*$/.test(part("key").value))
    return say("this key cannot be sent; use letters, digits and ASCII punctuation");
  key = part("key").value;
  part("key").value = "";
  part("key-form").hidden = true;
  tryModels().then(() => part("key-form").hidden && part("question").focus());
});
for (const { name, select } of sides) {
  select.addEventListener("change", showTabs);
  part("tab-" + name).addEventListener("click", () => {
    document.body.dataset.side = name;
    showTabs();
  });
}
tryModels();
