"""Training and validation batches of a run, and of a process's part of them."""

import math

import numpy as np
import tensorflow as tf

from keras_mixer.preprocessing.bad_images import broken_images_named
from keras_mixer.preprocessing.input_pipeline import (
    KEPT_BYTES,
    Part,
    evaluation_batches,
    keep_in_memory,
    training_batches,
)


def training_images(run, step=0):
    """Returns the training images, in memory if a run reads them more than once from a step on."""
    images_left = (run.total_steps - step) * run.config.batch_size
    train = run.dataset.train
    if images_left <= len(train) or run.group.count > 1:  # processes read their parts alone
        return train
    with broken_images_named(train):
        return keep_in_memory(train)


def batches_of(run, images, class_weights=None, first_step=0):
    """Returns the training batches of a run; see `training_batches`."""
    return training_batches(
        images,
        run.spec,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        first_step=first_step,
        label_smoothing=run.config.label_smoothing,
        class_weights=class_weights,
        part=_part_of(run.group),
        **run.config.augmentation(),
    )


def validation_batches(run):
    """Returns batches of validation images and one-hot labels, cached if small; None without."""
    if run.dataset.validation is None:
        return None
    split, sizes = run.dataset.validation, run.spec.architecture
    batches = evaluation_batches(split, run.spec, part=_part_of(run.group))
    values = len(split) * math.prod(sizes.image_shape) * sizes.channels
    if 4 * values <= KEPT_BYTES:  # float32
        batches = batches.cache()
    return batches.map(lambda images, labels: (images, tf.one_hot(labels, sizes.num_classes)))


def _part_of(group):
    return Part(group.index, group.count) if group.count > 1 else None


def balanced_class_weights(run):
    """Returns inverse class frequencies, with mean 1 over the training images; None without."""
    if run.config.class_weights == "none":
        return None
    counts = None
    if run.group.is_main:  # to read the labels of TFRecords takes a pass over the files
        labels = run.dataset.train.read_labels()
        counts = np.bincount(labels, minlength=run.config.num_classes).tolist()
    counts = np.array(run.group.exchange(counts)[0])
    present = counts > 0  # a training split given by the user may lack classes
    weights = counts.sum() / (present.sum() * np.maximum(counts, 1))
    return np.where(present, weights, 0.0).astype(np.float32)


def naming_broken_images(run):
    """Returns a context in which errors name the unreadable images of a run."""
    return broken_images_named(run.dataset.train, run.dataset.validation)
