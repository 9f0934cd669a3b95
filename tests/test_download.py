"""Tests `keras_mixer/weights/download.py` against a server on this machine that misbehaves.

The files are small stand-ins: the golden checkpoint under names of the registry, whose sizes are
made to match.
"""

import http.server
import resource
import shutil
import signal
import socket
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
from keras_mixer.__main__ import main
from keras_mixer.weights import download
from keras_mixer.weights.download import fetch, place_of, release_named
from keras_mixer.weights.pretrained import read_pretrained, summary
from keras_mixer.weights.registry import OFFICIAL

NAME = "imagenet1k/Mixer-B_16"
CONTENT = (GOLDEN / "official_mixer.npz").read_bytes()  # 54,976 bytes: 0.05 MiB
PIECE = 4096


# === A server ===


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's next behaviour has it; when none is left, as it should."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        behaviours = self.server.behaviours
        (behaviours.pop(0) if behaviours else ranges())(self)

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


def ranges(content=CONTENT, etag='"one"', stop=None, heeds_etag=True):
    """The manners of RFC 9110: Range and If-Range; cuts the connection after `stop` bytes."""

    def behave(handler):
        asked, condition = handler.headers["Range"], handler.headers["If-Range"]
        headers = {"ETag": etag} if etag else {}
        if asked is None or (heeds_etag and condition not in (None, etag)):
            return handler.answer(200, content, headers, stop=stop)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return handler.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return handler.answer(206, content[start:], headers, stop=stop)

    return behave


def sends(status=200, body=CONTENT, headers=None, **options):
    """Answers with just this, whatever was asked for."""
    return lambda handler: handler.answer(status, body, headers, **options)


