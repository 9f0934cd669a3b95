"""Converts pretrained weights from one format to another, bit for bit."""

from pathlib import Path

from keras_mixer.errors import InputError, path_errors
from keras_mixer.weights import model_folder, official, timm
from keras_mixer.weights.pretrained import read_pretrained


def write_folder(path, spec, arrays):
    """Writes a new model folder. Args: As `official.write`."""
    model_folder.write_spec(path, spec)
    model_folder.write_weights(path, arrays)


# From suffix to function of (path, spec, arrays).
WRITERS = {".npz": official.write, ".safetensors": timm.write, "": write_folder}


def convert_weights(source, target, image_shape=None):
    """Writes pretrained weights in the format of the target's suffix, and reads them back.

    Args:
        source: As `path` of `read_pretrained`.
        target: Path to write, which must not exist: .npz for the official linen layout,
            .safetensors for timm's, or a model folder, without suffix.
        image_shape: As in `read_pretrained`.

    Returns:
        `Pretrained`, as read from the target.

    Raises:
        InputError: If the source cannot be read, or the target exists or cannot represent it.
    """
    target = Path(target)
    if target.suffix not in WRITERS:
        raise InputError(
            f"{target}: expected a name that ends in .npz (official), .safetensors (timm), or "
            f"without suffix (a model folder)"
        )
    with path_errors(target):
        if target.exists():
            raise InputError(f"{target}: exists already; give another name")
        before = read_pretrained(source, image_shape)
        target.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[target.suffix](target, before.spec, before.arrays)
    after = read_pretrained(target, before.spec.architecture.image_shape)
    same_weights = model_folder.digest(before.arrays) == model_folder.digest(after.arrays)
    if before.spec.architecture != after.spec.architecture or not same_weights:
        raise InputError(f"{target}: was read back as another model; please report this")
    return after
