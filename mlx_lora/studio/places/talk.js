// Talk & ship: the same question to two models side by side, base, adapters or blends of them, or many texts to a
// classifier; then take one along.
import { useEffect, useMemo, useRef, useState } from "../pages/vendor/hooks.module.js";
import { html, Button, Card, Empty, Field, Fold, Heading, Problem, Segments, Waiting } from "../pages/parts.js";
import { changeProject, go, machine, project, tell, useAsked, useStore } from "../pages/state.js";
import { counted, lastPart, rate, shortPath } from "../pages/format.js";
import { Ship } from "../pages/ship.js";
import { Sorter } from "../pages/sort.js";
import { contentOf, MOST, Pictures, readPicture } from "../pages/pictures.js";
import { numberReader, Typed } from "../pages/typed.js";
import * as api from "../pages/api.js";

export const title = "Talk & ship";
export const order = 50;
export const icon = "talk";

const LONGEST = 100000; // characters that are shown with Markdown; longer answers are plain text
const SIDES = ["A", "B"];
const WEIGHT = numberReader({ range: [0, 10] });
const TEMPERATURE = numberReader({ range: [0, 5] });
const AT_LEAST_1 = numberReader({ whole: true, range: [1, null] });
const AT_LEAST_0 = numberReader({ whole: true, range: [0, null] });

// A model's text through markdown.js, which makes elements and sets their text; it never parses markup.
function Said({ text, busy }) {
  const box = useRef(null);
  useEffect(() => {
    box.current.replaceChildren(...(text.length > LONGEST ? [text] : globalThis.markdown(text)));
  }, [text]);
  return html`<div class="said" ref=${box} aria-busy=${busy}></div>`;
}

// A base is a model in one revision and with its own or fewer bits; each is another one in memory.
// `file` is where it is on this disk: one model may have several names.
const baseOf = ({ base, file, revision = null, bits = null }) => ({ model: base, file, revision, bits });
const keyOf = ({ model, file, revision, bits }) => JSON.stringify([file || [model, revision], bits]);
const labelOf = ({ model, revision, bits }) =>
  [lastPart(model), revision, bits && `${bits} bits`].filter(Boolean).join(", ");
const isOn = (base) => (adapter) => !adapter.base || keyOf(baseOf(adapter)) === keyOf(base);

const nameOf = (column, adapters) =>
  column.adapters.length
    ? column.adapters
        .map((one) => adapters.find((other) => other.path === one.path)?.name || lastPart(one.path))
        .join(" + ")
    : "base";

function Column({ side, column, adapters, onChange }) {
  const chosen = new Map(column.adapters.map((one) => [one.path, one.weight]));
  const whole = [...chosen.values()].reduce((sum, one) => sum + one, 0);
  const toggle = (path) =>
    onChange({
      adapters: chosen.has(path)
        ? column.adapters.filter((one) => one.path !== path)
        : [...column.adapters, { path, weight: 1 }],
    });
  const weigh = (path, weight) =>
    onChange({ adapters: column.adapters.map((one) => (one.path === path ? { path, weight } : one)) });
  return html`
    <fieldset class=${"column-choice side-" + side}>
      <legend>Column ${side}</legend>
      <p class="chosen-name">${nameOf(column, adapters)}</p>
      <details open=${false}>
        <summary>Change</summary>
        <p class="help">
          Check one adapter to hear it alone. Check several to blend them: their effects are added, each times
          its weight.
        </p>
        <ul class="plain choices">
          <li>
            <label class="check">
              <input
                type="checkbox"
                checked=${!column.adapters.length}
                disabled=${!column.adapters.length}
                onChange=${() => onChange({ adapters: [] })}
              />${" "}
              base, without an adapter
            </label>
          </li>
          ${adapters.slice(0, 100).map(
            (one) => html`
              <li key=${one.path}>
                <label class="check">
                  <input type="checkbox" checked=${chosen.has(one.path)} onChange=${() => toggle(one.path)} />${" "}
                  ${one.name}
                </label>
                ${
                  chosen.has(one.path) &&
                  column.adapters.length > 1 &&
                  html`
                    <${Typed}
                      id=${`weight-${side}-${one.path}`}
                      name=${`Weight of ${one.name} in column ${side}`}
                      numeric
                      value=${chosen.get(one.path)}
                      read=${WEIGHT}
                      aria-label=${`Weight of ${one.name} in column ${side}`}
                      onValue=${(weight) => weigh(one.path, weight ?? 1)}
                    />
                  `
                }
              </li>
            `,
          )}
        </ul>
        ${column.adapters.length > 1 && !whole && html`<p class="soft">All weights are 0, so this is the base.</p>`}
      </details>
    </fieldset>
  `;
}

