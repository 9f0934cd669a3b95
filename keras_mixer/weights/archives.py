"""Opens untrusted zip files: .npz, .keras and .pth.

Sizes are checked against limits before Python's `zipfile` reads the directory, and before anything
is decompressed. Nothing is extracted to disk.
"""

import contextlib
import os
import struct
import zipfile
import zlib

from keras_mixer.errors import InputError

MEMBERS = 16384  # H/14, the largest Mixer of the paper, has 390 tensors
_DIRECTORY = 4 << 20  # bytes
# What zipfile and zlib raise; RuntimeError is for encrypted members and unknown compression.
_READ_ERRORS = (
    *(OSError, ValueError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_EXPANSION, _SLACK = 20, 64 << 20  # weights hardly compress


@contextlib.contextmanager
def open_archive(path, noun):
    """Opens a zip file after checking its directory.

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
        with open(path, "rb") as file:
            count = _check_directory(file)
            size = file.seek(0, os.SEEK_END)
            with zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist()}
                if len(members) != count:
                    raise ValueError("several members have the same name, or some are missing")
                if sum(m.file_size for m in members.values()) > _SLACK + _EXPANSION * size:
                    raise ValueError(f"it would expand to more than {_EXPANSION} times its size")
                yield archive, members
    except InputError:
        raise
    except _READ_ERRORS as error:
        raise InputError(f"{path}: not {noun}, or a damaged one ({error!s:.300})") from error


def _check_directory(file):
    """Checks the size of the directory, and returns its number of members.

    NumPy, Keras and torch write no comment, so the last 22 bytes are the end record; torch writes
    zip64 records of 56 and 20 bytes before it (PKWARE's APPNOTE.TXT 6.3, 4.3.14 to 4.3.16).
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 98))
    tail = file.read()
    if tail[-22:-18] != b"PK\x05\x06":
        raise ValueError("the end of a zip file is missing")
    count, length = struct.unpack("<HL", tail[-12:-6])
    if tail[-42:-38] == b"PK\x06\x07":
        count, length = struct.unpack("<QQ", tail[-66:-50])
    if count > MEMBERS or length > _DIRECTORY:
        raise ValueError(f"{count} members, more than any Mixer has")
    return count
