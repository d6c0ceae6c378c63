// Search the learning rate before a run: many short runs at once, compared by their held-out loss.
import { useState } from "./vendor/hooks.module.js";
import { html, Button, Card, CopyButton, Command, Problem, TaskLine, Waiting } from "./parts.js";
import { changeSettings, taskEnded, tasks, tell, useAsked, useStore } from "./state.js";
import { value as shown } from "./format.js";
import * as api from "./api.js";

function Found({ name, version }) {
  const [found] = useAsked(() => api.readSweep(name), [version]);
  if (!found?.rows?.length) return null;
  const own = found.metric !== "loss"; // another number decides
  const number = (one) => (one === null ? "diverged" : one.toFixed(4));
  const use = () => {
    changeSettings({ learning_rate: found.learning_rate });
    tell("The learning rate was taken over");
  };
  return html`
    <p>
      <b>${found.advice}</b>
    </p>
    <table class="small numbers">
      <tr>
        <th>learning rate</th>
        ${own && html`<th>${found.metric}</th>`}
        <th>held-out loss</th>
        <th>at step</th>
      </tr>
      ${found.rows.map(
        (row) => html`
          <tr key=${row.learning_rate}>
            <td>${row.learning_rate}</td>
            ${own && html`<td>${number(row[found.metric])}</td>`}
            <td>${number(row.loss)}</td>
            <td>${row.step}</td>
          </tr>
        `,
      )}
    </table>
    <p class="made">
      ${found.learning_rate !== null && html`<${Button} small onClick=${use}>Use ${shown(found.learning_rate)}<//>`}
      <span class="path">${found.page}</span>
      <${CopyButton} text=${found.page}>Copy path<//>
    </p>
  `;
}

export function Sweep({ whole, card, name, stopped }) {
  const list = useStore(tasks);
  const [sent, setSent] = useState(null);
  const [problem, setProblem] = useState("");
  const task = sent && list.find((one) => one.id === sent.id);
  const send = () =>
    api.startSweep(whole, card, name).then(
      (answer) => {
        setProblem("");
        setSent({ id: answer.task.id, command: answer.command, name: answer.name });
      },
      (error) => setProblem(error.message),
    );
  return html`
    <${Card} title="Not sure about the learning rate?">
      <p class="soft">
        Six rates around the default are trained a little, the better ones further, and the best one in full. This takes
        about three times as long as one run.
      </p>
      <div class="actions">
        <${Button} disabled=${stopped || (task && !taskEnded(task))} onClick=${send}>Search the learning rate<//>
      </div>
      <${Problem}>${problem}<//>
      ${
        sent &&
        html`
          ${task ? html`<${TaskLine} task=${task} />` : html`<${Waiting}>Starting<//>`}
          <${Found} name=${sent.name} version=${task ? task.message + task.state : ""} />
          <${Command} text=${sent.command} />
        `
      }
    <//>
  `;
}
