// Every setting of a run: those that most runs need, and all others behind a search. The server says what each is.
import { useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Icon } from "./parts.js";
import { changeSettings, fieldProblems, resetSettings, useStore } from "./state.js";
import { counted, value as shown } from "./format.js";
import { numberReader, textReader, Typed } from "./typed.js";

// These have a place of their own in the studio.
const ELSEWHERE = new Set(["model", "data", "adapter_path", "objective", "method", "resume", "config"]);

// `usual` is what counts while one sets nothing: the card's own, or the default. `chosen` is what the run chooses of
// an open one.
function Control({ setting, value, usual, chosen, id }) {
  const { name, label, type, choices, range, exclusive, word } = setting;
  const now = value ?? usual;
  const take = (next) => changeSettings({ [name]: next === usual ? undefined : next });
  const about = { "aria-describedby": id + "-help" };
  const automatic =
    usual !== null ? String(usual) : chosen === undefined || chosen === null ? "automatic" : `${chosen} (automatic)`;
  if (type === "bool")
    return html`
      <input
        type="checkbox"
        class="switch"
        role="switch"
        id=${id}
        ...${about}
        checked=${now === true}
        onChange=${(event) => take(event.target.checked)}
      />
    `;
  if (choices?.length)
    return html`
      <select
        id=${id}
        ...${about}
        onChange=${(event) => take(event.target.value === "" ? undefined : event.target.value)}
      >
        ${(usual === null ? ["", ...choices] : choices).map(
          (one) => html`
            <option key=${one} value=${one} selected=${String(now ?? "") === String(one)}>
              ${one === "" ? "default" : one}
            </option>
          `,
        )}
      </select>
    `;
  const numeric = type === "int" || type === "float";
  const read = numeric ? numberReader({ whole: type === "int", range, exclusive, word }) : textReader;
  return html`
    <${Typed}
      id=${id}
      name=${label}
      value=${value}
      read=${read}
      numeric=${numeric}
      onValue=${take}
      placeholder=${automatic}
      ...${about}
    />
  `;
}

// `said` is what the server says is wrong with it, `warned` what is doubtful.
export function Setting({ setting, value, said, warned, usual, chosen }) {
  const id = "set-" + setting.name;
  const changed = value !== undefined;
  const wrong = useStore(fieldProblems)[id];
  return html`
    <div class=${"setting" + (changed ? " changed" : "") + (said || wrong ? " wrong" : "")}>
      <div class="setting-words">
        <label for=${id}>${setting.label}</label>
        <p class="help" id=${id + "-help"}>${setting.help}</p>
        ${said && html`<p class="field-problem">${said}</p>`}
        ${warned && html`<p class="field-warning">${warned}</p>`}
      </div>
      <div class="setting-control">
        <${Control} setting=${setting} value=${value} usual=${usual} chosen=${chosen} id=${id} />
        ${
          setting.word &&
          value !== setting.word &&
          html`
            <${Button}
              small
              kind="plain"
              aria-label=${`Set ${setting.label} to ${setting.word}`}
              onClick=${() => changeSettings({ [setting.name]: setting.word })}
            >
              ${setting.word}
            <//>
          `
        }
        ${
          (changed || wrong) &&
          html`
            <${Button}
              small
              kind="plain"
              aria-label=${`Set ${setting.label} back to ${shown(usual)}`}
              onClick=${() => resetSettings([setting.name])}
            >
              Reset
            <//>
          `
        }
      </div>
    </div>
  `;
}

export function SettingsForm({ groups, settings, said = {}, warned = {}, own = {}, chosen = {} }) {
  const [words, setWords] = useState("");
  const asked = words
    .trim()
    .toLowerCase()
    .replace(/^-+/, "")
    .split(/[\s_-]+/)
    .filter(Boolean);
  const all = groups.flatMap((group) => group.settings).filter((one) => !ELSEWHERE.has(one.name));
  const matches = (one) =>
    asked.every((word) => `${one.name.replaceAll("_", " ")} ${one.label} ${one.help}`.toLowerCase().includes(word));
  const found = asked.length ? all.filter(matches) : [];
  const changed = all.filter((one) => settings[one.name] !== undefined);
  // What only another method or objective has is found by the search, and not listed.
  const applies = (one) =>
    (!one.method || one.method === (settings.method || "lora")) &&
    (!one.objectives?.length || one.objectives.includes(settings.objective || "sft"));
  const common = all.filter((one) => one.common && applies(one));
  const row = (one) => html`
    <${Setting}
      key=${one.name}
      setting=${one}
      value=${settings[one.name]}
      said=${said[one.name]}
      warned=${warned[one.name]}
      usual=${own[one.name] ?? one.default}
      chosen=${chosen[one.name]}
    />
  `;
  return html`
    <${Card}
      title="Settings"
      note=${
        changed.length
          ? `${counted(changed.length, "setting")} differ${changed.length === 1 ? "s" : ""} from the defaults`
          : "defaults"
      }
      actions=${
        changed.length > 0 &&
        html`<${Button} small onClick=${() => resetSettings(changed.map((one) => one.name))}>Reset all<//>`
      }
    >
      <div class="search">
        <${Icon} name="search" />
        <input
          type="search"
          aria-label=${`Search all ${all.length} settings`}
          placeholder=${`Search all ${all.length} settings`}
          value=${words}
          onInput=${(event) => setWords(event.target.value)}
        />
      </div>
      ${
        asked.length
          ? html`
            <div class="settings" aria-live="polite">
              ${found.map(row)}
              ${!found.length && html`<p class="soft">No setting has these words in its name or help.</p>`}
            </div>
          `
          : html`
            <div class="settings">${common.map(row)}</div>
            ${groups.map((group) => {
              const rest = group.settings.filter((one) => !ELSEWHERE.has(one.name) && !one.common && applies(one));
              return (
                rest.length > 0 &&
                html`
                  <${Group}
                    key=${group.name}
                    name=${group.name}
                    settings=${rest}
                    row=${row}
                    changed=${rest.filter((one) => settings[one.name] !== undefined).length}
                  />
                `
              );
            })}
          `
      }
    <//>
  `;
}

// Rows of a closed group are not made: there are more than a hundred settings.
function Group({ name, settings, row, changed }) {
  const [open, set] = useState(false);
  return html`
    <details onToggle=${(event) => set(event.target.open)}>
      <summary>
        ${name} <span class="soft number">${settings.length}</span>${" "}
        ${changed > 0 && html`<span class="soft">${changed} changed</span>`}
      </summary>
      ${open && html`<div class="settings">${settings.map(row)}</div>`}
    </details>
  `;
}
