"""Converts pretrained weights from one format to another, bit for bit."""

import contextlib
import tempfile
from pathlib import Path

from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import flush_folder
from keras_mixer.log import logger
from keras_mixer.model.variants import MIXER
from keras_mixer.weights import model_folder, official, timm
from keras_mixer.weights.pretrained import read_pretrained, read_unadapted


def write_folder(path, spec, arrays):
    """Writes a new model folder. Args: As `official.write`."""
    model_folder.write_spec(path, spec)
    model_folder.write_weights(path, arrays)


# From suffix to function of (path, spec, arrays).
WRITERS = {".npz": official.write, ".safetensors": timm.write, "": write_folder}
_OWN = "a model of our own"


def convert_weights(source, target, image_shape=None, mean=None, std=None, provenance=""):
    """Writes pretrained weights in the format of the target's suffix, and reads them back.

    The target is there once it has been read back as the same model; else nothing is left behind.

    Args:
        source: As `path` of `read_pretrained`.
        target: Path to write, which must not exist: .npz for the official linen layout,
            .safetensors for timm's, or a model folder, without suffix.
        image_shape: As in `read_unadapted`.
        mean, std: Tuple of floats, one for all channels or one for each, that timm subtracts from
            images in [0, 1] and divides them by; folded into the stem. Only for timm's files
            without a config.json; None for 0.5.
        provenance: `ModelSpec.provenance` to write, where a format has a place for it; empty for
            that of the source.

    Returns:
        `Pretrained`, as read from the target; its `source` describes the source.

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
        before = _normalized(read_unadapted(source, image_shape), source, mean, std)
        if provenance:
            before = before._replace(spec=before.spec.replace(provenance=provenance))
        if target.suffix and before.spec.architecture.model != MIXER:
            raise InputError(f"{target}: formats of others hold Mixers, and {source} is a baseline")
        if target.suffix and before.spec.preprocessing.permutation != "none":
            raise InputError(f"{target}: formats of others have no place for permuted pixels")
        with _new_folders(target.parent):
            after = _write(target, before)
    if before.spec.class_names and not after.spec.class_names:
        logger.warning(
            f"{target}: this format has no place for class names, so training that starts from it "
            f"makes a new head"
        )
    return after._replace(source=f"converted from {before.source or _OWN}")


def _normalized(pretrained, source, mean, std):
    """Folds mean and std, if given, into weights where nothing else tells them."""
    given = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    if not given:
        return pretrained
    if pretrained.source != timm.UNCONFIGURED:
        known = pretrained.source or _OWN
        advice = "change that there" if "config.json" in known else "leave that out"
        raise InputError(
            f"{source}: takes no --{' and no --'.join(given)}, as files of timm without a "
            f"config.json do: this is {known}, whose scale of images is known; {advice}"
        )
    both = {"mean": (0.5,), "std": (0.5,)} | given
    one_or_more = {name: v[0] if len(v) == 1 else v for name, v in both.items()}
    text = " and ".join(
        f"{name} {','.join(f'{v:g}' for v in values)}{'' if name in given else ' (assumed)'}"
        for name, values in both.items()
    )
    return pretrained._replace(
        arrays=timm.fold_normalization(pretrained.arrays, **one_or_more),
        source=f"{timm.LAYOUT.source} with {text}",
    )


@contextlib.contextmanager
def _new_folders(folder):
    """Makes a folder and those above it, and removes those it made if the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: others use it meanwhile
                path.rmdir()
        raise


def _write(target, before):
    """Writes beside the target, reads back from there, and only then renames to it."""
    spec, arrays = before.spec, before.arrays
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as folder:
        written = Path(folder) / target.name  # with the suffix that decides on the reader
        try:
            WRITERS[target.suffix](written, spec, arrays)
            after = read_pretrained(written, spec.architecture.image_shape)
        except InputError as error:
            raise InputError(str(error).replace(str(written), str(target))) from error
        same_weights = model_folder.digest(arrays) == model_folder.digest(after.arrays)
        if spec.architecture != after.spec.architecture or not same_weights:
            raise InputError(f"{target}: was read back as another model; please report this")
        written.rename(target)
    flush_folder(target.parent)
    return after
