// Data: drop files, mix sets, and see every row as the model will: its text with the trained tokens marked.
import { useEffect, useState } from "../pages/vendor/hooks.module.js";
import {
  html,
  Button,
  Card,
  Chip,
  Empty,
  Field,
  Heading,
  Pages,
  Problem,
  Segments,
  TaskLine,
  Waiting,
} from "../pages/parts.js";
import {
  changeProject,
  changeSettings,
  go,
  onTaskEnd,
  project,
  tasks,
  useAsked,
  useLater,
  useStore,
} from "../pages/state.js";
import { bytes, count, counted, lastPart, percent, shortPath, when } from "../pages/format.js";
import { numberReader, Typed } from "../pages/typed.js";
import { addSet, Drop } from "../pages/drop.js";
import * as api from "../pages/api.js";

export const title = "Data";
export const order = 20;
export const icon = "data";

const ON_PAGE = 20;
// The settings that change what rows become. A column left empty is recognized by its usual names.
const OF_ROWS = [
  "max_seq_length",
  "mask_prompt",
  "data_format",
  "prompt_column",
  "completion_column",
  "system_column",
  "chat_column",
  "text_column",
  "speaker",
  "conversation_gap",
  "chat_template",
  "strict",
  "valid_fraction",
  "objective",
];
// The fields under "How rows are read" without which some files cannot be read. Labels are those of web.py,
// because errors name them.
const OF_FILES = {
  prompt_column: "Column of the prompt",
  completion_column: "Column of the answer",
  system_column: "Column of a system prompt",
  chat_column: "Column of a chat",
  text_column: "Column of plain text",
  speaker: "Speaker to learn from",
};
const namesField = (text) => Object.values(OF_FILES).some((label) => text.includes(`“${label}”`));

const WEIGHT = numberReader({ range: [0, 1000], exclusive: true });
const LENGTH = numberReader({ whole: true, range: [8, null] });
const SHARE = numberReader({ range: [0, 0.9] });

// `rows` are how many training rows each set has, once they are read: an epoch has them as often as the weight says.
function Mixture({ sets, rows, problem }) {
  const parts = sets.map((one, n) => one.weight * (rows[n] ?? Number.NaN));
  const whole = parts.reduce((sum, one) => sum + one, 0);
  const change = (path, weight) =>
    changeProject({ sets: sets.map((one) => (one.path === path ? { ...one, weight } : one)) });
  return html`
    <ul class="rows mixture">
      ${sets.map(
        (one, n) => html`
          <li key=${one.path} class="row">
            <span class="row-main">
              <b>${lastPart(one.path)}</b>
              <span class="soft path">${shortPath(one.path)}</span>
              ${problem?.includes(lastPart(one.path)) && html`<${Chip} tone="bad">cannot be read<//>`}
              ${sets.length > 1 && rows[n] === 0 && html`<${Chip} tone="bad">no row can be trained<//>`}
            </span>
            <span class="row-facts">
              ${
                sets.length > 1 &&
                html`
                  <label class="weight">
                    <span class="soft">weight</span>
                    <${Typed}
                      id=${"weight-" + one.path}
                      name=${"Weight of " + lastPart(one.path)}
                      numeric
                      value=${one.weight}
                      read=${WEIGHT}
                      aria-label=${"Weight of " + lastPart(one.path)}
                      onValue=${(weight) => change(one.path, weight ?? 1)}
                    />
                  </label>
                  ${
                    whole > 0 &&
                    html`
                      <span class="number share" title=${counted(rows[n], "row")}>${percent(parts[n] / whole)}</span>
                    `
                  }
                `
              }
              <${Button}
                small
                kind="plain"
                icon="close"
                aria-label=${"Leave out " + lastPart(one.path)}
                onClick=${() => changeProject({ sets: sets.filter((other) => other.path !== one.path) })}
              />
            </span>
          </li>
        `,
      )}
    </ul>
  `;
}

