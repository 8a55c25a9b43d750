"""What the reader's browser runs: networks that say what Python says, a runtime that is the pinned one, a page for all.

The page is the real one: built by Jupyter Book, served on this machine, opened in Chromium without any other host.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from kdig_utils.edge import records
from kdig_utils.method import artifacts, cifar10

sys.path.append(str(Path(__file__).resolve().parents[2] / "book" / "_ext"))
import kdig_browser as browser

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[tests]'")

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ONLY_THIS_MACHINE = (
    "--no-sandbox",
    "--disable-quic",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
MEGABYTE = 1_000_000
Page = sync_api.Page
Opener = Callable[..., AbstractContextManager[Page]]


# What is built


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page loads from."""
    folder = tmp_path_factory.mktemp("try_it")
    if missing := browser.write_site(folder):
        pytest.skip(f"the assets cannot be built here: {missing}")
    return folder


@pytest.fixture(scope="module")
def assets(site: Path) -> dict:
    return json.loads((site / "assets.json").read_text())


def test_the_runtime_is_pinned_by_version_and_hash_and_names_no_registry() -> None:
    manifest, lock = (json.loads((ROOT / "book" / "browser" / name).read_text()) for name in browser_project())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages["node_modules/onnxruntime-web"]["version"] == manifest["dependencies"]["onnxruntime-web"]
    assert all(
        len(base64.b64decode(package["integrity"].removeprefix("sha512-"))) == 64 for package in packages.values()
    )
    assert not [name for name, package in packages.items() if "resolved" in package]


def browser_project() -> tuple[str, str]:
    return "package.json", "package-lock.json"


def test_the_site_is_small_and_the_int8_student_a_tenth_of_the_teacher(site: Path, assets: dict) -> None:
    assert sum(path.stat().st_size for path in site.iterdir()) < 30 * MEGABYTE
    sizes = {(network["name"], network["precision"]): network["bytes"] for network in assets["networks"]}
    assert sizes["student", "int8"] < 0.1 * sizes["teacher", "fp32"]


def test_the_examples_are_test_images_of_all_classes_and_some_that_only_the_teacher_gets_right(
    site: Path, assets: dict
) -> None:
    test = cifar10.load_sample("test")
    examples = assets["examples"]
    positions = [test.indices.tolist().index(example["index"]) for example in examples]
    pixels = [np.asarray(Image.open(site / example["picture"])) for example in examples]
    np.testing.assert_array_equal(pixels, test.pixels[positions].permute(0, 2, 3, 1).numpy())
    labels = [example["label"] for example in examples]
    assert labels == test.labels[positions].tolist()
    assert set(labels[:10]) == set(range(10))
    said = {(network["name"], network["precision"]): network["probabilities"] for network in assets["networks"]}
    answers = {name: np.argmax(said[name, "fp32"], axis=1).tolist() for name in ("teacher", "student")}
    assert len(labels) <= 10 + browser.DISAGREEMENTS
    assert answers["teacher"][10:] == labels[10:]
    assert not np.equal(answers["student"][10:], labels[10:]).any()


def test_the_stored_probabilities_are_those_of_the_published_networks(assets: dict) -> None:
    test = cifar10.load_sample("test")
    positions = [test.indices.tolist().index(example["index"]) for example in assets["examples"]]
    for network in (network for network in assets["networks"] if network["precision"] == "fp32"):
        model = artifacts.load("teacher" if network["name"] == "teacher" else assets["student"])
        with torch.inference_mode():
            expected = model(test.images(positions)).softmax(1)
        torch.testing.assert_close(torch.tensor(network["probabilities"]), expected, atol=1e-4, rtol=0)


def test_the_ig_maps_are_complete_and_reach_from_dark_to_bright(site: Path, assets: dict) -> None:
    brightness = [np.asarray(Image.open(site / example["map"]).convert("L")) for example in assets["examples"]]
    assert all(picture.shape == (32, 32) for picture in brightness)
    assert min(int(picture.max()) for picture in brightness) > 240, "a map's maximum is the brightest of its colours"
    assert max(int(picture.min()) for picture in brightness) < 20


def test_without_npm_the_site_says_why_it_is_empty_and_the_book_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setattr(browser.shutil, "which", lambda *_, **__: None)
    missing = browser.write_site(tmp_path / "site")
    assert "npm was not found" in missing
    assert json.loads((tmp_path / "site" / "assets.json").read_text()) == {"missing": missing}


def test_without_the_packages_that_export_the_site_names_them_and_the_book_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime").mkdir()
    monkeypatch.setattr(browser, "runtime", lambda: tmp_path / "runtime")
    for package in browser.EXPORTERS:
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    missing = browser.write_site(tmp_path / "site")
    assert "onnx and onnxruntime not found" in missing
    assert json.loads((tmp_path / "site" / "assets.json").read_text()) == {"missing": missing}


