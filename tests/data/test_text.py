"""Corpus selection, split, interface, and every bad input of TextDataModule."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from lightning_mue.data import TextDataModule
from lightning_mue.data.corpus import TextCorpus, in_validation

# --- Selection and split ---------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_of_names_each_file_once(folder, make, read):
    parts = read(make(folder, pattern="*.txt"))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("file*.txt"))
    assert names[-1].startswith("sub/deep/")
    for split, wanted in (("val", True), ("train", False)):
        expected = b"".join(
            (folder / name).read_bytes() + b"\0" for name in names if in_validation(name, 0.2) is wanted
        )
        assert parts[split] == expected
        assert len(expected) > 1000


def test_one_large_file_does_not_make_up_validation(tmp_path, make, read):
    names = [f"file{i}.txt" for i in range(200)]
    for name in names:
        (tmp_path / name).write_text(f"{name} " * 10)
    large = next(name for name in names if in_validation(name, 0.2))
    (tmp_path / large).write_text("large " * 10_000)
    parts = read(make(tmp_path, pattern="*.txt"))
    assert b"large" in parts["train"]
    assert b"large" not in parts["val"]
    assert sum(name.encode() + b" " in parts["val"] for name in names) > 20


def test_the_pattern_chooses_files(folder, make, read):
    assert b"markdown" not in b"".join(read(make(folder, pattern="*.txt")).values())
    everything = b"".join(read(make(folder)).values())
    assert b"markdown" in everything
    assert b"must not be read" not in everything


def test_the_split_by_hash_is_pinned_and_has_the_right_size():
    """Pinned: a change would move training text into the validation split of everybody's runs."""
    names = [f"folder/file{i}.py" for i in range(4000)]
    chosen = [name for name in names if in_validation(name, 0.05)]
    assert chosen[:3] == ["folder/file6.py", "folder/file20.py", "folder/file62.py"]
    # 200 expected, standard deviation 13.8.
    assert abs(len(chosen) - 200) < 4 * 13.8
    larger = [name for name in names if in_validation(name, 0.1)]
    assert set(chosen) < set(larger)


def test_adding_a_file_moves_no_other(folder, make, read):
    before = read(make(folder))
    (folder / "new.txt").write_text("something new")
    after = read(make(folder))
    split = "val" if in_validation("new.txt", 0.2) else "train"
    assert after[split] != before[split]
    assert after[split].replace(b"something new\0", b"") == before[split]
    other = "train" if split == "val" else "val"
    assert after[other] == before[other]


def test_a_single_file_is_split_by_position_and_bytes_are_bytes(tmp_path, make, read):
    content = bytes(range(256)) * 8  # no valid UTF-8
    path = tmp_path / "raw.bin"
    path.write_bytes(content)
    parts = read(make(path, val_fraction=0.25))
    assert parts == {"train": content[:1536], "val": content[1536:]}


def test_pieces_longer_than_one_read_are_whole(tmp_path, make, read):
    content = np.random.Generator(np.random.PCG64(0)).bytes(3 * 2**20 + 17)
    path = tmp_path / "large.bin"
    path.write_bytes(content)
    parts = read(make(path, val_fraction=0.5))
    assert parts["train"] + parts["val"] == content
    assert len(parts["val"]) == round(len(content) / 2)


def test_the_default_corpus_is_the_standard_library(tmp_path, read):
    data = TextDataModule(cache_dir=tmp_path)
    parts = read(data)
    size = sum(map(len, parts.values()))
    assert 8e6 < size < 20e6
    assert 0.02 < len(parts["val"]) / size < 0.15
    names = [file.name for file in data.corpus.files()]
    assert "argparse.py" in names
    assert not any(
        part in {"test", "tests", "idle_test", "site-packages"} for name in names for part in name.split("/")
    )
    documents = [document for part in parts.values() for document in part.split(b"\0")[:-1]]
    assert len(documents) == len(names), "a NUL within a file would end it early"
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    assert source in documents
    # A handful of files of the library declare another encoding than UTF-8; none but those fails to decode.
    undecodable = [document for document in documents if not _decodes(document)]
    assert len(undecodable) < 5
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (32, 256)
    assert len(data.train_dataloader()) == len(parts["train"]) // (32 * 256)
    assert len(data.val_dataloader()) == 20


def _decodes(document):
    try:
        document.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"context_length": 0}, ValueError, "context_length: found 0, expected an integer of at least 1"),
        (
            {"context_length": 1.5},
            TypeError,
            r"context_length: found 1.5 of type float, expected an integer of at least 1",
        ),
        ({"batch_size": 0}, ValueError, "batch_size: found 0, expected an integer of at least 1"),
        ({"batch_size": True}, TypeError, "batch_size: found True of type bool, expected an integer"),
        ({"batch_size": "32"}, TypeError, "batch_size: found '32' of type str, expected an integer"),
        ({"seed": -1}, ValueError, "seed: found -1, expected an integer of at least 0"),
        ({"val_batches": 0}, ValueError, "val_batches: found 0, expected an integer of at least 1"),
        ({"val_fraction": 0.0}, ValueError, "val_fraction: found 0.0, expected a number above 0 and below 1"),
        ({"val_fraction": 1}, ValueError, "val_fraction: found 1, expected a number above 0 and below 1"),
        ({"val_fraction": float("nan")}, ValueError, "val_fraction: found nan, expected a number above 0 and below 1"),
        (
            {"val_fraction": "5%"},
            TypeError,
            "val_fraction: found '5%' of type str, expected a number above 0 and below 1",
        ),
    ],
)
def test_bad_arguments(kwargs, error, message, make):
    with pytest.raises(error, match=message):
        make(None, **kwargs)


