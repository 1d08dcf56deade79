import { chart } from "./charts.js";
import { copyButton, h, table } from "./dom.js";
import { visible } from "./text.js";

const FIRST = ["Accuracy", "Well-formed responses", "Reward", "What became of the groups", "KL to the reference", "Lengths"];

/** What ran and what came of it: scores, facts, the curves that say most. */
export function overview(page) {
  const tiles = page.tiles.map(([label, value, change]) =>
    h("div", { class: "tile" }, h("dt", {}, label), h("dd", {}, value, change ? h("small", {}, change) : null)),
  );
  const first = FIRST.flatMap((title) => page.charts.filter((one) => one.title === title));
  return [
    h("h2", { class: "hidden" }, "Outcome"),
    tiles.length ? h("dl", { class: "tiles" }, tiles) : null,
    chartGrid(first, page.conditions),
    page.tables.map((one) =>
      h("section", { class: "card" }, h("h2", {}, one.title),
        table(one.title, one.header.map(visible), one.rows.map((row) => row.map(visible)), { class: "facts" }),
        one.note ? h("p", { class: "note" }, one.note) : null),
    ),
  ].flat();
}

/** Every chart of the sections named. */
export function curves(page, sections) {
  return sections.flatMap((section) => {
    const own = page.charts.filter((one) => one.section === section);
    return own.length ? [h("h2", {}, section), chartGrid(own, page.conditions)] : [];
  });
}

/** Fig. 2's signature with its fits, then what the steps say about the signal. */
export function diagnostics(page) {
  const found = page.signature;
  const signature = found
    ? [
        h("h2", {}, "K' signature (Eqs. 9–10, Fig. 2)"),
        h("p", { class: "lead" }, found.text),
        chartGrid(found.charts, page.conditions),
        h("section", { class: "card" }, table("Fits of the K' signature", found.table.header.map(visible), found.table.rows, { class: "facts" })),
      ]
    : [];
  return [...signature, ...curves(page, ["Signal"])];
}

/** What differs between the runs, versions, and every setting of each. */
export function settings(page) {
  const { differences } = page;
  return [
    differences
      ? h("section", { class: "card" }, h("h2", {}, "Settings that differ"),
          table("Settings that differ", differences.header.map(visible), differences.rows.map((row) => row.map(visible)), { class: "facts" }))
      : null,
    page.runs.map((run) =>
      h("section", { class: "card" }, h("h2", {}, visible(run.name)),
        run.facts.length ? table(`Facts of ${run.name}`, ["", ""], run.facts.map((row) => row.map(visible)), { class: "facts" }) : null,
        h("details", {}, h("summary", {}, "Every setting (config.yaml)"),
          copyButton("Copy", () => run.config), h("pre", { tabindex: "0" }, visible(run.config)))),
    ),
  ].flat();
}

function chartGrid(charts, conditions) {
  return h("div", { class: "charts" }, charts.map((one) => chart(one, conditions)));
}
