"""Figures that a reader can turn: one of the scripts in `book/widgets`, its data, and a still picture that stands in.

The script runs on the page itself, in Colab and on a phone; it loads nothing, and no server answers it.
"""

import base64
import json
from collections.abc import Iterable
from html import escape
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import HTML, display
from matplotlib.figure import Figure
from torch import Tensor

from kdig_utils import paths
from kdig_utils.book import figures

PAGE = """<figure class="kdig-widget" id="kdig-{name}" role="group" aria-label="{label}">
<img src="data:image/png;base64,{still}" alt="{alt}"></figure>
<style>{style}</style>
<script>(() => {{
document.getElementById("kdig-{name}").replaceChildren(...({script})({data}, {kit}));
}})();</script>"""


def show(
    name: str, data: dict[str, Any], still: Figure, label: str, alt: str, caption: str, kind: str | Iterable[str]
) -> None:
    """Show the interactive figure `book/widgets/NAME.js`, and its caption below.

    Args:
        data: what its script gets, as JSON; pixels and maps as `packed` gives them.
        still: the picture that is shown where no script runs.
        label: what one can do with the figure, for a screen reader.
        alt: what the still picture shows.
        caption: what it rests on, as for `figures.show`.
        kind: its kind of evidence, or kinds.

    Raises:
        FileNotFoundError: there is no such script.
        ValueError: as `figures.show`.
    """
    folder = paths.repository_root() / "book" / "widgets"
    script, kit, style = ((folder / file).read_text(encoding="utf-8") for file in (f"{name}.js", "kit.js", "kit.css"))
    page = PAGE.format(
        name=name, label=escape(label), alt=escape(alt), still=base64.b64encode(figures.png(still)).decode(),
        style=style, script=script, kit=kit, data=json.dumps(data).replace("<", "\\u003c"),
    )  # fmt: skip
    plt.close(still)
    display(HTML(page), figures.caption_of(alt, caption, kind))


def packed(values: Tensor) -> str:
    """Numbers in [0, 1] as bytes 0 to 255 in base 64: a map (H, W), or an image (3, H, W) as colours pixel by pixel."""
    pixels = values.permute(1, 2, 0) if values.ndim == 3 else values
    return base64.b64encode(pixels.clamp(0, 1).mul(255).round().byte().cpu().numpy().tobytes()).decode()