@contextmanager
def serving(wrap=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.behaviours = [], []
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
    """A server on this machine, in the place of the official one, and an empty cache."""
    with serving() as server:
        monkeypatch.setenv("KERAS_MIXER_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("KERAS_MIXER_OFFICIAL", f"http://127.0.0.1:{server.server_port}/m/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setitem(OFFICIAL, NAME, OFFICIAL[NAME]._replace(size=0.05))
        monkeypatch.setattr(download, "PIECE", PIECE)
        monkeypatch.setattr(download, "PAUSE", 0.0)
        yield server


def starts(server):
    """The byte at which each request wanted to begin."""
    asked = [headers.get("Range", "bytes=0-") for _, headers in server.requests]
    return [int(text.removeprefix("bytes=").removesuffix("-")) for text in asked]


def left_over():
    """What lies beside the file, but the lock."""
    folder = place_of(NAME).parent
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def trickles(after):
    """Sends so many bytes at once, and then one at a time."""

    def behave(handler):
        handler.answer(200, CONTENT[:after], {"ETag": '"one"'}, length=len(CONTENT))
        with suppress(OSError):
            for byte in CONTENT[after:]:
                time.sleep(0.01)
                handler.wfile.write(bytes([byte]))

    return behave


# === As it should be ===


def test_a_file_is_fetched_once(server, capsys):
    path = fetch(NAME)
    assert path == place_of(NAME) and path.read_bytes() == CONTENT
    ((asked, headers),) = server.requests
    assert asked == f"/m/{NAME}.npz"
    assert headers["Accept-Encoding"] == "identity", "so that lengths are those of the file"
    assert f"/m/{NAME}.npz (0.05 MiB) to {path}" in capsys.readouterr().err.replace("\n", " ")
    assert fetch(NAME) == path
    assert len(server.requests) == 1
    assert left_over() == ["Mixer-B_16.npz"]


def test_redirections_are_followed(server):
    place = f"/elsewhere/{NAME}.npz"
    server.behaviours += [sends(302, b"", {"Location": place})]
    assert fetch(NAME).read_bytes() == CONTENT
    assert server.requests[1][0] == place


def test_lengths_need_not_be_told(server):
    server.behaviours += [sends(length="unsaid", stop=len(CONTENT))]
    assert fetch(NAME).read_bytes() == CONTENT


# === Cut connections ===


def test_after_a_cut_only_the_rest_is_asked_for(server):
    server.behaviours += [ranges(stop=20_000), ranges(stop=20_000)]
    assert fetch(NAME).read_bytes() == CONTENT
    first, second, third = starts(server)
    assert first == 0
    assert 20_000 - PIECE <= second <= 20_000
    assert second + 20_000 - PIECE <= third <= second + 20_000
    assert [headers.get("If-Range") for _, headers in server.requests] == [None, '"one"', '"one"']
    assert left_over() == ["Mixer-B_16.npz"]


def test_many_cuts_do_no_harm_as_long_as_bytes_come(server):
    server.behaviours += [ranges(stop=2 * PIECE) for _ in range(20)]
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(server.requests) > download.TRIES
    assert starts(server) == sorted(set(starts(server)))


def test_without_new_bytes_it_gives_up_and_keeps_what_came(server):
    server.behaviours += [ranges(stop=20_000), *(ranges(stop=0) for _ in range(20))]
    with pytest.raises(InputError) as error:
        fetch(NAME)
    message = str(error.value)
    for part in (
        f"/m/{NAME}.npz: ",
        "cut",
        "5 times",
        "kept for the next time",
        str(place_of(NAME)),
    ):
        assert part in message
    assert len(server.requests) == download.TRIES
    assert left_over() == ["Mixer-B_16.npz.part", "Mixer-B_16.npz.part.etag"]
    assert not place_of(NAME).exists()
    server.behaviours.clear()
    server.requests.clear()
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server)[0] > 20_000 - PIECE, "a later call goes on"


def test_pauses_double_and_start_anew_with_new_bytes(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, "PAUSE", 1.0)
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.behaviours += [*(ranges(stop=0) for _ in range(3)), ranges(stop=20_000), ranges(stop=0)]
    fetch(NAME)
    assert pauses == [1, 2, 4, 1, 2]
    asked = ["Range" in headers for _, headers in server.requests]
    assert asked == [False] * 4 + [True] * 2, "only once something has come"


def test_a_body_shorter_than_its_length_never_becomes_the_file(server):
    server.behaviours += [sends(body=CONTENT[:50_000], length=len(CONTENT)) for _ in range(20)]
    with pytest.raises(InputError, match="cut"):
        fetch(NAME)
    assert not place_of(NAME).exists()


def test_a_server_without_ranges_is_asked_for_all_of_it_again(server):
    server.behaviours += [ranges(stop=20_000), sends()]
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_an_etag_nothing_is_put_together(server, etag):
    """Neither within a call nor in the next."""
    server.behaviours += [ranges(stop=20_000, etag=etag)] * download.TRIES
    with pytest.raises(InputError, match="cut") as error:
        fetch(NAME)
    assert "kept for the next time" not in str(error.value)
    server.behaviours += [ranges(stop=20_000, etag=etag)]
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server) == [0] * (download.TRIES + 2)


OTHER = CONTENT[:100] + bytes(500) + CONTENT[100:]  # another file of an allowed size


@pytest.mark.parametrize("heeds_etag", [True, False])
def test_a_file_that_changed_meanwhile_starts_anew(server, heeds_etag):
    new = ranges(OTHER, '"two"', heeds_etag=heeds_etag)
    server.behaviours += [ranges(stop=20_000), new, new, new]
    assert fetch(NAME).read_bytes() == OTHER
    assert len(server.requests) == (2 if heeds_etag else 3)


def test_a_wrong_part_is_not_appended(server):
    wrong = {"ETag": '"one"', "Content-Range": f"bytes 100-{len(CONTENT) - 1}/{len(CONTENT)}"}
    server.behaviours += [ranges(stop=20_000), sends(206, CONTENT[100:], wrong)]
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server)[-1] == 0


# === What an earlier attempt left ===


def leave(content, etag=b'"one"'):
    place = place_of(NAME)
    place.parent.mkdir(parents=True)
    place.with_name(f"{place.name}.part").write_bytes(content)
    if etag:
        place.with_name(f"{place.name}.part.etag").write_bytes(etag)


