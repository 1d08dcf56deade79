import { differences } from "./diff.js";
import { h, lazyDetails, table } from "./dom.js";
import { SHADINGS, shade } from "./shading.js";
import { shown, signed, visible, words } from "./text.js";

const ROLES = {
  anchor: "Anchor",
  positive: "Positive beside the anchor",
  pseudo_anchor: "Pseudo-anchor",
  hard_negative: "Hard negative",
  reflected_success: "Reflection that succeeded",
  reflected_failure: "Reflection that failed",
  reflected_partial: "Reflection, partly right",
  trained: "Trained",
  unused: "Not used",
};
const MAX_TABLE_TOKENS = 500;

/** A role in words. */
export function roleName(role) {
  return ROLES[role] ?? words(role);
}

/** One response: its part in the update, its text shaded by token, what differs from the anchor. */
export function rolloutCard(rollout, { title, shading, scale, anchor, note, versus = "the anchor" }) {
  const text = rollout.pieces.join("");
  const body = h("div", { class: "text", dir: "auto", tabindex: "0", role: "group", "aria-label": `${title}: text` });
  const readout = h("output", { class: "readout" }, "");
  showTokens(body, readout, rollout, shading, scale);
  const back = () => showTokens(body, readout, rollout, shading, scale);
  const compares = anchor && anchor !== rollout;
  return h(
    "article",
    { class: `rollout ${toneOf(rollout)}`, "aria-label": title },
    h("header", {}, h("h4", {}, title), outcome(rollout), facts(rollout)),
    note ? h("p", { class: "note" }, note) : null,
    rollout.prefix ? h("p", { class: "text prefix", dir: "auto", "aria-label": "Given" }, visible(rollout.prefix)) : null,
    body,
    rollout.left > 0 ? h("p", { class: "note" }, `${shown(rollout.left)} more characters are in the archive alone.`) : null,
    h("div", { class: "foot" }, compares ? differenceButton(body, rollout, anchor, text, back, versus) : null,
      rollout.perToken ? lazyDetails("Tokens", {}, () => tokenTable(rollout, title)) : null, readout),
  );
}

function toneOf(rollout) {
  if (rollout.accuracy === null || rollout.accuracy === undefined) return "";
  return rollout.accuracy === 1 ? "right" : rollout.accuracy > 0 ? "partly" : "wrong";
}

function outcome(rollout) {
  const tone = toneOf(rollout);
  const mark = { right: "✓ correct", partly: `${shown(rollout.accuracy, "share")} correct`, wrong: "✗ wrong", "": "" }[tone];
  const format = rollout.format === 0 ? ", malformed" : "";
  const verdict = [rollout.verdict, rollout.format < 1 ? rollout.formatVerdict : ""].filter(Boolean).map(visible);
  return h("p", { class: `outcome ${tone}` }, h("strong", {}, mark + format), verdict.length ? `: ${[...new Set(verdict)].join("; ")}` : "");
}

function facts(rollout) {
  const rewards = Object.entries(rollout.rewards);
  const isAnchor = rollout.role.endsWith("anchor");
  const pairs = [
    ["reward", shown(rollout.reward)],
    ...(rewards.length > 1 ? rewards.map(([name, value]) => [visible(name), shown(value)]) : []),
    rollout.trained ? ["advantage", signed(rollout.sequenceAdvantage)] : null,
    rollout.distance === null || isAnchor ? null : ["distance", shown(rollout.distance)],
    ["tokens", shown(rollout.tokens) + (rollout.finished ? "" : ", cut")],
  ];
  return h("dl", { class: "pairs" }, pairs.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function showTokens(body, readout, rollout, shading, scale) {
  const tokens = rollout.pieces.map((piece, i) => {
    const element = h("span", { "data-token": i }, visible(piece));
    shade(element, shading.value(rollout, i), scale);
    return element;
  });
  body.replaceChildren(...tokens);
  const select = (place) => {
    const i = Math.max(0, Math.min(place, tokens.length - 1));
    body.querySelector(".current")?.classList.remove("current");
    tokens[i]?.classList.add("current");
    body.dataset.current = i;
    readout.textContent = tokens[i] ? describe(rollout, i) : "";
  };
  body.onpointerover = (event) => {
    const place = event.target.dataset?.token;
    if (place !== undefined) select(Number(place));
  };
  body.onclick = body.onpointerover;
  body.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    select(Number(body.dataset.current ?? -1) + step);
  };
}

function describe(rollout, i) {
  const values = SHADINGS.flatMap(({ key, label, signs, value }) => {
    const found = value(rollout, i);
    return key === "none" || found === undefined || found === null ? [] : [`${label.toLowerCase()} ${signs ? signed(found) : shown(found)}`];
  });
  if (!rollout.perToken && !values.length) return "";
  const name = rollout.perToken ? `token ${i + 1} of ${rollout.tokens}` : "mean over the part";
  return [name, ...values].join(" · ");
}

function differenceButton(body, rollout, anchor, text, back, versus) {
  const button = h("button", { type: "button", class: "quiet", "aria-pressed": "false" }, `Difference to ${versus}`);
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    if (!on) return back();
    const runs = differences(anchor.pieces.join(""), text);
    if (!runs) return body.replaceChildren(h("em", {}, "Both texts are too long to compare here."));
    const tags = { same: "span", gone: "del", new: "ins" };
    body.onpointerover = body.onclick = body.onkeydown = null;
    body.replaceChildren(...runs.map(([kind, part]) => h(tags[kind], {}, visible(part))));
  });
  return button;
}

function tokenTable(rollout, title) {
  const shadings = SHADINGS.filter(({ key, value }) => key !== "none" && rollout.pieces.some((_, i) => value(rollout, i) !== undefined));
  const rows = rollout.pieces.slice(0, MAX_TABLE_TOKENS).map((piece, i) => [
    String(i + 1),
    JSON.stringify(visible(piece)).slice(1, -1),
    ...shadings.map(({ signs, value }) => (signs ? signed : shown)(value(rollout, i))),
  ]);
  return table(`Tokens of ${title}`, ["", "token", ...shadings.map(({ label }) => label)], rows, { class: "numbers" });
}
