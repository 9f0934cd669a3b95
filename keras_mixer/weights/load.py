"""Builds models with pretrained weights, and gets and sets the weights of a model."""

from keras.ops import convert_to_numpy

from keras_mixer.errors import InputError
from keras_mixer.model.baselines import build_model
from keras_mixer.weights.pretrained import adapt_pretrained, log_pretrained, read_pretrained
from keras_mixer.weights.tensor_layouts import check_fit

HEAD = ("head/kernel", "head/bias")
_OPTIONS = ("activation", "dropout", "stochastic_depth", "head_bias", "dtype", "name")


def load_mixer(
    path, image_shape=None, patch_shape=None, resize_tokens="auto", num_classes=None, **options
):
    """Loads a Mixer with pretrained weights, and adapts it to another image or patch shape.

    Args:
        path: A run directory, its best/, or any file of `formats.FORMATS`: an official .npz of
            either layout, timm's .safetensors or .pth (which needs torch), a .keras or .weights.h5
            of a `build_mixer` model; `official:NAME`, a key of `registry.OFFICIAL`, which is
            downloaded once; or `preset:cifar10`, which is part of the package.
        image_shape: (height, width) of the new images, in pixels, or an int for both. Defaults to
            the checkpoint's. Required for a file that only has the number of patches, if the grid
            is not square.
        patch_shape: The same of the new patches. Defaults to the checkpoint's.
        resize_tokens: string, one of `resize.RESIZE_TOKENS`. How token mixing is adapted:
            `"interpolate"`, for use without training and as a better start, or `"tile"`, as in the
            paper's appendix C, which must be trained. `"auto"` interpolates.
        num_classes: int. Number of classes of a new head, initialized to zero; 0 for no head, so
            that the model returns pre-logits. Defaults to the checkpoint's head.
        **options: Further arguments for `build_mixer` that do not change the weights: `dropout`,
            `stochastic_depth`, `dtype`, `name`; `head_bias` for a new head; `activation`, where the
            file does not contain it.

    Returns:
        A functional `keras.Model`; see `build_mixer`. Its attribute `spec` is its `ModelSpec`.

    Raises:
        InputError: If the weights cannot be read, do not fit the model, or cannot be adapted.
    """
    image_shape, patch_shape = (
        (shape, shape) if isinstance(shape, int) else shape for shape in (image_shape, patch_shape)
    )
    pretrained = log_pretrained(read_pretrained(path, image_shape), path)
    adapted = adapt_pretrained(pretrained, image_shape, patch_shape, resize_tokens)
    return build_pretrained(adapted, path, num_classes, **options)


def build_pretrained(pretrained, path, num_classes=None, **options):
    """Builds the model of a `Pretrained`, read from `path`. Other arguments: As `load_mixer`."""
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise InputError(
            f"load_mixer: expected only these arguments of build_mixer: {', '.join(_OPTIONS)}; "
            f"received {', '.join(unknown)}; the architecture comes from {path}"
        )
    spec, sizes = pretrained.spec, pretrained.spec.architecture
    new_head = num_classes not in (None, sizes.num_classes)
    sizes = sizes.replace(activation=options.pop("activation", sizes.activation))
    if new_head:
        sizes = sizes.replace(num_classes=num_classes)
    model = build_model(sizes, **options)
    assign_weights(model, pretrained.arrays, path, new_head)
    names = None if new_head else spec.class_names
    model.spec = spec.replace(architecture=sizes, class_names=names)
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
    kept = HEAD if new_head else ()
    variables = {v.path: v for v in model.weights if v.path not in kept}
    arrays = {name: array for name, array in arrays.items() if name not in kept}
    check_fit(
        path,
        {name: array.shape for name, array in arrays.items()},
        {name: tuple(variable.shape) for name, variable in variables.items()},
    )
    for name, variable in variables.items():
        variable.assign(arrays[name])


def model_weights(model):
    """Returns a dict from variable path to array, without the states of seed generators."""
    return {variable.path: convert_to_numpy(variable.value) for variable in model.weights}
