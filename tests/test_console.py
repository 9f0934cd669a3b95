"""Tests `keras_mixer/console.py`: it prints literally, and never stops a run."""

import io
import subprocess
import sys

from conftest import ROOT
from rich.console import Console

from keras_mixer import console
from keras_mixer.console import byte_bar, printable, say


def test_names_are_printed_literally(capsys):
    say("output:dog:1 [bold]x[/bold] \x1b[31m a\tb")
    assert capsys.readouterr().err == "output:dog:1 [bold]x[/bold] \\x1b[31m a\\tb\n"


def test_printable_keeps_what_can_be_read():
    assert printable("Zürich 猫 line\nline") == "Zürich 猫 line\nline"
    assert printable("caf\udce9") == "caf\\udce9"


def test_bytes_are_drawn_on_terminals_only(monkeypatch):
    for terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(
            console, "_console", Console(file=screen, force_terminal=terminal, width=120)
        )
        with byte_bar("downloading") as show:
            show(1 << 20, 4 << 20)
        drawn = "downloading" in screen.getvalue() and "1.0/4.0 MiB" in screen.getvalue()
        assert drawn == terminal


def test_nobody_listening_stops_nothing():
    """`train.py 2>&1 | tee log`: Ctrl-C kills tee first; the run must still come to its saving."""
    code = (
        "import time\nfrom keras_mixer.console import progress_bar, say\n"
        "say('a'); time.sleep(1)\nwith progress_bar(): say('b')\nsay('c'); print('went on')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr.readline() == b"a\n"
    process.stderr.close()
    assert process.stdout.read() == b"went on\n"
    process.stdout.close()
    assert process.wait() == 0
