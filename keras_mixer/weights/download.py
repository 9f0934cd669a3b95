"""Downloads released files into the cache, and resumes interrupted downloads.

Bytes are written to a `.part` file, and their ETag to a file beside it. A resumed download requests
the rest under that ETag, so that two versions are never mixed (RFC 9110, sections 13.1.5 and 14.2).
The part is renamed once it is complete and on the disk.
"""

import contextlib
import difflib
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from keras_mixer.errors import InputError
from keras_mixer.files import cache_folder, flush_folder, locked_in_turn, write_atomically
from keras_mixer.log import byte_bar, logger
from keras_mixer.weights.registry import OFFICIAL, SCHEME, SERVER, Release

MIRROR = "KERAS_MIXER_OFFICIAL"  # environment variable: another server with the same files
TRIES, PAUSE = 5, 1.0  # attempts without a new byte; seconds before the second, then doubled
SECONDS_TO_ANSWER = (20, 60)  # to connect, and between two pieces
PIECE = 1 << 16  # bytes, at most, that are written at once
SLOWEST = 1000, 60  # bytes a second, over so many seconds; below that, the connection is cut
_MAGIC = b"PK\x03\x04"  # of .npz files
_ETAG = re.compile('"[!-~]*"')  # strong ETags only
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


class _Download(NamedTuple):
    """A release, its URL, and the paths of the file, of its part and of the part's ETag."""

    release: Release
    url: str
    file: Path
    part: Path
    etag: Path

    @property
    def received(self):
        """Bytes downloaded so far."""
        return self.part.stat().st_size if self.part.exists() else 0

    def read_etag(self):
        """Returns the saved ETag of the part, or None."""
        text = self.etag.read_bytes().decode("latin-1") if self.etag.exists() else ""
        return text if _ETAG.fullmatch(text) else None

    def discard(self):
        self.part.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)


def release_named(name):
    """Returns the `Release` of a name such as `"imagenet21k/Mixer-B_16"`; InputError if unknown."""
    if name not in OFFICIAL:
        near = difflib.get_close_matches(name, OFFICIAL, n=1)
        hint = f"; did you mean {SCHEME}{near[0]}?" if near else ""
        raise InputError(f"{SCHEME}{name}: expected one of {', '.join(OFFICIAL)}{hint}")
    return OFFICIAL[name]


def place_of(name):
    """Returns the `Path` of a released file in the cache, whether it exists or not."""
    return cache_folder() / "official" / f"{name}.npz"


def fetch(name):
    """Returns the `Path` of a released file, downloaded if it is not in the cache.

    Args:
        name: A key of `registry.OFFICIAL`.

    Raises:
        InputError: If the name is unknown, or the download fails: has the URL, the reason, and the
            path for a manual download.
    """
    release, file = release_named(name), place_of(name)
    if file.is_file():
        _check_file(release, file)
        return file
    server = (os.environ.get(MIRROR) or SERVER).rstrip("/")
    part, etag = (file.with_name(f"{file.name}.{end}") for end in ("part", "part.etag"))
    download = _Download(release, f"{server}/{name}.npz", file, part, etag)
    lock = file.with_name(f"{file.name}.lock")
    waiting = f"{file}: another process is downloading it; waiting"
    with _disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked_in_turn(lock, lambda: logger.info(waiting)):
            if not file.is_file():
                _download_file(download)
    return file


def _check_file(release, file):
    """Checks the size of a file that may have been downloaded by hand."""
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


def _download_file(download):
    """Retries until the part is complete, and installs it."""
    import requests

    if download.received > download.release.sizes[1] or download.read_etag() is None:
        download.discard()
    done = f"; {download.received / 2**20:,.1f} MiB are here already" if download.received else ""
    logger.info(
        f"downloading {download.url} ({download.release.size} MiB) to {download.file}{done}"
    )
    most, failures, connected = download.received, 0, False
    with requests.Session() as session, byte_bar("downloading") as show:
        while not (outcome := _attempt(session, download, show)).complete:
            failures = 1 if download.received > most else failures + 1
            most, connected = max(most, download.received), connected or outcome.connected
            if failures == TRIES or not connected:
                raise _error(download, outcome.problem + f", {failures} times" * (failures > 1))
            time.sleep(PAUSE * 2 ** (failures - 1))
    _install(download)


def _install(download):
    with open(download.part, "rb+") as part:
        os.fsync(part.fileno())
    os.replace(download.part, download.file)
    flush_folder(download.file.parent)
    download.etag.unlink(missing_ok=True)


def _error(download, what):
    low, high = download.release.sizes
    kept = (
        f"; {download.received:,} bytes are kept for the next time"
        if download.received and download.read_etag()
        else ""
    )
    return InputError(
        f"{download.url}: {what}{kept}. {MIRROR} names another server; or put the file "
        f"({low:,} to {high:,} bytes) at {download.file} yourself"
    )


# === One attempt ===


