"""Downloads official checkpoints into the cache, once; interrupted downloads resume.

Bytes are appended to a `.part` file, which is renamed once it is complete and flushed to disk. That
it is the published file is checked by its size, the MD5 that Google Cloud Storage sends in
`x-goog-hash`, and the CRC-32 of every array when it is read.
"""

import base64
import difflib
import hashlib
import os
import re
import time
from urllib.parse import urljoin

from keras_mixer.errors import InputError
from keras_mixer.files import cache_folder, flush_folder, locked_in_turn
from keras_mixer.log import byte_bar, logger
from keras_mixer.weights.registry import OFFICIAL, SCHEME, SERVER

MIRROR = "KERAS_MIXER_OFFICIAL"  # environment variable: another server with the same files
TRIES, BACKOFF = 5, 1.0  # attempts without a new byte; pauses of 0, 2, 4, 8 times so many seconds
TIMEOUT = (20, 60)  # seconds to connect, and between two pieces
SLOWEST = 1000, 60  # bytes per second, over so many seconds, below which the connection is closed
PIECE = 1 << 16  # bytes
_MOST_REDIRECTS = 5
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_MAGIC = b"PK\x03\x04"  # of .npz files


def find_release(name):
    """Returns the `Release` of a name such as `"imagenet21k/Mixer-B_16"`; InputError if unknown."""
    if name not in OFFICIAL:
        near = difflib.get_close_matches(name, OFFICIAL, n=1)
        hint = f"; did you mean {SCHEME}{near[0]}?" if near else ""
        raise InputError(f"{SCHEME}{name}: expected one of {', '.join(OFFICIAL)}{hint}")
    return OFFICIAL[name]


def cache_path(name):
    """Returns the `Path` of an official checkpoint in the cache, whether it exists or not."""
    return cache_folder() / "official" / f"{name}.npz"


def fetch(name):
    """Returns the `Path` of an official checkpoint, downloaded unless it is in the cache.

    Args:
        name: A key of `registry.OFFICIAL`.

    Raises:
        InputError: If the name is unknown, or the download fails: with the URL, the reason, and the
            path for a manual download.
    """
    release, file = find_release(name), cache_path(name)
    waiting = f"{file}: another process is downloading it; waiting"
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked_in_turn(file.with_name(f"{file.name}.lock"), lambda: logger.info(waiting)):
                if not file.is_file():
                    _download(release, file)
        size = file.stat().st_size  # of a file that may have been downloaded by hand
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written: {error.strerror or error}; KERAS_MIXER_CACHE sets "
            f"another folder for the cache"
        ) from error
    low, high = release.sizes
    if not low <= size <= high:
        raise InputError(
            f"{file}: expected {SCHEME}{name} of {low:,} to {high:,} bytes, found {size:,}; delete "
            f"it to download it again"
        )
    return file


def _download(release, file):
    """Requests the missing bytes until the part is complete, and renames it."""
    import requests
    from urllib3.exceptions import HTTPError
    from urllib3.util import Retry

    url = f"{(os.environ.get(MIRROR) or SERVER).rstrip('/')}/{release.name}.npz"
    part = file.with_name(f"{file.name}.part")
    start = most = _size(part)
    done = f"; resuming after {start / 2**20:,.1f} MiB" if start else ""
    logger.info(f"downloading {url} ({release.size} MiB) to {file}{done}")
    retries = fresh = Retry(TRIES - 1, backoff_factor=BACKOFF)
    with requests.Session() as session, byte_bar("downloading") as show:
        while True:
            try:
                _receive(session, url, part, release.sizes, show)
                break
            except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
                if _size(part) > most:
                    retries, most = fresh, _size(part)
                if not retries.total:
                    raise _failure(release, url, file, error) from error
                retries = retries.increment("GET", url, error=error)
                retries.sleep()
            except requests.RequestException as error:
                raise _failure(release, url, file, error) from error
            except ValueError as error:  # another file
                part.unlink()
                raise _failure(release, url, file, error) from error
    os.replace(part, file)
    flush_folder(file.parent)


def _size(part):
    return part.stat().st_size if part.exists() else 0


def _failure(release, url, file, error):
    """Returns the InputError of a failed download, with the innermost reason."""
    inner = error.args[0] if error.args else error
    text = " ".join(str(getattr(inner, "reason", None) or inner).split())
    reason = re.sub(r"^<?[\w.]+\(.*?\)>?: ", "", text)[:200]  # without names of Python objects
    return InputError(
        f"{url}: download failed: {reason}; run again to resume, set {MIRROR} to another server, "
        f"or put the file ({release.size} MiB) at {file}"
    )


def _receive(session, url, part, sizes, show):
    """Appends the missing bytes to the part, and checks it once it is complete."""
    import requests

    received, (low, high) = _size(part), sizes
    with _get(session, url, received) as response:
        status, headers = response.status_code, response.headers
        continues = headers.get("Content-Range", "").startswith(f"bytes {received}-")
        if status == 416 or (status == 206 and not continues):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"it cannot be resumed after {received:,} bytes")
        if status in _TEMPORARY:
            raise requests.ConnectionError(f"HTTP status {status} {response.reason}")
        if status not in (200, 206):
            raise requests.HTTPError(f"HTTP status {status} {response.reason}")
        received = received if status == 206 else 0
        with open(part, "ab" if status == 206 else "wb") as file:
            for piece in _pieces(response):
                if received == 0 and not piece.startswith(_MAGIC[: len(piece)]):
                    kind = headers.get("Content-Type", "something else")
                    raise ValueError(f"expected an .npz, received {kind:.50}: {piece[:40]!r}")
                received += len(piece)
                if received > high:
                    raise ValueError(f"expected at most {high:,} bytes, received {received:,}")
                file.write(piece)
                show(received, high)
            file.flush()
            os.fsync(file.fileno())
    if received < low:
        raise requests.ConnectionError(f"the connection ended after {received:,} bytes")
    with open(part, "rb") as file:
        md5 = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
    if md5 not in headers.get("x-goog-hash", md5):
        raise ValueError(f"its MD5 is {md5}, expected {headers['x-goog-hash']}")


def _get(session, url, first):
    """Returns the response of a GET from byte `first` on.

    Redirects are followed without reading their bodies, and never from https to another scheme.
    """
    import requests

    headers = {"Accept-Encoding": "identity"}  # for the length of the file itself
    if first:
        headers["Range"] = f"bytes={first}-"
    for _ in range(_MOST_REDIRECTS + 1):
        response = session.get(
            url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False
        )
        if not response.is_redirect:
            return response
        response.close()
        target = urljoin(url, response.headers["Location"])
        if url.startswith("https:") and not target.startswith("https:"):
            raise requests.HTTPError(f"it redirects from https to {target:.100}")
        url = target
    raise requests.TooManyRedirects(f"more than {_MOST_REDIRECTS} redirects")


def _pieces(response):
    """Yields the body as it arrives; raises `requests.Timeout` if the server is too slow."""
    import requests

    slowest, window = SLOWEST
    start, count = time.monotonic(), 0
    while piece := response.raw.read1(PIECE, decode_content=True):
        yield piece
        count += len(piece)
        if (seconds := time.monotonic() - start) > window:
            if count < slowest * seconds:
                raise requests.Timeout(f"only {count / seconds:,.0f} bytes per second")
            start, count = time.monotonic(), 0
