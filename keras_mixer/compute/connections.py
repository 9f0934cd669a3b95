"""Connections between the processes of a run: lines of JSON, and how all of them are made.

Process 0 listens on the port after that of JAX. Whoever says there which process it is belongs to
the run; all else is left alone.
"""

import contextlib
import json
import platform
import select
import socket
import threading
import time

from keras_mixer.errors import InputError, RunError
from keras_mixer.log import logger

BEAT = 5.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one, after which a process is lost
JOINING = 600.0  # seconds in which all processes have to be there
_MOST_BYTES = 100_000_000  # of a line


class Connection:
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
        """Returns the next message; None at the end, or if it does not come in some seconds."""
        late = threading.Timer(seconds or 0, self.stop)  # a timeout would be that of each byte
        if seconds:
            late.start()
        try:
            message = json.loads(self._lines.readline(most))
            return message if isinstance(message, dict) else None
        except (OSError, ValueError, RecursionError):
            return None
        finally:
            late.cancel()

    def fileno(self):
        """Returns the number by which `select` knows the connection."""
        return self._connection.fileno()

    def stop(self):
        """Has reading end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

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


def accept_all(rank):
    """Waits, in process 0, for all other processes.

    Args:
        rank: `Rank` of this process.

    Returns:
        (connections, names): dict from the numbers of the others to `Connection`, and the names of
        all.

    Raises:
        InputError: If the ports are taken, or a process says that it is another's, or of more.
        RunError: If one does not come.
    """
    joining = _Joining(rank)
    logger.info(f"process 0 of {rank.count} waits for the others on port {rank.port + 1}")
    try:
        with _listening(rank) as server:
            deadline = time.monotonic() + JOINING
            while joining.missing():
                joining.go_on(server, deadline)
    except (InputError, RunError) as error:
        joining.end(error)
        raise
    for connection in joining.connections.values():
        connection.send({"names": joining.names})
    return joining.connections, joining.names


def _listening(rank):
    for port in (rank.port, rank.port + 1):
        try:
            server = socket.create_server(("", port))
        except OSError as error:
            raise InputError(
                f"port {port} is not free ({error.strerror}); expected the port of the address of "
                f"process 0, {rank.port}, and the next one to be: give another"
            ) from error
        if port == rank.port:
            server.close()  # it will be JAX's
    return server


class _Joining:
    """The processes that have come so far."""

    def __init__(self, rank):
        self.connections = {}
        self.names = [f"process {index}" for index in range(rank.count)]
        self.names[0] += f" ({platform.node()})"

    def missing(self):
        return [index for index in range(1, len(self.names)) if index not in self.connections]

    def go_on(self, server, deadline):
        """Waits a while for a process that comes or goes, and tells the others to wait."""
        if (left := deadline - time.monotonic()) <= 0:
            missing = ", ".join(map(str, self.missing()))
            raise RunError(
                f"expected {len(self.names)} processes; missing after {JOINING:.0f} s: {missing}"
            )
        ready, *_ = select.select([server, *self.connections.values()], [], [], min(BEAT, left))
        for index in [i for i, connection in self.connections.items() if connection in ready]:
            logger.info(f"{self.names[index]} is gone again")
            self.connections.pop(index).close()  # they say nothing while they wait
        if server in ready:
            self._welcome(Connection(server.accept()[0]))
        for connection in self.connections.values():
            connection.send({"progress": None})

    def _welcome(self, connection):
        """Takes a process in, if it says that it belongs here."""
        hello, expected = connection.read(BEAT, most=1000) or {}, len(self.names)
        index, count = hello.get("index"), hello.get("count")
        if not (type(index) is type(count) is int and 0 < index < count):
            connection.close()
        elif count != expected:
            self._refuse(
                connection, f"process {index} expects {count} processes, process 0 {expected}"
            )
        elif index in self.connections:
            self._refuse(connection, f"two processes say that they are process {index}")
        else:
            self.connections[index] = connection
            self.names[index] = f"process {index} ({hello.get('host')})"

    def _refuse(self, connection, reason):
        self.connections["refused"] = connection
        raise InputError(reason)

    def end(self, reason):
        """Tells all that there will be no run."""
        for connection in self.connections.values():
            connection.send({"end": str(reason)})
            connection.close()


def connect(rank):
    """Connects to process 0, and waits until all processes have; returns as `accept_all`.

    Raises:
        RunError: If process 0 does not answer, or refuses.
    """
    connection = Connection(_connection(rank))
    connection.send({"index": rank.index, "count": rank.count, "host": platform.node()})
    reply = {}
    while reply is not None and not reply.keys() & {"names", "end"}:
        reply = connection.read(SILENCE)
    if reply is None:
        where = f"{rank.host}:{rank.port + 1}"
        reply = {"end": f"process 0 was lost at {where} while the others came, or is none of ours"}
    if "end" in reply:
        connection.close()
        raise RunError(reply["end"])
    return {0: connection}, reply["names"]


def _connection(rank):
    deadline = time.monotonic() + JOINING
    while True:
        try:
            connection = socket.create_connection((rank.host, rank.port + 1), timeout=BEAT)
            connection.settimeout(None)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process 0 was not found at {rank.host}:{rank.port + 1} in "
                    f"{JOINING:.0f} s: {error.strerror or error}"
                ) from error
            time.sleep(0.2)