function Known({ sets, answer }) {
  const [id, setId] = useState("");
  const rest = (answer?.sets || []).filter((one) => !sets.some((set) => set.path === one.path));
  const add = (event) => {
    event.preventDefault();
    if (id.trim()) addSet(id.trim());
    setId("");
  };
  return html`
    <details open=${!sets.length && rest.length > 0}>
      <summary>Add another set</summary>
      ${
        rest.length > 0 &&
        html`
          <ul class="rows">
            ${rest.slice(0, 50).map(
              (one) => html`
                <li key=${one.path} class="row">
                  <span class="row-main">
                    <b>${one.name}</b>
                    <span class="soft number">
                      ${[bytes(one.bytes), one.changed ? when(one.changed) : ""].filter(Boolean).join(" · ")}
                    </span>
                  </span>
                  <span class="row-facts">
                    <${Button} small onClick=${() => addSet(one.path)} aria-label=${"Add " + one.name}>
                      Add
                    <//>
                  </span>
                </li>
              `,
            )}
          </ul>
        `
      }
      <form class="fields" onSubmit=${add}>
        <${Field} label="From Hugging Face, or a path on this machine" id="set-id" wide help=${answer?.hint}>
          <input
            id="set-id"
            placeholder="tatsu-lab/alpaca"
            value=${id}
            onInput=${(event) => setId(event.target.value)}
          />
        <//>
        <button class="button">Add</button>
      </form>
    </details>
  `;
}

function Histogram({ bars, limit }) {
  const most = Math.max(...bars.map((one) => one.count), 1);
  const end = bars[bars.length - 1].to || 1;
  const words = bars
    .filter((one) => one.count)
    .map((one) => `${one.from} to ${one.to} tokens: ${counted(one.count, "row")}`)
    .join("; ");
  return html`
    <figure class="histogram">
      <figcaption>Length of rows in tokens</figcaption>
      <div class="bars" role="img" aria-label=${words}>
        ${bars.map(
          (one) => html`
            <span
              key=${one.from}
              class=${one.from >= limit ? "beyond" : ""}
              style=${{ height: percent(one.count / most, 1) }}
              title=${`${one.from} to ${one.to} tokens: ${counted(one.count, "row")}`}
            ></span>
          `,
        )}
      </div>
      <div class="axis number soft">
        <span>${count(bars[0].from)}</span>
        ${limit && limit < end && html`<span>limit ${count(limit)}</span>`}
        <span>${count(end)}</span>
      </div>
    </figure>
  `;
}

function Spans({ spans }) {
  return html`
    <pre class="spans" tabindex="0">
      ${spans.map((span, n) =>
        span.trained ? html`<mark key=${n}>${span.text}</mark>` : html`<span key=${n}>${span.text}</span>`,
      )}
    </pre>
  `;
}

// A row as it is listed: what is only read, by its two ends; what is trained, whole unless it is very long.
const ENDS = 140;
const MOST_READ = 360;
const MOST_TRAINED = 1200;
function shortened({ text, trained }) {
  if (trained) return text.length <= MOST_TRAINED ? text : text.slice(0, MOST_TRAINED).replace(/\s+\S*$/, "") + " …";
  return text.length <= MOST_READ
    ? text
    : `${text.slice(0, ENDS).replace(/\s+\S*$/, "")} … ${text.slice(-ENDS).replace(/^\S*\s+/, "")}`;
}

// Pictures come as small JPEGs that the studio made; one that cannot be shown has its name.
function Pictures({ pictures }) {
  const more = pictures.filter((one) => !one.url).length;
  return html`
    <ul class="plain row-pictures" aria-label="Pictures of this row">
      ${pictures.map((one, n) => {
        const facts = `${count(one.width)} x ${count(one.height)} pixels, ${counted(one.tokens, "token")}`;
        const name = one.name ? `, ${one.name}` : "";
        return (
          one.url &&
          html`
            <li key=${n}>
              <img src=${one.url} alt=${`Picture ${n + 1}${name}, ${facts}`} title=${facts} />
            </li>
          `
        );
      })}
      ${more > 0 && html`<li class="soft number">${counted(more, "picture")} not shown</li>`}
    </ul>
  `;
}

