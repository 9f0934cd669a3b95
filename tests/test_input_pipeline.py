"""Tests `keras_mixer/data/pipeline.py`: the order is a pure function of (seed, epoch, index)."""

import itertools
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_mixer.preprocessing.input_pipeline import evaluation_batches, shuffled_index, training_batches
from keras_mixer.data.splits import Split

N, BATCH = 37, 4
PER_EPOCH = N // BATCH
RANDOM = np.random.default_rng(0)
SPLIT = Split(RANDOM.integers(0, 256, (N, 6, 6, 3), np.uint8), np.arange(N) % 5)
SHAPES = {"image_shape": (6, 6), "channels": 3, "num_classes": 5, "batch_size": BATCH}
EVERYTHING = {"seed": 3, "flip": True, "crop_padding": 1, "label_smoothing": 0.1}


@pytest.fixture
def file_split(tmp_path):
    """The same images as files."""
    for index, image in enumerate(SPLIT.images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    paths = np.array([os.fsencode(tmp_path / f"{i}.png") for i in range(N)])
    return Split(paths, SPLIT.labels)


def take(dataset, count):
    return [(x.numpy(), y.numpy()) for x, y in itertools.islice(dataset, count)]


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


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_restarted_at_any_step_it_goes_on_as_if_nothing_happened(kind, file_split):
    """The pattern of Grain's checkpoint tests: restart at every position, compare the rest."""
    split = SPLIT if kind == "arrays" else file_split
    steps = 3 * PER_EPOCH
    whole = take(training_batches(split, **SHAPES, **EVERYTHING), steps)
    for first in range(0, steps, 1 if kind == "arrays" else 5):
        rest = take(
            training_batches(split, **SHAPES, **EVERYTHING, first_step=first), steps - first
        )
        for one, other in zip(whole[first:], rest, strict=True):
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_array_equal(one[1], other[1])


def test_files_and_arrays_give_the_same_batches(file_split):
    for one, other in zip(
        take(training_batches(SPLIT, **SHAPES, **EVERYTHING), 12),
        take(training_batches(file_split, **SHAPES, **EVERYTHING), 12),
        strict=True,
    ):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_images_keep_their_labels():
    (images, labels), *_ = take(training_batches(SPLIT, **SHAPES, seed=3), 1)
    for image, label in zip(images, labels, strict=True):
        pixels = np.round(image * 127.5 + 127.5)
        (index,) = np.flatnonzero((SPLIT.images == pixels).all(axis=(1, 2, 3)))
        assert label.argmax() == SPLIT.labels[index]


def test_endless_with_static_shapes():
    dataset = training_batches(SPLIT, **SHAPES, seed=3)
    # Keras takes an optimizer step too many where the cardinality is unknown (-2).
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    assert dataset.element_spec[0].shape == (BATCH, 6, 6, 3)


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("batch_size", [1, 4, 37, 100])
def test_evaluation_counts_every_image_once(kind, batch_size, file_split):
    split = SPLIT if kind == "arrays" else file_split
    dataset = evaluation_batches(split, **{**SHAPES, "batch_size": batch_size})
    assert dataset.cardinality() == -(-N // batch_size)
    batches = take(dataset, N)
    images = np.concatenate([x for x, _ in batches])
    np.testing.assert_allclose(images * 127.5 + 127.5, SPLIT.images, atol=1e-4)
    labels = np.concatenate([y for _, y in batches])
    np.testing.assert_array_equal(labels, np.eye(5)[SPLIT.labels])


def test_smoothed_labels_sum_to_one():
    _, labels = take(training_batches(SPLIT, **SHAPES, seed=3, label_smoothing=0.1), 1)[0]
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sort(labels, axis=1), [[0.02] * 4 + [0.92]] * BATCH, rtol=1e-6)


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_images_are_resized_to_the_shape_asked_for(kind, file_split):
    split = SPLIT if kind == "arrays" else file_split
    shapes = {**SHAPES, "image_shape": (12, 4)}
    (train, _), *_ = take(training_batches(split, **shapes, **EVERYTHING), 1)
    (test, _), *_ = take(evaluation_batches(split, **shapes), 1)
    assert train.shape == test.shape == (BATCH, 12, 4, 3)
    assert np.abs(train).max() <= 1


def test_evaluation_is_never_augmented():
    assert not {"flip", "crop_padding", "label_smoothing"} & set(
        evaluation_batches.__kwdefaults__ or {}
    )
