// A teacher's answer to one image, softened: data = {classes, images: [{pixels, label, logits}], temperature}.
(data, kit) => {
  let image = 0, temperature = data.temperature;
  const shown = kit.picture(32, ""), answer = kit.bars(data.classes), words = kit.status();

  function softmax(logits) {
    const powers = logits.map((logit) => Math.exp((logit - Math.max(...logits)) / temperature));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((power) => power / sum);
  }

  function named(power) {
    const shown = (2 ** power).toPrecision(2);
    return shown === data.temperature.toPrecision(2) ? `${shown} (paper)` : shown;
  }

  function update() {
    const { logits, label } = data.images[image];
    const probabilities = softmax(logits);
    const bits = probabilities.reduce((sum, p) => sum - (p > 0 ? p * Math.log2(p) : 0), 0);
    const others = data.classes.map((name, place) => [probabilities[place], name]).filter(([, name]) => name !== label);
    const [most, second] = others.sort((a, b) => b[0] - a[0])[0];
    answer.draw(probabilities, data.classes.indexOf(label));
    words.say(
      `T = ${temperature.toPrecision(2)}: ${bits.toFixed(2)} of 3.32 bits. The wrong classes together get ` +
        `${(100 * (1 - probabilities[data.classes.indexOf(label)])).toFixed(1)} %; ${second} gets most, ${(100 * most).toFixed(1)} %.`,
    );
  }

  function show(place) {
    image = place;
    shown.draw(kit.bytes(data.images[place].pixels));
    shown.describe(`a test image, its label is ${data.images[place].label}`);
    update();
  }

  const images = kit.choice({ label: "The image:", options: data.images.map(({ label }) => label) }, show);
  const heat = kit.slider(
    { label: "Temperature T", min: -2, max: 4.5, step: 0.05, value: Math.log2(temperature), words: named },
    (power) => ((temperature = 2 ** power), update()),
  );
  show(0);
  return [images, heat, kit.row(kit.captioned(shown, "what the teacher sees"), answer.node), words.node];
}
