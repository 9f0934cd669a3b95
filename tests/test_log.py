"""Tests `keras_mixer/log.py`: it prints literally, and never stops a run."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from keras_mixer.log import logger, one_line, printable


def test_names_are_printed_literally(capsys):
    logger.info("output:dog:1 [bold]x[/bold] \x1b[31m a\tb")
    assert capsys.readouterr().err == "output:dog:1 [bold]x[/bold] \\x1b[31m a\\tb\n"


def test_printable_keeps_what_can_be_read():
    assert printable("Zürich 猫 line\nline") == "Zürich 猫 line\nline"
    assert printable("caf\udce9") == "caf\\udce9"
    assert one_line("a.png: cat\nb.png") == "a.png: cat\\nb.png"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_of_bytes_is_drawn_on_terminals_only(monkeypatch, terminal):
    """rich takes standard error for a terminal where FORCE_COLOR is set."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1") if terminal else monkeypatch.delenv("FORCE_COLOR", False)
    code = (
        "from keras_mixer.log import byte_bar\n"
        "with byte_bar('downloading') as show: show(1 << 20, 4 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert (b"downloading" in done.stderr and b"1.0/4.0 MiB" in done.stderr) == terminal
    assert (done.stderr != b"") == terminal


def test_a_closed_standard_error_stops_nothing():
    """`train.py 2>&1 | tee log`: Ctrl-C kills tee first; the run must still save its state."""
    code = (
        "from keras_mixer.log import logger, progress_bar, show_messages; show_messages()\n"
        "say = logger.info; say('a'); input()\nwith progress_bar(): say('b')\n"
        "say('c'); print('went on')"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stderr.readline() == b"a\n"
    process.stderr.close()
    assert process.communicate(b"\n")[0] == b"went on\n"
    assert process.returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_keep_no_command_from_its_end(tmp_path, closed):
    """Else the next file that is opened would be the stream, and get what is printed."""
    command = f"{sys.executable} {ROOT}/train.py --help {closed}; echo $? > status"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "status").read_text() == "0\n"
    code = (
        "from keras_mixer.log import prepare_streams; prepare_streams(); import sys\n"
        "with open('file', 'w') as file: print(file.fileno(), file=file)\n"
        "print('out'); print('é', file=sys.stderr)"
    )
    command = f'PYTHONIOENCODING=ascii {sys.executable} -c "{code}" {closed}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert int((tmp_path / "file").read_text()) > 2


def test_settings_of_keras_do_not_change_results(command, tmp_path, monkeypatch):
    """Those in keras.json, which old installations leave behind, and in the environment."""
    words = ["--depth=1", "--dim=8", "--num_steps=1", "--batch_size=256", "--export=false"]
    assert command(*words, "--output_dir=plain").returncode == 0
    home = tmp_path / "keras"
    home.mkdir()
    settings = {"floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first"}
    (home / "keras.json").write_text(json.dumps(settings))
    monkeypatch.setenv("KERAS_HOME", str(home))
    assert command(*words, "--output_dir=set").returncode == 0
    plain, other = ((tmp_path / name / "history.csv").read_text() for name in ("plain", "set"))
    assert plain.split(",")[:15] == other.split(",")[:15], "all but the times"

    (home / "keras.json").write_text('{"floatx": "float99"}')
    done = command(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "does not accept its settings in ~/.keras/keras.json" in done.stderr

    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("KERAS_MAX_EPOCHS", "1")
    done = command(*words)
    assert done.returncode == 2
    assert (
        "error: Keras is set to max_epochs=1: expected None; unset KERAS_MAX_EPOCHS" in done.stderr
    )


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"]])
def test_help_without_docstrings(words):
    line = [sys.executable, "-OO", "-m", "keras_mixer", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: keras-mixer")


def test_help_that_nobody_reads_is_no_traceback():
    line = f"{shlex.quote(sys.executable)} -m keras_mixer --help | true"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
