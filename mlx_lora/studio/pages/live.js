// One run as it goes: state, progress, curves, texts, log. Used by Train for the run of the moment, by Runs for any.
import { useEffect, useMemo, useRef, useState } from "./vendor/hooks.module.js";
import { html, Button, Card, Command, Dialog, Fold, Meter, Problem, StateChip, Waiting } from "./parts.js";
import { Chart, growing, last } from "./chart.js";
import { linkTo, tell } from "./state.js";
import { bytes, count, counted, duration, loss, rate } from "./format.js";
import * as api from "./api.js";

const COLUMNS = ["step", "loss", "val_loss", "learning_rate", "tokens_per_s", "peak_memory_bytes"];
const LINES = 200;
const SAMPLES = 60;
const ACTIVE = new Set(["running", "queued"]);

// Follow a run: [facts, metrics, problem, ask again]. What arrives is gathered and shown at most twice a second.
export function useRun(id) {
  const [run, setRun] = useState(null);
  const [problem, setProblem] = useState("");
  const [turn, setTurn] = useState(0);
  const [drawn, draw] = useState(0);
  const metrics = useMemo(() => growing(COLUMNS), [id]);
  useEffect(() => {
    const stop = new AbortController();
    let facts = null;
    let timer = 0;
    const show = () => {
      if (!timer)
        timer = setTimeout(() => {
          timer = 0;
          setRun({ ...facts });
          draw((n) => n + 1);
        }, 500);
    };
    const afresh = () => {
      setTurn((n) => n + 1);
      return true;
    };
    const heard = ({ type, ...told }) => {
      if (type === "metrics") metrics.add(told.metrics);
      else if (type === "log") facts.log = [...facts.log, ...told.lines].slice(-LINES);
      else if (type === "sample") facts.samples = told.samples.slice(-SAMPLES);
      else if (type === "state") Object.assign(facts, told);
      show();
      // At the end everything is read once more: what can be resumed, the adapter, what was forgotten.
      return (type === "gone" || (type === "state" && !ACTIVE.has(facts.state))) && afresh();
    };
    api.readRun(id, stop.signal).then(
      (answer) => {
        const { metrics: known, ...rest } = answer; // the columns live in `metrics`, once
        facts = { ...rest, log: rest.log || [], samples: (rest.samples || []).slice(-SAMPLES) };
        metrics.fill(known || {});
        setRun({ ...facts });
        setProblem("");
        draw((n) => n + 1);
        if (ACTIVE.has(facts.state)) api.followRun(id, metrics.columns.step.at(-1) ?? 0, heard, stop.signal, afresh);
      },
      (error) => {
        if (error.name !== "AbortError") setProblem(error.message);
      },
    );
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [id, turn]);
  return [run, metrics, problem, () => setTurn((n) => n + 1), drawn];
}

const ENDS = [
  ["pause", "Pause", "", "Saves, frees the memory, and waits: Resume continues at the same step."],
  ["stop", "Stop", "danger", "Saves and ends here. What it has learned so far is its adapter, ready to talk to."],
];

// `asked` is how the run was asked to end; it finishes its step and saves first.
export function Steering({ run, asked, onAsk, onChange }) {
  const [problem, setProblem] = useState("");
  const [busy, setBusy] = useState("");
  const [question, setQuestion] = useState("");
  const steer = async (verb, said, agreed) => {
    setBusy(verb);
    setQuestion("");
    try {
      await api.steerRun(run.id, verb, agreed);
      setProblem("");
      tell(said);
      if (verb !== "resume") onAsk(verb);
      onChange();
    } catch (error) {
      if (error.code === "runs_code") setQuestion(error.message);
      else setProblem(error.message);
    }
    setBusy("");
  };
  const running = run.state === "running";
  const resumable =
    !running && run.state !== "queued" && (run.can_resume ?? ["paused", "killed", "stopped"].includes(run.state));
  return html`
    <span class="actions">
      ${
        running &&
        !asked &&
        ENDS.map(
          ([verb, words, kind, help]) => html`
            <${Button}
              key=${verb}
              small
              kind=${kind}
              busy=${busy === verb}
              disabled=${busy}
              title=${help}
              aria-describedby="ends"
              onClick=${() => steer(verb, verb === "pause" ? "The run saves and waits" : "The run saves and ends")}
            >
              ${words}
            <//>
          `,
        )
      }
      ${
        resumable &&
        html`
          <${Button}
            small
            kind="first"
            busy=${busy === "resume"}
            disabled=${busy}
            onClick=${() => steer("resume", "The run continues")}
          >
            Resume
          <//>
        `
      }
      <${Problem}>${problem}<//>
      ${
        question &&
        html`
          <${Dialog}
            title="Run this code?"
            onClose=${() => setQuestion("")}
            actions=${html`
              <${Button} onClick=${() => setQuestion("")}>Cancel<//>
              <${Button} kind="danger solid" onClick=${() => steer("resume", "The run continues", question)}>
                Run it and resume
              <//>
            `}
          >
            <p>This run did not begin on this machine, and it brings code. Read the code before you run it.</p>
            <p class="soft path">${question}</p>
          <//>
        `
      }
    </span>
  `;
}

// What the buttons do, and, once one was pressed, what the run still does before it ends.
function Ends({ run, asked }) {
  if (run.state !== "running") return null;
  if (asked)
    return html`
      <p class="note waiting" role="status">
        ${asked === "pause" ? "Pausing" : "Stopping"}: the step that is being computed is finished
        ${run.step_s > 2 ? ` (a step takes about ${duration(run.step_s)})` : ""}, then everything is saved.
      </p>
    `;
  return html`
    <p class="soft help" id="ends">
      ${ENDS.map(
        ([verb, words, , help], n) => html`
          <span key=${verb}>
            ${n > 0 && " "}
            <b>${words}</b>: ${help}
          </span>
        `,
      )}
    </p>
  `;
}

function Curves({ run, metrics, drawn }) {
  const { columns } = metrics;
  const held = useMemo(() => columns.val_loss.some((one) => one !== null), [drawn]);
  const pick = (...names) => useMemo(() => names.map((name) => columns[name]), [drawn]);
  const lossData = pick("step", "loss", "val_loss");
  const lrData = pick("step", "learning_rate");
  const rateData = pick("step", "tokens_per_s");
  const memoryData = pick("step", "peak_memory_bytes");
  if (!metrics.size)
    return html`
      <p class="soft">
        ${ACTIVE.has(run.state) ? "The first numbers appear with the first report." : "This run reported no numbers."}
      </p>
    `;
  const lossSeries = [
    { label: "loss", color: "c0" },
    { label: "held-out loss", color: "c1", dots: true },
  ].slice(0, held ? 2 : 1);
  return html`
    <div class="charts">
      <div class="chart-wide">
        <${Chart}
          title="Loss"
          height=${250}
          series=${lossSeries}
          data=${held ? lossData : lossData.slice(0, 2)}
          words=${loss}
        />
      </div>
      <${Chart}
        title="Learning rate"
        zero
        series=${[{ label: "rate", color: "c3" }]}
        data=${lrData}
        words=${(one) => (one === null || one === undefined ? "–" : one === 0 ? "0" : one.toExponential(1))}
      />
      <${Chart} title="Speed" zero series=${[{ label: "tokens/s", color: "c2" }]} data=${rateData} words=${rate} />
      <${Chart}
        title="Memory"
        zero
        series=${[{ label: "peak", color: "c4" }]}
        data=${memoryData}
        words=${bytes}
        limit=${run.plan_peak_bytes}
        limitWords=${"planned " + bytes(run.plan_peak_bytes)}
      />
    </div>
  `;
}

// The newest text of each prompt beside the base's; those between them a click away.
function Samples({ samples }) {
  // A question may be asked about several pictures.
  const keyOf = (one) => [one.prompt, ...(one.pictures || [])].join("\n");
  const prompts = [...new Set(samples.map(keyOf))];
  if (!prompts.length) return null;
  const text = (one, key) => html`
    <div key=${key} class="sample-said">
      <p class="soft number">${one.step ? `after ${counted(one.step, "step")}` : "before training"}</p>
      <p class="sample-text">${one.text}</p>
    </div>
  `;
  return html`
    <${Card} title="Sample texts" note="the same beginning, before and after">
      ${prompts.map((prompt) => {
        const own = samples.filter((one) => keyOf(one) === prompt);
        const newest = own[own.length - 1];
        const between = own.slice(1, -1);
        return html`
          <article key=${prompt} class="sample">
            ${
              newest.pictures &&
              html`
                <ul class="plain turn-pictures sample-pictures">
                  ${newest.pictures.map(
                    (url, n) => html`<li key=${n}><img src=${url} alt=${`Picture ${n + 1}`} /></li>`,
                  )}
                </ul>
              `
            }
            <p class="sample-prompt">${newest.prompt}</p>
            ${newest.expected && html`<p class="soft">Expected: ${newest.expected}</p>`}
            <div class="sample-pair">
              ${own.length > 1 && text(own[0], "first")}
              ${text(newest, "newest")}
            </div>
            ${
              between.length > 0 &&
              html`
                <details>
                  <summary>In between</summary>
                  ${between.reverse().map(text)}
                </details>
              `
            }
          </article>
        `;
      })}
    <//>
  `;
}

// The reports of a run whose own output was not kept: that of a terminal's run.
const reported = ({ step, loss: losses, val_loss, learning_rate, tokens_per_s }) =>
  step.map((at, n) =>
    [
      `step ${at}`,
      losses[n] !== null && `loss ${loss(losses[n])}`,
      val_loss[n] !== null && `held-out loss ${loss(val_loss[n])}`,
      losses[n] !== null && learning_rate[n] !== null && `lr ${learning_rate[n].toExponential(2)}`,
      losses[n] !== null && tokens_per_s[n] !== null && `${rate(tokens_per_s[n])} tokens/s`,
    ]
      .filter(Boolean)
      .join(", "),
  );

function Log({ lines }) {
  const box = useRef(null);
  const follows = useRef(true);
  useEffect(() => {
    if (follows.current && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [lines.length, lines[lines.length - 1]]);
  const scrolled = ({ target }) => {
    follows.current = target.scrollHeight - target.scrollTop - target.clientHeight < 24;
  };
  return html`
    <pre
      class="log"
      ref=${box}
      onScroll=${scrolled}
      tabindex="0"
      role="log"
      aria-live="off"
      aria-label="Log of the run"
    >
      ${lines.join("\n") || "Nothing yet."}
    </pre>
  `;
}

const FACTS = [
  ["step", (run) => `${count(run.step || 0)} of ${count(run.steps)}`],
  ["loss", (run) => loss(run.loss)],
  [
    "held-out loss",
    (run) => html`
      ${loss(run.val_loss)}
      ${
        run.val_step && run.val_step !== run.step
          ? html`<span class="soft beside">at step ${count(run.val_step)}</span>`
          : null
      }
    `,
  ],
  ["tokens/s", (run) => rate(run.tokens_per_s)],
  ["peak memory", (run) => bytes(run.peak_bytes)],
  ["time", (run) => duration(run.seconds)],
];

// The newest held-out loss of a trained model; that of step 0 is the base's, and no result.
function lastHeld({ step, val_loss: values }) {
  for (let at = values.length - 1; at >= 0; at--)
    if (values[at] !== null && step[at] > 0) return { value: values[at], step: step[at] };
  return null;
}

// What happened to a run that is not well, and what to do.
function Reason({ run }) {
  const resume = run.can_resume ? " Everything up to the last checkpoint is there: resume continues from it." : "";
  if (run.state === "killed")
    return html`
      <p class="problem" role="alert">
        ${run.reason || "The run's process ended without a message."}
        ${resume}
      </p>
    `;
  if (run.state === "failed")
    return html`
      <p class="problem" role="alert">
        ${run.reason || "The run failed; its log says why."}
        ${resume}
      </p>
    `;
  return run.reason ? html`<p class="note">${run.reason}</p>` : null;
}

// What became of a run that has ended, and what mends it: the sentence of the report.
function Verdict({ run }) {
  const { headline, figures, mend, command } = run.verdict || {};
  if (!headline || ACTIVE.has(run.state)) return null;
  return html`
    <div class="note verdict-of-run" role="status">
      <p class="headline">${headline}</p>
      ${figures && html`<p class="soft">${figures}</p>`}
      ${mend && html`<p>${mend}</p>`}
      ${command && html`<${Command} text=${command} label="As a command" />`}
    </div>
  `;
}

// `more` makes what stands between the result and the details, from the run and what reads it again.
export function LiveRun({ id, title, onState, more }) {
  const [run, metrics, problem, again, drawn] = useRun(id);
  const [told, tellEnd] = useState(null);
  const asked = run?.ending || (run?.state === "running" ? told : null);
  useEffect(() => {
    if (run && onState) onState(run);
    if (run && run.state !== "running") tellEnd(null);
  }, [run?.state]);
  if (problem)
    return html`
      <${Card} title=${title}>
        <${Problem} again=${again}>${problem}<//>
      <//>
    `;
  if (!run)
    return html`
      <${Card} title=${title}>
        <${Waiting}>Reading the run<//>
      <//>
    `;
  const left = run.state === "running" && run.step_s && run.steps ? run.step_s * (run.steps - run.step) : null;
  const lines = run.log.length || ACTIVE.has(run.state) ? run.log : reported(metrics.columns);
  // The tiles say what the curves end with: both come from the same rows.
  const held = lastHeld(metrics.columns);
  const now = {
    ...run,
    loss: last(metrics.columns.loss) ?? run.loss,
    val_loss: held?.value ?? run.val_loss,
    val_step: held?.step ?? run.val_step,
  };
  return html`
    <${Card}
      kind="live"
      title=${title || run.name}
      note=${html`<${StateChip} state=${run.state} ending=${asked} />`}
      actions=${html`<${Steering} run=${run} asked=${asked} onAsk=${tellEnd} onChange=${again} />`}
    >
      <${Reason} run=${run} />
      <${Ends} run=${run} asked=${asked} />
      <${Verdict} run=${run} />
      ${
        run.state === "running" &&
        html`
          <${Meter} share=${run.steps ? (run.step || 0) / run.steps : null} label=${"Progress of " + run.name} />
        `
      }
      <p class="unseen" aria-live="polite">
        ${run.name}: ${run.state}
        ${run.state === "running" ? "" : `, loss ${loss(now.loss)}`}
      </p>
      ${
        run.state === "running" &&
        !run.step &&
        !asked &&
        html`
          <p class="soft waiting">
            ${[...run.log].reverse().find((line) => line.trim()) || "Starting the process"}
          </p>
        `
      }
      ${
        run.adapter &&
        !ACTIVE.has(run.state) &&
        html`
          <p>
            <a class="button first" href=${linkTo("talk", run.id)}>
              ${run.objective === "classify" ? "Sort texts with it" : "Talk to it"}
            </a>
          </p>
        `
      }
      ${left !== null && !asked && html`<p class="soft number">about ${duration(left)} left</p>`}
    <//>
    ${more?.(run, again)}
    <${Fold} title="Curves, texts and log" open=${!more || ACTIVE.has(run.state) || !run.verdict}>
      <${Card}>
        <dl class="tiles">
          ${FACTS.map(
            ([words, tell]) => html`
              <div key=${words}>
                <dt>${words}</dt>
                <dd class="number">${tell(now)}</dd>
              </div>
            `,
          )}
        </dl>
        <${Curves} run=${run} metrics=${metrics} drawn=${drawn} />
      <//>
      <${Samples} samples=${run.samples} />
      <${Card}
        title="Log"
        note=${lines === run.log ? "" : "from metrics.jsonl: what the terminal showed besides was not kept"}
      >
        <${Log} lines=${lines} />
      <//>
    <//>
  `;
}