def test_a_package_with_another_hash_than_the_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    for name in browser_project():
        text = (ROOT / "book" / "browser" / name).read_text()
        forged = base64.b64encode(hashlib.sha512(b"another package").digest()).decode()
        (tmp_path / name).write_text(re.sub(r"sha512-[\w+/=]+", f"sha512-{forged}", text))
    monkeypatch.setattr(browser, "_sources", lambda: tmp_path)
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "workspace"))
    with pytest.raises(RuntimeError, match=r"EINTEGRITY|ENOTFOUND|EAI_AGAIN"):
        browser.runtime()
    assert not list((tmp_path / "workspace" / "browser").glob("runtime_*"))


# The page in Chromium


@pytest.fixture(scope="module")
def address(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page as Jupyter Book builds it, alone in a book of one page, served on this machine."""
    folder = tmp_path_factory.mktemp("book_of_one_page")
    shutil.copytree(ROOT / "book", folder / "book")
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/try_it\n")
    words = [Path(sys.executable).parent / "jupyter-book", "build", folder, "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KDIG_ROOT": str(ROOT)}
    subprocess.run(words, check=True, capture_output=True, env=environment)
    with served(folder / "_build" / "html") as host:
        yield f"{host}/book/try_it.html"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def chromium() -> Iterator[Opener]:
    """Opens a page in a fresh Chromium that reaches no other host; any error in its console fails the test."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: on Debian, apt install chromium")
    with sync_api.sync_playwright() as playwright:
        yield partial(fresh_page, playwright)


@contextmanager
def fresh_page(playwright: sync_api.Playwright, *flags: str, **context: object) -> Iterator[Page]:
    started = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ONLY_THIS_MACHINE, *flags])
    page = started.new_context(**context).new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    yield page
    started.close()
    assert not errors


@pytest.fixture(scope="module")
def loaded(address: str, chromium: Opener) -> Iterator[Page]:
    """The page with its networks loaded and the first example classified."""
    with chromium() as page:
        page.goto(address)
        page.get_by_role("button", name="Load the networks").click()
        page.wait_for_selector("tfoot")
        yield page


def shown_probabilities(page: Page) -> np.ndarray:
    """What the page shows: a row a network, a column a class."""
    rows = page.locator("[data-part=predictions] tbody tr").all()
    cells = [[float(cell.get_attribute("data-share")) for cell in row.locator("td").all()] for row in rows]
    return np.array(cells).T


def after(page: Page, act: Callable[[], None]) -> np.ndarray:
    """The probabilities after an action that has the page classify."""
    page.evaluate("document.querySelector('[data-part=predictions]').replaceChildren()")
    act()
    page.wait_for_selector("[data-share]")
    return shown_probabilities(page)


def test_the_browser_classifies_every_example_as_python_does(loaded: Page, assets: dict) -> None:
    fp32 = [network["precision"] == "fp32" for network in assets["networks"]]
    for place in range(len(assets["examples"]) - 1, -1, -1):
        shown = after(loaded, loaded.locator(f"input[value='{place}']").check)
        expected = np.array([network["probabilities"][place] for network in assets["networks"]])
        np.testing.assert_array_equal(shown[fp32].argmax(1), expected[fp32].argmax(1))
        np.testing.assert_allclose(shown, expected, atol=0.1)
        differences = np.array(loaded.locator("[data-difference]").all_text_contents())
        assert set(differences[fp32]) == {"0.0000"}


def test_a_picture_of_ones_own_is_cropped_shrunk_and_classified(loaded: Page, assets: dict, tmp_path: Path) -> None:
    """An example, enlarged 16 times between two bars, comes back to nearly itself."""
    test = cifar10.load_sample("test")
    place = test.indices.tolist().index(assets["examples"][3]["index"])
    large = Image.fromarray(test.pixels[place].permute(1, 2, 0).numpy()).resize((512, 512), Image.Resampling.NEAREST)
    wide = Image.new("RGB", (1024, 512), "red")
    wide.paste(large, (256, 0))
    wide.save(tmp_path / "own.png")
    shown = after(loaded, lambda: loaded.set_input_files("input[type=file]", tmp_path / "own.png"))
    np.testing.assert_allclose(shown[0], assets["networks"][0]["probabilities"][3], atol=0.02)
    assert loaded.locator("[data-part=map]").is_hidden()
    (tmp_path / "own.txt").write_text("no picture")
    loaded.set_input_files("input[type=file]", tmp_path / "own.txt")
    sync_api.expect(loaded.locator("[data-part=status]")).to_contain_text("own.txt could not be read as a picture")


