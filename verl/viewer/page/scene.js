"use strict";
// Boxes over their image, as spatialthinker.visualize lays them out; pieces.html.jinja draws the same in static pages.

/** Both scenes of a layout; `which` names the boxes to draw: predicted, reference or both. */
function drawScene(layout, image, { title = "", which = ["predicted", "reference"] } = {}) {
  const { width, height } = layout;
  const shown = layout.boxes.filter(([, , isPredicted]) => which.includes(isPredicted ? "predicted" : "reference"));
  const rectangle = (box, attributes, ...children) => {
    const [x1, y1, x2, y2] = box;
    const place = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
    return svg(
      "rect",
      {
        ...Object.fromEntries(Object.entries(place).map(([name, value]) => [name, Math.round(value)])),
        ...attributes,
      },
      ...children,
    );
  };
  const outline = ([name, box, isPredicted], isHalo) =>
    rectangle(
      box,
      {
        class: `${isHalo ? "halo" : "box"} ${isPredicted ? "predicted" : "reference"}`,
      },
      isHalo ? null : svg("title", null, `${isPredicted ? "predicted" : "true"}: ${name}`),
    );
  const label = ([name, box, isPredicted]) =>
    svg(
      "g",
      { class: `label ${isPredicted ? "predicted" : "reference"}` },
      rectangle(box),
      svg(
        "text",
        {
          x: Math.round(box[0] + 3),
          y: Math.round((box[1] + box[3]) / 2),
          "dominant-baseline": "central",
          "font-size": 20,
          textLength: Math.round(box[2] - box[0] - 6),
          lengthAdjust: "spacingAndGlyphs",
        },
        name,
      ),
    );
  const labels = layout.labels.filter(([, , isPredicted]) => which.includes(isPredicted ? "predicted" : "reference"));
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "picture" },
    svg("rect", { width, height, class: "blank" }),
    image ? svg("image", { href: image, width, height, preserveAspectRatio: "none" }) : null,
    shown.map((one) => outline(one, true)),
    shown.map((one) => outline(one, false)),
    labels.map(label),
  );
}

/** A scene where there is a layout, else the image alone, else a word. */
function sceneOrImage(run, item, side, options = {}) {
  const image = item.images?.length ? Source.image(run, item.images[0], side) : "";
  if (item.layout) return drawScene(item.layout, image, options);
  if (image) return el("img", { src: image, alt: options.title ?? "image", loading: "lazy" });
  return el("p", { class: "soft" }, "no image recorded");
}

/** A text in its sections; where it has some, what lies outside all of them is marked. */
function drawSections(pieces) {
  const outside = pieces.some(([section]) => section) ? "outside" : "";
  return el(
    "pre",
    { class: "response" },
    pieces.map(([section, text]) =>
      el("span", { class: section ? `section ${section}` : text.trim() ? outside : "" }, text),
    ),
  );
}
