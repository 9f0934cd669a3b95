"""Tests `keras_mixer/weights/download.py` against a server on this machine that misbehaves.

The file is the small golden checkpoint under a name of the registry, whose size is made to match.
"""

import base64
import hashlib
import http.server
import io
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import requests
from conftest import GOLDEN, ROOT, TINY

from keras_mixer import Config, InputError, fit, load_mixer
from keras_mixer.weights import download
from keras_mixer.weights.download import cache_path, fetch, find_release
from keras_mixer.weights.pretrained import read_pretrained, summary
from keras_mixer.weights.registry import OFFICIAL

NAME = "imagenet1k/Mixer-B_16"
CONTENT = (GOLDEN / "official_mixer.npz").read_bytes()  # 54,976 bytes: 0.05 MiB
PIECE = 4096


# === A server ===


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's next behavior has it; when none is left, as it should."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        behaviors = self.server.behaviors
        (behaviors.pop(0) if behaviors else ranges())(self)

    def answer(self, status, body, headers=None, length=None, stop=None):
        """Sends a status, headers and the body up to `stop`."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length != "unsaid":
            self.send_header("Content-Length", len(body) if length is None else length)
        self.end_headers()
        self.wfile.write(body[:stop])
        self.close_connection = stop is not None or length is not None

    def log_message(self, *arguments):
        pass


def ranges(content=CONTENT, stop=None, **headers):
    """Answers Range requests as RFC 9110 says; cuts the connection after `stop` bytes."""

    def behave(handler):
        asked = handler.headers["Range"]
        if asked is None:
            return handler.answer(200, content, headers, stop=stop)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return handler.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        partial = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return handler.answer(206, content[start:], headers | partial, stop=stop)

    return behave


def sends(status=200, body=CONTENT, headers=None, **options):
    """Answers with this, whatever was requested."""
    return lambda handler: handler.answer(status, body, headers, **options)


@contextmanager
def serving(wrap=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.behaviors = [], []
    if wrap:
        server.socket = wrap(server.socket)
    server.handle_error = lambda *_: None  # clients that go away
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine instead of the official one, and an empty cache."""
    with serving() as server:
        monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("KERAS_MIXER_OFFICIAL", f"http://127.0.0.1:{server.server_port}/m/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setitem(OFFICIAL, NAME, OFFICIAL[NAME]._replace(size=0.05))
        monkeypatch.setattr(download, "PIECE", PIECE)
        monkeypatch.setattr(download, "BACKOFF", 0.0)
        yield server


def starts(server):
    """The first byte of each request."""
    asked = [headers.get("Range", "bytes=0-") for _, headers in server.requests]
    return [int(text.removeprefix("bytes=").removesuffix("-")) for text in asked]


def left_over():
    """The files in the cache, without the lock."""
    folder = cache_path(NAME).parent
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def trickles(after):
    """Sends so many bytes at once, and then one at a time."""

    def behave(handler):
        handler.answer(200, CONTENT[:after], length=len(CONTENT))
        with suppress(OSError):
            for byte in CONTENT[after:]:
                time.sleep(0.01)
                handler.wfile.write(bytes([byte]))

    return behave


# === As it should be ===


def test_a_file_is_fetched_once(server, capsys):
    path = fetch(NAME)
    assert path == cache_path(NAME) and path.read_bytes() == CONTENT
    ((asked, headers),) = server.requests
    assert asked == f"/m/{NAME}.npz"
    assert headers["Accept-Encoding"] == "identity", "so that lengths are those of the file"
    assert f"/m/{NAME}.npz (0.05 MiB) to {path}" in capsys.readouterr().err.replace("\n", " ")
    assert fetch(NAME) == path
    assert len(server.requests) == 1
    assert left_over() == ["Mixer-B_16.npz"]


def test_redirects_are_followed_without_reading_their_bodies(server):
    elsewhere = f"/elsewhere/{NAME}.npz"
    server.behaviors += [sends(302, b"", {"Location": elsewhere}, length=1 << 40)]
    assert fetch(NAME).read_bytes() == CONTENT
    assert server.requests[1][0] == elsewhere
    cache_path(NAME).unlink()
    server.behaviors += [sends(302, b"", {"Location": elsewhere})] * 10
    with pytest.raises(InputError, match="more than 5 redirects"):
        fetch(NAME)


def test_redirects_away_from_https_are_refused(server, monkeypatch):
    def redirect(url, **options):
        response = requests.Response()
        response.status_code, response.headers["Location"] = 302, "http://mirror/x.npz"
        response.raw = io.BytesIO()
        return response

    monkeypatch.setattr(requests.Session, "get", lambda self, url, **options: redirect(url))
    monkeypatch.delenv("KERAS_MIXER_OFFICIAL")
    with pytest.raises(InputError, match="failed: it redirects from https to http://mirror/x.npz;"):
        fetch(NAME)


def test_lengths_may_be_missing(server):
    server.behaviors += [sends(length="unsaid", stop=len(CONTENT))]
    assert fetch(NAME).read_bytes() == CONTENT


def test_the_md5_of_google_cloud_storage_is_checked(server):
    md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    server.behaviors += [ranges(**{"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"})]
    fetch(NAME).unlink()
    server.behaviors += [ranges(**{"x-goog-hash": f"md5={md5[::-1]}"})]
    with pytest.raises(InputError, match="its MD5 is "):
        fetch(NAME)
    assert left_over() == []


# === Cut connections ===


def test_after_a_cut_only_the_rest_is_requested(server):
    server.behaviors += [ranges(stop=20_000), ranges(stop=20_000)]
    assert fetch(NAME).read_bytes() == CONTENT
    first, second, third = starts(server)
    assert first == 0
    assert 20_000 - PIECE <= second <= 20_000
    assert second + 20_000 - PIECE <= third <= second + 20_000
    assert left_over() == ["Mixer-B_16.npz"]


def test_many_cuts_are_harmless_as_long_as_bytes_arrive(server):
    server.behaviors += [ranges(stop=2 * PIECE) for _ in range(20)]
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(server.requests) > download.TRIES
    assert starts(server) == sorted(set(starts(server)))


def test_without_new_bytes_it_gives_up_and_keeps_the_part(server):
    server.behaviors += [ranges(stop=20_000), *(ranges(stop=0) for _ in range(20))]
    with pytest.raises(InputError) as error:
        fetch(NAME)
    for text in (f"/m/{NAME}.npz: download failed: ", "run again to resume", str(cache_path(NAME))):
        assert text in str(error.value)
    assert len(server.requests) == download.TRIES
    assert left_over() == ["Mixer-B_16.npz.part"]
    server.behaviors.clear()
    server.requests.clear()
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server)[0] > 20_000 - PIECE, "a later call resumes"


