"""Adapts pretrained weights to another image or patch shape: stem kernel and token mixing.

The stem kernel is resampled as in FlexiViT (Beyer et al. 2022, arXiv 2212.08013, section 3.4): with
B the matrix that resizes a patch, the new kernel is `pinv(B.T) @ kernel`. A resized patch then
keeps its embedding: exactly if patches grow, in the least-squares sense if they shrink.

Token mixing is interpolated or tiled. Interpolation, with D a matrix that resizes the new grid to
the old one, and U the old one to the new one:

    new_mixing(x) = U @ mixing(D @ x)

The new weights are `D.T @ kernel` for the first layer, `kernel @ U.T` and `U @ bias` for the
second. Along each axis, in the direction that enlarges, a new cell is the mean of the old cells it
overlaps, weighted by the overlap; the other matrix is the pseudo-inverse. Then resizing there and
back changes nothing: `D @ U = 1` if the grid grows, and a token grid that was enlarged is mixed
exactly as before. For integer factors these are nearest neighbors and box means. Rows of both sum
to 1, so constant grids stay constant. (Bilinear matrices in both directions would blur every
mixing: up to 17 points less accuracy before training on Fashion-MNIST.)

Tiling (paper, appendix C): a grid that grows by integer factors is divided into tiles of the old
grid, each mixed by a copy of the old weights. Weights between tiles are zero, so that tiles do not
interact before training.
"""

import numpy as np

from keras_mixer.errors import InputError
from keras_mixer.model.variants import MIXER

RESIZE_TOKENS = ("auto", "interpolate", "tile")


def resize_weights(architecture, arrays, image_shape=None, patch_shape=None, method="auto"):
    """Adapts the weights of a Mixer to another image or patch shape.

    Args:
        architecture: `Architecture`.
        arrays: dict from variable path, such as `"stem/kernel"`, to array; not modified.
        image_shape: (height, width) of the new images, in pixels. Defaults to the old shape.
        patch_shape: (height, width) of the new patches, in pixels. Defaults to the old shape.
        method: string, one of `RESIZE_TOKENS`; `"auto"` interpolates.

    Returns:
        (architecture, arrays, changes): the adapted ones, and a list of sentences that describe
        the changes, empty if there are none.

    Raises:
        InputError: If patches do not divide the image, the grid cannot be tiled, the method is
            unknown, or the arrays do not match the architecture.
    """
    adapted = resized_architecture(architecture, image_shape, patch_shape, method)
    arrays, changes = dict(arrays), []
    old_patch, new_patch = architecture.patch_shape, adapted.patch_shape
    if old_patch != new_patch:
        _apply({"stem/kernel": lambda kernel: resize_patches(kernel, new_patch)}, arrays)
        changes.append(
            f"patches of {_text(old_patch)} become {_text(new_patch)}: patch kernels resampled "
            f"so that a resized patch keeps its embedding"
        )
    if architecture.token_mixing and architecture.grid != adapted.grid:
        resize = _tiling if method == "tile" else _interpolation
        _apply(resize(architecture.grid, adapted.grid), arrays)
        changes.append(_describe(architecture, adapted, method))
    return adapted, arrays, changes


def resized_architecture(architecture, image_shape=None, patch_shape=None, method="auto"):
    """Returns the `Architecture` that `resize_weights` returns. Args, Raises: As there."""
    if method not in RESIZE_TOKENS:
        raise InputError(f"--resize_tokens={method}: expected one of {', '.join(RESIZE_TOKENS)}")
    adapted = architecture.replace(
        image_shape=image_shape or architecture.image_shape,
        patch_shape=patch_shape or architecture.patch_shape,
    )
    if architecture.model != MIXER and adapted != architecture:
        raise InputError(
            f"only weights of a Mixer are adapted to other images or patches, and this is a "
            f"baseline (--model={architecture.model}) for images of "
            f"{_text(architecture.image_shape)}; leave --image_shape and --patch_shape out"
        )
    if method != "tile":
        return adapted
    old, new = architecture.grid, adapted.grid
    if new[0] % old[0] or new[1] % old[1]:
        raise InputError(
            f"--resize_tokens=tile: a grid of {_text(old)} patches does not tile one of "
            f"{_text(new)}; choose --image_shape and --patch_shape that make integer multiples of "
            f"it, or --resize_tokens=interpolate"
        )
    tiles = adapted.patches // architecture.patches if architecture.token_mixing else 1
    return adapted.replace(tokens_mlp_dim=adapted.tokens_mlp_dim * tiles)


def _text(shape):
    return "×".join(map(str, shape))


