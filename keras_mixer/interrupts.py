"""Ctrl-C while modules are imported, which may turn a KeyboardInterrupt into another error."""

import contextlib
import os
import signal
import threading


@contextlib.contextmanager
def ending_at_once(stderr=2):
    """Lets Ctrl-C end the process with one line and status 130; nothing is being written then.

    Args:
        stderr: File descriptor to write the line to.
    """

    def end(number, frame):
        with contextlib.suppress(OSError):
            os.write(stderr, b"error: interrupted\n")
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