@pytest.mark.parametrize("side", [512, 3000])
def test_a_large_picture_is_averaged_and_its_finest_stripes_are_not_aliased(
    loaded: Page, tmp_path: Path, side: int
) -> None:
    """A slow wave under stripes of one pixel: what comes out is the wave, as Pillow's box filter gives it."""
    place = np.arange(side)
    wave = 110 + 50 * np.sin(2 * np.pi * place / side)[:, None] * np.cos(2 * np.pi * place / side)
    striped = wave + 60 * (-1.0) ** place
    large = Image.fromarray(np.repeat(striped[..., None], 3, axis=2).round().astype(np.uint8))
    large.save(tmp_path / "wave.png")
    after(loaded, lambda: loaded.set_input_files("input[type=file]", tmp_path / "wave.png"))
    expected = np.asarray(large.resize((32, 32), Image.Resampling.BOX), dtype=float)
    np.testing.assert_allclose(shown_pixels(loaded), expected, atol=4)


def shown_pixels(page: Page) -> np.ndarray:
    """The picture that the networks see, (32, 32, 3), 0 to 255."""
    context = "document.querySelector('canvas[data-part=picture]').getContext('2d')"
    return np.reshape(page.evaluate(f"[...{context}.getImageData(0, 0, 32, 32).data]"), (32, 32, 4))[..., :3]


def test_the_picture_chosen_last_is_the_one_that_stays(address: str, chromium: Opener, assets: dict) -> None:
    with chromium() as page:
        held = []
        page.route("**/map_01.png", lambda route: held.append(route))
        page.goto(address)
        page.locator("input[value='1']").check()
        page.locator("input[value='2']").check()
        caption = page.locator("[data-part=picture-caption]")
        sync_api.expect(caption).to_contain_text(f"test image {assets['examples'][2]['index']},")
        held[0].continue_()
        page.wait_for_load_state("networkidle")
        sync_api.expect(caption).to_contain_text(f"test image {assets['examples'][2]['index']},")


def test_the_networks_load_before_a_picture_is_there(address: str, chromium: Opener) -> None:
    with chromium() as page:
        held = []
        page.route("**/map_00.png", lambda route: held.append(route))
        page.goto(address)
        page.get_by_role("button", name="Load the networks").click()
        sync_api.expect(page.get_by_role("button", name="Measure")).to_be_visible(timeout=30_000)
        assert not page.locator("[data-part=failures]").text_content()
        held[0].continue_()
        page.wait_for_selector("tfoot")


