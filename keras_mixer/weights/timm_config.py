"""Follows the config.json of the Hugging Face hub beside timm's weights.

Values that change results are followed, or refused by name; the `source` lists those that are
missing and assumed. A mean or std other than 0.5 is folded into the stem, so that the model's
inputs are always in [-1, 1].

Source: huggingface/pytorch-image-models, `timm/models/_hub.py` and `timm/data/config.py`.
"""

import json

import numpy as np

from keras_mixer.errors import InputError
from keras_mixer.model.architecture import Preprocessing

# Values of timm's Mixers, except those called miil, by key in config.json.
_ASSUMED = {"mean": 0.5, "std": 0.5, "crop_pct": 0.875, "interpolation": "bicubic"}
_LARGEST_JSON = 4 << 20  # bytes
_BOUNDS = {"mean": (-1000, 1000), "std": (0.001, 1000)}  # for pixels from 0 to 255: 127.5
# Keys of model_args that the weights' shapes show, or that only matter in training.
_SIZES = {
    *("img_size", "in_chans", "num_classes", "patch_size", "num_blocks", "embed_dim"),
    *("mlp_ratio", "drop_rate", "proj_drop_rate", "drop_path_rate"),
}
_INVALID = (
    *(OSError, ValueError, OverflowError, TypeError, AttributeError, LookupError),
    RecursionError,
)


def read_config(path, what):
    """Reads the config.json beside the `Path` of weights.

    Args:
        path: `Path` of the weights.
        what: string. What they are.

    Returns:
        (values, image_shape, source): dict of its values, empty without a file; the (height, width)
        that it declares, or None; and the description of the weights.

    Raises:
        InputError: If it is invalid.
    """
    config = path.with_name("config.json")
    if not config.is_file():
        return {}, None, unconfigured(what)
    try:
        if config.stat().st_size > _LARGEST_JSON:
            raise ValueError("it is too large")
        content = json.loads(config.read_text())
        values = content.pop("pretrained_cfg", {})
        if not isinstance(values, dict):
            raise ValueError("its pretrained_cfg is not an object")
        # Older files have all values at the top; where both have one, timm takes the top's.
        values = {name: v for name, v in (values | content).items() if v is not None}
        assumed = _as_text([name for name in _ASSUMED if name not in values])
        source = f"{what} with its config.json{f' ({assumed})' if assumed else ''}"
        return values, _image_shape(values), source
    except _INVALID as error:
        raise _invalid(config, error) from error


def _invalid(config, error):
    return InputError(f"{config}: invalid timm config ({error}); fix or remove it")


def _as_text(names):
    values = ", ".join(f"{name} {_ASSUMED[name]}" for name in names)
    return f"assumed: {values}" if values else ""


def unconfigured(what):
    """Returns the source of files without a mean and std."""
    return (
        f"{what} without the config.json of the Hugging Face hub beside it ({_as_text(_ASSUMED)}; "
        f"otherwise put it there, or use keras-mixer convert FILE FOLDER --mean=M --std=S)"
    )


def _image_shape(values):
    """Returns (height, width), or None: of model_args, which timm prefers, or of input_size."""
    size = values.get("model_args", {}).get("img_size") or values.get("input_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return int(height), int(width)


def apply_config(path, values, image_shape, spec, arrays):
    """Returns (spec, arrays, note) after applying what `read_config` has read.

    Raises:
        InputError: If a value does not fit the weights, or is not followed here.
    """
    values, sizes = _ASSUMED | values, spec.architecture
    try:
        _check(values, image_shape, sizes)
        crop = 0.0 if values.get("crop_mode") == "squash" else float(values["crop_pct"])
        names = _class_names(values, sizes.num_classes)
        spec = spec.replace(
            preprocessing=Preprocessing(crop, values["interpolation"]), class_names=names
        )
        pair, note = [values["mean"], values["std"]], ""
        if sizes.channels == 1 and any(np.size(value) == 3 for value in pair):  # as in timm
            pair, note = map(np.mean, pair), ", its mean and std averaged to one channel"
        return spec, fold_normalization(arrays, *pair), note
    except (InputError, *_INVALID) as error:
        raise _invalid(path.with_name("config.json"), error) from error


def _check(values, image_shape, sizes):
    """Refuses values that contradict the weights, or that this package does not follow."""
    crop, shape = float(values["crop_pct"]), list(sizes.image_shape)
    declared = list(image_shape or shape)
    arguments = values.get("model_args", {})
    expected = {
        "crop_pct": [crop] if crop else ["a number from 0.1 to 1"],
        "crop_mode": ["center", "squash"] if crop == 1 else ["center"],
        "test_crop_pct": [crop],
        "input_size": [values.get("input_size")] if declared == shape else [[3, *shape]],
        "test_input_size": [[3, *shape], [sizes.channels, *shape]],
        "num_classes": [sizes.num_classes or values.get("num_classes")],
        "label_offset": [0],
        "global_pool": ["avg"],
        "model_args": [{name: v for name, v in arguments.items() if name in _SIZES or not v}],
    }
    if declared != shape:
        values = values | {"input_size": declared}
    for name, allowed in expected.items():
        if name in values and values[name] not in allowed:
            received = f"{name}={values[name]!r:.60}"
            raise ValueError(f"{received}: expected {' or '.join(map(str, allowed))}")


def _class_names(values, count):
    """Returns the names in label_names, a list or a dict from index; None without."""
    names = values.get("label_names") or values.get("labels")
    if not names or not count:
        return None
    if len(names) != count:
        raise ValueError(f"{len(names)} label_names: expected {count}, one for each class")
    return [names[str(i)] for i in range(count)] if isinstance(names, dict) else names


def fold_normalization(arrays, mean, std):
    """Folds timm's normalization into the stem, which then takes images in [-1, 1].

    Args:
        arrays: dict from variable path to array, not modified.
        mean, std: Subtracted from images in [0, 1], and divided by: a sequence of one number for
            each channel, or a number for all.

    Returns:
        dict of arrays; the same if mean and std are 0.5.

    Raises:
        InputError: If they are not one number for each channel, or out of bounds.
    """
    kernel = arrays["stem/kernel"].astype(np.float64)
    mean = _per_channel("mean", mean, kernel.shape[2])
    std = _per_channel("std", std, kernel.shape[2])
    if (mean == 0.5).all() and (std == 0.5).all():
        return arrays
    shift = (kernel * ((0.5 - mean) / std)[:, None]).sum((0, 1, 2))
    return arrays | {
        "stem/kernel": (kernel * (0.5 / std)[:, None]).astype(np.float32),
        "stem/bias": (arrays["stem/bias"] + shift).astype(np.float32),
    }


def _per_channel(name, values, channels):
    low, high = _BOUNDS[name]
    array = np.array(values, np.float64)
    array = np.repeat(array, channels) if array.ndim == 0 else array
    if array.shape != (channels,) or not ((low <= array) & (array <= high)).all():
        received = ",".join(map("{:g}".format, array.ravel()))
        raise InputError(
            f"{name}={received:.60}: expected one number for each of {channels} channels, from "
            f"{low} to {high}"
        )
    return array
