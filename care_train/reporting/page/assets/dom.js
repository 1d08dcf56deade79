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
