"""Checks image files before a run, from their headers and ends, and caches which are readable.

Each folder of images has a file in the user's cache folder with the names, sizes and modification
times of readable images, so the next run opens only new and changed ones. It can be deleted.
"""

import hashlib
import io
import os
import pkgutil
import re
import struct
import warnings

import numpy as np
import PIL
from PIL import Image

from keras_mixer.data.image_listing import MISSING, Listing, position_of
from keras_mixer.errors import InputError, join_names
from keras_mixer.files import cache_folder, write_atomically
from keras_mixer.log import logger, track

MOST_PIXELS = 89_478_485  # Pillow's limit against decompression bombs
MOST_BYTES = 5 * MOST_PIXELS  # more than any format needs for them; files are read whole
_MOST_READS = 500_000  # by Pillow and here, which is about a second; a large GIF has a tenth

_TAIL = 64  # bytes in which the end of a file is looked for first


def check_image_file(path):
    """Checks an image file for errors in its header and for truncation, without decoding it.

    It must be a JPEG, PNG, BMP, WebP or GIF that `decode_image` supports, of at most `MOST_PIXELS`.
    What lies between header and end is read only if a JPEG or PNG has data appended, which is
    rare; damage there shows only when the image is decoded.

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


class _FewReads:
    """A file that can be read from so many times: a hostile header has millions of parts."""

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
    file = _FewReads(file)
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

    "BM" alone, the mark of a BMP, starts names, too: BMW.jpg. In a BMP, the size of the header that
    begins at byte 14 follows, a small number of four bytes, which has zeros.
    """
    kind = _kind_of(content[:32])
    return kind is not None and (kind != "BMP" or content[15:18] == bytes(3))


def _kind_of(head):
    return next((kind for kind, magic in _MAGIC.items() if re.match(magic, head, re.DOTALL)), None)


def _size_problem(width, height):
    if width * height > MOST_PIXELS:
        return f"{width}x{height} is more than {MOST_PIXELS} pixels"
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

_END_OF_IMAGE = b"\xff\xd9"
_SCAN = 0xDA
_DECODED_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # the others are lossless or hierarchical


def _jpeg_problem(file, size, image):
    segments = dict(_jpeg_segments(file))
    if _SCAN not in segments:
        return "truncated"
    if not segments.keys() & _DECODED_FRAMES:
        return "a lossless or hierarchical JPEG: save it as PNG"
    # The end marker is near the end or, since cameras append videos, anywhere after the header.
    scan = segments[_SCAN]
    if _END_OF_IMAGE in _read_at(file, max(scan, size - _TAIL), _TAIL):
        return None
    return None if _holds(file, scan, _END_OF_IMAGE) else "truncated"


def _holds(file, offset, mark):
    """Returns whether there is a mark anywhere from an offset on."""
    file.seek(offset)
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
    if _END_OF_PNG in _read_at(file, size - _TAIL, _TAIL):
        return None
    offset = 8  # data may be appended: look at the head of every chunk
    while len(chunk := _read_at(file, offset, 8)) == 8:
        length, name = struct.unpack(">I4s", chunk)
        if name == b"IEND":
            return None
        offset += 12 + length
    return "truncated"


