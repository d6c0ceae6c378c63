// The three cards that lead the Train place: each shows the run that it starts. What the rule says stands there at
// once; the plan then says it exactly, with time and memory.
import { useEffect, useState } from "./vendor/hooks.module.js";
import { html, Chip } from "./parts.js";
import { changeProject, onTaskEnd, useAsked } from "./state.js";
import { bytes, count, duration } from "./format.js";
import * as api from "./api.js";

export const USUAL = "balanced";
const CARDS = [
  ["quick", "Quick", "A first look: half as long, a smaller adapter."],
  ["balanced", "Balanced", "What suits this model and data; start here."],
  ["thorough", "Thorough", "Twice as long, a larger adapter; keeps the best."],
];

// The plans of the three cards, the chosen one first: {plans by card, problem, key}. Plans of earlier settings are
// not shown.
export function useCards(whole, chosen, needed) {
  const key = JSON.stringify(whole);
  const [state, set] = useState({ key: "", plans: {}, problem: "" });
  const [turn, again] = useState(0);
  useEffect(() => {
    if (!needed) return undefined;
    const stop = new AbortController();
    const ask = (card) =>
      api.planRun(whole, card, stop.signal).then(
        (plan) => {
          if (stop.signal.aborted) return;
          set((before) => ({
            key,
            problem: "",
            plans: { ...(before.key === key ? before.plans : {}), [card]: plan },
          }));
          if (plan.task)
            onTaskEnd(plan.task.id, () => {
              if (!stop.signal.aborted) again((n) => n + 1);
            }); // a large data set was read
        },
        (error) => {
          if (error.name !== "AbortError" && !stop.signal.aborted)
            set((before) => ({ ...before, problem: error.message }));
        },
      );
    ask(chosen).then(() => {
      if (!stop.signal.aborted) for (const [card] of CARDS) if (card !== chosen) ask(card);
    });
    return () => stop.abort();
  }, [key, needed, turn]);
  return { ...state, plans: state.key === key ? state.plans : {}, fresh: state.key === key };
}

const rateWords = (rate) => (rate === null || rate === undefined ? "–" : String(rate));
const about = (words) => (words === "–" ? "–" : `about ${words}`);
const several = (epochs) => (epochs ? `${epochs === 1 ? "1 pass" : `${count(epochs)} passes`} over the data` : "");

// What a card shows: of its plan, or of the rule until there is one.
function figures(plan, rule) {
  const waits = plan && (plan.waits || (plan.task && plan.steps === null));
  if (!plan?.chosen || waits)
    return {
      steps: about(count(rule?.steps)),
      time: "",
      memory: "",
      rate: rateWords(plan?.chosen?.learning_rate ?? rule?.learning_rate),
      epochs: rule?.epochs,
    };
  const { chosen } = plan;
  return {
    steps: plan.steps === null ? about(count(rule?.steps)) : count(plan.steps),
    time: duration(plan.seconds),
    memory: bytes(plan.peak_bytes),
    rate: rateWords(chosen.learning_rate),
    epochs: chosen.iters ? null : chosen.epochs,
    early: chosen.early_stopping_patience > 0,
  };
}

function OneCard({ id, title, words, plan, rule, chosen }) {
  const shown = figures(plan, rule);
  const pending = html`<span class="pending" role="img" aria-label="being planned"></span>`;
  const rows = [
    ["steps", shown.steps],
    ["time", shown.time || pending],
    ["memory", shown.memory || pending],
    ["learning rate", shown.rate],
  ];
  return html`
    <label class=${"preset run-card" + (chosen ? " chosen" : "")} aria-busy=${plan ? undefined : "true"}>
      <input
        type="radio"
        name="preset"
        value=${id}
        checked=${chosen}
        onChange=${() => changeProject({ preset: id })}
      />
      <b>${title}</b>
      <span class="soft">${words}</span>
      <dl class="card-figures number">
        ${rows.map(
          ([name, one]) => html`
            <div key=${name}>
              <dt>${name}</dt>
              <dd data-figure=${name}>${one}</dd>
            </div>
          `,
        )}
      </dl>
      <span class="soft">
        ${several(shown.epochs) || " "}
        ${shown.early ? "; ends before if it no longer improves" : ""}${" "}
        ${plan?.fits === false && plan.peak_bytes ? html`<${Chip} tone="bad">too large<//>` : null}
      </span>
    </label>
  `;
}

export function Cards({ whole, cards, chosen }) {
  const [answer] = useAsked((signal) => api.readRule(whole, signal), [JSON.stringify(whole)]);
  return html`
    <fieldset class="presets">
      <legend class="unseen">How much to train</legend>
      ${CARDS.map(
        ([id, title, words]) => html`
          <${OneCard}
            key=${id}
            id=${id}
            title=${title}
            words=${words}
            plan=${cards.plans[id]}
            rule=${answer?.cards?.[id]}
            chosen=${id === chosen}
          />
        `,
      )}
    </fieldset>
    <p class="soft help">Time and memory are predicted for this machine, not measured.</p>
  `;
}
