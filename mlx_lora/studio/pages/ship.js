// Ship: an adapter in the form that another program reads, what that needs, and the command that does the same.
import { useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Chip, Command, CopyButton, Empty, Field, Problem, TaskLine, Waiting } from "./parts.js";
import { go, tasks, taskEnded, useAsked, useStore } from "./state.js";
import { bytes, shortPath } from "./format.js";
import * as api from "./api.js";

const TARGETS = [
  ["peft", "PEFT", "A folder for PEFT and transformers."],
  ["gguf-adapter", "GGUF adapter", "A small file for llama.cpp, beside its base."],
  ["gguf", "GGUF model", "Base and adapter in one file, for llama.cpp and LM Studio."],
  ["mlx-lm", "mlx-lm", "A folder for stock mlx-lm."],
  ["fuse", "MLX model", "Base and adapter in one MLX folder, quantized as the base is."],
  ["hf", "Model folder", "Base and adapter as one Hugging Face folder."],
  ["ollama", "Ollama", "A Modelfile; ollama create makes a model of it."],
  ["hub", "Hugging Face", "Upload the adapter with its card."],
];

function Target({ id, title, words, need, why, chosen, onChoose }) {
  return html`
    <label class=${"preset" + (chosen ? " chosen" : "")}>
      <input type="radio" name="target" checked=${chosen} disabled=${Boolean(why)} onChange=${() => onChoose(id)} />
      <b>${need?.label || title}</b>
      <span class="soft">${words}</span>
      ${
        why &&
        html`
          <span class="need">
            <${Chip} tone="warn">not with this adapter<//>${" "}
            <span class="soft">${why}</span>
          </span>
        `
      }
      ${
        need &&
        !why &&
        html`
          <span class="need">
            <${Chip} tone=${need.ok ? "good" : "warn"}>
              ${need.ok ? "can be made here" : "something is missing"}
            <//>${" "}
            <span class="soft">Needs: ${need.needs}</span>
          </span>
        `
      }
    </label>
  `;
}

export function Ship({ model, adapters }) {
  const [needs] = useAsked(() => api.readNeeds(), []);
  const list = useStore(tasks);
  const adapterName = (path) => adapters.find((one) => one.path === path)?.name || "adapter";
  const own = adapters.filter((one) => !one.base || one.base === model);
  const offered = own.length ? own : adapters;
  const [type, setType] = useState("");
  const [path, setPath] = useState(offered[0]?.path || "");
  const [target, setTo] = useState("gguf");
  const [out, setOut] = useState("");
  const [sent, setSent] = useState(null);
  const [problem, setProblem] = useState("");
  if (!offered.length)
    return html`
      <${Card}>
        <${Empty}
          icon="train"
          title="No adapter yet"
          action=${html`<${Button} kind="first" onClick=${() => go("train", "new")}>Train one<//>`}
        >
          An adapter is what a run makes. When a run has ended, it can be exported here.
        <//>
      <//>
    `;
  const refused = offered.find((one) => one.path === path)?.refused || {};
  // First what can be made here, then what lacks something, then what this adapter cannot become.
  const lacks = ([id]) => (refused[id] ? 2 : needs?.[id]?.ok === false ? 1 : 0);
  const targets = [...TARGETS].sort((one, other) => lacks(one) - lacks(other));
  const to = refused[target] ? targets[0][0] : target;
  const usual = `${adapterName(path)}-${to}${to.startsWith("gguf") ? ".gguf" : ""}`;
  const send = async (event) => {
    event.preventDefault();
    try {
      const { task, command } = await api.exportAdapter({
        model,
        adapter: path,
        to,
        out: (to !== "hub" && out.trim()) || usual,
        options: to === "hub" ? { repo: out.trim() } : to === "gguf" && type ? { gguf_type: type } : {},
      });
      setProblem("");
      setSent({ id: task.id || task, command });
    } catch (error) {
      setProblem(error.message);
    }
  };
  const task = sent && list.find((one) => one.id === sent.id);
  const result = task?.result;
  return html`
    <form class="stack" onSubmit=${send}>
      <${Card} title="Adapter">
        <${Field} label="Which adapter" id="ship-adapter">
          <select id="ship-adapter" onChange=${(event) => setPath(event.target.value)}>
            ${offered.map(
              (one) => html`
                <option key=${one.path} value=${one.path} selected=${one.path === path}>
                  ${one.name}
                </option>
              `,
            )}
          </select>
        <//>
      <//>
      <${Card} title="For which program">
        <fieldset class="presets targets">
          <legend class="unseen">Target</legend>
          ${targets.map(
            ([id, title, words]) => html`
              <${Target}
                key=${id}
                id=${id}
                title=${title}
                words=${words}
                need=${needs?.[id]}
                why=${refused[id]}
                chosen=${id === to}
                onChoose=${setTo}
              />
            `,
          )}
        </fieldset>
        <div class="fields">
          <${Field} label=${to === "hub" ? "Repository" : "Name of what is made"} id="ship-out">
            <input
              id="ship-out"
              value=${out}
              required=${to === "hub"}
              placeholder=${to === "hub" ? "your-name/your-adapter" : usual}
              spellcheck="false"
              onInput=${(event) => setOut(event.target.value)}
            />
          <//>
          ${
            to === "gguf" &&
            needs?.gguf?.types &&
            html`
              <${Field} label="Weights as" id="ship-type">
                <select id="ship-type" onChange=${(event) => setType(event.target.value)}>
                  <option value="">f16, or for qa-lora the base’s own</option>
                  ${needs.gguf.types.map(
                    (one) => html`<option key=${one} value=${one} selected=${one === type}>${one}</option>`,
                  )}
                </select>
              <//>
            `
          }
          <button class="button first" disabled=${task && !taskEnded(task)}>
            ${to === "hub" ? "Upload" : "Export"}
          </button>
        </div>
        <${Problem}>${problem}<//>
      <//>
      ${
        sent &&
        html`
          <${Card} title="Export" aria-live="polite">
            ${task ? html`<${TaskLine} task=${task} />` : html`<${Waiting}>Starting<//>`}
            ${
              result?.path &&
              html`
                <p class="made">
                  <span class="path">${shortPath(result.path)}</span>
                  ${result.bytes ? html`<span class="soft number">${bytes(result.bytes)}</span>` : ""}
                  <${CopyButton} text=${result.path}>Copy path<//>
                </p>
                ${result.next && html`<p class="soft">${result.next}</p>`}
              `
            }
            <${Command} text=${sent.command} />
          <//>
        `
      }
    </form>
  `;
}
