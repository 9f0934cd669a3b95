"""The processes that train one run: joining, exchanging values, noticing failures.

The engine is keras.distribution on JAX, whose XLA collectives exchange the gradients. The control
plane, which decides who takes part and notices who is lost or stuck, is this module: every process
has a connection to process 0, for values in lines of JSON and a heartbeat. JAX's own coordination
service does not do (0.10.2, measured): it cannot name the process that is missing, refuse a wrong
number of processes or a taken port, or notice a process that is alive but stuck, and it ends the
others by SIGABRT with a C++ stack trace.
"""

import atexit
import contextlib
import ctypes
import os
import queue
import signal
import threading
import time

from keras_mixer.compute import connections
from keras_mixer.compute.rank import find_rank
from keras_mixer.errors import InputError, RunError
from keras_mixer.log import hide_library_output, logger, print_last_words
from keras_mixer.signals import Interrupted

STANDSTILL = 900.0  # seconds without a step or a validation batch, after which training is stuck
_GRACE = 5.0  # seconds in which the main thread may end the process by itself
_TO_CONTINUE = "; the same command in all processes continues from the last checkpoint"
_OWN_ERRORS = (InputError, RunError, OSError)  # that no other process has caused


class ProcessGroup:
    """The processes of a run, as one of them sees them; a context manager.

    When the block ends with an error, the other processes end, too, and report it in one line. When
    a process is lost, all others report that and end with status 1.

    Attributes:
        index: int. Number of this process, from 0.
        count: int. Number of processes.
        names: list of strings, such as `"process 1 (host)"`.
        rank: `Rank`, None for a single process.
    """

    def __init__(self, rank=None):
        self.rank = rank
        self.index, self.count = (rank.index, rank.count) if rank else (0, 1)
        self.names = [f"process {index}" for index in range(self.count)]
        self._jax_started = False
        self._connections = {}
        self._inbox = {index: queue.Queue() for index in range(self.count)}
        self._progress = None  # number of steps and validation batches; None outside of training
        self._waiting = self._has_trained = self._over = False

    @property
    def is_main(self):
        """Whether this process writes the run directory."""
        return self.index == 0

    def exchange(self, value=None):
        """Returns the JSON values of all processes, a list by their numbers; waits for all.

        Raises:
            RunError: If a process has ended, or was lost.
        """
        self._waiting = True
        try:
            if not self.is_main:
                self._connections[0].send({"value": value})
                return self._receive(0)
            values = [value, *(self._receive(index) for index in range(1, self.count))]
            self._send_all({"value": values})
            return values
        finally:
            self._waiting = False

    def _receive(self, index):
        value = self._inbox[index].get()
        if isinstance(value, RunError):
            raise value
        return value

    def note_progress(self):
        """Counts a step or a validation batch; see `training`."""
        self._progress += 1

    @contextlib.contextmanager
    def training(self):
        """Watches training in the block: a process without progress for `STANDSTILL` is stuck."""
        self._progress, self._has_trained = 0, True
        try:
            yield
        finally:
            self._progress = None

    @contextlib.contextmanager
    def jax_connected(self):
        """Connects JAX in several processes until the block ends; before it computes anything."""
        if self.count == 1:
            yield
            return
        import jax

        hide_library_output()  # Gloo prints lines about its ranks
        _delay_aborts()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        self._jax_started = True
        jax.distributed.initialize(f"{self.rank.host}:{self.rank.port}", self.count, self.index)
        interruption = None
        try:
            yield
        except Interrupted as error:
            interruption = error
        jax.distributed.shutdown()  # waits for all; after an error, __exit__ ends the process
        self._jax_started = False
        if interruption:
            raise interruption

    # === Joining and leaving ===

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
        of_jax = isinstance(error, Exception) and not isinstance(error, _OWN_ERRORS)
        if self._jax_started and of_jax:
            # Most likely since a process was lost: the threads below end this one and name it.
            time.sleep(connections.SILENCE + connections.BEAT)
        self._over = True
        stopped = kind is None or issubclass(kind, Interrupted)
        self._send_all({"bye": True} if stopped else {"end": self._describe(error)})
        for connection in self._connections.values():
            connection.end()
        if self._jax_started and not stopped:
            # JAX would make the process wait minutes for the others before it ends.
            atexit.register(os._exit, _status_of(error))

    def _describe(self, error):
        if isinstance(error, RunError) and str(error).startswith("process "):
            return str(error)  # received from another process
        text = " ".join(str(error).splitlines()) or type(error).__name__
        if not isinstance(error, Exception):  # KeyboardInterrupt, SystemExit
            text = "interrupted"
        return f"{self.names[self.index]} has ended: {text}"

    def _send_all(self, message):
        for connection in self._connections.values():
            connection.send(message)

    # === Threads: one listens to each connection, one watches all ===

    def _listen(self, index, connection):
        with contextlib.closing(connection):
            for message in connection.messages():
                if "value" in message:
                    self._inbox[index].put(message["value"])
                elif "end" in message:
                    self._end(message["end"])
            if connection.left:
                self._inbox[index].put(RunError(f"{self.names[index]} has left"))
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
        """Ends this process: by an error in `exchange`, or at once if JAX waits for the others."""
        if self._over:
            return
        if self.is_main:
            self._send_all({"end": reason})
        if self._waiting or self._progress is None:
            for inbox in self._inbox.values():
                inbox.put(RunError(reason))
            time.sleep(_GRACE)
            if self._over:
                return
        print_last_words(f"{reason}{_TO_CONTINUE * self._has_trained}")
        os._exit(1)


def _status_of(error):
    """Returns the exit status of a process that ends by an error, that of the command line."""
    if isinstance(error, SystemExit):
        return error.code
    statuses = {InputError: 2, KeyboardInterrupt: 130}
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 1)


SINGLE = ProcessGroup()


def join_processes():
    """Returns the `ProcessGroup` that environment variables describe; see `find_rank`."""
    rank, tasks = find_rank(), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if not rank and tasks != "1" and os.environ.get("KERAS_BACKEND") != "jax":
        logger.warning(
            f"this is one of {tasks} tasks of SLURM, and each trains a run of its own; with "
            f"KERAS_BACKEND=jax they train one run together"
        )
    if rank and os.environ.get("KERAS_BACKEND") != "jax":
        raise InputError(
            f"{rank.count} processes: several need Keras's JAX backend, KERAS_BACKEND=jax (and "
            f"pip install 'keras_mixer[jax]')"
        )
    return ProcessGroup(rank) if rank else SINGLE


def refuse_several_processes(what):
    """Raises an `InputError` in one of several processes, which `what`, a plural, cannot use."""
    if rank := find_rank():
        raise InputError(
            f"{what} run in one process, this is one of {rank.count}; several processes train a "
            f"single run"
        )


def _delay_aborts():
    """Makes abort() wait for six seconds, in which `ProcessGroup` reports who was lost.

    JAX calls it, without a message, when process 0 is gone (0.10.2). The signal handler is the C
    function sleep(), which receives the number of the signal, 6.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
