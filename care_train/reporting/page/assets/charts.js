import { h, lazyDetails, shown, table } from "./base.js";

const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
const STEPS = [1, 10, 100, 1e3, 1e4, 1e5, 1e6].flatMap((ten) => [ten, 2 * ten, 5 * ten]);
const NUM_COLORS = 8;
const HEIGHT = 200;
const MAX_TABLE_ROWS = 40;
const drawn = new Set();

/** A chart with its title, legend and values as a table; it is drawn once it has a width. */
export function chart(given, conditions) {
  // Colours tell conditions apart, and dashes their metrics, even where one alone has values.
  const data = { ...given, compared: conditions.length > 1 && !given.stacked };
  const box = h("div", { class: "plot", role: "img", "aria-label": spoken(data, conditions) });
  const figure = h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("h3", {}, data.title), h("span", { class: "unit" }, unitOf(data))),
    box,
  );
  const legend = makeLegend(data, conditions);
  figure.append(legend.element);
  if (data.note) figure.append(h("p", { class: "note" }, data.note));
  figure.append(lazyDetails("Values", {}, () => valueTable(data, conditions)));
  let plot = null;
  const draw = () => {
    plot?.destroy();
    plot = new uPlot(options(data, box.clientWidth, legend), columns(data), box);
  };
  const observer = new ResizeObserver(() => {
    if (!box.clientWidth) return;
    if (plot) plot.setSize({ width: box.clientWidth, height: HEIGHT });
    else draw();
  });
  observer.observe(box);
  drawn.add(() => plot && draw());
  return figure;
}

/** Draw all charts again, in the colours of another theme. */
export function redrawCharts() {
  for (const draw of drawn) draw();
}

/** Forget the charts of a page that is replaced. */
export function forgetCharts() {
  drawn.clear();
}

function unitOf(data) {
  if (data.xLabel !== "step") return `against ${data.xLabel}`;
  return data.unit === "share" ? "" : data.unit;
}

function nameOf(one, conditions) {
  return conditions.length > 1 ? `${conditions[one.condition]}: ${one.label}` : one.label;
}

function colorName(place) {
  return `var(--series-${place % NUM_COLORS})`;
}

function colorOf(style, data, one) {
  const place = data.compared ? one.condition : one.metric;
  return style.getPropertyValue(colorName(place).slice(4, -1)).trim();
}

function dashOf(data, one) {
  return DASHES[(data.compared ? one.metric : 0) % DASHES.length];
}

/** The series of a stack: each on top of those before it. */
function heights(data) {
  const sums = data.x.map(() => 0);
  return data.series.map((one) => one.y.map((value, i) => (sums[i] += value ?? 0)));
}

function columns(data) {
  const stacked = data.stacked ? heights(data) : null;
  const lines = data.series.flatMap((one, i) => [
    stacked ? stacked[i] : one.y,
    ...(one.low && one.kind === "line" ? [one.low, one.high] : []),
  ]);
  return [data.x, ...lines];
}

function options(data, width, legend) {
  const style = getComputedStyle(document.documentElement);
  const grey = style.getPropertyValue("--muted").trim();
  const grid = { stroke: style.getPropertyValue("--line").trim(), width: 1 };
  const font = `12px ${style.fontFamily}`;
  const axis = { stroke: grey, grid, ticks: { ...grid, size: 4 }, font };
  const series = [{}];
  const bands = [];
  data.series.forEach((one, i) => {
    const color = colorOf(style, data, one);
    const place = series.length;
    series.push(seriesOptions(data, one, color));
    if (data.stacked) {
      if (i === 0) series[place].fill = `${color}66`;
      else bands.push({ series: [place, place - 1], fill: `${color}66` });
    } else if (one.low && one.kind === "line") {
      series.push({ stroke: null, points: { show: false } }, { stroke: null, points: { show: false } });
      bands.push({ series: [place + 2, place + 1], fill: `${color}33` });
    }
  });
  return {
    width,
    height: HEIGHT,
    padding: [10, 22, 0, 0],
    series,
    bands,
    legend: { show: false },
    cursor: { sync: { key: data.xLabel }, y: false, points: { size: 6 } },
    scales: { x: { time: false, range: around }, y: { range: (_, low, high) => yRange(data, low, high) } },
    axes: [
      { ...axis, size: 30, space: 60, ...(data.xLabel === "step" ? { incrs: STEPS } : {}) },
      { ...axis, size: 52, values: (_, ticks) => ticks.map((value) => shown(value, data.unit)) },
    ],
    hooks: {
      setCursor: [(plot) => legend.show(plot.cursor.idx)],
      draw: [(plot) => errorBars(plot, data)],
    },
  };
}

