"""Connections between the processes of a run, for lines of JSON.

Process 0 listens on the port after JAX's. It accepts peers that send a valid rank, and ignores
other connections.
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

BEAT = 5.0  # seconds between heartbeats
SILENCE = 30.0  # seconds without a message, after which a process is lost
JOINING = 600.0  # seconds in which all processes have to join
_MAX_BYTES = 100_000_000  # of a line


class Connection:
    """A connection to a peer.

    Attributes:
        heard: Time of the last message.
        progress: Steps and validation batches that the peer has counted; None outside of training.
        left: Whether the peer has announced that it leaves.
    """

    def __init__(self, connection):
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self.heard = time.monotonic()
        self.progress = None
        self.left = False

    def send(self, message):
        """Sends a message; if the peer is gone, reading notices."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, seconds=None, most=_MAX_BYTES):
        """Returns the next message, a dict; None at the end, or after so many silent seconds."""
        self._connection.settimeout(seconds)
        try:
            message = json.loads(self._lines.readline(most))
        except (OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def messages(self):
        """Yields messages until the end."""
        while not self.left and (message := self.read()) is not None:
            self.heard = time.monotonic()
            self.progress = message.get("progress", self.progress)
            self.left = "bye" in message
            yield message

    def fileno(self):
        """Returns the file descriptor, for `select`."""
        return self._connection.fileno()

    def end(self):
        """Closes the connection for sending; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self):
        """Closes the connection."""
        self._lines.close()
        self._connection.close()


# === Joining ===


def accept_all(rank):
    """Waits, in process 0, for all other processes.

    Returns:
        (connections, names): dict from the numbers of the others to `Connection`, and a list of the
        names of all.

    Raises:
        InputError: If a port is taken, two processes have one number, or one expects another count.
        RunError: If a process is missing after `JOINING` seconds.
    """
    joining = _Joining(rank)
    logger.info(f"process 0 of {rank.count} waits for the others on port {rank.port + 1}")
    try:
        with _listening(rank) as server:
            deadline = time.monotonic() + JOINING
            while joining.missing():
                joining.wait(server, deadline)
    except (InputError, RunError) as error:
        joining.send_all({"end": str(error)})
        for connection in joining.connections.values():
            connection.close()
        raise
    joining.send_all({"names": joining.names})
    return joining.connections, joining.names


def _listening(rank):
    for port in (rank.port, rank.port + 1):
        try:
            server = socket.create_server(("", port))
        except OSError as error:
            raise InputError(
                f"port {port} is not free ({error.strerror}); the port of process 0's address, "
                f"{rank.port}, and the next one have to be: give another"
            ) from error
        if port == rank.port:
            server.close()  # JAX will listen on it
    return server


class _Joining:
    """The processes that have joined so far."""

    def __init__(self, rank):
        self.connections = {}
        self.names = [f"process {index}" for index in range(rank.count)]
        self.names[0] += f" ({platform.node()})"

    def missing(self):
        return [index for index in range(1, len(self.names)) if index not in self.connections]

    def send_all(self, message):
        for connection in self.connections.values():
            connection.send(message)

    def wait(self, server, deadline):
        """Waits up to `BEAT` seconds for a process to join or leave, then sends heartbeats."""
        if (left := deadline - time.monotonic()) <= 0:
            missing = ", ".join(map(str, self.missing()))
            raise RunError(
                f"expected {len(self.names)} processes; missing after {JOINING:.0f} s: {missing}"
            )
        ready, *_ = select.select([server, *self.connections.values()], [], [], min(BEAT, left))
        for index in [i for i, connection in self.connections.items() if connection in ready]:
            logger.info(f"{self.names[index]} disconnected while waiting; it may rejoin")
            self.connections.pop(index).close()  # processes that wait send nothing
        if server in ready:
            self._admit(Connection(server.accept()[0]))
        self.send_all({"progress": None})

    def _admit(self, connection):
        """Admits a peer that sends a valid rank; closes other connections."""
        hello, expected = connection.read(BEAT, most=1000) or {}, len(self.names)
        index, count = hello.get("index"), hello.get("count")
        if not (type(index) is type(count) is int and 0 < index < count):
            connection.close()
        elif count != expected:
            self._refuse(
                connection, f"process {index} expects {count} processes, process 0 {expected}"
            )
        elif index in self.connections:
            self._refuse(connection, f"two processes have the number {index}")
        else:
            self.connections[index] = connection
            self.names[index] = f"process {index} ({hello.get('host')})"

    def _refuse(self, connection, reason):
        self.connections["refused"] = connection
        raise InputError(reason)


def connect(rank):
    """Connects to process 0, and waits until all processes have. Returns: As `accept_all`.

    Raises:
        RunError: If process 0 does not answer, or refuses this one.
    """
    connection = Connection(_connection(rank))
    connection.send({"index": rank.index, "count": rank.count, "host": platform.node()})
    reply = {}
    while reply is not None and not reply.keys() & {"names", "end"}:
        reply = connection.read(SILENCE)
    if reply and "names" in reply:
        return {0: connection}, reply["names"]
    connection.close()
    where = f"{rank.host}:{rank.port + 1}"
    lost = f"process 0 was lost at {where} while others joined, or another program listens there"
    raise RunError(reply["end"] if reply else lost)


def _connection(rank):
    deadline = time.monotonic() + JOINING
    while True:
        try:
            return socket.create_connection((rank.host, rank.port + 1), timeout=BEAT)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process 0 was not found at {rank.host}:{rank.port + 1} in "
                    f"{JOINING:.0f} s: {error.strerror or error}"
                ) from error
            time.sleep(0.2)
