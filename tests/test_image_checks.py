"""Tests `keras_mixer/data/image_checks.py`: which files are refused and why, and its cache."""

import builtins
import io
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from conftest import ROOT
from PIL import Image

from keras_mixer.data import image_checks
from keras_mixer.data.image_checks import check_image_file
from keras_mixer.data.image_listing import IMAGE_SUFFIXES
from keras_mixer.data.sources import open_dataset
from keras_mixer.errors import InputError
from keras_mixer.files import cache_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)


KINDS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")


def encoded(kind, pixels=PIXELS, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def problem_of(tmp_path):
    """Returns what is wrong with a file of these bytes; the content counts, not the name."""

    def check(content):
        (tmp_path / "image.jpg").write_bytes(content)
        return check_image_file(tmp_path / "image.jpg")

    return check


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_pass(problem_of, tmp_path, kind):
    assert problem_of(encoded(kind)) is None
    assert check_image_file(bytes(tmp_path / "image.jpg")) is None


def test_every_suffix_is_known_to_pillow():
    formats = {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES}
    assert formats == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.95])
def test_truncated_files_do_not_pass(problem_of, kind, kept):
    content = encoded(kind)
    assert problem_of(content[: int(kept * len(content))]) is not None


@pytest.mark.parametrize("kind", KINDS[:-1])  # of a GIF, the frames are counted
def test_of_large_files_only_header_and_tail_are_read(tmp_path, kind, monkeypatch):
    """So that a million images are checked in minutes."""
    large = np.random.default_rng(0).integers(0, 256, (500, 600, 3), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    path = tmp_path / "image"
    path.write_bytes(encoded(kind, large, **options))
    count = 0

    class Counted(io.FileIO):
        def readinto(self, buffer):
            nonlocal count
            count += (got := super().readinto(buffer))
            return got

    monkeypatch.setattr(builtins, "open", lambda path, mode: io.BufferedReader(Counted(path), 512))
    assert check_image_file(path) is None
    assert path.stat().st_size > 200_000
    assert 0 < count < 10_000


def _bmp(bits, *, compression=0, header_size=40, masks=b""):
    palette = bytes(4 * 2**bits) if bits <= 8 else b""
    offset = 14 + header_size + len(masks) + len(palette)
    fields = (11, 9, 1, bits, compression, 0, 0, 0, 0, 0)
    header = struct.pack("<IiiHHIIiiII", header_size, *fields)
    if header_size == 12:
        header = struct.pack("<IHHHH", 12, 11, 9, 1, bits)
    start = b"BM" + struct.pack("<IHHI", 0, 0, 0, offset)
    return start + header + masks + palette + bytes(44 * 9)


def _gif_that_is_larger_than_its_frame():
    content = bytearray(encoded("GIF"))
    content[6:10] = struct.pack("<HH", 20, 15)
    return bytes(content)


def _jpeg(frame):
    content = encoded("JPEG")
    marker = content.index(b"\xff\xc0") + 1
    return content[:marker] + bytes([frame]) + content[marker + 1 :]


def _animation():
    second = Image.fromarray(np.roll(PIXELS, 1, 0))
    return encoded("WEBP", save_all=True, append_images=[second])


LOSSLESS = "a lossless or hierarchical JPEG: save it as PNG"
UNCOMMON_BMP = "a BMP other than of plain 8, 24 or 32 bits per pixel: save it as PNG"
NO_IMAGE = "not a JPEG, PNG, BMP, WebP or GIF image"


@pytest.mark.parametrize(
    "content, reason",
    [
        (_jpeg(0xC3), LOSSLESS),
        (_jpeg(0xCD), LOSSLESS),
        (_animation(), "an animated WebP: save its first frame as PNG"),
        (_gif_that_is_larger_than_its_frame(), "does not fill it: save that frame as PNG"),
        (_bmp(1), UNCOMMON_BMP),
        (_bmp(4), UNCOMMON_BMP),
        (_bmp(8, compression=1), UNCOMMON_BMP),
        (_bmp(16), UNCOMMON_BMP),
        (_bmp(24, header_size=12), UNCOMMON_BMP),
        (_bmp(32, compression=3, masks=struct.pack("<III", 255 << 24, 255 << 16, 255 << 8)),
         UNCOMMON_BMP),
        (b"\xff\xd8\xff" + bytes(100), "damaged header"),
        (b"BM" + bytes(100), "damaged header"),
        (b"RIFF\1\0\0\0WEBPVP9X" + bytes(100), "damaged header"),
        (bytes(100), NO_IMAGE),
        (encoded("TIFF"), NO_IMAGE),
        (encoded("JPEG2000"), NO_IMAGE),
        (b"", "empty file"),
    ],
)  # fmt: skip
def test_files_that_tensorflow_cannot_decode_are_refused(problem_of, content, reason):
    assert reason in problem_of(content)


@pytest.mark.parametrize("bits, compression", [(8, 0), (24, 0), (32, 0), (32, 3)])
def test_plain_bitmaps_pass(problem_of, bits, compression):
    masks = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF) if compression else b""
    assert problem_of(_bmp(bits, compression=compression, masks=masks)) is None