function seriesOptions(data, one, color) {
  const base = { stroke: color, spanGaps: true, points: { show: data.x.length === 1 } };
  if (one.kind === "faint") return { ...base, stroke: `${color}55`, width: 1 };
  if (one.kind === "line") return { ...base, width: 2, dash: dashOf(data, one) };
  const hollow = one.metric > 1;
  const size = data.series.length && one.y.length > 200 ? 4 : 8;
  const points = { show: true, size, stroke: color, fill: hollow ? "transparent" : color, width: 2 };
  return { ...base, paths: () => null, points };
}

/** A range with some room for a single value. */
function around(_, low, high) {
  return low === high ? [low - 1, high + 1] : [low, high];
}

function yRange(data, low, high) {
  if (low === null) return [0, 1];
  if (data.unit === "share") return [0, Math.min(1, Math.max(high * 1.15, 0.02))];
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [data.stacked || (low >= 0 && low < high * 0.5) ? 0 : low - room, high + room];
}

function errorBars(plot, data) {
  const style = getComputedStyle(document.documentElement);
  const { ctx } = plot;
  ctx.save();
  ctx.lineWidth = 2 * devicePixelRatio;
  for (const one of data.series) {
    if (one.kind !== "points" || !one.low) continue;
    ctx.strokeStyle = colorOf(style, data, one);
    data.x.forEach((x, i) => {
      if (one.low[i] === null || one.low[i] === undefined) return;
      const at = plot.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(at, plot.valToPos(one.low[i], "y", true));
      ctx.lineTo(at, plot.valToPos(one.high[i], "y", true));
      ctx.stroke();
    });
  }
  ctx.restore();
}

/** What each colour, dash and marker means, and the values below the cursor. */
function makeLegend(data, conditions) {
  const lines = data.series.filter((one) => one.kind !== "faint");
  const several = data.compared;
  const at = h("li", { class: "at" });
  const values = new Map();
  const key = (one, color) => h("span", { class: `key ${one.kind === "points" ? `dot${one.metric > 1 ? " hollow" : ""}` : `dash${several ? one.metric % 4 : 0}`}`, "--color": color });
  const item = (label, mark, own) => {
    const value = h("span", { class: "value" });
    values.set(value, own);
    return h("li", {}, mark, label, " ", value);
  };
  const metrics = [...new Map(lines.map((one) => [one.metric, one])).values()];
  const items = several
    ? [
        ...[...new Set(lines.map((one) => one.condition))].map((place) => {
          const own = lines.filter((one) => one.condition === place);
          return item(conditions[place], key({ kind: "line", metric: 0 }, colorName(place)), own);
        }),
        ...(metrics.length > 1 ? metrics.map((one) => h("li", {}, key(one, "var(--muted)"), one.label)) : []),
      ]
    : lines.map((one) => item(one.label, key(one, colorName(one.metric)), [one]));
  const owner = data.stacked && conditions.length > 1 ? h("li", {}, conditions[lines[0].condition]) : null;
  const show = (index) => {
    const known = index !== null && index !== undefined;
    at.textContent = known ? `${data.xLabel} ${shown(data.x[index])}` : "";
    for (const [element, own] of values) {
      const found = own.flatMap((one) => (known && one.y[index] !== null ? [shown(one.y[index], data.unit)] : []));
      element.textContent = found.join(" / ");
    }
  };
  return { element: h("ul", { class: "legend", "aria-hidden": "true" }, owner, items, at), show };
}

function spoken(data, conditions) {
  const lines = data.series
    .filter((one) => one.kind !== "faint")
    .map((one) => {
      const known = one.y.flatMap((value, i) => (value === null ? [] : [[data.x[i], value]]));
      if (!known.length) return nameOf(one, conditions);
      const [[x0, y0], [x1, y1]] = [known[0], known.at(-1)];
      return (
        `${nameOf(one, conditions)}: ${shown(y0, data.unit)} at ${data.xLabel} ${shown(x0)}` +
        (known.length > 1 ? `, ${shown(y1, data.unit)} at ${shown(x1)}` : "")
      );
    });
  return `${data.title}. ${lines.join(". ")}.`;
}

function valueTable(data, conditions) {
  const every = Math.ceil(data.x.length / MAX_TABLE_ROWS);
  const lines = data.series.filter((one) => one.kind !== "faint");
  const header = [data.xLabel, ...lines.map((one) => nameOf(one, conditions))];
  const rows = data.x.flatMap((x, i) =>
    i % every === 0 || i === data.x.length - 1
      ? [[shown(x), ...lines.map((one) => shown(one.y[i], data.unit))]]
      : [],
  );
  return table(`Values of ${data.title}`, header, rows, { class: "numbers" });
}
