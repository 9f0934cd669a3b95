"""Tests `keras_mixer/weights/resize.py`: what a model keeps when its images or patches change."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from conftest import GOLDEN, SMALL, data_of, randomize, read_history

from keras_mixer import Config, InputError, build_mixer, fit, load_mixer
from keras_mixer.config.resolve import resolve
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.preprocessing.resize import resize_images
from keras_mixer.runs.checkpoints import newest_checkpoint
from keras_mixer.weights import model_folder
from keras_mixer.weights.load import assign_weights, model_weights
from keras_mixer.weights.pretrained import Pretrained, adapt_pretrained, read_pretrained
from keras_mixer.weights.resize import resize_matrix, resize_patches, resize_weights, shared_lengths


def some_model(architecture=SMALL):
    return randomize(build_mixer(**vars(architecture)))


def resized(architecture, model, *arguments):
    """(architecture, model) with the weights of `model`, adapted."""
    architecture, arrays, _ = resize_weights(architecture, model_weights(model), *arguments)
    other = build_mixer(**vars(architecture))
    assign_weights(other, arrays, "here")
    return architecture, other


def noise(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def activations(model, images):
    """The tokens after the stem and after every block."""
    layers = ["tokens", *(f"mixer_block_{i}" for i in range(SMALL.depth))]
    outputs = [model.get_layer(name).output for name in layers]
    return [np.asarray(x) for x in keras.Model(model.input, outputs)(images)]


# === Nothing to do ===


@pytest.mark.parametrize("method", ["auto", "tile", "interpolate"])
def test_equal_shapes_leave_every_bit(method):
    arrays = model_weights(some_model())
    architecture, again, done = resize_weights(SMALL, arrays, (8, 12), (4, 2), method)
    assert (architecture, done) == (SMALL, [])
    assert again.keys() == arrays.keys()
    assert all(again[name] is arrays[name] for name in arrays)


# === Tiled ===


@pytest.mark.parametrize(
    ("image_shape", "patch_shape", "factors"),
    [
        ((8, 8), (4, 4), (2, 2)),
        ((8, 12), (4, 2), (2, 2)),
        ((8, 12), (4, 2), (3, 1)),
        ((8, 12), (4, 2), (1, 3)),
        ((12, 4), (2, 4), (2, 3)),
        ((4, 4), (4, 4), (3, 2)),
    ],
)
def test_every_tile_of_a_tiled_image_has_the_original_activations(
    image_shape, patch_shape, factors
):
    """The property that appendix C is about, and that the order of patches can spoil."""
    original = SMALL.replace(image_shape=image_shape, patch_shape=patch_shape)
    model = some_model(original)
    larger = (image_shape[0] * factors[0], image_shape[1] * factors[1])
    architecture, other = resized(original, model, larger, None, "tile")
    assert architecture.tokens_mlp_dim == 5 * factors[0] * factors[1]
    images = noise(2, *image_shape, 2)
    rows, columns = original.grid
    found = activations(other, np.tile(images, (1, *factors, 1)))
    for one, tiled in zip(activations(model, images), found, strict=True):
        expected = np.tile(one.reshape(2, rows, columns, -1), (1, *factors, 1))
        np.testing.assert_allclose(tiled, expected.reshape(tiled.shape), atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(
        other(np.tile(images, (1, *factors, 1))), model(images), atol=1e-5, rtol=1e-6
    )


def test_tiles_do_not_see_one_another():
    """Between the copies there are zeros: a change in one tile stays there, block by block."""
    model = some_model()
    _, other = resized(SMALL, model, (16, 24), None, "tile")
    images = np.tile(noise(1, 8, 12, 2), (1, 2, 2, 1))
    changed = images.copy()
    changed[:, 8:, 12:] += 1.0
    *_, before = activations(other, images)
    *_, after = activations(other, changed)
    differs = (before != after).any(axis=-1).reshape(4, 12)
    assert differs[2:, 6:].all()
    assert not differs[:2].any()
    assert not differs[:, :6].any()


def test_tiled_kernels_are_the_papers_up_to_the_order_of_patches():
    kernel = noise(12, 5)
    arrays = model_weights(some_model())
    name = "mixer_block_1/token_mixing/dense_0/kernel"
    arrays[name] = kernel
    new = resize_weights(SMALL, arrays, (16, 24), None, "tile")[1][name]
    tile_by_tile = [
        (2 * i + u) * 12 + 6 * j + v
        for i in range(2) for j in range(2) for u in range(2) for v in range(6)
    ]  # fmt: skip
    np.testing.assert_array_equal(new[tile_by_tile], np.kron(np.eye(4), kernel))


# === Interpolated ===


def grids(count):
    dice = np.random.default_rng(2)
    return [tuple(map(int, dice.integers(1, 9, 4))) for _ in range(count)]


def interpolated(arrays, old, new):
    """Token weights of the first block, from one grid to another."""
    architecture = SMALL.replace(patch_shape=(1, 1), image_shape=old, depth=1)
    arrays = {f"mixer_block_0/token_mixing/{name}": array for name, array in arrays.items()}
    _, arrays, _ = resize_weights(architecture, arrays, new, method="interpolate")
    return {name.removeprefix("mixer_block_0/token_mixing/"): a for name, a in arrays.items()}


def some_tokens(rows, columns):
    patches = rows * columns
    return {
        "dense_0/kernel": noise(patches, 5),
        "dense_0/bias": noise(5),
        "dense_1/kernel": noise(5, patches),
        "dense_1/bias": noise(patches),
    }


@pytest.mark.parametrize("grid", grids(12))
def test_constant_fields_are_kept_between_any_grids(grid):
    """Equal tokens give the same hidden sums, and constant outputs stay the same constants."""
    old, new = grid[:2], grid[2:]
    before = some_tokens(*old)
    before["dense_1/kernel"][:] = noise(5, 1)
    before["dense_1/bias"][:] = 0.7
    after = interpolated(before, old, new)
    patches = new[0] * new[1]
    sums = [arrays["dense_0/kernel"].sum(axis=0) for arrays in (before, after)]
    np.testing.assert_allclose(*sums, atol=1e-5)
    np.testing.assert_array_equal(after["dense_0/bias"], before["dense_0/bias"])
    expected = np.repeat(before["dense_1/kernel"][:, :1], patches, axis=1)
    np.testing.assert_allclose(after["dense_1/kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(after["dense_1/bias"], np.full(patches, 0.7), atol=1e-6)


@pytest.mark.parametrize("old, new", [(4, 8), (4, 7), (7, 8), (3, 3), (1, 5)])
def test_cells_are_weighted_by_the_length_they_share(old, new):
    """Against a row in which every cell is old * new fine cells."""
    fine = np.repeat(np.eye(old), new, axis=0)  # (old * new, old)
    expected = fine.reshape(new, old, old).mean(axis=1)
    np.testing.assert_allclose(shared_lengths(old, new), expected, atol=1e-12)


def mixing(tokens, weights):
    """Token mixing of fields `(batch, rows, columns, channels)`, with tanh between the layers."""
    batch, *_, channels = tokens.shape
    x = np.moveaxis(tokens.reshape(batch, -1, channels), 1, 2)
    x = np.tanh(x @ weights["dense_0/kernel"] + weights["dense_0/bias"])
    x = x @ weights["dense_1/kernel"] + weights["dense_1/bias"]
    return np.moveaxis(x, 1, 2).reshape(tokens.shape)


def enlarge(tokens, shape):
    down, across = (shared_lengths(*pair) for pair in zip(tokens.shape[1:3], shape, strict=True))
    return np.einsum("ai,bj,nijc->nabc", down, across, tokens)


@pytest.mark.parametrize("grid", [(4, 6, 8, 7), (3, 4, 6, 6), (4, 4, 8, 8), (7, 7, 8, 10)])
def test_enlarged_fields_are_mixed_exactly_as_before(grid):
    old, new = grid[:2], grid[2:]
    before, tokens = some_tokens(*old), noise(2, *old, 3)
    found = mixing(enlarge(tokens, new), interpolated(before, old, new))
    np.testing.assert_allclose(found, enlarge(mixing(tokens, before), new), atol=1e-4)


@pytest.mark.parametrize("grid", [(6, 6, 3, 4), (8, 7, 4, 6)])
def test_shrunken_grids_mix_what_they_would_be_enlarged(grid):
    """So is every field of the small grid, up to what a small grid cannot hold."""
    old, new = grid[:2], grid[2:]
    before, tokens = some_tokens(*old), noise(2, *new, 3)
    whole = mixing(enlarge(tokens, old), before)
    fit = [np.linalg.pinv(shared_lengths(*pair)) for pair in zip(new, old, strict=True)]
    expected = np.einsum("ia,jb,nabc->nijc", *fit, whole)
    np.testing.assert_allclose(mixing(tokens, interpolated(before, old, new)), expected, atol=1e-4)


def test_for_whole_factors_kernels_are_repeated():
    before = some_tokens(2, 3)
    after = interpolated(before, (2, 3), (4, 9))
    image = before["dense_0/kernel"].reshape(2, 3, 5)
    expected = np.repeat(np.repeat(image, 2, axis=0), 3, axis=1) / 6
    np.testing.assert_allclose(after["dense_0/kernel"].reshape(4, 9, 5), expected, atol=1e-6)


@pytest.mark.parametrize("larger", [(7, 9), (5, 4), (12, 8)])
def test_up_and_down_again_is_the_same(larger):
    before = some_tokens(4, 4)
    after = interpolated(interpolated(before, (4, 4), larger), larger, (4, 4))
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-5, err_msg=name)


# === Any shapes ===


@pytest.mark.parametrize("grid", grids(6))
@pytest.mark.parametrize("patch_shape", [(4, 2), (3, 5)])
def test_resized_models_run_and_have_the_right_size(grid, patch_shape):
    model = some_model()
    rows, columns = grid[2:]
    image_shape = (rows * patch_shape[0], columns * patch_shape[1])
    architecture, other = resized(SMALL, model, image_shape, patch_shape)
    assert architecture == SMALL.replace(image_shape=image_shape, patch_shape=patch_shape)
    assert other.count_params() == architecture.parameters
    assert np.isfinite(other(noise(2, *image_shape, 2))).all()
    _, back = resized(architecture, other, (8, 12), (4, 2), "interpolate")
    assert back(noise(2, 8, 12, 2)).shape == (2, 3)


def test_without_token_mixing_only_patches_change():
    before = SMALL.replace(token_mixing=False)
    architecture, other = resized(before, some_model(before), (16, 24), (2, 2))
    assert architecture.tokens_mlp_dim == 5
    assert other(noise(1, 16, 24, 2)).shape == (1, 3)


def test_half_precision_stays_half():
    arrays = {name: a.astype(np.float16) for name, a in model_weights(some_model()).items()}
    _, arrays, _ = resize_weights(SMALL, arrays, (12, 10), (3, 5))
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}


# === Patch kernels ===


@pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 11), (1, 5), (7, 7), (8, 4), (9, 5), (6, 1)])
def test_the_matrix_is_that_of_our_own_resizing(old, new):
    lines = 255.0 * np.eye(old, dtype=np.float32)[:, :, None, None]  # a line of pixels per batch
    found = resize_images(lines, (new, 1)).numpy()[:, :, 0, 0].T / 255
    np.testing.assert_allclose(resize_matrix(old, new), found, atol=1e-6)


@pytest.mark.parametrize("patch_shape", [(8, 8), (5, 3), (4, 7), (9, 2), (6, 5)])
def test_embeddings_are_kept_when_patches_grow(patch_shape):
    """Through the model: stem of the resized patch, against stem of the patch."""
    model = some_model()
    image_shape = (2 * patch_shape[0], 6 * patch_shape[1])
    _, other = resized(SMALL, model, image_shape, patch_shape)
    pixels = np.random.default_rng(3).uniform(0, 255, (5, 4, 2, 2)).astype(np.float32)
    patches = [x / 127.5 - 1 for x in (pixels, resize_images(pixels, patch_shape).numpy())]
    embeddings = [
        np.tensordot(x, m.get_layer("stem").kernel, 3)
        for x, m in zip(patches, (model, other), strict=True)
    ]
    np.testing.assert_allclose(*embeddings, atol=2e-5)
    np.testing.assert_array_equal(other.get_layer("stem").bias, model.get_layer("stem").bias)


@pytest.mark.parametrize(("old", "new"), [((8, 6), (4, 3)), ((7, 5), (3, 4)), ((4, 4), (6, 2))])
def test_shrunken_kernels_are_the_least_squares_solution(old, new):
    kernel = noise(*old, 3, 5).astype(np.float64)
    by_lines = np.eye(old[0] * old[1], dtype=np.float32).reshape(-1, *old, 1)
    resized_lines = resize_images(by_lines, new).numpy().reshape(old[0] * old[1], -1)
    expected, *_ = np.linalg.lstsq(resized_lines, kernel.reshape(old[0] * old[1], -1), 1e-5)
    found = resize_patches(kernel, new)
    np.testing.assert_allclose(found, expected.reshape(*new, 3, 5), atol=1e-5)


# === Words ===


def test_what_was_done_is_printed(capsys):
    pretrained = Pretrained(ModelSpec(SMALL, ("a", "b", "c")), model_weights(some_model()))
    for shapes in (((16, 24), (8, 4)), ((16, 24), None, "tile"), ((12, 12),)):
        adapted = adapt_pretrained(pretrained, *shapes)
        assert adapted.spec.architecture.image_shape == shapes[0]
        assert adapted.spec.class_names == ("a", "b", "c")
    assert capsys.readouterr().err.splitlines() == [
        "patches of 4×2 become 8×4: patch kernels resampled so that a resized patch keeps its "
        "embedding",
        "a grid of 2×6 patches becomes 4×12: token mixing tiled 2×2, tokens_mlp_dim 5 becomes 20; "
        "it needs training, because every tile is mixed as if it were a whole image",
        "a grid of 2×6 patches becomes 3×6: token mixing interpolated, tokens_mlp_dim unchanged",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((12, 12), None, "tile"), "2×6 patches does not tile one of 3×6; choose --image_shape"),
        (((12, 12), None, "nearest"), "--resize_tokens=nearest: expected one of auto, inte"),
        (((10, 12), None, "auto"), "patch_shape=4,2 does not divide image_shape=10,12: the height"),
        ((24, None, "auto"), "image_shape: expected two positive integers, height and width, rec"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError) as error:
        resize_weights(SMALL, model_weights(some_model()), *arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("flags, width", [
    ({}, 5), ({"tokens_mlp_dim": 5}, 5), ({"resize_tokens": "tile"}, 20),
])  # fmt: skip
def test_width_follows_from_the_resized_checkpoint(flags, width):
    config = Config(checkpoint="x", image_shape=(16, 24), **flags)
    config, spec = resolve(config, data_of("abc", 2), SMALL)
    assert config.tokens_mlp_dim == spec.architecture.tokens_mlp_dim == width


@pytest.mark.parametrize("flags, message", [
    ({"tokens_mlp_dim": 5, "resize_tokens": "tile"},
     "=5: .* has tokens_mlp_dim 20 once it is resized; leave the flag out"),
    ({"depth": 2}, "--depth=2: the checkpoint x has depth 3; leave the flag out"),
    ({"image_shape": (9, 24)},
     "--patch_shape=4,2 does .* --image_shape=9,24: the height 9 is no multiple of 4; .* 8 and 12"),
    ({"checkpoint": None, "resize_tokens": "tile"},
     "--resize_tokens=tile is for a --checkpoint of other images or patches"),
])  # fmt: skip
def test_flags_that_contradict_the_resized_checkpoint_are_named(flags, message):
    config = Config(**{"checkpoint": "x", "image_shape": (16, 24)} | flags)
    with pytest.raises(InputError, match=message):
        resolve(config, data_of("abc", 2), SMALL if config.checkpoint else None)


# === From files ===


def test_official_weights_are_resized_once_their_own_shape_is_known(tmp_path):
    """24 patches of 4×4 leave it open; a square number does not."""
    path = GOLDEN / "official_mixer.npz"
    own, finer = load_mixer(path, (24, 16)), load_mixer(path, (24, 16), (2, 2))
    assert finer.count_params() > own.count_params()
    with pytest.raises(InputError, match=r"image_shape=48,32 does not fit: .* there are 24"):
        load_mixer(path, (48, 32))
    square = {
        name: array[:16] if name.endswith("token_mixing/Dense_0/kernel")
        else array[..., :16] if "token_mixing/Dense_1" in name else array
        for name, array in np.load(path).items()
    }  # fmt: skip
    np.savez(tmp_path / "square.npz", **square)
    images = noise(1, 16, 16, 3)
    model, larger = (
        load_mixer(tmp_path / "square.npz", shape, None, "tile") for shape in (None, (32, 48))
    )
    np.testing.assert_allclose(larger(np.tile(images, (1, 2, 3, 1))), model(images), atol=1e-5)


@pytest.fixture
def start(trained, tmp_path):
    """A copy of a run on 8×8 images of 2×2 patches."""
    return shutil.copytree(trained.directory, tmp_path / "start")


def from_start(start, name, **fields):
    return Config(
        **{"checkpoint": str(start), "output_dir": str(start.parent / name), "batch_size": 64},
        **{"num_steps": 3, "optimizer": "adamw", "lr": 0.003, "warmup_step": 0, "jit": "false"},
        **fields,
    )


def assert_learns(run):
    history = read_history(run)
    losses = [float(row["loss"]) for row in history]
    assert losses[2] < losses[1] < losses[0]
    assert float(history[-1]["val_accuracy"]) > 0.5
    assert load_mixer(run.directory).input_shape[1:3] == run.config.image_shape


def test_a_tiled_run_learns_and_goes_on_without_its_start(trained, start, interrupted):
    shapes = {"image_shape": (16, 16), "resize_tokens": "tile"}
    whole = fit(from_start(start, "whole", **shapes))
    assert (whole.config.tokens_mlp_dim, whole.config.patch_shape) == (32, (2, 2))
    assert_learns(whole)
    config = from_start(start, "again", **shapes)
    interrupted(config, 20)
    shutil.rmtree(start)
    again = fit(config)
    expected, found = (newest_checkpoint(run.checkpoints).arrays for run in (whole, again))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    record = json.loads((again.directory / "config.json").read_text())["start"]
    assert record["sha256"] == model_folder.digest(model_folder.read_weights(trained.best)[0])
    assert record["architecture"]["image_shape"] == [8, 8]
    with pytest.raises(InputError, match="--resize_tokens was tile, now interp.*Give another"):
        fit(dataclasses.replace(config, resize_tokens="interpolate"))


def test_an_interpolated_run_learns_and_goes_on(start, interrupted):
    """A grid of 4×4 becomes 3×2, and patches of 2×2 become 4×4."""
    config = from_start(start, "run", image_shape=(12, 8), patch_shape=(4, 4))
    interrupted(config, 20)
    run = fit(config)
    assert run.config.tokens_mlp_dim == 8
    assert_learns(run)


@pytest.mark.parametrize("method", ["auto", "tile", "interpolate"])
def test_the_flag_decides_what_a_run_starts_from(trained, tmp_path, method):
    """After one step at a learning rate that leaves every weight as it is, but for zeros."""
    config = Config(
        **{"checkpoint": str(trained.directory), "output_dir": str(tmp_path), "batch_size": 64},
        **{"image_shape": (16, 8), "resize_tokens": method, "jit": "false"},
        **{"lr": 1e-30, "num_steps": 1, "schedule_unit": "step"},
    )
    before, arrays, _ = read_pretrained(trained.directory)
    architecture, expected, _ = resize_weights(before.architecture, arrays, (16, 8), (2, 2), method)
    spec, found, _ = read_pretrained(fit(config).directory)
    assert spec.architecture == architecture
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-25, err_msg=name)
    assert architecture.tokens_mlp_dim == (16 if method == "tile" else 8)