def test_numbers_of_numpy_are_taken_as_pythons(make):
    data = make(None, context_length=np.int64(8), batch_size=np.int32(2), val_fraction=np.float32(0.5))
    kinds = {type(value) for value in (data.context_length, data.batch_size)}
    assert kinds == {int}
    assert type(data.val_fraction) is float


def test_missing_corpus(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: found '.*nowhere', which does not exist, expected a text file"):
        make(tmp_path / "nowhere").prepare_data()


def test_empty_corpus(make, tmp_path, folder):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(
        ValueError, match=r"path: found '.*empty.txt', where 1 files match .* with no bytes in them, expected text"
    ):
        make(tmp_path / "empty.txt").prepare_data()
    with pytest.raises(
        ValueError, match=r"path: found .* where 0 files match pattern='\*.rst', with no bytes in them, expected text"
    ):
        make(folder, pattern="*.rst").prepare_data()


@pytest.mark.parametrize(
    ("size", "val_fraction", "message"),
    [
        (
            60,
            0.2,
            r"path='.*', val split: found 12 tokens \(train 48, val 12\), expected at least 17, .*context_length=16",
        ),
        (60, 0.8, r"train split: found 12 tokens \(train 12, val 48\)"),
        (10, 0.01, r"train split: found 10 tokens \(train 10, val 0\)"),
    ],
)
def test_corpus_smaller_than_a_window(size, val_fraction, message, make, tmp_path):
    path = tmp_path / "small.txt"
    path.write_bytes(b"x" * size)
    data = make(path, val_fraction=val_fraction)
    data.prepare_data()
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_corpus_of_exactly_one_window(make, tmp_path):
    path = tmp_path / "small.txt"
    path.write_bytes(bytes(range(34)))
    data = make(path, val_fraction=0.5, batch_size=3)
    data.prepare_data()
    data.setup()
    (batch,) = data.train_dataloader()
    assert batch["tokens"].tolist() == [list(range(16))] * 3
    (batch,) = data.val_dataloader()
    assert batch["targets"].tolist() == [list(range(18, 34))]


def test_unwritable_cache(make, text_file, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(ValueError, match=r"cache_dir: found .* could not be written.*LIGHTNING_MUE_CACHE"):
        make(text_file, cache_dir=tmp_path / "a file").prepare_data()


def test_unreadable_source_is_named(make, folder, monkeypatch):
    """The tests may run as root, whom no permission stops: the file goes away between listing and reading instead."""
    data = make(folder)
    files = data.corpus.files()
    (folder / "file07.txt").unlink()
    monkeypatch.setattr(TextCorpus, "files", lambda self: files)
    with pytest.raises(ValueError, match=r"path: found the corpus file '.*file07.txt', which could not be read"):
        data.prepare_data()


@pytest.mark.parametrize("place", [".", "cache"])
def test_a_corpus_does_not_take_in_its_own_cache(place, make, folder, read):
    data = make(folder, cache_dir=folder / place)
    first = read(data)
    (manifest,) = folder.rglob("manifest.json")
    before = manifest.stat().st_ino
    assert read(data) == first
    assert manifest.stat().st_ino == before


def test_a_tag_on_the_corpus_itself_does_not_empty_it(make, folder, read):
    before = read(make(folder, pattern="*.txt"))
    (folder / "CACHEDIR.TAG").touch()
    assert read(make(folder, pattern="*.txt")) == before


def test_dataloader_before_setup(make, folder):
    with pytest.raises(RuntimeError, match=r"TextDataModule: found .* Call prepare_data\(\) and setup\(\) first"):
        make(folder).train_dataloader()
    with pytest.raises(FileNotFoundError, match=r"cache_dir: found no complete cache .* Call prepare_data\(\) first"):
        make(folder).setup()


def test_model_with_too_small_a_vocabulary(make, text_file, make_trainer, recorder):
    trainer = make_trainer(max_steps=1)
    with pytest.raises(
        ValueError,
        match=r"Recorder.vocab_size: found 255, expected at least 256, because token id 255 .* Set .* to 256 or more",
    ):
        trainer.fit(recorder(vocab_size=255), datamodule=make(text_file))
    assert trainer.global_step == 0


# --- Interface -------------------------------------------------------------------------------------------------------


def test_sizes(make, folder):
    data = make(folder)
    assert (data.vocab_size, data.bytes_per_token, data.batch_size, data.context_length) == (256, 1.0, 2, 16)
    assert data.batch_tokens == 32


def test_yaml_configures_it(tmp_path, text_file):
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    config = parser.parse_string(
        f"data: {{path: {text_file}, context_length: 8, val_batches: null, val_fraction: 0.2}}"
    )
    data = getattr(parser, "instantiate", parser.instantiate_classes)(config).data  # renamed in jsonargparse 4.49
    data.cache_dir = tmp_path
    data.prepare_data()
    data.setup()
    assert next(iter(data.val_dataloader()))["tokens"].shape == (2, 8)
