"""The checksummed cache of TextDataModule: damage, interruption, changed sources, concurrent builds, location."""

from __future__ import annotations

import json
import os
import threading

import pytest

from lightning_mue.data import TextDataModule
from lightning_mue.data.cache import ByteCache, default_cache_dir
from lightning_mue.files import PART, whole_file


def cache_folder(data):
    data.prepare_data()
    (found,) = data.cache_dir.iterdir()
    return found


FILES = {"CACHEDIR.TAG", "manifest.json", "train.bin", "val.bin"}


def inodes(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_a_valid_cache_is_used_as_it_is(folder, make):
    found = cache_folder(make(folder))
    before = inodes(found)
    assert set(before) == FILES
    make(folder).prepare_data()
    assert inodes(found) == before


def truncate(found):
    os.truncate(found / "train.bin", 100)


def flip_a_byte(found):
    content = bytearray((found / "train.bin").read_bytes())
    content[50] ^= 1
    (found / "train.bin").write_bytes(content)


def flip_a_byte_of_validation(found):
    content = bytearray((found / "val.bin").read_bytes())
    content[-1] ^= 128
    (found / "val.bin").write_bytes(content)


def lose_a_split(found):
    (found / "val.bin").unlink()


def lose_the_manifest(found):
    (found / "manifest.json").unlink()


def tear_the_manifest(found):
    content = (found / "manifest.json").read_bytes()
    (found / "manifest.json").write_bytes(content[: len(content) // 2])


def rewrite_manifest(change):
    def damage(found):
        manifest = json.loads((found / "manifest.json").read_text())
        (found / "manifest.json").write_text(json.dumps(change(manifest)))

    return damage


DAMAGE = {
    "truncated": truncate,
    "byte flipped": flip_a_byte,
    "byte of validation flipped": flip_a_byte_of_validation,
    "split lost": lose_a_split,
    "manifest lost": lose_the_manifest,
    "manifest torn": tear_the_manifest,
    "manifest of another format": rewrite_manifest(lambda manifest: {**manifest, "format": 0}),
    "manifest of something else": rewrite_manifest(lambda manifest: ["not", "ours"]),
    "manifest without splits": rewrite_manifest(lambda manifest: {**manifest, "splits": {}}),
    "manifest with odd splits": rewrite_manifest(lambda manifest: {**manifest, "splits": {"train": 3, "val": None}}),
    "manifest of another corpus": rewrite_manifest(lambda manifest: {**manifest, "corpus": {"root": "/elsewhere"}}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_foreign_cache_is_rebuilt(damage, folder, make, read):
    data = make(folder)
    intact = read(data)
    found = cache_folder(data)
    before = inodes(found)
    damage(found)
    assert read(make(folder)) == intact
    assert inodes(found)["train.bin"] != before["train.bin"]
    assert json.loads((found / "manifest.json").read_text())["format"] == 2


def test_setup_never_maps_a_cache_of_the_wrong_size(folder, make):
    data = make(folder)
    truncate(cache_folder(data))
    with pytest.raises(FileNotFoundError, match=r"cache_dir: found no complete cache.*prepare_data\(\)"):
        data.setup()


def test_an_interrupted_build_leaves_nothing_that_could_be_used(folder, make, monkeypatch):
    data = make(folder)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    (found,) = data.cache_dir.iterdir()
    assert not inodes(found)
    with pytest.raises(FileNotFoundError):
        data.setup()
    data.prepare_data()
    data.setup()


def test_an_interrupted_rebuild_is_noticed(folder, make, monkeypatch, read):
    """The first split is replaced, the second not: the old manifest must not vouch for the mixture."""
    data = make(folder)
    found = cache_folder(data)
    for path in folder.rglob("file*.txt"):
        path.write_text(path.read_text().upper())
    replace, calls = os.replace, []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    assert set(inodes(found)) == FILES
    parts = read(data)
    assert b"TEXT OF FILE" in parts["train"]
    assert b"TEXT OF FILE" in parts["val"]


def test_leftovers_of_killed_builds_are_removed_but_not_a_build_in_progress(folder, make, read):
    data = make(folder)
    found = cache_folder(data)
    dead = found / f".train.bin.abcdefgh{PART}"
    dead.write_bytes(b"half a split")
    intact = read(data)
    assert dead.exists(), "a valid cache is not touched"
    truncate(found)
    with whole_file(found / "val.bin") as living:  # holds its lock, as another process that builds would
        assert read(data) == intact
        assert living.exists()
        living.write_bytes((found / "val.bin").read_bytes())
    assert not dead.exists()
    assert read(data) == intact


@pytest.mark.parametrize("change", ["content", "added", "removed", "touched"])
def test_a_changed_source_is_read_again(change, folder, make, read):
    data = make(folder)
    manifest = cache_folder(data) / "manifest.json"
    before = manifest.read_bytes()
    victim = folder / "file01.txt"
    if change == "content":
        victim.write_text("changed")
    elif change == "added":
        (folder / "zzz.txt").write_text("added")
    elif change == "removed":
        victim.unlink()
    else:
        os.utime(victim, ns=(0, 0))
    parts = read(data)
    assert manifest.read_bytes() != before
    assert len(b"".join(parts.values()).split(b"\0")) - 1 == len(data.corpus.files())
    assert (b"changed\0" in b"".join(parts.values())) == (change == "content")


def test_other_settings_have_another_cache(folder, make, read):
    makers = [make(folder), make(folder, pattern="*.txt"), make(folder, val_fraction=0.3), make(folder / "sub")]
    contents = [read(data) for data in makers[:3]]
    assert len({str(content) for content in contents}) == 3
    makers[3].prepare_data()
    assert len(list(makers[0].cache_dir.iterdir())) == 4
    assert read(makers[0]) == contents[0]


def test_batch_settings_share_a_cache(folder, make):
    for kwargs in ({}, {"context_length": 8}, {"batch_size": 7}, {"seed": 3}):
        make(folder, **kwargs).prepare_data()
    assert len(list(make(folder).cache_dir.iterdir())) == 1


def test_builders_at_the_same_time_agree(folder, make, read):
    threads = [threading.Thread(target=make(folder).prepare_data) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = make(folder)
    found = cache_folder(data)
    before = inodes(found)
    data.prepare_data()
    assert inodes(found) == before
    assert set(before) == FILES


def test_a_read_only_cache_that_is_valid_will_do(folder, make, monkeypatch):
    data = make(folder)
    data.prepare_data()
    monkeypatch.setattr(ByteCache, "write", None)
    data.prepare_data()
    data.setup()


def test_full_disk(make, text_file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    data = make(text_file)
    with pytest.raises(ValueError, match=r"No space left on device.*room for a copy"):
        data.prepare_data()
    (found,) = data.cache_dir.iterdir()
    assert not inodes(found)


def test_cache_location(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIGHTNING_MUE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache/lightning_mue"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert default_cache_dir() == tmp_path / ".cache/lightning_mue"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg/lightning_mue"
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == TextDataModule().cache_dir == tmp_path / "own"
