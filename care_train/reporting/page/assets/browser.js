import { h, keptBlock, visible, words } from "./base.js";
import { groupView, headline, roleName } from "./group.js";

const ORDERS = [
  ["newest", "Newest first", (a, b) => b.step - a.step],
  ["oldest", "Oldest first", (a, b) => a.step - b.step],
  ["worst", "Lowest reward first", (a, b) => (a.reward ?? 9) - (b.reward ?? 9)],
  ["best", "Highest reward first", (a, b) => (b.reward ?? -9) - (a.reward ?? -9)],
];

/** The form of search and filters; `changed` is called when what it lets through changes. */
function filterForm(index, runs, noun, changed) {
  const values = (of) => [...new Set(index.flatMap(of))].sort();
  const search = h("input", { type: "search", id: "search", placeholder: noun === "answer" ? "question, verdict, row" : "question, answer, row", autocomplete: "off", spellcheck: "false" });
  const inTexts = h("input", { type: "checkbox", id: "in-texts" });
  const choices = [
    ["Run", "run", runs.map((run, i) => [String(i), run.name]), (group) => [String(group.run)]],
    ["Outcome", "outcome", named(values((g) => g.outcome), words), (group) => [group.outcome]],
    ["Decoding", "decoding", named(values((g) => g.decoding ?? []), words), (group) => [group.decoding]],
    ["Has a", "role", named(values((g) => g.roles), roleName), (group) => group.roles],
    ["Source", "source", named(values((g) => g.source), visible), (group) => [group.source]],
    ["Answer type", "type", named(values((g) => g.type), words), (group) => [group.type]],
  ]
    .filter(([, , options]) => options.length > 1)
    .map(([label, name, options, of]) => ({ label, of, select: choice(name, options) }));
  const ranges = [
    ["Step", "step", (group) => group.step],
    [noun === "answer" ? "Reward" : "Mean reward", "reward", (group) => group.reward],
  ]
    .filter(([, , of]) => index.some((group) => of(group) !== of(index[0])))
    .map(([label, name, of]) => ({ label, of, ends: ["from", "to"].map((end) => bound(name, label, end)) }));
  const order = choice("order", ORDERS.map(([key, label]) => [key, label]), null);
  const count = h("span", { class: "count", "aria-hidden": "true" });

  const active = () =>
    choices.filter(({ select }) => select.value).length + ranges.filter(({ ends }) => ends.some((end) => end.value !== "")).length;
  const form = h(
    "form",
    { class: "filters", role: "search", "aria-label": `${noun}s`, oninput: delayed(update), onsubmit: (event) => event.preventDefault() },
    field("Search", search),
    h("label", { class: "check", for: "in-texts" }, inTexts, "in the responses too"),
    h("details", { open: matchMedia("(min-width: 60rem)").matches }, h("summary", {}, "Filters ", count),
      h("div", { class: "fields" },
        choices.map(({ label, select }) => field(label, select)),
        ranges.map(({ label, ends }) => h("fieldset", {}, h("legend", {}, label), ends)),
        field("Order", order),
        h("button", { type: "button", class: "quiet", onclick: clear }, "Clear"))),
  );
  function update() {
    count.textContent = active() ? `(${active()} set)` : "";
    changed();
  }
  function clear() {
    form.reset();
    update();
  }
  return {
    element: form,
    query: () => search.value.trim().toLowerCase(),
    searchesTexts: () => inTexts.checked,
    /** The groups that the filters, but not the search, let through, in order. */
    apply() {
      const found = index.filter(
        (group) =>
          choices.every(({ select, of }) => !select.value || of(group).includes(select.value)) &&
          ranges.every(({ ends: [from, to], of }) => (from.value === "" || of(group) >= Number(from.value)) && (to.value === "" || of(group) <= Number(to.value))),
      );
      return found.sort(ORDERS.find(([key]) => key === order.value)[2]);
    },
  };
}

function named(values, name) {
  return values.map((value) => [value, value ? name(value) : "(none)"]);
}

function choice(name, options, all = "any") {
  return h("select", { id: `filter-${name}` }, all ? h("option", { value: "" }, all) : null, options.map(([value, label]) => h("option", { value }, label)));
}

function bound(name, label, end) {
  return h("input", { type: "number", step: "any", id: `filter-${name}-${end}`, placeholder: end, "aria-label": `${label} ${end}` });
}

function field(label, control) {
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control);
}

function delayed(call) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, 120);
  };
}

const PAGE = 50;

/**
 * The failure browser: filters and a list of groups beside the one that is looked at.
 *
 * `noun` is "group", or "answer" for evaluated questions, whose rollouts are the evaluations' answers.
 */
export class GroupBrowser {
  constructor(page, index, noun) {
    this.page = page;
    this.noun = noun;
    this.index = withIds(page, index);
    this.places = new Map(this.index.map((group, i) => [group.id, i]));
    this.filters = filterForm(this.index, page.runs, noun, () => this.refresh());
    this.found = [];
    this.from = 0;
    this.current = null;
    this.search = 0;
    this.list = h("ol", { class: "groups" });
    this.status = h("p", { class: "note", role: "status" });
    this.detail = h("div", { class: "detail" });
    this.older = pager("Previous", () => this.turn(-PAGE));
    this.newer = pager("Next", () => this.turn(PAGE));
    const side = h("div", { class: "side" }, this.filters.element, this.status,
      h("nav", { "aria-label": `${noun}s found` }, this.list), h("div", { class: "pager" }, this.older, this.newer));
    const back = h("a", { class: "back", href: `#${noun}s` }, `← All ${noun}s`);
    const steps = h("div", { class: "steps" }, back, pager(`↑ Previous ${noun}`, () => this.move(-1)), pager(`↓ Next ${noun}`, () => this.move(1)));
    this.element = h("div", { class: "browser" }, side, h("div", { class: "main" }, steps, this.detail));
    this.refresh();
  }

