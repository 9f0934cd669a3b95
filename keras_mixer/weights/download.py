"""Fetching a released file: once, whole, and going on where a connection was cut.

Bytes land in a `.part` file, beside which lies the ETag they belong to. A later attempt asks for
the rest under that ETag, so that no file is ever put together from two (RFC 9110, sections 13.1.5
and 14.2). The name without `.part` appears only once all bytes are on the disk.
"""

import contextlib
import difflib
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import filelock

from keras_mixer import console
from keras_mixer.errors import InputError
from keras_mixer.files import cache_folder, flush_folder, write_atomically
from keras_mixer.weights.registry import OFFICIAL, SCHEME, SERVER, Release

MIRROR = "KERAS_MIXER_OFFICIAL"  # environment variable: another server with the same files
TRIES, PAUSE = 5, 1.0  # without a new byte in between; seconds before the second, then doubled
SECONDS_TO_ANSWER = (20, 60)  # to connect, and between two pieces
PIECE = 1 << 16  # bytes, at most lost when a connection is cut
_BEGINNING = b"PK\x03\x04"  # of every .npz
_ETAG = re.compile('"[!-~]*"')  # one that names exact bytes
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


class _Place(NamedTuple):
    """Where a file is to be, where its parts gather, and which it is."""

    release: Release
    url: str
    file: Path
    part: Path
    etag: Path

    @property
    def held(self):
        return self.part.stat().st_size if self.part.exists() else 0

    def noted(self):
        """The ETag that the part belongs to; None where none was noted."""
        text = self.etag.read_bytes().decode("latin-1") if self.etag.exists() else ""
        return text if _ETAG.fullmatch(text) else None

    def discard(self):
        self.part.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)


def release_named(name):
    """Returns the `Release` of a name such as `"imagenet21k/Mixer-B_16"`.

    Raises:
        InputError: If there is none; lists those that there are.
    """
    if name not in OFFICIAL:
        near = difflib.get_close_matches(name, OFFICIAL, n=1)
        hint = f"; did you mean {SCHEME}{near[0]}?" if near else ""
        raise InputError(f"{SCHEME}{name}: expected one of {', '.join(OFFICIAL)}{hint}")
    return OFFICIAL[name]


def place_of(name):
    """Returns the `Path` where a released file is kept, whether it is there or not."""
    return cache_folder() / "official" / f"{name}.npz"


def fetch(name):
    """Returns the `Path` of a released file, downloaded if it is not in the cache yet.

    Args:
        name: A key of `registry.OFFICIAL`.

    Raises:
        InputError: If there is no such file, or it cannot be had: names the URL, what went wrong,
            and where to put the file by hand.
    """
    release, file = release_named(name), place_of(name)
    if file.is_file():
        _check_file(release, file)
        return file
    server = (os.environ.get(MIRROR) or SERVER).rstrip("/")
    part, etag = (file.with_name(f"{file.name}.{end}") for end in ("part", "part.etag"))
    place = _Place(release, f"{server}/{name}.npz", file, part, etag)
    with _disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file):
            if not file.is_file():
                _download(place)
    return file


def _check_file(release, file):
    """Holds what somebody may have put there by hand against the published size."""
    (low, high), size = release.sizes, file.stat().st_size
    if not low <= size <= high:
        raise InputError(
            f"{file}: expected {SCHEME}{release.name} of {low:,} to {high:,} bytes, found "
            f"{size:,}; delete it to have it downloaded"
        )


@contextlib.contextmanager
def _disk_errors(file):
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written: {error.strerror or error}; KERAS_MIXER_CACHE names "
            f"another folder for the cache"
        ) from error


