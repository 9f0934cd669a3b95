"""The processes that train one run: what they tell each other, and what ends them together.

JAX exchanges gradients, but a process that is lost makes the others wait, or abort without a word.
So every process also has a connection to process 0, over which they exchange values in lines of
JSON, and say every few seconds that they are alive.
"""

import atexit
import contextlib
import json
import os
import platform
import queue
import socket
import threading
import time

from keras_mixer import console
from keras_mixer.errors import InputError, RunError
from keras_mixer.training.place import find_place
from keras_mixer.training.signals import Interrupted

BEAT = 5.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one, after which a process is lost
STANDSTILL = 900.0  # seconds without a step or a validation, after which training is stuck
JOINING = 300.0  # seconds in which all processes have to be there
_GRACE = 5.0  # seconds in which the main thread may end the process by itself
_MOST_BYTES = 100_000_000  # of a line


class Team:
    """The processes of a run, as seen by one of them; a context manager.

    When the block ends with an error, the other processes end with it, in one line. When a process
    is lost, all others say so and end with status 1.

    Attributes:
        index: int. Number of this process; process 0 leads: it writes the run directory.
        count: int. Number of processes.
        place: `Place`, None if the process is alone.
    """

    def __init__(self, place=None):
        self.place = place
        self.index, self.count = (place.index, place.count) if place else (0, 1)
        self.names = [f"process {index}" for index in range(self.count)]
        self.engine_started = False
        self._links = {}
        self._inbox = {index: queue.Queue() for index in range(self.count)}
        self._progress = None  # steps and batches counted in training; None before and after
        self._waiting = self._over = False

    @property
    def leads(self):
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
        if not self.leads:
            self._links[0].send({"value": value})
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
        self._progress = 0
        try:
            yield
        except Exception as error:
            if type(error).__name__ in (
                "JaxRuntimeError",
                "XlaRuntimeError",
            ):  # as when another process is lost
                time.sleep(SILENCE + BEAT)  # the other threads end this one, and say why
            raise
        finally:
            self._progress = None

    # === Joining ===

    def __enter__(self):
        if self.place:
            self._links = _accept_all(self) if self.leads else {0: _connect(self)}
            for index, link in self._links.items():
                threading.Thread(target=self._listen, args=(index, link), daemon=True).start()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback):
        if not self._links:
            return
        self._over = True
        stopped = kind is None or issubclass(kind, Interrupted)
        self._send_all({"bye": True} if stopped else {"end": self._describe(error)})
        for link in self._links.values():
            link.end()
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
        for link in self._links.values():
            link.send(message)

    # === In threads of their own ===

    def _listen(self, index, link):
        with contextlib.closing(link):
            for message in link.messages():
                if "value" in message:
                    self._inbox[index].put(message["value"])
                elif "end" in message:
                    self._end(message["end"])
            if link.left:
                self._inbox[index].put(_End(f"{self.names[index]} has left"))
            else:
                self._end(f"{self.names[index]} was lost: its connection is closed")

    def _watch(self):
        moved, progress = time.monotonic(), None
        while not self._over:
            time.sleep(BEAT)
            self._send_all({"progress": self._progress})
            now = time.monotonic()
            for index, link in self._links.items():
                if not link.left and now - link.heard > SILENCE:
                    self._end(f"{self.names[index]} was lost: silent for {SILENCE:.0f} s")
            before, progress = progress, self._counts()
            moved = moved if before == progress and None not in progress else now
            if self.leads and now - moved > STANDSTILL:
                self._end(self._describe_standstill(progress))

    def _counts(self):
        return [self._progress, *(self._links[index].progress for index in sorted(self._links))]

    def _describe_standstill(self, counts):
        behind = [n for n, c in zip(self.names, counts, strict=True) if c == min(counts)]
        return f"{' and '.join(behind)} hangs: no step was made for {STANDSTILL:.0f} s"

    def _end(self, reason):
        """Ends this process: by an error in `exchange`, or at once if training waits for others."""
        if self._over:
            return
        if self.leads:
            self._send_all({"end": reason})
        if self._waiting or self._progress is None:
            for inbox in self._inbox.values():
                inbox.put(_End(reason))
            time.sleep(_GRACE)
            if self._over:
                return
        console.print_last_words(reason)
        os._exit(1)


def _status_of(error):
    """Returns the exit status of a process that ends by an error, as the command line has it."""
    if isinstance(error, SystemExit):
        return error.code
    statuses = {InputError: 2, KeyboardInterrupt: 130}
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 1)


