"""Files are whole or not there; leftovers of killed writers go; no link is followed; others may read what the umask lets them."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from lightning_mue.files import PART, whole_file


def write(path, text, error=None):
    with whole_file(path) as part:
        part.write_text(text)
        if error is not None:
            raise error


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_file_is_replaced_whole_or_left_alone(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write(path, "one")
    with pytest.raises(OSError, match="full"):
        write(path, "half of tw", OSError(errno.ENOSPC, "disk full"))
    assert path.read_text() == "one"
    assert names(path.parent) == ["file.txt"]


def test_a_folder_is_told_before_the_work_of_writing(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"), whole_file(tmp_path):
        raise AssertionError("the block was entered")


def test_permissions_are_those_of_the_umask_or_of_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write(path, "one")
    plain = tmp_path / "plain.txt"
    plain.write_text("by open()")
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)  # noqa: E731
    assert mode(path) == mode(plain), "a cache that another user cannot read is not shared"
    path.chmod(0o640)
    write(path, "two")
    assert mode(path) == 0o640


def test_a_link_is_replaced_and_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "file.txt"
    victim.write_text("precious")
    path.symlink_to(victim)
    write(path, "new")
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_names_of_parts_cannot_be_foreseen(tmp_path):
    seen = set()
    for _ in range(20):
        with whole_file(tmp_path / "file.txt") as part:
            seen.add(part.name.removeprefix(".file.txt.").removesuffix(PART))
            assert stat.S_IMODE(part.stat().st_mode) == 0o600, "nobody else writes to it"
            part.write_text("x")
    assert len(seen) == 20
    assert not any(str(os.getpid()) == name for name in seen)


WRITER = """
import sys, time
from lightning_mue.files import whole_file
with whole_file(sys.argv[1]) as part:
    part.write_bytes(b"x" * 100_000)
    print("writing", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_killed_writers_are_removed_and_parts_of_living_ones_are_not(tmp_path):
    """At once: a job that is killed and restarted 20 times within a minute leaves no 20 files."""

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "other.bin")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "writing\n"
        return process

    living, killed = start(), start()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(names(tmp_path)) == 2
        write(tmp_path / "file.txt", "text")
        assert len([name for name in names(tmp_path) if name.endswith(PART)]) == 1
        living.kill()
        living.wait()
        write(tmp_path / "file.txt", "text")
        assert names(tmp_path) == ["file.txt"]
    finally:
        living.kill()
        living.wait()


def test_where_files_cannot_be_locked_age_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_mue.files.fcntl", None)
    old, young = (tmp_path / f".{name}.abcdefgh{PART}" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    write(tmp_path / "file.txt", "text")
    assert names(tmp_path) == [young.name, "file.txt"]
