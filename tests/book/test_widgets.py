"""The figures that a reader can turn, as they are stored in the chapters: in Chromium, by keyboard, on a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

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


def texts(page: sync_api.Page) -> str:
    """All that the figure says, and the pixels that it shows."""
    drawn = "[...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())"
    return page.inner_text("figure") + "".join(page.evaluate(drawn)) + page.inner_html("figure")


def test_a_chapter_has_interactive_figures() -> None:
    assert STORED


@each_figure
def test_each_control_is_named_and_moves_by_keyboard(figure: str, browser: sync_api.Browser) -> None:
    page, wrong = opened(browser, figure)
    controls = page.locator("figure input[type=range], figure input[type=radio]:checked, figure button")
    assert controls.count() > 0
    for control in controls.all():
        assert control.evaluate("node => node.labels?.[0]?.textContent || node.textContent").strip()
        before = texts(page)
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
        assert texts(page) != before
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