class _Outcome(NamedTuple):
    """Result of an attempt; if it is not complete, another may follow."""

    complete: bool
    problem: str = ""
    connected: bool = True


def _attempt(session, download, show):
    """Requests the missing bytes. Raises InputError for errors that a retry would not fix."""
    import requests
    from urllib3.exceptions import HTTPError, MaxRetryError

    try:
        with session.get(
            download.url, headers=_headers(download), stream=True, timeout=SECONDS_TO_ANSWER
        ) as response:
            return _receive(download, response, show)
    except requests.exceptions.SSLError as error:
        raise _error(download, f"no safe connection ({_reason(error)})") from error
    except (
        *(requests.ConnectionError, requests.Timeout),
        requests.exceptions.ChunkedEncodingError,
        HTTPError,  # of the body, which requests does not wrap
    ) as error:
        if error.args and isinstance(error.args[0], MaxRetryError):
            return _Outcome(False, f"cannot be reached ({_reason(error)})", connected=False)
        return _Outcome(False, f"the connection was cut ({_reason(error)})")
    except requests.RequestException as error:
        raise _error(download, _reason(error)) from error


def _reason(error):
    """Returns the innermost message, without the names of Python objects."""
    inner = error.args[0] if error.args else error
    text = " ".join(str(getattr(inner, "reason", None) or inner).split())
    return re.sub(r"^<?[\w.]+\(.*?\)>?: ", "", text)[:200]


def _headers(download):
    headers = {"Accept-Encoding": "identity"}  # for the length of the file itself
    if download.received and (etag := download.read_etag()):
        headers |= {"Range": f"bytes={download.received}-", "If-Range": etag}
    return headers


def _receive(download, response, show):
    """Appends the body of a response to the part."""
    status, total = response.status_code, _total_size(response)
    if status == 416 and total == download.received and _fits(download, total):
        return _Outcome(True)
    if status == 416 or (status == 206 and not _continues(download, response)):
        download.discard()
        return _Outcome(False, "it has changed, or is not what was asked for")
    if status in _TEMPORARY:
        return _Outcome(False, f"HTTP status {status} {response.reason}")
    if status not in (200, 206):
        raise _error(download, f"HTTP status {status} {response.reason}")
    if total is not None:
        _check_size(download, total)
    if status == 200:
        _begin(download, response)
    _append(download, response, total, show)
    if download.received < (total or download.release.sizes[0]):
        return _Outcome(False, f"the connection ended after {download.received:,} bytes")
    _check_size(download, download.received)
    return _Outcome(True)


def _total_size(response):
    """Returns the size of the whole file from the headers, or None."""
    ranges = response.headers.get("Content-Range", "")
    text = ranges.rpartition("/")[2] if ranges else response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _fits(download, size):
    low, high = download.release.sizes
    return low <= size <= high


def _check_size(download, size):
    if not _fits(download, size):
        low, high = download.release.sizes
        download.discard()
        raise _error(
            download, f"expected a file of {low:,} to {high:,} bytes, received one of {size:,}"
        )


def _continues(download, response):
    """Returns whether a partial response begins where the part ends, and is of the same file."""
    begins = re.match(r"bytes (\d{1,19})-", response.headers.get("Content-Range", ""))
    etag = response.headers.get("ETag")
    same = not download.received or etag in (None, download.read_etag())
    return begins and int(begins[1]) == download.received and same


def _begin(download, response):
    """Empties the part, and only then saves the new ETag."""
    download.discard()
    download.part.touch()
    if etag := response.headers.get("ETag"):
        write_atomically(download.etag, etag.encode())


def _append(download, response, total, show):
    received, most = download.received, download.release.sizes[1]
    _check_room(download, most - received)
    with open(download.part, "ab") as part:
        for piece in _pieces(response):
            if received == 0:
                _check_magic(download, response, piece)
            received += len(piece)
            part.write(piece)
            show(received, total or most)
            if received > most:
                break


def _pieces(response):
    """Yields the body as it comes; raises `requests.Timeout` for a server that trickles."""
    import requests

    slowest, window = SLOWEST
    began, count = time.monotonic(), 0
    while piece := response.raw.read1(PIECE, decode_content=True):
        yield piece
        count += len(piece)
        if (seconds := time.monotonic() - began) > window:
            if count < slowest * seconds:
                raise requests.Timeout(f"{count / seconds:,.0f} bytes a second")
            began, count = time.monotonic(), 0


def _check_room(download, wanted):
    free = shutil.disk_usage(download.part.parent).free
    if free < wanted:
        raise InputError(
            f"{download.file}: needs {wanted:,} bytes, and the disk has {free:,} left; "
            f"KERAS_MIXER_CACHE names another folder for the cache"
        )


def _check_magic(download, response, piece):
    """Raises InputError for the web page that networks with a login send instead of a file."""
    if not piece.startswith(_MAGIC[: len(piece)]):
        download.discard()
        kind = response.headers.get("Content-Type", "something else")
        raise _error(download, f"expected weights (.npz), received {kind:.50}: {piece[:40]!r}")
