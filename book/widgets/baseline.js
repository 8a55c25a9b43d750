// One image, several baselines: data = {images: [{label, pixels, options: [{name, pixels, map, signed, sum, high, low,
// dark, light}]}]}; `map` from its lowest to its highest value, `signed` with 127.5 for nothing.
(data, kit) => {
  const STOPS = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];
  let image = 0, baseline = 0;
  const shown = kit.picture(32, ""), start = kit.picture(32, ""), map = kit.picture(32, ""), signed = kit.picture(32, "");
  const words = kit.status();

  const mixed = (from, to, share) => from.map((value, c) => Math.round(value + share * (to[c] - value)));
  function heat(value) {
    const place = (value / 255) * (STOPS.length - 1), below = Math.min(Math.floor(place), STOPS.length - 2);
    return mixed(STOPS[below], STOPS[below + 1], place - below);
  }
  const sides = (value) => mixed([247, 247, 247], value > 127.5 ? [178, 24, 43] : [33, 102, 172], Math.abs(value - 127.5) / 127.5);
  const signs = (value) => value.toFixed(1).replace("-", "−");
  const coloured = (text, colour) => [...kit.bytes(text)].flatMap(colour);

  function update() {
    const { label, pixels, options } = data.images[image], { name, sum, high, low, dark, light, ...drawn } = options[baseline];
    shown.draw(kit.bytes(pixels));
    start.draw(kit.bytes(drawn.pixels));
    map.draw(coloured(drawn.map, heat));
    signed.draw(coloured(drawn.signed, sides));
    shown.describe(`the photograph: ${label}`);
    start.describe(`the baseline: ${name}`);
    map.describe(`the IG map of ${label} from the baseline ${name}`);
    signed.describe(`the attributions with their signs, from the baseline ${name}`);
    words.say(
      `${label}, from ${name}: F(x) − F(x′) = ${signs(high)} − ${low < 0 ? `(${signs(low)})` : signs(low)} = ${signs(high - low)}. The attributions add up to ${signs(sum)}. The gap is ${signs(sum - (high - low))}. ` +
        `The darkest tenth of the pixels holds ${Math.round(dark)} % of the map, the lightest tenth ${Math.round(light)} %.`,
    );
  }

  const images = kit.choice(
    { label: "The image:", options: data.images.map(({ label }) => label) }, (place) => ((image = place), update()));
  const baselines = kit.choice(
    { label: "The baseline x′:", options: data.images[0].options.map(({ name }) => name) }, (place) => ((baseline = place), update()));
  update();
  const pictures = kit.row(kit.captioned(shown, "image x"), kit.captioned(start, "baseline x′"), kit.captioned(map, "IG map"), kit.captioned(signed, "signed: red for, blue against"));
  return [images, baselines, pictures, words.node];
}
