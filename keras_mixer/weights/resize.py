"""Adapts pretrained weights to another image or patch shape: stem kernel and token mixing.

The stem kernel is resampled as in FlexiViT (Beyer et al. 2022, arXiv 2212.08013, section 3.4): with
B the matrix that resizes a patch, the new kernel is `pinv(B.T) @ kernel`. So a resized patch keeps
its embedding: exactly if patches grow, in the least-squares sense if they shrink.

Token mixing is tiled or interpolated. Tiled (paper, appendix C): a grid that grows by integer
factors is divided into tiles of the old grid, each mixed by a copy of the old weights. Weights
between tiles are zero, so that tiles do not interact before training. Interpolated, with D the
matrix that resizes the new grid to the old one, and U the old one to the new one:

    new_mixing(x) = U @ mixing(D @ x)

The new weights are `D.T @ kernel` for the first layer, `kernel @ U.T` and `U @ bias` for the
second. In the middle of the grid, `D.T @ kernel` is the kernel resized as an image and multiplied
by S/S', the old over the new number of patches, to keep the weighted sum; at the border it keeps
the sum exactly, unlike resizing.

All matrices resize as `preprocessing.resize.resize_images`: bilinear and antialiased. Their weights
are never negative, so constant inputs stay constant and nothing overshoots, as bicubic weights
would at the border of small grids.
"""

from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError
from keras_mixer.weights.tensor_layouts import expected_shapes

RESIZE_TOKENS = ("auto", "tile", "interpolate")


def resize_weights(architecture, arrays, image_shape=None, patch_shape=None, method="auto"):
    """Adapts the weights of a Mixer to another image or patch shape.

    Args:
        architecture: `Architecture`.
        arrays: dict from variable path, such as `"stem/kernel"`, to array; not modified.
        image_shape: (height, width) of the new images, in pixels. Defaults to the old shape.
        patch_shape: (height, width) of the new patches, in pixels. Defaults to the old shape.
        method: string, one of `RESIZE_TOKENS`. `"auto"` tiles if the grid grows by integer
            factors, and interpolates otherwise.

    Returns:
        (architecture, arrays, changes): the adapted ones, and a list of sentences that describe
        the changes, empty if there are none.

    Raises:
        InputError: If patches do not divide the image, the grid cannot be tiled, the method is
            unknown, or the arrays do not match the architecture.
    """
    adapted = resized_architecture(architecture, image_shape, patch_shape, method)
    arrays, changes = dict(arrays), []
    if adapted == architecture:
        return adapted, arrays, changes
    _check_arrays(architecture, arrays)
    old_patch, new_patch = architecture.patch_shape, adapted.patch_shape
    if old_patch != new_patch:
        _apply({"stem/kernel": lambda kernel: resize_patches(kernel, new_patch)}, arrays)
        changes.append(
            f"patches of {_text(old_patch)} become {_text(new_patch)}: patch kernels resampled "
            f"so that a resized patch keeps its embedding"
        )
    change = _change(architecture, adapted, method)
    if architecture.token_mixing and change.old != change.new:
        _apply(_TOKENS[change.method](change), arrays)
        changes.append(_describe(architecture, adapted, change))
    return adapted, arrays, changes


def resized_architecture(architecture, image_shape=None, patch_shape=None, method="auto"):
    """Returns the `Architecture` that `resize_weights` returns. Args, Raises: As there."""
    if method not in RESIZE_TOKENS:
        raise InputError(f"--resize_tokens={method}: expected one of {', '.join(RESIZE_TOKENS)}")
    adapted = architecture.replace(
        image_shape=image_shape or architecture.image_shape,
        patch_shape=patch_shape or architecture.patch_shape,
    )
    change = _change(architecture, adapted, method)
    if architecture.token_mixing and change.method == "tile":
        tiles = change.factors[0] * change.factors[1]
        return adapted.replace(tokens_mlp_dim=adapted.tokens_mlp_dim * tiles)
    return adapted


