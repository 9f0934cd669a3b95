"""Signals: handlers for a while, and Ctrl-C while modules are imported."""

import contextlib
import os
import signal
import threading


@contextlib.contextmanager
def handling(numbers, handler):
    """Handles signals until the block ends, in the main thread: Python allows no other.

    Args:
        numbers: Signals. Those that are ignored stay so, as SIGHUP under nohup.
        handler: Function of the signal and the frame, as for `signal.signal`.
    """
    main = threading.current_thread() is threading.main_thread()
    handled = [n for n in numbers if main and signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def ending_at_once(stderr=2):
    """Lets Ctrl-C end the process with one line and status 130, for a block of imports.

    Those may turn a KeyboardInterrupt into another error; nothing is being written then.

    Args:
        stderr: File descriptor to write the line to.
    """

    def end(number, frame):
        with contextlib.suppress(OSError):
            os.write(stderr, b"error: interrupted\n")
        os._exit(128 + number)

    return handling([signal.SIGINT], end)
