// Questions and answers of a run: what is expected, what the base says, what the adapter says, side by side.
import { useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Command, Problem } from "./parts.js";
import { onTaskEnd, useAsked } from "./state.js";
import { counted, lastPart } from "./format.js";
import * as api from "./api.js";

const Mark = ({ right }) =>
  right === null
    ? null
    : html`
      <b class=${right ? "good" : "bad"} role="img" aria-label=${right ? "right" : "wrong"}>
        ${right ? "✓" : "✗"}${" "}
      </b>
    `;

function Table({ found }) {
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label="Questions and answers">
      <table class="questions">
        <thead>
          <tr>
            <th scope="col">Question</th>
            <th scope="col">Expected</th>
            ${found.models.map(
              (name) => html`<th key=${name} scope="col">${name[0].toUpperCase() + name.slice(1)}</th>`,
            )}
          </tr>
        </thead>
        <tbody>
          ${found.rows.map(
            (row, n) => html`
              <tr key=${n}>
                <td class="wrap">${row.question}</td>
                <td class="wrap">${row.expected}</td>
                ${row.said.map(
                  (one, m) => html`
                    <td key=${m} class="wrap">
                      <${Mark} right=${one.right} />
                      ${one.text}
                    </td>
                  `,
                )}
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
  `;
}

function Found({ found }) {
  return html`
    <p>
      ${found.loss}. ${found.right && found.right + "."}
    </p>
    ${found.seen && html`<p class="note">${found.seen}.</p>`}
    ${found.rows.length > 0 && html`<${Table} found=${found} />`}
    <p class="soft">
      Measured on ${found.source}, ${found.date}.
      ${found.rows.length ? " The models always take their most likely token." : ""}
    </p>
  `;
}

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
  const ready = run.adapter && !["running", "queued"].includes(run.state);
  const found = run.evaluation;
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
      ${found ? html`<${Found} found=${found} />` : html`<p class="soft">${words}</p>`}
      <${Problem}>${problem}<//>
      <${Command}
        text=${sent?.command || (data === "" && !found ? run.evaluation_command : "")}
        label="The same as a command"
      />
    <//>
  `;
}
