// Runs: every run of this machine that the studio knows, those of a terminal too, drawn a page of the list at a time.
import { useState } from "../pages/vendor/hooks.module.js";
import {
  html,
  Button,
  Card,
  Chip,
  Command,
  Dialog,
  Empty,
  Fold,
  Heading,
  Icon,
  Pages,
  Problem,
  StateChip,
  Waiting,
} from "../pages/parts.js";
import { go, linkTo, onTaskEnd, tell, useAsked } from "../pages/state.js";
import { bytes, count, duration, lastPart, loss, percent, rate, shortPath, value, when } from "../pages/format.js";
import { LiveRun } from "../pages/live.js";
import { Answers } from "../pages/answers.js";
import { Compare } from "../pages/compare.js";
import * as api from "../pages/api.js";

export const title = "Runs";
export const order = 40;
export const icon = "runs";

const ON_PAGE = 25;
const MOST_COMPARED = 6;

const COLUMNS = [
  ["name", "Run", (run) => run.name.toLowerCase()],
  ["state", "State", (run) => run.state],
  ["step", "Steps", (run) => run.step || 0],
  ["loss", "Loss", (run) => run.loss ?? Infinity],
  ["val_loss", "Held-out", (run) => run.val_loss ?? Infinity],
  ["tokens_per_s", "Tokens/s", (run) => run.tokens_per_s || 0],
  ["peak_bytes", "Peak", (run) => run.peak_bytes || 0],
  ["seconds", "Time", (run) => run.seconds || 0],
  ["started", "Started", (run) => run.started || 0],
];

function sorted(runs, [name, down]) {
  const of = COLUMNS.find(([one]) => one === name)[2];
  return runs
    .map((run) => [of(run), run])
    .sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1))
    .map(([, run]) => run);
}

function Row({ run, picked, onPick, full }) {
  return html`
    <tr class=${picked ? "picked" : ""}>
      <td class="pick">
        <input
          type="checkbox"
          checked=${picked}
          disabled=${!picked && full}
          aria-label=${"Compare " + run.name}
          onChange=${() => onPick(run.id)}
        />
      </td>
      <th scope="row">
        <a href=${linkTo("runs", run.id)}>${run.name}</a>
        <span class="soft">
          ${[lastPart(run.model), run.objective, run.method, run.elsewhere ? shortPath(run.path) : ""]
            .filter(Boolean)
            .join(" · ")}
        </span>
      </th>
      <td class="state">
        <${StateChip} state=${run.state} ending=${run.ending} />
      </td>
      <td class="number" data-label="steps">
        ${count(run.step || 0)}
        <span class="soft">/${count(run.steps)}</span>
      </td>
      <td class="number" data-label="loss">${loss(run.loss)}</td>
      <td class="number" data-label="held-out" title=${run.val_step ? `at step ${run.val_step}` : ""}>
        ${loss(run.val_loss)}
      </td>
      <td class="number" data-label="tokens/s">${rate(run.tokens_per_s)}</td>
      <td class="number" data-label="peak">${bytes(run.peak_bytes)}</td>
      <td class="number" data-label="time">${duration(run.seconds)}</td>
      <td class="number started" data-label="started">${when(run.started)}</td>
    </tr>
  `;
}

function List({ runs }) {
  const [words, setWords] = useState("");
  const [order, setOrder] = useState(["started", true]);
  const [page, setPage] = useState(0);
  const [picked, setPicked] = useState([]);
  const asked = words.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const found = sorted(
    runs.filter((run) =>
      asked.every((word) =>
        `${run.name} ${run.state} ${run.model} ${run.objective} ${run.method}`.toLowerCase().includes(word),
      ),
    ),
    order,
  );
  const pages = Math.max(1, Math.ceil(found.length / ON_PAGE));
  const at = Math.min(page, pages - 1);
  const pick = (id) => setPicked(picked.includes(id) ? picked.filter((one) => one !== id) : [...picked, id]);
  const sort = (name) =>
    setOrder(order[0] === name ? [name, !order[1]] : [name, !["name", "state", "loss", "val_loss"].includes(name)]);
  return html`
    <div class="toolbar">
      <div class="search">
        <${Icon} name="search" />
        <input
          type="search"
          aria-label="Search runs"
          placeholder="Search by name, model, state"
          value=${words}
          onInput=${(event) => {
            setWords(event.target.value);
            setPage(0);
          }}
        />
      </div>
      <${Button}
        kind=${picked.length > 1 ? "first" : ""}
        disabled=${picked.length < 2}
        onClick=${() => go("runs", "compare", picked.join(","))}
      >
        ${picked.length > 1 ? `Compare ${picked.length} runs` : "Compare"}
      <//>
    </div>
    <p class="soft" role="status">
      ${count(found.length)} of ${count(runs.length)} runs.${" "}
      ${
        picked.length < 2
          ? "Check two or more to compare them."
          : picked.length >= MOST_COMPARED
            ? `${MOST_COMPARED} are the most.`
            : ""
      }
    </p>
    <div class="scroll" tabindex="0" role="region" aria-label="Runs">
      <table class="runs">
        <thead>
          <tr>
            <td class="pick">
              <span class="unseen">Compare</span>
            </td>
            ${COLUMNS.map(
              ([name, title], n) => html`
                <th
                  key=${name}
                  scope="col"
                  class=${n > 1 ? "number" : ""}
                  aria-sort=${order[0] === name ? (order[1] ? "descending" : "ascending") : undefined}
                >
                  <button type="button" onClick=${() => sort(name)}>
                    ${title}
                    <span class="sorted" aria-hidden="true">
                      ${order[0] === name ? (order[1] ? " ↓" : " ↑") : ""}
                    </span>
                  </button>
                </th>
              `,
            )}
          </tr>
        </thead>
        <tbody>
          ${found.slice(at * ON_PAGE, (at + 1) * ON_PAGE).map(
            (run) => html`
              <${Row}
                key=${run.id}
                run=${run}
                picked=${picked.includes(run.id)}
                full=${picked.length >= MOST_COMPARED}
                onPick=${pick}
              />
            `,
          )}
        </tbody>
      </table>
    </div>
    <${Pages} page=${at} pages=${pages} onPage=${setPage} label="Pages of runs" />
  `;
}