def _gif_problem(file, size, image):
    if image.tile[0][1] != (0, 0, *image.size):
        return "a GIF whose first frame does not fill it: save that frame as PNG"
    tail = _read_at(file, size - _TAIL, _TAIL)
    if not tail.rstrip(b"\0").endswith(b";"):
        return "truncated"
    width, height = image.size
    most = max(1, MOST_PIXELS // (width * height))  # all are decoded, if only one is used
    if _gif_has_more_frames(file, most):
        return f"a GIF of more than {most} frames of {width}x{height}: save its first one as PNG"
    return None


def _gif_has_more_frames(file, most):
    """Returns whether a GIF has more images; GIF89a specification, sections 15 to 26."""
    offset, frames = 13 + _gif_colors(_read_at(file, 10, 1)), 0
    while frames <= most and (start := _read_at(file, offset, 10)):
        if start[0] == 0x2C and len(start) == 10:  # an image: its colors, then a byte
            frames += 1
            offset = _gif_blocks_end(file, offset + 11 + _gif_colors(start[9:]))
        elif start[0] == 0x21:  # an extension
            offset = _gif_blocks_end(file, offset + 2)
        else:
            break
    return frames > most


def _gif_colors(flags):
    """Returns the size of a table of colors, in bytes, from the byte with its flags."""
    return 3 * 2 ** (flags[0] % 8 + 1) if flags and flags[0] & 0x80 else 0


def _gif_blocks_end(file, offset):
    """Returns the end of a sequence of blocks: a byte with the size before each, 0 at the end."""
    while (size := _read_at(file, offset, 1)) and size[0]:
        offset += 1 + size[0]
    return offset + 1


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
    row = (width * bits + 31) // 32 * 4
    return "truncated" if size < pixels + row * height else None


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


def refuse_unreadable(listing):
    """Checks every image that is not known to be readable, so that training does not fail on it.

    Args:
        listing: `Listing` of the files.

    Raises:
        InputError: Names the unreadable files.
    """
    problems = find_unreadable(listing, lambda paths: map(check_image_file, paths), "headers")
    paths = listing.paths()
    refuse_files([(paths[index], problem) for index, problem in problems])


def find_unreadable(listing, check, checks, version=b""):
    """Checks every image that did not pass the same checks before.

    Args:
        listing: `Listing` of the files.
        check: Function of an array of paths, as bytes, that yields a reason or None for each.
        checks: Name of the checks; they are remembered apart from others.
        version: Bytes that change with what else the checks depend on.

    Returns:
        list of (index, reason) of the files that do not pass.
    """
    cache = _cache_path(listing.directory, checks.encode() + version)
    readable = _find_unchanged(listing, _load(cache))
    unknown, problems = np.flatnonzero(~readable), []
    results = check(listing.take(unknown).paths())
    try:
        for index in track(unknown, f"checking images ({checks})"):
            problem = next(results)
            readable[index] = problem is None
            if problem:
                problems.append((int(index), problem))
    finally:  # so that an interrupted check can be resumed
        if len(unknown):
            _save(cache, listing.take(readable))
    return problems


def refuse_files(problems):
    """Raises an `InputError` if a list of (path as bytes, reason) is not empty."""
    if problems:
        named = join_names([f"{os.fsdecode(path)} ({why})" for path, why in problems])
        raise InputError(
            f"--data_dir: {len(problems)} unreadable image{'s' * (len(problems) > 1)}, repair or "
            f"remove, or skip with --bad_images=skip: {named}"
        )


# === Cache ===


def _cache_path(directory, checks):
    """Returns a path that depends on the folder, the checks, this file and Pillow's version.

    So all images are checked again when the checks have changed.
    """
    source = pkgutil.get_data("keras_mixer.data", "image_checks.py") + PIL.__version__.encode()
    digest = hashlib.sha256(os.path.abspath(directory) + source + checks)
    return cache_folder() / "readable_images" / f"{digest.hexdigest()[:32]}.npz"


def _load(cache):
    """Returns the cached (names, sizes, mtimes) of readable files, or empty arrays."""
    nothing = np.empty(0, "S1"), np.empty(0, np.int64), np.empty(0, np.int64)
    try:
        arrays = np.load(io.BytesIO(cache.read_bytes()), allow_pickle=False)
        columns = tuple(arrays[name] for name in Listing._fields[1:])
        if [(c.dtype.kind, c.shape) for c in columns] != [(k, (len(columns[0]),)) for k in "Sii"]:
            raise ValueError("unexpected arrays")
    except OSError:
        return nothing
    except Exception as error:  # NumPy, zipfile and zlib raise many types on damaged files
        logger.warning(f"{cache}: damaged, so the images are checked again ({error})")
        return nothing
    return columns


def _find_unchanged(listing, cached):
    """Returns a bool array `(n,)`: whether each file is cached with its size and mtime."""
    names, sizes, mtimes = cached
    unchanged = np.zeros(len(listing), bool)
    index = position_of(listing.names, names)
    known = np.flatnonzero(index != MISSING)
    index = index[known]
    same_size = sizes[index] == listing.sizes[known]
    unchanged[known] = same_size & (mtimes[index] == listing.mtimes[known])
    return unchanged


def _save(cache, readable):
    """Writes the listing of readable files, sorted by name; failing to do so is no error."""
    columns = readable.take(np.argsort(readable.names))._asdict()
    del columns["directory"]
    content = io.BytesIO()
    np.savez_compressed(content, **columns)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, content.getvalue())
    except OSError as error:
        logger.info(
            f"{cache.parent}: cannot cache which images are readable ({error.strerror}), so they "
            f"are checked again next time; set KERAS_MIXER_CACHE=FOLDER to use another folder"
        )
