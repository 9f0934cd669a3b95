"""SIGINT, SIGTERM, SIGHUP: the first makes a run save and stop, the second ends it at once."""

import os
import signal

from keras_mixer import console
from keras_mixer.interrupts import handling

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


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
        self._handling = handling(SIGNALS, self._record)

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
        console.say(
            f"{signal.Signals(number).name}: saving after this step; "
            f"a second signal stops at once, and then work since the last checkpoint is repeated"
        )