function Notes({ run }) {
  const [text, setText] = useState(run.notes || "");
  const [kept, setKept] = useState(run.notes || "");
  const [problem, setProblem] = useState("");
  const keep = async () => {
    if (text === kept) return;
    try {
      await api.writeNotes(run.id, text);
      setKept(text);
      setProblem("");
      tell("The notes are saved");
    } catch (error) {
      setProblem(error.message);
    }
  };
  return html`
    <${Card} title="Notes" note=${text === kept ? "" : "not saved yet"}>
      <textarea
        rows="4"
        aria-label="Notes"
        placeholder="What did you try, and what did you see?"
        value=${text}
        onInput=${(event) => setText(event.target.value)}
        onBlur=${keep}
      ></textarea>
      <${Problem}>${problem}<//>
    <//>
  `;
}

const TONES = {
  kept: "good",
  learned: "good",
  "better than the base": "good",
  "slightly forgotten": "warn",
  forgotten: "bad",
  "worse than the base": "bad",
};

function Forgetting({ run, again }) {
  const { forgetting, forgetting_command: command } = run;
  const [problem, setProblem] = useState("");
  const [busy, setBusy] = useState(false);
  const measure = async () => {
    try {
      const { task } = await api.measureForgetting(run.id);
      setProblem("");
      setBusy(true);
      onTaskEnd(task.id, (ended) => {
        setBusy(false);
        setProblem(ended.state === "failed" ? ended.message : "");
        again();
      });
    } catch (error) {
      setProblem(error.message);
    }
  };
  const ready = run.adapter && !["running", "queued"].includes(run.state);
  const button =
    ready &&
    html`
      <${Button} small onClick=${measure} busy=${busy} disabled=${busy}>
        ${busy ? "Measuring" : forgetting ? "Measure again" : "Measure"}
      <//>
    `;
  if (!command) return null;
  if (!forgetting)
    return html`
      <${Card} title="What was forgotten" actions=${button}>
        <p class="soft">
          Not measured yet. This compares the base and the adapter on your task, on general text and chat, and
          on questions with known answers.${ready ? "" : " It can be measured when the run has ended."}
        </p>
        <${Problem}>${problem}<//>
        <${Command} text=${command} label="The same as a command" />
      <//>
    `;
  return html`
    <${Card} title="What was forgotten" actions=${button}>
      <${Problem}>${problem}<//>
      <p>${forgetting.sentence}</p>
      <div class="scroll" tabindex="0" role="region" aria-label="What was forgotten">
        <table>
          <thead>
            <tr>
              <th scope="col">Set</th>
              <th scope="col" class="number">Base</th>
              <th scope="col" class="number">Adapter</th>
              <th scope="col" class="number">Change</th>
              <th scope="col">Verdict</th>
            </tr>
          </thead>
          <tbody>
            ${(forgetting.rows || []).map(
              (one) => html`
                <tr key=${one.set}>
                  <th scope="row">${one.set}</th>
                  <td class="number">${loss(one.base)}</td>
                  <td class="number">${loss(one.adapter)}</td>
                  <td class="number">
                    ${one.change > 0 ? "+" : ""}
                    ${loss(one.change)}
                  </td>
                  <td>
                    <${Chip} tone=${TONES[one.verdict] || ""}>${one.verdict}<//>
                  </td>
                </tr>
              `,
            )}
          </tbody>
        </table>
      </div>
      ${
        forgetting.probes &&
        html`
          <p class="number">
            Questions answered right: ${forgetting.probes.right} of ${forgetting.probes.of}, base${" "}
            ${forgetting.probes.base_right}
            ${forgetting.probes.of ? ` (${percent(forgetting.probes.right / forgetting.probes.of)})` : ""}
          </p>
        `
      }
    <//>
  `;
}

