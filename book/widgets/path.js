// The path of Integrated Gradients and a sum in place of the area: data = {pixels, baseline: pixels, label, rival,
// heights, rivals, slopes (65 each, from a = 0 to 1), gauss: {steps: [{point, weight, slope}]}}.
(data, kit) => {
  const last = data.slopes.length - 1, rise = data.heights[last] - data.heights[0];
  const grid = data.slopes.map((_slope, i) => i / last);
  const image = kit.bytes(data.pixels), baseline = kit.bytes(data.baseline);
  const rules = ["left", "right", "midpoint", "Gauss–Legendre"];
  const blue = "#0072B2", orange = "#D55E00", grey = "#888888";
  let at = 16, rule = 0, steps = 8;

  /** Of each term of the sum: the share of the path that it stands for, and the slope that it takes there. */
  function terms() {
    if (rule === 3) return data.gauss[steps].map(({ weight, slope }) => ({ weight, slope }));
    const places = [(i) => i / steps, (i) => (i + 1) / steps, (i) => (i + 0.5) / steps][rule];
    return Array.from({ length: steps }, (_none, i) => ({ weight: 1 / steps, slope: data.slopes[Math.round(places(i) * last)] }));
  }

  const floor = (values) => Math.floor(Math.min(0, ...values)), ceil = (values) => Math.ceil(Math.max(...values));
  const both = [...data.heights, ...data.rivals];
  const axis = { from: 0, to: 1, label: "a, from the baseline (0) to the image (1)" };
  const heights = kit.chart(
    { x: axis, y: { from: floor(both), to: ceil(both), label: "logit" }, label: `The logits of ${data.label} and ${data.rival} along the path`, height: 190 },
    [{ xs: grid, values: data.rivals, colour: grey }, { xs: grid, values: data.heights, colour: blue }],
  );
  const ofGauss = Object.values(data.gauss).flat().map(({ slope }) => slope), all = [...data.slopes, ...ofGauss];
  const slopes = kit.chart(
    { x: axis, y: { from: floor(all), to: Math.ceil(1.15 * Math.max(...all)), label: "slope" }, label: "The slope of the logit along the path, and the rectangles of the sum", height: 190 },
    [{ xs: grid, values: data.slopes, colour: blue }],
  );
  const done = kit.shape("path", { fill: blue, "fill-opacity": 0.25 });
  const rectangles = kit.shape("path", { fill: orange, "fill-opacity": 0.2, stroke: orange, "stroke-width": 1 });
  const key = (colour, text) => kit.element("span", {}, kit.element("span", { style: `color:${colour}`, "aria-hidden": "true" }, "■ "), `${text}  `);
  slopes.node.append(done, rectangles);
  const shown = kit.picture(32, ""), words = kit.status();

  function update() {
    const a = grid[at], share = (data.heights[at] - data.heights[0]) / rise, { across, up } = slopes;
    shown.draw(image.map((value, i) => Math.round(baseline[i] + a * (value - baseline[i]))));
    shown.describe(`the image at a = ${a.toFixed(2)}: ${Math.round(100 * a)} % of its contrast`);
    heights.mark(a);
    slopes.mark(a);
    const top = grid.slice(0, at + 1).map((x, i) => `L${across(x).toFixed(1)} ${up(data.slopes[i]).toFixed(1)}`).join("");
    done.setAttribute("d", `M${across(0)} ${up(0)}${top}L${across(a).toFixed(1)} ${up(0)}Z`);
    let x = 0, sum = 0, drawn = "";
    for (const { weight, slope } of terms()) {
      drawn += `M${across(x).toFixed(1)} ${up(0)}V${up(slope).toFixed(1)}H${across(x + weight).toFixed(1)}V${up(0)}`;
      [x, sum] = [x + weight, sum + weight * slope];
    }
    rectangles.setAttribute("d", drawn);
    const gap = sum - rise, leads = data.heights[at] > data.rivals[at] ? data.label : data.rival;
    words.say(
      `At a = ${a.toFixed(2)} the ${data.label} logit has made ${Math.round(100 * share)} % of its rise of ${rise.toFixed(1)}; of ${data.label} and ${data.rival}, ${leads} is higher. ` +
        `Over the whole path, the sum with ${steps} ${steps > 1 ? "steps" : "step"} (${rules[rule]}) is ${sum.toFixed(1)}, and the rise is ${rise.toFixed(1)}. The completeness gap is ${gap < 0 ? "−" : "+"}${Math.abs(gap).toFixed(2)}, ` +
        `${(100 * Math.abs(gap / rise)).toFixed(1)} % of the rise.`,
    );
  }

  const walk = kit.slider(
    { label: "Walk: a", min: 0, max: last, step: 1, value: at, words: (v) => (v / last).toFixed(2) }, (v) => ((at = v), update()));
  const count = kit.slider(
    { label: "Steps m", min: 0, max: 5, step: 1, value: 3, words: (v) => `${2 ** v}` }, (v) => ((steps = 2 ** v), update()));
  const which = kit.choice({ label: "The rule of the sum:", options: rules, value: rule }, (v) => ((rule = v), update()));
  update();
  const charts = kit.element("div", { style: "flex: 1 1 18rem" }, heights.node, slopes.node);
  const legend = kit.element("p", { class: "kdig-captioned", style: "align-items: flex-start" }, kit.element("span", {},
    key(blue, `${data.label}: logit, slope, and the area so far`), key(grey, `${data.rival}`), key(orange, "the sum's rectangles, and the place a")));
  return [walk, which, count, kit.row(kit.captioned(shown, "the image at a"), charts), legend, words.node];
}
