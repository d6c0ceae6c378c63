// Fields that one types into. What one types stays as it is until it is complete: nothing that the page hears
// meanwhile, a plan or a list, replaces it. It is read when one leaves the field, presses Enter, or pauses, and what
// cannot be read yet is told.
import { useEffect, useRef, useState } from "./vendor/hooks.module.js";
import { html } from "./parts.js";
import { fieldProblems, fieldsReset, noteField, useStore } from "./state.js";

const PAUSE_MS = 900; // between two keys of one who still types
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

// A reader returns {value}, {problem}, or {unfinished: true} for the beginning of a number. Bounds as the server has
// them.
export function numberReader({ whole = false, range = null, exclusive = false, word = null }) {
  const [low, high] = range || [null, null];
  return (text) => {
    const said = text.trim();
    if (said === "") return { value: undefined };
    if (word && said === word) return { value: word };
    if (word?.startsWith(said)) return { unfinished: true, problem: `neither a number nor ${word} yet` };
    if (/^\d+,\d+$/.test(said)) return { problem: `${said}: write the decimal point as in ${said.replace(",", ".")}` };
    if (!NUMBER.test(said))
      return /^[+-]?\.?$|e[+-]?$/i.test(said)
        ? { unfinished: true, problem: "not a whole number yet".replace(whole ? "" : " whole", "") }
        : { problem: `${said}: not a number` };
    const value = Number(said);
    if (whole && !Number.isInteger(value)) return { problem: `${said}: must be a whole number` };
    if (low !== null && (exclusive ? value <= low : value < low))
      return { problem: `${said}: must be ${exclusive ? "more than" : "at least"} ${low}` };
    if (high !== null && value > high) return { problem: `${said}: must be at most ${high}` };
    return { value, unfinished: said.endsWith(".") };
  };
}
export const textReader = (text) => ({ value: text.trim() === "" ? undefined : text });

// `value` is what counts now, `onValue` hears a complete one. `name` says in a problem which field it is.
export function Typed({ id, name, value, read = textReader, onValue, area, numeric, class: kind = "", ...rest }) {
  const [draft, setDraft] = useState(null);
  const resets = useStore(fieldsReset);
  const problem = useStore(fieldProblems)[id]?.problem;
  const now = useRef({});
  const timer = useRef(0);
  now.current = { ...now.current, value, read, onValue, draft };
  const settle = (text, left) => {
    const { value: next, problem: wrong, unfinished } = now.current.read(text);
    if (!wrong && (left || !unfinished) && next !== now.current.value) now.current.onValue(next);
    noteField(id, wrong ? { name, problem: wrong } : null);
    return !wrong;
  };
  const typed = (event) => {
    const text = event.target.value;
    clearTimeout(timer.current);
    setDraft(text);
    noteField(id, null);
    timer.current = setTimeout(() => settle(text, false), PAUSE_MS);
  };
  const leave = () => {
    clearTimeout(timer.current);
    if (now.current.draft !== null && settle(now.current.draft, true)) setDraft(null);
    now.current.focused = false;
  };
  const key = (event) => {
    if (event.key === "Enter" && !area && now.current.draft !== null) {
      clearTimeout(timer.current);
      settle(now.current.draft, true);
    }
  };
  // A value that changes from elsewhere (a preset, Reset) counts, unless one is typing here.
  useEffect(() => {
    if (!now.current.focused && now.current.draft !== null) {
      setDraft(null);
      noteField(id, null);
    }
  }, [value]);
  useEffect(() => {
    if (now.current.draft !== null && resets) {
      clearTimeout(timer.current);
      setDraft(null);
      noteField(id, null);
    }
  }, [resets]);
  useEffect(
    () => () => {
      clearTimeout(timer.current);
      if (now.current.draft !== null) settle(now.current.draft, true);
      noteField(id, null);
    },
    [],
  );
  const common = {
    id,
    value: draft ?? String(value ?? ""),
    class: `${kind} ${numeric ? "numeric" : ""}`,
    onInput: typed,
    onFocus: () => {
      now.current.focused = true;
    },
    onBlur: leave,
    onKeyDown: key,
    "aria-invalid": problem ? "true" : undefined,
    "aria-errormessage": problem ? id + "-problem" : undefined,
    ...rest,
  };
  return html`
    ${
      area
        ? html`<textarea ...${common}></textarea>`
        : html`
          <input
            type="text"
            inputmode=${numeric ? "decimal" : undefined}
            autocomplete="off"
            spellcheck="false"
            ...${common}
          />
        `
    }
    ${problem && html`<span class="field-problem" id=${id + "-problem"} role="alert">${problem}</span>`}
  `;
}
