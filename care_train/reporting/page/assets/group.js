import { copyButton, h, lazyDetails, shown, signed, table, visible, words } from "./base.js";

const MAX_CELLS = 4_000_000;
const WORDS = /<\/?\w+>|\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu;

/**
 * What turns `before` into `after`, word by word.
 *
 * The longest common subsequence of words; what lies between equal beginnings and ends alone is
 * compared. Returns runs of ["same" | "gone" | "new", text]; null where both are too long.
 */
function differences(before, after) {
  const a = before.match(WORDS) ?? [];
  const b = after.match(WORDS) ?? [];
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start += 1;
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) [endA, endB] = [endA - 1, endB - 1];
  const [rows, columns] = [endA - start, endB - start];
  if (rows * columns > MAX_CELLS) return null;

  // lengths[i][j]: the longest common subsequence of a from i and b from j on.
  const width = columns + 1;
  const lengths = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      lengths[i * width + j] =
        a[start + i] === b[start + j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const runs = [];
  const add = (kind, text) => {
    if (runs.at(-1)?.[0] === kind) runs.at(-1)[1] += text;
    else if (text) runs.push([kind, text]);
  };
  add("same", a.slice(0, start).join(""));
  let [i, j] = [0, 0];
  while (i < rows || j < columns) {
    if (i < rows && j < columns && a[start + i] === b[start + j]) {
      add("same", a[start + i]);
      [i, j] = [i + 1, j + 1];
    } else if (i < rows && (j === columns || lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) {
      add("gone", a[start + i]);
      i += 1;
    } else {
      add("new", b[start + j]);
      j += 1;
    }
  }
  add("same", a.slice(endA).join(""));
  return runs;
}

/** What the text can be shaded by: a value of each token, and whether it has two signs. */
const SHADINGS = [
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
function shadingsOf(rollouts) {
  return SHADINGS.filter(
    ({ key, value }) => key === "none" || rollouts.some((r) => r.pieces.some((_, i) => value(r, i) !== undefined && value(r, i) !== null)),
  );
}

/** The value that gets the strongest colour: all but a hundredth of the tokens are below it. */
function scaleOf(rollouts, shading) {
  const sizes = rollouts.flatMap((r) => r.pieces.map((_, i) => Math.abs(shading.value(r, i) ?? 0))).filter((v) => v > 0);
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.99 * (sizes.length - 1))] ?? 0;
}

/** A token's background: blue above zero, orange below, stronger with the value. */
function shade(element, value, scale) {
  if (!value || !scale) return;
  const strength = Math.round(8 + 47 * Math.sqrt(Math.min(Math.abs(value) / scale, 1)));
  element.classList.add(value < 0 ? "below" : "above");
  element.style.setProperty("--strength", `${strength}%`);
}

