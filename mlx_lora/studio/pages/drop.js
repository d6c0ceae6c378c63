// Where files are dropped: they are sent to the studio's data folder, and what was not taken as it was is said.
import { useRef, useState } from "./vendor/hooks.module.js";
import { html, Button, Icon, Meter } from "./parts.js";
import { changeProject, project, tell } from "./state.js";
import * as api from "./api.js";

export const addSet = (path) =>
  changeProject({ sets: [...project.get().sets.filter((one) => one.path !== path), { path, weight: 1 }] });

export function Drop({ onAdded }) {
  const input = useRef(null);
  const [over, setOver] = useState(false);
  const [sending, setSending] = useState([]);
  const [refused, setRefused] = useState([]);
  const take = async (files) => {
    setRefused([]);
    for (const file of files) {
      const show = (share) =>
        setSending((list) => [...list.filter((one) => one.name !== file.name), { name: file.name, share }]);
      show(0);
      try {
        const { path, name, why } = await api.uploadFile(file, show);
        addSet(path);
        if (why) setRefused((list) => [...list, { name: file.name, words: `is here as ${name}: ${why}` }]);
        tell(`${name} was added`);
      } catch (error) {
        const words = error.message.includes(file.name) ? error.message : `${file.name}: ${error.message}`;
        setRefused((list) => [...list, { name: file.name, words, bad: true }]);
      }
      setSending((list) => list.filter((one) => one.name !== file.name));
    }
    onAdded();
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    take([...event.dataTransfer.files]);
  };
  return html`
    <div
      class=${"drop" + (over ? " over" : "")}
      onDragOver=${(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave=${() => setOver(false)}
      onDrop=${drop}
    >
      <${Icon} name="drop" />
      <p>
        <b>Drop files here</b>
      </p>
      <p class="soft">JSONL, JSON, CSV, TSV, Parquet, XLSX, text or Markdown. They stay on this machine.</p>
      <${Button} onClick=${() => input.current.click()}>Choose files<//>
      <input
        ref=${input}
        class="unseen"
        type="file"
        multiple
        tabindex="-1"
        aria-label="Data files"
        onChange=${(event) => {
          take([...event.target.files]);
          event.target.value = "";
        }}
      />
      ${sending.map(
        (one) => html`
          <div key=${one.name} class="sending">
            <span class="soft">${one.name}</span>
            <${Meter} share=${one.share} label=${"Sending " + one.name} />
          </div>
        `,
      )}
      ${
        refused.length > 0 &&
        html`
          <ul class="plain refused" aria-live="polite">
            ${refused.map(
              (one) => html`
                <li key=${one.name} class=${one.bad ? "problem" : "note"}>
                  <span>
                    <b>${one.bad ? "Not added:" : one.name}</b> ${one.words}
                  </span>
                </li>
              `,
            )}
          </ul>
        `
      }
    </div>
  `;
}
