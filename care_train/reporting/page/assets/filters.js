import { h } from "./dom.js";
import { roleName } from "./rollout.js";
import { visible, words } from "./text.js";

const ORDERS = [
  ["newest", "Newest first", (a, b) => b.step - a.step],
  ["oldest", "Oldest first", (a, b) => a.step - b.step],
  ["worst", "Lowest reward first", (a, b) => (a.reward ?? 9) - (b.reward ?? 9)],
  ["best", "Highest reward first", (a, b) => (b.reward ?? -9) - (a.reward ?? -9)],
];

/** The form of search and filters; `changed` is called when what it lets through changes. */
export function filterForm(index, runs, noun, changed) {
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
