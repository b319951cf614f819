"""Who may write and read a results folder at the same time."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from twice_rec import locks
from twice_rec.errors import InputError
from twice_rec.locks import owner_of, reading, writing

HOLDER = """
import sys, time
from pathlib import Path
from twice_rec import locks
with getattr(locks, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that reads or writes a folder; killed at the end."""
    processes = []

    def start(how, folder):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", HOLDER, how, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait(30)
        process.stdout.close()


def test_what_is_read_is_not_written(tmp_path, holder):
    readers = [holder("reading", tmp_path / "data") for _ in range(2)]
    with pytest.raises(
        InputError, match=r"data is being read by process \d+ on \S+, since \S+ \S+ and process"
    ) as found:
        writing(tmp_path / "data").__enter__()
    assert all(f"process {reader.pid} on" in str(found.value) for reader in readers)
    assert owner_of(tmp_path / "data") is None
    with writing(tmp_path / "sft"):
        pass
    readers[0].send_signal(signal.SIGKILL)
    readers[0].wait(30)
    with pytest.raises(InputError) as found:
        writing(tmp_path / "data").__enter__()
    assert f"process {readers[0].pid} on" not in str(found.value)
    readers[1].send_signal(signal.SIGKILL)
    readers[1].wait(30)
    with writing(tmp_path / "data"):
        pass


def test_what_is_written_is_not_read(tmp_path, holder):
    writer = holder("writing", tmp_path / "eval" / "stage2")
    with pytest.raises(InputError, match=rf"stage2 is in use by process {writer.pid} on \S+, since"):
        reading(tmp_path / "eval" / "stage2").__enter__()
    assert f"process {writer.pid} on" in owner_of(tmp_path / "eval" / "stage2")
    assert not list((tmp_path / ".locks").glob("*.reader.*"))
    with reading(tmp_path / "eval" / "stage3"), reading(tmp_path / "eval" / "stage3"):
        pass


def test_an_owner_that_ends_just_now_is_no_reader(tmp_path, monkeypatch):
    real, asked = locks._lock, []

    def lock(file, kind, *tries):
        asked.append(kind)
        return len(asked) > 1 and real(file, kind, *tries)

    monkeypatch.setattr(locks, "_lock", lock)
    with locks.writing(tmp_path / "run" / "sft"):
        assert asked == [fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_EX]


def test_a_folder_that_two_runs_share_by_a_link_has_one_lock(tmp_path, holder):
    (tmp_path / "one" / "data").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "data").symlink_to(tmp_path / "one" / "data")
    reader = holder("reading", tmp_path / "two" / "data")
    with pytest.raises(InputError, match=f"being read by process {reader.pid}"):
        writing(tmp_path / "one" / "data").__enter__()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    with writing(tmp_path / "data"):
        ready, done = os.pipe()
        if not (child := os.fork()):
            os.close(done)
            os.read(ready, 1)
            os._exit(0)
    with writing(tmp_path / "data"):
        pass
    os.close(done)
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def flock(file, kind):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with writing(tmp_path / "data"):
        assert "this file system has no locks (Operation not supported)" in caplog.text