function figuresOf({ done, stopped, problem, text }) {
  if (done) {
    const first = (done.first_token_s ?? 0).toFixed(2);
    return `${counted(done.tokens, "token")}, ${rate(done.tokens_per_s)} tokens/s, first token in ${first} s`;
  }
  if (stopped) return "stopped";
  if (problem) return "";
  return text ? "writing" : "waiting";
}

function Answer({ side, name, answer }) {
  return html`
    <article class=${"answer side-" + side} aria-label=${`Answer of column ${side}, ${name}`}>
      <h3>${name}</h3>
      <${Said} text=${answer.text} busy=${!answer.done && !answer.stopped && !answer.problem} />
      <${Problem}>${answer.problem}<//>
      <p class="soft number">${figuresOf(answer)}</p>
    </article>
  `;
}

function Turn({ turn }) {
  return html`
    <section class="turn">
      <${Pictures} pictures=${turn.pictures} />
      <p class="question">${turn.question}</p>
      <div class=${"answers n" + turn.answers.length}>
        ${turn.answers.map(
          (answer, n) => html`<${Answer} key=${n} side=${SIDES[n]} name=${turn.names[n]} answer=${answer} />`,
        )}
      </div>
    </section>
  `;
}

// The turns of a conversation as messages for the model, those of one column.
const spoken = (turns, n) =>
  turns
    .filter((turn) => turn.answers[n]?.text)
    .flatMap((turn) => [
      { role: "user", content: contentOf(turn.question, turn.pictures) },
      { role: "assistant", content: turn.answers[n].text },
    ]);

function useTalk(base, columns, adapters, options) {
  const [turns, setTurns] = useState([]);
  const [stop, setStop] = useState(null);
  const [problem, setProblem] = useState("");
  const [said, setSaid] = useState("");
  const live = useRef([]);
  const show = () => setTurns([...live.current]);
  const ask = async (question, pictures) => {
    const control = new AbortController();
    const before = live.current;
    const turn = {
      question,
      pictures,
      names: columns.map((one) => nameOf(one, adapters)),
      answers: columns.map(() => ({ text: "" })),
    };
    live.current = [...before, turn];
    setStop(control);
    setProblem("");
    show();
    let timer = 0;
    const later = () => {
      if (!timer)
        timer = setTimeout(() => {
          timer = 0;
          show();
        }, 100);
    }; // long answers are not laid out again for each token
    const change = (n, what) => {
      turn.answers[n] = { ...turn.answers[n], ...what };
      later();
    };
    const heard = (event) => {
      if (event.status || event.warning) {
        setSaid(event.status || event.warning);
        return;
      }
      if (event.error && event.column === undefined) throw new api.Refused(event.error);
      setSaid("");
      if (event.error) change(event.column, { problem: event.error });
      else if (event.done) change(event.column, { done: event });
      else change(event.column, { text: turn.answers[event.column].text + event.text });
    };
    // Each column has its own conversation: what the other said is not among its messages.
    const asking = { role: "user", content: contentOf(question, pictures) };
    const messages = columns.map((_, n) => [...spoken(before, n), asking]);
    const same = messages.every((one) => JSON.stringify(one) === JSON.stringify(messages[0]));
    const asked = { ...base, ...options, messages: messages[0] }; // the server leaves out what is null
    let refused = false;
    try {
      await api.talk(
        { ...asked, columns: columns.map((one, n) => (same ? one : { ...one, messages: messages[n] })) },
        heard,
        control.signal,
      );
    } catch (error) {
      if (error.name !== "AbortError") {
        setProblem(error.message);
        refused = true;
      }
    }
    clearTimeout(timer);
    turn.answers = turn.answers.map((one) => (one.done || one.problem ? one : { ...one, stopped: true }));
    // Nothing was said: the question stays in its field.
    if (refused && turn.answers.every((one) => !one.text)) live.current = before;
    show();
    setSaid("");
    setStop(null);
    return !refused;
  };
  const reset = () => {
    stop?.abort();
    live.current = [];
    setProblem("");
    show();
  };
  return { turns, ask, stop: stop && (() => stop.abort()), reset, problem, said };
}

