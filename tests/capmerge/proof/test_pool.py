import json
import os
import signal

import pytest
from builders.metadata import run

from capmerge.captions.templates import MergeOptions
from capmerge.commands.verify import verify
from capmerge.errors import DataError, WorkerError
from capmerge.files.source import open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.proof.digests import BlockDigests


@pytest.fixture
def files(tmp_path):
    """A source of some blocks, and the output of a rewrite."""
    source, out = tmp_path / "m.json", tmp_path / "out.json"
    records = {f"k{n}": {"tags": f"t{n} " * 100, "caption": "c"} for n in range(8000)}
    source.write_text(json.dumps(records), encoding="utf-8")
    run("rewrite", source, "-o", out, "-j", "1")
    return source, out


def verified(files, jobs):
    """What `verify` says of two files."""
    with open_source(str(files[0])) as source, open_source(str(files[1])) as written:
        return verify(
            source,
            written,
            MergeOptions(),
            skips=False,
            max_record_bytes=MAX_RECORD_BYTES,
            jobs=jobs,
        )


def test_a_killed_worker_is_an_error(files, monkeypatch):
    """The death of a worker ends the run with a message, and not with a proof."""
    parent = os.getpid()
    answer = BlockDigests.answer

    def dying(self, task):
        if task.block.start > 1 << 20 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(self, task)

    monkeypatch.setattr(BlockDigests, "answer", dying)
    with pytest.raises(WorkerError, match=r"killed by signal 9.*not all records were compared"):
        verified(files, 2)


def test_a_bug_in_a_worker_shows_its_traceback(files, monkeypatch):
    """An error that is no user's mistake comes out of a worker with its traceback."""
    monkeypatch.setattr(BlockDigests, "answer", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        verified(files, 2)


@pytest.mark.parametrize("jobs", [2, 5])
@pytest.mark.parametrize("number", [0, 4000, 7999])
def test_any_number_of_processes_finds_the_same_difference(files, jobs, number):
    """The message names the same record and place as with one process."""
    _, out = files
    text = out.read_bytes()
    out.write_bytes(text.replace(b"t%d t" % number, b"t%d u" % number, 1))
    messages = set()
    for count in (1, jobs):
        with pytest.raises(DataError, match='the field "caption" is') as error:
            verified(files, count)
        messages.add(str(error.value))
    (message,) = messages
    place = text.index(b'"k%d"' % number)
    assert f"byte {place:,}, record" in message
