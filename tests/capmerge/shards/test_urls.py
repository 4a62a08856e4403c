"""Shards behind s3:// URLs, against a server on this machine."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from builders.metadata import COMMAND, Finished, run
from builders.shards import SHARDS, make_shards, shard_name

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def server():
    """The environment in which s3:// leads to a server of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            time.sleep(0.1)
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def bucket(server, tmp_path_factory):
    """A bucket with 16 shards, and the folder that has them too."""
    folder = tmp_path_factory.mktemp("s3")
    shards = make_shards(folder)
    store = s3fs.S3FileSystem(endpoint_url=server["AWS_ENDPOINT_URL"], key="test", secret="test")
    store.mkdir("bucket")
    for path in shards.iterdir():
        store.put_file(str(path), f"bucket/shards/{path.name}")
    run("rewrite", "joined.jsonl", "-o", "one.jsonl", cwd=folder)
    return store, folder


def rewrite(environment: dict[str, str], *words: str, fails: int = 0) -> Finished:
    """Run `capmerge rewrite` in an environment."""
    done = subprocess.run(
        [*COMMAND, "rewrite", *words],
        env={**os.environ, "HOME": "/nonexistent", **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )
    err = done.stderr.decode()
    assert "Traceback" not in err, err
    assert done.returncode == fails, err
    return Finished(done.returncode, done.stdout, err)


def test_outputs_in_a_bucket_are_those_of_one_file(server, bucket):
    """From a bucket to a bucket, and only what is missing the second time."""
    store, folder = bucket
    words = ["s3://bucket/shards", "-o", "s3://bucket/out", "--tasks", "4", "-j", "2", "--stats"]
    rewrite(server, *words)
    names = [f"bucket/out/{shard_name(number)}" for number in range(SHARDS)]
    found = b"".join(store.cat_file(name) for name in names)
    assert found == (folder / "one.jsonl").read_bytes()
    assert not [name for name in store.find("bucket/out") if name.endswith("-tmp")]

    store.rm_file(names[3])
    store.invalidate_cache()
    before = store.info(names[4])["LastModified"]
    assert "15 of 16 shards are done already" in rewrite(server, *words).err
    store.invalidate_cache()
    assert store.cat_file(names[3]) in found
    assert store.info(names[4])["LastModified"] == before


def test_from_a_folder_and_with_a_broken_shard(server, bucket, tmp_path):
    """From a local folder to a bucket; a broken shard has neither an output nor a mark."""
    store, _ = bucket
    shards = make_shards(tmp_path)
    (shards / shard_name(5)).write_bytes(b'{"image_path": ')
    words = [str(shards), "-o", "s3://bucket/mixed", "-j", "2"]
    assert shard_name(5) in rewrite(server, *words, fails=1).err
    store.invalidate_cache()
    found = [name for name in store.find("bucket/mixed") if shard_name(5) in name]
    assert found == [f"bucket/mixed/.capmerge/failed/{shard_name(5)}.txt"]
    assert len(store.glob("bucket/mixed/part-*.jsonl")) == SHARDS - 1


@pytest.mark.parametrize(
    ("changed", "source", "out", "message"),
    [
        ({}, "s3://nobucket/shards", "s3://bucket/x", "found no shards"),
        ({}, "s3://bucket/shards", "s3://nobucket/x", "that s3://nobucket exists"),
        ({"AWS_ACCESS_KEY_ID": ""}, "s3://bucket/shards", "s3://bucket/x", "no credentials"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            *("s3://bucket/shards", "s3://bucket/x", "Check the network"),
        ),
    ],
)
def test_what_is_wrong_with_a_store_is_told(server, bucket, changed, source, out, message):
    """Missing buckets and credentials and an address that does not answer are messages."""
    environment = {name: value for name, value in (server | changed).items() if value}
    for name in [name for name, value in changed.items() if not value]:
        environment.pop(name, None)
    done = rewrite(environment, source, "-o", out, fails=2 if "no shards" in message else 1)
    assert message in done.err
    assert source in done.err or out in done.err
    assert not bucket[0].find("bucket/x")


def test_a_store_of_no_object_store_renames(tmp_path):
    """Where a file could be seen half-written, it is uploaded under another name."""
    shards = make_shards(tmp_path)
    url = Path(tmp_path, "out").as_uri()
    run("rewrite", shards, "-o", url, "-j", "1", "--quiet")
    run("rewrite", tmp_path / "joined.jsonl", "-o", tmp_path / "one.jsonl", "--quiet")
    found = b"".join((tmp_path / "out" / shard_name(n)).read_bytes() for n in range(SHARDS))
    assert found == (tmp_path / "one.jsonl").read_bytes()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith("-tmp")]
