"use strict";
// One rollout in full.

const SampleView = (() => {
  const shown = new Set(["predicted", "reference"]);

  function picture(run, item) {
    const place = el("div", { class: "large" });
    const draw = () =>
      place.replaceChildren(sceneOrImage(run, item, 1280, { title: "boxes predicted and true", which: [...shown] }));
    draw();
    const toggles = ["predicted", "reference"].map((which) =>
      el(
        "label",
        null,
        el("input", {
          type: "checkbox",
          checked: shown.has(which),
          name: which,
          change: (event) => {
            if (event.target.checked) shown.add(which);
            else shown.delete(which);
            draw();
          },
        }),
        el("span", { class: `swatch ${which}` }),
        which,
      ),
    );
    const others = (item.images ?? [])
      .slice(1)
      .map((id) => el("img", { src: Source.image(run, id, 640), alt: "further image" }));
    return el("div", { class: "card" }, place, el("div", { class: "line" }, item.layout ? toggles : null), others);
  }

  function pairs(item) {
    if (!item.pairs.length) return null;
    const rows = item.pairs.map((pair) => [
      pair.reference ?? el("span", { class: "soft" }, "–"),
      pair.predicted ?? el("span", { class: "soft" }, "–"),
      pair.iou === undefined
        ? el("span", { class: "bad" }, pair.predicted === null ? "missed" : "unmatched")
        : points(pair.iou),
      pair.label === undefined ? "" : points(pair.label),
    ]);
    return el(
      "div",
      { class: "card pairs" },
      el("h3", null, "Objects"),
      table(["true", "predicted", "IoU", "label"], rows),
    );
  }

  function relations(item) {
    if (!item.relations.length && !item.reference_relations.length) return null;
    const mark = (isTrue) =>
      isTrue === null
        ? ""
        : isTrue
          ? el("span", { class: "good" }, " ✓ true")
          : el("span", { class: "bad" }, " ✗ not in the reference");
    const list = (title, entries) => [
      el("p", { class: "soft" }, entries.length ? title : `${title}: none`),
      el(
        "ul",
        null,
        entries.map((entry) => el("li", null, entry)),
      ),
    ];
    return el(
      "div",
      { class: "card" },
      el("h3", null, "Relations"),
      list(
        "predicted",
        item.relations.map(([text, isTrue]) => [text, mark(isTrue)]),
      ),
      list("true", item.reference_relations),
    );
  }

  function reward(item) {
    const rows = [
      ["prompt tokens", item.prompt_tokens],
      ["response tokens", item.response_tokens],
      ["mean log-prob", item.log_prob_mean],
      ["mean ratio", item.ratio_mean],
      ["KL", item.kl_mean],
      ["entropy", item.entropy_mean],
      ["mean IoU", item.iou_mean],
    ];
    return el(
      "div",
      { class: "card" },
      el(
        "div",
        { class: "line" },
        el("b", { class: "score" }, item.score === null ? "" : points(item.score)),
        verdict(item),
        oddities(item),
      ),
      item.why ? el("p", { class: "bad why" }, item.why) : null,
      Object.entries(item.parts).map(([name, value]) => (value === null ? null : partBar(name, value))),
      advantageBar(item.advantage),
      table(
        ["", ""],
        rows.filter(([, value]) => value !== null).map(([name, value]) => [name, figure(value, 4)]),
      ),
    );
  }

  /** The tokens, shaded by how far the ratio is from 1, or the log-prob from 0 where no ratio is known. */
  function tokens(item) {
    const { tokens, note } = item.tokens;
    if (!tokens.length) return null;
    const byRatio = tokens.some(([, , ratio]) => ratio !== null);
    const shade = (logProb, ratio) => {
      const size = byRatio ? Math.log(Math.max(ratio ?? 1, 1e-6)) / 0.05 : (logProb ?? 0) / 0.7;
      const level = Math.min(Math.round(Math.abs(size)), 4);
      return level ? `${size > 0 ? "up" : "down"}${level}` : "";
    };
    return el(
      "div",
      { class: "card" },
      el("h3", null, byRatio ? "Tokens by ratio" : "Tokens by log-prob"),
      el(
        "p",
        { class: "soft small" },
        byRatio ? "Green: more likely than when it was sampled; red: less likely." : "Red: unlikely.",
        note ? ` Shown are ${note}.` : "",
      ),
      el(
        "pre",
        { class: "tokens" },
        tokens.map(([text, logProb, ratio]) =>
          el(
            "span",
            {
              class: shade(logProb, ratio),
              title: [
                ratio === null ? null : `ratio ${figure(ratio)}`,
                logProb === null ? null : `log-prob ${figure(logProb)}`,
              ]
                .filter(Boolean)
                .join(", "),
            },
            text,
          ),
        ),
      ),
    );
  }

  function response(item) {
    const names = ["observe", "scene", "think", "answer"];
    return el(
      "div",
      { class: "card" },
      el("h3", null, "Response"),
      el(
        "p",
        { class: "small" },
        names.map((name) => el("span", { class: `section ${name}` }, `${name} `)),
        el("span", { class: "outside" }, "outside of all sections"),
      ),
      drawSections(item.sections),
      item.is_cut ? el("p", { class: "bad" }, "The text was longer and is cut here.") : null,
    );
  }

  function heading(run, item) {
    const { kind, step, group, sample } = item;
    const at = item.samples.indexOf(sample);
    const neighbour = (by, text, id) => {
      const other = item.samples[at + by];
      return other === undefined ? null : el("a", { id, href: rolloutAddress(run, { ...item, sample: other }) }, text);
    };
    const kept = item.kept && item.kept !== "all" ? `kept: ${item.kept}` : null;
    const facts = [item.category, item.source, kept, item.uid ? `id ${item.uid}` : null];
    const stepLink = el("a", { href: address("rollouts", { run, kind, step }) }, `${kind} step ${step}`);
    return [
      el("h1", null, stepLink, ` · group ${group} · sample ${sample}`),
      el(
        "nav",
        { class: "line" },
        neighbour(-1, "‹ previous sample", "previous"),
        neighbour(1, "next sample ›", "next"),
        el("a", { href: address("prompt", { run, uid: item.uid }) }, "this prompt over the steps"),
      ),
      drawQuestion(item.question),
      el("p", { class: "soft small" }, facts.filter(Boolean).join(" · ")),
    ];
  }

  /** The view of a rollout. */
  async function show(route, signal) {
    const { run = "0", kind, step, group, sample } = route.parameters;
    const item = await Source.get("rollout", { run, kind, step, group, sample }, signal);
    const truth = el("div", { class: "card" }, el("h3", null, "Ground truth"), el("pre", null, item.truth));
    const prompt = el("details", { class: "card" }, el("summary", null, "prompt"), el("pre", null, item.problem));
    const left = el("div", { class: "stack" }, picture(run, item), pairs(item), relations(item));
    const right = el("div", { class: "stack" }, reward(item), response(item), tokens(item), truth, prompt);
    return el("section", null, heading(run, item), el("div", { class: "halves" }, left, right));
  }

  return { show };
})();
