import { copyButton, h } from "./dom.js";
import { roleName, rolloutCard } from "./rollout.js";
import { scaleOf, shadeLegend, shadingsOf } from "./shading.js";
import { visible, words } from "./text.js";

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
