"""Tests `keras_mixer/preprocessing/input_pipeline.py`, and the interface of the kinds of images."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from conftest import SMALL
from PIL import Image

from keras_mixer.data.image_listing import list_images
from keras_mixer.data.splits import ArrayImages, FileImages
from keras_mixer.data.tfrecords import RecordImages, TFRecordStore
from keras_mixer.model.architecture import ModelSpec
from keras_mixer.preprocessing.input_pipeline import (
    Part,
    evaluation_batches,
    keep_in_memory,
    shuffled_index,
    training_batches,
)
from keras_mixer.preprocessing.random_numbers import BatchPart, sample_pixels

N, BATCH = 37, 4
PER_EPOCH = N // BATCH
RANDOM = np.random.default_rng(0)
ARRAYS = ArrayImages(RANDOM.integers(0, 256, (N, 6, 6, 3), np.uint8), np.arange(N) % 5)
SIZES = SMALL.replace(image_shape=(6, 6), patch_shape=(2, 2), channels=3, num_classes=5)
SPEC = ModelSpec(SIZES)
RECIPE = {"batch_size": BATCH, "seed": 3}
EVERYTHING = {**RECIPE, "flip": True, "crop_padding": 1, "label_smoothing": 0.1}


def example(path, label):
    """A serialized tf.train.Example of an image file and its label."""
    image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[path.read_bytes()]))
    label = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    features = tf.train.Features(feature={"image": image, "label": label})
    return tf.train.Example(features=features).SerializeToString()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same images in memory, as PNG files and as records."""
    folder = tmp_path_factory.mktemp("stored")
    records = str(folder / "images.tfrecord")
    with tf.io.TFRecordWriter(records) as writer:
        for index in range(N):
            path = folder / f"{index:02}.png"
            Image.fromarray(ARRAYS.pixels[index]).save(path)
            writer.write(example(path, ARRAYS.labels[index]))
    store = TFRecordStore("images", [(records, 0, N, N)])
    return {
        "arrays": ARRAYS,
        "files": FileImages(list_images(folder)[0], ARRAYS.labels, 3),
        "records": RecordImages(store, np.arange(N), "image", "label", 3, 5),
    }


@pytest.fixture(params=["arrays", "files", "records"])
def images(request, stored):
    return stored[request.param]


@pytest.fixture(params=["files", "records"])
def of_many_sizes(request, tmp_path):
    """Images of different sizes, as files and as records."""
    labels = np.arange(N) % 5
    with tf.io.TFRecordWriter(str(tmp_path / "images.tfrecord")) as writer:
        for index in range(N):
            path = tmp_path / f"{index:02}.png"
            pixels = RANDOM.integers(0, 256, (4 + index % 7, 5 + index % 3, 3), np.uint8)
            Image.fromarray(pixels).save(path)
            writer.write(example(path, labels[index]))
    if request.param == "files":
        return FileImages(list_images(tmp_path)[0], labels, 3)
    store = TFRecordStore("images", [(str(tmp_path / "images.tfrecord"), 0, N, N)])
    return RecordImages(store, np.arange(N), "image", "label", 3, 5)


def take(dataset, count):
    return [tuple(map(np.asarray, batch)) for batch in itertools.islice(dataset, count)]


def pixels_of(images):
    return np.concatenate([x for x, _ in evaluation_batches(images, SPEC)])


@pytest.mark.parametrize("crop", [0.0, 0.3])
def test_images_kept_in_memory_give_the_same_batches(of_many_sizes, images, crop, capsys):
    for split in (of_many_sizes, images):
        kept = keep_in_memory(split)
        assert (kept is split) is isinstance(split, ArrayImages)
        assert len(kept) == N and kept.channels == 3
        batches = (
            training_batches(s, SPEC, **EVERYTHING, inception_crop=crop) for s in (split, kept)
        )
        for (x, y), (kept_x, kept_y) in zip(
            *(take(b, PER_EPOCH + 2) for b in batches), strict=True
        ):
            np.testing.assert_array_equal(kept_x, x)
            np.testing.assert_array_equal(kept_y, y)
    assert f"{N} images are decoded and kept in memory" in capsys.readouterr().err


def test_images_that_do_not_fit_are_not_kept(of_many_sizes, monkeypatch):
    monkeypatch.setattr("keras_mixer.preprocessing.input_pipeline.KEPT_BYTES", 1000)
    assert keep_in_memory(of_many_sizes) is of_many_sizes
    monkeypatch.setattr("keras_mixer.preprocessing.input_pipeline._decoded_size", lambda split: 1)
    assert keep_in_memory(of_many_sizes) is of_many_sizes, "found out while decoding"


