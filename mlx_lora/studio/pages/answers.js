// Questions and answers of a run: what is expected, what the base says, what the adapter says, side by side.
import { useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Command, Problem } from "./parts.js";
import { onTaskEnd, useAsked } from "./state.js";
import { counted, lastPart } from "./format.js";
import * as api from "./api.js";

// New words first: they tell whether it knows more than the rows it has seen.
const FROM = ["in new words", "measured later", "in your words"];
// All answers of a run, from its end and of `evaluate`, each with its number for a tick.
export function answersOf(run) {
  const own = run.answers || [];
  return [
    ...own.map((one, index) => ({
      index,
      from: one.new_words ? "in new words" : "in your words",
      question: one.question,
      expected: one.expected,
      base: { text: one.base, right: one.base_right },
      adapter: { text: one.adapter, right: one.ticked ?? one.right },
    })),
    ...(run.evaluation?.rows || []).map(({ question, expected, said }, n) => ({
      index: own.length + n,
      from: "measured later",
      question,
      expected,
      base: said[0],
      adapter: said[said.length - 1],
    })),
  ].sort((one, other) => FROM.indexOf(one.from) - FROM.indexOf(other.from));
}

const WORDS = new Map([
  [true, ["✓", "right", "good"]],
  [false, ["✗", "wrong", "bad"]],
  [null, ["–", "not checked", "soft"]],
]);
export function Mark({ right = null }) {
  const [sign, words, kind] = WORDS.get(right) || WORDS.get(null);
  return html`<b class=${kind} role="img" aria-label=${words} title=${words}>${sign}</b>`;
}

// A person may say that an answer is right or wrong; pressed again, it is taken back.
function Ticks({ row, onTick }) {
  return html`
    <span class="ticks" role="group" aria-label=${"Is this answer right? " + row.question}>
      ${[true, false].map((value) => {
        const [sign, words, kind] = WORDS.get(value);
        const on = row.adapter.right === value;
        return html`
          <button
            key=${words}
            type="button"
            class=${on ? kind : ""}
            aria-pressed=${on}
            aria-label=${words}
            title=${on ? `It counts as ${words}. Press to take your tick back.` : `Count it as ${words}`}
            onClick=${() => onTick(row.index, on ? null : value)}
          >
            ${sign}
          </button>
        `;
      })}
    </span>
  `;
}

export const FIRST = 8; // rows that are shown at once

function Table({ rows, onTick }) {
  const [all, show] = useState(false);
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label="Questions and answers">
      <table class="questions">
        <thead>
          <tr>
            ${["Question", "Expected", "Base", "Adapter"].map((one) => html`<th key=${one} scope="col">${one}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${(all ? rows : rows.slice(0, FIRST)).map(
            (row) => html`
              <tr key=${row.index}>
                <td class="wrap">
                  ${row.question}
                  <span class="soft from">${row.from}</span>
                </td>
                <td class="wrap" data-label="expected">${row.expected}</td>
                <td class="wrap" data-label="base">
                  <${Mark} right=${row.base.right} /> ${row.base.text}
                </td>
                <td class="wrap" data-label="adapter">
                  ${row.adapter.text}
                  <${Ticks} row=${row} onTick=${onTick} />
                </td>
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
    ${
      rows.length > FIRST &&
      html`<${Button} small onClick=${() => show(!all)}>${all ? "Show fewer" : `Show all ${rows.length}`}<//>`
    }
  `;
}

const Measured = ({ found }) => html`
  <p>
    ${found.loss}. ${found.right && found.right + "."}
  </p>
  ${found.seen && html`<p class="note">${found.seen}.</p>`}
  <p class="soft">Measured on ${found.source}, ${found.date}.</p>
`;

// Asks on the rows that the run held out, or on a set of the Data place.
export function Answers({ run, again }) {
  const held = (run.data?.splits?.test || run.data?.splits?.valid)?.rows || 0;
  const [answer] = useAsked(() => api.readSets(), []);
  const sets = answer?.sets || [];
  const [chosen, choose] = useState(null);
  const [sent, setSent] = useState(null);
  const [problem, setProblem] = useState("");
  if (run.objective !== "sft") return null;
  const data = chosen ?? (held ? "" : sets[0]?.path);
  const busy = Boolean(sent?.busy);
  const ask = async () => {
    setProblem("");
    try {
      const { task, command } = await api.askBoth(run.id, data);
      setSent({ command, busy: true });
      onTaskEnd(task.id, (ended) => {
        setSent((one) => ({ ...one, busy: false }));
        setProblem(ended.state === "failed" ? ended.message : "");
        again();
      });
    } catch (error) {
      setProblem(error.message);
    }
  };
  const tick = (index, right) =>
    api.tickAnswer(run.id, index, right).then(
      () => {
        setProblem("");
        again();
      },
      (error) => setProblem(error.message),
    );
  const ready = run.adapter && !["running", "queued"].includes(run.state);
  const found = run.evaluation;
  const rows = answersOf(run);
  const source =
    ready &&
    html`
      <select
        id="asked-of"
        aria-label="Questions from"
        value=${data}
        disabled=${busy}
        onChange=${(event) => choose(event.target.value)}
      >
        ${held > 0 && html`<option value="">${counted(held, "held-out row")} of this run</option>`}
        ${sets.map((one) => html`<option key=${one.path} value=${one.path}>${lastPart(one.path)}</option>`)}
      </select>
    `;
  const button =
    ready &&
    data !== undefined &&
    html`
      ${source}
      <${Button} small onClick=${ask} busy=${busy} disabled=${busy}>
        ${busy ? "Asking" : found ? "Ask again" : "Ask both"}
      <//>
    `;
  const words = ready
    ? data === undefined
      ? "The run held no rows out. Add a file with questions and answers in Data, then ask them here."
      : "Not asked yet. Base and adapter answer the same questions, and their answers stand beside the expected ones."
    : "Base and adapter can be asked when the run has ended.";
  return html`
    <${Card} title="Questions and answers" actions=${button}>
      ${rows.length > 0 && html`<${Table} rows=${rows} onTick=${tick} />`}
      ${found && html`<${Measured} found=${found} />`}
      ${
        !found &&
        html`
          <p class="soft">
            ${
              rows.length
                ? "The models always take their most likely token. Tick what is judged wrongly; your tick counts."
                : words
            }
          </p>
        `
      }
      <${Problem}>${problem}<//>
      <${Command}
        text=${sent?.command || (data === "" && !rows.length ? run.evaluation_command : "")}
        label="The same as a command"
      />
    <//>
  `;
}
