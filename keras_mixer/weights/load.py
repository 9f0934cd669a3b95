"""Builds models with pretrained weights, and gets and sets the weights of a model."""

from keras.ops import convert_to_numpy

from keras_mixer.model.mixer import build_mixer
from keras_mixer.weights.pretrained import adapt_pretrained, announce, read_pretrained
from keras_mixer.weights.tensor_layouts import check_fit

HEAD = ("head/kernel", "head/bias")


def load_mixer(path, image_shape=None, patch_shape=None, resize_tokens="auto", **overrides):
    """Loads a Mixer with pretrained weights, and adapts it to another image or patch shape.

    Args:
        path: A run directory, its best/, an official .npz of either layout, timm's .safetensors or
            .pth (which needs torch), a .keras or .weights.h5 of a `build_mixer` model, or
            `official:NAME`, a key of `registry.OFFICIAL`, which is downloaded once.
        image_shape: (height, width) of the new images, in pixels. Required if the file does not
            determine its own, that is, if its patch grid is not square. Defaults to the
            checkpoint's.
        patch_shape: (height, width) of the new patches, in pixels. Defaults to the checkpoint's.
        resize_tokens: string, one of `resize.RESIZE_TOKENS`. How token mixing is adapted:
            `"tile"` as in the paper's appendix C, for fine-tuning; `"interpolate"`, for use without
            training; or `"auto"`, which tiles if the grid grows by integer factors.
        **overrides: Further arguments for `build_mixer` that do not change the weights, such as
            `dtype` or `dropout`.

    Returns:
        A functional `keras.Model`; see `build_mixer`. Its attribute `spec` is its `ModelSpec`.

    Raises:
        InputError: If the weights cannot be read, do not fit the model, or cannot be adapted.
    """
    pretrained = announce(read_pretrained(path, image_shape), path)
    adapted = adapt_pretrained(pretrained, image_shape, patch_shape, resize_tokens)
    return build_pretrained(adapted, path, **overrides)


def build_pretrained(pretrained, path, **overrides):
    """Builds the model of a `Pretrained`, read from `path`. Other arguments: As `load_mixer`."""
    model = build_mixer(**vars(pretrained.spec.architecture) | overrides)
    assign_weights(model, pretrained.arrays, path)
    model.spec = pretrained.spec
    return model


def assign_weights(model, arrays, path, new_head=False):
    """Sets all weights of a model.

    Args:
        model: `keras.Model` from `build_mixer`.
        arrays: dict from variable path to array.
        path: File of the arrays, for messages.
        new_head: bool. Keep the model's own head.

    Raises:
        InputError: If names or shapes differ; lists them, see `check_fit`.
    """
    left_out = HEAD if new_head else ()
    wanted = {v.path: v for v in model.weights if v.path not in left_out}
    arrays = {name: array for name, array in arrays.items() if name not in left_out}
    check_fit(
        path,
        {name: array.shape for name, array in arrays.items()},
        {name: tuple(variable.shape) for name, variable in wanted.items()},
    )
    for name, variable in wanted.items():
        variable.assign(arrays[name])


def model_weights(model):
    """Returns a dict from variable path to array, without the states of random generators."""
    return {variable.path: convert_to_numpy(variable.value) for variable in model.weights}
