"""Tests `keras_mixer/preprocessing/permute.py` and `evaluate --permute`."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import SMALL, randomize

import keras_mixer
from keras_mixer import InputError, build_mixer, load_mixer
from keras_mixer.data.sources import open_dataset
from keras_mixer.inference.evaluate import Subject
from keras_mixer.inference.robustness import corruption_scores, permutation_scores
from keras_mixer.preprocessing.input_pipeline import evaluation_batches, training_batches
from keras_mixer.preprocessing.permute import KINDS, permute, pixel_order
from keras_mixer.preprocessing.resize import PERMUTATION_SEED, preprocess, to_model_range
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


# === Training on permuted images ===


def with_permutation(spec, permutation):
    how = dataclasses.replace(spec.preprocessing, permutation=permutation)
    return spec.replace(preprocessing=how)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_a_model_permutes_the_same_pixels(kind, trained):
    """Training and evaluation batches, and `preprocess`, after all augmentation."""
    spec, train = trained.spec, trained.dataset.train
    permuting = with_permutation(spec, kind)
    options = {"batch_size": 16, "seed": 3, "crop_padding": 1, "flip": True, "random_erasing": 1.0}
    ways = {
        "train": lambda spec: next(iter(training_batches(train, spec, **options)))[0],
        "evaluate": lambda spec: next(iter(evaluation_batches(train, spec)))[0],
        "preprocess": lambda spec: preprocess(train.pixels[:9], spec),
        "one": lambda spec: preprocess(train.pixels[0], spec)[None],
    }
    for name, way in ways.items():
        plain, found = way(spec).numpy(), way(permuting).numpy()
        expected = permute(plain, kind, spec.architecture.patch_shape, PERMUTATION_SEED)
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert not np.array_equal(found, plain)


def test_corruptions_come_before_the_permutation(trained):
    """A model that undoes the permutation in its weights scores as the model without."""
    spec = with_permutation(trained.spec, "global")
    sizes = spec.architecture
    order = pixel_order("global", sizes.image_shape, sizes.patch_shape, PERMUTATION_SEED)
    model = load_mixer(trained.best)
    inputs = keras.Input((*sizes.image_shape, sizes.channels))
    pixels = keras.layers.Reshape((len(order), sizes.channels))(inputs)
    restored = keras.ops.take(pixels, np.argsort(order), axis=1)
    outputs = model(keras.layers.Reshape(inputs.shape[1:])(restored))
    undoing = keras.Model(inputs, outputs)
    test = trained.dataset.test
    plain = Subject("test", model, trained.spec, test, np.arange(10), 64)
    permuted = Subject("test", undoing, spec, test, np.arange(10), 64)
    before, after = (corruption_scores(s, ["defocus_blur"], (3,)) for s in (plain, permuted))
    assert before == after and before["mean"] < trained.scores["test"]["top1"]


def test_a_run_on_permuted_images_predicts_and_exports_alike(tmp_path, run):
    flags = ("--depth=1", "--dim=8", "--num_steps=2", "--warmup_step=1", "--permutation=global")
    folder = tmp_path / "run"
    status, _, _ = run("train", *flags, f"--output_dir={folder}", f"--export_dir={tmp_path}/saved")
    assert status == 0
    model = load_mixer(folder)
    assert model.spec.preprocessing.permutation == "global"
    pixels = open_dataset("digits").test.pixels[:7]
    logits = model.predict(keras_mixer.preprocess(pixels, model), verbose=0)
    expected = tf.nn.softmax(logits).numpy()
    version = next((tmp_path / "saved").glob("*/*"))
    served = tf.saved_model.load(version).signatures["serving_default"](tf.constant(pixels))
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-5)
    status, _, err = run("convert", folder, tmp_path / "mixer.npz")
    assert (status, err) == (
        2,
        f"error: {tmp_path}/mixer.npz: formats of others have no place for permuted pixels\n",
    )
    status, _, _ = run("convert", folder, tmp_path / "ours")
    assert status == 0
    assert load_mixer(tmp_path / "ours").spec.preprocessing == model.spec.preprocessing


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_permuted_pixels_are_not_adapted_to_another_size(tmp_path, kind):
    options = {"depth": 1, "dim": 4, "num_steps": 1, "warmup_step": 0, "batch_size": 256}
    run = keras_mixer.fit(
        keras_mixer.Config(permutation=kind, output_dir=str(tmp_path / "run"), **options)
    )
    assert load_mixer(run.best, image_shape=(8, 8)).spec == run.spec
    for shapes in ({"image_shape": 16}, {"image_shape": 16, "patch_shape": 4}, {"patch_shape": 4}):
        with pytest.raises(InputError, match="permuted pixels .* expected images of 8x8 and patch"):
            load_mixer(run.best, **shapes)
    config = keras_mixer.Config(
        checkpoint=str(run.directory), image_shape=(16, 16), output_dir=str(tmp_path / "larger")
    )
    with pytest.raises(InputError, match=r"^--checkpoint=.*run: weights of permuted pixels"):
        keras_mixer.fit(config)
    assert not (tmp_path / "larger").exists()


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_baselines_have_patches_to_permute(model):
    """The same pixels as a Mixer's, so that both can be compared on the same images."""
    options = {"permutation": "patches+pixels", "depth": 1, "dim": 4}
    mixer, default = (plan_run(keras_mixer.Config(**options, model=m)) for m in ("mixer", model))
    pixels = default.dataset.test.pixels[:5]
    inputs = preprocess(pixels, default.spec)
    np.testing.assert_array_equal(inputs, preprocess(pixels, mixer.spec))
    other = plan_run(keras_mixer.Config(**options, model=model, patch_shape=(4, 4)))
    assert other.spec.architecture.patch_shape == (4, 4)
    assert np.any(preprocess(pixels, other.spec) != inputs)
    with pytest.raises(InputError, match="--patch_shape=4,4 is for mixer layers"):
        plan_run(keras_mixer.Config(depth=1, dim=4, model=model, patch_shape=(4, 4)))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_baselines_on_permuted_patches_are_trained_and_scored(model, tmp_path):
    options = {"permutation": "patches+pixels", "depth": 1, "dim": 4, "num_steps": 1}
    run = keras_mixer.run_job(
        keras_mixer.Config(**options, model=model, export=False, output_dir=str(tmp_path / "run"))
    )
    assert run.finished
    loaded = load_mixer(run.directory, image_shape=(8, 8))
    assert loaded.spec.architecture.patch_shape == (2, 2)
    with pytest.raises(InputError, match="permuted pixels .* cannot be adapted"):
        load_mixer(run.directory, image_shape=(16, 16))


def test_a_single_patch_has_no_order():
    config = keras_mixer.Config(permutation="patches+pixels", patch_shape=(8, 8), depth=1, dim=4)
    with pytest.raises(InputError, match="expected several patches, received an image that is one"):
        plan_run(config)
    spec = plan_run(keras_mixer.Config(model="mlp", depth=1, dim=4)).spec
    with pytest.raises(InputError, match="--permute=patches.pixels: expected a model of several"):
        permutation_scores(Subject("test", None, spec, None, None, 1), ["patches+pixels"])


def test_orders_stay_the_same_for_models_that_are_trained():
    """Golden: they are drawn again, not stored, so a model depends on them."""
    sizes = (2, 4), (2, 2), PERMUTATION_SEED
    assert pixel_order("global", *sizes).tolist() == [7, 0, 3, 5, 1, 4, 2, 6]
    assert pixel_order("patches+pixels", *sizes).tolist() == [6, 7, 4, 5, 3, 2, 1, 0]


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
