"use strict";
// Elements of the page. What a model or a file says becomes text, never markup: no other file makes elements.

const SVG_SPACE = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text, null and undefined nothing. */
function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for a drawing. */
function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG_SPACE, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

/** A number for reading; what is none is a dash. */
function figure(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toFixed(size >= 100 ? 1 : digits);
}

/** A score or a part of it. */
function points(value) {
  return value === null || value === undefined ? "–" : value.toFixed(2);
}

/** A number with its sign; what rounds to zero has none. */
function signed(value) {
  if (value === null || value === undefined) return "–";
  const size = points(Math.abs(value));
  return Number(size) === 0 ? size : `${value > 0 ? "+" : "−"}${size}`;
}

/** The address of a view inside the page. */
function address(view, parameters = {}) {
  const given = Object.entries(parameters).filter(
    ([, value]) => value !== "" && value !== null && value !== undefined,
  );
  const query = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return `#/${view}${query ? `?${query}` : ""}`;
}

/** A table whose first row is the header. */
function table(header, rows) {
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      null,
      el(
        "thead",
        null,
        el(
          "tr",
          null,
          header.map((name) => el("th", null, name)),
        ),
      ),
      el(
        "tbody",
        null,
        rows.map((row) =>
          el(
            "tr",
            null,
            row.map((cell) => el("td", null, cell)),
          ),
        ),
      ),
    ),
  );
}