class _Change(NamedTuple):
    """Old and new patch grid, both (rows, columns), and the method: tile or interpolate."""

    old: tuple[int, int]
    new: tuple[int, int]
    method: str

    @property
    def factors(self):
        return self.new[0] // self.old[0], self.new[1] // self.old[1]


def _change(architecture, adapted, method):
    old, new = architecture.grid, adapted.grid
    divisible = not (new[0] % old[0] or new[1] % old[1])
    if method == "tile" and not divisible:
        raise InputError(
            f"--resize_tokens=tile: a grid of {_text(old)} patches does not tile one of "
            f"{_text(new)}; choose --image_shape and --patch_shape that make whole multiples of "
            f"it, or --resize_tokens=interpolate"
        )
    chosen = ("tile" if divisible else "interpolate") if method == "auto" else method
    return _Change(old, new, chosen)


def _text(shape):
    return "×".join(map(str, shape))


def _describe(architecture, adapted, change):
    grids = f"a grid of {_text(change.old)} patches becomes {_text(change.new)}"
    if change.method == "interpolate":
        return f"{grids}: token mixing interpolated, tokens_mlp_dim stays as it is"
    before, after = architecture.tokens_mlp_dim, adapted.tokens_mlp_dim
    return (
        f"{grids}: token mixing tiled {_text(change.factors)}, "
        f"tokens_mlp_dim {before} becomes {after}; it needs training, since every tile is mixed as "
        f"if it were a whole image"
    )


def _apply(table, arrays):
    """Applies functions, keyed by the ending of array names, in float64."""
    for name, array in arrays.items():
        for ending, function in table.items():
            if name.endswith(ending):
                arrays[name] = function(np.asarray(array, np.float64)).astype(array.dtype)


def _check_arrays(architecture, arrays):
    shapes = expected_shapes(architecture)
    for name, array in arrays.items():
        expected = shapes.get(name, array.shape)
        if array.shape != expected:
            raise InputError(
                f"the weights to resize do not fit their description: {name} {array.shape}, "
                f"expected {expected}"
            )


# === Token mixing ===


def _tiling(change):
    """Block-diagonal weights (appendix C), by array name.

    The paper orders patches tile by tile; here they are row-major, as the stem's are: the axes are
    (tile row, row, tile column, column). Hidden units are ordered tile by tile.
    """
    (rows, columns), (down, across) = change.old, change.factors
    tiles, patches = down * across, change.new[0] * change.new[1]

    def first(kernel):  # (patches, hidden)
        blocks = np.einsum(
            "uvh,ia,jb->iujvabh", kernel.reshape(rows, columns, -1), np.eye(down), np.eye(across)
        )
        return blocks.reshape(patches, -1)

    def second_bias(bias):  # (patches,)
        return np.tile(bias.reshape(rows, columns), (down, across)).ravel()

    return {
        "token_mixing/dense_0/kernel": first,
        "token_mixing/dense_0/bias": lambda bias: np.tile(bias, tiles),
        "token_mixing/dense_1/kernel": lambda kernel: first(kernel.T).T,
        "token_mixing/dense_1/bias": second_bias,
    }


def _interpolation(change):
    """Interpolated weights, by array name; see the top of this file."""
    to_old = _resize_matrix_2d(change.new, change.old)  # (old patches, new patches)
    to_new = _resize_matrix_2d(change.old, change.new)  # (new patches, old patches)
    return {
        "token_mixing/dense_0/kernel": lambda kernel: to_old.T @ kernel,
        "token_mixing/dense_1/kernel": lambda kernel: kernel @ to_new.T,
        "token_mixing/dense_1/bias": lambda bias: to_new @ bias,
    }


_TOKENS = {"tile": _tiling, "interpolate": _interpolation}


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


def _resize_matrix_2d(old, new):
    """Returns the matrix that resizes a row-major grid of (rows, columns)."""
    return np.kron(*(resize_matrix(*sides) for sides in zip(old, new, strict=True)))
