"""The command `launch`: several processes of one run on this computer."""

import dataclasses
import subprocess

from keras_mixer.backend import check_installed
from keras_mixer.compute.environment import module_command
from keras_mixer.compute.rank import find_rank, free_port, variables_of
from keras_mixer.config.command_line import parse
from keras_mixer.config.options import option
from keras_mixer.config.training import Config
from keras_mixer.errors import InputError
from keras_mixer.signals import SIGNALS, temporary_handlers

_COMMAND = "train"


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Flags of `launch`."""

    processes: int = option(2, "Number of processes.", low=1, high=1000)
    port: int | None = option(
        None,
        "Port on which process 0 listens; the group uses the next one (default: free ports).",
        low=1024,
        high=65_534,
    )


def launch(options, arguments):
    """Trains one run in several processes on the CPU of this computer, as on several hosts.

    It is for trials and tests of training on several hosts: one process uses all GPUs of a host.
    """
    if arguments[:1] != [_COMMAND]:
        raise InputError(
            f"launch starts `{_COMMAND}`: expected -- {_COMMAND} --flag=value ..., received "
            f"{' '.join(arguments) or 'nothing'}"
        )
    if find_rank():
        raise InputError("launch: this is one of several processes already")
    check_installed("jax")
    parse(Config, arguments[1:])  # so that a wrong flag is reported once, not by each process
    port = free_port() if options.port is None else options.port
    processes = [
        subprocess.Popen(
            module_command("keras_mixer", *arguments),
            env=variables_of(port, options.processes, index),
            process_group=0,  # so that Ctrl-C reaches it once, from here
        )
        for index in range(options.processes)
    ]

    def forward(number, frame):
        for process in processes:
            process.send_signal(number)

    with temporary_handlers(SIGNALS, forward):
        statuses = [process.wait() for process in processes]
    # As in a shell, the status of a process that a signal killed is 128 and the signal's number.
    return next((s if s > 0 else 128 - s for s in statuses if s), 0)