def test_what_was_wrong_with_one_picture_is_gone_with_the_next(address: str, chromium: Opener, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("no picture")
    with chromium() as page:
        page.goto(address)
        page.set_input_files("input[type=file]", tmp_path / "own.txt")
        said = page.locator("[data-part=status]")
        sync_api.expect(said).to_contain_text("own.txt could not be read as a picture")
        page.locator("input[value='2']").check()
        sync_api.expect(said).to_be_empty()


def test_after_an_error_of_the_runtime_the_page_says_so_and_goes_on(address: str, chromium: Opener) -> None:
    with chromium() as page:
        page.goto(address)
        page.get_by_role("button", name="Load the networks").click()
        page.wait_for_selector("tfoot")
        page.evaluate(f"({BREAK})('{address.replace('book/try_it.html', '_static/try_it/ort.wasm.min.mjs')}')")
        page.get_by_role("button", name="Measure").click()
        sync_api.expect(page.locator("[data-part=status]")).to_contain_text("The networks stopped: out of memory")
        sync_api.expect(page.get_by_role("button", name="Measure")).to_be_enabled()
        page.evaluate("mend()")
        after(page, page.locator("input[value='1']").check)


# The next calls of all networks fail, until mend() is called.
BREAK = """async (address) => {
  const { prototype } = (await import(address)).InferenceSession;
  const { run } = prototype;
  prototype.run = async () => { throw new Error("out of memory"); };
  window.mend = () => { prototype.run = run; };
}"""


def test_an_example_replaces_the_picture_of_ones_own(loaded: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "own.png")
    after(loaded, lambda: loaded.set_input_files("input[type=file]", tmp_path / "own.png"))
    after(loaded, loaded.locator("input[value='1']").check)
    assert loaded.locator("input[type=file]").input_value() == ""


def test_the_latency_of_every_network_is_measured_here(loaded: Page, assets: dict) -> None:
    loaded.get_by_role("button", name="Measure").click()
    loaded.wait_for_selector("[data-p50]", timeout=60_000)
    medians = [float(cell.get_attribute("data-p50")) for cell in loaded.locator("[data-p50]").all()]
    assert len(medians) == len(assets["networks"])
    assert all(0.05 < median < 10_000 for median in medians)
    assert medians[2] < medians[0], "two thirds of the work take less time in the same runtime"
    with loaded.expect_download() as download:
        loaded.get_by_role("link", name="Save these figures").click()
    rows = json.loads(download.value.path().read_text())
    np.testing.assert_allclose([row["p50_ms"] for row in rows], medians)
    assert all(row["p50_ms"] <= row["p95_ms"] for row in rows)
    known = {"model", "runtime", "precision", "batch", "threads", "accuracy", "bytes", "machine", "day", "note"}
    assert all(known <= set(row) <= set(records.COLUMNS) for row in rows)
    assert all(row["status"] == "ok" and "Mozilla" in row["machine"] for row in rows)


def test_the_keyboard_alone_is_enough(address: str, chromium: Opener) -> None:
    with chromium() as page:
        page.goto(address)
        page.locator("input[value='0']").focus()
        page.keyboard.press("ArrowRight")
        sync_api.expect(page.locator("input[value='1']")).to_be_checked()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.type") == "file"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-share]")
        sync_api.expect(page.get_by_role("button", name="Measure")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(loaded: Page, scheme: str) -> None:
    """WCAG 2.2, success criterion 1.4.3: a contrast of at least 4.5."""
    loaded.emulate_media(color_scheme=scheme)
    sync_api.expect(loaded.locator("html")).to_have_attribute("data-theme", scheme)
    grounds = "[...document.querySelectorAll('#kdig-try :is(button, th, td, legend, label, caption, figcaption, p)')]"
    colours = loaded.evaluate(f"{grounds}.filter(e => e.checkVisibility()).map({COLOURS})")
    assert len(colours) > 50
    assert min(contrast(*pair) for pair in colours) >= 4.5


# Text colour and the nearest ground that is not transparent.
COLOURS = """element => {
  const colour = getComputedStyle(element).color;
  let ground = element;
  while (/, 0\\)$/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
  return [colour, getComputedStyle(ground).backgroundColor];
}"""


def contrast(text: str, ground: str) -> float:
    dark, bright = sorted(map(luminance, (text, ground)))
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour, as WCAG defines it."""
    channels = np.array([float(value) for value in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_a_phone_shows_all_without_scrolling_sideways(address: str, chromium: Opener) -> None:
    with chromium(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True) as page:
        page.goto(address)
        page.get_by_role("button", name="Load the networks").tap()
        page.wait_for_selector("tfoot")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        hidden = "[...document.querySelectorAll('.kdig-try-scroll')].map(box => box.scrollWidth - box.clientWidth)"
        assert max(page.evaluate(hidden)) <= 0


def test_a_network_that_does_not_run_is_named_and_the_others_appear(address: str, chromium: Opener) -> None:
    with chromium() as page:
        page.route("**/student_int8.onnx", lambda route: route.fulfill(body=b"no network"))
        page.goto(address)
        page.get_by_role("button", name="Load the networks").click()
        page.wait_for_selector("tfoot")
        sync_api.expect(page.locator("[data-part=failures]")).to_contain_text("student int8 does not run")
        assert page.locator("[data-part=predictions] thead th").count() == 1 + 3


def test_without_webassembly_there_is_a_sentence(address: str, chromium: Opener) -> None:
    """V8 without its compilers has no WebAssembly; Chromium's own flag for that, noexpose_wasm, has no effect today."""
    with chromium("--js-flags=--jitless") as page:
        page.goto(address)
        sync_api.expect(page.locator("#kdig-try")).to_contain_text("This browser has no WebAssembly")
        assert page.locator("#kdig-try button").count() == 0


def test_a_page_opened_from_a_file_says_how_to_serve_it(site: Path, tmp_path: Path, chromium: Opener) -> None:
    script = (site / "try_it.js").as_uri()
    (tmp_path / "try_it.html").write_text(f'<div id="kdig-try"></div><script defer src="{script}"></script>')
    with chromium() as page:
        page.goto((tmp_path / "try_it.html").as_uri())
        sync_api.expect(page.locator("#kdig-try")).to_contain_text("python -m http.server")


def test_a_book_built_without_the_networks_says_so(site: Path, tmp_path: Path, chromium: Opener) -> None:
    shutil.copyfile(site / "try_it.js", tmp_path / "try_it.js")
    (tmp_path / "assets.json").write_text(json.dumps({"missing": "npm was not found"}))
    html = '<link rel="icon" href="data:,"><div id="kdig-try"></div><script defer src="try_it.js"></script>'
    (tmp_path / "index.html").write_text(html)
    with served(tmp_path) as host, chromium() as page:
        page.goto(host)
        sync_api.expect(page.locator("#kdig-try")).to_contain_text(
            "not put into this copy of the book: npm was not found."
        )
