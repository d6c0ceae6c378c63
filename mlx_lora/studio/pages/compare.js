// Several runs side by side: their curves over the same steps, and their settings, those that differ first.
import { useMemo, useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Heading, Icon, Problem, StateChip, Waiting } from "./parts.js";
import { linkTo, useAsked } from "./state.js";
import { Chart, joined } from "./chart.js";
import { answersOf, FIRST, Mark } from "./answers.js";
import { bytes, count, duration, loss, rate, value } from "./format.js";
import * as api from "./api.js";

const CURVES = [
  ["loss", "Loss", loss],
  ["val_loss", "Held-out loss", loss],
  ["tokens_per_s", "Speed, tokens/s", rate],
  ["peak_memory_bytes", "Peak memory", bytes],
];
const RESULTS = [
  ["state", (run) => html`<${StateChip} state=${run.state} />`],
  ["result", (run) => run.verdict?.headline || "–"],
  ["steps", (run) => count(run.step || 0)],
  ["loss", (run) => loss(run.loss)],
  ["held-out loss", (run) => loss(run.val_loss)],
  ["tokens/s", (run) => rate(run.tokens_per_s)],
  ["peak memory", (run) => bytes(run.peak_bytes)],
  ["time", (run) => duration(run.seconds)],
  ["what was forgotten", (run) => run.forgetting?.sentence || "not measured"],
];
// These differ between any two runs, and say nothing about how they were trained.
const NAMES_ONLY = new Set(["adapter_path", "resume", "force"]);

function Curve({ runs, name, title, words }) {
  const data = useMemo(() => joined(runs, name), [runs]);
  if (!data.slice(1).some((values) => values.some((one) => one !== null))) return null;
  return html`
    <${Chart}
      title=${title}
      series=${runs.map((run, n) => ({ label: run.name, color: "c" + n, dots: name === "val_loss" }))}
      data=${data}
      words=${words}
      zero=${!name.endsWith("loss")}
      height=${230}
    />
  `;
}

function Table({ runs }) {
  const [all, setAll] = useState(false);
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings || {})))].filter(
    (name) => !NAMES_ONLY.has(name),
  );
  const differ = names.filter(
    (name) => new Set(runs.map((run) => JSON.stringify(run.settings?.[name] ?? null))).size > 1,
  );
  const same = names.filter((name) => !differ.includes(name));
  const row = (name, cells, kind) => html`
    <tr key=${name} class=${kind}>
      <th scope="row">${name}</th>
      ${cells.map((one, n) => html`<td key=${n} class="wrap number left">${one}</td>`)}
    </tr>
  `;
  return html`
    <${Card}
      title="Side by side"
      actions=${html`
        <label class="check">
          <input type="checkbox" checked=${all} onChange=${() => setAll(!all)} /> Also equal settings
        </label>
      `}
    >
      <div class="scroll" tabindex="0" role="region" aria-label="Runs side by side">
        <table class="side-by-side">
          <thead>
            <tr>
              <td></td>
              ${runs.map(
                (run, n) => html`
                  <th key=${run.id} scope="col">
                    <span class=${"stroke c" + n}></span>
                    <a href=${linkTo("runs", run.id)}>${run.name}</a>
                  </th>
                `,
              )}
            </tr>
          </thead>
          <tbody>${RESULTS.map(([name, tell]) => row(name, runs.map(tell)))}</tbody>
          <tbody>
            <tr>
              <th class="group" scope="rowgroup" colspan=${runs.length + 1}>
                ${differ.length ? "Settings that differ" : "All settings are equal"}
              </th>
            </tr>
            ${differ.map((name) =>
              row(
                name,
                runs.map((run) => value(run.settings?.[name])),
                "differs",
              ),
            )}
          </tbody>
          ${
            all &&
            html`
              <tbody>
                <tr>
                  <th class="group" scope="rowgroup" colspan=${runs.length + 1}>Equal settings</th>
                </tr>
                ${same.map((name) =>
                  row(
                    name,
                    runs.map((run) => value(run.settings?.[name])),
                  ),
                )}
              </tbody>
            `
          }
        </table>
      </div>
    <//>
  `;
}

// The questions that at least two of the runs answered, with what each said.
function SameQuestions({ runs }) {
  const [all, show] = useState(false);
  const asked = new Map();
  runs.forEach((run, n) => {
    for (const one of answersOf(run)) {
      const key = JSON.stringify([one.question, one.expected]);
      const row = asked.get(key) || { ...one, said: runs.map(() => null) };
      row.said[n] = one.adapter;
      asked.set(key, row);
    }
  });
  const rows = [...asked.values()].filter((row) => row.said.filter(Boolean).length > 1);
  const right = (n) => rows.filter((row) => row.said[n]?.right).length;
  return html`
    <${Card} title="Answers to the same questions">
      ${
        rows.length
          ? html`
            <div class="scroll" tabindex="0" role="region" aria-label="Answers side by side">
              <table class="questions">
                <thead>
                  <tr>
                    <th scope="col">Question</th>
                    <th scope="col">Expected</th>
                    <th scope="col">Base</th>
                    ${runs.map(
                      (run, n) => html`
                        <th key=${run.id} scope="col">
                          ${run.name}
                          <span class="soft from number">${right(n)} of ${rows.length} right</span>
                        </th>
                      `,
                    )}
                  </tr>
                </thead>
                <tbody>
                  ${(all ? rows : rows.slice(0, FIRST)).map(
                    (row) => html`
                      <tr key=${row.question + row.expected}>
                        <td class="wrap">
                          ${row.question}
                          <span class="soft from">${row.from}</span>
                        </td>
                        <td class="wrap" data-label="expected">${row.expected}</td>
                        <td class="wrap" data-label="base">
                          <${Mark} right=${row.base.right} /> ${row.base.text}
                        </td>
                        ${row.said.map(
                          (one, n) => html`
                            <td key=${n} class="wrap" data-label=${runs[n].name}>
                              ${one ? html`<${Mark} right=${one.right} /> ${one.text}` : "not asked"}
                            </td>
                          `,
                        )}
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
          `
          : html`
            <p class="soft">
              These runs answered no question in common. Ask them the same file under “Questions and answers” of each
              run.
            </p>
          `
      }
    <//>
  `;
}

// Runs on the same data say so, wherever its files are.
function withSameData(runs) {
  return runs.map((run) => {
    const first = runs.find((one) => one.data_content && one.data_content === run.data_content);
    return first ? { ...run, settings: { ...run.settings, data: first.settings.data } } : run;
  });
}

export function Compare({ ids }) {
  const [runs, problem, again] = useAsked(
    (signal) => Promise.all(ids.map((id) => api.readRun(id, signal))).then(withSameData),
    [ids.join()],
  );
  return html`
    <a class="back" href=${linkTo("runs")}>
      <${Icon} name="back" />
      All runs
    </a>
    <${Heading} title="Compare">
      ${runs ? `${runs.length} runs over the same steps. Point at a curve to read its values.` : ""}
    <//>
    <${Problem} again=${again}>${problem}<//>
    ${!runs && !problem && html`<${Waiting}>Reading the runs<//>`}
    ${
      runs &&
      html`
        <div class="stack">
          <${SameQuestions} runs=${runs} />
          <${Card} title="Curves">
            <div class="charts compared">
              ${CURVES.map(
                ([name, title, words]) => html`
                  <${Curve} key=${name} runs=${runs} name=${name} title=${title} words=${words} />
                `,
              )}
            </div>
          <//>
          <${Table} runs=${runs} />
        </div>
      `
    }
  `;
}
