"""The processes that train one run: what they tell each other, and what ends them together.

JAX exchanges gradients, but a process that is lost makes the others wait, or abort without a word.
So every process also has a connection to process 0, over which they exchange values in lines of
JSON, and say every few seconds that they are alive.
"""

import atexit
import contextlib
import os
import queue
import threading
import time

from keras_mixer.compute import connections as connections
from keras_mixer.compute.rank import find_rank
from keras_mixer.errors import InputError, RunError
from keras_mixer.log import logger, print_last_words
from keras_mixer.signals import Interrupted

STANDSTILL = 900.0  # seconds without a step or a validation, after which training is stuck
_GRACE = 5.0  # seconds in which the main thread may end the process by itself
_GO_ON = "; the same command in all processes goes on from the last checkpoint"
_OURS = (InputError, RunError, OSError)  # errors of a process itself


class ProcessGroup:
    """The processes of a run, as seen by one of them; a context manager.

    When the block ends with an error, the other processes end with it, in one line. When a process
    is lost, all others say so and end with status 1.

    Attributes:
        index: int. Number of this process; process 0 is_main: it writes the run directory.
        count: int. Number of processes.
        rank: `Rank`, None if the process is alone.
    """

    def __init__(self, rank=None):
        self.rank = rank
        self.index, self.count = (rank.index, rank.count) if rank else (0, 1)
        self.names = [f"process {index}" for index in range(self.count)]
        self.engine_started = False
        self._connections = {}
        self._inbox = {index: queue.Queue() for index in range(self.count)}
        self._progress = None  # steps and batches counted in training; None before and after
        self._waiting = self._has_trained = self._over = False

    @property
    def is_main(self):
        """Whether this process writes the run directory."""
        return self.index == 0

    def exchange(self, value=None):
        """Returns what all processes gave, a list by their numbers; waits for all.

        Args:
            value: JSON value.

        Raises:
            RunError: If a process has ended, or is lost.
        """
        self._waiting = True
        try:
            return self._exchange(value)
        finally:
            self._waiting = False

    def _exchange(self, value):
        if not self.is_main:
            self._connections[0].send({"value": value})
            return self._receive(0)
        values = [value, *(self._receive(index) for index in range(1, self.count))]
        self._send_all({"value": values})
        return values

    def _receive(self, index):
        value = self._inbox[index].get()
        if isinstance(value, _End):
            raise RunError(value.reason)
        return value

    def note_progress(self):
        """Counts a step, or a batch of a validation: training is not stuck."""
        self._progress += 1

    @contextlib.contextmanager
    def training(self):
        """Has training watched in the block: all processes have to make progress."""
        self._progress, self._has_trained = 0, True
        try:
            yield
        finally:
            self._progress = None

    # === Joining ===

    def __enter__(self):
        if self.rank:
            join = connections.accept_all if self.is_main else connections.connect
            self._connections, self.names = join(self.rank)
            for index, connection in self._connections.items():
                threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback):
        if not self._connections:
            return
        if self.engine_started and isinstance(error, Exception) and not isinstance(error, _OURS):
            # JAX's error, most likely since a process is lost: the other threads end this one.
            time.sleep(connections.SILENCE + connections.BEAT)
        self._over = True
        stopped = kind is None or issubclass(kind, Interrupted)
        self._send_all({"bye": True} if stopped else {"end": self._describe(error)})
        for connection in self._connections.values():
            connection.end()
        if self.engine_started and not stopped:
            # JAX would wait for the others, minutes, before the process may end.
            atexit.register(os._exit, _status_of(error))

    def _describe(self, error):
        if isinstance(error, RunError) and str(error).startswith("process "):
            return str(error)  # as it was received
        text = " ".join(str(error).splitlines()) or type(error).__name__
        if not isinstance(error, Exception):  # KeyboardInterrupt, SystemExit
            text = "interrupted"
        return f"{self.names[self.index]} has ended: {text}"

    def _send_all(self, message):
        for connection in self._connections.values():
            connection.send(message)

    # === In threads of their own ===

    def _listen(self, index, connection):
        with contextlib.closing(connection):
            for message in connection.messages():
                if "value" in message:
                    self._inbox[index].put(message["value"])
                elif "end" in message:
                    self._end(message["end"])
            if connection.left:
                self._inbox[index].put(_End(f"{self.names[index]} has left"))
            else:
                self._end(f"{self.names[index]} was lost: its connection is closed")

    def _watch(self):
        moved, progress = time.monotonic(), None
        while not self._over:
            time.sleep(connections.BEAT)
            self._send_all({"progress": self._progress})
            now = time.monotonic()
            for index, connection in self._connections.items():
                if not connection.left and now - connection.heard > connections.SILENCE:
                    self._end(
                        f"{self.names[index]} was lost: silent for {connections.SILENCE:.0f} s"
                    )
            before, progress = progress, self._counts()
            moved = moved if before == progress and None not in progress else now
            if self.is_main and now - moved > STANDSTILL:
                self._end(self._describe_standstill(progress))

    def _counts(self):
        return [
            self._progress,
            *(self._connections[index].progress for index in sorted(self._connections)),
        ]

    def _describe_standstill(self, counts):
        behind = [n for n, c in zip(self.names, counts, strict=True) if c == min(counts)]
        return f"{' and '.join(behind)} hangs: no step was made for {STANDSTILL:.0f} s"

    def _end(self, reason):
        """Ends this process: by an error in `exchange`, or at once if training waits for others."""
        if self._over:
            return
        if self.is_main:
            self._send_all({"end": reason})
        if self._waiting or self._progress is None:
            for inbox in self._inbox.values():
                inbox.put(_End(reason))
            time.sleep(_GRACE)
            if self._over:
                return
        print_last_words(f"{reason}{_GO_ON * self._has_trained}")
        os._exit(1)


def _status_of(error):
    """Returns the exit status of a process that ends by an error, as the command line has it."""
    if isinstance(error, SystemExit):
        return error.code
    statuses = {InputError: 2, KeyboardInterrupt: 130}
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 1)


SINGLE = ProcessGroup()


def join_processes():
    """Returns the `ProcessGroup` that the environment puts this process in; see `find_rank`."""
    rank, tasks = find_rank(), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if not rank and tasks != "1" and os.environ.get("KERAS_BACKEND") != "jax":
        logger.warning(
            f"this is one of {tasks} tasks of SLURM, which train by themselves; with "
            f"KERAS_BACKEND=jax they train one run"
        )
    if rank and os.environ.get("KERAS_BACKEND") != "jax":
        raise InputError(
            f"{rank.count} processes: several need Keras's JAX backend, KERAS_BACKEND=jax (and "
            f"pip install 'keras_mixer[jax]')"
        )
    return ProcessGroup(rank) if rank else SINGLE


def refuse_several_processes(what):
    """Raises an `InputError` if this is one of several processes, which `what` cannot use."""
    if rank := find_rank():
        raise InputError(
            f"{what} run in one process, this is one of {rank.count}; several processes train "
            f"single runs"
        )


class _End:
    """Takes the rank of a value when there will be none."""

    def __init__(self, reason):
        self.reason = reason
