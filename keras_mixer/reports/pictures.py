"""Pictures of the page: SVG elements by matplotlib, and PNG images in data URIs.

An SVG element has the fonts and colors of the page, and so its light or dark scheme.
"""

import base64
import io
import re
import warnings
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import cycler, style
from matplotlib.figure import Figure
from PIL import Image

from keras_mixer.log import one_line
from keras_mixer.reports.curves import COLORS

# Colors that matplotlib draws with, and what the page replaces them by.
INK, LINE, ACCENT = "#f0f2f0", "#f0f2f1", "#f0f2f2"
_SERIES = [f"#f0f1{number:02x}" for number in range(COLORS)]
_CSS = {INK: "currentColor", LINE: "var(--line)", ACCENT: "var(--accent)"}
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
    "axes.prop_cycle": cycler(color=_SERIES),
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
}

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


def svg(name, description, plot, *arguments):
    """Returns what a function plots as an SVG element for the page.

    Args:
        name: Prefix of its ids, unique in the page.
        description: Text for screen readers.
        plot: Function of a matplotlib `Figure` and of `arguments`.
    """
    # "default": without the user's matplotlibrc.
    with style.context(["default", _STYLE | {"svg.hashsalt": name}]), warnings.catch_warnings():
        # The browser has a glyph where the font that matplotlib measures with has none.
        warnings.filterwarnings("ignore", message="Glyph")
        figure, text = Figure(layout="constrained"), io.StringIO()
        plot(figure, *arguments)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=no_metadata)
    root = ElementTree.fromstring(text.getvalue())
    for element in root.iter():
        for attribute, value in element.items():
            element.set(attribute, _for_page(attribute, value, name))
    width = root.get("width")
    del root.attrib["width"], root.attrib["height"]
    root.attrib |= {"role": "img", "aria-label": description, "style": f"max-width: {width}"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _for_page(attribute, value, name):
    """Returns the value of an SVG attribute with ids of its own and the colors of the page."""
    if attribute == "id":
        return f"{name}-{value}"
    if attribute == f"{{{_XLINK}}}href":
        return value.replace("#", f"#{name}-")
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub("|".join(_CSS), lambda color: _CSS[color[0]], value)


_IMG = Markup('<img src="data:image/{};base64,{}" alt="{}"{}>')
_SIZE = Markup(' width="{}" height="{}" class="{}"')


def img(content, kind, description, size=""):
    """Returns an image file as an <img> element, in which an SVG can neither run nor load anything.

    Args:
        content: bytes of the file.
        kind: string: `png` or `svg+xml`.
        description: Text for screen readers.
        size: Attributes of the element, as `Markup`.
    """
    return _IMG.format(kind, base64.b64encode(content).decode(), one_line(description), size)


def png(image, description, smallest=0, sharp=False):
    """Returns a PIL image as an <img> element.

    Args:
        image: `PIL.Image.Image`.
        description: Text for screen readers.
        smallest: int. Width in pixels to which smaller images are enlarged, by a whole factor.
        sharp: bool. Shows the pixels as squares, as of an image that is enlarged.
    """
    content, factor = io.BytesIO(), max(1, -(-smallest // image.width))
    image.save(content, "PNG")
    kind = "sharp" if sharp or factor > 1 else "smooth"
    size = _SIZE.format(factor * image.width, factor * image.height, kind)
    return img(content.getvalue(), "png", description, size)


_TILE = 28  # pixels of width to which smaller tiles are enlarged
_WIDEST = 960  # pixels of a mosaic
_GAP = (128, 128, 128, 110)  # color between tiles, visible on light and dark


def mosaic(tiles, description):
    """Returns tiles as one picture, in rows of an even number, so that pairs stay together.

    Args:
        tiles: float array `(n, height, width, 3)`, from 0 to 1.
        description: Text for screen readers.
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
    return png(image, description, factor * image.width, sharp=True)