  /** Apply the filters and the search anew. */
  async refresh() {
    const mine = (this.search += 1);
    const candidates = this.filters.apply();
    const query = this.filters.query();
    if (!query) return this.showFound(candidates, "");
    const inIndex = candidates.filter((group) => group.haystack.includes(query));
    if (!this.filters.searchesTexts()) return this.showFound(inIndex, "");
    const hits = new Set(inIndex);
    const blocks = [...new Set(candidates.map((group) => group.block))];
    for (const [i, name] of blocks.entries()) {
      const { groups } = await keptBlock(name);
      if (mine !== this.search) return undefined;
      for (const group of candidates) {
        if (group.block === name && holds(groups[group.at], query)) hits.add(group);
      }
      if (i % 20 === 0) this.showFound(candidates.filter((group) => hits.has(group)), `, searched ${Math.round((100 * i) / blocks.length)} %`);
    }
    return this.showFound(candidates.filter((group) => hits.has(group)), "");
  }

  /** Show these groups, from the page of the one that is looked at; `more` ends the status. */
  showFound(found, more) {
    this.found = found;
    const at = found.findIndex((group) => group === this.current);
    this.from = at < 0 ? 0 : at - (at % PAGE);
    this.more = more;
    this.showList();
  }

  showList() {
    const last = Math.min(this.from + PAGE, this.found.length);
    this.list.replaceChildren(...this.found.slice(this.from, last).map((group) => this.item(group)));
    const total = this.found.length.toLocaleString("en");
    const range = this.found.length > PAGE ? `${this.from + 1}–${last} of ${total}` : total;
    this.status.textContent = `${range} ${this.noun}${this.found.length === 1 ? "" : "s"}${this.more}`;
    this.older.disabled = this.from === 0;
    this.newer.disabled = last >= this.found.length;
  }

  item(group) {
    const chosen = group === this.current;
    const run = this.page.runs.length > 1 ? `${visible(this.page.runs[group.run].name)} · ` : "";
    return h("li", {},
      h("a", { href: `#${this.noun}=${group.id}`, "aria-current": chosen ? "true" : null },
        h("span", { class: "prompt", dir: "auto" }, visible(group.prompt) || "(no text)"),
        h("span", { class: "note" }, h("span", { class: `dot ${toneOfGroup(group)}`, "aria-hidden": "true" }), `${run}${group.decoding ?? `step ${group.step}`} · ${headline(group)}`)));
  }

  turn(by) {
    this.from = Math.max(0, this.from + by);
    this.showList();
    this.list.querySelector("a")?.focus();
  }

  /** Go to the next group of those found, or the one before. */
  move(by) {
    const at = this.found.indexOf(this.current);
    const next = this.found[at < 0 ? 0 : at + by];
    if (!next) return;
    // At once: the next key may come before the hash's event.
    this.current = next;
    location.hash = `${this.noun}=${next.id}`;
  }

  /** Show the group of that id; the list alone without one. */
  async show(id) {
    const group = this.index[this.places.get(id)] ?? null;
    this.element.classList.toggle("has-group", id !== null);
    this.current = group;
    const at = this.found.indexOf(group);
    if (at >= 0) this.from = at - (at % PAGE);
    this.showList();
    this.list.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
    if (id === null) return this.detail.replaceChildren(h("p", { class: "empty" }, `Choose one of the ${this.noun}s. Keys: j next, k previous, / search.`));
    if (!group) return this.detail.replaceChildren(h("p", { class: "empty" }, `This page has no such ${this.noun}.`));
    const { groups, images } = await keptBlock(group.block);
    if (this.current !== group) return undefined;
    const link = `${location.href.split("#")[0]}#${this.noun}=${id}`;
    const view = groupView(groups[group.at], images, { run: this.page.runs[group.run], link });
    this.detail.replaceChildren(view);
    // The block was decoded meanwhile: somebody may have begun to type.
    if (document.activeElement.closest("input, select, textarea")) return undefined;
    return view.querySelector("#group-title").focus({ preventScroll: true });
  }
}

function withIds(page, index) {
  const seen = new Map();
  return index.map((group) => {
    const id = [page.runs[group.run].name, group.decoding ?? group.step, group.row].map(encodeURIComponent).join("/");
    const count = (seen.get(id) ?? 0) + 1;
    seen.set(id, count);
    const haystack = [group.prompt, group.answer, group.row, group.source, group.verdict].join("\n").toLowerCase();
    return { ...group, id: count > 1 ? `${id}~${count}` : id, haystack };
  });
}

function holds(group, query) {
  return group.prompt.toLowerCase().includes(query) || group.rollouts.some(({ pieces }) => pieces.join("").toLowerCase().includes(query));
}

function toneOfGroup(group) {
  if (group.correct === group.size) return "right";
  return group.correct === 0 ? "wrong" : "partly";
}

function pager(label, onclick) {
  return h("button", { type: "button", onclick }, label);
}
