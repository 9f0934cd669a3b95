"""Tests `keras_mixer/signals.py`: Ctrl-C at any moment is one line and status 130."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from keras_mixer.signals import exiting_on_interrupt


@pytest.mark.parametrize("module", ["rich", "absl.flags", "tensorflow", "keras"])
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path, module):
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from keras_mixer.__main__ import main\n"
        "sys.exit(main(['train', '--num_steps=1', '--warmup_step=0']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, b"")
    assert done.stderr.splitlines()[-1] == b"error: interrupted"
    assert b"Traceback" not in done.stderr


def test_the_handler_before_is_put_back_and_threads_have_none():
    before = signal.getsignal(signal.SIGINT)
    found = []

    def note():
        with exiting_on_interrupt():
            found.append(signal.getsignal(signal.SIGINT))

    note()
    assert signal.getsignal(signal.SIGINT) == before != found.pop()
    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    assert found == [before]
