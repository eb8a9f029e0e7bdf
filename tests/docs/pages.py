"""Running the shell blocks of a page as a reader would, with an `agiqa` that has imported its libraries already."""

import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from agiqa.bench.demo.run import run_demo
from tests.command_line import REPOSITORY

STAND_IN = f"""#!{sys.executable} -IS
import json, os, socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.connect(os.environ["AGIQA_OF_THE_TEST"])
request = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
channel.sendall(json.dumps(request).encode())
channel.shutdown(socket.SHUT_WR)
answer = json.loads(channel.makefile().read())
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""
"""The program `agiqa` of the shell: the real one is in a process that has imported its libraries already."""
PYTHON = f"""#!/bin/bash
PYTHONPATH={REPOSITORY} exec {sys.executable} "$@"
"""
SBATCH = r"""#!/bin/bash
tasks=$(sed -n 's/^#SBATCH.*--array=1-\([0-9]*\).*/\1/p' "$1")
for task in $(seq "${tasks:-1}"); do SLURM_ARRAY_TASK_ID=$task bash "$1" || exit; done
"""
"""Runs the job at once, or the jobs of an array one after the other."""


def blocks(page: Path) -> list[str]:
    """The shell blocks of the page, in order; those in a list are indented."""
    found = re.findall(r"^( *)```bash\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in text.splitlines(keepends=True)) for indent, text in found]


def overridden(script: str, values: dict[str, str]) -> str:
    """The script with other values in its lines `export NAME=...`."""
    for name, value in values.items():
        script, count = re.subn(
            rf"^export {name}=.*$", f"export {name}={json.dumps(value)}", script, flags=re.MULTILINE
        )
        assert count == 1, name
    return script


@contextmanager
def programs(agiqa, folder: Path):
    """Environment of a shell with the `agiqa` of the test, a `python` that imports it, and an `sbatch`."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            request = json.loads(self.rfile.read())
            agiqa.folder, agiqa.environment = request["folder"], request["environment"]
            outcome = agiqa(*request["arguments"])
            self.wfile.write(json.dumps({"code": outcome.code, "out": outcome.out, "err": outcome.err}).encode())

    folder.mkdir()
    for name, text in {"agiqa": STAND_IN, "python": PYTHON, "sbatch": SBATCH}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with tempfile.TemporaryDirectory() as short, socketserver.UnixStreamServer(f"{short}/agiqa", Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "AGIQA_OF_THE_TEST": f"{short}/agiqa"}
        finally:
            server.shutdown()
            agiqa.folder, agiqa.environment = REPOSITORY, {}


def run_script(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script in `folder`, where every command must succeed."""
    shell = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shell.returncode == 0, shell.stdout[-1500:] + shell.stderr[-3000:]
    return shell


def write_demo(folder: Path) -> None:
    """The folder of a finished demo: that which `.ci/run` has made just now, else a new one."""
    ready = os.environ.get("AGIQA_DEMO")
    if ready is None:
        run_demo(folder, images=400, seed=0)
    else:
        shutil.copytree(ready, folder)
