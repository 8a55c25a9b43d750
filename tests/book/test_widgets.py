"""The figures that a reader can turn, as they are stored in the chapters: in Chromium, by keyboard, on a phone."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch import Tensor

from kdig_utils.method.integrated_gradients import quadrature
from kdig_utils.method.overlay import EpochDraws, overlay

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[tests]'")

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"width": 360, "height": 640}


def stored() -> dict[str, str]:
    """The HTML of each interactive figure, by the name of its chapter and its place there."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        pages = [output.get("data", {}).get("text/html", "") for cell in cells for output in cell.get("outputs", [])]
        found |= {f"{path.stem}-{i}": page for i, page in enumerate(p for p in pages if 'class="kdig-widget"' in p)}
    return found


STORED = stored()
each_figure = pytest.mark.parametrize("figure", STORED)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser: sync_api.Browser, figure: str, **settings) -> tuple[sync_api.Page, list[str]]:
    """A page with this figure alone, and a list of what goes wrong on it and of what it asks other hosts for."""
    page, wrong = browser.new_page(**settings), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    page.set_content(f'<!doctype html><meta name="viewport" content="width=device-width"><body>{STORED[figure]}')
    return page, wrong


def drawn(page: sync_api.Page) -> str:
    """What the figure shows and says, its pixels too, without the controls: those change by themselves."""
    pixels = "[...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())"
    rest = """() => {
        const copy = document.querySelector('figure').cloneNode(true);
        copy.querySelectorAll('.kdig-control, fieldset').forEach((control) => control.remove());
        return copy.innerHTML;
    }"""
    return page.evaluate(rest) + "".join(page.evaluate(pixels))


def test_a_chapter_has_interactive_figures() -> None:
    assert STORED


@each_figure
def test_each_control_is_named_and_moves_by_keyboard(figure: str, browser: sync_api.Browser) -> None:
    page, wrong = opened(browser, figure)
    controls = page.locator("figure input[type=range], figure input[type=radio]:checked, figure button")
    assert controls.count() > 0
    for control in controls.all():
        assert control.evaluate("node => node.labels?.[0]?.textContent || node.textContent").strip()
        before = drawn(page)
        at_end = control.evaluate("node => node.type === 'range' && node.value === node.max")
        key = (
            "Enter"
            if control.evaluate("node => node.tagName === 'BUTTON'")
            else "ArrowLeft"
            if at_end
            else "ArrowRight"
        )
        control.focus()
        control.press(key)
        assert drawn(page) != before
    assert page.locator("[role=status]").count() == 1
    assert wrong == []


