// One run as it goes: state, progress, curves, sample texts, log. Used by Train for the run of the moment, by Runs for any.
import { useEffect, useMemo, useRef, useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Command, Meter, Problem, StateChip, Waiting } from "./parts.js";
import { Chart, growing, last } from "./chart.js";
import { tell } from "./state.js";
import { bytes, count, duration, loss, rate } from "./format.js";
import * as api from "./api.js";

const COLUMNS = ["step", "loss", "val_loss", "learning_rate", "tokens_per_s", "peak_memory_bytes"];
const LINES = 200, SAMPLES = 60;
const ACTIVE = new Set(["running", "queued"]);

// Follow a run: [facts, metrics, problem, ask again]. What arrives is gathered and shown at most twice a second.
export function useRun(id) {
  const [run, setRun] = useState(null), [problem, setProblem] = useState(""), [turn, setTurn] = useState(0), [drawn, draw] = useState(0);
  const metrics = useMemo(() => growing(COLUMNS), [id]);
  useEffect(() => {
    const stop = new AbortController();
    let facts = null, timer = 0;
    const show = () => { if (!timer) timer = setTimeout(() => { timer = 0; setRun({ ...facts }); draw((n) => n + 1); }, 500); };
    const afresh = () => { setTurn((n) => n + 1); return true; };
    const heard = ({ type, ...told }) => {
      if (type === "metrics") metrics.add(told.metrics);
      else if (type === "log") facts.log = [...facts.log, ...told.lines].slice(-LINES);
      else if (type === "sample") facts.samples = told.samples.slice(-SAMPLES);
      else if (type === "state") Object.assign(facts, told);
      show();
      // At the end everything is read once more: what can be resumed, the adapter, what was forgotten.
      return (type === "gone" || (type === "state" && !ACTIVE.has(facts.state))) && afresh();
    };
    api.readRun(id, stop.signal).then((answer) => {
      const { metrics: known, ...rest } = answer; // the columns live in `metrics`, once
      facts = { ...rest, log: rest.log || [], samples: (rest.samples || []).slice(-SAMPLES) };
      metrics.fill(known || {});
      setRun({ ...facts });
      setProblem("");
      draw((n) => n + 1);
      if (ACTIVE.has(facts.state)) api.followRun(id, metrics.columns.step.at(-1) ?? 0, heard, stop.signal, afresh);
    }, (error) => { if (error.name !== "AbortError") setProblem(error.message); });
    return () => { stop.abort(); clearTimeout(timer); };
  }, [id, turn]);
  return [run, metrics, problem, () => setTurn((n) => n + 1), drawn];
}

export function Steering({ run, onChange }) {
  const [problem, setProblem] = useState(""), [busy, setBusy] = useState("");
  const steer = async (verb, said) => {
    setBusy(verb);
    try { await api.steerRun(run.id, verb); setProblem(""); tell(said); onChange(); } catch (error) { setProblem(error.message); }
    setBusy("");
  };
  const running = run.state === "running", resumable = !running && run.state !== "queued" && (run.can_resume ?? ["paused", "killed", "stopped"].includes(run.state));
  return html`<span class="actions">${running && html`<${Button} small busy=${busy === "pause"} disabled=${busy} onClick=${() => steer("pause", "The run saves and ends; resume it when you like")}>${busy === "pause" ? "Saving" : "Pause"}<//><${Button} small kind="danger" busy=${busy === "stop"} disabled=${busy} onClick=${() => steer("stop", "The run was stopped")}>Stop<//>`}
    ${resumable && html`<${Button} small kind="first" busy=${busy === "resume"} disabled=${busy} onClick=${() => steer("resume", "The run continues")}>Resume<//>`}<${Problem}>${problem}<//></span>`;
}

function Curves({ run, metrics, drawn }) {
  const { columns } = metrics, held = useMemo(() => columns.val_loss.some((one) => one !== null), [drawn]);
  const pick = (...names) => useMemo(() => names.map((name) => columns[name]), [drawn]);
  const lossData = pick("step", "loss", "val_loss"), lrData = pick("step", "learning_rate"), rateData = pick("step", "tokens_per_s"), memoryData = pick("step", "peak_memory_bytes");
  if (!metrics.size) return html`<p class="soft">${ACTIVE.has(run.state) ? "The first numbers appear with the first report." : "This run reported no numbers."}</p>`;
  const lossSeries = [{ label: "loss", color: "c0" }, { label: "held-out loss", color: "c1", dots: true }].slice(0, held ? 2 : 1);
  return html`<div class="charts"><div class="chart-wide"><${Chart} title="Loss" height=${250} series=${lossSeries} data=${held ? lossData : lossData.slice(0, 2)} words=${loss} /></div>
    <${Chart} title="Learning rate" zero series=${[{ label: "rate", color: "c3" }]} data=${lrData} words=${(one) => (one === null || one === undefined ? "–" : one === 0 ? "0" : one.toExponential(1))} />
    <${Chart} title="Speed" zero series=${[{ label: "tokens/s", color: "c2" }]} data=${rateData} words=${rate} />
    <${Chart} title="Memory" zero series=${[{ label: "peak", color: "c4" }]} data=${memoryData} words=${bytes} limit=${run.plan_peak_bytes} limitWords=${"planned " + bytes(run.plan_peak_bytes)} /></div>`;
}

