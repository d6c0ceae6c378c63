// Components that several places use. Whatever comes from the server or the user is text in an element, never markup.
import { h } from "./vendor/preact.module.js";
import { useEffect, useRef, useState } from "./vendor/hooks.module.js";
import htm from "./vendor/htm.module.js";
import { bytes, counted, duration, percent } from "./format.js";
import * as api from "./api.js";
import { taskEnded, tell } from "./state.js";

export const html = htm.bind(h);

const ICONS = {
  model: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  data:
    "M4 6c0-1.7 3.6-3 8-3s8 1.3 8 3-3.6 3-8 3-8-1.3-8-3zM4 6v6c0 1.7 3.6 3 8 3s8-1.3 8-3V6" +
    "M4 12v6c0 1.7 3.6 3 8 3s8-1.3 8-3v-6",
  train: "M4 19V5M4 19h16M7 8c3 6 6 8 12 8",
  runs: "M8 6h12M8 12h12M8 18h12M4 6h.01M4 12h.01M4 18h.01",
  talk: "M5 5h14a2 2 0 012 2v8a2 2 0 01-2 2h-7l-5 4v-4H5a2 2 0 01-2-2V7a2 2 0 012-2z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  search: "M11 4a7 7 0 100 14 7 7 0 000-14zM16 16l4.5 4.5",
  drop: "M12 16V4M7 9l5-5 5 5M4 15v4a1 1 0 001 1h14a1 1 0 001-1v-4",
  close: "M6 6l12 12M18 6L6 18",
  check: "M5 12.5l4.5 4.5L19 7.5",
  up: "M6 15l6-6 6 6",
  down: "M6 9l6 6 6-6",
  back: "M15 5l-7 7 7 7",
};
// By its name above, or as a path of its own.
export const Icon = ({ name }) => html`
  <svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">
    <path d=${ICONS[name] || name} />
  </svg>
`;

export function Button({ kind = "", icon, children, small, busy, ...rest }) {
  return html`
    <button
      type="button"
      class=${`button ${kind} ${small ? "small" : ""} ${busy ? "busy" : ""}`}
      aria-busy=${busy ? "true" : undefined}
      ...${rest}
    >
      ${icon && html`<${Icon} name=${icon} />`}
      ${children}
    </button>
  `;
}

export const Heading = ({ title, children, actions }) => html`
  <header class="heading">
    <div>
      <h1 tabindex="-1">${title}</h1>
      ${children && html`<p class="soft">${children}</p>`}
    </div>
    ${actions && html`<div class="actions">${actions}</div>`}
  </header>
`;

export const Card = ({ title, note, actions, children, kind = "", ...rest }) => html`
  <section class=${"card " + kind} ...${rest}>
    ${
      title &&
      html`
        <div class="card-head">
          <h2>${title}</h2>
          ${note && html`<span class="soft">${note}</span>`}
          ${actions && html`<div class="actions">${actions}</div>`}
        </div>
      `
    }
    ${children}
  </section>
`;

// Content that is made only once it is looked at.
export function Fold({ title, open = false, children }) {
  const [is, set] = useState(open);
  return html`
    <details class="fold" open=${is} onToggle=${(event) => set(event.target.open)}>
      <summary>${title}</summary>
      ${is && html`<div class="stack">${children}</div>`}
    </details>
  `;
}

export const Empty = ({ icon, title, children, action }) => html`
  <div class="empty">
    <${Icon} name=${icon} />
    <h2>${title}</h2>
    <p class="soft">${children}</p>
    ${action}
  </div>
`;
export const Problem = ({ children, again }) =>
  children
    ? html`
      <p class="problem" role="alert">
        <span>${children}</span>
        ${again && html`<${Button} small onClick=${again}>Try again<//>`}
      </p>
    `
    : null;
export const Chip = ({ tone = "", children, title }) => html`
  <span class=${"chip " + tone} title=${title}>${children}</span>
