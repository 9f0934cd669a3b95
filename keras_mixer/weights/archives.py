"""Opens untrusted zip files: .npz, .keras and .pth.

The directory at the end is checked against the file before Python's `zipfile` reads it, and the
declared sizes against limits before anything is unpacked. Nothing is extracted to disk.
"""

import contextlib
import os
import struct
import zipfile
import zlib

from keras_mixer.errors import InputError

MEMBERS = 16384  # H/14, the largest Mixer of the paper, has 390 tensors
_DIRECTORY = 4 << 20  # bytes
# What zipfile and zlib raise; RuntimeErrors include that of an unknown compression.
_DAMAGE = (
    *(OSError, ValueError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_EXPANSION, _SLACK = 20, 64 << 20  # weights hardly compress
_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q4sLQL")


@contextlib.contextmanager
def open_archive(path, noun):
    """Opens a zip file after checking its directory.

    Args:
        path: `Path` of the file.
        noun: string. What it should be, for messages: `"a .npz checkpoint"`.

    Yields:
        (archive, members): a `zipfile.ZipFile`, and a dict from name to `zipfile.ZipInfo`.

    Raises:
        InputError: If it is no zip file, truncated, damaged, inconsistent or a zip bomb, or if
            reading a member within the block fails.
    """
    try:
        with open(path, "rb") as file:
            count = _check_end(file)
            with zipfile.ZipFile(file) as archive:
                size = file.seek(0, os.SEEK_END)
                yield archive, _check_members(archive.infolist(), count, size)
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: not {noun}, or a damaged one ({error!s:.300})") from error


def _check_end(file):
    """Checks that the directory ends right before the end records; returns the number of members.

    Layout: PKWARE's APPNOTE.TXT 6.3, sections 4.3.14 to 4.3.16. NumPy, Keras and torch write no
    comment, so the end record is the last 22 bytes; torch writes zip64 records before it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END64.size - _END.size))
    tail = file.read()
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise ValueError("it does not end as a zip file does: cut off, or no zip file")
    _, disk, first, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    end, disks = size - _END.size, {disk, first}
    zip64 = len(tail) == _END64.size + _END.size and tail[_END64.size - 20 :][:4] == b"PK\x06\x07"
    if zip64:
        end -= _END64.size
        short = ((count, 0xFFFF), (length, 0xFFFFFFFF), (start, 0xFFFFFFFF))
        mark, rest, *_, disk, first, here, count, length, start, _, _, offset, total = (
            _END64.unpack(tail[: _END64.size])
        )
        if (mark, rest, offset, total) != (b"PK\x06\x06", 44, end, 1):
            raise ValueError("its zip64 records contradict each other")
        if any(
            a not in (b, most) for (a, most), b in zip(short, (count, length, start), strict=True)
        ):
            raise ValueError("its zip64 records contradict its end")
        disks |= {disk, first}
    if disks != {0} or comment or here != count or start + length != end:
        raise ValueError("its end does not agree with its directory")
    if count > MEMBERS or length > _DIRECTORY:
        raise ValueError(f"{count} members, more than any Mixer has")
    return count


def _check_members(infos, count, size):
    """Returns a dict from name to `ZipInfo`."""
    members = {info.filename: info for info in infos}
    if len(infos) != count or len(members) != count:
        raise ValueError("it holds members of the same name, or fewer than it says")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename:.100} is compressed in an unusual way")
        if info.header_offset < end:
            raise ValueError(f"{info.filename:.100} overlaps another member")
        end = info.header_offset + 30 + info.compress_size
        stored = info.compress_type == zipfile.ZIP_STORED
        if end > size or (stored and info.file_size != info.compress_size):
            raise ValueError(f"{info.filename:.100} is larger than the file it is in")
    if sum(info.file_size for info in infos) > _SLACK + _EXPANSION * size:
        raise ValueError(f"it would grow to more than {_EXPANSION} times its size")
    return members
