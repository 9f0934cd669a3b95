"""Opens untrusted zip files: .npz, .keras and .pth. Nothing is extracted to disk."""

import contextlib
import os
import struct
import zipfile
import zlib

from keras_mixer.errors import InputError

# What zipfile and zlib raise; RuntimeError is for encrypted members and unknown compression.
_READ_ERRORS = (
    *(OSError, ValueError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_EXPANSION, _SLACK = 20, 64 << 20  # weights hardly compress


@contextlib.contextmanager
def open_archive(path, noun):
    """Opens a zip file and checks the sizes of its members before anything is decompressed.

    Args:
        path: `Path` of the file.
        noun: string. What it should be, for messages: `"a .npz checkpoint"`.

    Yields:
        (archive, members): a `zipfile.ZipFile`, and a dict from name to `zipfile.ZipInfo`.

    Raises:
        InputError: If it is no zip file, truncated, damaged or a zip bomb, or if reading a member
            within the block fails.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise ValueError("several members have the same name")
            size = sum(info.file_size for info in members.values())
            if size > _SLACK + _EXPANSION * os.path.getsize(path):
                raise ValueError(f"it would expand to more than {_EXPANSION} times its size")
            yield archive, members
    except InputError:
        raise
    except _READ_ERRORS as error:
        raise InputError(f"{path}: not {noun}, or a damaged one ({error!s:.300})") from error
