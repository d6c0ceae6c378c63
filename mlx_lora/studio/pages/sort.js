// Sort: what a classifier answers of many texts, the doubtful ones first, and those as a file for a person to label.
import { useEffect, useRef, useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Chip, Field, Meter, Pages, Problem, Segments } from "./parts.js";
import { count, counted, percent } from "./format.js";
import { numberReader, Typed } from "./typed.js";
import * as api from "./api.js";

const MOST = 1000; // texts at once, and characters of each, as the server takes them
const LONGEST = 20000;
const TOGETHER = 16; // texts of a request, so that one sees how far it is and can stop
const SHOWN = 50; // rows of a page
const LONG = 320; // characters of a text that are shown unfolded
const LEVEL = numberReader({ range: [0, 1] });

// The texts of the field: one a line, or a list as programs write one, ["...", "..."].
function textsOf(field) {
  let found = null;
  try {
    found = JSON.parse(field);
  } catch {
    /* lines */
  }
  const isList = Array.isArray(found) && found.every((one) => typeof one === "string");
  return (isList ? found : field.split("\n")).map((one) => one.trim()).filter(Boolean);
}

// A row has the answers by the columns of the data; the only question of an adapter has no name of its own.
const rowOf = ({ doubt, error, answers, ...only }, text, number, column) => ({
  text,
  number,
  doubt,
  error,
  answers: error ? {} : answers || { [column || "label"]: only },
});
// Numbers have no probability.
const isDoubtful = (answer, level) => answer.probability < level;
const anyDoubtful = (row, level) => Object.values(row.answers).some((one) => isDoubtful(one, level));
const wordsOf = ({ predicted }) =>
  Array.isArray(predicted)
    ? predicted.join(", ") || "none"
    : typeof predicted === "number"
      ? String(Number(predicted.toPrecision(4)))
      : predicted;
// Rounded down: what is below the level does not look as if it were not.
const shareOf = (chance) => percent(Math.floor(1000 * chance) / 1000, 1);

