"""Converts pretrained weights from one format to another, bit for bit."""

import tempfile
from pathlib import Path

from keras_mixer.errors import InputError, path_errors
from keras_mixer.files import flush_folder
from keras_mixer.log import logger
from keras_mixer.model.variants import MIXER
from keras_mixer.weights import timm
from keras_mixer.weights.formats import find_format, list_formats
from keras_mixer.weights.model_folder import digest
from keras_mixer.weights.pretrained import read_pretrained, read_unadapted
from keras_mixer.weights.timm_config import fold_normalization

_MODEL_FOLDER = "a model folder of keras_mixer"


def convert_weights(source, target, image_shape=None, mean=None, std=None, provenance=""):
    """Writes pretrained weights in the format of the target's suffix, and reads them back.

    The target appears only once it has been read back as the same model.

    Args:
        source: As `path` of `read_pretrained`.
        target: Path to write, which must not exist, with a suffix of `formats.FORMATS`: .npz for an
            official checkpoint, .safetensors for timm, none for a model folder.
        image_shape: As in `read_unadapted`.
        mean, std: Tuple of floats, one for all channels or one for each, with which timm normalizes
            images in [0, 1]; folded into the stem. Only for timm's files without a config.json;
            None for 0.5.
        provenance: `ModelSpec.provenance` to write, where the format can store it; empty for that
            of the source.

    Returns:
        `Pretrained`, as read from the target; its `source` describes the source.

    Raises:
        InputError: If the source cannot be read, or the target exists or cannot store it.
    """
    target = Path(target)
    form = find_format(target)
    if form is None or form.write is None:
        raise InputError(
            f"{target}: expected the name of one of: {list_formats(written=True)}; a model folder "
            f"has no suffix"
        )
    with path_errors(target):
        if target.exists():
            raise InputError(f"{target}: exists already; give another name")
        before = _normalize(read_unadapted(source, image_shape), source, mean, std)
        if provenance:
            before = before._replace(spec=before.spec.replace(provenance=provenance))
        if before.spec.architecture.model != MIXER and not form.any_model:
            raise InputError(
                f"{target}: this format can only store a Mixer, and {source} is a baseline"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        after = _write(target, form, before)
    if before.spec.class_names and not after.spec.class_names:
        logger.warning(
            f"{target}: this format cannot store class names, so training that starts from it "
            f"creates a new head"
        )
    return after._replace(source=f"converted from {before.source or _MODEL_FOLDER}")


def _normalize(pretrained, source, mean, std):
    """Folds mean and std, if given, into weights whose file does not contain them."""
    given = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    if not given:
        return pretrained
    if not pretrained.source.startswith(timm.UNCONFIGURED):
        known = pretrained.source or _MODEL_FOLDER
        advice = "change them there" if "config.json" in known else "leave the flag out"
        raise InputError(
            f"{source}: --{' and --'.join(given)} cannot change {known}, whose mean and std are "
            f"known; {advice}"
        )
    both = {"mean": (0.5,), "std": (0.5,)} | given
    one_or_more = {name: v[0] if len(v) == 1 else v for name, v in both.items()}
    text = " and ".join(
        f"{name} {','.join(f'{v:g}' for v in values)}{'' if name in given else ' (assumed)'}"
        for name, values in both.items()
    )
    return pretrained._replace(
        arrays=fold_normalization(pretrained.arrays, **one_or_more),
        source=pretrained.source.replace(timm.UNCONFIGURED, f"{timm.LAYOUT.source} with {text}"),
    )


def _write(target, form, before):
    """Writes beside the target, reads back from there, and only then renames to it."""
    spec, arrays = before.spec, before.arrays
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        try:
            form.write(written, spec, arrays)
            after = read_pretrained(written, spec.architecture.image_shape)
        except InputError as error:
            raise InputError(str(error).replace(str(written), str(target))) from error
        if spec.architecture != after.spec.architecture or digest(arrays) != digest(after.arrays):
            raise InputError(f"{target}: was read back as another model; please report this")
        written.rename(target)
    flush_folder(target.parent)
    return after
