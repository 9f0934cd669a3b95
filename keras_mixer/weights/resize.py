"""A checkpoint for other images or other patches: token mixing and patch kernels adapted.

Two things in a Mixer depend on the shapes of images and patches. The stem's kernel is a patch of
pixels for every channel; token mixing has a weight for every patch of the grid.

The patch kernel is resampled as FlexiViT does (Beyer et al. 2022, arXiv 2212.08013, section 3.4):
with B the matrix that resizes a patch, the new kernel is `pinv(B.T) @ kernel`. A patch that is
resized has the same embedding then: exactly if it grows, in the least-squares sense if it shrinks.

Token mixing is either tiled or interpolated. Tiled (paper, appendix C): a grid larger by whole
factors is seen as so many tiles of the old one, each mixed by a copy of the old weights, with zeros
between the copies that training fills: before it, no tile knows of another. Interpolated, with D
the matrix that resizes the new grid to the old one and U the one from the old to the new, it
becomes

    new_mixing(x) = U @ mixing(D @ x)

which takes no more than new weights: `D.T @ kernel` for the first layer, `kernel @ U.T` and
`U @ bias` for the second. In the middle of the grid `D.T @ kernel` is the kernel resized as an
image and multiplied by S/S', the old number of patches over the new one, which keeps the weighted
sum as large as it was; at the border it keeps it exactly, which resizing does not.

All matrices are those of `preprocessing.resize.resize_images`, bilinear and antialiased: its
weights are never negative, so that a constant field stays constant and none overshoots, as cubic
ones would at the border of grids of few patches.
"""

from typing import NamedTuple

import numpy as np

from keras_mixer.errors import InputError
from keras_mixer.weights.tensor_layouts import expected_shapes

RESIZE_TOKENS = ("auto", "tile", "interpolate")


def resize_weights(architecture, arrays, image_shape=None, patch_shape=None, method="auto"):
    """Adapts the weights of a Mixer to other images or patches.

    Args:
        architecture: `Architecture`.
        arrays: dict from variable path, such as `"stem/kernel"`, to array; it is left as it is.
        image_shape: (height, width) of the images to come, in pixels. Defaults to those before.
        patch_shape: (height, width) of the patches to come, in pixels. Defaults to those before.
        method: string, one of `RESIZE_TOKENS`. `"auto"` tiles where the grid grows by whole
            factors, and interpolates elsewhere.

    Returns:
        (architecture, arrays, done): of the adapted model, and a list of sentences that say what
        was done; where the shapes are those before, the same arrays and no sentences.

    Raises:
        InputError: If the patch does not divide the image, the grid cannot be tiled, the method is
            unknown, or the arrays are not those of the architecture.
    """
    adapted = resized_architecture(architecture, image_shape, patch_shape, method)
    arrays, done = dict(arrays), []
    if adapted == architecture:
        return adapted, arrays, done
    _check_arrays(architecture, arrays)
    old_patch, new_patch = architecture.patch_shape, adapted.patch_shape
    if old_patch != new_patch:
        _apply({"stem/kernel": lambda kernel: resize_patches(kernel, new_patch)}, arrays)
        done.append(
            f"patches of {_text(old_patch)} become {_text(new_patch)}: patch kernels resampled "
            f"so that a resized patch keeps its embedding"
        )
    change = _change(architecture, adapted, method)
    if architecture.token_mixing and change.old != change.new:
        _apply(_TOKENS[change.method](change), arrays)
        done.append(_sentence(architecture, adapted, change))
    return adapted, arrays, done


def resized_architecture(architecture, image_shape=None, patch_shape=None, method="auto"):
    """Returns what `resize_weights` makes of an architecture, without its weights.

    Args:
        architecture: `Architecture`.
        image_shape: (height, width) in pixels. Defaults to the architecture's.
        patch_shape: (height, width) in pixels. Defaults to the architecture's.
        method: string, one of `RESIZE_TOKENS`.

    Raises:
        InputError: As `resize_weights` does.
    """
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
    """From one grid of patches to another, both (rows, columns), and how: tile or interpolate."""

    old: tuple[int, int]
    new: tuple[int, int]
    method: str

    @property
    def factors(self):
        return self.new[0] // self.old[0], self.new[1] // self.old[1]


def _change(architecture, adapted, method):
    old, new = architecture.grid, adapted.grid
    whole = not (new[0] % old[0] or new[1] % old[1])
    if method == "tile" and not whole:
        raise InputError(
            f"--resize_tokens=tile: a grid of {_text(old)} patches does not tile one of "
            f"{_text(new)}; choose --image_shape and --patch_shape that make whole multiples of "
            f"it, or --resize_tokens=interpolate"
        )
    chosen = ("tile" if whole else "interpolate") if method == "auto" else method
    return _Change(old, new, chosen)


def _text(shape):
    return "×".join(map(str, shape))


def _sentence(architecture, adapted, change):
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
    """Replaces every array whose name ends as the table says. Computed in float64."""
    for name, array in arrays.items():
        for ending, function in table.items():
            if name.endswith(ending):
                arrays[name] = function(np.asarray(array, np.float64)).astype(array.dtype)


def _check_arrays(architecture, arrays):
    """Refuses weights whose shapes are not those of the architecture."""
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
    """The block-diagonal weights of appendix C, for patches in row-major order.

    The paper counts patches tile by tile; here the axes (tile row, row, tile column, column) put
    them in the order in which the stem's patches lie. Hidden units count tile by tile.
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
    """The first layer reads the new grid resized to the old one; the second one's output grows."""
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
    """Resamples a patch kernel, so that a patch resized alike has the same embedding.

    Args:
        kernel: array `(height, width, channels, dim)`.
        patch_shape: (height, width) of the patches to come, in pixels.

    Returns:
        array `(*patch_shape, channels, dim)`: of all kernels that come closest to the old
        embeddings, for patches of uncorrelated pixels, the smallest.

    Reference:
        Beyer et al. 2022, "FlexiViT: One Model for All Patch Sizes", arXiv 2212.08013, section 3.4.
    """
    # pinv((A ⊗ B).T) = pinv(A.T) ⊗ pinv(B.T): each side for itself.
    down, across = (
        np.linalg.pinv(resize_matrix(old, new).T)
        for old, new in zip(kernel.shape[:2], patch_shape, strict=True)
    )
    return np.einsum("ah,bw,hwcd->abcd", down, across, kernel, optimize=True)


# === Resizing as a matrix ===


def resize_matrix(old, new):
    """Returns the matrix that resizes a line of pixels, as `resize_images` does.

    Bilinear and antialiased: a triangle around every new pixel's center, as wide as the coarser of
    the two pitches on either side, cut off at the border and scaled to a sum of 1.

    Args:
        old: int. Pixels before.
        new: int. Pixels after.

    Returns:
        float64 array `(new, old)`; every row sums to 1. The identity if the two are equal.

    Reference:
        `ScaleAndTranslate` of TensorFlow, which `tf.image.resize(antialias=True)` calls.
    """
    pitch = old / new
    centers = (np.arange(new)[:, None] + 0.5) * pitch
    distances = np.abs(np.arange(old) + 0.5 - centers) / max(pitch, 1.0)
    weights = np.maximum(1.0 - distances, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _resize_matrix_2d(old, new):
    """The same for a grid of (rows, columns), in row-major order on both sides."""
    return np.kron(*(resize_matrix(*sides) for sides in zip(old, new, strict=True)))
