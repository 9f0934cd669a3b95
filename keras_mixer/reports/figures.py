"""Figures of the HTML report: inline SVG by matplotlib, and pictures as PNG in data URIs.

An SVG has no colors and fonts of its own, but the page's, and so its light or dark scheme.
"""

import base64
import functools
import io
import re
import warnings
from xml.etree import ElementTree

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from keras_mixer.reports.curves import COLORS, line_style

# Colors that matplotlib draws with, by what the page has for them.
_INK, _LINE, _ACCENT = "#f0f2f0", "#f0f2f1", "#f0f2f2"
_SERIES = [f"#f0f1{number:02x}" for number in range(COLORS)]
_CSS = {_INK: "currentColor", _LINE: "var(--line)", _ACCENT: "var(--accent)"}
_CSS |= {color: f"var(--series-{number})" for number, color in enumerate(_SERIES)}

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $x$
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.edgecolor": _LINE,
}


def _drawn(draw):
    """Decorator: of a function that draws on a `Figure`, makes one that returns SVG as text.

    It takes a name, unique in the page, and a description of the figure before other arguments.
    """

    @functools.wraps(draw)
    def drawn(name, description, *arguments):
        # The default style first: a user's would give other figures.
        with style.context(["default", _STYLE | {"svg.hashsalt": name}]), warnings.catch_warnings():
            # The browser has a glyph where the font that matplotlib measures with has none.
            warnings.filterwarnings("ignore", message="Glyph")
            figure = Figure(layout="constrained")
            draw(figure, *arguments)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
        return _inline(text.getvalue(), name, description)

    return drawn


# === SVG of the page ===

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)
_OURS = re.compile("|".join(_CSS))


def _inline(text, name, description):
    """Returns a file of matplotlib's as an element for HTML, with ids that begin with a name."""
    root = ElementTree.fromstring(text)
    for tag in ("metadata", "defs"):
        for element in root.findall(f"{{{_SVG}}}{tag}"):
            if tag == "metadata" or element.find(f"{{{_SVG}}}style") is not None:
                root.remove(element)  # that style would hold for the whole page
    for element in root.iter():
        for attribute, value in element.items():
            element.set(attribute, _adapted(attribute, value, name))
    for side in ("width", "height"):
        del root.attrib[side]
    width = float(root.get("viewBox").split()[2])
    root.attrib |= {"role": "img", "aria-label": description, "style": f"max-width: {width:g}pt"}
    return ElementTree.tostring(root, encoding="unicode")


def _adapted(attribute, value, name):
    """Returns the value of an attribute with the page's ids, colors and fonts."""
    if attribute == "id":
        return f"{name}-{value}"
    if attribute == f"{{{_XLINK}}}href":
        return re.sub("^#", f"#{name}-", value)
    value = value.replace("url(#", f"url(#{name}-")
    value = _OURS.sub(lambda match: _CSS[match[0]], value)
    # Earlier versions of matplotlib write size and family as one property.
    value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
    return re.sub(r"font-family: [^;]*; ?", "", value)


# === Figures ===


@_drawn
def draw_lines(figure, lines):
    """Draws a list of `curves.Line`, each with a band from the lowest to the highest run."""
    figure.set_size_inches(4.4, 2.6)
    axes = figure.subplots()
    for line in lines:
        index, dashes = line_style(line.number)
        look = {"color": _SERIES[index], "marker": "o" if len(line.epochs) == 1 else ""}
        axes.plot(line.epochs, line.mean, linestyle=(0, dashes) if dashes else "-", **look)
        if line.low != line.high:
            axes.fill_between(
                line.epochs, line.low, line.high, color=_SERIES[index], alpha=0.18, linewidth=0
            )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


MOST_NUMBERS = 20  # classes of a confusion matrix whose cells have their numbers
MOST_NAMES = 60  # and whose axes have the names
_LONGEST_NAME = 18


@_drawn
def draw_confusion(figure, confusion, names):
    """Draws a confusion matrix; cells are colored by their share of the images of the true class.

    Args:
        figure: `Figure`.
        confusion: Rows of ints: true classes; columns: predicted classes.
        names: Name of each class.
    """
    counts = np.array(confusion)
    figure.set_size_inches(*[min(2.4 + 0.36 * len(names), 8.5)] * 2)
    axes = figure.subplots()
    axes.imshow(_cells(counts), interpolation="none")
    axes.grid(visible=False)
    axes.set(xlabel="predicted", ylabel="true")
    labels = [_shortened(name) for name in names] if len(names) <= MOST_NAMES else []
    axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(labels)), labels)
    if len(names) <= MOST_NUMBERS:
        for row, column in np.argwhere(counts):
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8)