def _png_header(width, height):
    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 9_000), (30_000, 30_000), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_by_their_header(problem_of, size):
    assert "pixels" in problem_of(_png_header(*size))


@pytest.mark.parametrize(
    "mode, lossless, kind",
    [("RGB", False, b"VP8 "), ("RGBA", True, b"VP8L"), ("RGBA", False, b"VP8X")],
)
def test_webp_bombs_are_refused_by_their_header(tmp_path, monkeypatch, mode, lossless, kind):
    """Our own code reads their sizes, since Pillow would read the whole file."""
    path = tmp_path / "bomb.webp"
    Image.new(mode, (300, 517), (1, 2, 3, 4)[: len(mode)]).save(path, lossless=lossless)
    assert path.read_bytes()[12:16] == kind
    assert check_image_file(path) is None
    monkeypatch.setattr(image_checks, "MOST_PIXELS", 300 * 517 - 1)
    assert check_image_file(path) == "300x517 is more than 155099 pixels"


def test_long_sides_are_refused(problem_of):
    assert problem_of(_png_header(1, 65_535)) is None
    assert problem_of(_png_header(65_536, 1)) == "65536x1 has a side of more than 65535 pixels"


def test_frames_of_a_gif_count_by_their_own_size(problem_of):
    """Each is decoded whole, however small the canvas."""
    first = encoded("GIF")
    frame = b"," + struct.pack("<4HB", 0, 0, 20_000, 20_000, 0) + b"\2\1\0\0;"
    assert first.endswith(b";")
    assert "a GIF of 2 frames, together too large" in problem_of(first[:-1] + frame)
    small = frame.replace(struct.pack("<2H", 20_000, 20_000), struct.pack("<2H", 9, 9))
    assert problem_of(first[:-1] + small) is None


@pytest.mark.parametrize("options", [{"progressive": True}, {}])
def test_scans_of_a_jpeg_are_counted(problem_of, options):
    """Each scan of a progressive one is decoded. What follows the end mark is not."""
    content, scan = encoded("JPEG", **options), b"\xff\xda\0\x08\1\1\0\0\x3f\0\0"
    assert problem_of(content + 400 * scan + b"\xff\xd9") is None
    reason = problem_of(content[:-2] + 400 * scan + b"\xff\xd9")
    found = 400 + content.count(b"\xff\xda")
    wanted = f"a JPEG of {found} scans, expected at most 100: save it anew"
    assert reason == (wanted if options else None)


def test_missing_files_are_named(tmp_path):
    assert check_image_file(tmp_path / "missing.png") == "not a regular file"


