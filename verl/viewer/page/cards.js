"use strict";
// Groups in a grid: the prompt with its image, its samples side by side.

const MOST_PX = 270; // of a sample's card

/** The word on a rollout: right, wrong, no score. */
function verdict(item) {
  if (item.score === null) return el("span", { class: "soft verdict" }, "no score");
  if (item.right === null) return null;
  return el("span", { class: `verdict ${item.right ? "good" : "bad"}` }, item.right ? "right" : "wrong");
}

/** What is odd about a rollout, in words. */
function oddities(item) {
  return [item.failure, item.stop === "length" ? "cut off" : null]
    .filter(Boolean)
    .map((text) => el("span", { class: "tag bad" }, text));
}

/** A bar from 0 to 1 with its name and value. */
function partBar(name, value) {
  const bar = el("span", { class: "fill" });
  bar.style.width = `${100 * Math.min(Math.max(value ?? 0, 0), 1)}%`;
  return el(
    "div",
    { class: "part" },
    el("span", { title: name }, name.replace(/_score$/, "").replaceAll("_", " ")),
    el("span", { class: "bar" }, bar),
    el("span", { class: "value" }, points(value)),
  );
}

/** An advantage as a bar to the left or right of zero; two standard deviations fill it. */
function advantageBar(value) {
  if (value === null) return null;
  const bar = el("span", { class: `fill ${value < 0 ? "down" : "up"}` });
  bar.style.width = `${25 * Math.min(Math.abs(value), 2)}%`;
  return el(
    "div",
    { class: "part" },
    el("span", null, "advantage"),
    el("span", { class: "bar middle" }, bar),
    el("span", { class: "value" }, signed(value)),
  );
}

function rolloutAddress(run, item) {
  const { kind, step, group, sample } = item;
  return address("sample", { run, kind, step, group, sample });
}

function sampleCard(run, group, sample) {
  const scene = sceneOrImage(run, { images: group.images, layout: sample.layout }, 320, {
    title: `sample ${sample.sample}: boxes predicted and true`,
  });
  return el(
    "a",
    { class: `sample${sample.passes ? "" : " faded"}`, href: rolloutAddress(run, sample), "data-item": true },
    scene,
    el(
      "div",
      { class: "line" },
      el("b", { class: "score" }, sample.score === null ? "" : points(sample.score)),
      verdict(sample),
      oddities(sample),
    ),
    Object.entries(sample.parts).map(([name, value]) => (value === null ? null : partBar(name, value))),
    advantageBar(sample.advantage),
    el(
      "div",
      { class: "soft facts" },
      [
        `#${sample.sample}`,
        sample.response_tokens === null ? null : `${sample.response_tokens}\u00a0tokens`,
        sample.iou_mean === null ? null : `IoU\u00a0${points(sample.iou_mean)}`,
      ]
        .filter(Boolean)
        .map((text) => el("span", null, text)),
    ),
    el("div", { class: "said" }, sample.answer || "no answer"),
  );
}

function meanScore(group) {
  const scores = group.samples.map((sample) => sample.score).filter((score) => score !== null);
  return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : null;
}

/** A question, its options in one line. */
function drawQuestion(text) {
  const [question, options = ""] = text.split("\nOptions:\n");
  return el(
    "p",
    { class: "question" },
    question,
    options ? el("span", { class: "soft" }, `  ${options.split("\n").join(" · ")}`) : null,
  );
}

/** A group; `name` stands in front, such as that of its run. Where groups share a question, it stands above all. */
function groupCard(run, group, { name = "", withQuestion = true } = {}) {
  const cards = group.samples.map((sample) => sampleCard(run, group, sample));
  const samples = el("div", { class: "samples" }, cards);
  samples.style.maxWidth = `${cards.length * MOST_PX}px`; // few samples stand side by side, not far apart
  const facts = [group.category, group.source, group.kept && group.kept !== "all" ? `kept: ${group.kept}` : null];
  const mean = meanScore(group);
  const stepAddress = address("rollouts", { run, kind: group.kind, step: group.step });
  return el(
    "article",
    { class: "card group" },
    el(
      "h3",
      null,
      name ? `${name}: ` : "",
      el("a", { href: stepAddress }, `${group.kind} step ${group.step}`),
      ` · group ${group.group} · `,
      mean === null ? "no score" : `mean ${points(mean)}`,
      group.spread === 0 ? el("span", { class: "tag bad" }, "no variance") : null,
    ),
    withQuestion ? drawQuestion(group.question) : null,
    el(
      "p",
      { class: "soft small" },
      el("span", null, `true: ${group.truth}`),
      facts.filter(Boolean).map((text) => ` · ${text}`),
      " · ",
      el("a", { href: address("prompt", { run, uid: group.uid }) }, "over the steps"),
    ),
    samples,
    group.left_out ? el("p", { class: "soft" }, `${group.left_out} more samples`) : null,
  );
}