function DataRow({ row }) {
  const [open, set] = useState(false);
  const short = row.spans.map((span) => ({ ...span, text: shortened(span) }));
  const long = short.some((span, n) => span.text !== row.spans[n].text);
  return html`
    <article class=${"data-row" + (open ? " open" : "")}>
      <header>
        <span class="number">
          <b>${lastPart(row.file)}</b>, ${row.unit || "line"} ${count(row.line)}
        </span>
        <span class="soft number">
          ${[row.form, row.part, row.split === "valid" ? "held out" : ""].filter(Boolean).join(", ")} ·${" "}
          ${counted(row.tokens, "token")}, ${count(row.trained_tokens)} trained
        </span>
        ${
          row.cut
            ? html`<${Chip} tone="warn">${row.cut === true ? "cut" : `cut by ${counted(row.cut, "token")}`}<//>`
            : null
        }
        ${
          row.doubled_of !== null &&
          row.doubled_of !== undefined &&
          html`
            <${Chip} tone="warn">
              same as ${row.doubled_of.unit || "line"} ${count(row.doubled_of.line)}
            <//>
          `
        }
      </header>
      <div class=${row.pictures?.length ? "beside-pictures" : ""}>
        ${row.pictures?.length > 0 && html`<${Pictures} pictures=${row.pictures} />`}
        <${Spans} spans=${open ? row.spans : short} />
      </div>
      ${
        open &&
        (row.more_characters || row.more_tokens) > 0 &&
        html`
          <p class="soft number">
            Only the beginning is shown;${" "}
            ${
              row.more_tokens ? counted(row.more_tokens, "more token") : counted(row.more_characters, "more character")
            }${" "}
            follow.
          </p>
        `
      }
      ${
        long &&
        html`
          <${Button} small onClick=${() => set(!open)} aria-expanded=${open}>
            ${open ? "Show less" : "Show all"}
          <//>
        `
      }
    </article>
  `;
}

const Tiles = ({ counts }) => html`
  <dl class="tiles">
    ${[
      ["rows", "rows"],
      ["tokens", "tokens"],
      ["trained_tokens", "trained tokens"],
    ].map(
      ([key, words]) => html`
        <div key=${key}>
          <dt>${words}</dt>
          <dd class="number">${count(counts[key])}</dd>
        </div>
      `,
    )}
  </dl>
`;

function Options({ settings, open }) {
  const take = (name) => (value) => changeSettings({ [name]: value });
  const text = (name, placeholder) => html`
    <${Field} label=${OF_FILES[name]} id=${name}>
      <${Typed}
        id=${name}
        name=${OF_FILES[name]}
        value=${settings[name]}
        placeholder=${placeholder}
        onValue=${take(name)}
      />
    <//>
  `;
  return html`
    <details open=${open}>
      <summary>How rows are read</summary>
      <div class="fields">
        <${Field} label="Longest row, in tokens" id="max_seq_length">
          <${Typed}
            id="max_seq_length"
            name="Longest row, in tokens"
            numeric
            value=${settings.max_seq_length}
            read=${LENGTH}
            placeholder="2048"
            onValue=${take("max_seq_length")}
          />
        <//>
        <${Field} label="Share of rows held out" id="valid_fraction">
          <${Typed}
            id="valid_fraction"
            name="Share of rows held out"
            numeric
            value=${settings.valid_fraction}
            read=${SHARE}
            placeholder="0.05"
            onValue=${take("valid_fraction")}
          />
        <//>
        ${text("prompt_column", "recognized")}
        ${text("completion_column", "recognized")}
        ${text("system_column", "none")}
        ${text("chat_column", "recognized")}
        ${text("text_column", "recognized")}
        ${text("speaker", "for a chat of a phone")}
        <label class="check">
          <input
            type="checkbox"
            checked=${settings.mask_prompt ?? true}
            onChange=${(event) => changeSettings({ mask_prompt: event.target.checked ? undefined : false })}
          />${" "}
          Train on answers only, not on prompts
        </label>
      </div>
    </details>
  `;
}

function TaskOf({ id }) {
  const task = useStore(tasks).find((one) => one.id === id);
  return task ? html`<${TaskLine} task=${task} />` : html`<${Waiting}>Reading and tokenizing<//>`;
}

// Where no row has columns that are known: which are the question and the answer. Both are set at once.
function Columns({ names, rows, settings }) {
  const [chosen, choose] = useState({
    prompt: settings.prompt_column || "",
    completion: settings.completion_column || "",
  });
  const menu = (which, words) => html`
    <${Field} label=${words} id=${"column-" + which}>
      <select
        id=${"column-" + which}
        onChange=${(event) => {
          const next = { ...chosen, [which]: event.target.value };
          choose(next);
          if (next.prompt && next.completion && next.prompt !== next.completion)
            changeSettings({ prompt_column: next.prompt, completion_column: next.completion });
        }}
      >
        <option value="">choose a column</option>
        ${names.map((one) => html`<option key=${one} value=${one} selected=${one === chosen[which]}>${one}</option>`)}
      </select>
    <//>
  `;
  return html`
    <${Card} title="Which columns are question and answer?">
      <p class="soft">
        ${counted(rows, "row")} with columns that the studio does not know. Choose both to see the rows.
      </p>
      <div class="fields">
        ${menu("prompt", "Question")}
        ${menu("completion", "Answer")}
      </div>
    <//>
  `;
}

function Preview({ model, sets, settings, onUnread, onRead }) {
  const [filter, setFilter] = useState("all");
  const [page, setPage] = useState(0);
  const used = Object.fromEntries(OF_ROWS.filter((name) => name in settings).map((name) => [name, settings[name]]));
  const question = useLater({ model, data: sets, settings: used, offset: page * ON_PAGE, limit: ON_PAGE, filter }, 200);
  const [answer, problem, again] = useAsked((signal) => api.previewData(question, signal), [JSON.stringify(question)]);
  const task = answer?.task && (answer.task.id || answer.task);
  useEffect(() => {
    if (task) onTaskEnd(task, again);
  }, [task]);
  useEffect(() => setPage(0), [filter, JSON.stringify([model, sets, used])]);
  const none = answer?.counts?.rows === 0;
  const columns = (!problem && none && answer.columns) || [];
  const why = problem || (none && !columns.length && answer.problems[0]?.message) || "";
  useEffect(() => {
    if (namesField(why)) onUnread(true);
  }, [why]);
  useEffect(() => onRead({ rows: (!problem && answer?.set_rows) || [], problem }), [problem, answer]);
  if (problem)
    return html`
      <${Card} title="Rows">
        <${Problem} again=${sets.some((one) => problem.includes(lastPart(one.path))) ? null : again}>${problem}<//>
      <//>
    `;
  if (columns.length > 1)
    return html`
      <${Columns} key=${columns.join()} names=${columns} rows=${answer.counts.refused} settings=${settings} />
    `;
  if (!answer?.counts)
    return html`
      <${Card} title="Rows">
        ${task ? html`<${TaskOf} id=${task} />` : html`<${Waiting}>Reading and tokenizing<//>`}
      <//>
    `;
  const { counts, forms, histogram, rows, problems, notes, total } = answer;
  const recognized = Object.entries(forms)
    .map(([form, n]) => `${form} (${counted(n, "row")})`)
    .join(", ");
  const filters = [
    ["all", "All", counts.rows],
    ["cut", "Cut", counts.cut],
    ["doubled", "Doubled", counts.doubled],
    ["refused", "Refused", counts.refused],
  ].map(([id, words, n]) => [id, words, count(n)]);
  return html`
    <${Card} title="What the model will see">
      <${Tiles} counts=${counts} />
      <p class="soft">
        ${recognized && `Read as ${recognized}. `}
        ${counts.empty > 0 && `${counted(counts.empty, "row")} without anything to train.`}
      </p>
      ${(notes || []).map((one) => html`<p class="note" key=${one}>${one}</p>`)}
      ${
        histogram.length > 0 &&
        html`<${Histogram} bars=${histogram} limit=${answer.max_seq_length || used.max_seq_length || 2048} />`
      }
    <//>
    <${Card}
      title="Rows"
      actions=${html`
        <${Segments} label="Which rows" name="filter" value=${filter} options=${filters} onChange=${setFilter} />
      `}
    >
      ${
        filter !== "refused" &&
        html`
          <p class="soft legend">
            <mark>Marked text</mark> is trained; the rest is only read.
          </p>
        `
      }
      ${
        (filter === "refused" || filter === "all") &&
        problems.length > 0 &&
        html`
          <ul class="problems">
            ${(filter === "all" ? problems.slice(0, 5) : rows.map((one) => ({ ...one, message: one.why }))).map(
              (one, n) => html`
                <li key=${n}>
                  <b class="number">
                    ${lastPart(one.file)}, ${one.unit || "line"} ${count(one.line)}
                  </b>${" "}
                  <span>${one.message}</span>
                </li>
              `,
            )}
          </ul>
        `
      }
      ${filter !== "refused" && rows.map((row) => html`<${DataRow} key=${row.index + row.part} row=${row} />`)}
      ${
        !rows.length &&
        !(filter === "refused" && problems.length) &&
        html`
          <p class="soft">
            ${filter === "all" ? "No row of this data can be trained. The lines above say why." : "There are none."}
          </p>
        `
      }
      <${Pages} page=${page} pages=${Math.ceil(total / ON_PAGE)} onPage=${setPage} label="Pages of rows" />
    <//>
  `;
}

export function Place() {
  const { model, sets, settings } = useStore(project);
  const [answer, , again] = useAsked(() => api.readSets(), []);
  const [unread, setUnread] = useState(false);
  const [read, setRead] = useState({ rows: [], problem: "" });
  return html`
    <${Heading}
      title="Data"
      actions=${sets.length > 0 && html`<${Button} kind="first" onClick=${() => go("train", "new")}>Next: train<//>`}
    >
      What the model learns from. Every row is shown as it will be trained.
    <//>
    <div class="two wide-right">
      <div class="side stack">
        <${Card} title="Sets" note=${sets.length > 1 ? "mixed by weight" : ""}>
          ${sets.length > 0 && html`<${Mixture} sets=${sets} rows=${read.rows} problem=${read.problem} />`}
          <${Drop} onAdded=${again} />
          <${Known} sets=${sets} answer=${answer} />
          <${Options} settings=${settings} open=${unread} />
        <//>
      </div>
      <div class="stack">
        ${
          !sets.length
            ? html`
              <${Card}>
                <${Empty} icon="data" title="No data yet">
                  Drop a file on the left. Chats, prompts with answers, preference pairs and plain text are
                  recognized by themselves, record by record.
                <//>
              <//>
            `
            : !model
              ? html`
                <${Card}>
                  <${Empty}
                    icon="model"
                    title="Choose a model first"
                    action=${html`<${Button} kind="first" onClick=${() => go("model")}>Choose a model<//>`}
                  >
                    Its tokenizer and chat template decide what is trained of each row.
                  <//>
                <//>
              `
              : html`
                <${Preview}
                  model=${model}
                  sets=${sets}
                  settings=${settings}
                  onUnread=${setUnread}
                  onRead=${setRead}
                />
              `
        }
      </div>
    </div>
  `;
}
