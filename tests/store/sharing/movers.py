"""Pushes and pulls in processes of their own, slow enough to be killed in the middle."""

import os
import signal
import subprocess
import sys
import textwrap

from tests.store.sharing_servers import REPOSITORY

MOVER = """
    import sys, time
    from pathlib import Path
    import agiqa.store.sharing.remotes as remotes
    from agiqa.store import open_store
    from agiqa.store.sharing.pulling import pull
    from agiqa.store.sharing.pushing import push
    remotes.BLOCK = 1000
    def advance(count):
        print(count, flush=True)
        time.sleep(0.002)
    if sys.argv[1] == "push":
        push(open_store(sys.argv[2]), sys.argv[3], advance=advance, jobs=3)
    else:
        pull(sys.argv[2], Path(sys.argv[3]), advance=advance, jobs=3)
"""


def start_mover(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(MOVER), *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after(process, lines):
    """Kill the process once it has moved something `lines` times; False when it had ended by itself."""
    for _ in range(lines):
        if not process.stdout.readline():
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL
