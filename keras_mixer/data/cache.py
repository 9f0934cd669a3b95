"""Arrays in the user's cache folder that would take long to compute again. They can be deleted."""

import io

import numpy as np

from keras_mixer.files import cache_folder, write_atomically
from keras_mixer.log import logger


def load_cached(name, kinds, valid=lambda arrays: True):
    """Loads arrays from the cache.

    Args:
        name: Path of the .npz file in the cache folder.
        kinds: dict from the name of each array, all `(n,)`, to the kind of its dtype, such as "i".
        valid: Function of the dict of arrays that returns whether their values can be right.

    Returns:
        dict of arrays; None if there is no such file, or it is damaged, with a warning.
    """
    path = cache_folder() / name
    try:
        file = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        arrays = {key: file[key] for key in kinds}
        (length,) = {array.shape for array in arrays.values()}
        if len(length) != 1 or any(arrays[key].dtype.kind != kinds[key] for key in kinds):
            raise ValueError("unexpected arrays")
        if not valid(arrays):
            raise ValueError("unexpected values")
    except OSError:
        return None
    except Exception as error:  # NumPy, zipfile and zlib raise many types on damaged files
        logger.warning(f"{path}: damaged, so it is written again ({error})")
        return None
    return arrays


def save_cached(name, arrays, what):
    """Saves a dict of arrays for `load_cached`; if that fails, it logs why.

    Args:
        name: Path of the .npz file in the cache folder.
        arrays: dict of arrays.
        what: What they are, for the message.
    """
    path, content = cache_folder() / name, io.BytesIO()
    np.savez_compressed(content, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        logger.info(
            f"{path.parent}: cannot cache {what} ({error.strerror}), which takes time again in the "
            f"next run; set KERAS_MIXER_CACHE=FOLDER to use another folder"
        )