`;
export const Waiting = ({ children }) => html`<p class="soft waiting" aria-busy="true">${children}</p>`;

export function Field({ label, help, children, id, wide }) {
  return html`
    <div class=${"field" + (wide ? " wide" : "")}>
      <label for=${id}>${label}</label>
      ${children}
      ${help && html`<p class="help" id=${id + "-help"}>${help}</p>`}
    </div>
  `;
}

// A row of exclusive choices, as a Mac's segmented control: one radio group, arrow keys move it.
export function Segments({ label, name, value, options, onChange }) {
  return html`
    <fieldset class="segments">
      <legend class="unseen">${label}</legend>
      ${options.map(
        ([one, words, note]) => html`
          <label key=${one} class=${one === value ? "on" : ""}>
            <input type="radio" name=${name} value=${one} checked=${one === value} onChange=${() => onChange(one)} />
            <span>${words}</span>${" "}
            ${note !== undefined && html`<span class="number soft">${note}</span>`}
          </label>
        `,
      )}
    </fieldset>
  `;
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that are not from this machine and not https have no clipboard; the old way has to do.
    const field = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

export function CopyButton({ text, children = "Copy" }) {
  const [done, set] = useState(false);
  useEffect(() => {
    if (done) {
      const timer = setTimeout(() => set(false), 1500);
      return () => clearTimeout(timer);
    }
  }, [done]);
  return html`
    <${Button}
      small
      icon=${done ? "check" : "copy"}
      onClick=${() => {
        copyText(text);
        set(true);
        tell("Copied");
      }}
    >
      ${done ? "Copied" : children}
    <//>
  `;
}

export const Command = ({ text, label = "The same as a command" }) =>
  text
    ? html`
      <div class="command">
        <div class="command-head">
          <span class="soft">${label}</span>
          <${CopyButton} text=${text} />
        </div>
        <pre tabindex="0" aria-label=${label}>
          ${text}
        </pre>
      </div>
    `
    : null;

export function Meter({ share, label, tone = "" }) {
  const known = share !== null && share !== undefined && Number.isFinite(share);
  return html`
    <div
      class=${"meter " + tone + (known ? "" : " unknown")}
      role="progressbar"
      aria-label=${label}
      aria-valuemin="0"
      aria-valuemax="100"
      aria-valuenow=${known ? Math.round(100 * share) : undefined}
    >
      <span style=${{ width: known ? percent(Math.min(1, Math.max(0, share)), 1) : undefined }}></span>
    </div>
  `;
}

// Memory by part as one bar against what the Mac has. The parts' names and sizes stand below: color is never the only
// sign.
export function MemoryBar({ plan }) {
  const { parts, peak_bytes: peak, limit_bytes: limit, fits } = plan;
  const whole = Math.max(limit, peak, 1);
  const shown = parts.filter((part) => part.bytes > 0);
  return html`
    <div class="memory">
      <div
        class="memory-bar"
        role="img"
        aria-label=${
          `${bytes(peak)} of ${bytes(limit)} at the peak: ` +
          shown.map((part) => `${part.name} ${bytes(part.bytes)}`).join(", ")
        }
      >
        ${shown.map(
          (part, n) => html`
            <span
              key=${part.name}
              class=${"fill c" + (n % 6)}
              style=${{ width: percent(part.bytes / whole, 2) }}
            ></span>
          `,
        )}
        ${peak > limit && html`<span class="limit" style=${{ left: percent(limit / whole, 2) }}></span>`}
      </div>
      <div class="memory-ends number">
        <span class=${fits ? "" : "bad"}>${bytes(peak)} at the peak</span>
        <span class="soft">${bytes(limit)} available</span>
      </div>
      <ul class="memory-parts">
        ${shown.map(
          (part, n) => html`
            <li key=${part.name}>
              <span class=${"dot c" + (n % 6)}></span>
              <span>${part.name}</span>
              <span class="number soft">${bytes(part.bytes)}</span>
            </li>
          `,
        )}
      </ul>
    </div>
  `;
}

export function TaskLine({ task }) {
  if (!task) return null;
  const share = task.total ? task.done / task.total : null;
  const told =
    task.unit === "bytes"
      ? `${bytes(task.done)} of ${bytes(task.total)}`
      : task.total
        ? `${counted(task.done, task.unit || "part")} of ${task.total}`
        : "";
  const tone = { failed: "bad", done: "good" }[task.state] || "";
  return html`
    <div class="task" role="group" aria-label=${task.title}>
      <div class="task-head">
        <span>${task.title}</span>
        ${
          taskEnded(task)
            ? html`<${Chip} tone=${tone}>${task.state}<//>`
            : html`
              <${Button}
                small
                onClick=${() => api.cancelTask(task.id).catch((error) => tell(error.message))}
                aria-label=${"Cancel: " + task.title}
              >
                Cancel
              <//>
            `
        }
      </div>
      ${!taskEnded(task) && html`<${Meter} share=${share} label=${task.title} />`}
      <p class=${"number " + (task.state === "failed" ? "bad" : "soft")}>
        ${[told, task.seconds_left ? duration(task.seconds_left) + " left" : "", task.message]
          .filter(Boolean)
          .join(" · ")}
      </p>
    </div>
  `;
}

// The browser's own modal dialog: focus stays inside, Escape closes it, the page behind is inert.
export function Dialog({ title, children, onClose, actions }) {
  const box = useRef(null);
  useEffect(() => {
    box.current.showModal();
  }, []);
  return html`
    <dialog
      ref=${box}
      aria-labelledby="dialog-title"
      onClose=${onClose}
      onClick=${(event) => event.target === box.current && onClose()}
    >
      <div class="dialog">
        <h2 id="dialog-title">${title}</h2>
        ${children}
        <div class="actions end">${actions}</div>
      </div>
    </dialog>
  `;
}

const STATES = {
  running: ["accent", "running"],
  queued: ["", "in the queue"],
  paused: ["warn", "paused"],
  done: ["good", "done"],
  stopped: ["warn", "stopped"],
  failed: ["bad", "failed"],
  killed: ["bad", "interrupted"],
};
// Asked for; the step is finished and saved first.
const ENDING = { pause: ["warn", "pausing"], stop: ["warn", "stopping"] };
export function StateChip({ state, ending }) {
  const [tone, words] = (state === "running" && ENDING[ending]) || STATES[state] || ["", state];
  return html`
    <${Chip} tone=${tone}>
      ${state === "running" && html`<span class="pulse" aria-hidden="true"></span>`}
      ${words}
    <//>
  `;
}

// Pages of a long list; the list itself never holds more than a page.
export function Pages({ page, pages, onPage, label }) {
  if (pages < 2) return null;
  return html`
    <nav class="pages" aria-label=${label}>
      <${Button} small disabled=${page === 0} onClick=${() => onPage(page - 1)}>Previous<//>
      <span class="number" aria-live="polite">Page ${page + 1} of ${pages}</span>
      <${Button} small disabled=${page >= pages - 1} onClick=${() => onPage(page + 1)}>Next<//>
    </nav>
  `;
}
