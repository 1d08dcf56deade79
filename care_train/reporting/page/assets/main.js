import { copyButton, dataVersion, forgetBlocks, h, isLive, readBlock, table, visible } from "./base.js";
import { GroupBrowser } from "./browser.js";
import { chart, forgetCharts, redrawCharts } from "./charts.js";

const FIRST = ["Accuracy", "Well-formed responses", "Reward", "What became of the groups", "KL to the reference", "Lengths"];

/** What ran and what came of it: scores, facts, the curves that say most. */
function overview(page) {
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
function curves(page, sections) {
  return sections.flatMap((section) => {
    const own = page.charts.filter((one) => one.section === section);
    return own.length ? [h("h2", {}, section), chartGrid(own, page.conditions)] : [];
  });
}

/** Fig. 2's signature with its fits, then what the steps say about the signal. */
function diagnostics(page) {
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
function settings(page) {
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

const POLL_MILLISECONDS = 3000;
const GONE = "The server has gone.";
const root = document.getElementById("main");
const nav = document.getElementById("nav");
let sections = {};

async function load() {
  const page = await readBlock("page");
  forgetCharts();
  forgetBlocks();
  const views = {
    overview: ["Overview", () => overview(page)],
    curves: ["Curves", () => curves(page, ["Learning", "Time"])],
    diagnostics: ["Diagnostics", () => diagnostics(page)],
    groups: ["Groups", () => browserSection(page, "group")],
    answers: ["Answers", () => browserSection(page, "answer")],
    settings: ["Settings", () => settings(page)],
  };
  sections = Object.fromEntries(
    Object.entries(views).map(([name, [label, make]]) => {
      const element = h("section", { id: `section-${name}`, "aria-label": label, hidden: true });
      const link = h("a", { href: `#${name}` }, label);
      return [name, { element, link, make, content: null, browser: null }];
    }),
  );
  nav.replaceChildren(...Object.values(sections).map(({ link }) => link));
  const foot = h("footer", {}, visible(page.made));
  root.replaceChildren(...Object.values(sections).map(({ element }) => element), foot);
  await route();
}

async function browserSection(page, noun) {
  const { count, note } = page[`${noun}s`];
  if (!count) return [h("p", { class: "empty" }, `No ${noun}s: the runs have none in an archive (logging.archive_gib).`)];
  const browser = new GroupBrowser(page, await readBlock(`${noun}s`), noun);
  sections[`${noun}s`].browser = browser;
  return [note ? h("p", { class: "note" }, note) : null, browser.element];
}

async function route() {
  const [, noun, id = null] = location.hash.match(/^#(group|answer)=(.*)$/) ?? [];
  const name = noun ? `${noun}s` : decodeURI(location.hash.slice(1)) || "overview";
  if (!(name in sections)) return;
  for (const [key, section] of Object.entries(sections)) {
    section.element.hidden = key !== name;
    if (key === name) section.link.setAttribute("aria-current", "page");
    else section.link.removeAttribute("aria-current");
    // Two browsers in the page would share their elements' ids.
    if (key !== name && section.browser) section.element.replaceChildren();
  }
  const section = sections[name];
  section.content ??= section.make();
  const content = await section.content;
  // While it was made, somebody may have gone on to another section.
  if (section.element.hidden) return;
  if (!section.element.childNodes.length) section.element.append(...content.filter(Boolean));
  await section.browser?.show(id);
  if (!section.element.hidden) root.dataset.ready = name;
}

function keys(event) {
  const typing = event.target.closest("input, select, textarea, button");
  const { browser } = Object.values(sections).find(({ element }) => !element.hidden) ?? {};
  if (event.ctrlKey || event.metaKey || event.altKey || !browser) return;
  if (event.key === "Escape" && typing) typing.blur();
  if (typing) return;
  const by = { j: 1, k: -1 }[event.key];
  if (by) browser.move(by);
  if (event.key === "/") {
    event.preventDefault();
    document.getElementById("search").focus();
  }
}

function theme() {
  const button = document.getElementById("theme");
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const set = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", `${dark ? "Light" : "Dark"} colours`);
    redrawCharts();
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", () => set(system.matches));
  button.addEventListener("click", () => set(!isDark()));
  set(system.matches);
}

/** Takes in newer data; a group that somebody looks at stays until they ask for it. */
async function watch() {
  const news = document.getElementById("news");
  const show = h("button", { type: "button", onclick: take }, "Show new steps");
  let version = await dataVersion();
  async function take() {
    news.replaceChildren();
    await load();
  }
  for (;;) {
    await new Promise((wake) => setTimeout(wake, POLL_MILLISECONDS));
    try {
      const now = await dataVersion();
      if (news.textContent === GONE) news.replaceChildren();
      if (now === version) continue;
      version = now;
      if (sections.groups.element.hidden && sections.answers.element.hidden) await take();
      else news.replaceChildren(show);
    } catch {
      news.textContent = GONE;
    }
  }
}

theme();
addEventListener("hashchange", route);
addEventListener("keydown", keys);
await load();
if (isLive) watch();
