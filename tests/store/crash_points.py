"""Real kills at every step: runs a job again and again, and kills it before its first, second, ... change on disk.

A change is a file or folder that gets or loses its name. Nobody sees the bytes of a file before it has its name.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

_HARNESS = """
import os, shutil, signal, sys
from pathlib import Path

def job(path):
{job}

{imports}

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")

def kill_before(step):
    seen = 0
    def watch(event, _arguments):
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

source, states = Path(sys.argv[1]), Path(sys.argv[2])
for step in range(1, 500, int(sys.argv[3])):
    state = states / f"{{step:03d}}" / source.name
    shutil.copytree(source, state)
    child = os.fork()
    if child == 0:
        kill_before(step)
        job(state)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
sys.exit("the job never ended")
"""


def states_after_kills(store: Path, folder: Path, *, imports: str, job: str, every: int = 1) -> list[Path]:
    """Copies of `store` on each of which `job` (code, the copy is `path`) was killed `every` changes later.

    The last copy is that of the job which ran to its end.
    """
    folder.mkdir()
    code = _HARNESS.format(imports=imports, job=textwrap.indent(textwrap.dedent(job), "    "))
    done = subprocess.run(
        [sys.executable, "-c", code, str(store), str(folder), str(every)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [state / store.name for state in sorted(folder.iterdir())]
