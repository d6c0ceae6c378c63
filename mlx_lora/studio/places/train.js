// Train: what to aim for, how, and what it will take; then the run itself.
import { useEffect, useRef, useState } from "../pages/vendor/hooks.module.js";
import {
  html,
  Button,
  Card,
  Chip,
  Command,
  Empty,
  Field,
  Heading,
  MemoryBar,
  Problem,
  Segments,
  Waiting,
} from "../pages/parts.js";
import {
  changeSettings,
  fieldProblems,
  go,
  linkTo,
  project,
  tell,
  useAsked,
  useLater,
  useStore,
  wholeSettings,
} from "../pages/state.js";
import { counted, lastPart } from "../pages/format.js";
import { Cards, USUAL, useCards } from "../pages/cards.js";
import { Example } from "../pages/example.js";
import { SettingsForm } from "../pages/settings_form.js";
import { LiveRun } from "../pages/live.js";
import { Sweep } from "../pages/sweep.js";
import * as api from "../pages/api.js";

export const title = "Train";
export const order = 30;
export const icon = "train";

const OBJECTIVES = {
  sft: "Imitate answers",
  dpo: "Prefer the better answer",
  orpo: "Imitate and prefer, without a reference",
  simpo: "Prefer by a margin, without a reference",
  cpo: "Prefer, with likelihood",
  kto: "Answers rated good or bad",
  reward: "Train a judge that scores answers",
  grpo: "Sample answers, learn from rewards",
  rloo: "Sample answers, leave one out",
  distill: "Learn from a teacher",
  classify: "Give texts labels, or numbers",
  rerank: "Order documents by a query",
};

const METHODS = {
  lora: "small adapter weights beside the frozen weights",
  rslora: "LoRA whose scale suits high ranks",
  dora: "LoRA that learns the size of each weight's direction, slower",
  "lora-plus": "LoRA whose second factor learns faster",
  "qa-lora": "LoRA that merges into the biases of a 4-bit model",
  pissa: "LoRA that begins at the weights' main directions",
  adalora: "LoRA that deals its rank to where it helps",
  relora: "LoRA in several rounds, for a higher rank in the end",
  full: "every weight; takes the most memory",
};

const optionOf = (groups, name) => groups.flatMap((group) => group.settings).find((one) => one.name === name);

function Goal({ groups, settings }) {
  const choose = (name, usual) => (event) => {
    changeSettings({ [name]: event.target.value === usual ? undefined : event.target.value });
  };
  const objective = settings.objective || "sft";
  const method = settings.method || "lora";
  const objectives = optionOf(groups, "objective")?.choices || Object.keys(OBJECTIVES);
  const methods = optionOf(groups, "method")?.choices || ["lora"];
  return html`
    <div class="fields">
      <${Field} label="Objective" id="objective">
        <select id="objective" onChange=${choose("objective", "sft")}>
          ${objectives.map(
            (one) => html`
              <option key=${one} value=${one} selected=${one === objective}>
                ${OBJECTIVES[one] ? `${OBJECTIVES[one]} (${one})` : one}
              </option>
            `,
          )}
        </select>
      <//>
      <${Field} label="Method" id="method" help=${METHODS[method]}>
        <select id="method" onChange=${choose("method", "lora")}>
          ${methods.map((one) => html`<option key=${one} value=${one} selected=${one === method}>${one}</option>`)}
        </select>
      <//>
    </div>
  `;
}

function Plan({ plan, problem }) {
  if (problem) return html`<${Problem}>${problem}<//>`;
  if (!plan) return html`<${Waiting}>Planning<//>`;
  if (plan.problems?.length) return null; // told at Start, and at their fields
  if (plan.peak_bytes === null) return html`<p class="note">${plan.line}</p>`;
  return html`
    <p class="verdict">
      <${Chip} tone=${plan.fits ? "good" : "bad"}>${plan.fits ? "fits" : "too large"}<//>${" "}
      <span>${plan.line}</span>
    </p>
    ${plan.warnings?.map((one) => html`<p class="note warned" key=${one}>${one}.</p>`)}
    <${MemoryBar} plan=${plan} />
  `;
}

const SUFFIX = /\.(gguf|jsonl?|csv|tsv|txt|md|parquet|xlsx)$/i; // “Qwen3-0.6B” has none
const slug = (text) =>
  text
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 40);
function unused(name, runs) {
  const taken = new Set(runs.map((one) => one.name));
  if (!taken.has(name)) return name;
  for (let n = 2; ; n++) if (!taken.has(`${name}-${n}`)) return `${name}-${n}`;
}

// A name by data and model.
const nameOf = (sets, model) =>
  slug(`${lastPart(sets[0]?.path || "run").replace(SUFFIX, "")}-${lastPart(model || "model").replace(SUFFIX, "")}`) ||
  "run";

// Why a run cannot be started now: what is wrong in the fields, or what the server says of them. Empty: it can.
function reasons(wrong, plan, settings) {
  const fields = Object.values(wrong).map(({ name, problem }) => `${name}: ${problem}`);
  if (fields.length || !plan) return fields;
  if (plan.problems?.length) return plan.problems;
  if (plan.waits) return ["The data is being read; how long this run is depends on it."];
  if (plan.fits === false && plan.peak_bytes !== null && settings.memory_check !== false)
    return [`${plan.line} To try it anyway, turn “Memory check” off.`];
  return [];
}

function Start({ whole, card, plan, runs, onStarted }) {
  const { model, sets, settings } = useStore(project);
  const wrong = useStore(fieldProblems);
  const [name, setName] = useState("");
  const [problem, setProblem] = useState("");
  const [sending, setSending] = useState("");
  const busy = runs.some((one) => one.state === "running");
  const usual = unused(nameOf(sets, model), runs);
  const why = reasons(wrong, plan, settings);
  const stopped = sending || why.length > 0;
  useEffect(() => setProblem(""), [JSON.stringify(whole), name]);
  const send = async (queue) => {
    setSending(queue ? "queue" : "now");
    try {
      const { run } = await api.startRun(whole, card, name.trim() || usual, queue);
      setProblem("");
      setName("");
      tell(queue ? "The run waits in the queue" : "The run was started");
      onStarted(run.id || run);
    } catch (error) {
      setProblem(error.message);
    }
    setSending("");
  };
  return html`
    <div class="start">
      <${Field} label="Name of the run" id="run-name">
        <input
          id="run-name"
          value=${name}
          placeholder=${usual}
          spellcheck="false"
          onInput=${(event) => setName(event.target.value)}
        />
      <//>
      <div class="actions">
        <${Button}
          kind="first"
          busy=${sending === "now"}
          disabled=${stopped}
          aria-describedby="why-not"
          onClick=${() => send(false)}
        >
          ${sending === "now" ? "Starting" : "Start training"}
        <//>
        <${Button}
          busy=${sending === "queue"}
          disabled=${stopped}
          aria-describedby="why-not"
          onClick=${() => send(true)}
        >
          ${sending === "queue" ? "Adding" : "Add to queue"}
        <//>
      </div>
      <div id="why-not" aria-live="polite">
        ${
          why.length > 0 &&
          html`
            <p class="problem">
              <span>
                <b>Not ready to start.</b> ${why.join("; ")}
              </span>
            </p>
          `
        }
      </div>
      ${
        busy &&
        html`
          <p class="soft">
            A run is going on, and one trains at a time: in the queue, this one starts when that one has ended.
          </p>
        `
      }
      <${Problem}>${problem}<//>
    </div>
  `;
}

function Queue({ runs, onChange }) {
  const [answer, , again] = useAsked(() => api.readQueue(), [runs.map((one) => one.id + one.state).join()]);
  const list = (answer?.queue || answer?.runs || []).map((one) =>
    typeof one === "string" ? runs.find((run) => run.id === one) || { id: one, name: one } : one,
  );
  if (!list.length) return null;
  const act = (ask) =>
    ask.then(
      () => {
        again();
        onChange();
      },
      (error) => tell(error.message),
    );
  return html`
    <${Card} title="Queue" note="starts one after the other">
      <ol class="rows">
        ${list.map(
          (one, n) => html`
            <li key=${one.id} class="row">
              <span class="row-main">
                <b>${one.name}</b>
              </span>
              <span class="row-facts">
                <${Button}
                  small
                  kind="plain"
                  icon="up"
                  disabled=${n === 0}
                  aria-label=${`Move ${one.name} up`}
                  onClick=${() => act(api.moveInQueue(one.id, n - 1))}
                />
                <${Button}
                  small
                  kind="plain"
                  icon="down"
                  disabled=${n === list.length - 1}
                  aria-label=${`Move ${one.name} down`}
                  onClick=${() => act(api.moveInQueue(one.id, n + 1))}
                />
                <${Button}
                  small
                  kind="plain"
                  icon="close"
                  aria-label=${`Remove ${one.name} from the queue`}
                  onClick=${() => act(api.removeFromQueue(one.id))}
                />
              </span>
            </li>
          `,
        )}
      </ol>
    <//>
  `;
}

const Missing = ({ model }) => html`
  <${Card}>
    ${
      model
        ? html`
          <${Empty}
            icon="data"
            title="Add data first"
            action=${html`<${Button} kind="first" onClick=${() => go("data")}>Add data<//>`}
          >
            The plan needs to know how long your rows are.
          <//>
        `
        : html`
          <${Empty}
            icon="model"
            title="Choose a model first"
            action=${html`<${Button} kind="first" onClick=${() => go("model")}>Choose a model<//>`}
          >
            Then add data. Training starts here.
          <//>
        `
    }
  <//>
  ${!model && html`<${Example} />`}
`;

function Setup({ groups, runs, onStarted }) {
  const all = useStore(project);
  const { model, sets, settings } = all;
  const chosen = all.preset || USUAL;
  const whole = wholeSettings(all);
  const late = useLater(whole, 250);
  const needed = Boolean(model && (sets.length || settings.objective === "distill"));
  const cards = useCards(late, chosen, needed);
  // While a plan is made again, the one before stays, marked; what is started is told by the new one.
  const now = cards.plans[chosen];
  const before = useRef(null);
  const plan = now || before.current;
  const current = JSON.stringify(late) === JSON.stringify(whole) ? now : null;
  before.current = plan;
  const blocked = reasons(useStore(fieldProblems), current, settings).length > 0;
  if (!needed) return html`<${Missing} model=${model} />`;
  return html`
    <div class="two">
      <div class="stack">
        <${Card}
          title="How much to train"
          note=${`${lastPart(model)} · ${sets.map((one) => lastPart(one.path)).join(" + ")}`}
        >
          <${Cards} whole=${late} cards=${cards} chosen=${chosen} />
        <//>
        <${Changes} groups=${groups} settings=${settings} plan=${plan} />
        <${Sweep} whole=${whole} card=${chosen} name=${nameOf(sets, model)} stopped=${blocked} />
      </div>
      <div class="side">
        <${Card}
          title="Plan"
          kind=${now ? "plan" : "plan stale"}
          note=${plan && !now ? html`<span class="waiting">planning again</span>` : ""}
        >
          <${Plan} plan=${plan} problem=${cards.problem} />
          ${plan?.task && html`<p class="soft waiting">Reading the data for an exact plan</p>`}
          <${Start} whole=${whole} card=${chosen} plan=${current} runs=${runs} onStarted=${onStarted} />
          ${
            plan &&
            html`
              <details>
                <summary>The same as a command</summary>
                <${Command} text=${plan.command} label="Command" />
                ${plan.run_yaml && html`<${Command} text=${plan.run_yaml} label="run.yaml" />`}
              </details>
            `
          }
        <//>
      </div>
    </div>
  `;
}

