"""Builds models with pretrained weights, and gets and sets the weights of a model."""

from keras.ops import convert_to_numpy

from keras_mixer.errors import InputError
from keras_mixer.model.baselines import build_model
from keras_mixer.weights.pretrained import adapt_pretrained, announce, read_pretrained
from keras_mixer.weights.tensor_layouts import check_fit

HEAD = ("head/kernel", "head/bias")
_OPTIONS = ("activation", "dropout", "stochastic_depth", "head_bias", "dtype", "name")


def load_mixer(
    path, image_shape=None, patch_shape=None, resize_tokens="auto", num_classes=None, **options
):
    """Loads a Mixer with pretrained weights, and adapts it to another image or patch shape.

    Args:
        path: A run directory, its best/, an official .npz of either layout, timm's .safetensors or
            .pth (which needs torch), a .keras or .weights.h5 of a `build_mixer` model,
            `official:NAME`, a key of `registry.OFFICIAL`, which is downloaded once, or
            `preset:cifar10`, which is included.
        image_shape: (height, width) of the new images, in pixels, or an int for both. Defaults to
            the checkpoint's.
            A file that has only the number of patches is taken to be of this shape where it fits,
            else of a square grid, and then adapted; required if there is no such grid.
        patch_shape: The same of the new patches. Defaults to the checkpoint's.
        resize_tokens: string, one of `resize.RESIZE_TOKENS`. How token mixing is adapted:
            `"interpolate"`, for use without training and as a better start, or `"tile"`, as in the
            paper's appendix C, which must be trained. `"auto"` interpolates.
        num_classes: int. Number of classes of a new head, which is zero; 0 for none, so that the
            model returns pre-logits. Defaults to the checkpoint's head.
        **options: Further arguments for `build_mixer` that do not change the weights: `dropout`,
            `stochastic_depth`, `dtype`, `name`; `head_bias` for a new head; `activation`, which
            only our own formats contain.

    Returns:
        A functional `keras.Model`; see `build_mixer`. Its attribute `spec` is its `ModelSpec`.

    Raises:
        InputError: If the weights cannot be read, do not fit the model, or cannot be adapted.
    """
    image_shape, patch_shape = (
        (shape, shape) if isinstance(shape, int) else shape for shape in (image_shape, patch_shape)
    )
    pretrained = announce(read_pretrained(path, image_shape), path)
    adapted = adapt_pretrained(pretrained, image_shape, patch_shape, resize_tokens)
    return build_pretrained(adapted, path, num_classes, **options)


def build_pretrained(pretrained, path, num_classes=None, **options):
    """Builds the model of a `Pretrained`, read from `path`. Other arguments: As `load_mixer`."""
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise InputError(
            f"load_mixer: expected of build_mixer's arguments {', '.join(_OPTIONS)}, received "
            f"{', '.join(unknown)}; the architecture is that of {path}"
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