def _cells(counts):
    """Returns the colors of cells, uint8 `(rows, columns, 4)`; transparent ones suit any scheme."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The root, so that a few mistakes can be seen; not opaque, so that numbers can be read.
    alpha = np.round(0.62 * 255 * np.sqrt(shares)).astype(np.uint8)
    color = np.broadcast_to(np.array([47, 127, 209], np.uint8), (*counts.shape, 3))
    return np.concatenate([color, alpha[..., None]], axis=2)


def _shortened(name):
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


@_drawn
def draw_reliability(figure, bins):
    """Draws accuracy by confidence, and below it the number of images.

    Args:
        figure: `Figure`.
        bins: list of (confidence, accuracy, count), see `calibration.reliability_bins`.
    """
    figure.set_size_inches(4.4, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width, filled = 1 / len(bins), [(i, *values) for i, values in enumerate(bins) if values[2]]
    middles = [(i + 0.5) * width for i, *_ in filled]
    bars = {"width": 0.9 * width, "color": _ACCENT, "alpha": 0.45}
    upper.bar(middles, [accuracy for _, _, accuracy, _ in filled], **bars)
    upper.plot([0, 1], [0, 1], color=_INK, linestyle=(0, (3, 3)), linewidth=1)
    points = [(confidence, accuracy) for _, confidence, accuracy, _ in filled]
    upper.plot(*zip(*points, strict=True), "o", color=_ACCENT, markersize=4)
    lower.bar(middles, [count for *_, count in filled], **bars)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    lower.set(xlabel="confidence", ylabel="images")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.tick_params(axis="x", pad=7)


# === Pictures ===


def picture(image, description, smallest=0):
    """Returns a picture for the page: a dict of `uri`, `width`, `height`, `alt` and `sharp`.

    Args:
        image: `PIL.Image.Image`.
        description: Text for those who do not see it.
        smallest: int. Width in pixels to which smaller images are enlarged, by a whole factor.
    """
    content = io.BytesIO()
    image.save(content, "PNG")
    factor = max(1, -(-smallest // image.width))
    return {
        "uri": f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}",
        "width": factor * image.width,
        "height": factor * image.height,
        "alt": description,
        "sharp": factor > 1,
    }


def vector_picture(svg, description):
    """Returns an SVG file as a picture, which can neither run scripts nor load what it links to.

    Args:
        svg: bytes, by matplotlib, with a width and a height in points.
        description: Text for those who do not see it.
    """
    root = ElementTree.fromstring(svg)
    width, height = (
        round(float(root.get(side).removesuffix("pt"))) for side in ("width", "height")
    )
    uri = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return {"uri": uri, "width": width, "height": height, "alt": description, "sharp": False}


_TILE = 28  # pixels of width to which smaller tiles are enlarged
_WIDEST = 960  # pixels of a mosaic
_GAP = (128, 128, 128, 110)  # color between tiles, seen on light and dark


def mosaic(tiles, description):
    """Returns a picture of tiles in rows of an even number, so that pairs stay together.

    Args:
        tiles: float array `(n, height, width, 3)`, from 0 to 1.
        description: Text for those who do not see it.
    """
    count, height, width, _ = tiles.shape
    factor = max(1, _TILE // width)
    columns = min(int(np.sqrt(2 * count)) + 1, _WIDEST // (factor * (width + 1)))
    columns = max(2, columns // 2 * 2)
    rows = -(-count // columns)
    pixels = np.zeros((rows * columns, height + 1, width + 1, 4), np.uint8)
    pixels[:count] = _GAP  # a row and a column after each tile
    pixels[:count, :height, :width, :3] = np.round(255 * tiles)
    pixels[:count, :height, :width, 3] = 255
    pixels = pixels.reshape(rows, columns, height + 1, width + 1, 4).swapaxes(1, 2)
    image = Image.fromarray(pixels.reshape(rows * (height + 1), columns * (width + 1), 4))
    return picture(image, description, factor * image.width) | {"sharp": True}


def stem_tiles(kernel):
    """Returns the kernels of a stem as colors, each normalized to its own range.

    Args:
        kernel: array `(height, width, channels, dim)`.

    Returns:
        float array `(dim, height, width, 3)`, from 0 to 1.
    """
    kernels = np.moveaxis(kernel, -1, 0).astype(np.float64)
    kernels = kernels if kernels.shape[-1] == 3 else kernels.mean(axis=-1, keepdims=True)
    low, high = (choose(kernels, axis=(1, 2, 3), keepdims=True) for choose in (np.min, np.max))
    scaled = (kernels - low) / np.where(high > low, high - low, 1)
    return np.broadcast_to(scaled, (*scaled.shape[:3], 3))


_NEGATIVE, _POSITIVE = np.array([33, 102, 172]) / 255, np.array([178, 24, 43]) / 255


def weight_tiles(kernels):
    """Returns kernels as colors: blue for negative weights, white for 0, red for positive ones.

    Args:
        kernels: array `(n, rows, columns)`; each is scaled by its largest weight.

    Returns:
        float array `(n, rows, columns, 3)`, from 0 to 1.
    """
    largest = np.abs(kernels).max(axis=(1, 2), keepdims=True)
    scaled = (kernels / np.where(largest > 0, largest, 1))[..., None]
    return 1 - np.abs(scaled) * (1 - np.where(scaled < 0, _NEGATIVE, _POSITIVE))
