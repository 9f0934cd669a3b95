"""Google's released Mixers: .npz files in the layout of the official Flax code.

Source of names and shapes: google-research/vision_transformer, `vit_jax/models_mixer.py`. Dense and
convolution kernels have Keras's own layout, so nothing is transposed.
"""

import re
import zipfile
import zlib

import numpy as np

from keras_mixer.errors import InputError

# From the file's names to those of our variables.
_RENAMED = (
    (r"MixerBlock_(\d+)/", r"mixer_block_\1/"),
    (r"LayerNorm_(\d)/", r"layer_norm_\1/"),
    (r"Dense_(\d)/", r"dense_\1/"),
    (r"/scale$", "/gamma"),
    (r"((?:layer_norm_\d|pre_head_layer_norm)/)bias$", r"\1beta"),
)


def read(path, image_shape=None):
    """Reads an official checkpoint.

    Args:
        path: `Path` of the .npz file.
        image_shape: (height, width) in pixels; only needed where the number of patches is no
            square, so that the file cannot tell it.

    Returns:
        (architecture, arrays): `build_mixer` arguments, and a dict from the names of our
        variables to arrays.

    Raises:
        InputError: If the file cannot be read, is not a Mixer, or leaves the image shape open.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {_our_name(name): file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: not a readable .npz checkpoint ({error})") from error
    try:
        return _architecture(path, arrays, image_shape), arrays
    except InputError:
        raise
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not an official Mixer checkpoint ({error})") from error


def _our_name(name):
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _architecture(path, arrays, image_shape):
    height, width, channels, dim = arrays["stem/kernel"].shape
    patches, tokens_mlp_dim = arrays["mixer_block_0/token_mixing/dense_0/kernel"].shape
    return {
        "image_shape": _image_shape(path, patches, (height, width), image_shape),
        "patch_shape": (height, width),
        "channels": channels,
        "depth": sum(name.endswith("/token_mixing/dense_0/kernel") for name in arrays),
        "dim": dim,
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": arrays["mixer_block_0/channel_mixing/dense_0/kernel"].shape[1],
        "num_classes": arrays["head/bias"].shape[0] if "head/bias" in arrays else 0,
        "activation": "gelu",
        "token_mixing": True,
        "channel_mixing": True,
    }


def _image_shape(path, patches, patch_shape, given):
    """The shape of the file's own images, whatever others it is then adapted to."""
    height, width = patch_shape
    side = round(patches**0.5)
    if side * side == patches:
        return side * height, side * width
    if given is None:
        raise InputError(
            f"{path}: its {patches} patches are no square grid, so the file cannot tell the shape "
            f"of its images; load_mixer and train.py take it as image_shape"
        )
    if given[0] % height or given[1] % width or given[0] // height * (given[1] // width) != patches:
        raise InputError(
            f"{path}: its {patches} patches of {height}×{width} pixels are no square grid and do "
            f"not fill --image_shape={given[0]},{given[1]}; give the shape of its own images"
        )
    return tuple(given)