ALONE = Team()


def joined():
    """Returns the `Team` that the environment puts this process in; see `find_place`."""
    place = find_place()
    if place and os.environ.get("KERAS_BACKEND") != "jax":
        raise InputError(
            f"{place.count} processes: several need Keras's JAX backend, KERAS_BACKEND=jax (and "
            f"pip install 'keras_mixer[jax]')"
        )
    return Team(place) if place else ALONE


def refuse_team(what):
    """Raises an `InputError` if this is one of several processes, which `what` cannot use."""
    if place := find_place():
        raise InputError(
            f"{what} run in one process, this is one of {place.count}; several processes train "
            f"single runs"
        )


class _End:
    """Takes the place of a value when there will be none."""

    def __init__(self, reason):
        self.reason = reason


class _Link:
    """A connection to another process, for lines of JSON.

    Attributes:
        heard: Time of the last message.
        progress: What the other process counts.
        left: Whether it has said that it leaves.
    """

    def __init__(self, connection):
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self.heard = time.monotonic()
        self.progress = None
        self.left = False

    def send(self, message):
        """Sends a message; that the other process is gone shows in reading."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, seconds=None, most=_MOST_BYTES):
        """Returns the next message; None at the end, or after some seconds."""
        try:
            self._connection.settimeout(seconds)
            message = json.loads(self._lines.readline(most))
            return message if isinstance(message, dict) else None
        except (OSError, ValueError):
            return None

    def messages(self):
        """Yields messages until the end."""
        while not self.left and (message := self.read()) is not None:
            self.heard = time.monotonic()
            self.progress = message.get("progress", self.progress)
            self.left = "bye" in message
            yield message

    def end(self):
        """Says that nothing more will be sent; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self):
        """Closes the connection."""
        self._lines.close()
        self._connection.close()


# === Joining ===


def _accept_all(team):
    """Waits for all other processes; returns dict from their numbers to `_Link`."""
    links = {}
    deadline = time.monotonic() + JOINING
    team.names[0] = f"process 0 ({platform.node()})"
    console.say(f"process 0 of {team.count} waits for the others on port {team.place.port + 1}")
    try:
        with _listening(team.place) as server:
            while len(links) < team.count - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                _welcome(team, links, _accepted(server, team, links))
    except (InputError, RunError) as error:
        for link in links.values():
            link.send({"end": str(error)})
            link.close()
        raise
    for link in links.values():
        link.send({"names": team.names})
    return links


def _accepted(server, team, links):
    try:
        return _Link(server.accept()[0])
    except TimeoutError as error:
        missing = ", ".join(str(n) for n in range(1, team.count) if n not in links)
        raise RunError(
            f"expected {team.count} processes; missing after {JOINING:.0f} s: {missing}"
        ) from error


def _listening(place):
    try:
        return socket.create_server(("", place.port + 1), reuse_port=False)
    except OSError as error:
        raise InputError(
            f"port {place.port + 1}, the next after that of the address of process 0, cannot be "
            f"listened on: {error.strerror}; give another port"
        ) from error


def _welcome(team, links, link):
    """Takes a process into the team, if it says that it belongs there."""
    hello = link.read(BEAT, most=1000) or {}
    index, count = hello.get("index"), hello.get("count")
    if not isinstance(index, int):
        link.close()  # none of ours
        return
    reason = None
    if count != team.count:
        reason = f"process {index} expects {count} processes, process 0 {team.count}"
    elif index in links or not 0 < index < team.count:
        reason = f"two processes say that they are process {index}"
    links["refused" if reason else index] = link
    if reason:
        raise InputError(reason)
    team.names[index] = f"process {index} ({hello.get('host')})"


def _connect(team):
    """Connects to process 0, and waits until all processes have."""
    link = _Link(_connection(team.place))
    link.send({"index": team.index, "count": team.count, "host": platform.node()})
    reply = link.read(JOINING + BEAT) or {"end": "process 0 was lost while the others came"}
    if "end" in reply:
        link.close()
        raise RunError(reply["end"])
    team.names = reply["names"]
    return link


def _connection(place):
    deadline = time.monotonic() + JOINING
    while True:
        try:
            return socket.create_connection((place.host, place.port + 1), timeout=BEAT)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process 0 was not found at {place.host}:{place.port + 1} in "
                    f"{JOINING:.0f} s: {error.strerror or error}"
                ) from error
            time.sleep(0.2)
