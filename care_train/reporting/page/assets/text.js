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
