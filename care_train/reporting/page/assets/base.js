/** An element; text children are shown to the letter, `on...` attributes are listeners. */
export function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A `<details>` whose content is made when it is first opened. */
export function lazyDetails(summary, attributes, make) {
  const details = h("details", attributes, h("summary", {}, summary));
  const fill = () => details.open && details.children.length === 1 && details.append(make());
  details.addEventListener("toggle", fill);
  fill();
  return details;
}

/** A table with a caption for screen readers; the first column names the rows. */
export function table(caption, header, rows, attributes) {
  const head = header.map((cell) => (cell ? h("th", { scope: "col" }, cell) : h("td")));
  const lines = rows.map(([name, ...cells]) =>
    h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", {}, cell))),
  );
  return h(
    "div",
    { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    h("table", attributes, h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, head)), h("tbody", {}, lines)),
  );
}

/** A button that copies what `text` returns. */
export function copyButton(label, text) {
  const button = h("button", { type: "button", class: "quiet", onclick: copy }, label);
  async function copy() {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copy failed";
    }
    setTimeout(() => (button.textContent = label), 1500);
  }
  return button;
}

// Controls that move the cursor or turn the direction of text, and halves of surrogate pairs.
const UNSEEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u061c\\u200b-\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]|[\\ud800-\\udfff]",
  "gu",
);

/** `text` with each character that cannot be seen, or misleads, by its number. */
export function visible(text) {
  return text.replace(UNSEEN, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

const SMALL = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const PERCENT = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });

/** A number as a person reads it. */
export function shown(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return PERCENT.format(value);
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return Math.abs(value) >= 1000 ? WHOLE.format(value) : SMALL.format(value);
}

/** The same with its sign. */
export function signed(value) {
  if (value === null || value === undefined) return "–";
  return `${value < 0 ? "−" : "+"}${shown(Math.abs(value))}`;
}

/** `no_answer` as words. */
export function words(name) {
  return visible(String(name)).replaceAll("_", " ");
}

/** Whether the page was served by `care-train report --watch`: its blocks are then fetched. */
export const isLive = document.documentElement.dataset.live === "true";

const MAX_KEPT = 24;
const kept = new Map();

async function packed(name) {
  if (isLive) {
    const response = await fetch(`block/${name}`, { cache: "no-store" });
    if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
    return response.body;
  }
  const text = atob(document.getElementById(`block-${name}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes]).stream();
}

/** A block of the page's data, unpacked now. */
export async function readBlock(name) {
  const stream = (await packed(name)).pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** `readBlock`, remembering the latest few. */
export function keptBlock(name) {
  const found = kept.get(name) ?? readBlock(name);
  kept.delete(name);
  kept.set(name, found);
  if (kept.size > MAX_KEPT) kept.delete(kept.keys().next().value);
  return found;
}

/** Forget what is remembered: the server may have newer blocks of the same names. */
export function forgetBlocks() {
  kept.clear();
}

/** What changes when the server has newer data. */
export async function dataVersion() {
  return (await fetch("version", { cache: "no-store" })).text();
}