def test_pauses_double_and_start_over_with_new_bytes(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, "BACKOFF", 1.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.behaviors += [*(ranges(stop=0) for _ in range(3)), ranges(stop=20_000), ranges(stop=0)]
    fetch(NAME)
    assert pauses == [2, 4, 2], "the first retry is immediate"


def test_a_server_without_ranges_sends_all_of_it_again(server):
    server.behaviors += [ranges(stop=20_000), sends()]
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_other_bytes_than_requested_are_not_appended(server):
    wrong = {"Content-Range": f"bytes 100-{len(CONTENT) - 1}/{len(CONTENT)}"}
    server.behaviors += [ranges(stop=20_000), sends(206, CONTENT[100:], wrong)]
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server)[-1] == 0


def test_a_slow_server_is_asked_again_for_what_is_missing(server, monkeypatch):
    monkeypatch.setattr(download, "SLOWEST", (1000, 0.3))
    server.behaviors.append(trickles(after=20_000))
    assert fetch(NAME).read_bytes() == CONTENT
    first, second = starts(server)
    assert first == 0
    assert 20_000 < second < 21_000


@pytest.mark.parametrize("content, asked", [
    (CONTENT[:30_000], [30_000]), (CONTENT, [54_976, 0]), (CONTENT + bytes(1000), [55_976, 0]),
], ids=["incomplete", "complete", "too long"])  # fmt: skip
def test_parts_of_earlier_attempts(server, capsys, content, asked):
    cache_path(NAME).parent.mkdir(parents=True)
    cache_path(NAME).with_name("Mixer-B_16.npz.part").write_bytes(content)
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server) == asked
    assert "resuming after" in capsys.readouterr().err
    assert left_over() == ["Mixer-B_16.npz"]