@contextlib.contextmanager
def _alone(file):
    lock = filelock.FileLock(file.with_name(f"{file.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.say(f"{file}: another process is downloading it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(place):
    """Tries until the part is whole, and installs it."""
    import requests

    if place.held > place.release.sizes[1] or place.noted() is None:
        place.discard()
    done = f"; {place.held / 2**20:,.1f} MiB are here already" if place.held else ""
    console.say(f"downloading {place.url} ({place.release.size} MiB) to {place.file}{done}")
    most, failed, answered = place.held, 0, False
    with requests.Session() as session, console.byte_bar("downloading") as show:
        while not (cut := _attempt(session, place, show)).whole:
            failed = 1 if place.held > most else failed + 1
            most, answered = max(most, place.held), answered or cut.answered
            if failed == TRIES or not answered:
                raise _refusal(place, cut.what + f", {failed} times" * (failed > 1))
            time.sleep(PAUSE * 2 ** (failed - 1))
    _install(place)


def _install(place):
    with open(place.part, "rb+") as part:
        os.fsync(part.fileno())
    os.replace(place.part, place.file)
    flush_folder(place.file.parent)
    place.etag.unlink(missing_ok=True)


def _refusal(place, what):
    low, high = place.release.sizes
    kept = (
        f"; {place.held:,} bytes are kept for the next time" if place.held and place.noted() else ""
    )
    return InputError(
        f"{place.url}: {what}{kept}. {MIRROR} names another server; or put the file "
        f"({low:,} to {high:,} bytes) at {place.file} yourself"
    )


# === One attempt ===


class _Outcome(NamedTuple):
    """How an attempt ended that may be followed by another."""

    whole: bool
    what: str = ""
    answered: bool = True


def _attempt(session, place, show):
    """Asks for what is missing. Returns an `_Outcome`, or raises what no repetition would mend."""
    import requests
    from urllib3.exceptions import MaxRetryError  # what requests hides in its own

    try:
        with session.get(
            place.url, headers=_headers(place), stream=True, timeout=SECONDS_TO_ANSWER
        ) as response:
            return _receive(place, response, show)
    except requests.exceptions.SSLError as error:
        raise _refusal(place, f"no safe connection ({_reason(error)})") from error
    except (
        *(requests.ConnectionError, requests.Timeout),
        requests.exceptions.ChunkedEncodingError,
    ) as error:
        if error.args and isinstance(error.args[0], MaxRetryError):
            return _Outcome(False, f"cannot be reached ({_reason(error)})", answered=False)
        return _Outcome(False, f"the connection was cut ({_reason(error)})")
    except requests.RequestException as error:
        raise _refusal(place, _reason(error)) from error


def _reason(error):
    """The innermost reason, without the names of Python's objects."""
    inner = error.args[0] if error.args else error
    text = " ".join(str(getattr(inner, "reason", None) or inner).split())
    return re.sub(r"^<?[\w.]+\(.*?\)>?: ", "", text)[:200]


def _headers(place):
    headers = {"Accept-Encoding": "identity"}  # so that lengths are those of the file
    if place.held and (etag := place.noted()):
        headers |= {"Range": f"bytes={place.held}-", "If-Range": etag}
    return headers


def _receive(place, response, show):
    """Writes what a server answers to where it belongs."""
    status, total = response.status_code, _total(response)
    if status == 416 and total == place.held and _fits(place, total):
        return _Outcome(True)
    if status == 416 or (status == 206 and not _continues(place, response)):
        place.discard()
        return _Outcome(False, "it has changed, or is not what was asked for")
    if status in _TEMPORARY:
        return _Outcome(False, f"HTTP status {status} {response.reason}")
    if status not in (200, 206):
        raise _refusal(place, f"HTTP status {status} {response.reason}")
    if total is not None:
        _check_size(place, total)
    if status == 200:
        _begin(place, response)
    _append(place, response, total, show)
    if place.held < (total or place.release.sizes[0]):
        return _Outcome(False, f"the connection ended after {place.held:,} bytes")
    _check_size(place, place.held)
    return _Outcome(True)


def _total(response):
    """The size of the whole file, as the headers have it; None where they do not say."""
    ranges = response.headers.get("Content-Range", "")
    text = ranges.rpartition("/")[2] if ranges else response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _fits(place, size):
    low, high = place.release.sizes
    return low <= size <= high


def _check_size(place, size):
    if not _fits(place, size):
        low, high = place.release.sizes
        place.discard()
        raise _refusal(
            place, f"expected a file of {low:,} to {high:,} bytes, received one of {size:,}"
        )


def _continues(place, response):
    """Whether a partial answer begins where the part ends, and is of the same file."""
    begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    etag = response.headers.get("ETag")
    same = not place.held or etag in (None, place.noted())
    return begins and int(begins[1]) == place.held and same


def _begin(place, response):
    """Empties the part; only then notes the ETag of what is to come."""
    place.discard()
    place.part.touch()
    if etag := response.headers.get("ETag"):
        write_atomically(place.etag, etag.encode())


def _append(place, response, total, show):
    held, most = place.held, place.release.sizes[1]
    _check_room(place, most - held)
    with open(place.part, "ab") as part:
        for piece in response.iter_content(PIECE):
            if held == 0:
                _check_beginning(place, response, piece)
            held += len(piece)
            part.write(piece)
            show(held, total or most)
            if held > most:
                break


def _check_room(place, wanted):
    free = shutil.disk_usage(place.part.parent).free
    if free < wanted:
        raise InputError(
            f"{place.file}: needs {wanted:,} bytes, and the disk has {free:,} left; "
            f"KERAS_MIXER_CACHE names another folder for the cache"
        )


def _check_beginning(place, response, piece):
    """Networks that want a login answer everything with a web page."""
    if not piece.startswith(_BEGINNING[: len(piece)]):
        place.discard()
        kind = response.headers.get("Content-Type", "something else")
        raise _refusal(place, f"expected weights (.npz), received {kind:.50}: {piece[:40]!r}")