@pytest.mark.parametrize("crop", [0.0, 0.3])
def test_batches_do_not_depend_on_how_images_are_stored(stored, crop):
    def seen(images):
        training = training_batches(images, SPEC, **EVERYTHING, inception_crop=crop)
        evaluation = evaluation_batches(images, SPEC, BATCH)
        facts = (len(images), images.channels, images.read_labels())
        return [facts, take(training, PER_EPOCH + 1), take(evaluation, N)]

    for indices in (np.arange(N), RANDOM.integers(0, N, 21)):
        expected, *others = (seen(images.take(indices)) for images in stored.values())
        np.testing.assert_equal(others, [expected] * 2)


def test_taking_images_takes_their_pixels_and_labels(images):
    some, few = RANDOM.integers(0, N, 21), RANDOM.permutation(21)[:9]
    taken = images.take(some)
    np.testing.assert_array_equal(taken.read_labels(), images.read_labels()[some])
    np.testing.assert_array_equal(pixels_of(taken), pixels_of(images)[some])
    assert taken.take(few).digest() == images.take(some[few]).digest() != taken.digest()


def order(seed, steps):
    positions = tf.reshape(tf.range(steps * BATCH, dtype=tf.int64), (steps, BATCH))
    return np.array([shuffled_index(p, seed=seed, count=N, batch_size=BATCH) for p in positions])


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = order(seed=3, steps=3 * PER_EPOCH).reshape(3, PER_EPOCH * BATCH)
    for epoch in epochs:
        assert len(set(epoch)) == PER_EPOCH * BATCH
        assert set(epoch) <= set(range(N))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    assert set(epochs[0]) != set(epochs[1]), "the images left out change, too"


def test_order_follows_the_seed():
    assert (order(3, PER_EPOCH) == order(3, PER_EPOCH)).all()
    assert (order(3, PER_EPOCH) != order(4, PER_EPOCH)).any()


def orders(seed, count, batch_size, epochs):
    """Returns the order of whole epochs, int array `(epochs, images)`."""
    per_epoch = count // batch_size * batch_size

    @tf.function
    def one(epoch):
        positions = tf.range(per_epoch, dtype=tf.int64) + epoch * per_epoch
        return shuffled_index(positions, seed=seed, count=count, batch_size=batch_size)

    return np.array([one(tf.constant(epoch, tf.int64)) for epoch in range(epochs)])


@pytest.mark.parametrize("count, batch_size", [(90, 8), (1293, 64), (4096, 128)])
def test_batches_are_as_mixed_as_at_random(count, batch_size):
    """Classes lie side by side in folders, so a weak shuffle gives batches of few classes.

    With the 4 rounds of `index_shuffle`, epoch 13 of any seed varied 7 to 10 times as much.
    """
    labels = np.arange(count) * 10 // count
    random = np.random.default_rng(0)

    def variances(orders):
        batches = labels[orders].reshape(len(orders), -1, batch_size)
        counts = (batches[..., None] == np.arange(10)).sum(2)  # (epochs, batches, classes)
        return counts.var(axis=(1, 2))

    per_epoch = count // batch_size * batch_size
    reference = variances([random.permutation(count)[:per_epoch] for _ in range(900)])
    found = np.array([variances(orders(seed, count, batch_size, 300)) for seed in (0, 1, 999)])
    np.testing.assert_allclose(found.mean(axis=1), reference.mean(), rtol=0.03)
    assert found.max() < 1.3 * reference.max()


@pytest.mark.parametrize("count", [90, 1293])
def test_orders_do_not_repeat_or_correlate(count):
    """Orders used to repeat every 256 epochs, and every 256 seeds."""
    found = np.concatenate([orders(seed, count, 1, 300) for seed in (5, 5 + 256)])
    assert len(np.unique(found, axis=0)) == len(found)
    places = np.argsort(found, axis=1)
    correlations = np.corrcoef(places)[np.triu_indices(len(places), 1)]
    # Those of random orders have mean 0 and variance 1 / (n - 1).
    assert abs(correlations.mean()) < 0.002
    assert correlations.var() * (count - 1) == pytest.approx(1, abs=0.1)


def test_started_at_any_step_the_rest_is_the_same(images):
    """The pattern of Grain's checkpoint tests: restart at every position, compare the rest."""
    steps = 3 * PER_EPOCH
    whole = take(training_batches(images, SPEC, **EVERYTHING), steps)
    for first in range(0, steps, 1 if images is ARRAYS else 5):
        rest = training_batches(images, SPEC, **EVERYTHING, first_step=first)
        np.testing.assert_equal(take(rest, steps - first), whole[first:])


def test_images_keep_their_labels():
    (images, labels), *_ = take(training_batches(ARRAYS, SPEC, **RECIPE), 1)
    for image, label in zip(images, labels, strict=True):
        pixels = np.round(image * 127.5 + 127.5)
        (index,) = np.flatnonzero((ARRAYS.pixels == pixels).all(axis=(1, 2, 3)))
        assert label.argmax() == ARRAYS.labels[index]