def _describe(architecture, adapted, method):
    old, new = architecture.grid, adapted.grid
    grids = f"a grid of {_text(old)} patches becomes {_text(new)}"
    if method != "tile":
        return f"{grids}: token mixing interpolated, tokens_mlp_dim unchanged"
    before, after = architecture.tokens_mlp_dim, adapted.tokens_mlp_dim
    factors = (new[0] // old[0], new[1] // old[1])
    return (
        f"{grids}: token mixing tiled {_text(factors)}, tokens_mlp_dim {before} becomes {after}; "
        f"it needs training, because every tile is mixed as if it were a whole image"
    )


def _apply(functions, arrays):
    """Applies functions, keyed by the ending of array names, in float64."""
    for name, array in arrays.items():
        for ending, function in functions.items():
            if name.endswith(ending):
                arrays[name] = function(np.asarray(array, np.float64)).astype(array.dtype)


# === Token mixing ===


def _tiling(old, new):
    """Returns functions that make block-diagonal weights (appendix C), by array name.

    The paper orders patches tile by tile; here they are row-major, as in the stem: the axes are
    (tile row, row, tile column, column). Hidden units are ordered tile by tile.
    """
    (rows, columns), down, across = old, new[0] // old[0], new[1] // old[1]

    def first(kernel):  # (patches, hidden)
        blocks = np.einsum(
            "uvh,ia,jb->iujvabh", kernel.reshape(rows, columns, -1), np.eye(down), np.eye(across)
        )
        return blocks.reshape(new[0] * new[1], -1)

    def second_bias(bias):  # (patches,)
        return np.tile(bias.reshape(rows, columns), (down, across)).ravel()

    return {
        "token_mixing/dense_0/kernel": first,
        "token_mixing/dense_0/bias": lambda bias: np.tile(bias, down * across),
        "token_mixing/dense_1/kernel": lambda kernel: first(kernel.T).T,
        "token_mixing/dense_1/bias": second_bias,
    }


def _interpolation(old, new):
    """Returns functions that interpolate weights, by array name; see the top of this file."""
    axes = [_there_and_back(*sides) for sides in zip(old, new, strict=True)]
    to_new, to_old = (np.kron(*matrices) for matrices in zip(*axes, strict=True))
    return {
        "token_mixing/dense_0/kernel": lambda kernel: to_old.T @ kernel,
        "token_mixing/dense_1/kernel": lambda kernel: kernel @ to_new.T,
        "token_mixing/dense_1/bias": lambda bias: to_new @ bias,
    }


def _there_and_back(old, new):
    """Returns the matrices `(new, old)` and `(old, new)` that resize one axis of the grid."""
    if new < old:
        return _there_and_back(new, old)[::-1]
    enlarge = shared_lengths(old, new)
    return enlarge, np.linalg.pinv(enlarge)


# === Patch kernels ===


def resize_patches(kernel, patch_shape):
    """Resamples a patch kernel, so that resized patches keep their embedding (FlexiViT).

    Args:
        kernel: array `(height, width, channels, dim)`.
        patch_shape: (height, width) of the new patches, in pixels.

    Returns:
        array `(*patch_shape, channels, dim)`: the least-squares solution of minimum norm, for
        patches of uncorrelated pixels.
    """
    # pinv((A ⊗ B).T) = pinv(A.T) ⊗ pinv(B.T), so height and width are separate.
    down, across = (
        np.linalg.pinv(resize_matrix(old, new).T)
        for old, new in zip(kernel.shape[:2], patch_shape, strict=True)
    )
    return np.einsum("ah,bw,hwcd->abcd", down, across, kernel, optimize=True)


# === Resizing as a matrix ===


def resize_matrix(old, new):
    """Returns the matrix that resizes a row of `old` pixels to `new` ones, as `resize_images` does.

    Bilinear and antialiased: a triangle kernel around the center of each new pixel, its half-width
    the larger of the old and new pixel size, clipped at the border and normalized.

    Returns:
        float64 array `(new, old)`; every row sums to 1. The identity if `old == new`.

    Reference:
        `ScaleAndTranslate` of TensorFlow, which `tf.image.resize(antialias=True)` calls.
    """
    pitch = old / new
    centers = (np.arange(new)[:, None] + 0.5) * pitch
    distances = np.abs(np.arange(old) + 0.5 - centers) / max(pitch, 1.0)
    weights = np.maximum(1.0 - distances, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def shared_lengths(old, new):
    """Returns the matrix that resizes a row of `old` cells to `new` ones by the lengths they share.

    Returns:
        float64 array `(new, old)`; every row sums to 1.
    """
    old_edges, new_edges = np.arange(old + 1) * new, (np.arange(new + 1) * old)[:, None]
    ends = np.minimum(old_edges[1:], new_edges[1:])
    starts = np.maximum(old_edges[:-1], new_edges[:-1])
    return np.maximum(ends - starts, 0) / old
