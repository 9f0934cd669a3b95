"""SIGINT, SIGTERM, SIGHUP: the first asks the run to save and stop, the second kills it."""

import os
import signal
import threading

from keras_mixer import console

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Interrupted(BaseException):
    """A run was stopped by a signal, after its state was saved.

    Attributes:
        exit_status: 128 + the signal's number, as shells have it: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signal_number):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


class StopRequest:
    """Within its `with` block, notes the first signal instead of dying of it.

    Attributes:
        signal_number: The signal that arrived; None as long as none has.
    """

    def __init__(self):
        self.signal_number = None
        self._before = {}

    def __bool__(self):
        return self.signal_number is not None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self:
            os._exit(128 + number)
        self.signal_number = number
        console.say(
            f"{signal.Signals(number).name}: saving after this step; "
            f"a second signal stops at once, and then work since the last checkpoint is repeated"
        )
