// The frame around the places: sidebar, what runs in the background, the key when the server wants one.
import { render } from "./vendor/preact.module.js";
import { useEffect, useRef, useState } from "./vendor/hooks.module.js";
import { html, Button, Icon, Problem, TaskLine } from "./parts.js";
import { begin, keyWanted, linkTo, machine, notice, place, taskEnded, tasks, useStore } from "./state.js";
import { bytes } from "./format.js";
import * as api from "./api.js";

// The server lists the places in the page, one link for each script in places/.
const links = [...document.querySelectorAll("link[data-place]")];
const scripts = await Promise.all(links.map((link) => import(link.href)));
const PLACES = scripts
  .map(({ title, order, icon, Place }, n) => ({ id: links[n].dataset.place, title, order, icon, Place }))
  .sort((one, other) => one.order - other.order);

function Sidebar({ at, state }) {
  return html`
    <aside class="sidebar">
      <a class="brand" href=${linkTo(PLACES[0].id)}>mlx-lora <span>studio</span></a>
      <nav aria-label="Places">
        ${PLACES.map(
          ({ id, title, icon }) => html`
            <a key=${id} href=${linkTo(id)} aria-current=${at === id ? "page" : undefined}>
              <${Icon} name=${icon} />
              <span>${title}</span>
            </a>
          `,
        )}
      </nav>
      ${
        state &&
        html`
          <dl class="mac">
            <dt>This machine</dt>
            <dd>${state.machine.chip}</dd>
            <dd class="number">
              ${bytes(state.machine.working_set_bytes)} of ${bytes(state.machine.memory_bytes)} usable
            </dd>
          </dl>
        `
      }
    </aside>
  `;
}

function KeyForm({ wanted, onKey }) {
  const [key, set] = useState("");
  const send = (event) => {
    event.preventDefault();
    api.useKey(key);
    onKey();
  };
  return html`
    <main class="gate" id="main">
      <form class="card" onSubmit=${send}>
        <h1>This studio needs its key</h1>
        <p class="soft">The key stays in this page's memory only, and is gone when you close the page.</p>
        ${wanted === "again" && html`<${Problem}>The server does not accept this key.<//>`}
        <div class="field">
          <label for="key">API key</label>
          <input
            id="key"
            type="password"
            autocomplete="off"
            spellcheck="false"
            required
            autofocus
            value=${key}
            onInput=${(event) => set(event.target.value)}
          />
        </div>
        <button class="button first">Open the studio</button>
      </form>
    </main>
  `;
}

function Background() {
  const list = useStore(tasks);
  const [hidden, hide] = useState(() => new Set());
  const old = useRef(null);
  // What had ended before the page was opened is no news.
  if (old.current === null && list.length) old.current = new Set(list.filter(taskEnded).map((task) => task.id));
  const shown = list.filter((task) => !hidden.has(task.id) && !old.current?.has(task.id)).slice(0, 4);
  if (!shown.length) return null;
  return html`
    <section class="background" aria-label="Tasks" aria-live="polite">
      ${shown.map(
        (task) => html`
          <div key=${task.id} class="background-task">
            <${TaskLine} task=${task} />
            ${
              taskEnded(task) &&
              html`
                <${Button}
                  small
                  kind="plain"
                  icon="close"
                  aria-label=${"Hide: " + task.title}
                  onClick=${() => hide(new Set([...hidden, task.id]))}
                />
              `
            }
          </div>
        `,
      )}
    </section>
  `;
}

function Studio() {
  const [at, ...rest] = useStore(place);
  const state = useStore(machine);
  const wanted = useStore(keyWanted);
  const said = useStore(notice);
  const [problem, setProblem] = useState("");
  const first = useRef(true);
  const start = () =>
    begin().then(
      () => setProblem(""),
      (error) => {
        if (error.status !== 401) setProblem(error.message);
      },
    );
  useEffect(() => {
    start();
  }, []);
  const { id, title, Place } = PLACES.find((one) => one.id === at) || PLACES[0];
  useEffect(() => {
    document.title = `${title} · mlx-lora studio`;
    if (first.current) {
      first.current = false;
      return;
    }
    scrollTo(0, 0);
    document.querySelector("h1")?.focus(); // a new place begins at its heading, for the keyboard and for screen readers
  }, [id, ...rest]);
  if (wanted) return html`<${KeyForm} wanted=${wanted} onKey=${start} />`;
  return html`
    <a
      class="skip"
      href="#main"
      onClick=${(event) => {
        event.preventDefault();
        document.querySelector("h1")?.focus();
      }}
    >
      Skip to content
    </a>
    <${Sidebar} at=${id} state=${state} />
    <main id="main" class=${"place " + id}>
      <${Problem} again=${start}>${problem}<//>
      ${state && html`<${Place} key=${id} path=${rest} />`}
    </main>
    <${Background} />
    <p class=${"notice" + (said ? " shown" : "")} role="status">${said}</p>
  `;
}

const root = document.getElementById("studio");
root.replaceChildren(); // the shell that stood here while the scripts loaded
render(html`<${Studio} />`, root);
