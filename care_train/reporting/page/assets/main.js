import { GroupBrowser } from "./browser.js";
import { forgetCharts, redrawCharts } from "./charts.js";
import { dataVersion, isLive, readBlock } from "./data.js";
import { h } from "./dom.js";
import { curves, diagnostics, overview, settings } from "./overview.js";
import { visible } from "./text.js";

const POLL_MILLISECONDS = 3000;
const GONE = "The server has gone.";
const root = document.getElementById("main");
const nav = document.getElementById("nav");
let sections = {};
let browser = null;

async function load() {
  const page = await readBlock("page");
  forgetCharts();
  browser = null;
  const views = {
    overview: ["Overview", () => overview(page)],
    curves: ["Curves", () => curves(page, ["Learning", "Time"])],
    diagnostics: ["Diagnostics", () => diagnostics(page)],
    groups: ["Groups", () => groupSection(page)],
    settings: ["Settings", () => settings(page)],
  };
  sections = Object.fromEntries(
    Object.entries(views).map(([name, [label, make]]) => {
      const element = h("section", { id: `section-${name}`, "aria-label": label, hidden: true });
      const link = h("a", { href: `#${name}` }, label);
      return [name, { element, link, make }];
    }),
  );
  nav.replaceChildren(...Object.values(sections).map(({ link }) => link));
  const foot = h("footer", {}, visible(page.made));
  root.replaceChildren(...Object.values(sections).map(({ element }) => element), foot);
  await route();
}

async function groupSection(page) {
  if (!page.numGroups) return [h("p", { class: "empty" }, "No groups: the runs have no archive (logging.archive=false).")];
  browser = new GroupBrowser(page, await readBlock("index"));
  return [page.groupNote ? h("p", { class: "note" }, page.groupNote) : null, browser.element];
}

async function route() {
  const hash = decodeURI(location.hash.slice(1)) || "overview";
  const id = location.hash.startsWith("#group=") ? location.hash.slice(7) : null;
  const name = id !== null ? "groups" : hash in sections ? hash : null;
  if (name === null) return;
  for (const [key, section] of Object.entries(sections)) {
    section.element.hidden = key !== name;
    if (key === name) section.link.setAttribute("aria-current", "page");
    else section.link.removeAttribute("aria-current");
  }
  const { element, make } = sections[name];
  if (!element.childNodes.length) element.append(...(await make()).filter(Boolean));
  if (name === "groups") await browser?.show(id);
  root.dataset.ready = name;
}

function keys(event) {
  const typing = event.target.closest("input, select, textarea, button");
  if (event.ctrlKey || event.metaKey || event.altKey || !browser || sections.groups.element.hidden) return;
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
      if (sections.groups.element.hidden) await take();
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
