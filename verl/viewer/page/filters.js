"use strict";
// The bar of filters. Its values stand in the page's address, so that a selection can be kept and sent.

const Filters = (() => {
  const DELAY_MS = 200;
  const NOT_FILTERS = ["run", "other", "offset", "limit", "sort"];
  const ODD = {
    right_bad_boxes: "correct answer with bad boxes", wrong_good_boxes: "boxes good, answer wrong",
    format_failure: "format failure", no_variance: "group without variance", no_score: "no score", cut_off: "cut off",
  };
  let timer = 0;

  /** Go to the same view with one value changed, soon: typing goes on meanwhile. */
  function change(route, name, value) {
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = 0;
      const now = readRoute();
      const parameters = { ...now.parameters, [name]: value, offset: "" };
      location.replace(address(now.view, parameters));
    }, DELAY_MS);
  }

  function select(route, name, title, options) {
    const value = route.parameters[name] ?? options[0][0];
    const known = options.some(([key]) => key === value) ? options : [...options, [value, value]];
    return el("label", null, title, el("select", { name, change: (event) => change(route, name, event.target.value) },
      known.map(([key, text]) => el("option", { value: key, selected: key === value }, text))));
  }

  const all = (values, text = "all") => [["", text], ...values.map((value) => [value, value])];

  function bounds(route, name, title) {
    const field = (side) => el("input", {
      type: "number", step: "any", name: `${side}.${name}`, "aria-label": `${side === "min" ? "least" : "most"} ${title}`,
      placeholder: side === "min" ? "least" : "most", value: route.parameters[`${side}.${name}`] ?? "",
      input: (event) => change(route, `${side}.${name}`, event.target.value),
    });
    return el("label", { class: "bounds" }, title.replaceAll("_", " "), field("min"), field("max"));
  }

  /** The bar for a run. */
  function draw(route, run, withSort = true) {
    const kinds = [...new Set(run.steps.map((step) => step.kind))];
    const steps = [...new Set(run.steps.filter((step) => !route.parameters.kind || step.kind === route.parameters.kind).map((step) => String(step.step)))];
    const failures = [["", "all"], ["*", "any failure"], ...run.values.failure.map((value) => [value, value])];
    const figures = [...run.parts.map((part) => [`part:${part}`, part]), ...run.numbers.map((name) => [name, name])];
    const isNarrowed = Object.keys(route.parameters).some((name) => !NOT_FILTERS.includes(name));
    const ranges = Object.keys(route.parameters).some((name) => /^(min|max)\./.test(name));
    const sorts = [["newest", "newest step"], ["oldest", "oldest step"], ...figures.flatMap(([name, title]) =>
      name === "prompt_tokens" || name === "log_prob_mean" || name === "ratio_mean" ? [] : [[name, `lowest ${title}`], [`-${name}`, `highest ${title}`]])];
    return el("form", { class: "filters", submit: (event) => event.preventDefault() },
      el("div", { class: "line" },
        select(route, "kind", "kind ", all(kinds)),
        select(route, "step", "step ", all(steps.toReversed())),
        select(route, "odd", "odd ", [["", "all"], ...run.odd.map((name) => [name, ODD[name] ?? name])]),
        select(route, "right", "answer ", [["", "all"], ["yes", "right"], ["no", "wrong"]]),
        select(route, "failure", "failure ", failures),
        run.values.category.length ? select(route, "category", "category ", all(run.values.category)) : null,
        run.values.source.length ? select(route, "source", "source ", all(run.values.source)) : null,
        run.values.stop.length ? select(route, "stop", "stopped by ", all(run.values.stop)) : null,
        withSort ? select(route, "sort", "order ", sorts) : null,
        el("input", { type: "search", name: "text", placeholder: "text in prompt, response, truth", "aria-label": "text", value: route.parameters.text ?? "", input: (event) => change(route, "text", event.target.value) }),
        isNarrowed ? el("a", { class: "clear", href: address(route.view, { run: route.parameters.run, other: route.parameters.other }) }, "clear") : null),
      el("details", { open: ranges }, el("summary", null, "ranges"), el("div", { class: "line" }, figures.map(([name, title]) => bounds(route, name, title)))));
  }

  /** The filters of an address, as the server takes them. */
  function of(route) {
    return Object.fromEntries(Object.entries(route.parameters).filter(([name, value]) => !NOT_FILTERS.includes(name) && value !== ""));
  }

  return { draw, of, isPending: () => timer !== 0 };
})();