def test_something_may_be_appended_to_a_jpeg(problem_of):
    """Cameras append films and notes."""
    assert problem_of(encoded("JPEG") + bytes(5000)) is None
    assert problem_of(encoded("JPEG")[:-2] + bytes(5000)) == "truncated"


@pytest.mark.parametrize("length", [10, 100_000])
def test_something_may_be_appended_to_a_png(problem_of, length):
    assert problem_of(encoded("PNG") + bytes(length)) is None
    assert problem_of(encoded("PNG")[:-12] + bytes(length)) == "truncated"


def test_a_png_with_a_damaged_header_does_not_pass(problem_of):
    content = bytearray(encoded("PNG"))
    content[18] ^= 1  # in the width, whose checksum follows
    assert "damaged" in problem_of(content)


def test_hostile_bytes_never_raise(problem_of):
    """250 mutations of each kind: a reason or None, never an exception."""
    generator = np.random.default_rng(0)
    for kind in KINDS:
        content = encoded(kind)
        for _ in range(250):
            mutated = bytearray(content)
            for index in generator.integers(0, len(content), generator.integers(1, 8)):
                mutated[index] = generator.integers(0, 256)
            reason = problem_of(mutated)
            assert reason is None or isinstance(reason, str)


# === Cache ===


@pytest.fixture
def checked(monkeypatch):
    """The names of the files that were checked, as they are checked."""
    names = []

    def check(path, check_image_file=image_checks.check_image_file):
        names.append(os.path.basename(os.fsdecode(path)))
        return check_image_file(path)

    monkeypatch.setattr(image_checks, "check_image_file", check)
    return names


OPENED = """
import os, sys
from keras_mixer.data.sources import open_dataset

def note(event, arguments):
    if event == "open" and os.fsdecode(os.fspath(arguments[0])).startswith(sys.argv[1] + "/"):
        opened.append(arguments[0])

opened = []
sys.addaudithook(note)
print(open_dataset("folder", sys.argv[1]).identity, len(opened))
"""


def test_images_are_opened_again_only_after_the_checks_changed(folder, tmp_path):
    """In processes that import a copy of the package. How images are resized plays no part."""
    package = tmp_path / "keras_mixer"
    shutil.copytree(ROOT / "keras_mixer", package)
    starts = []
    for changed in (None, None, "preprocessing/resize.py", "data/image_checks.py"):
        if changed:
            (package / changed).write_text((package / changed).read_text() + "# changed\n")
        start = [sys.executable, "-c", OPENED, str(folder)]
        done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=True)
        starts.append(done.stdout.split())
    assert [int(opened) for _, opened in starts] == [36, 0, 0, 36]
    assert len({identity for identity, _ in starts}) == 1


def test_only_new_and_changed_images_are_checked_again(folder, checked, write_image):
    open_dataset("folder", folder)
    assert len(checked) == 36
    checked.clear()
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "new.png")
    (folder / "bee" / "1.jpg").unlink()
    write_image(folder / "bee" / "2.png", (40, 41, 3))
    os.utime(folder / "cat" / "3.jpg", ns=(1, 1))
    open_dataset("folder", folder)
    assert sorted(checked) == ["2.png", "3.jpg", "new.png"]
    checked.clear()
    open_dataset("folder", folder)
    assert checked == []


@pytest.mark.parametrize("same", ["size", "mtime_ns"])
def test_an_image_that_broke_since_is_found(folder, same):
    """Where only its size differs, or only its modification time."""
    open_dataset("folder", folder)
    path = folder / "ant" / "0.png"
    before = path.stat()
    path.write_bytes(b"x" * (before.st_size + (same != "size")))
    os.utime(path, ns=(0, before.st_mtime_ns + (same != "mtime_ns")))
    assert getattr(path.stat(), f"st_{same}") == getattr(before, f"st_{same}")
    with pytest.raises(InputError, match=r"ant/0\.png \(not a JPEG"):
        open_dataset("folder", folder)


