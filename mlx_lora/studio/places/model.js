// Model: what lies on this disk and on the hub, and whether this machine could train it, before anything is downloaded.
import { useEffect, useState } from "../pages/vendor/hooks.module.js";
import {
  html,
  Button,
  Card,
  Chip,
  Empty,
  Field,
  Heading,
  Icon,
  MemoryBar,
  Meter,
  Problem,
  Segments,
  Waiting,
} from "../pages/parts.js";
import {
  changeProject,
  go,
  onTaskEnd,
  project,
  tell,
  useAsked,
  useLater,
  useStore,
  tasks,
  taskEnded,
} from "../pages/state.js";
import { bytes, count, parameters, rate, shortPath } from "../pages/format.js";
import { Example } from "../pages/example.js";
import { askPlan } from "../pages/plans.js";
import * as api from "../pages/api.js";

export const title = "Model";
export const order = 10;
export const icon = "model";

const KINDS = {
  embedded: "Example model",
  hub: "Hugging Face cache",
  folder: "Folder",
  gguf: "GGUF file",
  ollama: "Ollama",
  lmstudio: "LM Studio",
};

// The plan of a row, asked when the row comes near the window and not before: a disk may hold hundreds of models.
function usePlan(model, settings, wanted) {
  const [answer, set] = useState(null);
  const fact = JSON.stringify(settings);
  useEffect(() => {
    set(null);
    return wanted ? askPlan(model, settings, set) : undefined;
  }, [model, fact, wanted]);
  return answer;
}

function useSeen() {
  const [element, hold] = useState(null);
  const [seen, see] = useState(false);
  useEffect(() => {
    if (!element || seen) return undefined;
    const watch = new IntersectionObserver((entries) => entries.some((one) => one.isIntersecting) && see(true), {
      rootMargin: "200px",
    });
    watch.observe(element);
    return () => watch.disconnect();
  }, [element, seen]);
  return [hold, seen];
}

function Fit({ answer }) {
  if (!answer) return html`<span class="soft" aria-busy="true">planning</span>`;
  if (answer.problem) return html`<span class="soft clamp" title=${answer.problem}>${answer.problem}</span>`;
  const { fits, peak_bytes: peak, tokens_per_s: speed, line } = answer.plan;
  if (peak === null) return html`<span class="soft clamp" title=${line}>${line}</span>`;
  return html`
    <${Chip} tone=${fits ? "good" : "bad"}>${fits ? "fits" : "too large"}<//>
    <span class="number figure">
      <b>${bytes(peak)}</b>
      <span class="soft"> peak</span>
    </span>
    <span class="number figure" title=${line}>
      <b>${rate(speed)}</b>
      <span class="soft"> tokens/s</span>
    </span>
  `;
}

function ModelRow({ model, chosen, settings, onChoose }) {
  const [hold, seen] = useSeen();
  const answer = usePlan(model.id, settings, seen && model.trainable);
  const facts = [
    KINDS[model.kind] || model.kind,
    model.architecture,
    parameters(model.parameters),
    model.bits && model.bits < 16 ? `${model.bits}-bit` : "",
    bytes(model.bytes),
  ].filter(Boolean);
  return html`
    <li ref=${hold} class=${"row model-row" + (chosen ? " chosen" : "")}>
      <label>
        <input
          type="radio"
          name="model"
          checked=${chosen}
          disabled=${!model.trainable}
          onChange=${() => onChoose(model)}
        />
        <span class="row-main">
          <b>${model.name}</b>
          <span class="soft number">${facts.join(" · ")}</span>
        </span>
      </label>
      <span class="row-facts">
        ${model.trainable ? html`<${Fit} answer=${answer} />` : html`<span class="soft">${model.why_not}</span>`}
      </span>
    </li>
  `;
}