def test_ctrl_c_keeps_the_part(server, tmp_path):
    """A process is interrupted while it waits for the second half."""
    half, released = threading.Event(), threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", len(CONTENT))
        handler.end_headers()
        handler.wfile.write(CONTENT[:30_000])
        half.set()
        released.wait(60)

    server.behaviors += [stall]
    script = (
        "import sys; from keras_mixer.weights import download, registry; name = sys.argv[1]\n"
        "registry.OFFICIAL[name] = registry.OFFICIAL[name]._replace(size=0.05)\n"
        f"download.PIECE = {PIECE}\n"
        "from keras_mixer.__main__ import main\n"
        "sys.exit(main(['convert', 'official:' + name, 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, NAME],
        env={**download.os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert half.wait(60)
        part = cache_path(NAME).with_name("Mixer-B_16.npz.part")
        while not part.exists() or part.stat().st_size < 16_000:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        released.set()
        process.kill()
    assert process.returncode == 130 and errors.endswith(b"error: interrupted\n")
    kept = part.stat().st_size
    assert 16_000 <= kept <= 30_000
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server)[-1] == kept


# === Wrong files ===


WRONG = {
    "long": (sends(body=CONTENT + bytes(9000)), r"expected at most 57,671 bytes, received 6"),
    "endless": (sends(body=CONTENT * 2, length="unsaid", stop=200_000), "expected at most 57,671"),
    "a web page": (
        sends(body=b"<!doctype html>" + CONTENT, headers={"Content-Type": "text/html"}),
        r"expected an \.npz, received text/html: b.<!doctype html>",
    ),
    "not there": (sends(404, b"<html>nothing here</html>"), "HTTP status 404 Not Found"),
    "nothing": (sends(204, b""), "HTTP status 204"),
}


@pytest.mark.parametrize("behavior, message", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_and_removed(server, behavior, message):
    server.behaviors += [behavior] * 10
    with pytest.raises(InputError, match=message) as error:
        fetch(NAME)
    assert f"http://127.0.0.1:{server.server_port}/m/{NAME}.npz: " in str(error.value)
    assert f"at {cache_path(NAME)}" in str(error.value)
    assert "set KERAS_MIXER_OFFICIAL to another server" in str(error.value)
    assert len(server.requests) == 1, "a retry would not help"
    assert left_over() == []


def test_a_short_file_without_a_length_is_refused(server):
    server.behaviors += [sends(body=CONTENT[:40_000], length="unsaid", stop=99_999)] * 10
    with pytest.raises(InputError, match="the connection ended after 40,000 bytes"):
        fetch(NAME)
    assert not cache_path(NAME).exists()


@pytest.mark.parametrize("status", [429, 503])
def test_temporary_errors_are_retried(server, status):
    server.behaviors += [sends(status, b"sorry"), sends(status, b"sorry")]
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_damage_is_found_when_the_file_is_read(server):
    damaged = bytearray(CONTENT)
    damaged[30_000] ^= 1
    server.behaviors += [sends(body=bytes(damaged))]
    with pytest.raises(InputError, match="damaged.*; delete .*Mixer-B_16.npz to download it again"):
        read_pretrained(f"official:{NAME}", (24, 16))
    cache_path(NAME).unlink()
    assert read_pretrained(f"official:{NAME}", (24, 16)).arrays


def test_a_file_downloaded_by_hand_is_used_if_its_size_is_right(server):
    cache_path(NAME).parent.mkdir(parents=True)
    cache_path(NAME).write_bytes(CONTENT[:9000])
    with pytest.raises(
        InputError, match="expected official:.* of 47,186 to 57,671 bytes, found 9,000"
    ):
        fetch(NAME)
    cache_path(NAME).write_bytes(CONTENT)
    assert fetch(NAME) == cache_path(NAME)
    assert not server.requests


@pytest.mark.parametrize("name", ["imagenet21k/mixer-B_16", "imagenet21k/Mixer-B_16.npz"])
def test_unknown_names_are_answered_with_the_known_ones(name):
    with pytest.raises(InputError) as error:
        load_mixer(f"official:{name}")
    assert all(known in str(error.value) for known in OFFICIAL)
    assert str(error.value).endswith("did you mean official:imagenet21k/Mixer-B_16?")
    with pytest.raises(InputError, match=r"gsam/Mixer-S_8$"):
        find_release("../../etc/passwd")


# === No network, no disk, no certificate ===


@pytest.mark.parametrize("address, reason", [
    ("http://127.0.0.1:1", "Connection refused"), ("http://nowhere.invalid", "Failed to resolve"),
    ("mirror", "Invalid URL"), ("ftp://127.0.0.1", "No connection adapters"),
])  # fmt: skip
def test_an_unreachable_server_is_one_line(server, monkeypatch, address, reason):
    monkeypatch.setenv("KERAS_MIXER_OFFICIAL", address)
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(InputError, match=reason) as error:
        load_mixer(f"official:{NAME}")
    assert str(error.value).startswith(f"{address}/{NAME}.npz: ")
    assert f"at {cache_path(NAME)}" in str(error.value)
    assert "\n" not in str(error.value)


def test_certificates_are_checked(server, monkeypatch, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with serving(lambda plain: context.wrap_socket(plain, server_side=True)) as strange:
        address = f"https://127.0.0.1:{strange.server_port}"
        monkeypatch.setenv("KERAS_MIXER_OFFICIAL", address)
        with pytest.raises(InputError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(NAME)
        assert not strange.requests
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        assert fetch(NAME).read_bytes() == CONTENT


def test_a_full_disk_is_one_line_and_keeps_the_part(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(
            InputError, match="Mixer-B_16.npz: cannot be written: File too large; KE"
        ):
            fetch(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fetch(NAME).read_bytes() == CONTENT
    assert 0 < starts(server)[-1] <= 20_000


def test_two_at_a_time_download_once(server, monkeypatch):
    """The second waits for the first, which is answered only once the second is waiting."""
    waiting, found = threading.Event(), []
    info = download.logger.info

    def listen(text):
        info(text)
        waiting.set() if "another process is downloading" in text else None

    def patiently(handler):
        assert waiting.wait(60)
        ranges()(handler)

    monkeypatch.setattr(download.logger, "info", listen)
    server.behaviors += [patiently]
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [cache_path(NAME)] * 2
    assert cache_path(NAME).read_bytes() == CONTENT
    assert len(server.requests) == 1


# === From there to a model ===


def test_logits_of_a_downloaded_file_are_those_of_the_source(server, capsys):
    expected = np.load(GOLDEN / "official_mixer_expected.npz")
    model = load_mixer(f"official:{NAME}", image_shape=(24, 16))
    np.testing.assert_allclose(model(expected["images"]), expected["logits"], rtol=0, atol=1e-5)
    said = " ".join(capsys.readouterr().err.split())
    assert f"official:{NAME}: an official Mixer checkpoint (trained on ImageNet-1k alone" in said
    assert "timm's mixer_b16_224.goog_in21k_ft_in1k, whose name says ImageNet-21k, is this" in said


def test_a_local_copy_has_the_same_provenance_and_others_have_none(server, tmp_path):
    (tmp_path / "imagenet1k").mkdir()
    copy = shutil.copy(GOLDEN / "official_mixer.npz", tmp_path / "imagenet1k" / "Mixer-B_16.npz")
    assert "trained on ImageNet-1k alone" in summary(read_pretrained(copy, (24, 16)))
    assert "trained on" not in summary(read_pretrained(GOLDEN / "official_mixer.npz", (24, 16)))


def test_a_run_that_started_from_a_download_resumes_without_it(
    server, folder, tmp_path, monkeypatch
):
    config = Config(**{
        **TINY, "depth": None, "dim": None, "dataset": "folder", "data_dir": str(folder),
        "checkpoint": f"official:{NAME}", "image_shape": (24, 16), "batch_size": 8, "num_steps": 2,
        "output_dir": str(tmp_path / "run"), "eval_crop": 0.0,
    })  # fmt: skip
    run = fit(config)
    weights = (run.best / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    server.requests.clear()
    server.behaviors += [sends(404)] * 10
    assert (fit(config).best / "model.safetensors").read_bytes() == weights
    assert not server.requests
