"""Contact sheet of training images, without and with the augmentation of a run."""

import numpy as np
from PIL import Image, ImageDraw

from keras_mixer.preprocessing.input_pipeline import (
    evaluation_batches,
    shuffled_index,
    training_batches,
)
from keras_mixer.preprocessing.resize import to_pixels

SMALLEST_TILE = 96  # pixels of width; smaller images are enlarged by a whole factor
CAPTION = 14  # pixels of height


def contact_sheet(run, images, versions):
    """Returns a PIL image: per line a training image as evaluation sees it, then augmented.

    The input pipeline is that of the run, but with these images only, so MixUp and CutMix pair them
    with each other. Captions name the label, or the shares of a mixed one.

    Args:
        run: `Run`; its directory need not exist.
        images: int. Number of images, which are spread evenly over the training split.
        versions: int. Number of augmented versions of each; each version is of another epoch.
    """
    train = run.dataset.train
    few = train.take(np.linspace(0, len(train) - 1, images).astype(int))
    plain = next(iter(evaluation_batches(few, run.spec, images)))
    columns = [plain, *_augmented(run, few, versions)]
    height, width = run.config.image_shape
    factor = max(1, -(-SMALLEST_TILE // width))
    cell = (factor * width + 4, factor * height + 4 + CAPTION)
    sheet = Image.new("RGB", (len(columns) * cell[0], images * cell[1]), "white")
    for column, (pixels, labels) in enumerate(columns):
        for line in range(images):
            corner = (column * cell[0] + 2, line * cell[1] + 2)
            sheet.paste(as_picture(np.asarray(pixels[line]), factor), corner)
            caption = _caption(np.asarray(labels[line]), run.dataset.class_names)
            below = (corner[0], corner[1] + factor * height)
            ImageDraw.Draw(sheet).text(below, caption[: cell[0] // 6], fill="black")
    return sheet


def _augmented(run, few, epochs):
    """Yields a batch `(images, labels)` per epoch, its images in the order of the split."""
    count = len(few)
    batches = training_batches(
        few, run.spec, batch_size=count, seed=run.config.seed, **run.config.augmentation()
    )
    for epoch, (pixels, labels) in enumerate(batches.take(epochs)):
        positions = np.arange(epoch * count, (epoch + 1) * count)
        order = shuffled_index(positions, seed=run.config.seed, count=count, batch_size=count)
        unshuffled = np.argsort(order)
        yield np.asarray(pixels)[unshuffled], np.asarray(labels)[unshuffled]


def as_picture(image, factor=1):
    """Returns an image in [-1, 1], as models take it, as a PIL image enlarged by a factor."""
    pixels = to_pixels(image)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    size = factor * picture.width, factor * picture.height
    return picture.resize(size, Image.Resampling.NEAREST)


def _caption(label, class_names):
    """Returns the class, or the two largest shares of a mixed label."""
    if label.ndim == 0:
        return class_names[label]
    first, second = np.argsort(-label)[:2]
    if label[first] > 0.995:
        return class_names[first]
    return f"{label[first]:.0%} {class_names[first]} {label[second]:.0%} {class_names[second]}"