// The newest text of each prompt, with the ones before it a click away.
function Samples({ samples }) {
  const prompts = [...new Set(samples.map((one) => one.prompt))];
  if (!prompts.length) return null;
  return html`<${Card} title="Sample texts" note="as they change">${prompts.map((prompt) => {
    const own = samples.filter((one) => one.prompt === prompt), newest = own[own.length - 1];
    return html`<article key=${prompt} class="sample"><p class="sample-prompt">${prompt}</p>${newest.expected && html`<p class="soft">Expected: ${newest.expected}</p>`}<p class="sample-text">${newest.text}</p><p class="soft number">step ${count(newest.step)}</p>
      ${own.length > 1 && html`<details><summary>Earlier</summary>${own.slice(0, -1).reverse().map((one, n) => html`<div key=${n}><p class="soft number">step ${count(one.step)}</p><p class="sample-text">${one.text}</p></div>`)}</details>`}</article>`;
  })}<//>`;
}

function Log({ lines }) {
  const box = useRef(null), follows = useRef(true);
  useEffect(() => { if (follows.current && box.current) box.current.scrollTop = box.current.scrollHeight; }, [lines.length, lines[lines.length - 1]]);
  const scrolled = ({ target }) => { follows.current = target.scrollHeight - target.scrollTop - target.clientHeight < 24; };
  return html`<pre class="log" ref=${box} onScroll=${scrolled} tabindex="0" role="log" aria-live="off" aria-label="Log of the run">${lines.join("\n") || "Nothing yet."}</pre>`;
}

const FACTS = [["step", (run) => `${count(run.step || 0)} of ${count(run.steps)}`], ["loss", (run) => loss(run.loss)], ["held-out loss", (run) => loss(run.val_loss)], ["tokens/s", (run) => rate(run.tokens_per_s)], ["peak memory", (run) => bytes(run.peak_bytes)], ["time", (run) => duration(run.seconds)]];

// What happened to a run that is not well, and what to do.
function Reason({ run }) {
  const resume = run.can_resume ? " Everything up to the last checkpoint is there: resume continues from it." : "";
  if (run.state === "killed") return html`<p class="problem" role="alert">${run.reason || "The run's process ended without a message."}${resume}</p>`;
  if (run.state === "failed") return html`<p class="problem" role="alert">${run.reason || "The run failed; its log says why."}${resume}</p>`;
  return run.reason ? html`<p class="note">${run.reason}</p>` : null;
}

// What became of a run that has ended, and what mends it: the sentence of the report.
function Verdict({ run }) {
  const { headline, mend, command } = run.verdict || {};
  if (!headline || ACTIVE.has(run.state)) return null;
  return html`<div class="note verdict-of-run" role="status"><p>${headline}</p>${mend && html`<p>${mend}</p>`}${command && html`<${Command} text=${command} label="As a command" />`}</div>`;
}

export function LiveRun({ id, title, onState }) {
  const [run, metrics, problem, again, drawn] = useRun(id);
  useEffect(() => { if (run && onState) onState(run); }, [run?.state]);
  if (problem) return html`<${Card} title=${title}><${Problem} again=${again}>${problem}<//><//>`;
  if (!run) return html`<${Card} title=${title}><${Waiting}>Reading the run<//><//>`;
  const left = run.state === "running" && run.step && run.steps ? (run.seconds / run.step) * (run.steps - run.step) : null;
  // The tiles say what the curves end with: both come from the same rows.
  const now = { ...run, loss: last(metrics.columns.loss) ?? run.loss, val_loss: last(metrics.columns.val_loss) ?? run.val_loss };
  return html`<${Card} kind="live" title=${title || run.name} note=${html`<${StateChip} state=${run.state} />`} actions=${html`<${Steering} run=${run} onChange=${again} />`}>
      <${Reason} run=${run} /><${Verdict} run=${run} />
      ${run.state === "running" && html`<${Meter} share=${run.steps ? (run.step || 0) / run.steps : null} label=${"Progress of " + run.name} />`}
      <p class="unseen" aria-live="polite">${run.name}: ${run.state}${run.state === "running" ? "" : `, loss ${loss(now.loss)}`}</p>
      <dl class="tiles">${FACTS.map(([words, tell]) => html`<div key=${words}><dt>${words}</dt><dd class="number">${tell(now)}</dd></div>`)}</dl>
      ${left !== null && html`<p class="soft number">about ${duration(left)} left</p>`}
      <${Curves} run=${run} metrics=${metrics} drawn=${drawn} /><//>
    <${Samples} samples=${run.samples} />
    <${Card} title="Log"><${Log} lines=${run.log} /><//>`;
}