const Settings = ({ settings }) => html`
  <${Card} title="Settings">
    <details>
      <summary>All settings of this run</summary>
      <div class="scroll" tabindex="0" role="region" aria-label="Settings">
        <table>
          <tbody>
            ${Object.entries(settings || {}).map(
              ([name, one]) => html`
                <tr key=${name}>
                  <th scope="row">${name}</th>
                  <td class="wrap">${value(one)}</td>
                </tr>
              `,
            )}
          </tbody>
        </table>
      </div>
    </details>
  <//>
`;

// A run in another place of the disk is only taken off the list: its folder may have other things in it.
function Delete({ run, onDone }) {
  const [open, setOpen] = useState(false);
  const [problem, setProblem] = useState("");
  const leaves = run.elsewhere;
  const send = async () => {
    try {
      await api.deleteRun(run.id, run.name);
      tell(leaves ? `${run.name} left the list` : `${run.name} was deleted`);
      onDone();
    } catch (error) {
      setProblem(error.message);
    }
  };
  const close = () => {
    setOpen(false);
    setProblem("");
  };
  return html`
    <${Button} kind="danger" onClick=${() => setOpen(true)}>${leaves ? "Take off the list" : "Delete"}<//>
    ${
      open &&
      html`
        <${Dialog}
          title=${leaves ? `Take “${run.name}” off the list?` : `Delete “${run.name}”?`}
          onClose=${close}
          actions=${html`
            <${Button} onClick=${close}>Cancel<//>
            <${Button} kind="danger solid" onClick=${send}>${leaves ? "Take it off" : "Delete the run"}<//>
          `}
        >
          <p>
            ${
              leaves
                ? "It was trained in a terminal. Its folder stays where it is; delete it there if you want it gone."
                : "Its adapter, checkpoints, numbers and notes go with it. This cannot be undone."
            }
          </p>
          <p class="soft path">${shortPath(run.path)}</p>
          <${Problem}>${problem}<//>
        <//>
      `
    }
  `;
}

function Detail({ id }) {
  const [run, problem, again] = useAsked((signal) => api.readRun(id, signal), [id]);
  return html`
    <a class="back" href=${linkTo("runs")}>
      <${Icon} name="back" />
      All runs
    </a>
    <${Heading} title=${run?.name || "Run"} actions=${run && html`<${Delete} run=${run} onDone=${() => go("runs")} />`}>
      ${run ? [lastPart(run.model), run.objective, run.method].filter(Boolean).join(" · ") : ""}
    <//>
    <${Problem} again=${again}>${problem}<//>
    ${
      run &&
      html`
        <div class="stack">
          <${LiveRun}
            key=${id}
            id=${id}
            title=${["running", "queued"].includes(run.state) ? "Progress" : "Result"}
            onState=${again}
            more=${(now, look) => html`<${Answers} key=${"answers" + id} run=${now} again=${look} />`}
          />
          <${Fold} title="Notes, what was forgotten, command and settings">
          <${Notes} key=${"notes" + id} run=${run} />
          <${Forgetting} run=${run} again=${again} />
          <${Card} title="Repeat this run">
            <${Command} text=${run.command} label="Command" />
            ${
              run.run_yaml &&
              html`
                <details>
                  <summary>run.yaml</summary>
                  <${Command} text=${run.run_yaml} label="run.yaml" />
                </details>
              `
            }
            <p class="soft path">${shortPath(run.path)}</p>
          <//>
          <${Settings} settings=${run.settings} />
          <//>
        </div>
      `
    }
  `;
}

function All() {
  const [answer, problem, again] = useAsked(() => api.readRuns(), [], 4000);
  return html`
    <${Heading}
      title="Runs"
      actions=${html`<${Button} kind="first" onClick=${() => go("train", "new")}>New run<//>`}
    >
      Everything that was trained here, in the studio or in a terminal.
    <//>
    <${Problem} again=${again}>${problem}<//>
    ${!answer && !problem && html`<${Waiting}>Reading the runs<//>`}
    ${
      answer &&
      html`
        <${Card}>
          ${
            answer.runs.length
              ? html`<${List} runs=${answer.runs} />`
              : html`
                <${Empty}
                  icon="runs"
                  title="No runs yet"
                  action=${html`<${Button} kind="first" onClick=${() => go("train", "new")}>Train a model<//>`}
                >
                  Runs that you start in the studio appear here, and so do those that you start in a terminal with
                  mlx-lora train.
                <//>
              `
          }
        <//>
      `
    }
  `;
}

export function Place({ path }) {
  if (path[0] === "compare") {
    const ids = (path[1] || "").split(",").filter(Boolean);
    return html`<${Compare} key=${path[1]} ids=${ids.slice(0, MOST_COMPARED)} />`;
  }
  return path[0] ? html`<${Detail} key=${path[0]} id=${path[0]} />` : html`<${All} />`;
}
