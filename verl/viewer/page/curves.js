"use strict";
// Curves over training steps, one small chart a metric, each run a colour.

const Curves = (() => {
  const WIDTH = 320,
    HEIGHT = 150,
    LEFT = 46,
    RIGHT = 8,
    TOP = 8,
    BOTTOM = 20;

  /** A chart of [{run, points: [[step, value], ...]}]; `open(run, step)` is called for a chosen point. */
  function draw(title, series, open) {
    const filled = series.filter(({ points }) => points.length);
    const scale = scaleOf(filled.flatMap(({ points }) => points));
    const newest = filled.map(({ points }) => figure(points.at(-1)[1])).join(" · ");
    const output = el("output", { class: "soft" }, newest);
    const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    const dot = svg("circle", { class: "dot", r: 3.5, visibility: "hidden" });
    const choose = (point) => {
      for (const mark of [cursor, dot]) mark.setAttribute("visibility", point ? "visible" : "hidden");
      output.textContent = point ? `step ${point[0]}: ${figure(point[1])}` : newest;
      if (!point) return;
      const [x, y] = [scale.x(point[0]), scale.y(point[1])];
      for (const [mark, name, value] of [
        [cursor, "x1", x],
        [cursor, "x2", x],
        [dot, "cx", x],
        [dot, "cy", y],
      ]) {
        mark.setAttribute(name, value);
      }
    };
    const drawing = svg(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        class: "curve",
        tabindex: 0,
        role: "img",
        "aria-label": `${title}: ${newest}. Arrow keys choose a step, Enter opens it.`,
        ...follow(filled, scale, choose, open),
      },
      drawAxes(scale),
      filled.map(({ run, points }) => drawLine(run, points, scale)),
      cursor,
      dot,
    );
    const name = title.split(/(?<=\/)/).flatMap((part) => [part, el("wbr")]); // breaks between parts, not inside
    return el("figure", { class: "card chart" }, el("figcaption", null, el("b", null, name), output), drawing);
  }

  /** Where steps and values lie in the drawing. */
  function scaleOf(points) {
    const steps = points.map(([step]) => step);
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    const values = points.map(([, value]) => value);
    const [low, high] = range(values);
    const isFlat = values.every((value) => value === values[0]);
    return {
      steps: [...new Set([first, last])],
      values: isFlat ? values.slice(0, 1) : [low, high],
      x: (step) => LEFT + (WIDTH - LEFT - RIGHT) * (last > first ? (step - first) / (last - first) : 0.5),
      y: (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low)),
    };
  }

  function drawAxes({ steps, values, x, y }) {
    const places = steps.length < 2 ? ["middle"] : ["start", "end"];
    const level = { class: "tick", x: LEFT - 5, "text-anchor": "end", "dominant-baseline": "central" };
    return [
      values.map((value) => svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) })),
      values.map((value) => svg("text", { ...level, y: y(value) }, tick(value))),
      steps.map((step, i) =>
        svg("text", { class: "tick", x: x(step), y: HEIGHT - 5, "text-anchor": places[i] }, String(step)),
      ),
    ];
  }

  function drawLine(run, points, { x, y }) {
    const colour = `run${run % 4}`;
    if (points.length === 1) {
      return svg("circle", { class: `point ${colour}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3 });
    }
    const places = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
    return svg("path", { class: `line ${colour}`, d: `M${places.join("L")}` });
  }

  /** What the chart does on pointer and keys: `choose(point)` marks a point or none, `open(run, step)` opens it. */
  function follow(filled, { x, y }, choose, open) {
    let chosen = null;
    const take = (point, run) => {
      chosen = point ? { step: point[0], run } : null;
      choose(point);
    };
    const takeNearest = (event) => {
      const frame = event.currentTarget.getBoundingClientRect();
      const px = ((event.clientX - frame.left) * WIDTH) / frame.width;
      const py = ((event.clientY - frame.top) * HEIGHT) / frame.height;
      const distance = (point) => 4 * Math.abs(x(point[0]) - px) + Math.abs(y(point[1]) - py);
      const all = filled.flatMap(({ run, points }) => points.map((point) => ({ run, point })));
      if (!all.length) return;
      const best = all.reduce((one, other) => (distance(other.point) < distance(one.point) ? other : one));
      take(best.point, best.run);
    };
    const onKey = (event) => {
      if (event.key === "Enter" && chosen) return open(chosen.run, chosen.step);
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by || !filled.length) return;
      event.preventDefault();
      event.stopPropagation();
      const { run, points } = filled.find((one) => !chosen || one.run === chosen.run);
      const place = chosen ? points.findIndex(([step]) => step === chosen.step) + by : points.length - 1;
      take(points[Math.min(Math.max(place, 0), points.length - 1)], run);
    };
    const onClick = (event) => {
      takeNearest(event);
      if (chosen) open(chosen.run, chosen.step);
    };
    const leave = () => take(null, 0);
    return { pointermove: takeNearest, pointerleave: leave, blur: leave, keydown: onKey, click: onClick };
  }

  function range(values) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low < high) return [low, high];
    const pad = Math.abs(low) * 0.1 || 1;
    return [low - pad, high + pad];
  }

  function tick(value) {
    const size = Math.abs(value);
    if (size && (size >= 1e4 || size < 1e-2)) return value.toExponential(1);
    return String(Number(value.toPrecision(3)));
  }

  return { draw };
})();
