"use strict";
// The views but for that of one rollout: overview, rollouts, a prompt over the steps, two runs beside each other.

const Views = (() => {
  const PAGE_GROUPS = 8;
  const OPEN = new Set(["reward", "val", "checks", "response_length"]);
  const FIRST = ["reward", "val", "checks", "response_length", "actor", "critic"];
  const opened = new Map();

  /** Curves of all metrics, checks that fired, and what could not be read. */
  async function overview(route, signal) {
    const runs = Page.runs;
    const metrics = await Promise.all(runs.map((_, run) => Source.get("metrics", { run }, signal)));
    const checks = await Promise.all(runs.map((_, run) => Source.get("checks", { run }, signal)));
    return el(
      "section",
      null,
      runs.map((run, number) => about(run, number)),
      runs.map((run, number) => fired(run, number, checks[number])),
      charts(metrics),
    );
  }

  function about(run, number) {
    const newest = run.steps.at(-1);
    return el(
      "div",
      { class: "about" },
      el("h1", null, el("span", { class: `key run${number % 4}` }), run.name),
      el(
        "p",
        { class: "soft" },
        [
          newest ? `${run.rollouts} rollouts of ${run.steps.length} steps` : "no rollouts yet",
          run.last_step === null ? null : `log up to step ${run.last_step}`,
          run.reward ? `reward ${run.reward}` : null,
          run.rule ? `kept: ${run.rule}` : null,
        ]
          .filter(Boolean)
          .join(" · "),
        newest
          ? [
              " · ",
              el(
                "a",
                { href: address("rollouts", { run: number, kind: newest.kind, step: newest.step }) },
                `newest: ${newest.kind} step ${newest.step}`,
              ),
            ]
          : null,
      ),
      run.problems.length
        ? el(
            "ul",
            { class: "problems" },
            run.problems.map((text) => el("li", null, text)),
          )
        : null,
    );
  }

  function fired(run, number, checks) {
    if (!checks.length) return null;
    return el(
      "section",
      null,
      el("h2", null, `Worth a look${Page.runs.length > 1 ? ` in ${run.name}` : ""}`),
      el(
        "ul",
        { class: "checks" },
        checks.map((check) =>
          el(
            "li",
            { class: "card" },
            el("b", null, check.check),
            " ",
            el(
              "span",
              { class: "soft" },
              `value ${figure(check.value)}, threshold ${figure(check.threshold)} · `,
              check.first === check.last ? "" : `${check.steps} times from step ${check.first}, last in `,
              el(
                "a",
                { href: address("rollouts", { run: number, kind: "train", step: check.last }) },
                `step ${check.last}`,
              ),
            ),
            el("div", null, check.message),
          ),
        ),
      ),
    );
  }

  function charts(metrics) {
    const names = [...new Set(metrics.flatMap(Object.keys))];
    if (!names.length) return el("p", { class: "soft" }, "The run has logged no metric yet.");
    const groups = new Map();
    for (const name of names) {
      const group = name.split("/")[0];
      groups.set(group, [...(groups.get(group) ?? []), name]);
    }
    const place = (name) => FIRST.indexOf(name) + 1 || FIRST.length + 1;
    const sorted = [...groups].sort(([a], [b]) => place(a) - place(b) || a.localeCompare(b));
    return sorted.map(([group, members]) => chartGroup(group, members, metrics));
  }

  function chartGroup(group, names, metrics) {
    const grid = el("div", { class: "charts" });
    const isOpen = opened.get(group) ?? OPEN.has(group);
    const draw = () => {
      if (grid.childElementCount) return;
      grid.append(
        ...names.map((name) =>
          Curves.draw(
            name,
            metrics.map((one, run) => ({ run, points: one[name] ?? [] })),
            (run, step) => openStep(name, run, step),
          ),
        ),
      );
    };
    if (isOpen) draw();
    return el(
      "details",
      {
        class: "charts-of",
        open: isOpen,
        toggle: (event) => {
          opened.set(group, event.target.open);
          if (event.target.open) draw();
        },
      },
      el("summary", null, el("h2", null, group), el("span", null, ` ${names.length}`)),
      grid,
    );
  }

  /** Open the rollouts of a step, or of the nearest that has some. */
  function openStep(metric, run, step) {
    const kind = metric.startsWith("val/") ? "val" : "train";
    const steps = Page.runs[run].steps;
    const candidates = steps.filter((one) => one.kind === kind).length
      ? steps.filter((one) => one.kind === kind)
      : steps;
    if (!candidates.length) return;
    const nearest = candidates.reduce((best, one) =>
      Math.abs(one.step - step) < Math.abs(best.step - step) ? one : best,
    );
    location.hash = address("rollouts", { run, kind: nearest.kind, step: nearest.step });
  }

  /** Groups that the filters leave, a page of them. */
  async function rollouts(route, signal) {
    const run = Page.run(route);
    const offset = Number(route.parameters.offset ?? 0);
    const bar = Source.isLive ? Filters.draw(route, Page.runs[run]) : null;
    let found;
    try {
      found = await Source.get(
        "groups",
        { ...Filters.of(route), run, sort: route.parameters.sort ?? "newest", offset, limit: PAGE_GROUPS },
        signal,
      );
    } catch (error) {
      if (error.name === "AbortError" || error.isLost) throw error;
      return el("section", null, bar, el("p", { class: "bad" }, error.message));
    }
    return el(
      "section",
      null,
      bar,
      el(
        "div",
        { class: "line" },
        el("output", { id: "count" }, `${found.rollouts} rollouts in ${found.total} groups`),
        pages(route, found),
        steps(route, run),
      ),
      key(),
      el(
        "div",
        { class: "stack" },
        found.groups.map((group) => groupCard(run, group)),
      ),
      Source.isLive && found.total ? send(route, run) : null,
      found.groups.length ? pages(route, found) : el("p", { class: "soft" }, "No rollout is left by these filters."),
    );
  }

  /** The command that writes this selection as one page. */
  function send(route, run) {
    const where = new URLSearchParams({
      ...Filters.of(route),
      ...(route.parameters.sort ? { sort: route.parameters.sort } : {}),
    }).toString();
    const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
    const command = [
      "python -m verl.viewer",
      quoted(Page.runs[run].folder),
      "--export selection.html",
      where ? `--where ${quoted(where)}` : "",
    ].join(" ");
    return el("details", { class: "small" }, el("summary", null, "one page to send"), el("pre", null, command));
  }

  const key = () =>
    el(
      "p",
      { class: "key" },
      el("span", { class: "swatch predicted" }),
      "predicted",
      el("span", { class: "swatch reference" }),
      "reference",
    );

  function pages(route, found) {
    const at = (offset, text, id) =>
      el("a", { href: address(route.view, { ...route.parameters, offset: offset || "" }), "data-go": id }, text);
    if (found.total <= PAGE_GROUPS) return null;
    const last = Math.min(found.offset + PAGE_GROUPS, found.total);
    return el(
      "nav",
      { class: "pages" },
      found.offset ? at(Math.max(found.offset - PAGE_GROUPS, 0), "‹ before", "before") : null,
      ` ${Math.min(found.offset + 1, last)} to ${last} of ${found.total} `,
      last < found.total ? at(found.offset + PAGE_GROUPS, "after ›", "after") : null,
    );
  }

  function steps(route, run) {
    const { kind, step } = route.parameters;
    if (!step) return null;
    const all = Page.runs[run].steps.filter((one) => !kind || one.kind === kind);
    const at = all.findIndex((one) => one.step === Number(step));
    const link = (one, text, id) =>
      one
        ? el(
            "a",
            {
              href: address("rollouts", { ...route.parameters, kind: one.kind, step: one.step, offset: "" }),
              "data-go": id,
            },
            text,
          )
        : null;
    return el(
      "nav",
      { class: "pages" },
      at > 0 ? link(all[at - 1], `‹ step ${all[at - 1].step}`, "earlier") : null,
      " ",
      at >= 0 && all[at + 1] ? link(all[at + 1], `step ${all[at + 1].step} ›`, "later") : null,
    );
  }

  /** How the answers to one prompt changed. */
  async function prompt(route, signal) {
    const run = Page.run(route);
    const found = await Source.get(
      "prompt",
      { run, uid: route.parameters.uid ?? "", ...(route.parameters.kind ? { kind: route.parameters.kind } : {}) },
      signal,
    );
    const curve = (kind) =>
      found.groups
        .filter((group) => group.kind === kind && meanScore(group) !== null)
        .map((group) => [group.step, meanScore(group)]);
    const kinds = ["train", "val"].filter((kind) => curve(kind).length);
    return el(
      "section",
      null,
      el("h1", null, "One prompt over the steps"),
      el(
        "p",
        { class: "soft" },
        `id ${found.uid} · ${found.total === 1 ? "once" : `${found.total} times`}${found.total > found.groups.length ? `, ${found.groups.length} of them shown` : ""}`,
      ),
      el(
        "div",
        { class: "charts" },
        kinds.map((kind) =>
          Curves.draw(`mean score, ${kind}`, [{ run, points: curve(kind) }], (_, step) => {
            location.hash = address("rollouts", { run, kind, step });
          }),
        ),
      ),
      drawQuestion(found.groups[0].question),
      key(),
      el(
        "div",
        { class: "stack" },
        found.groups.map((group) => groupCard(run, group, { withQuestion: false })),
      ),
    );
  }

  /** Two runs on the prompts that both have. */
  async function compare(route, signal) {
    const run = Page.run(route);
    const other = Number(route.parameters.other ?? (run === 0 ? 1 : 0));
    if (!Page.runs[other]) return el("p", { class: "soft" }, "Give two folders of runs to compare them.");
    const offset = Number(route.parameters.offset ?? 0);
    const bar = Source.isLive ? Filters.draw(route, Page.runs[run], false) : null;
    const found = await Source.get(
      "compare",
      { ...Filters.of(route), run, other, offset, limit: PAGE_GROUPS },
      signal,
    );
    const difference = ([first, second]) =>
      meanScore(first) === null || meanScore(second) === null ? null : meanScore(second) - meanScore(first);
    const sign = (value) => (value === null || Math.abs(value) < 0.005 ? "soft" : value < 0 ? "bad" : "good");
    return el(
      "section",
      null,
      el(
        "h1",
        null,
        el("span", { class: `key run${run % 4}` }),
        Page.runs[run].name,
        " and ",
        el("span", { class: `key run${other % 4}` }),
        Page.runs[other].name,
      ),
      bar,
      el(
        "div",
        { class: "line" },
        el(
          "output",
          { id: "count" },
          `${found.total} prompts in both, of ${found.prompts[0]} and ${found.prompts[1]}`,
        ),
        pages(route, found),
      ),
      key(),
      el(
        "div",
        { class: "stack" },
        found.pairs.map((pair) =>
          el(
            "div",
            { class: "pair" },
            drawQuestion(pair[0].question),
            el(
              "p",
              { class: "difference" },
              "difference of the means ",
              el("b", { class: sign(difference(pair)) }, signed(difference(pair))),
            ),
            el(
              "div",
              { class: "halves" },
              groupCard(run, pair[0], { name: Page.runs[run].name, withQuestion: false }),
              groupCard(other, pair[1], { name: Page.runs[other].name, withQuestion: false }),
            ),
          ),
        ),
      ),
    );
  }

  return { overview, rollouts, prompt, compare, sample: (route, signal) => SampleView.show(route, signal) };
})();