PARTS = {
    "goes on": (CONTENT[:30_000], b'"one"', [30_000]),
    "of an unknown file": (CONTENT[:30_000], None, [0]),
    "of another file, so the server sends all": (bytes(30_000), b'"old"', [30_000]),
    "its ETag is none": (bytes(30_000), b'"\r\nX: y"', [0]),
    "its ETag is no text": (bytes(30_000), b"\xff", [0]),
    "its ETag is empty": (bytes(30_000), b"", [0]),
    "whole: killed before the rename": (CONTENT, b'"one"', [54_976]),
    "longer than the file": (CONTENT + bytes(1000), b'"one"', [55_976, 0]),
    "longer than any such file": (CONTENT + bytes(100_000), b'"one"', [0]),
}


@pytest.mark.parametrize("content, etag, asked", PARTS.values(), ids=PARTS)
def test_parts_of_earlier_attempts(server, capsys, content, etag, asked):
    leave(content, etag)
    assert fetch(NAME).read_bytes() == CONTENT
    assert starts(server) == asked
    assert ("MiB are here already" in capsys.readouterr().err) == (asked[0] > 0)
    assert left_over() == ["Mixer-B_16.npz"]


def test_ctrl_c_leaves_the_part_for_the_next_time(server, tmp_path):
    """A process of its own is stopped while it waits for the second half."""
    half, released = threading.Event(), threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Length", len(CONTENT))
        handler.end_headers()
        handler.wfile.write(CONTENT[:30_000])
        half.set()
        released.wait(60)

    server.behaviours += [stall]
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
        part = place_of(NAME).with_name("Mixer-B_16.npz.part")
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


_SIZES = r"expected a file of 47,186 to 57,671 bytes, received one of "
WRONG = {
    "short": (sends(body=CONTENT[:40_000]), f"{_SIZES}40,000"),
    "long": (sends(body=CONTENT + bytes(9000)), f"{_SIZES}63,976"),
    "endless": (sends(body=CONTENT * 2, length="unsaid", stop=200_000), f"{_SIZES}6[01],"),
    "a web page": (
        sends(body=b"<!doctype html>" + CONTENT, headers={"Content-Type": "text/html"}),
        r"expected weights \(\.npz\), received text/html: b.<!doctype html>",
    ),
    "a picture": (sends(body=b"\x89PNG" + CONTENT[4:]), "received something else"),
    "not there": (sends(404, b"<html>nothing here</html>"), "HTTP status 404 Not Found"),
    "forbidden": (sends(403, b""), "HTTP status 403 Forbidden"),
    "nothing": (sends(204, b""), "HTTP status 204"),
}


@pytest.mark.parametrize("behaviour, message", WRONG.values(), ids=WRONG)
def test_what_is_not_the_file_is_refused_and_removed(server, behaviour, message):
    server.behaviours += [behaviour] * 10
    with pytest.raises(InputError, match=message) as error:
        fetch(NAME)
    assert f"http://127.0.0.1:{server.server_port}/m/{NAME}.npz: " in str(error.value)
    assert f"at {place_of(NAME)} yourself" in str(error.value)
    assert "KERAS_MIXER_OFFICIAL names another server" in str(error.value)
    assert len(server.requests) == 1, "asking again would not help"
    assert left_over() == []


def test_a_short_file_that_tells_no_length_is_refused(server):
    server.behaviours += [sends(body=CONTENT[:40_000], length="unsaid", stop=99_999)] * 10
    with pytest.raises(InputError, match="the connection ended after 40,000 bytes, 5 times"):
        fetch(NAME)
    assert not place_of(NAME).exists()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(server, status):
    server.behaviours += [sends(status, b"sorry"), sends(status, b"sorry")]
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_damage_shows_when_the_file_is_read_and_is_mended_by_deleting_it(server):
    damaged = bytearray(CONTENT)
    damaged[30_000] ^= 1
    server.behaviours += [sends(body=bytes(damaged))]
    with pytest.raises(InputError, match="damaged.*; delete .*Mixer-B_16.npz to have it downl"):
        read_pretrained(f"official:{NAME}", (24, 16))
    place_of(NAME).unlink()
    assert read_pretrained(f"official:{NAME}", (24, 16)).arrays


def test_a_file_put_there_by_hand_is_used_if_its_size_is_right(server):
    place_of(NAME).parent.mkdir(parents=True)
    place_of(NAME).write_bytes(CONTENT[:9000])
    with pytest.raises(
        InputError, match="expected official:.* of 47,186 to 57,671 bytes, found 9,000"
    ):
        fetch(NAME)
    place_of(NAME).write_bytes(CONTENT)
    assert fetch(NAME) == place_of(NAME)
    assert not server.requests