@each_figure
def test_it_fits_a_phone(figure: str, browser: sync_api.Browser) -> None:
    page, _wrong = opened(browser, figure, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@each_figure
def test_a_described_picture_stands_in_where_no_script_runs(figure: str, browser: sync_api.Browser) -> None:
    page, _wrong = opened(browser, figure, java_script_enabled=False)
    still = page.locator("figure > img")
    assert still.is_visible()
    assert len(still.get_attribute("alt")) > 20


# What the page computes is what the package computes


def data_of(figure: str) -> dict:
    """What the script of a figure gets."""
    page = STORED[figure]
    return json.JSONDecoder().raw_decode(page, re.search(r"\}\s*\)\((?=\{)", page).end())[0]


def image_of(packed: str, channels: int) -> Tensor:
    """Packed bytes as (channels, 32, 32) in [0, 1]."""
    pixels = torch.from_numpy(np.frombuffer(base64.b64decode(packed), np.uint8).copy())
    return pixels.view(32, 32, channels).permute(2, 0, 1).float() / 255


def set_controls(page: sync_api.Page, sliders: list[float], radios: list[int]) -> None:
    """Give the sliders these values, and choose these options, in their order on the page."""
    for slider, value in zip(page.locator("input[type=range]").all(), sliders, strict=False):
        slider.evaluate("(node, value) => { node.value = value; node.dispatchEvent(new Event('input')) }", value)
    for fieldset, place in zip(page.locator("fieldset").all(), radios, strict=False):
        fieldset.locator("input").nth(place).check()


READ_PIXELS = """() => [...document.querySelectorAll('canvas')].map(
    (canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, 32, 32).data))"""


@pytest.mark.parametrize(
    ("probability", "power", "down", "right", "mirrored", "left_behind"),
    [(50, 1, 0, 0, 0, 0), (100, 2, -4, 3, 1, 0), (100, 1.5, 2, -1, 0, 1), (0, 1, 1, 1, 1, 0), (85, 1.25, 4, 4, 1, 1)],
)
def test_the_overlay_of_the_page_is_that_of_the_package(
    probability: int, power: float, down: int, right: int, mirrored: int, left_behind: int, browser: sync_api.Browser
) -> None:
    data, n = data_of("05_overlay-0")["images"], len(data_of("05_overlay-0")["images"])
    page, _wrong = opened(browser, "05_overlay-0")
    set_controls(page, [probability, power, down, right], [mirrored, left_behind])
    shown = torch.tensor(page.evaluate(READ_PIXELS), dtype=torch.float).view(n, 32, 32, 4)[..., :3].permute(0, 3, 1, 2)
    images, maps = (
        torch.stack([image_of(one["pixels"], 3) for one in data]),
        torch.stack([image_of(one["map"], 1)[0] for one in data]),
    )
    overlaid = torch.tensor([one["from"] <= probability for one in data])
    shifts, flips = torch.tensor([[4 - down, 4 - right]]).expand(n, 2), torch.full((n,), bool(mirrored))
    draws = EpochDraws(torch.arange(n), shifts, flips, overlaid, torch.full((n,), float(power)))
    wanted = overlay(images, maps, draws, "index-matched" if left_behind else "matched")
    assert (shown - 255 * wanted).abs().max() <= 0.51  # a pixel is a whole number


@pytest.mark.parametrize(("image", "doublings"), [(0, 0), (2, 1.3), (5, 4.5), (3, -2)])
def test_the_softened_answer_of_the_page_is_the_softmax(
    image: int, doublings: float, browser: sync_api.Browser
) -> None:
    page, _wrong = opened(browser, "02_distillation-0")
    set_controls(page, [doublings], [image])
    shown = [float(text.removesuffix(" %")) for text in page.locator(".kdig-value").all_inner_texts()]
    logits = torch.tensor(data_of("02_distillation-0")["images"][image]["logits"])
    wanted = (logits / 2**doublings).softmax(0)
    torch.testing.assert_close(torch.tensor(shown), 100 * wanted, atol=0.06, rtol=0)


@pytest.mark.parametrize(("rule", "doublings"), [(0, 0), (0, 3), (1, 2), (2, 4), (3, 3), (3, 5)])
def test_the_completeness_gap_of_the_page_is_that_of_the_packages_quadrature(
    rule: int, doublings: int, browser: sync_api.Browser
) -> None:
    data, steps = data_of("03_integrated_gradients-0"), 2**doublings
    page, _wrong = opened(browser, "03_integrated_gradients-0")
    set_controls(page, [16, doublings], [rule])
    name = ("riemann_left", "riemann_right", "riemann_middle", "gausslegendre")[rule]
    places, weights = quadrature(name, steps)
    if rule == 3:
        terms = data["gauss"][str(steps)]
        torch.testing.assert_close(weights.float(), torch.tensor([term["weight"] for term in terms]), atol=1e-3, rtol=0)
        slopes = torch.tensor([term["slope"] for term in terms])
    else:
        slopes = torch.tensor(data["slopes"])[(places * (len(data["slopes"]) - 1)).round().long()]
    rise = data["heights"][-1] - data["heights"][0]
    shown = re.search(r"gap is ([+−])([\d.]+)", page.inner_text(".kdig-status"))
    gap = float(shown[2]) * (1 if shown[1] == "+" else -1)
    assert gap == pytest.approx(float((weights * slopes).sum()) - rise, abs=0.02)