function Options({ options, onChange }) {
  const number = (id, name, label, read, usual, placeholder) => html`
    <${Field} label=${label} id=${id}>
      <${Typed}
        id=${id}
        name=${label}
        numeric
        value=${options[name]}
        read=${read}
        placeholder=${placeholder}
        onValue=${(value) => onChange({ [name]: value ?? usual })}
      />
    <//>
  `;
  return html`
    <details>
      <summary>Sampling and system prompt</summary>
      <div class="fields">
        ${number("temperature", "temperature", "Temperature", TEMPERATURE, null)}
        ${number("max-tokens", "max_tokens", "Max tokens", AT_LEAST_1, 256)}
        ${number("seed", "seed", "Seed", AT_LEAST_0, null, "random")}
        <${Field} label="System prompt" id="system" wide>
          <textarea
            id="system"
            rows="3"
            value=${options.system}
            onChange=${(event) => onChange({ system: event.target.value })}
          ></textarea>
        <//>
      </div>
    </details>
  `;
}

// Questions to begin with, of the example's own test rows.
function Beginnings({ onAsk }) {
  const { sets } = useStore(project);
  const [about] = useAsked(() => api.readExample(), []);
  if (!about || sets[0]?.path !== about.data) return null;
  return html`
    <div class="actions beginnings">
      ${about.questions.map((one) => html`<${Button} key=${one} small onClick=${() => onAsk(one)}>${one}<//>`)}
    </div>
  `;
}

// The form of a question, which takes pictures that are dropped on it or pasted.
function AskForm({ onSubmit, onFiles, children }) {
  const [over, setOver] = useState(false);
  const filesOf = (from) => [...(from?.files || [])];
  const hover = (is) => (event) => {
    event.preventDefault();
    setOver(is);
  };
  const drop = (event) => {
    hover(false)(event);
    const files = filesOf(event.dataTransfer);
    if (files.length) onFiles(files);
  };
  const paste = (event) => {
    const files = filesOf(event.clipboardData);
    if (!files.length) return;
    event.preventDefault();
    onFiles(files);
  };
  return html`
    <form
      class=${"ask" + (over ? " over" : "")}
      onSubmit=${onSubmit}
      onDragOver=${hover(true)}
      onDragLeave=${hover(false)}
      onDrop=${drop}
      onPaste=${paste}
    >
      ${children}
    </form>
  `;
}

function PictureButton({ onFiles, disabled }) {
  const input = useRef(null);
  return html`
    <${Button} disabled=${disabled} onClick=${() => input.current.click()} title="Or drop pictures on the message">
      Add pictures
    <//>
    <input
      ref=${input}
      class="unseen"
      type="file"
      accept="image/*"
      multiple
      tabindex="-1"
      aria-label="Pictures for the message"
      onChange=${(event) => {
        onFiles([...event.target.files]);
        event.target.value = "";
      }}
    />
  `;
}

function Chat({ base, adapters, first }) {
  // The others are right in one model with their base only, or do not write.
  const talking = adapters.filter((one) => one.talks !== false);
  const own = talking.filter(isOn(base));
  const list = own.length ? own : talking;
  const [two, setTwo] = useState(true);
  const [columns, setColumns] = useState(() => [
    { adapters: [] },
    { adapters: (first ? [first] : list.slice(0, 1)).map((one) => ({ path: one.path, weight: 1 })) },
  ]);
  const [options, setOptions] = useState({ temperature: 0, max_tokens: 256, seed: null, system: "" }); // as chat's
  const [about] = useAsked((signal) => api.readTalked(base, signal), []);
  const [question, setQuestion] = useState("");
  const [pictures, setPictures] = useState([]);
  const [unread, setUnread] = useState("");
  const [phone] = useState(() => matchMedia("(max-width: 52rem)").matches);
  const shown = columns.slice(0, two ? 2 : 1);
  const { turns, ask, stop, reset, problem, said } = useTalk(base, shown, adapters, options);
  const end = useRef(null);
  useEffect(() => {
    const near = innerHeight + scrollY > document.documentElement.scrollHeight - 240;
    if (near && turns.length) end.current?.scrollIntoView({ block: "end" });
  }, [turns]);
  const put = async (text) => {
    if (!text || stop) return;
    setQuestion("");
    setPictures([]);
    if (await ask(text, pictures)) return;
    setQuestion(text);
    setPictures(pictures);
  };
  const take = async (files) => {
    setUnread(about?.sees ? "" : "This model does not see pictures.");
    if (!about?.sees) return;
    try {
      const read = await Promise.all(files.slice(0, MOST).map(readPicture));
      setPictures((before) => [...before, ...read].slice(0, MOST));
    } catch (error) {
      setUnread(error.message);
    }
  };
  const send = (event) => {
    event.preventDefault();
    put(question.trim());
  };
  const keys = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    if (event.key === "Escape" && stop) stop();
  };
  const choices = html`
    <${Card}>
      <div class=${"column-choices n" + shown.length}>
        ${shown.map(
          (one, n) => html`
            <${Column}
              key=${n}
              side=${SIDES[n]}
              column=${one}
              adapters=${list}
              onChange=${(next) => setColumns(columns.map((other, m) => (m === n ? next : other)))}
            />
          `,
        )}
      </div>
      <div class="talk-options">
        <label class="check">
          <input type="checkbox" checked=${two} onChange=${() => setTwo(!two)} /> Two columns
        </label>
        <${Options} options=${options} onChange=${(change) => setOptions({ ...options, ...change })} />
      </div>
    <//>
  `;
  return html`
    <div class="talk">
      ${phone ? html`<${Fold} title=${shown.map((one) => nameOf(one, adapters)).join(" · ")}>${choices}<//>` : choices}
      <div class="turns" role="log" aria-label="Conversation" aria-live="polite">
        ${turns.map((turn, n) => html`<${Turn} key=${n} turn=${turn} />`)}
        ${
          !turns.length &&
          html`
            <p class="soft hint">
              Write a message.${" "}
              ${two ? "Both columns answer the same question, side by side." : "One model answers."}
            </p>
            <${Beginnings} onAsk=${put} />
          `
        }
      </div>
      <${AskForm} onSubmit=${send} onFiles=${take}>
        <${Problem}>${problem || unread}<//>
        ${said && html`<p class="soft waiting" role="status">${said}</p>`}
        <${Pictures}
          pictures=${pictures}
          onRemove=${(at) => setPictures(pictures.filter((_, n) => n !== at))}
        />
        <textarea
          rows="2"
          aria-label="Message"
          placeholder="Message"
          value=${question}
          onInput=${(event) => setQuestion(event.target.value)}
          onKeyDown=${keys}
        ></textarea>
        <div class="actions">
          <button class="button first" disabled=${Boolean(stop) || !question.trim()}>Send</button>
          <${Button} disabled=${!stop} onClick=${() => stop?.()}>Stop<//>
          <${Button} onClick=${reset} disabled=${!turns.length}>New chat<//>
          ${about?.sees && html`<${PictureButton} onFiles=${take} disabled=${pictures.length >= MOST} />`}
          <span class="soft keys">Enter sends, Shift+Enter starts a new line, Escape stops</span>
        </div>
      <//>
      <div ref=${end}></div>
    </div>
  `;
}

export function Place({ path }) {
  const { model: chosen } = useStore(project);
  const [view, setView] = useState("talk");
  const [answer, problem, again] = useAsked(() => Promise.all([api.readAdapters(), api.readModels()]), []);
  const adapters = answer?.[0].adapters || [];
  const bases = useMemo(() => {
    const talking = adapters.filter((one) => one.talks !== false || one.sorts);
    const same = adapters.find((one) => one.base === chosen && !one.revision);
    const file = same ? same.file : answer?.[1].models.find((one) => one.id === chosen)?.path;
    const all = [...talking, { base: chosen, file }, ...adapters].filter((one) => one.base).map(baseOf);
    return [...new Map(all.map((one) => [keyOf(one), one])).values()];
  }, [answer, chosen]);
  const { talked: picked } = useStore(project);
  const pick = (talked) => {
    changeProject({ talked });
    if (path[0]) go("talk");
  };
  const wanted = adapters.find((one) => one.run === path[0]);
  // Of the chosen model the base of its newest adapter.
  const base =
    (!path[0] && bases.find((one) => keyOf(one) === picked)) ||
    (wanted?.base && baseOf(wanted)) ||
    bases.find((one) => one.model === chosen) ||
    bases[0];
  // A classifier writes nothing: it sorts texts, where the others chat.
  const [ways, setWays] = useState({}); // by base: the path of a classifier, or "" for the chat
  const sorters = base ? adapters.filter((one) => one.sorts && isOn(base)(one)) : [];
  const chats = adapters.some((one) => one.talks !== false && base && isOn(base)(one));
  const usual = sorters.find((one) => one === wanted) || (chats || wanted ? null : sorters[0]);
  const way = base && (ways[keyOf(base)] ?? usual?.path ?? "");
  const sorter = sorters.find((one) => one.path === way);
  const free = () =>
    api.closeTalk().then(
      () => tell("The model left the memory"),
      (error) => tell(error.message),
    );
  return html`
    <${Heading}
      title="Talk & ship"
      actions=${html`
        <${Segments}
          label="What to do"
          name="talk-view"
          value=${view}
          options=${[["talk", "Talk"], ["ship", "Ship"]]}
          onChange=${setView}
        />
      `}
    >
      ${
        view !== "talk"
          ? "Take an adapter along to other programs."
          : sorter
            ? "Sort texts with a classifier, and see which answers to leave to a person."
            : "Ask two models the same question, and see what training changed."
      }
    <//>
    <${Problem} again=${again}>${problem}<//>
    ${!answer && !problem && html`<${Waiting}>Looking for adapters<//>`}
    ${
      answer &&
      !base &&
      html`
        <${Card}>
          <${Empty}
            icon="talk"
            title="Nobody to talk to yet"
            action=${html`<${Button} kind="first" onClick=${() => go("model")}>Choose a model<//>`}
          >
            Choose a model to talk to it, and train it to compare.
          <//>
        <//>
      `
    }
    ${
      answer &&
      base &&
      html`
        <div class="stack">
          <div class="toolbar">
            <${Field} label="Model" id="talk-model">
              <select id="talk-model" onChange=${(event) => pick(event.target.value)}>
                ${bases.map(
                  (one) => html`
                    <option key=${keyOf(one)} value=${keyOf(one)} selected=${keyOf(one) === keyOf(base)}>
                      ${labelOf(one)}
                      ${
                        bases.filter((other) => labelOf(other) === labelOf(one)).length > 1 &&
                        ` (${shortPath(one.model)})`
                      }
                    </option>
                  `,
                )}
              </select>
            <//>
            ${
              view === "talk" &&
              sorters.length > 0 &&
              html`
                <${Field} label="What to do with it" id="talk-way">
                  <select
                    id="talk-way"
                    onChange=${(event) => setWays({ ...ways, [keyOf(base)]: event.target.value })}
                  >
                    <option value="" selected=${!sorter}>Chat</option>
                    ${sorters.map(
                      (one) => html`
                        <option key=${one.path} value=${one.path} selected=${one === sorter}>
                          Sort texts with ${one.name}
                        </option>
                      `,
                    )}
                  </select>
                <//>
              `
            }
            ${view === "talk" && html`<${Button} small onClick=${free}>Free its memory<//>`}
          </div>
          ${view === "talk" && sorter && html`<${Sorter} key=${sorter.path} base=${base} adapter=${sorter} />`}
          ${
            view === "talk" &&
            !sorter &&
            html`
              <${Chat}
                key=${keyOf(base)}
                base=${base}
                adapters=${adapters}
                first=${wanted?.base && isOn(base)(wanted) && wanted.talks !== false ? wanted : null}
              />
              `
          }
          ${
            view !== "talk" &&
            html`<${Ship} key=${base.model} model=${base.model} adapters=${adapters} home=${machine.get()?.home} />`
          }
        </div>
      `
    }
  `;
}