def test_training_is_endless_with_static_shapes(images):
    dataset = training_batches(images, SPEC, **RECIPE)
    # Keras takes an optimizer step too many where the cardinality is unknown (-2).
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    assert dataset.element_spec[0].shape == (BATCH, 6, 6, 3)


@pytest.mark.parametrize("batch_size", [1, 4, 37, 100])
def test_evaluation_counts_every_image_once(images, batch_size):
    dataset = evaluation_batches(images, SPEC, batch_size)
    assert dataset.cardinality() == -(-N // batch_size)
    pixels, labels = map(np.concatenate, zip(*take(dataset, N), strict=True))
    np.testing.assert_allclose(pixels * 127.5 + 127.5, ARRAYS.pixels, atol=1e-4)
    np.testing.assert_array_equal(labels, ARRAYS.labels)
    assert labels.dtype == np.int64


def test_smoothed_labels_sum_to_one():
    _, labels = take(training_batches(ARRAYS, SPEC, **RECIPE, label_smoothing=0.1), 1)[0]
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sort(labels, axis=1), [[0.02] * 4 + [0.92]] * BATCH, rtol=1e-6)


def test_images_are_resized_to_the_shape_of_the_model(images):
    spec = SPEC.replace(architecture=SIZES.replace(image_shape=(12, 4)))
    (train, _), *_ = take(training_batches(images, spec, **EVERYTHING), 1)
    (test, _), *_ = take(evaluation_batches(images, spec, BATCH), 1)
    assert train.shape == test.shape == (BATCH, 12, 4, 3)
    assert np.abs(train).max() <= 1


# === Parts of several processes ===

ALL_RANDOM = {
    "randaugment": (2, 9), "color_jitter": 0.4, "random_erasing": 0.9, "inception_crop": 0.3,
    "class_weights": np.linspace(0.5, 1.5, 5).astype(np.float32),
}  # fmt: skip


@pytest.mark.parametrize(("count", "mixup", "cutmix"), [(2, 0, 0), (3, 0.4, 1)])
def test_parts_one_after_another_are_the_batches(images, count, mixup, cutmix):
    recipe = {**EVERYTHING, **ALL_RANDOM, "mixup": mixup, "cutmix": cutmix, "batch_size": 6}
    whole = take(training_batches(images, SPEC, first_step=4, **recipe), 4)
    parts = [
        take(training_batches(images, SPEC, first_step=4, part=Part(index, count), **recipe), 4)
        for index in range(count)
    ]
    for step, batch in enumerate(whole):
        for values, *pieces in zip(batch, *(part[step] for part in parts), strict=True):
            assert {len(piece) for piece in pieces} == {6 // count}
            np.testing.assert_array_equal(np.concatenate(pieces), values)


@pytest.mark.parametrize("sides", [(7, 5, 3), (6, 6, 1), (8, 4, 3)])
def test_pixels_drawn_for_a_part_are_those_of_the_whole(sides):
    """Sizes that are no multiple of what a counter of Philox gives, and those that are."""
    images, seed = tf.zeros((11, *sides)), tf.constant([5, 2**40], tf.int64)
    expected = sample_pixels(images, seed, 255.0).numpy()
    for indices in ([10, 0, 1, 2], [3, 4, 5], [0], list(range(11)), [9, 2, 3, 7]):
        part = BatchPart(np.array(indices), 11)
        received = sample_pixels(images[: len(indices)], seed, 255.0, part)
        np.testing.assert_array_equal(received, expected[indices])


def test_a_process_reads_no_images_but_its_part(stored, monkeypatch):
    read, original = [], RecordImages.read
    monkeypatch.setattr(RecordImages, "read", lambda s, i: read.extend(i) or original(s, i))
    one_thread = tf.data.Options()  # so that batches are read one after the other
    one_thread.threading.private_threadpool_size = 1
    batches = training_batches(stored["records"], SPEC, part=Part(1, 2), **RECIPE)
    take(batches.with_options(one_thread), 8)
    whole = shuffled_index(np.arange(8 * BATCH), seed=3, count=N, batch_size=BATCH).numpy()
    own = whole.reshape(8, 2, BATCH // 2)[:, 1].ravel()
    assert read[: len(own)] == list(own)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_of_an_evaluation_are_all_images_once(images, count):
    whole = [batch for batch in take(evaluation_batches(images, SPEC, 4), 99)]
    parts = [
        batch
        for index in range(count)
        for batch in take(evaluation_batches(images, SPEC, 4, Part(index, count)), 99)
    ]
    for values, received in zip(zip(*whole, strict=True), zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(received), np.concatenate(values))
