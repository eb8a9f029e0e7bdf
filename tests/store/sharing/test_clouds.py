"""S3 and the Hugging Face Hub take and give whole stores, as their own clients see them."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from agiqa.errors import RemoteError, SchemaError
from agiqa.store.sharing.in_place import open_remote
from agiqa.store.sharing.pulling import pull
from agiqa.store.sharing.pushing import push
from tests.store.sharing.copies import assert_equal_stores, largest_object
from tests.store.sharing.movers import kill_after, start_mover
from tests.store.sharing_servers import CREDENTIALS, REPOSITORY, hub_server, s3_server


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("s3fs", reason="s3fs and moto are in the extras remote and dev: pip install -e '.[dev,remote]'")
    pytest.importorskip("moto", reason="moto is in the extra dev: pip install -e '.[dev]'")
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(s3, monkeypatch, request):
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3}.items():
        monkeypatch.setenv(name, value)
    import boto3

    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/stores/small.agiqa"


def test_s3_takes_and_gives_a_store(stored, bucket, tmp_path):
    assert push(stored, bucket).skipped == 0
    assert push(stored, bucket).objects == 0
    pull(bucket, tmp_path / "copy.agiqa")
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)
    np.testing.assert_array_equal(open_remote(bucket).read([3, 30]).rows, stored.read([3, 30]).rows)


def test_a_push_to_s3_is_killed_and_taken_up(stored, bucket, tmp_path):
    assert kill_after(start_mover("push", stored.path, bucket), 8)
    with pytest.raises(SchemaError, match="not a finished"):
        open_remote(bucket)
    assert push(stored, bucket).skipped > 0
    pull(bucket, tmp_path / "copy.agiqa")
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)


def test_an_object_changed_in_s3_is_found_by_its_etag(stored, bucket):
    push(stored, bucket)
    import boto3

    place, _, key = bucket.removeprefix("s3://").partition("/")
    name = largest_object(stored)
    raw = bytearray((stored.path / name).read_bytes())
    raw[7] ^= 1
    boto3.client("s3").put_object(Bucket=place, Key=f"{key}/{name}", Body=bytes(raw))
    assert push(stored, bucket).objects == 1


def test_a_bucket_that_is_not_there_is_named(stored, bucket):
    with pytest.raises(RemoteError, match="s3://no-such-bucket-here/x"):
        push(stored, "s3://no-such-bucket-here/x")


HUB = """
    import json, sys
    from pathlib import Path
    from agiqa.store import open_store
    from agiqa.store.sharing.in_place import open_remote
    from agiqa.store.sharing.pulling import pull
    from agiqa.store.sharing.pushing import push
    source, repository, folder, copy = sys.argv[1:]
    url = repository + folder
    sent = [push(open_store(source), url).as_dict() for _ in range(2)]
    part = pull(url, Path(copy) / "part", items=[open_store(source).items.names[0]]).as_dict()
    pulled = pull(url, Path(copy) / "whole").as_dict()
    rows = open_remote(repository + "@main" + folder).read([3, 30]).rows
    (Path(copy) / "rows").write_bytes(rows.tobytes())
    print(json.dumps({"sent": sent, "part": part, "pulled": pulled}))
"""


@pytest.mark.parametrize("folder", ["", "/stores/small.agiqa"])
def test_the_hub_takes_and_gives_a_store_in_few_commits(stored, tmp_path, folder):
    (tmp_path / "hub" / "someone" / "features").mkdir(parents=True)
    (tmp_path / "hub" / "someone" / "features" / "README.md").write_text("---\nlicense: mit\n---\nmine")
    (tmp_path / "copy").mkdir()
    with hub_server(tmp_path / "hub") as hub:
        outcome = subprocess.run(
            [
                *(sys.executable, "-c", textwrap.dedent(HUB)),
                *(stored.path, "hf://datasets/someone/features", folder, tmp_path / "copy"),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome.returncode == 0, outcome.stderr
        assert hub.commits <= 4
    done = json.loads(outcome.stdout.splitlines()[-1])
    assert done["sent"][0]["skipped"] == 0
    assert done["sent"][1]["objects"] == 0
    assert done["part"]["bytes"] < done["pulled"]["bytes"]
    assert_equal_stores(tmp_path / "copy" / "whole", stored.path)
    assert (tmp_path / "copy" / "rows").read_bytes() == stored.read([3, 30]).rows.tobytes()
    assert (tmp_path / "hub" / "someone" / "features" / "README.md").read_text().endswith("mine")
