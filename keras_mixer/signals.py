"""Temporary signal handlers: a first SIGINT, SIGTERM or SIGHUP saves and stops a run."""

import contextlib
import logging
import os
import signal
import threading

logger = logging.getLogger("keras_mixer")

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@contextlib.contextmanager
def temporary_handlers(numbers, handler):
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


def exiting_on_interrupt(stderr=2):
    """Lets Ctrl-C end the process with one line and status 130, for a block of imports.

    Those may turn a KeyboardInterrupt into another error; nothing is being written then.

    Args:
        stderr: File descriptor to write the line to.
    """

    def end(number, frame):
        with contextlib.suppress(OSError):
            os.write(stderr, b"error: interrupted\n")
        os._exit(128 + number)

    return temporary_handlers([signal.SIGINT], end)


class Interrupted(BaseException):
    """A run was stopped by a signal, after its state was saved.

    Attributes:
        exit_status: 128 + the signal's number, as in shells: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signal_number):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


class StopRequest:
    """Context manager that records the first signal, and is true from then on.

    Args:
        agreed: bool. Whether other processes have to agree first: the caller then sets
            `signal_number`.

    Attributes:
        received: The signal that arrived in this process, or None.
        signal_number: The signal that stops the run, or None.
    """

    def __init__(self, agreed=False):
        self.received = self.signal_number = None
        self._agreed = agreed
        self._handling = temporary_handlers(SIGNALS, self._record)

    def __bool__(self):
        return self.signal_number is not None

    def __enter__(self):
        self._handling.__enter__()
        return self

    def __exit__(self, *error):
        return self._handling.__exit__(*error)

    def _record(self, number, frame):
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if not self._agreed:
            self.signal_number = number
        logger.info(
            f"{signal.Signals(number).name}: saving after this step; "
            f"a second signal stops at once, and then work since the last checkpoint is repeated"
        )
