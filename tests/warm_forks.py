"""A fork server at the price of a fork, for the commands of tests: `multiprocessing` would start a new Python for each.

A command that trains or prepares in several processes starts a fork server, and that one imports torch and transformers
anew: seconds for every such command. Here it is a fork of the process that has imported them. It is made before the
command begins, so it has no thread, lock or signal handler of the command. All else is as ever: it is a child of the
command, runs multiprocessing's own loop, and ends with the command.
"""

import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import util
from typing import Any

_PROGRAM = "from multiprocessing.forkserver import main"
_LONGEST = 1 << 20
_SET_NAME, _NAME = 15, b"forkserver"
"""PR_SET_NAME of Linux, and what the process and its forks are called from then on, as their command lines cannot."""


def keep_one_ready() -> None:
    """Fork the process that becomes the fork server of this one, if this one starts a fork server; on Linux only."""
    if sys.platform != "linux":
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ready = os.fork()
    if ready == 0:
        ours.close()
        _wait_and_serve(theirs)
    theirs.close()
    parent = os.getpid()
    start: Any = util.spawnv_passfds

    def spawnv_passfds(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
        program = arguments[-1]
        if not (isinstance(program, str) and program.startswith(_PROGRAM)):
            return start(path, arguments, descriptors)
        if ours.fileno() < 0:  # the first one died, and multiprocessing asks for another
            return start(path, arguments, descriptors)
        if os.getpid() != parent:  # a fork of the command, which cannot wait for a child of the command
            return start(path, arguments, descriptors)
        blocked = "".join(f"{number:d}," for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        numbers = ",".join(map(str, descriptors))
        with ours:
            socket.send_fds(ours, [f"{blocked}\n{numbers}\n{program}".encode()], list(descriptors))
        return ready

    util.spawnv_passfds = spawnv_passfds


def _wait_and_serve(channel: socket.socket) -> None:
    """The main function of the process: become the fork server on demand, or end with the command."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it with the command, which may start it later
        kept = channel.fileno()
        os.closerange(3, kept)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        message, received, _, _ = socket.recv_fds(channel, _LONGEST, 8)
        channel.close()
        if message:
            ctypes.CDLL(None).prctl(_SET_NAME, _NAME)
            blocked, numbers, program = message.decode().split("\n", 2)
            _place(received, [int(number) for number in numbers.split(",")])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, {int(number) for number in blocked.split(",") if number})
            exec(program, {"__name__": "__main__"})
    except Exception:  # noqa: BLE001  # as at the end of any program
        traceback.print_exc()
    finally:
        os._exit(0)


def _place(received: Sequence[int], wanted: Sequence[int]) -> None:
    """Move the descriptors to the numbers that they have in the program."""
    high = [os.dup2(descriptor, 512 + k) for k, descriptor in enumerate(received)]
    for descriptor in received:
        os.close(descriptor)
    for descriptor, number in zip(high, wanted, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
