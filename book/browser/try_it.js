// The page book/try_it.md: teacher and student in the reader's browser, with ONNX Runtime Web on one thread.
// A classic script, and not a module: a module would not even start on a page that was opened from a file.
(() => {
  "use strict";

  const root = document.getElementById("kdig-try");
  const base = new URL(".", document.currentScript.src);

  const SIZE = 32; // pixels of a side, as in CIFAR-10
  const WARM_UP = 10; // calls of each network that are not counted
  const MOST_ROUNDS = 100;
  const FEWEST_ROUNDS = 20;
  const SECONDS = 6; // after this, no more rounds than FEWEST_ROUNDS
  const ANNOUNCED = 10; // a screen reader hears of each tenth round
  const TICKS = 20; // a timed sample lasts at least so many steps of the browser's clock: an error of 5 % at most
  const LARGEST = 4096; // pixels of a side: the largest canvas that phones have
  const BLANK = new Float32Array(3 * SIZE * SIZE); // what a network is called with while no picture is there

  let assets; // assets.json, written by book/_ext/kdig_browser.py
  let runtime; // ONNX Runtime Web
  let networks = []; // the entries of assets.networks, each with its session and what it took to load
  let picture = null; // what is classified: {pixels, example}; example is null for a picture of one's own
  let latest = 0; // counts the pictures chosen: one that is decoded late must not replace a later one
  let queue = Promise.resolve(); // one inference at a time

  // ---- The page

  /** An element with attributes and children; an attribute that is false or null is left out. */
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  }

  const part = (name) => root.querySelector(`[data-part="${name}"]`);

  function sentence(text) {
    root.replaceChildren(element("p", { class: "kdig-try-sentence", role: "status" }, text));
  }

  function say(text) {
    part("status").textContent = text;
  }

  const title = (network) => `${network.name} ${network.precision}`;
  const megabytes = (bytes) => `${(bytes / 1e6).toPrecision(2)} MB`;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const milliseconds = (value) => `${value.toPrecision(3)} ms`;
  const factor = (value) => value.toPrecision(3);

  function render() {
    const total = assets.networks.reduce((sum, network) => sum + network.bytes, 0) + assets.runtime_bytes;
    root.replaceChildren(
      pictureChoice(),
      element(
        "div",
        { class: "kdig-try-look" },
        figure("picture", "What the networks see: 32 × 32 pixels"),
        figure("map", "What the teacher looked at: its IG map"),
      ),
      element(
        "div",
        { class: "kdig-try-buttons" },
        button("load", load, false, `Load the networks (${megabytes(total)}, from this book)`),
        button("measure", measure, true, "Measure the latency on this device"),
      ),
      element("p", { class: "kdig-try-status", role: "status", "data-part": "status" }),
      element("progress", { "data-part": "progress", "aria-label": "rounds measured", max: MOST_ROUNDS, hidden: true }),
      element("p", { "data-part": "failures" }),
      element("div", { "data-part": "predictions", class: "kdig-try-scroll" }),
      element("div", { "data-part": "latency", class: "kdig-try-scroll" }),
    );
    showExample(assets.examples[0]);
  }

  function pictureChoice() {
    const choices = assets.examples.map((example, place) => {
      const name = assets.classes[example.label];
      return element(
        "label",
        { class: "kdig-try-choice" },
        element("input", {
          type: "radio",
          name: "kdig-try-picture",
          value: place,
          checked: place === 0,
          onchange: () => showExample(example),
        }),
        element("img", { src: new URL(example.picture, base), alt: "", width: SIZE, height: SIZE, class: "dark-light" }),
        element("span", {}, name),
      );
    });
    return element(
      "fieldset",
      { class: "kdig-try-pictures" },
      element("legend", {}, "Choose a picture"),
      element("div", { class: "kdig-try-choices" }, ...choices),
      element(
        "label",
        { class: "kdig-try-own" },
        element("span", {}, "or one of your own; it stays on this device: "),
        element("input", { type: "file", accept: "image/*", "data-part": "file", onchange: showOwn }),
      ),
    );
  }

  function button(name, action, hidden, text) {
    return element("button", { type: "button", class: "kdig-try-button", "data-part": name, hidden, onclick: action }, text);
  }

  function figure(name, caption) {
    const canvas = element("canvas", { width: SIZE, height: SIZE, role: "img", "data-part": name });
    return element("figure", {}, canvas, element("figcaption", { "data-part": `${name}-caption` }, caption));
  }

  // ---- Pictures

  async function showExample(example) {
    const mine = ++latest;
    const name = assets.classes[example.label];
    let images;
    try {
      images = await Promise.all([example.picture, example.map].map((file) => decoded(new URL(file, base))));
    } catch {
      if (mine === latest) say(`The picture of the class ${name} could not be loaded: choose another one.`);
      return;
    }
    if (mine !== latest) return;
    const [image, map] = images;
    part("file").value = "";
    draw("picture", image, `CIFAR-10 test image ${example.index}: ${name}`);
    draw("map", map, `IG map of the teacher for the class ${name}: bright where the picture spoke for it`);
    part("map").closest("figure").hidden = false;
    part("picture-caption").textContent = `What the networks see: test image ${example.index}, ${name}`;
    await choose({ pixels: pixels(), example });
  }

  async function showOwn() {
    const file = part("file").files[0];
    if (!file) return;
    const mine = ++latest;
    const address = URL.createObjectURL(file);
    try {
      const image = await decoded(address);
      if (mine !== latest) return;
      draw("picture", shrunk(image), "Your picture, cropped to a square and shrunk to 32 × 32 pixels");
    } catch {
      if (mine === latest) say(`${file.name} could not be read as a picture: choose a PNG, JPEG or WebP file.`);
      return;
    } finally {
      URL.revokeObjectURL(address);
    }
    for (const radio of root.querySelectorAll("input[type=radio]")) radio.checked = false;
    part("map").closest("figure").hidden = true;
    part("picture-caption").textContent =
      "What the networks see of your picture. It has no IG map: that needs gradients, which this runtime does not compute.";
    await choose({ pixels: pixels(), example: null });
  }

  async function decoded(address) {
    const image = new Image();
    image.src = address;
    await image.decode();
    return image;
  }

  /** The middle square of an image, halved until the last step is less than a half: browsers alias larger steps. */
  function shrunk(image) {
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    let size = Math.max(SIZE, Math.min(side, LARGEST));
    let canvas = element("canvas", { width: size, height: size });
    const [left, top] = [(image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2];
    smooth(canvas).drawImage(image, left, top, side, side, 0, 0, size, size);
    while (size > SIZE) {
      const smaller = Math.max(SIZE, Math.floor(size / 2));
      const next = element("canvas", { width: smaller, height: smaller });
      smooth(next).drawImage(canvas, 0, 0, size, size, 0, 0, smaller, smaller);
      [canvas, size] = [next, smaller];
    }
    return canvas;
  }

  function smooth(canvas) {
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white"; // behind what is transparent
    context.fillRect(0, 0, canvas.width, canvas.height);
    return context;
  }

  function draw(name, image, description) {
    const canvas = part(name);
    canvas.getContext("2d", { willReadFrequently: true }).drawImage(image, 0, 0);
    canvas.setAttribute("aria-label", description);
  }

  /** The shown picture as the networks take it: float32 in [0, 1], channels first. */
  function pixels() {
    const { data } = part("picture").getContext("2d").getImageData(0, 0, SIZE, SIZE);
    const plane = SIZE * SIZE;
    return Float32Array.from({ length: 3 * plane }, (_, i) => data[4 * (i % plane) + Math.floor(i / plane)] / 255);
  }

  async function choose(chosen) {
    picture = chosen;
    say(""); // what was wrong with another picture
    if (networks.length) await classify();
  }

  // ---- Networks

  async function load() {
    part("load").disabled = true;
    try {
      say("Loading ONNX Runtime Web …");
      runtime = await import(new URL("ort.wasm.min.mjs", base));
      runtime.env.wasm.numThreads = 1;
      runtime.env.logLevel = "error";
      networks = await sessions();
    } catch (error) {
      sentence(`The networks do not run in this browser: ${error.message}. The rest of the book reads without them.`);
      return;
    }
    part("load").hidden = true;
    part("measure").hidden = false;
    await classify();
    part("measure").focus({ preventScroll: true });
  }

  /** The networks that run here; of the others, the page says why they do not. */
  async function sessions() {
    const running = [];
    const failures = [];
    for (const network of assets.networks) {
      say(`Loading ${title(network)} (${megabytes(network.bytes)}) …`);
      try {
        running.push(await withSession(network));
      } catch (error) {
        failures.push(`${title(network)} does not run in this browser: ${error.message}.`);
      }
    }
    if (!running.length) throw new Error(failures[0]);
    part("failures").textContent = failures.join(" ");
    return running;
  }

  async function withSession(network) {
    const response = await fetch(new URL(network.file, base));
    if (!response.ok) throw new Error(`${network.file} could not be loaded (${response.status})`);
    const content = await response.arrayBuffer();
    const start = performance.now();
    const session = await runtime.InferenceSession.create(content, {
      executionProviders: ["wasm"],
      logSeverityLevel: 3, // errors: it warns of each constant that quantisation left over
    });
    const ready = { ...network, session, load_ms: performance.now() - start };
    await call(ready, tensor(BLANK)); // an operator that is missing shows only now
    return ready;
  }

  const tensor = (values) => new runtime.Tensor("float32", values, [1, 3, SIZE, SIZE]);

  const call = (network, input) => network.session.run({ [network.session.inputNames[0]]: input });

  async function probabilities(network, values) {
    const output = await call(network, tensor(values));
    const logits = Array.from(output[network.session.outputNames[0]].data);
    const highest = Math.max(...logits);
    const powers = logits.map((logit) => Math.exp(logit - highest));
    const sum = powers.reduce((total, power) => total + power, 0);
    return powers.map((power) => power / sum);
  }

  /** Do `work` when all before it is done. What goes wrong is said, and the page goes on. */
  function inTurn(work) {
    queue = queue.then(work).catch((error) => say(`The networks stopped: ${error.message ?? error}. Try again, or load this page anew.`));
    return queue;
  }

  function classify() {
    const chosen = picture;
    return inTurn(async () => {
      if (!chosen || chosen !== picture) return; // none yet, or another one was chosen meanwhile
      const predictions = [];
      for (const network of networks) predictions.push(await probabilities(network, chosen.pixels));
      if (chosen === picture) showPredictions(predictions, chosen.example);
    });
  }

  // ---- Predictions

  const best = (shares) => shares.indexOf(Math.max(...shares));

  function showPredictions(predictions, example) {
    const rows = assets.classes.map((name, label) =>
      element(
        "tr",
        { class: example && example.label === label ? "kdig-try-true" : null },
        element("th", { scope: "row" }, name, example && example.label === label ? " (true)" : ""),
        ...predictions.map((shares) => bar(shares[label], best(shares) === label)),
      ),
    );
    const table = element(
      "table",
      { class: "kdig-try-table" },
      element("caption", {}, "Probability of each class; the highest of each network is bold."),
      element("thead", {}, headings(["class", ...networks.map(title)])),
      element("tbody", {}, ...rows),
    );
    if (example) table.append(element("tfoot", {}, agreement(predictions, example)));
    part("predictions").replaceChildren(table);
    say(networks.map((network, i) => `${title(network)}: ${assets.classes[best(predictions[i])]}`).join("; ") + ".");
  }

  const headings = (names) => element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));

  function bar(share, highest) {
    const fill = element("span", { class: "kdig-try-fill", "aria-hidden": "true" });
    fill.style.inlineSize = `${100 * share}%`;
    return element("td", { class: highest ? "kdig-try-highest" : null, "data-share": share }, fill, percent(share));
  }

  /** The largest difference of a probability from the one that Python computed when the book was built. */
  function agreement(predictions, example) {
    const place = assets.examples.indexOf(example);
    const differences = predictions.map((shares, i) =>
      Math.max(...shares.map((share, label) => Math.abs(share - networks[i].probabilities[place][label]))),
    );
    const cells = differences.map((value) => element("td", { "data-difference": value }, `${value.toFixed(4)}`));
    return element("tr", {}, element("th", { scope: "row" }, "largest difference from Python"), ...cells);
  }

  // ---- Latency

  /** The smallest step that this browser's clock makes, in ms: 0.005 to 100, as the browser rounds it. */
  function clockStep() {
    const steps = Array.from({ length: 5 }, () => {
      const start = performance.now();
      let now = start;
      while (now === start) now = performance.now();
      return now - start;
    });
    return Math.min(...steps);
  }

  const pause = () => new Promise((resolve) => setTimeout(resolve));

  /** Mean time of `repeats` calls in a row, in ms. */
  async function timed(network, input, repeats) {
    const start = performance.now();
    for (let i = 0; i < repeats; i += 1) await call(network, input);
    return (performance.now() - start) / repeats;
  }

  async function samples(input, step) {
    const runs = [];
    for (const network of networks) {
      say(`Warming up ${title(network)} …`);
      await pause();
      await timed(network, input, WARM_UP);
      const rough = await timed(network, input, WARM_UP);
      runs.push({ network, repeats: Math.max(1, Math.ceil((TICKS * step) / Math.max(rough, step / WARM_UP))), times: [] });
    }
    const start = performance.now();
    for (let round = 0; round < MOST_ROUNDS; round += 1) {
      if (round >= FEWEST_ROUNDS && performance.now() - start > 1000 * SECONDS) break;
      // Each round begins with another network, so that none always follows the same one.
      for (let i = 0; i < runs.length; i += 1) {
        const run = runs[(i + round) % runs.length];
        run.times.push(await timed(run.network, input, run.repeats));
      }
      part("progress").value = round + 1;
      if (round % ANNOUNCED === 0) say(`Measuring: round ${round + 1} of at most ${MOST_ROUNDS} …`);
      await pause();
    }
    return runs;
  }

  /** Linear interpolation between order statistics, as numpy.quantile does it. */
  function quantile(values, share) {
    const sorted = [...values].sort((a, b) => a - b);
    const place = (sorted.length - 1) * share;
    const below = Math.floor(place);
    const above = Math.min(below + 1, sorted.length - 1);
    return sorted[below] + (place - below) * (sorted[above] - sorted[below]);
  }

  async function measure() {
    part("measure").disabled = true;
    part("progress").value = 0;
    part("progress").hidden = false;
    await inTurn(async () => {
      const step = clockStep();
      const runs = await samples(tensor(picture ? picture.pixels : BLANK), step);
      const rows = runs.map(({ network, repeats, times: all }) => ({
        ...network,
        repeats,
        samples: all.length,
        p50: quantile(all, 0.5),
        p95: quantile(all, 0.95),
      }));
      showLatency(rows, step);
    });
    part("progress").hidden = true;
    part("measure").disabled = false;
    part("measure").textContent = "Measure again";
    part("measure").focus({ preventScroll: true }); // a button that is switched off loses it
  }

  function showLatency(rows, step) {
    const slowest = Math.max(...rows.map((row) => row.p50));
    const [reference] = rows;
    const body = rows.map((row) => {
      const median = bar(row.p50 / slowest, false);
      median.lastChild.textContent = row.p50.toPrecision(3);
      median.dataset.p50 = row.p50;
      const values = [row.p95, reference.p50 / row.p50, row.bytes / 1e6, row.load_ms];
      const cells = values.map((value) => element("td", {}, value.toPrecision(3)));
      return element("tr", {}, element("th", { scope: "row" }, title(row)), median, ...cells);
    });
    const names = ["network", "median (ms)", "p95 (ms)", "speed-up (×)", "file (MB)", "made ready in (ms)"];
    part("latency").replaceChildren(
      element(
        "table",
        { class: "kdig-try-table" },
        element("caption", {}, conditions(rows, step)),
        element("thead", {}, headings(names)),
        element("tbody", {}, ...body),
      ),
      element("p", { "data-part": "finding" }, finding(rows)),
      element("p", {}, element("a", { href: asFile(rows), download: "latency.json" }, "Save these figures as JSON")),
    );
    say(`Measured: ${rows.map((row) => `${title(row)} ${milliseconds(row.p50)}`).join("; ")}.`);
  }

  function conditions(rows, step) {
    const most = Math.max(...rows.map((row) => row.repeats));
    const sample = most === 1 ? "one call each" : `the mean of up to ${most} calls each, for the clock's sake`;
    return (
      `Latency of one picture on this device: one thread, WebAssembly with SIMD, ${2 * WARM_UP} calls of warm-up, then ` +
      `${rows[0].samples} samples of every network in turn, ${sample}. This browser's clock has steps of ` +
      `${milliseconds(step)}. Speed-up: against ${title(rows[0])}.`
    );
  }

  function finding(rows) {
    const found = (name, precision) => rows.find((row) => row.name === name && row.precision === precision);
    const [teacher, student, int8] = [found("teacher", "fp32"), found("student", "fp32"), found("student", "int8")];
    if (!teacher || !student || !int8) return "";
    const ratio = student.p50 / int8.p50;
    const verdict = ratio > 1 ? `is ${factor(ratio)} times as fast as` : `takes ${factor(1 / ratio)} times as long as`;
    return (
      `On this device the student is ${factor(teacher.p50 / student.p50)} times as fast as the teacher in fp32; their ` +
      `multiply-accumulates, ${(teacher.macs / 1e6).toFixed(1)} and ${(student.macs / 1e6).toFixed(1)} million, would give ` +
      `${factor(teacher.macs / student.macs)}. In int8 the student ${verdict} in fp32, in a file of ` +
      `${megabytes(int8.bytes)} instead of ${megabytes(student.bytes)}.`
    );
  }

  /** The rows with the names that `python -m kdig_utils latency --json` uses. What a browser cannot know is null. */
  function asFile(rows) {
    const table = rows.map((row) => ({
      model: row.name,
      runtime: `onnxruntime-web ${runtime.env.versions.web} (wasm)`,
      precision: row.precision,
      batch: 1,
      threads: 1,
      p50_ms: row.p50,
      p95_ms: row.p95,
      speedup: null,
      accuracy: null,
      bytes: row.bytes,
      calls: row.samples,
      load_ms: row.load_ms,
      status: "ok",
      machine: navigator.userAgent,
      day: new Date().toISOString().slice(0, 10),
      note: row.repeats > 1 ? `a sample is the mean of ${row.repeats} calls` : "",
    }));
    return URL.createObjectURL(new Blob([JSON.stringify(table, null, 1)], { type: "application/json" }));
  }

  // ---- Start

  async function start() {
    if (location.protocol === "file:") {
      sentence(
        "This page was opened from a file, and browsers do not let a file load networks. Run `python -m http.server` in the " +
          "folder that holds index.html, and open http://localhost:8000/book/try_it.html.",
      );
      return;
    }
    if (typeof WebAssembly === "undefined") {
      sentence(
        "This browser has no WebAssembly, or it is switched off, and the networks run on it: there is nothing to try here. " +
          "The rest of the book reads without it.",
      );
      return;
    }
    try {
      assets = await (await fetch(new URL("assets.json", base))).json();
    } catch {
      sentence("The networks are not beside this page: build the book again, on a machine with a network.");
      return;
    }
    if (assets.missing) sentence(`The networks were not put into this copy of the book: ${assets.missing}.`);
    else render();
  }

  start();
})();
