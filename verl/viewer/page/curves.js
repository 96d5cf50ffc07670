"use strict";
// Curves over training steps, one small chart a metric, each run a colour.

const Curves = (() => {
  const WIDTH = 320, HEIGHT = 150, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

  /** A chart of [{run, points: [[step, value], ...]}]; `open(run, step)` is called for a chosen point. */
  function draw(title, series, open) {
    const filled = series.filter(({ points }) => points.length);
    const all = filled.flatMap(({ points }) => points);
    const [low, high] = range(all.map(([, value]) => value));
    const [first, last] = [Math.min(...all.map(([step]) => step)), Math.max(...all.map(([step]) => step))];
    const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (last > first ? (step - first) / (last - first) : 0.5);
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low));
    const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    const dot = svg("circle", { class: "dot", r: 3.5, visibility: "hidden" });
    const output = el("output", { class: "soft" });
    const newest = filled.map(({ points }) => figure(points.at(-1)[1])).join(" · ");
    output.textContent = newest;
    let chosen = null;

    function choose(point, run) {
      chosen = point ? { step: point[0], run } : null;
      for (const mark of [cursor, dot]) mark.setAttribute("visibility", point ? "visible" : "hidden");
      output.textContent = point ? `step ${point[0]}: ${figure(point[1])}` : newest;
      if (!point) return;
      cursor.setAttribute("x1", x(point[0]));
      cursor.setAttribute("x2", x(point[0]));
      dot.setAttribute("cx", x(point[0]));
      dot.setAttribute("cy", y(point[1]));
    }

    function chooseAt(event) {
      const frame = drawing.getBoundingClientRect();
      const [px, py] = [(event.clientX - frame.left) * WIDTH / frame.width, (event.clientY - frame.top) * HEIGHT / frame.height];
      let best = null;
      for (const { run, points } of filled) {
        for (const point of points) {
          const distance = Math.abs(x(point[0]) - px) * 4 + Math.abs(y(point[1]) - py);
          if (!best || distance < best.distance) best = { distance, point, run };
        }
      }
      if (best) choose(best.point, best.run);
    }

    function onKey(event) {
      if (event.key === "Enter" && chosen) return open(chosen.run, chosen.step);
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      const { run, points } = filled.find((one) => !chosen || one.run === chosen.run);
      const place = chosen ? points.findIndex(([step]) => step === chosen.step) + by : points.length - 1;
      choose(points[Math.min(Math.max(place, 0), points.length - 1)], run);
    }

    const drawing = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", tabindex: 0, role: "img",
      "aria-label": `${title}: ${newest}. Arrow keys choose a step, Enter opens it.`,
      pointermove: chooseAt, pointerleave: () => choose(null), blur: () => choose(null), keydown: onKey,
      click: (event) => { chooseAt(event); if (chosen) open(chosen.run, chosen.step); },
    },
    [low, high].map((value) => svg("g", null,
      svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: LEFT - 5, y: y(value), "text-anchor": "end", "dominant-baseline": "central" }, tick(value)))),
    [...new Set([first, last])].map((step, place) => svg("text", {
      class: "tick", x: x(step), y: HEIGHT - 5, "text-anchor": first === last ? "middle" : place ? "end" : "start",
    }, String(step))),
    filled.map(({ run, points }) => points.length === 1
      ? svg("circle", { class: `point run${run % 4}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3 })
      : svg("path", { class: `line run${run % 4}`, d: points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("") })),
    cursor, dot);
    return el("figure", { class: "card chart" }, el("figcaption", null, el("b", null, title), output), drawing);
  }

  function range(values) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
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
