"""From a path to a model with pretrained weights, and from a model to its weights as arrays."""

from keras.ops import convert_to_numpy

from keras_mixer.model.mixer import build_mixer
from keras_mixer.weights.pretrained import adapt_pretrained, announce, read_pretrained
from keras_mixer.weights.tensor_layouts import check_fit

HEAD = ("head/kernel", "head/bias")


def load_mixer(path, image_shape=None, patch_shape=None, resize_tokens="auto", **overrides):
    """Loads a Mixer with pretrained weights, adapted to other images or patches if asked for.

    Args:
        path: A run directory, its best/, an official .npz of either layout, timm's .safetensors or
            .pth (which needs torch), a .keras or .weights.h5 of a model of `build_mixer`, or
            `official:NAME`, a key of `registry.OFFICIAL`, which is downloaded once.
        image_shape: (height, width) of the images to come, in pixels. Where it differs from the
            checkpoint's, the weights are adapted, and what was done is printed. Needed where the
            file cannot tell its own, which is when the number of its patches is no square.
            Defaults to the checkpoint's.
        patch_shape: (height, width) of the patches to come, in pixels, likewise.
        resize_tokens: string, one of `resize.RESIZE_TOKENS`. How token mixing is adapted:
            `"tile"` as in the paper's appendix C, to be trained further; `"interpolate"`, to be
            used as it is; or `"auto"`, which tiles where the grid grows by whole factors.
        **overrides: Further arguments for `build_mixer` that leave the weights as they are, such
            as `dtype` or `dropout`.

    Returns:
        A functional `keras.Model`, as `build_mixer` describes it. Its attribute `spec` is its
        `ModelSpec`: architecture, class names, preprocessing, loss.

    Raises:
        InputError: If the weights cannot be read, do not fit the model they describe, or cannot be
            adapted as asked for.
    """
    pretrained = announce(read_pretrained(path, image_shape), path)
    adapted = adapt_pretrained(pretrained, image_shape, patch_shape, resize_tokens)
    return build_pretrained(adapted, path, **overrides)


def build_pretrained(pretrained, path, **overrides):
    """Builds the model of pretrained weights that were read. See `load_mixer`.

    Args:
        pretrained: `Pretrained`.
        path: Where it comes from, for the message.
        **overrides: Further arguments for `build_mixer`.
    """
    model = build_mixer(**vars(pretrained.spec.architecture) | overrides)
    assign_weights(model, pretrained.arrays, path)
    model.spec = pretrained.spec
    return model


def assign_weights(model, arrays, path, new_head=False):
    """Fills every weight of a model from arrays of the same names and shapes.

    Args:
        model: `keras.Model` from `build_mixer`.
        arrays: dict from variable path to array.
        path: Where the arrays come from, for the message.
        new_head: bool. Leave the model's own head as it is.

    Raises:
        InputError: Lists what is missing (-), extra (+) and of another shape (!).
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
    """Returns the model's weights as a dict from variable path to array, without random states."""
    return {variable.path: convert_to_numpy(variable.value) for variable in model.weights}