function HubRow({ found, settings, onDone }) {
  const list = useStore(tasks);
  const [hold, seen] = useSeen();
  const answer = usePlan(found.id, settings, seen);
  const [problem, setProblem] = useState("");
  const [task, setTask] = useState(null);
  const now = list.find((one) => one.id === task);
  const running = now && !taskEnded(now);
  const load = async () => {
    try {
      const answer = await api.downloadModel(found.id);
      const id = answer.task.id || answer.task;
      setTask(id);
      setProblem("");
      onTaskEnd(id, (ended) => {
        if (ended.state === "done") {
          tell(`${found.id} is on this disk`);
          onDone();
        }
      });
    } catch (error) {
      setProblem(error.message);
    }
  };
  return html`
    <li ref=${hold} class="row model-row">
      <span class="row-main">
        <b>${found.id}</b>
        <span class="soft number">${count(found.downloads)} downloads · ${count(found.likes)} likes</span>
      </span>
      <span class="row-facts">
        <${Fit} answer=${answer} />
        ${
          found.here
            ? html`<${Chip}>on this disk<//>`
            : running
              ? html`
                <span class="inline-meter">
                  <${Meter} share=${now.total ? now.done / now.total : null} label=${"Downloading " + found.id} />
                </span>
              `
              : html`
                <${Button}
                  small
                  onClick=${load}
                  aria-label=${
                    (now?.state === "failed" || now?.state === "cancelled" ? "Resume the download of " : "Download ") +
                    found.id
                  }
                >
                  ${now && now.state !== "done" ? "Resume" : "Download"}
                <//>
              `
        }
      </span>
      <${Problem}>${problem || (now?.state === "failed" ? now.message : "")}<//>
    </li>
  `;
}

function Hub({ words, settings, onDone }) {
  const late = useLater(words.trim(), 500);
  const asks = late.length >= 2;
  const [answer, problem] = useAsked((signal) => (asks ? api.searchModels(late, signal) : null), [late]);
  if (!asks) return null;
  return html`
    <${Card} title="On Hugging Face" note=${answer && !answer.offline ? `for “${late}”` : ""}>
      <${Problem}>${problem}<//>
      ${answer?.offline && html`<p class="note">${answer.offline}</p>`}
      ${!answer && !problem && html`<${Waiting}>Searching<//>`}
      ${
        answer &&
        !answer.offline &&
        !answer.results.length &&
        html`<p class="soft">No model has these words in its name. Try fewer of them.</p>`
      }
      ${
        answer?.results.length > 0 &&
        html`
          <ul class="rows">
            ${answer.results.map(
              (found) => html`<${HubRow} key=${found.id} found=${found} settings=${settings} onDone=${onDone} />`,
            )}
          </ul>
        `
      }
    <//>
  `;
}

function Convert({ model, onDone }) {
  const [bits, setBits] = useState("4");
  const [name, setName] = useState("");
  const [problem, setProblem] = useState("");
  const usual = `${model.name
    .split("/")
    .pop()
    .replace(/\.gguf$/, "")}-${bits}bit`;
  const send = async (event) => {
    event.preventDefault();
    try {
      const { task } = await api.convertModel(model.id, Number(bits), name || usual);
      setProblem("");
      onTaskEnd(task.id || task, (ended) => {
        if (ended.state === "done") onDone();
      });
    } catch (error) {
      setProblem(error.message);
    }
  };
  return html`
    <details>
      <summary>Make a smaller copy of it</summary>
      <p class="soft">
        A 4-bit copy takes about a quarter of the memory of a 16-bit model, and trains as QLoRA. The original
        stays.
      </p>
      <form class="fields" onSubmit=${send}>
        <div class="field">
          <span class="label">Bits</span>
          <${Segments}
            label="Bits per weight"
            name="bits"
            value=${bits}
            options=${["3", "4", "6", "8"].map((one) => [one, one])}
            onChange=${setBits}
          />
        </div>
        <${Field} label="Name" id="copy-name">
          <input
            id="copy-name"
            value=${name}
            placeholder=${usual}
            onInput=${(event) => setName(event.target.value)}
          />
        <//>
        <button class="button">Make the copy</button>
      </form>
      <${Problem}>${problem}<//>
    </details>
  `;
}

function Chosen({ model, settings, onDone }) {
  const answer = usePlan(model.id, settings, true);
  return html`
    <${Card} title=${model.name} kind="chosen-model" aria-label="The chosen model">
      ${!answer && html`<${Waiting}>Planning from its configuration<//>`}
      <${Problem}>${answer?.problem}<//>
      ${
        answer?.plan &&
        html`
          <p>${answer.plan.line}</p>
          ${answer.plan.peak_bytes !== null && html`<${MemoryBar} plan=${answer.plan} />`}
          <p class="soft">With the settings under Train. Nothing was loaded or downloaded for this.</p>
        `
      }
      <div class="actions">
        <${Button} kind="first" onClick=${() => go("data")}>Next: data<//>
      </div>
      <${Convert} model=${model} onDone=${onDone} />
      <p class="soft path">${shortPath(model.path)}</p>
    <//>
  `;
}

export function Place() {
  const [answer, problem, again] = useAsked(() => api.readModels(), []);
  const { model: chosenId, settings } = useStore(project);
  const [words, setWords] = useState("");
  const asked = words.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const models = (answer?.models || []).filter((one) =>
    asked.every((word) => `${one.name} ${one.architecture} ${one.kind}`.toLowerCase().includes(word)),
  );
  const chosen = answer?.models.find((one) => one.id === chosenId);
  const choose = (model) => {
    changeProject({ model: model.id, talked: null });
    tell(`${model.name} is chosen`);
  };
  return html`
    <${Heading} title="Model">
      Choose the model that you want to teach. Each shows what training it would take on this machine.
    <//>
    <div class="search">
      <${Icon} name="search" />
      <input
        type="search"
        aria-label="Search this disk and Hugging Face"
        placeholder="Search this disk and Hugging Face"
        value=${words}
        onInput=${(event) => setWords(event.target.value)}
      />
    </div>
    <${Problem} again=${again}>${problem}<//>
    ${answer && !chosen && html`<${Example} />`}
    <div class="two">
      <div class="stack">
        <${Card}
          title="On this disk"
          note=${answer?.models.length ? "memory and speed are predicted" : ""}
          actions=${html`<${Button} small onClick=${again}>Look again<//>`}
        >
          ${!answer && !problem && html`<${Waiting}>Looking through the stores<//>`}
          ${
            answer &&
            !answer.models.length &&
            html`
              <${Empty} icon="model" title="No models yet">
                Try the example above, or search for a model such as “Qwen3 0.6B 4bit” and download it. GGUF
                files and models of Ollama and LM Studio appear here by themselves.
              <//>
            `
          }
          ${
            answer?.models.length > 0 &&
            !models.length &&
            html`<p class="soft">Nothing on this disk has these words in its name.</p>`
          }
          ${
            models.length > 0 &&
            html`
              <ul class="rows" aria-label="Models on this disk">
                ${models.map(
                  (one) => html`
                    <${ModelRow}
                      key=${one.id}
                      model=${one}
                      chosen=${one.id === chosenId}
                      settings=${settings}
                      onChoose=${choose}
                    />
                  `,
                )}
              </ul>
            `
          }
          ${
            answer &&
            html`
              <details>
                <summary>Where the studio looked</summary>
                <ul class="plain">
                  ${answer.stores.map(
                    (one) => html`
                      <li key=${one.kind + one.path}>
                        <span class="path">${shortPath(one.path)}</span>${" "}
                        <span class="soft">${one.exists ? "" : "not there"}</span>
                      </li>
                    `,
                  )}
                </ul>
              </details>
            `
          }
        <//>
        <${Hub} words=${words} settings=${settings} onDone=${again} />
      </div>
      <div class="side">
        ${
          chosen
            ? html`<${Chosen} model=${chosen} settings=${settings} onDone=${again} />`
            : answer?.models.length
              ? html`
                <${Card} title="No model chosen">
                  <p class="soft">Select one in the list. You will see how its memory is used, part by part.</p>
                <//>
              `
              : null
        }
      </div>
    </div>
  `;
}