// Training data: an empty cell is a missing answer, and ";" means none of several labels.
const quoted = (cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
const cellOf = (answer, level) =>
  answer.probability === undefined || isDoubtful(answer, level)
    ? ""
    : Array.isArray(answer.predicted)
      ? answer.predicted.join(";") || ";"
      : answer.predicted;
const csvOf = (rows, questions, level) =>
  [
    ["text", ...questions],
    ...rows.map((row) => [row.text, ...questions.map((name) => cellOf(row.answers[name], level))]),
  ]
    .map((cells) => `${cells.map(quoted).join(",")}\n`)
    .join("");

function save(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

const Bar = ({ chance, tone = "" }) => html`
  <span class=${"chance " + tone} aria-hidden="true"><span style=${{ width: percent(chance, 1) }}></span></span>
`;

function Said({ name, answer, level }) {
  const known = answer.probability !== undefined;
  const doubtful = isDoubtful(answer, level);
  const told = [answer.predicted].flat();
  const others = Object.entries(answer.probabilities || {})
    .filter(([label]) => Array.isArray(answer.predicted) || !told.includes(label))
    .sort(([, one], [, other]) => other - one);
  return html`
    <td data-label=${name}>
      <p class="told">
        <b>${wordsOf(answer)}</b>
        ${known && html`<span class="number soft">${shareOf(answer.probability)}</span>`}
      </p>
      ${known && html`<${Bar} chance=${answer.probability} tone=${doubtful ? "warn" : ""} />`}
      ${doubtful && html`<${Chip} tone="warn">ask a person<//>`}
      ${
        others.length > 0 &&
        html`
          <details>
            <summary>${Array.isArray(answer.predicted) ? "each label" : "other answers"}</summary>
            <ul class="others">
              ${others.map(
                ([label, chance]) => html`
                  <li key=${label}>
                    <span>${label}</span>
                    <span class="number soft">${shareOf(chance)}</span>
                    <${Bar} chance=${chance} tone="small" />
                  </li>
                `,
              )}
            </ul>
          </details>
        `
      }
    </td>
  `;
}

const Written = ({ text }) =>
  text.length <= LONG
    ? text
    : html`
      <details>
        <summary>${text.slice(0, LONG)} …</summary>
        ${text.slice(LONG)}
      </details>
    `;

function Table({ rows, questions, level }) {
  return html`
    <div class="scroll" role="region" aria-label="Sorted texts" tabindex="0">
      <table class="sorted">
        <thead>
          <tr>
            <th scope="col">Text</th>
            ${questions.map((name) => html`<th key=${name} scope="col">${name}</th>`)}
            <th scope="col" class="number">Doubt</th>
          </tr>
        </thead>
        <tbody>
          ${rows.map(
            (row) => html`
              <tr key=${row.number}>
                <th scope="row"><${Written} text=${row.text} /></th>
                ${
                  row.error
                    ? html`<td colspan=${questions.length}><${Problem}>${row.error}<//></td>`
                    : questions.map(
                        (name) => html`<${Said} key=${name} name=${name} answer=${row.answers[name]} level=${level} />`,
                      )
                }
                <td class="number" data-label="doubt">${shareOf(row.doubt)}</td>
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
  `;
}

function Result({ adapter, rows, calibrated }) {
  const [level, setLevel] = useState(0.9);
  const [order, setOrder] = useState("doubt");
  const [page, setPage] = useState(0);
  const questions = Object.keys(rows.find((row) => !row.error)?.answers || {});
  const ordered = order === "doubt" ? [...rows].sort((one, other) => other.doubt - one.doubt) : rows;
  const doubtful = ordered.filter((row) => anyDoubtful(row, level));
  const pages = Math.ceil(rows.length / SHOWN);
  return html`
    <${Card} title=${counted(rows.length, "text")}>
      <div class="toolbar">
        <${Segments}
          label="Order of the texts"
          name="sort-order"
          value=${order}
          options=${[["doubt", "Most doubtful first"], ["given", "As given"]]}
          onChange=${(next) => {
            setOrder(next);
            setPage(0);
          }}
        />
        <label class="level">
          <span>Ask a person below</span>${" "}
          <${Typed}
            id="sort-level"
            name="Ask a person below"
            numeric
            value=${level}
            read=${LEVEL}
            onValue=${(value) => setLevel(value ?? 0.9)}
          />
        </label>
        <${Button}
          disabled=${!doubtful.length}
          onClick=${() => save(`${adapter.name}-doubtful.csv`, csvOf(doubtful, questions, level))}
        >
          Save the doubtful ones as CSV
        <//>
      </div>
      <p class="soft" role="status">
        ${doubtful.length} of ${counted(rows.length, "text")}${" "}
        ${doubtful.length === 1 ? "has" : "have"} an answer to ask a person about. In the CSV file, these answers and
        numbers are empty cells to fill in, and the other cells are the adapter's answers. Add the file to your data,
        and train again.
      </p>
      ${
        !calibrated &&
        html`
          <p class="note warned">
            Not all confidences of this adapter are calibrated, and the others are mostly too high. Each question takes
            at least 60 held-out texts.
          </p>
        `
      }
      <${Table} rows=${ordered.slice(page * SHOWN, (page + 1) * SHOWN)} questions=${questions} level=${level} />
      <${Pages} page=${page} pages=${pages} onPage=${setPage} label="Pages of texts" />
    <//>
  `;
}

export function Sorter({ base, adapter }) {
  const [field, setField] = useState("");
  const [going, setGoing] = useState(null);
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState("");
  const stop = useRef(null);
  useEffect(() => () => stop.current?.abort(), []);
  const texts = textsOf(field);
  const long = texts.findIndex((one) => one.length > LONGEST);
  const tooMuch =
    texts.length > MOST
      ? `${counted(texts.length, "text")}: sort at most ${count(MOST)} at once`
      : long >= 0
        ? `Text ${long + 1} has ${count(texts[long].length)} characters: shorten it to ${count(LONGEST)}`
        : "";
  const sort = async (event) => {
    event.preventDefault();
    const control = new AbortController();
    stop.current = control;
    setProblem("");
    setFound(null);
    const rows = [];
    let last = null;
    let warning = "";
    try {
      while (rows.length < texts.length) {
        setGoing({ done: rows.length, of: texts.length, warning });
        const part = texts.slice(rows.length, rows.length + TOGETHER);
        last = await api.sortTexts({ ...base, adapter: adapter.path, texts: part }, control.signal);
        warning = last.warning || warning;
        rows.push(...last.rows.map((row, n) => rowOf(row, part[n], rows.length + n, last.column)));
      }
    } catch (error) {
      if (error.name !== "AbortError") setProblem(error.message);
    }
    setGoing(null);
    if (rows.length) setFound({ rows, calibrated: last.calibrated, key: Date.now() });
  };
  return html`
    <${Card}>
      <form class="sort-form" onSubmit=${sort}>
        <${Field} label="Texts, one per line" id="sort-texts" wide>
          <textarea
            id="sort-texts"
            rows="6"
            value=${field}
            placeholder="Paste a list of texts"
            onInput=${(event) => setField(event.target.value)}
          ></textarea>
        <//>
        <${Problem}>${problem || tooMuch}<//>
        <div class="actions">
          <button class="button first" disabled=${Boolean(going) || !texts.length || Boolean(tooMuch)}>Sort</button>
          <${Button} disabled=${!going} onClick=${() => stop.current.abort()}>Stop<//>
          <span class="soft number">${texts.length > 0 && counted(texts.length, "text")}</span>
        </div>
        ${
          going &&
          html`
            <div role="status">
              <p class="soft waiting">
                ${going.done ? `Sorted ${going.done} of ${going.of}` : `Asking ${adapter.name}`}
              </p>
              ${going.warning && html`<p class="note warned">${going.warning}</p>`}
            </div>
            <${Meter} share=${going.done / going.of} label="Sorted texts" />
          `
        }
      </form>
    <//>
    ${
      found && html`<${Result} key=${found.key} adapter=${adapter} rows=${found.rows} calibrated=${found.calibrated} />`
    }
  `;
}
