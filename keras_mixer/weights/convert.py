"""From a checkpoint of one format to one of another, with the same bits."""

from pathlib import Path

from keras_mixer.errors import InputError, path_errors
from keras_mixer.weights import native, official, timm
from keras_mixer.weights.load import read_checkpoint


def write_native(path, description, arrays):
    """Writes a folder of our own format.

    Args:
        path: `Path` of the folder, which does not exist.
        description: `native.Description`.
        arrays: dict from the names of our variables to arrays.
    """
    native.write_description(path, description)
    native.write_weights(path, arrays)


# By the end of a name: from (path, description, arrays) to a file.
WRITERS = {".npz": official.write, ".safetensors": timm.write, "": write_native}


def convert_checkpoint(source, target, image_shape=None):
    """Writes a checkpoint again in the format that the target's name asks for, and reads it back.

    Args:
        source: Whatever `read_checkpoint` takes.
        target: Path of what to write: .npz is the official linen layout, .safetensors timm's, and
            a name without suffix a folder of our own format. It must not exist.
        image_shape: (height, width) in pixels, where the source cannot tell it.

    Returns:
        `Checkpoint`, as the target holds it.

    Raises:
        InputError: If the source cannot be read, the target cannot hold it, or is there already.
    """
    target = Path(target)
    if target.suffix not in WRITERS:
        raise InputError(
            f"{target}: expected a name that ends in .npz (official), .safetensors (timm), or "
            f"without suffix (a folder of our own)"
        )
    with path_errors(target):
        if target.exists():
            raise InputError(f"{target}: is there already; give another name")
        checkpoint = read_checkpoint(source, image_shape)
        target.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[target.suffix](target, checkpoint.description, checkpoint.arrays)
    written = read_checkpoint(target, checkpoint.description.architecture["image_shape"])
    before, after = checkpoint.description.architecture, written.description.architecture
    if before != after or native.digest(checkpoint.arrays) != native.digest(written.arrays):
        raise InputError(f"{target}: came back as another model; please report this")
    return written
