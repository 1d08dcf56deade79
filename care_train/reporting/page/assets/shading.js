import { h } from "./dom.js";
import { shown, signed } from "./text.js";

/** What the text can be shaded by: a value of each token, and whether it has two signs. */
export const SHADINGS = [
  { key: "advantage", label: "Token advantage", signs: true, value: (r, i) => r.advantage?.[i] },
  { key: "weight", label: "Token weight", signs: false, value: (r, i) => r.weight?.[i] },
  { key: "entropy", label: "Entropy", signs: false, value: (r, i) => r.entropy?.[i] },
  { key: "surprise", label: "Surprise (−log prob)", signs: false, value: (r, i) => minus(0, r.old?.[i]) },
  { key: "ref", label: "Shift from the reference", signs: true, value: (r, i) => minus(r.old?.[i], r.ref?.[i]) },
  { key: "gap", label: "Gap to the rollout engine", signs: true, value: (r, i) => minus(r.old?.[i], r.engine?.[i]) },
  { key: "none", label: "Nothing", signs: false, value: () => undefined },
];

function minus(a, b) {
  return a === undefined || b === undefined || a === null || b === null ? undefined : a - b;
}

/** The shadings that these rollouts have values for. */
export function shadingsOf(rollouts) {
  return SHADINGS.filter(
    ({ key, value }) => key === "none" || rollouts.some((r) => r.pieces.some((_, i) => value(r, i) !== undefined && value(r, i) !== null)),
  );
}

/** The value that gets the strongest colour: all but a hundredth of the tokens are below it. */
export function scaleOf(rollouts, shading) {
  const sizes = rollouts.flatMap((r) => r.pieces.map((_, i) => Math.abs(shading.value(r, i) ?? 0))).filter((v) => v > 0);
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.99 * (sizes.length - 1))] ?? 0;
}

/** A token's background: blue above zero, orange below, stronger with the value. */
export function shade(element, value, scale) {
  if (!value || !scale) return;
  const strength = Math.round(8 + 47 * Math.sqrt(Math.min(Math.abs(value) / scale, 1)));
  element.classList.add(value < 0 ? "below" : "above");
  element.style.setProperty("--strength", `${strength}%`);
}

/** What the colours mean. */
export function shadeLegend(shading, scale) {
  if (shading.key === "none" || !scale) return h("p", { class: "shade-legend" });
  const ends = shading.signs ? [signed(-scale), signed(scale)] : ["0", shown(scale)];
  return h("p", { class: "shade-legend" }, ends[0],
    h("span", { class: `ramp ${shading.signs ? "two" : "one"}`, role: "img", "aria-label": `colours from ${ends[0]} to ${ends[1]}` }), ends[1]);
}
