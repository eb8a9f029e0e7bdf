"""Servers that are busy or refuse: temporary failures are retried after the wait that the server asks for, others are reported at once."""

import datetime
import email.utils
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from agiqa.errors import RemoteError, SchemaError
from agiqa.progress import said_to
from agiqa.store.sharing import transfers
from agiqa.store.sharing.in_place import open_remote
from agiqa.store.sharing.pulling import plan_pull, pull, run_pull
from tests.store.sharing.copies import assert_equal_stores
from tests.store.sharing_servers import REPOSITORY


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_passes_by_itself_is_waited_out(stored, served, tmp_path, impatient, status):
    served.behaviour.refusals = [(status, {})] * 2
    plan = plan_pull(served.url, tmp_path / "copy.agiqa")
    served.behaviour.refusals = [(status, {"Retry-After": "0"})] * 3
    run_pull(plan, jobs=2)
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)
    served.behaviour.refusals = [(status, {})]
    open_remote(served.url)


@pytest.mark.parametrize("status", [400, 401, 403, 405, 451, 501])
def test_a_refusal_is_told_at_once(served, tmp_path, status):
    served.behaviour.refusals = [(status, {"Retry-After": "200"})]
    with pytest.raises(RemoteError, match=str(status)):
        pull(served.url, tmp_path / "copy.agiqa")
    assert served.behaviour.asked == []
    served.behaviour.refusals = [(404, {})]
    with pytest.raises(SchemaError, match="no MANIFEST"):
        pull(served.url, tmp_path / "copy.agiqa")


def test_a_server_that_stays_busy_is_given_up(served, tmp_path, impatient):
    served.behaviour.refusals = [(429, {})] * 50
    with pytest.raises(RemoteError, match="429"):
        pull(served.url, tmp_path / "copy.agiqa")
    assert len(served.behaviour.refusals) == 50 - transfers.TRIES


def date_in(seconds):
    return email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True
    )


@pytest.mark.parametrize("wait", ["1", "date"])
def test_the_time_that_the_server_asks_for_is_waited_and_told(served, tmp_path, impatient, wait):
    served.behaviour.refusals = [(429, {"Retry-After": date_in(2) if wait == "date" else wait})]
    said, before = [], time.monotonic()
    with said_to(said.append):
        plan_pull(served.url, tmp_path / "copy.agiqa")
    assert time.monotonic() - before >= 0.9
    assert len(said) == 1
    assert "429" in said[0]
    assert "trying again in" in said[0]


NO_TIMES = ["", "soon", "-5", "Fri, 31 Feb 2040 99:00:00 GMT", "Fri, 31 Dec 2026 23:59:59 +99999999999999"]


@pytest.mark.parametrize("wait", [*NO_TIMES, "Sun, 06 Nov 1994 08:49:37 GMT"])
def test_a_time_that_says_nothing_or_has_passed_is_not_waited_for(served, tmp_path, impatient, wait):
    served.behaviour.refusals = [(503, {"Retry-After": wait})]
    with said_to(lambda text: pytest.fail(text)):
        plan_pull(served.url, tmp_path / "copy.agiqa")


@pytest.mark.parametrize("wait", ["86400", "9" * 400, "Sat, 06 Nov 2094 08:49:37 GMT"])
def test_a_wait_that_is_too_long_is_told_at_once(served, tmp_path, wait):
    served.behaviour.refusals = [(429, {"Retry-After": wait})]
    with pytest.raises(RemoteError, match="429") as caught:
        pull(served.url, tmp_path / "copy.agiqa")
    assert "agiqa waits 300 at most" in "".join(caught.value.__notes__)


WAITING = """
    import signal, sys
    from pathlib import Path
    from agiqa.store.sharing.pulling import plan_pull, run_pull
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    plan = plan_pull(sys.argv[1], Path(sys.argv[2]))
    print("planned", flush=True)
    sys.stdin.readline()
    run_pull(plan)
"""


def test_ctrl_c_ends_a_long_wait(served, tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(WAITING), served.url, tmp_path / "copy.agiqa"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(script, cwd=REPOSITORY, **pipes) as process:
        assert process.stdout.readline() == "planned\n"
        served.behaviour.refusals = [(429, {"Retry-After": "250"})] * 100
        process.stdin.write("\n")
        process.stdin.flush()
        assert "trying again in 250 s" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said


def test_the_status_is_read_from_what_each_driver_raises():
    s3 = pytest.importorskip("s3fs.errors", reason="s3fs is in the extra remote: pip install -e '.[remote]'")
    from botocore.exceptions import ClientError

    about = {"HTTPStatusCode": 429, "HTTPHeaders": {"retry-after": "7"}}
    answer = {"Error": {"Code": "TooManyRequests", "Message": "slow down"}, "ResponseMetadata": about}
    failure = RemoteError("x")
    transfers.describe_failure(failure, s3.translate_boto_error(ClientError(answer, "GetObject")))
    assert (failure.refused, failure.retry_after) == (False, 7.0)
