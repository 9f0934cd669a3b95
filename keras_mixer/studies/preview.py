"""A contact sheet of training images: what they are, and what the model will be shown of them."""

import numpy as np
from PIL import Image, ImageDraw

from keras_mixer.data.pipeline import evaluation_batches, shuffled_index, training_batches

SMALLEST_TILE = 96  # pixels; smaller images are enlarged by a whole factor
CAPTION = 14  # pixels of height


def contact_sheet(run, images, draws):
    """Draws a row for each of a few training images: as evaluation sees it, then augmented draws.

    The pipeline is that of the run, over these images alone: MixUp and CutMix pair them with each
    other. Captions name the label, or the shares of a mixed one.

    Args:
        run: `training.run.Run`; nothing in its directory is needed or touched.
        images: int. Rows; the images are spread evenly over the training split.
        draws: int. Augmented columns; each is of another epoch.

    Returns:
        A PIL image.
    """
    few = run.source.train.take(np.linspace(0, len(run.source.train) - 1, images).astype(int))
    plain = evaluation_batches(
        few, batch_size=images, **_shape(run), eval_crop=run.config.eval_crop
    )
    columns = [next(iter(plain)), *_epochs(run, few, draws)]
    height, width = run.config.image_shape
    factor = max(1, -(-SMALLEST_TILE // width))
    cell = (factor * width + 4, factor * height + 4 + CAPTION)
    sheet = Image.new("RGB", (len(columns) * cell[0], images * cell[1]), "white")
    for column, (pixels, labels) in enumerate(columns):
        for row in range(images):
            corner = (column * cell[0] + 2, row * cell[1] + 2)
            sheet.paste(_tile(np.asarray(pixels[row]), factor), corner)
            caption = _caption(np.asarray(labels[row]), run.source.class_names)
            place = (corner[0], corner[1] + factor * height)
            ImageDraw.Draw(sheet).text(place, caption[: cell[0] // 6], fill="black")
    return sheet


def _shape(run):
    names = ("image_shape", "num_classes")
    return {name: getattr(run.config, name) for name in names} | {"channels": run.source.channels}


def _epochs(run, few, draws):
    """Yields the training batch of each epoch, its images in the order of the split."""
    count = len(few)
    preparation = run.config.preparation() | {"batch_size": count, "label_smoothing": 0.0}
    batches = training_batches(few, channels=run.source.channels, **preparation)
    for epoch, (pixels, labels) in enumerate(batches.take(draws)):
        positions = np.arange(epoch * count, (epoch + 1) * count)
        order = shuffled_index(positions, seed=run.config.seed, count=count, batch_size=count)
        places = np.argsort(order)
        yield np.asarray(pixels)[places], np.asarray(labels)[places]


def _tile(pixels, factor):
    levels = np.clip(np.round(pixels * 127.5 + 127.5), 0, 255).astype(np.uint8)
    tile = Image.fromarray(levels.squeeze()).convert("RGB")
    return tile.resize((factor * tile.width, factor * tile.height), Image.Resampling.NEAREST)


def _caption(shares, class_names):
    """The class, or the two largest shares of a mixed label."""
    first, second = np.argsort(-shares)[:2]
    if shares[first] > 0.995:
        return class_names[first]
    return f"{shares[first]:.0%} {class_names[first]} {shares[second]:.0%} {class_names[second]}"
