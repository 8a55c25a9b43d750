// What the book's interactive figures share: an expression, whose value is the kit. No library and no other host.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  /** A name of its own for each control: several figures stand on one page. */
  const fresh = () => `kdig-${Math.random().toString(36).slice(2)}`;

  function filled(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }

  /** An HTML element; an attribute `on…` is a listener, one that is false or null is left out. */
  const element = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

  /** An SVG element. */
  const shape = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

  /** A slider with its label and its value in words; arrow keys move it. `words(value)` is what a screen reader says. */
  function slider({ label, min, max, step, value, words = String }, changed) {
    const id = fresh();
    const input = element("input", { id, type: "range", min, max, step, value });
    const shown = element("output", { for: id });
    const update = () => {
      shown.textContent = words(Number(input.value));
      input.setAttribute("aria-valuetext", shown.textContent);
    };
    input.addEventListener("input", () => (update(), changed(Number(input.value))));
    update();
    return element("div", { class: "kdig-control" }, element("label", { for: id }, label), input, shown);
  }

  /** Radio buttons, of which one is chosen; `options` are texts, and `changed` gets the place of the chosen one. */
  function choice({ label, options, value = 0 }, changed) {
    const name = fresh();
    const buttons = options.map((text, place) =>
      element("label", {},
        element("input", { type: "radio", name, checked: place === value, onchange: () => changed(place) }), ` ${text}`),
    );
    return element("fieldset", {}, element("legend", {}, label), ...buttons);
  }

  /** A picture of side × side pixels that is drawn large; `draw` takes red, green, blue of each pixel, 0 to 255. */
  function picture(side, label) {
    const node = element("canvas", { width: side, height: side, role: "img", "aria-label": label });
    const context = node.getContext("2d");
    const draw = (rgb) => {
      const pixels = context.createImageData(side, side);
      for (let i = 0; i < side * side; i += 1) {
        for (let c = 0; c < 3; c += 1) pixels.data[4 * i + c] = rgb[3 * i + c];
        pixels.data[4 * i + 3] = 255;
      }
      context.putImageData(pixels, 0, 0);
    };
    return { node, draw, describe: (text) => node.setAttribute("aria-label", text) };
  }

  /** A picture with a word below it. */
  const captioned = (pictured, ...words) =>
    element("div", { class: "kdig-captioned" }, pictured.node, element("span", {}, ...words));

  /** Horizontal bars, one a name; `draw` takes shares between 0 and 1, and the place of the one that is marked. */
  function bars(names) {
    const rows = names.map((name) => {
      const bar = element("span", { class: "kdig-bar" });
      const value = element("span", { class: "kdig-value" });
      return { bar, value, cells: [element("span", {}, name), element("span", { class: "kdig-track" }, bar), value] };
    });
    const draw = (shares, marked) => rows.forEach(({ bar, value }, place) => {
      bar.style.width = `${100 * shares[place]}%`;
      bar.classList.toggle("kdig-marked", place === marked);
      value.textContent = `${(100 * shares[place]).toFixed(1)} %`;
    });
    return { node: element("div", { class: "kdig-bars" }, ...rows.flatMap((row) => row.cells)), draw };
  }

  /** Lines over a common axis. `lines`: [{xs, values, colour}]; x and y: {from, to, label}. `mark(at)` draws an upright. */
  function chart({ x, y, label, width = 440, height = 220 }, lines) {
    const left = 44, right = width - 10, top = 12, bottom = height - 38;
    const across = (value) => left + ((value - x.from) / (x.to - x.from)) * (right - left);
    const up = (value) => bottom - ((value - y.from) / (y.to - y.from)) * (bottom - top);
    const path = (xs, values) => values.map((v, i) => `${i ? "L" : "M"}${across(xs[i]).toFixed(1)} ${up(v).toFixed(1)}`).join("");
    const upright = shape("line", { y1: top, y2: bottom, stroke: "#D55E00", "stroke-width": 2 });
    const drawn = lines.map(({ xs, values, colour }) =>
      shape("path", { d: path(xs, values), fill: "none", stroke: colour, "stroke-width": 2 }));
    const text = (at, words, more = {}) => shape("text", { x: at[0], y: at[1], "font-size": 12, fill: "currentColor", ...more }, words);
    const node = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
      shape("path", { d: `M${left} ${top}V${bottom}H${right}`, fill: "none", stroke: "currentColor" }),
      shape("line", { x1: left, x2: right, y1: up(0), y2: up(0), stroke: "currentColor", "stroke-dasharray": "2 3" }),
      ...[x.from, x.to].map((v) => text([across(v), bottom + 15], String(v), { "text-anchor": v === x.from ? "start" : "end" })),
      ...[y.from, y.to].map((v) => text([left - 4, up(v) + 4], String(v), { "text-anchor": "end" })),
      text([(left + right) / 2, height - 6], x.label, { "text-anchor": "middle" }),
      text([left + 6, top + 4], y.label), ...drawn, upright);
    const mark = (at) => ["x1", "x2"].forEach((end) => upright.setAttribute(end, across(at)));
    return { node, mark, across, up };
  }

  /** A line of text that a screen reader hears of when it changes, but not at each step of a slider that moves. */
  function status() {
    const node = element("p", { class: "kdig-status" });
    const heard = element("p", { class: "kdig-heard", role: "status" });
    let waits;
    const say = (text) => {
      node.textContent = text;
      clearTimeout(waits);
      waits = setTimeout(() => (heard.textContent = text), 600);
    };
    return { node: element("div", {}, node, heard), say };
  }

  /** The bytes of a text in base 64. */
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

  /** Side by side where there is room, below each other on a phone. */
  const row = (...nodes) => element("div", { class: "kdig-row" }, ...nodes);

  return { element, shape, slider, choice, picture, captioned, bars, chart, status, bytes, row };
})()
