"use strict";
// The bar of filters. Its values stand in the page's address, so that a selection can be kept and sent.

const Filters = (() => {
  const DELAY_MS = 200;
  const MAX_STEPS = 200; // to choose from, the newest; earlier ones are reached by curve, key or address
  const NOT_FILTERS = ["run", "other", "offset", "limit", "sort"];
  const UNSORTED = ["prompt_tokens", "log_prob_mean", "ratio_mean"];
  const ODD = {
    right_bad_boxes: "correct answer with bad boxes",
    wrong_good_boxes: "boxes good, answer wrong",
    format_failure: "format failure",
    no_variance: "group without variance",
    no_score: "no score",
    cut_off: "cut off",
  };
  let timer = 0,
    changes = {};

  /** Go to the same view with one value changed; after a letter only once typing rests. */
  function change(name, value, delayMs = 0) {
    changes[name] = value;
    clearTimeout(timer);
    timer = setTimeout(() => {
      const { view, parameters } = readRoute();
      location.replace(address(view, { ...parameters, ...changes, offset: "" }));
      changes = {};
      timer = 0;
    }, delayMs);
  }

  function select(route, name, title, options) {
    const value = route.parameters[name] ?? options[0][0];
    const known = options.some(([key]) => key === value) ? options : [...options, [value, value]];
    return el(
      "label",
      null,
      title,
      el(
        "select",
        { name, change: (event) => change(name, event.target.value) },
        known.map(([key, text]) => el("option", { value: key, selected: key === value }, text)),
      ),
    );
  }

  const all = (values, text = "all") => [["", text], ...values.map((value) => [value, value])];

  function bounds(route, name, title) {
    const field = (side) =>
      el("input", {
        type: "number",
        step: "any",
        name: `${side}.${name}`,
        "aria-label": `${side === "min" ? "least" : "most"} ${title}`,
        placeholder: side === "min" ? "least" : "most",
        value: route.parameters[`${side}.${name}`] ?? "",
        input: (event) => change(`${side}.${name}`, event.target.value, DELAY_MS),
      });
    return el("label", { class: "bounds" }, el("span", null, title.replaceAll("_", " ")), field("min"), field("max"));
  }

  function stepsOf(route, run) {
    const { kind } = route.parameters;
    const steps = run.steps.filter((one) => !kind || one.kind === kind).map((one) => String(one.step));
    return [...new Set(steps)].slice(-MAX_STEPS);
  }

  function sortsOf(figures) {
    const sorted = figures.filter(([name]) => !UNSORTED.includes(name));
    return [
      ["newest", "newest step"],
      ["oldest", "oldest step"],
      ...sorted.map(([name, title]) => [name, `lowest ${title}`]),
      ...sorted.map(([name, title]) => [`-${name}`, `highest ${title}`]),
    ];
  }

  function search(route) {
    return el("input", {
      type: "search",
      name: "text",
      placeholder: "text in prompt, response, truth",
      "aria-label": "text",
      value: route.parameters.text ?? "",
      input: (event) => change("text", event.target.value, DELAY_MS),
    });
  }

  /** The bar for a run. */
  function draw(route, run, withSort = true) {
    const names = Object.keys(route.parameters);
    const figures = [...run.parts.map((part) => [`part:${part}`, part]), ...run.numbers.map((name) => [name, name])];
    const unfiltered = address(route.view, { run: route.parameters.run, other: route.parameters.other });
    const pick = (name, title, options) => select(route, name, title, options);
    const { category, source, stop, failure } = run.values;
    const ranges = figures.map(([name, title]) => bounds(route, name, title));
    return el(
      "form",
      { class: "filters", submit: (event) => event.preventDefault() },
      el(
        "div",
        { class: "line" },
        pick("kind", "kind ", all([...new Set(run.steps.map((step) => step.kind))])),
        pick("step", "step ", all(stepsOf(route, run).toReversed())),
        pick("odd", "odd ", [["", "all"], ...run.odd.map((name) => [name, ODD[name] ?? name])]),
        pick("right", "answer ", [...all([]), ["yes", "right"], ["no", "wrong"]]),
        pick("failure", "failure ", [...all([]), ["*", "any failure"], ...failure.map((value) => [value, value])]),
        category.length ? pick("category", "category ", all(category)) : null,
        source.length ? pick("source", "source ", all(source)) : null,
        stop.length ? pick("stop", "stopped by ", all(stop)) : null,
        withSort ? pick("sort", "order ", sortsOf(figures)) : null,
        search(route),
        names.some((name) => !NOT_FILTERS.includes(name))
          ? el("a", { class: "clear", href: unfiltered }, "clear")
          : null,
      ),
      el(
        "details",
        { open: names.some((name) => /^(min|max)\./.test(name)) },
        el("summary", null, "ranges"),
        el("div", { class: "line" }, ranges),
      ),
    );
  }

  /** The filters of an address, as the server takes them. */
  function of(route) {
    return Object.fromEntries(
      Object.entries(route.parameters).filter(([name, value]) => !NOT_FILTERS.includes(name) && value !== ""),
    );
  }

  return { draw, of, isPending: () => timer !== 0 };
})();
