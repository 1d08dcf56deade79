import { copyButton, h } from "./dom.js";
import { roleName, rolloutCard } from "./rollout.js";
import { scaleOf, shadeLegend, shadingsOf } from "./shading.js";
import { visible, words } from "./text.js";

const ANCHORS = ["anchor", "proxy_anchor", "pseudo_anchor"];
const NEGATIVES = ["negative", "hard_negative"];
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
    body.replaceChildren(...groupParts(group, { shading: chosen, scale, cue: run.cue }));
  }
  view.append(
    h("header", { class: "group-head" },
      h("h2", { tabindex: "-1", id: "group-title" }, `Step ${group.step}, row ${visible(group.row)}`),
      h("p", { class: "note" }, [run.name, group.source, group.type, headline(group)].filter(Boolean).map(visible).join(" · ")),
      copyButton("Copy link", () => link)),
    question(group, images),
    h("div", { class: "shade-bar" }, h("label", {}, "Shade text by ", select), legend),
    body,
  );
  draw(shading.key);
  return view;
}

/** What became of a group, in a sentence. */
export function headline(group) {
  return `${group.correct} of ${group.size ?? group.rollouts.filter((r) => r.reflected_from === null || r.reflected_from === undefined).length} correct, ${words(group.outcome)}`;
}

function question(group, images) {
  const pictures = group.images.map((name, i) =>
    images[name]
      ? h("img", { src: `data:image/webp;base64,${images[name]}`, alt: `Image ${i + 1} of the question` })
      : h("p", { class: "note" }, `Image ${i + 1} is not in this page: ${name}`),
  );
  const options = Object.entries(group.options ?? {});
  return h("section", { class: "question", "aria-label": "Question" },
    pictures.length ? h("div", { class: "images" }, pictures) : null,
    h("div", {},
      h("h3", {}, "Question"), h("p", { class: "text", dir: "auto" }, visible(group.prompt)),
      options.length ? h("ul", { class: "options" }, options.map(([name, text]) => h("li", {}, visible(`${name}. ${text}`)))) : null,
      h("h3", {}, "Reference answer"), h("p", { class: "text reference", dir: "auto" }, visible(group.answer))));
}

function groupParts(group, shared) {
  const anchor = group.rollouts.find(({ role }) => ANCHORS.includes(role));
  const negatives = group.rollouts.filter(({ role }) => NEGATIVES.includes(role));
  negatives.sort((a, b) => (a.rank_of_negative ?? 99) - (b.rank_of_negative ?? 99) || (a.distance ?? 9) - (b.distance ?? 9));
  const reflections = group.rollouts.filter(({ role }) => role.startsWith("reflected"));
  const used = new Set([anchor, ...negatives, ...reflections]);
  const others = group.rollouts.filter((rollout) => !used.has(rollout));
  const card = (rollout, title, more) => rolloutCard(rollout, { title, ...shared, ...more });
  const lettered = (i) => `Negative ${String.fromCharCode(65 + (i % 26))}`;
  const from = (rollout) => negatives.findIndex((one) => one === group.rollouts[rollout.reflected_from]);
  return [
    part("Anchor", anchor ? [card(anchor, roleName(anchor.role))] : []),
    part("Hard negatives, nearest first", negatives.map((one, i) => card(one, lettered(i), { anchor }))),
    part("Reflection-guided resampling", reflections.map((one) => {
      const source = from(one);
      const of = source >= 0 ? `of negative ${String.fromCharCode(65 + source)}` : "of a negative that it replaced";
      const note = shared.cue ? `${of}, with the repair cue “${shared.cue}”` : of;
      return card(one, roleName(one.role), { anchor, note: visible(note) });
    })),
    others.length && used.size > 1
      ? h("details", { class: "part" }, h("summary", {}, h("h3", {}, `Other rollouts (${others.length})`)), others.map((one, i) => card(one, `${roleName(one.role)} ${i + 1}`, { anchor })))
      : part("Rollouts", others.map((one, i) => card(one, `${roleName(one.role)} ${i + 1}`))),
  ].filter(Boolean);
}

function part(title, cards) {
  return cards.length ? h("section", { class: "part" }, h("h3", {}, title), cards) : null;
}
