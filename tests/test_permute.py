"""Tests `keras_mixer/preprocessing/permute.py` and `evaluate --permute`."""

import json

import numpy as np
import pytest
from conftest import SMALL, randomize

import keras_mixer
from keras_mixer import InputError, build_mixer, load_mixer
from keras_mixer.inference.evaluate import Subject
from keras_mixer.inference.robustness import permutation_scores
from keras_mixer.preprocessing.permute import KINDS, permute, pixel_order
from keras_mixer.preprocessing.resize import to_model_range
from keras_mixer.runs.open_run import plan_run

IMAGE, PATCH = (8, 12), (4, 2)  # the shapes of SMALL, in which height and width differ
IMAGES = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)  # in which every value is another


def patches_of(images, patch_shape):
    """`(batch, patches, pixels of a patch, channels)`, cut out one by one."""
    (rows, columns), (_, height, width, _) = patch_shape, images.shape
    cut = [
        images[:, top : top + rows, left : left + columns].reshape(len(images), rows * columns, -1)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    return np.stack(cut, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_kept_with_its_channels(kind, channels):
    images = IMAGES[..., :channels]
    permuted = permute(images, kind, PATCH, seed=0)
    assert permuted.shape == images.shape and permuted.dtype == images.dtype
    assert not np.array_equal(permuted, images)
    for one, other in zip(images, permuted, strict=True):
        pixels = sorted(map(tuple, one.reshape(-1, channels)))
        assert sorted(map(tuple, other.reshape(-1, channels))) == pixels


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_a_bijection_and_the_inverse_restores_the_images(kind):
    order = pixel_order(kind, IMAGE, PATCH, seed=5)
    np.testing.assert_array_equal(np.sort(order), np.arange(96))
    flat = permute(IMAGES, kind, PATCH, seed=5).reshape(2, 96, 3)
    np.testing.assert_array_equal(flat[:, np.argsort(order)].reshape(IMAGES.shape), IMAGES)


def test_patches_and_pixels_are_permuted_as_wholes():
    """Patches of the permuted image are the permuted patches of the image."""
    before, after = (
        patches_of(images, PATCH)[0, :, :, 0]
        for images in (IMAGES, permute(IMAGES, "patches+pixels", PATCH, seed=1))
    )
    sources = [next(i for i, p in enumerate(before) if set(p) == set(patch)) for patch in after]
    assert sorted(sources) == list(range(12)) and sources != list(range(12))
    places = {
        tuple(np.argmax(before[source][:, None] == patch, axis=0))
        for source, patch in zip(sources, after, strict=True)
    }
    assert len(places) == 1, "all patches have one order of pixels"
    assert sorted(*places) == list(range(8)) and list(*places) != list(range(8))


def test_a_global_permutation_tears_patches_apart():
    before, after = (
        patches_of(images, PATCH)[0, :, :, 0]
        for images in (IMAGES, permute(IMAGES, "global", PATCH, seed=1))
    )
    together = {frozenset(patch) for patch in before}
    assert not any(frozenset(patch) in together for patch in after)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides(kind):
    one, same, other = (permute(IMAGES, kind, PATCH, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(permute(IMAGES[1:], kind, PATCH, 1), one[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_types_are_kept(kind):
    for dtype in (np.uint8, np.float32):
        images = IMAGES.astype(dtype)
        assert permute(images, kind, PATCH, 0).dtype == dtype


def test_patches_must_divide_the_image():
    with pytest.raises(InputError, match="do not divide"):
        permute(IMAGES, "patches+pixels", (3, 2), seed=0)
    permute(IMAGES, "global", (3, 2), seed=0)  # knows no patches


def test_a_mixer_with_permuted_weights_sees_the_same():
    """The paper's claim, exactly: permuted images are to one Mixer what images are to another."""
    model, other = randomize(build_mixer(**vars(SMALL))), build_mixer(**vars(SMALL))
    images = np.random.default_rng(0).uniform(-1, 1, (3, *IMAGE, 2)).astype(np.float32)
    order = pixel_order("patches+pixels", IMAGE, PATCH, seed=2)
    numbers = np.arange(96).reshape(1, *IMAGE, 1)
    permuted = order.reshape(numbers.shape)
    before, after = (patches_of(n, PATCH)[0, :, :, 0] for n in (numbers, permuted))
    patches = np.array([next(i for i, p in enumerate(before) if p[0] in row) for row in after])
    pixels = np.array([list(before[patches[0]]).index(number) for number in after[0]])
    for target, source in zip(other.weights, model.weights, strict=True):
        value = source.numpy()
        if "stem" in source.path and "kernel" in source.path:
            shape = value.shape
            value = value.reshape(PATCH[0] * PATCH[1], 2, -1)[pixels].reshape(shape)
        elif value.ndim == 2 and "token" in source.path:
            value = value[patches] if len(value) == 12 else value[:, patches]
        elif value.shape == (12,) and "token" in source.path:
            value = value[patches]
        target.assign(value)
    expected = model(images).numpy()
    np.testing.assert_allclose(
        other(permute(images, "patches+pixels", PATCH, seed=2)).numpy(), expected, atol=1e-5
    )
    assert not np.allclose(model(permute(images, "patches+pixels", PATCH, 2)), expected, atol=0.02)


def test_a_single_patch_has_no_order():
    spec = plan_run(keras_mixer.Config(model="mlp", depth=1, dim=4)).spec
    with pytest.raises(InputError, match="--permute=patches.pixels: expected a model of several"):
        permutation_scores(Subject("test", None, spec, None, None, 1), ["patches+pixels"])


# === The command ===


def test_evaluate_permuted_images(run, trained):
    words = ("--permute=patches+pixels,global", "--seed=3", "--batch_size=100")
    status, out, err = run("evaluate", trained.directory, *words, "--format=json")
    assert (status, err) == (0, "")
    found = json.loads(out)["permutations"]
    model, test = load_mixer(trained.best), trained.dataset.test
    pixels = to_model_range(test.pixels).numpy()
    expected = {
        kind: np.mean(model(permute(pixels, kind, (2, 2), 3)).numpy().argmax(1) == test.labels)
        for kind in KINDS
    }
    assert found == {"seed": 3, "top1": pytest.approx(expected)}
    assert found["top1"]["global"] < json.loads(out)["top1"]


def test_permutations_in_the_table(run, trained):
    status, out, _ = run("evaluate", trained.directory, "--permute=global")
    assert status == 0
    table = out.splitlines()
    head = "top-1 on permuted images (seed 0; not the order of its training)"
    first = table.index(head)
    assert table[first + 1].startswith("global") and table[first + 2].startswith("none")
    assert f"{trained.scores['test']['top1']:.2%}" in table[first + 2]


def test_unknown_permutations_are_one_line(run, trained):
    status, out, err = run("evaluate", trained.directory, "--permute=patches")
    assert (status, out) == (2, "")
    assert err == (
        "error: --permute: expected one of patches+pixels, global, received patches; "
        "did you mean patches+pixels?\n"
    )