def test_broken_images_are_checked_every_time(folder, checked):
    (folder / "ant" / "broken.png").write_bytes(b"x")
    for expected in (37, 1):
        with pytest.raises(InputError, match="broken.png"):
            open_dataset("folder", folder)
        assert len(checked) == expected
        checked.clear()


def test_an_interrupted_check_goes_on_where_it_stopped(folder, checked, monkeypatch):
    def interrupt(path, check=image_checks.check_image_file):
        if len(checked) == 20:
            raise KeyboardInterrupt
        return check(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_checks, "check_image_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_dataset("folder", folder)
    assert len(checked) == 20
    open_dataset("folder", folder)
    assert len(checked) == 36


def test_another_pillow_checks_everything_again(folder, checked, monkeypatch):
    open_dataset("folder", folder)
    monkeypatch.setattr(PIL, "__version__", "another")
    open_dataset("folder", folder)
    assert len(checked) == 72


def test_a_folder_elsewhere_is_not_taken_for_this_one(folder, tmp_path, checked, monkeypatch):
    open_dataset("folder", folder)
    shutil.copytree(folder, tmp_path / "copy")
    open_dataset("folder", tmp_path / "copy")
    assert len(checked) == 72
    monkeypatch.chdir(folder)
    open_dataset("folder", ".")
    assert len(checked) == 72, "the same path, written otherwise"


def test_a_damaged_cache_is_written_again(folder, tmp_path, checked, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "mine"))
    open_dataset("folder", folder)
    (cache,) = (tmp_path / "mine").rglob("*.npz")
    cache.write_bytes(b"hello")
    open_dataset("folder", folder)
    assert len(checked) == 72
    assert capsys.readouterr().err.count("damaged, so it is written again") == 1
    open_dataset("folder", folder)
    assert len(checked) == 72
    assert "damaged" not in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_reported(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "file"))
    assert len(open_dataset("folder", folder).train) == 25
    said = capsys.readouterr().err
    assert said.count("cannot cache") == 1
    assert "cannot cache which images are readable" in said


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_MIXER_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(cache_folder()) == "/home/somebody/.cache/keras_mixer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "keras_mixer"


def test_nothing_is_written_to_the_images(folder):
    before = sorted(folder.rglob("*"))
    open_dataset("folder", folder)
    assert sorted(folder.rglob("*")) == before


# === Files that would take much memory or time ===


def frames(count, size):
    pictures = [Image.new("P", size, color=index) for index in range(count)]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    return file.getvalue()


def test_an_animation_is_refused_if_all_its_frames_are_too_many_pixels(problem_of):
    """TensorFlow decodes them all."""
    assert problem_of(frames(3, (2000, 2000))) is None
    message = "a GIF of 40 frames, together too large: save its first one as PNG"
    assert problem_of(frames(40, (2000, 2000))) == message
    assert problem_of(frames(40, (200, 200))) is None


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.jpg"
    path.write_bytes(encoded("JPEG"))
    os.truncate(path, 2 << 30)
    assert check_image_file(path) == "2,147,483,648 bytes, expected at most 447,392,425"


def test_the_end_of_an_image_is_found_in_pieces(problem_of):
    content = encoded("JPEG")
    assert problem_of(content + bytes(3 << 20)) is None
    assert problem_of(content[:-2] + bytes(3 << 20)) == "truncated"
    across = content[:-2] + bytes((1 << 20) - 1)
    assert problem_of(across[: len(across)] + b"\xff\xd9" + bytes(100)) is None


@pytest.mark.parametrize(
    "content",
    [b"\xff\xd8\xff" + b"\xff" * 5000, encoded("GIF")[:-2] + b"\x21\xfe" + b"\1x" * 5000 + b"\0;"],
)
def test_headers_of_millions_of_parts_are_given_up(problem_of, monkeypatch, content):
    """Pillow reads them byte by byte: 30 MB would take minutes."""
    monkeypatch.setattr(image_checks, "_MOST_READS", 1000)
    assert problem_of(content) == "damaged header (more than 1,000 parts)"
