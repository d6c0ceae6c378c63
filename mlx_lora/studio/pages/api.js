// Every request of the page, one function per endpoint: a changed field of the server costs one place, this file.
// The key, when the server asks for one, stays in this module's memory and is gone when the page is closed.
let key = null;
let whenKeyIsWanted = () => {};

// An answer that is no success, with the server's own line as its message.
export class Refused extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const onKeyWanted = (listener) => {
  whenKeyIsWanted = listener;
};
export const useKey = (text) => {
  key = text;
};

const headersOf = (more = {}) => (key === null ? more : { ...more, Authorization: "Bearer " + key });

function refusal(status, body) {
  if (status === 401) {
    whenKeyIsWanted(key !== null);
    return new Refused(
      key === null ? "the server needs an API key" : "the server does not accept this API key",
      status,
    );
  }
  try {
    const { message, code } = JSON.parse(body).error;
    return new Refused(message, status, code);
  } catch {
    /* no JSON: the status has to do */
  }
  return new Refused(`the server answered with status ${status}`, status);
}

async function call(method, path, body, signal) {
  const headers = headersOf(body === undefined ? {} : { "Content-Type": "application/json" });
  const options = { method, headers, signal, credentials: "omit", cache: "no-store" };
  if (body !== undefined) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch("/api/" + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the studio's server does not answer; start `mlx-lora studio` again, runs go on without it");
  }
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

// A new place asks with these two; what they refuse is an error whose message is the server's own line.
export const get = async (path, signal) => (await call("GET", path, undefined, signal)).json();
export const post = async (path, body = {}, signal) => (await call("POST", path, body, signal)).json();
const part = encodeURIComponent;

// The JSON objects of server-sent events, as they come. Comment lines (": alive") keep the connection and are skipped.
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const whole = rest.split(/\r?\n\r?\n/);
    rest = whole.pop();
    for (const event of whole) {
      const data = event
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart())
        .join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) return;
  }
}

const wait = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        resolve();
      },
      { once: true },
    );
  });

// Follow a stream until `signal`; connect again, ever more slowly, when the server went away. `heard` returns true to
// end it. `lost` is called after each connection that ended, because what was sent meanwhile is not sent again; it
// returns true to end.
async function follow(path, heard, signal, lost = () => false) {
  for (let pause = 500; !signal.aborted; pause = Math.min(pause * 2, 8000)) {
    try {
      for await (const event of events(await call("GET", path, undefined, signal))) {
        pause = 500;
        if (heard(event)) return;
      }
    } catch (error) {
      if (error.name === "AbortError" || error.status === 404) return;
    }
    await wait(pause, signal);
    if (!signal.aborted && lost()) return;
  }
}

export const readState = () => get("state");
export const readModels = () => get("models");
export const searchModels = (words, signal) => get("models/search?q=" + part(words), signal);
export const planModel = (model, settings, signal) => post("models/plan", { model, settings }, signal);
export const downloadModel = (model) => post("models/download", { model });
export const convertModel = (model, bits, name) => post("models/convert", { model, bits, name });

export const readTasks = () => get("tasks");
export const followTasks = (heard, signal) => follow("tasks/events", heard, signal);
export const cancelTask = (id) => post(`tasks/${part(id)}/cancel`);

export const readExample = () => get("example");
export const fetchExample = () => post("example");

export const readSets = () => get("data/sets");
export const previewData = (question, signal) => post("data/preview", question, signal);

// Send a file; `progress` hears the share sent. fetch() cannot tell that, XMLHttpRequest can.
export function uploadFile(file, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/api/data/upload?name=" + part(file.name));
    for (const [name, value] of Object.entries(headersOf({ "Content-Type": "application/octet-stream" })))
      request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => progress(event.lengthComputable ? event.loaded / event.total : null);
    request.onload = () =>
      request.status < 300
        ? resolve(JSON.parse(request.responseText))
        : reject(refusal(request.status, request.responseText));
    request.onerror = () => reject(new Refused(`${file.name}: the file was not taken; the server does not answer`));
    request.send(file);
  });
}

export const readSettings = () => get("settings");
// Sets as --data takes them: FILE=WEIGHT, by comma.
export const dataText = (sets) => sets.map(({ path, weight }) => (weight === 1 ? path : `${path}=${weight}`)).join(",");

export const readRule = (settings, signal) => post("train/rule", { settings }, signal);
export const planRun = (settings, card, signal) => post("train/plan", { settings, card }, signal);
export const startRun = (settings, card, name, queue) => post("train/start", { settings, card, name, queue });
export const startSweep = (settings, card, name) => post("train/sweep", { settings, card, name });
export const readSweep = (name) => get(`train/sweep/${encodeURIComponent(name)}`);

export const readQueue = () => get("queue");
export const moveInQueue = (run, to) => post("queue/move", { run, to });
export const removeFromQueue = (run) => post("queue/remove", { run });

export const readRuns = () => get("runs");
export const readRun = (id, signal) => get("runs/" + part(id), signal);
export const followRun = (id, after, heard, signal, lost) =>
  follow(`runs/${part(id)}/events?after=${after}`, heard, signal, lost);
// `agreed` is the question about a run's code that the server asked, and the person agreed to.
export const steerRun = (id, verb, agreed) => post(`runs/${part(id)}/${verb}`, agreed ? { agreed } : {});
export const measureForgetting = (id) => post(`runs/${part(id)}/forgetting`);
export const askBoth = (id, data) => post(`runs/${part(id)}/evaluation`, data ? { data } : {});
export const tickAnswer = (id, index, right) => post(`runs/${part(id)}/tick`, { index, right });
export const writeNotes = (id, text) => call("PUT", `runs/${part(id)}/notes`, { text });
export const deleteRun = (id, name) => call("DELETE", "runs/" + part(id), { confirm: name });

export const readAdapters = () => get("adapters");
export const readTalked = ({ model, revision }, signal) => post("talk/model", { model, revision }, signal);
export const sortTexts = (asked, signal) => post("talk/sort", asked, signal);
export const closeTalk = () => post("talk/close");
export async function talk(question, heard, signal) {
  for await (const event of events(await call("POST", "talk", question, signal))) heard(event);
}

export const readNeeds = () => get("export/needs");
export const exportAdapter = (order) => post("export", order);