// The settings behind the cards. They open by themselves where the server says that something is wrong in one of them.
function Changes({ groups, settings, plan }) {
  const said = plan?.said || {};
  const [open, set] = useState(false);
  const names = new Set(groups.flatMap((group) => group.settings).map((one) => one.name));
  const changed = Object.keys(settings).filter((name) => names.has(name)).length;
  const wrong = Object.keys(said).length;
  return html`
    <details class="changes" open=${open} onToggle=${(event) => set(event.target.open)}>
      <summary>
        Change settings${" "}
        <span class="number">
          ${wrong > 0 && html`<span class="bad">${counted(wrong, "field")} to look at</span>`}
          ${!wrong && changed > 0 && `${counted(changed, "setting")} chosen`}
        </span>
      </summary>
      ${
        open &&
        html`
          <div class="stack">
            <${Card} title="Goal">
              <${Goal} groups=${groups} settings=${settings} />
            <//>
            <${SettingsForm}
              groups=${groups}
              settings=${settings}
              said=${said}
              warned=${plan?.warned || {}}
              own=${plan?.own || {}}
              chosen=${plan?.chosen || {}}
            />
          </div>
        `
      }
    </details>
  `;
}

export function Place({ path }) {
  const [groups, problem, again] = useAsked(() => api.readSettings(), []);
  const [answer, , look] = useAsked(() => api.readRuns(), [], 4000);
  const runs = answer?.runs || [];
  const running = runs.filter((one) => one.state === "running");
  const asked = path[0] === "new" ? null : path[0] || null; // a run, or nothing for a new one
  const [view, setView] = useState(asked ? "run" : path[0] ? "setup" : null);
  const [picked, pick] = useState(asked);
  // Opened while a run goes on: that run is what one came to see.
  useEffect(() => {
    if (view === null && answer) {
      setView(running.length ? "run" : "setup");
      if (running.length) pick(running[0].id);
    }
  }, [answer]);
  useEffect(() => {
    if (asked) {
      pick(asked);
      setView("run");
    } else if (path[0]) setView("setup");
  }, [path[0]]);
  const started = (id) => {
    look();
    pick(id);
    setView("run");
    scrollTo(0, 0);
  };
  const shown = picked || running[0]?.id || null;
  const views = [
    ["setup", "New run"],
    ["run", "Live", shown && running.length ? running.length : undefined],
  ];
  return html`
    <${Heading}
      title="Train"
      actions=${html`
        <${Segments} label="What to show" name="train-view" value=${view} options=${views} onChange=${setView} />
      `}
    >
      ${
        view === "run"
          ? "The run as it goes. It does not need this page: close it, and it goes on."
          : "Choose how much to train; each card shows the run that it starts."
      }
    <//>
    <${Problem} again=${again}>${problem}<//>
    ${
      view === "run"
        ? html`
          <div class="stack">
            ${
              running.length > 1 &&
              html`
                <${Segments}
                  label="Which run"
                  name="which"
                  value=${shown}
                  options=${running.map((one) => [one.id, one.name])}
                  onChange=${pick}
                />
              `
            }
            ${
              shown
                ? html`<${LiveRun} key=${shown} id=${shown} onState=${look} />`
                : html`
                  <${Card}>
                    <${Empty} icon="train" title="Nothing is training">
                      Start a run under “New run”. One that was started in a terminal appears here by itself.
                    <//>
                  <//>
                `
            }
            <${Queue} runs=${runs} onChange=${look} />
            ${
              shown &&
              html`
                <p>
                  <a href=${linkTo("runs", shown)}>Notes, settings and more of this run</a>
                </p>
              `
            }
          </div>
        `
        : groups
          ? html`
            <div class="stack">
              <${Setup} groups=${groups.groups} runs=${runs} onStarted=${started} />
              <${Queue} runs=${runs} onChange=${look} />
            </div>
          `
          : (!problem && html`<${Waiting}>Reading the settings<//>`)
    }
  `;
}
