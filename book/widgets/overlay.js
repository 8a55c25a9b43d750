// The overlay on a batch: data = {probability, images: [{pixels, map, label, from}]}, `from` in per cent of probability.
(data, kit) => {
  const SIDE = 32;
  const dials = { percent: 100 * data.probability, power: 1, down: 0, right: 0, moves: true, mirrored: false, maps: false };
  const batch = data.images.map(({ pixels, map, label, from }) => {
    const shown = kit.picture(SIDE, ""), word = kit.element("span", {}, label);
    shown.node.style.width = shown.node.style.height = "4.6rem";
    return { label, from, shown, word, pixels: kit.bytes(pixels), map: kit.bytes(map) };
  });
  const words = kit.status();

  /** To a power, then stretched to [0, 1]: `scale_map`. A constant map becomes zeros. */
  function scaled(map) {
    const powered = Array.from(map, (value) => (value / 255) ** dials.power);
    const lowest = Math.min(...powered), width = Math.max(...powered) - lowest;
    return powered.map((value) => (width ? (value - lowest) / width : 0));
  }

  /** Padded with zeros, cut out and mirrored: `crop_and_flip`, of one picture with so many channels. */
  function moved(values, channels) {
    const out = new Float64Array(channels * SIDE * SIDE);
    for (let row = 0; row < SIDE; row += 1) {
      for (let column = 0; column < SIDE; column += 1) {
        const fromRow = row - dials.down, fromColumn = (dials.mirrored ? SIDE - 1 - column : column) - dials.right;
        if (Math.min(fromRow, fromColumn) < 0 || Math.max(fromRow, fromColumn) >= SIDE) continue;
        for (let c = 0; c < channels; c += 1) {
          out[channels * (SIDE * row + column) + c] = values[channels * (SIDE * fromRow + fromColumn) + c];
        }
      }
    }
    return out;
  }

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  /** Pearson's correlation over the pixels of two maps. */
  function correlation(a, b) {
    const [middleA, middleB] = [mean(a), mean(b)];
    const covariance = mean(a.map((value, i) => (value - middleA) * (b[i] - middleB)));
    const spread = (values, middle) => Math.sqrt(mean(values.map((value) => (value - middle) ** 2)));
    return covariance / (spread(a, middleA) * spread(b, middleB));
  }

  function drawOne({ label, from, shown, word, pixels, map }) {
    const crop = moved(pixels, 3), whole = Float64Array.from(scaled(map)), belongs = moved(whole, 1);
    const used = dials.moves ? belongs : whole, overlaid = dials.percent >= from;
    const blended = crop.map((value, i) => 0.5 * value + 0.5 * 255 * used[Math.floor(i / 3)]);
    const seen = overlaid ? blended : crop;
    shown.draw(dials.maps ? crop.map((_, i) => 255 * used[Math.floor(i / 3)]) : seen);
    shown.describe(dials.maps ? `${label}: its map` : `${label}, ${overlaid ? "with its map" : "plain"}`);
    word.textContent = overlaid ? `${label} + map` : label;
    return { overlaid, match: correlation(used, belongs), light: mean(seen) / mean(crop) };
  }

  function update() {
    const found = batch.map(drawOne), overlaid = found.filter((one) => one.overlaid);
    const light = overlaid.length ? `, at ${(100 * mean(overlaid.map((one) => one.light))).toFixed(0)} % of their brightness` : "";
    const where = dials.moves ? "moves with its crop" : "is left behind";
    words.say(
      `p = ${(dials.percent / 100).toFixed(2)}: ${overlaid.length} of ${batch.length} images are overlaid${light}. ` +
        `u = ${dials.power.toFixed(2)}. The map ${where}: correlation ${mean(found.map((one) => one.match)).toFixed(2)} ` +
        "with the map that belongs there.",
    );
  }

  const pixels = (value) => `${value > 0 ? "+" : ""}${value} pixels`;
  const dial = (name, settings) => kit.slider({ value: dials[name], ...settings }, (value) => ((dials[name] = value), update()));
  const either = (name, label, options) =>
    kit.choice({ label, options, value: 0 }, (place) => ((dials[name] = name === "moves" ? !place : !!place), update()));
  const controls = [
    dial("percent", { label: "Probability p", min: 0, max: 100, step: 5, words: (v) => (v / 100).toFixed(2) }),
    dial("power", { label: "Power u", min: 1, max: 2, step: 0.05, words: (v) => v.toFixed(2) }),
    dial("down", { label: "Shift down", min: -4, max: 4, step: 1, words: pixels }),
    dial("right", { label: "Shift right", min: -4, max: 4, step: 1, words: pixels }),
    either("mirrored", "The image:", ["not mirrored", "mirrored"]),
    either("moves", "The map:", ["moves with the crop", "is left behind"]),
    either("maps", "Show:", ["what the student gets", "the maps alone"]),
  ];
  update();
  const grid = "display: grid; grid-template-columns: repeat(auto-fill, 4.7rem); gap: 0.4rem; margin: 0.5rem 0; max-width: 31rem";
  const pictures = batch.map(({ shown, word }) => kit.captioned(shown, word));
  return [...controls, kit.element("div", { style: grid }, ...pictures), words.node];
}