@pytest.mark.parametrize("name", ["imagenet21k/mixer-B_16", "imagenet21k/Mixer-B_16.npz"])
def test_unknown_names_are_answered_with_the_known_ones(name):
    with pytest.raises(InputError) as error:
        load_mixer(f"official:{name}")
    assert all(known in str(error.value) for known in OFFICIAL)
    assert str(error.value).endswith("did you mean official:imagenet21k/Mixer-B_16?")
    with pytest.raises(InputError, match=r"gsam/Mixer-S_8$"):
        release_named("../../etc/passwd")


# === No network, no disk, no certificate ===


@pytest.mark.parametrize("address, reason", [
    ("http://127.0.0.1:1", "Connection refused"), ("mirror", "Invalid URL"),
    ("ftp://127.0.0.1", "No connection adapters"),
])  # fmt: skip
def test_without_a_server_it_says_so_at_once(server, monkeypatch, address, reason):
    monkeypatch.setenv("KERAS_MIXER_OFFICIAL", address)
    monkeypatch.setattr(download.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(InputError, match=reason) as error:
        load_mixer(f"official:{NAME}")
    assert str(error.value).startswith(f"{address}/{NAME}.npz: ")
    assert f"at {place_of(NAME)} yourself" in str(error.value)
    assert "\n" not in str(error.value)


def test_names_are_looked_up_and_their_failure_is_told(server, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("KERAS_MIXER_OFFICIAL")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InputError) as error:
        fetch(NAME)
    assert str(error.value).startswith(f"{OFFICIAL[NAME].url}: cannot be reached (Failed to res")


def test_a_server_that_is_gone_for_a_while_is_waited_for(server, monkeypatch):
    server.behaviours += [ranges(stop=20_000)]
    monkeypatch.setattr(download, "PAUSE", 1.0)
    here = download.os.environ["KERAS_MIXER_OFFICIAL"]

    get, calls = requests.Session.get, []

    def sometimes(session, url, **options):
        calls.append(url)
        away = len(calls) in (2, 3)
        return get(
            session, url.replace(here.rstrip("/"), "http://127.0.0.1:1") if away else url, **options
        )

    monkeypatch.setattr(requests.Session, "get", sometimes)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(calls) == 4


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
        with pytest.raises(InputError, match=r"no safe connection \(.*CERTIFICATE_VERIFY_FAILED"):
            fetch(NAME)
        assert not strange.requests
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        assert fetch(NAME).read_bytes() == CONTENT


def test_a_full_disk_is_named_before_anything_is_written(server, monkeypatch):
    usage = shutil.disk_usage(ROOT)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="the disk has 20,000 left; KERAS_MIXER_CACHE names"):
        fetch(NAME)
    assert not place_of(NAME).exists()


def test_a_disk_that_fills_up_meanwhile_is_named_and_the_part_kept(server):
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
    server.behaviours += [patiently]
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [place_of(NAME)] * 2
    assert place_of(NAME).read_bytes() == CONTENT
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


def test_convert_takes_released_names(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", f"official:{NAME}", "copy.npz", "--image_shape=24,16"]) == 0
    copied, source = np.load("copy.npz"), np.load(GOLDEN / "official_mixer.npz")
    assert copied.files and all((copied[name] == source[name]).all() for name in source.files)


def test_a_run_that_started_from_a_download_goes_on_without_it(
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
    server.behaviours += [sends(404)] * 10
    assert (fit(config).best / "model.safetensors").read_bytes() == weights
    assert not server.requests


def test_a_server_that_trickles_is_asked_again_for_what_is_missing(server, monkeypatch):
    monkeypatch.setattr(download, "SLOWEST", (1000, 0.3))
    server.behaviours.append(trickles(after=20_000))
    assert fetch(NAME).read_bytes() == CONTENT
    first, second = starts(server)
    assert first == 0
    assert 20_000 < second < 21_000


def test_a_length_of_thousands_of_digits_is_none(server):
    server.behaviours.append(sends(length="9" * 5000))
    assert fetch(NAME).read_bytes() == CONTENT