/** What the colours mean. */
function shadeLegend(shading, scale) {
  if (shading.key === "none" || !scale) return h("p", { class: "shade-legend" });
  const ends = shading.signs ? [signed(-scale), signed(scale)] : ["0", shown(scale)];
  return h("p", { class: "shade-legend" }, ends[0],
    h("span", { class: `ramp ${shading.signs ? "two" : "one"}`, role: "img", "aria-label": `colours from ${ends[0]} to ${ends[1]}` }), ends[1]);
}

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
function rolloutCard(rollout, { title, shading, scale, anchor, note, versus = "the anchor" }) {
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

let chosenShading = "advantage";

/** A group as the paper's case studies show one: question, anchor, hard negatives, reflection. */
export function groupView(group, images, { run, link }) {
  const shadings = shadingsOf(group.rollouts);
  const shading = shadings.find(({ key }) => key === chosenShading) ?? shadings[0];
  const view = h("article", { class: "group" });
  const select = h("select", { onchange: () => draw(select.value) }, shadings.map(({ key, label }) => h("option", { value: key, selected: key === shading.key }, label)));
  const legend = h("div", {});
  const body = h("div", {});
  function draw(key) {
    const chosen = shadings.find((one) => one.key === key);
    chosenShading = key;
    const scale = scaleOf(group.rollouts, chosen);
    legend.replaceChildren(shadeLegend(chosen, scale));
    body.replaceChildren(...groupParts(group, { shading: chosen, scale }));
  }
  view.append(
    h("header", { class: "group-head" },
      h("h2", { tabindex: "-1", id: "group-title" }, `${group.decoding ? `Answers, ${words(group.decoding)}` : `Step ${group.step}`}, row ${visible(group.row)}`),
      h("p", { class: "note" }, [run.name, group.source, group.type, headline(group)].filter(Boolean).map(visible).join(" · ")),
      copyButton("Copy link", () => link)),
    question(group, images),
    shadings.length > 1 ? h("div", { class: "shade-bar" }, h("label", {}, "Shade text by ", select), legend) : "",
    body,
  );
  draw(shading.key);
  return view;
}

/** What became of a group. */
export function headline(group) {
  return `${group.correct} of ${group.size} correct, ${words(group.outcome)}`;
}

function question(group, images) {
  const pictures = group.images.map((name, i) =>
    images[name]
      ? h("img", { src: `data:image/webp;base64,${images[name]}`, alt: `Image ${i + 1} of the question` })
      : h("p", { class: "note" }, `Image ${i + 1} is not in this page: ${name}`),
  );

  return h("section", { class: "question", "aria-label": "Question" },
    pictures.length ? h("div", { class: "images" }, pictures) : null,
    h("div", {},
      h("h3", {}, "Question"), h("p", { class: "text", dir: "auto" }, visible(group.prompt)),
      group.options.length ? h("ol", { class: "options" }, group.options.map((text) => h("li", {}, visible(text)))) : null,
      h("h3", {}, "Reference answer"), h("p", { class: "text reference", dir: "auto" }, visible(group.answer))));
}

function groupParts(group, shared) {
  const { rollouts } = group;
  const numbered = (rollout) => `Rollout ${rollouts.indexOf(rollout) + 1}`;
  const card = (rollout, title, more) => rolloutCard(rollout, { title, ...shared, ...more });
  if (group.decoding) {
    const versus = { anchor: rollouts[0], versus: "the first answer" };
    return [part(rollouts.length > 1 ? "Answers of each evaluation" : "Answer", rollouts.map((one) => card(one, roleName(one.role), versus)))];
  }
  const anchor = rollouts.find(({ role }) => role.endsWith("anchor"));
  const positives = rollouts.filter(({ role }) => role === "positive");
  const negatives = rollouts.filter(({ role }) => role === "hard_negative");
  negatives.sort((a, b) => a.rank - b.rank);
  const letters = new Map(negatives.map((one, i) => [one, String.fromCharCode(65 + (i % 26))]));
  const reflection = rollouts.find(({ reflectedFrom }) => reflectedFrom !== null);
  const source = reflection ? rollouts[reflection.reflectedFrom] : null;
  const used = new Set([anchor, ...positives, ...negatives, reflection]);
  const others = rollouts.filter((rollout) => !used.has(rollout));
  const note = (one) => {
    if (one.trained) return null;
    return one === source && reflection.trained ? "Replaced by its reflection." : "Not trained.";
  };
  const repaired = letters.has(source) ? `negative ${letters.get(source)}` : "a rollout";
  const rest = (part) => part.map((one) => card(one, `${numbered(one)}: ${roleName(one.role).toLowerCase()}`, { anchor }));
  return [
    anchor ? part(roleName(anchor.role), [card(anchor, numbered(anchor), { note: note(anchor) })]) : null,
    part("Positives beside the anchor", positives.map((one) => card(one, numbered(one), { anchor, note: note(one) }))),
    part("Hard negatives, in the order they were selected", negatives.map((one) => card(one, `Negative ${letters.get(one)}`, { anchor, note: note(one) }))),
    reflection ? part(`Reflection on ${repaired}`, [card(reflection, roleName(reflection.role), { anchor: source, versus: "the rollout it repairs" })]) : null,
    anchor && others.length
      ? h("details", { class: "part" }, h("summary", {}, h("h3", {}, `Other rollouts (${others.length})`)), rest(others))
      : part("Rollouts", rest(others)),
  ].filter(Boolean);
}

function part(title, cards) {
  return cards.length ? h("section", { class: "part" }, h("h3", {}, title), cards) : null;
}
