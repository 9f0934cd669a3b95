"""Checks image files before a run, by their headers and ends, and caches which are readable.

The cache has the name, size and modification time of every readable image, so that the next run
opens only new and changed ones.
"""

import hashlib
import math
import os
import pkgutil
import re
import struct
import warnings

import numpy as np
import PIL
from PIL import Image

from keras_mixer.data.cache import load_cached, save_cached
from keras_mixer.data.image_listing import MISSING, position_of
from keras_mixer.log import track

MOST_PIXELS = 89_478_485  # Pillow's limit against decompression bombs
MOST_BYTES = 5 * MOST_PIXELS  # more than any format needs for them; files are read whole
MOST_SIDE = 65_535  # the limit of JPEG and GIF
_MOST_SCANS = 100  # of a progressive JPEG, each of which is decoded; encoders write about 10
_MOST_READS = 500_000  # about a second; a large GIF needs a tenth

_TAIL = 64  # bytes in which the end of a file is looked for first


def check_image_file(path):
    """Checks an image file for errors in its header and for truncation, without decoding it.

    It must be a JPEG, PNG, BMP, WebP or GIF that `decode_image` supports, of at most `MOST_PIXELS`.
    Damage between header and end shows only when the image is decoded.

    Args:
        path: string or bytes. The suffix does not matter.

    Returns:
        None for a readable file, else a reason such as `"truncated"`.
    """
    if not os.path.isfile(path):  # a pipe or a device is never opened: it could hang
        return "not a regular file"
    try:
        with open(path, "rb") as file:
            return check_image(file)
    except OSError as error:
        return error.strerror or "damaged header"


