"""Tests tools/permute_images.py, and that every tool explains itself."""

import gzip
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from keras_mixer.data.sources import open_dataset

sys.path.insert(0, str(ROOT / "tools"))
from permute_images import ORDERS, main, permute, pixel_order

IMAGE, PATCH = (8, 12), (4, 2)
IMAGES = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)  # all values differ


def patches_of(image):
    """`(patches, pixels of a patch)`, the first channel of an image, cut out one by one."""
    return np.array(
        [
            image[top : top + PATCH[0], left : left + PATCH[1], 0].ravel()
            for top in range(0, IMAGE[0], PATCH[0])
            for left in range(0, IMAGE[1], PATCH[1])
        ]
    )


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_is_a_bijection_of_whole_pixels(order):
    indices = pixel_order(order, IMAGE, PATCH, seed=5)
    np.testing.assert_array_equal(np.sort(indices), np.arange(96))
    permuted = permute(IMAGES, order, PATCH, 5)
    flat = permuted.reshape(2, 96, 3)
    np.testing.assert_array_equal(flat[:, np.argsort(indices)].reshape(IMAGES.shape), IMAGES)
    assert not np.array_equal(permuted, permute(IMAGES, order, PATCH, 6)), "the seed decides"
    assert permute(IMAGES.astype(np.uint8), order, PATCH, 5).dtype == np.uint8


@pytest.mark.parametrize("order", ["patches", "patches+pixels"])
def test_patches_are_permuted_as_wholes(order):
    before, after = patches_of(IMAGES[0]), patches_of(permute(IMAGES, order, PATCH, 1)[0])
    sources = [next(i for i, p in enumerate(before) if set(p) == set(patch)) for patch in after]
    assert sorted(sources) == list(range(12)) and sources != list(range(12))
    pixels = {
        tuple(np.argmax(before[source][:, None] == patch, axis=0))
        for source, patch in zip(sources, after, strict=True)
    }
    assert len(pixels) == 1, "all patches have one order of pixels"
    assert (pixels == {tuple(range(8))}) == (order == "patches")


def test_a_global_order_tears_patches_apart():
    together = {frozenset(patch) for patch in patches_of(IMAGES[0])}
    after = patches_of(permute(IMAGES, "global", PATCH, 1)[0])
    assert not any(frozenset(patch) in together for patch in after)


def test_orders_stay_those_of_the_results():
    """Golden: results/order.md was made with these."""
    sizes = (2, 4), (2, 2), 0
    assert pixel_order("global", *sizes).tolist() == [7, 0, 3, 5, 1, 4, 2, 6]
    assert pixel_order("patches+pixels", *sizes).tolist() == [6, 7, 4, 5, 3, 2, 1, 0]


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["permute_images.py", *map(str, words)])
    main()


def test_idx_files_are_copied_permuted(tmp_path, monkeypatch):
    source = tmp_path / "mnist"
    source.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 12), np.uint8)
    for prefix in ("train", "t10k"):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, 6, 8, 12))
        content = gzip.compress(header + images.tobytes())
        (source / f"{prefix}-images-idx3-ubyte.gz").write_bytes(content)
        labels = (0x801).to_bytes(4, "big") + (6).to_bytes(4, "big") + bytes(range(6))
        (source / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    call(monkeypatch, source, tmp_path / "new", "--order=patches+pixels", "--patch_shape", 4, 2)
    test = open_dataset("mnist", tmp_path / "new", 0.0).test
    np.testing.assert_array_equal(test.labels, range(6))
    expected = permute(images, "patches+pixels", PATCH, 0)
    np.testing.assert_array_equal(test.pixels[..., 0], expected)


def test_class_folders_are_copied_permuted(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    for name in ("train/ant/a.png", "train/ant/a.bmp", "test/bee/b.png"):
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "old" / name)
    call(monkeypatch, tmp_path / "old", tmp_path / "new", "--order=global", "--seed=3")
    paths = sorted((tmp_path / "new").rglob("*.png"))
    names = [str(path.relative_to(tmp_path / "new")) for path in paths]
    assert names == ["test/bee/b.png", "train/ant/a.bmp.png", "train/ant/a.png"]
    for path in paths:
        with Image.open(path) as image:
            np.testing.assert_array_equal(image, permute(pixels[None], "global", (1, 1), 3)[0])
    words = (tmp_path / "old", tmp_path / "bad", "--order=patches", "--patch_shape", 5)
    with pytest.raises(SystemExit, match="error: .*do not divide"):
        call(monkeypatch, *words)
    with pytest.raises(SystemExit, match="error: .*File exists"):
        call(monkeypatch, tmp_path / "old", tmp_path / "new", "--order=global")


NO_PROGRAMS = ("documents.py", "fuzz_subjects.py")
TOOLS = sorted(p.name for p in (ROOT / "tools").glob("*.py") if p.name not in NO_PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_tools_explain_themselves(name):
    done = subprocess.run(
        [sys.executable, f"tools/{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr
