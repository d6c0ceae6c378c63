// Line charts over uPlot, which is loaded with the first chart. A chart is made once; new points are handed to it.
import { useEffect, useRef, useState } from "./vendor/hooks.module.js";
import { html } from "./parts.js";

const MOST = 2000; // points a series holds; beyond, every second one goes

// Columns of a run that grow without end, in bounded memory. Rows that have a value that is rarely taken (held-out
// loss) stay.
export function growing(names, kept = "val_loss") {
  let columns = Object.fromEntries(names.map((name) => [name, []]));
  const thin = () => {
    const last = columns.step.length - 1;
    let n = 0;
    const stays = columns.step.map((_, at) => at === last || (columns[kept]?.[at] ?? null) !== null || n++ % 2 === 0);
    const all = stays.every(Boolean); // only rows that should stay: then half of those have to go
    for (const name of names)
      columns[name] = columns[name].filter((_, at) => (all ? at === last || at % 2 === 0 : stays[at]));
  };
  return {
    fill(given) {
      columns = Object.fromEntries(names.map((name) => [name, []]));
      for (const at of (given.step || []).keys())
        this.add(Object.fromEntries(names.map((name) => [name, given[name]?.[at] ?? null])));
    },
    // A validation comes as a row of its own with the step of a report: both are one point. A resumed run goes over
    // some steps again: what was known of them goes.
    add(row) {
      if ((row.loss ?? null) === null) row = { ...row, tokens_per_s: null }; // a validation has no speed of training
      const { step } = columns;
      while (step.length && step[step.length - 1] > row.step) for (const name of names) columns[name].pop();
      if (step.length && step[step.length - 1] === row.step)
        for (const name of names) columns[name][step.length - 1] = row[name] ?? columns[name][step.length - 1];
      else for (const name of names) columns[name].push(row[name] ?? null);
      if (step.length > MOST) thin();
    },
    get columns() {
      return columns;
    },
    get size() {
      return columns.step.length;
    },
  };
}

// A line needs two points: few values are drawn as dots, so that the first one is seen.
const few = (values) => {
  let n = 0;
  for (const one of values) if (one !== null && one !== undefined && ++n > 12) return false;
  return true;
};

const STEPS = [1, 10, 100, 1e3, 1e4, 1e5, 1e6].flatMap((one) => [one, 2 * one, 5 * one]); // no half steps
const style = () => getComputedStyle(document.documentElement);
const colorOf = (name) =>
  style()
    .getPropertyValue("--" + name)
    .trim();

function options(width, height, series, words, limit, zero) {
  const axis = {
    stroke: () => colorOf("soft"),
    grid: { stroke: () => colorOf("rule"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    size: 28,
    gap: 6,
  };
  const one = ({ label, color, dots }) => ({
    label,
    stroke: () => colorOf(color),
    width: 1.75,
    spanGaps: true,
    points: {
      show: (self, n) => Boolean(dots) || few(self.data[n]),
      size: 6,
      fill: () => colorOf(color),
      width: 0,
    },
  });
  const range = (_plot, low, high) => {
    if (low === null) return [0, 1];
    const top = limit ? Math.max(high, limit) : high;
    const bottom = zero ? 0 : low;
    const room = (top - bottom || Math.abs(top) || 1) * 0.06;
    return [zero ? 0 : bottom - room, top + room];
  };
  return {
    width,
    height,
    cursor: { points: { size: 7 }, drag: { x: true, y: false } },
    legend: { show: false },
    scales: { x: { time: false }, y: { range } },
    series: [{ label: "step" }, ...series.map(one)],
    axes: [
      { ...axis, space: 60, incrs: STEPS },
      { ...axis, size: 56, space: 34, values: (_plot, ticks) => ticks.map(words) },
    ],
  };
}

// series: [{label, color, dots}]; data: [steps, ...values]; words: a value as text; limit: a line to compare with;
// zero: the axis begins there, because the size itself is what matters.
export function Chart({ title, series, data, words, limit, limitWords, zero, height = 190 }) {
  const box = useRef(null);
  const plot = useRef(null);
  const [at, setAt] = useState(null);
  const [ready, setReady] = useState(null);
  const kind = series.map((one) => one.label + one.color).join("|") + (limit || "");
  const newest = useRef(data);
  newest.current = data;
  useEffect(() => {
    let gone = false;
    let watch;
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => plot.current?.redraw(false);
    import("./vendor/uPlot.esm.js").then(({ default: Plot }) => {
      if (gone) return;
      const made = options(box.current.clientWidth || 300, height, series, words, limit, zero);
      made.hooks = {
        setCursor: [(self) => setAt(self.cursor.idx ?? null)],
        draw: [(self) => line(self, limit)],
      };
      plot.current = new Plot(made, newest.current, box.current);
      plot.current.root.setAttribute("aria-hidden", "true");
      watch = new ResizeObserver(([entry]) => {
        const width = Math.floor(entry.contentRect.width);
        if (width && width !== plot.current.width) plot.current.setSize({ width, height });
      });
      watch.observe(box.current);
      scheme.addEventListener("change", redraw);
      setReady(true);
    });
    return () => {
      gone = true;
      watch?.disconnect();
      scheme.removeEventListener("change", redraw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [kind]);
  useEffect(() => {
    plot.current?.setData(data);
  }, [data, ready]);
  const points = data[0].length;
  const shown = at !== null && at < points ? at : null;
  const told = series.map((one, n) => ({
    ...one,
    said: words(shown === null ? last(data[n + 1]) : data[n + 1][shown]),
  }));
  const summary = points
    ? `${title}, ${points} points up to step ${data[0][points - 1]}. ` +
      told.map((one) => `${one.label}: ${one.said}`).join(", ")
    : `${title}: no points yet`;
  return html`
    <figure class="chart-box">
      <figcaption>
        <b>${title}</b>
        <span class="soft number step">${shown === null ? "" : `step ${data[0][shown]}`}</span>
        <span class="keys-of-chart">
          ${told.map(
            (one, n) => html`
              <span key=${n} class="key">
                <span class=${"stroke " + one.color}></span>
                ${one.label} <span class="number">${one.said}</span>
              </span>
            `,
          )}
          ${
            limit
              ? html`
                <span class="key soft">
                  <span class="stroke dashed"></span>
                  ${limitWords}
                </span>
              `
              : null
          }
        </span>
      </figcaption>
      <div class="chart" ref=${box} role="img" aria-label=${summary}></div>
    </figure>
  `;
}

function line(self, limit) {
  if (!limit) return;
  const y = self.valToPos(limit, "y", true);
  const { ctx, bbox } = self;
  ctx.save();
  ctx.strokeStyle = colorOf("soft");
  ctx.setLineDash([6, 5]);
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.restore();
}

export function last(values) {
  for (let at = values.length - 1; at >= 0; at--)
    if (values[at] !== null && values[at] !== undefined) return values[at];
  return null;
}

// Several runs over one axis of steps: the union of their steps, with gaps bridged.
export function joined(runs, name) {
  const steps = [...new Set(runs.flatMap((run) => run.metrics.step || []))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, at) => [step, at]));
  return [
    steps,
    ...runs.map(({ metrics }) => {
      const values = new Array(steps.length).fill(null);
      (metrics.step || []).forEach((step, at) => {
        if (name === "tokens_per_s" && (metrics.loss?.[at] ?? null) === null) return;
        values[place.get(step)] = metrics[name]?.[at] ?? values[place.get(step)];
      });
      return values;
    }),
  ];
}