def check_image(file):
    """Checks an image in an open binary file, as `check_image_file` does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            return _problem(file)
    except Image.DecompressionBombError:
        return f"more than {MOST_PIXELS} pixels"
    except OSError as error:
        return error.strerror or "damaged header"
    except Exception as error:  # Pillow's parsers raise many types on malformed files
        return f"damaged header ({error})"


class _LimitedReads:
    """A file with a limit on the number of reads: a hostile header has millions of parts."""

    def __init__(self, file):
        self._file = file
        self._left = _MOST_READS

    def read(self, *size):
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {_MOST_READS:,} parts")
        return self._file.read(*size)

    def __getattr__(self, name):
        return getattr(self._file, name)


def _problem(file):
    file = _LimitedReads(file)
    size = file.seek(0, os.SEEK_END)
    head = _read_at(file, 0, 32)
    if not head:
        return "empty file"
    if size > MOST_BYTES:
        return f"{size:,} bytes, expected at most {MOST_BYTES:,}"
    kind = _kind_of(head)
    if kind is None:
        return "not a JPEG, PNG, BMP, WebP or GIF image"
    if kind == "WEBP":  # Pillow would read the whole file
        return _webp_problem(head, size)
    file.seek(0)
    with Image.open(file, formats=(kind,)) as image:
        return _size_problem(*image.size) or _PROBLEMS[kind](file, size, image)


def starts_like_image(content):
    """Returns whether bytes start like an image of a supported format, and not like text.

    A text can start with "BM", too, such as BMW.jpg. In a BMP, the size of the header follows at
    byte 14, a small number of four bytes, so that its last three are 0.
    """
    kind = _kind_of(content[:32])
    return kind is not None and (kind != "BMP" or content[15:18] == bytes(3))


def _kind_of(head):
    return next((kind for kind, magic in _MAGIC.items() if re.match(magic, head, re.DOTALL)), None)


def _size_problem(width, height):
    if width * height > MOST_PIXELS:
        return f"{width}x{height} is more than {MOST_PIXELS} pixels"
    if max(width, height) > MOST_SIDE:
        return f"{width}x{height} has a side of more than {MOST_SIDE} pixels"
    return None


_MAGIC = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "WEBP": rb"RIFF....WEBP",
}


def _read_at(file, offset, count):
    file.seek(max(0, offset))
    return file.read(count)


# === Formats ===

_END_OF_JPEG = b"\xff\xd9"
_SCAN = 0xDA
_START_OF_SCAN = b"\xff\xda"
_PROGRESSIVE = {0xC2, 0xCA}
_DECODED_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # the others are lossless or hierarchical


def _jpeg_problem(file, size, image):
    segments = dict(_jpeg_segments(file))
    if _SCAN not in segments:
        return "truncated"
    if not segments.keys() & _DECODED_FRAMES:
        return "a lossless or hierarchical JPEG: save it as PNG"
    if not _has_end(file, segments[_SCAN], size, _END_OF_JPEG):
        return "truncated"
    if _has_several_scans(file, segments, image):
        return _scans_problem(file, segments[_SCAN])
    return None


def _has_several_scans(file, segments, image):
    """Returns whether a JPEG is progressive, or its first scan lacks some of the colors."""
    return (
        segments.keys() & _PROGRESSIVE or _read_at(file, segments[_SCAN] + 4, 1)[0] < image.layers
    )


def _scans_problem(file, start):
    """Counts the scans, up to the end mark; in their data, FF is followed by 0."""
    file.seek(start)
    scans = file.read().partition(_END_OF_JPEG)[0].count(_START_OF_SCAN)
    if scans > _MOST_SCANS:
        return f"a JPEG of {scans} scans, expected at most {_MOST_SCANS}: save it anew"
    return None


def _has_end(file, start, size, mark):
    """Returns whether the end mark of an image is in a file, from `start` on.

    It is in the last bytes or, since cameras append videos, anywhere before.
    """
    if mark in _read_at(file, max(start, size - _TAIL), _TAIL):
        return True
    file.seek(start)
    last = b""
    while piece := file.read(1 << 20):
        if mark in last[-len(mark) :] + piece:
            return True
        last = piece
    return False


def _jpeg_segments(file):
    """Yields (marker, offset) of the segments (FF, marker, length in 2 bytes, data) to the scan."""
    offset, marker = 2, None
    while marker != _SCAN and len(head := _read_at(file, offset, 4)) == 4:
        marker, length = struct.unpack(">xBH", head)
        yield marker, offset
        offset += 1 if marker == 0xFF else 2 + length  # FF may be repeated


_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"


def _png_problem(file, size, image):
    return None if _has_end(file, 0, size, _END_OF_PNG) else "truncated"


def _gif_problem(file, size, image):
    if image.tile[0][1] != (0, 0, *image.size):
        return "a GIF whose first frame does not fill it: save that frame as PNG"
    tail = _read_at(file, size - _TAIL, _TAIL)
    if not tail.rstrip(b"\0").endswith(b";"):
        return "truncated"
    canvas, frames = math.prod(image.size), list(_gif_frames(file))
    if len(frames) > 1 and sum(max(canvas, frame) for frame in frames) > MOST_PIXELS:
        return f"a GIF of {len(frames)} frames, together too large: save its first one as PNG"
    return None


def _gif_frames(file):
    """Yields the number of pixels of every frame of a GIF, all of which are decoded.

    A block is "!", a label and data, or "," with a size in 4 of 8 bytes, colors and data.
    """
    flags = _read_at(file, 10, 3)[0]
    file.seek(13 + _size_of_colors(flags))
    while (kind := file.read(1)) in (b"!", b","):
        if kind == b",":
            *_, width, height, flags = struct.unpack("<4HB", file.read(9))
            yield width * height
            file.seek(_size_of_colors(flags), os.SEEK_CUR)
        file.seek(1, os.SEEK_CUR)
        while (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], os.SEEK_CUR)


def _size_of_colors(flags):
    return 3 << (1 + flags % 8) if flags & 128 else 0


_CODINGS = {  # (bits per pixel, compression) -> Pillow's names for the order of the channels
    (8, 0): ("P", "L", "1"),
    (24, 0): ("BGR",),
    (32, 0): ("BGRX", "BGRA"),
    (32, 3): ("BGRX", "BGRA"),
}


def _bmp_problem(file, size, image):
    pixels, header_size = struct.unpack("<II", _read_at(file, 10, 8))
    bits, compression = struct.unpack("<HI", _read_at(file, 28, 6))
    if header_size < 40 or image.tile[0][3][0] not in _CODINGS.get((bits, compression), ()):
        return "a BMP other than of plain 8, 24 or 32 bits per pixel: save it as PNG"
    width, height = image.size
    line = (width * bits + 31) // 32 * 4  # in bytes
    return "truncated" if size < pixels + line * height else None


def _webp_problem(head, size):
    """Checks a WebP file; RFC 9649, sections 2.5 to 2.7, has the layouts of its three kinds."""
    riff_size, kind = struct.unpack_from("<4xI4x4s", head)
    flags = head[20]
    if size < riff_size + 8:
        return "truncated"
    if kind == b"VP8X" and flags & 2:
        return "an animated WebP: save its first frame as PNG"
    if kind not in _WEBP_SIZES:
        return "damaged header"
    return _size_problem(*_WEBP_SIZES[kind](head))


def _bits(data, first, count):
    return (int.from_bytes(data, "little") >> first) % 2**count


_WEBP_SIZES = {
    b"VP8 ": lambda head: (_bits(head[26:28], 0, 14), _bits(head[28:30], 0, 14)),
    b"VP8L": lambda head: (1 + _bits(head[21:25], 0, 14), 1 + _bits(head[21:25], 14, 14)),
    b"VP8X": lambda head: (1 + _bits(head[24:27], 0, 24), 1 + _bits(head[27:30], 0, 24)),
}

_PROBLEMS = {"JPEG": _jpeg_problem, "PNG": _png_problem, "GIF": _gif_problem, "BMP": _bmp_problem}


# === Folders of images ===


def find_unreadable(listing, check=None, checks="headers", version=b""):
    """Checks the images that did not pass the same checks before.

    Args:
        listing: `Listing` of the files.
        check: Function of an array of paths, as bytes, that yields a reason or None for each; by
            default, `check_image_file` of each.
        checks: Name of the checks; each has its own cache.
        version: Bytes that change with what else the checks depend on.

    Returns:
        list of (index, reason) of the files that do not pass.
    """
    check = check or (lambda paths: map(check_image_file, paths))
    cache = _cache_name(listing.directory, checks.encode() + version)
    readable = _find_unchanged(listing, load_cached(cache, _CACHED))
    unknown, problems = np.flatnonzero(~readable), []
    results = check(listing.take(unknown).paths())
    try:
        for index in track(unknown, f"checking images ({checks})"):
            problem = next(results)
            readable[index] = problem is None
            if problem:
                problems.append((int(index), problem))
    finally:  # also if interrupted
        if len(unknown):
            passed = listing.take(readable)
            passed = passed.take(np.argsort(passed.names))
            arrays = {name: getattr(passed, name) for name in _CACHED}
            save_cached(cache, arrays, "which images are readable")
    return problems


_CACHED = {"names": "S", "sizes": "i", "mtimes": "i"}


def _cache_name(directory, checks):
    """Returns a path that depends on the folder, the checks, this file and Pillow's version.

    So all images are checked again when the checks have changed.
    """
    source = pkgutil.get_data("keras_mixer.data", "image_checks.py") + PIL.__version__.encode()
    digest = hashlib.sha256(os.path.abspath(directory) + source + checks)
    return f"readable_images/{digest.hexdigest()[:32]}.npz"


def _find_unchanged(listing, cached):
    """Returns a bool array `(n,)`: whether each file is cached with its size and mtime."""
    unchanged = np.zeros(len(listing), bool)
    if cached:
        index = position_of(listing.names, cached["names"])
        known = np.flatnonzero(index != MISSING)
        same = [
            cached[key][index[known]] == getattr(listing, key)[known] for key in ("sizes", "mtimes")
        ]
        unchanged[known] = np.logical_and(*same)
    return unchanged
