// What the places share: the project (model, sets, settings), the machine, the tasks, each a value with listeners.
import { useEffect, useState } from "./vendor/hooks.module.js";
import * as api from "./api.js";

export function store(value) {
  const listeners = new Set();
  return {
    get: () => value,
    set(next) {
      value = typeof next === "function" ? next(value) : next;
      for (const listener of listeners) listener(value);
    },
    listen(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

export function useStore(one) {
  const [value, set] = useState(one.get());
  useEffect(() => {
    set(one.get());
    return one.listen(set);
  }, [one]);
  return value;
}

// The project outlives a reload: in the browser's own storage, which holds no rows and no keys.
const KEPT = "mlx_lora studio project";
const EMPTY = { model: null, sets: [], settings: {}, preset: null, talked: null };
function kept() {
  try {
    return { ...EMPTY, ...JSON.parse(localStorage.getItem(KEPT)) };
  } catch {
    return EMPTY;
  }
}
export const project = store(kept());
project.listen((value) => {
  try {
    localStorage.setItem(KEPT, JSON.stringify(value));
  } catch {
    /* private window */
  }
});
export const changeProject = (change) => project.set((before) => ({ ...before, ...change }));
export const changeSettings = (change) =>
  project.set((before) => {
    const settings = { ...before.settings, ...change };
    for (const [name, value] of Object.entries(change)) if (value === undefined) delete settings[name];
    return { ...before, settings };
  });

// What train takes: the chosen settings with the model and the sets.
export const wholeSettings = ({ model, sets, settings }) => ({
  ...settings,
  ...(model ? { model } : {}),
  ...(sets.length ? { data: api.dataText(sets) } : {}),
});

// What is wrong in a field of the page, by its id: {name, problem}. Start waits until there is none.
export const fieldProblems = store({});
export const noteField = (id, what) => {
  const known = fieldProblems.get();
  if (!what && !known[id]) return;
  const { [id]: _, ...rest } = known;
  fieldProblems.set(what ? { ...rest, [id]: what } : rest);
};
export const fieldsReset = store(0); // counts the times that fields were set back: what was typed in them goes
export const resetSettings = (names) => {
  fieldsReset.set((n) => n + 1);
  changeSettings(Object.fromEntries(names.map((name) => [name, undefined])));
};

export const machine = store(null); // the answer of /api/state, or null
export const keyWanted = store(null); // null, "first" or "again"
export const notice = store(""); // a line that is read aloud, and shown for some seconds
export const tasks = store([]);

let clearing = 0;
export function tell(words) {
  notice.set(words);
  clearTimeout(clearing);
  clearing = setTimeout(() => notice.set(""), 6000);
}

const ENDED = new Set(["done", "failed", "cancelled"]);
const waiting = new Map(); // task id -> functions that hear its end
export const taskEnded = (task) => ENDED.has(task.state);
export function onTaskEnd(id, listener) {
  const now = tasks.get().find((task) => task.id === id);
  if (now && taskEnded(now)) listener(now);
  else waiting.set(id, [...(waiting.get(id) || []), listener]);
}

function heardTask(task) {
  tasks.set((before) => [task, ...before.filter((one) => one.id !== task.id)].slice(0, 50));
  if (!taskEnded(task)) return;
  for (const listener of waiting.get(task.id) || []) listener(task);
  waiting.delete(task.id);
}

export async function begin() {
  api.onKeyWanted((again) => keyWanted.set(again ? "again" : "first"));
  const state = await api.readState();
  machine.set(state);
  keyWanted.set(null);
  const { tasks: known } = await api.readTasks();
  tasks.set(known);
  api.followTasks((task) => {
    heardTask(task);
  }, new AbortController().signal);
}

// The place is in the address: #/runs/my-run. Reload, back and bookmarks work.
const parse = () => location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
export const place = store(parse());
addEventListener("hashchange", () => place.set(parse()));
export const linkTo = (...parts) => "#/" + parts.map(encodeURIComponent).join("/");
export const go = (...parts) => {
  location.hash = linkTo(...parts);
};

// Ask the server, and keep what it said: [answer, problem, ask again].
export function useAsked(ask, facts, every = 0) {
  const [answer, set] = useState({ value: null, problem: "" });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0;
    const once = () =>
      Promise.resolve(ask(stop.signal))
        .then(
          (value) => {
            if (!stop.signal.aborted) set({ value, problem: "" });
          },
          (error) => {
            if (!stop.signal.aborted && error.name !== "AbortError")
              set((before) => ({ ...before, problem: error.message }));
          },
        )
        .finally(() => {
          if (every && !stop.signal.aborted) timer = setTimeout(once, document.hidden ? 4 * every : every);
        });
    once();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [...facts, turn]);
  return [answer.value, answer.problem, () => setTurn((n) => n + 1)];
}

export function useLater(value, ms) {
  const [late, set] = useState(value);
  const fact = JSON.stringify(value);
  useEffect(() => {
    const timer = setTimeout(() => set(value), ms);
    return () => clearTimeout(timer);
  }, [fact]);
  return late;
}
