"""Fixed permutations of the pixels of images: the paper's study of inductive biases.

A Mixer that is trained on images with permuted patches, and pixels permuted within patches, learns
as well as on the images themselves: nothing in it knows where a patch is, or a pixel in its patch.
A permutation of all pixels tears patches apart. Neither leaves a convolution what it needs.

Of a model trained on ordinary images, accuracy on permuted ones (`--permute` of evaluate) only says
how much it relies on the order.

Reference:
    Tolstikhin et al. 2021, section 3.4 and figure 4, https://arxiv.org/abs/2105.01601.
"""

import numpy as np

from keras_mixer.errors import InputError


def permute(images, kind, patch_shape, seed):
    """Permutes the pixels of images, all in the same way; channels stay together.

    Args:
        images: array `(batch, height, width, channels)` of any type.
        kind: string, one of `KINDS`. "patches+pixels": patches are put in another order, and the
            pixels of each patch, in an order that all patches share. "global": all pixels of an
            image are put in another order.
        patch_shape: (height, width) of a patch, which divide those of the image; not used by
            "global".
        seed: int, not negative.

    Returns:
        array of the same shape and type.

    Raises:
        InputError: If patches do not divide the image.
    """
    batch, height, width, channels = images.shape
    order = pixel_order(kind, (height, width), patch_shape, seed)
    return images.reshape(batch, -1, channels)[:, order].reshape(images.shape)


def pixel_order(kind, image_shape, patch_shape, seed):
    """Returns which pixel `permute` puts at each place.

    Args:
        kind: string, one of `KINDS`.
        image_shape: (height, width) of an image.
        patch_shape: (height, width) of a patch.
        seed: int, not negative.

    Returns:
        int array `(height * width,)`, a permutation of indices of pixels in row-major order.
    """
    # NumPy promises the numbers of this generator for ever.
    generator = np.random.RandomState([seed, *kind.encode()])
    return _ORDERS[kind](image_shape, patch_shape, generator)


def _patches_and_pixels(image_shape, patch_shape, generator):
    if any(side % part for side, part in zip(image_shape, patch_shape, strict=True)):
        raise InputError(f"patches of {patch_shape} pixels do not divide images of {image_shape}")
    (height, width), (rows, columns) = image_shape, patch_shape
    grid = (height // rows, rows, width // columns, columns)
    # One row for each patch, with the indices of its pixels.
    patches = np.arange(height * width).reshape(grid).swapaxes(1, 2).reshape(-1, rows * columns)
    patches = generator.permutation(patches)[:, generator.permutation(rows * columns)]
    shape = (height // rows, width // columns, rows, columns)
    return patches.reshape(shape).swapaxes(1, 2).ravel()


def _global(image_shape, patch_shape, generator):
    return generator.permutation(image_shape[0] * image_shape[1])


_ORDERS = {"patches+pixels": _patches_and_pixels, "global": _global}
KINDS = tuple(_ORDERS)
