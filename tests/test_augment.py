"""Tests `keras_mixer/data/augment.py`, eagerly and inside tf.data."""

import numpy as np
import pytest
import tensorflow as tf

from keras_mixer.data.augment import augment, random_flip, random_padded_crop

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3), np.uint8)


def both_ways(function):
    """Runs a function of images eagerly and inside tf.data, and returns the one result."""
    eager = function(tf.constant(IMAGES)).numpy()
    dataset = tf.data.Dataset.from_tensors(IMAGES).map(function)
    np.testing.assert_array_equal(next(iter(dataset)), eager)
    return eager


def test_flip_gives_each_image_or_its_mirror():
    flipped = both_ways(lambda images: random_flip(images, (3, 7)))
    is_same = (flipped == IMAGES).all(axis=(1, 2, 3))
    is_mirror = (flipped == IMAGES[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (is_same | is_mirror).all()
    assert 16 < is_mirror.sum() < 48  # of 64; 4 standard deviations are 16


def test_padded_crop_is_a_window_of_the_padded_image():
    padding = 2
    cropped = both_ways(lambda images: random_padded_crop(images, (3, 7), padding))
    padded = np.pad(IMAGES, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    places = set()
    for image, result in zip(padded, cropped, strict=True):
        fitting = [
            (y, x)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            if np.array_equal(image[y : y + 6, x : x + 5], result)
        ]
        assert len(fitting) == 1
        places.update(fitting)
    assert {y for y, _ in places} == {x for _, x in places} == set(range(5))


@pytest.mark.parametrize("options", [{"flip": True}, {"crop_padding": 2}])
def test_draws_follow_the_seed_and_the_step(options):
    def once(seed):
        return augment(tf.constant(IMAGES), tf.constant(seed, tf.int64), **options).numpy()

    np.testing.assert_array_equal(once((1, 5)), once((1, 5)))
    assert (once((1, 5)) != once((1, 6))).any()
    assert (once((1, 5)) != once((2, 5))).any()


def test_nothing_asked_for_changes_nothing():
    np.testing.assert_array_equal(augment(tf.constant(IMAGES), (0, 0)), IMAGES)


def test_flip_and_crop_draw_apart():
    """With one seed for both, flipped images would always be cropped at the same places."""
    seed = tf.constant((1, 5), tf.int64)
    both = augment(tf.constant(IMAGES), seed, flip=True, crop_padding=2).numpy()
    flipped = augment(tf.constant(IMAGES), seed, flip=True).numpy()
    padded = np.pad(flipped, ((0, 0), (2, 2), (2, 2), (0, 0)))
    is_mirror = (flipped != IMAGES).any(axis=(1, 2, 3))
    columns = np.array([
        next(x for y in range(5) for x in range(5) if np.array_equal(p[y : y + 6, x : x + 5], r))
        for p, r in zip(padded, both, strict=True)
    ])  # fmt: skip
    assert len(set(columns[is_mirror])) == len(set(columns[~is_mirror])) == 5
