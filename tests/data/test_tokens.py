"""Raw token files: types, splits, the check of the vocabulary, and every bad input of TokenDataModule."""

from __future__ import annotations

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from lightning_mue.data import TokenDataModule, tokens
from lightning_mue.data.tokens import largest_id

LARGE = {"uint16": 60_000, "uint32": 200_000}


@pytest.fixture
def write(tmp_path):
    def write(ids, name="train.bin", dtype="<u2"):
        path = tmp_path / name
        np.asarray(ids).astype(dtype).tofile(path)
        return path

    return write


def make(*args, **kwargs):
    return TokenDataModule(*args, **{"context_length": 8, "batch_size": 2, "val_fraction": 0.25, **kwargs})


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_one_file_is_split_by_position(dtype, write):
    ids = np.arange(LARGE[dtype], LARGE[dtype] + 400)
    data = make(write(ids, dtype=f"<{np.dtype(dtype).str[1:]}"), dtype=dtype)
    data.prepare_data()
    data.setup()
    train, val = data.load_splits()
    assert (train == ids[:300]).all()
    assert (val == ids[300:]).all()
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].min() >= ids[0]
    assert (batch["targets"] == batch["tokens"] + 1).all()
    assert next(iter(data.val_dataloader()))["tokens"][0].tolist() == ids[300:308].tolist()
    assert data.vocab_size == ids[-1] + 1
    assert isinstance(data._splits.train, np.memmap)


def test_two_files(write):
    data = make(write(range(100)), write(range(500, 550), "val.bin"))
    data.setup()
    assert len(data.load_splits().train) == 100
    assert next(iter(data.val_dataloader()))["tokens"].min() >= 500
    assert data.vocab_size == 550
    assert data.bytes_per_token is None
    assert make(write(range(100)), bytes_per_token=4.2).bytes_per_token == 4.2
    assert data.batch_tokens == 16


def test_the_scan_finds_the_largest_id_wherever_it_is(monkeypatch):
    monkeypatch.setattr(tokens, "_SCAN_TOKENS", 7)
    for n in (1, 6, 7, 8, 14, 20):
        for position in range(n):
            ids = np.zeros(n, dtype=np.uint16)
            ids[position] = 65_535
            assert largest_id(ids) == 65_535
    assert largest_id(np.zeros(20, dtype=np.uint16)) == 0


def test_the_scan_runs_once(write, monkeypatch):
    data = make(write(range(100)))
    data.setup()
    assert data.vocab_size == 100
    monkeypatch.setattr(tokens, "largest_id", None)
    data.setup()
    assert data.vocab_size == 100


@pytest.mark.parametrize("where", ["train_path", "val_path"])
def test_the_vocabulary_is_checked_before_the_first_step(where, write, make_trainer, recorder):
    train, val = np.arange(200) % 50, np.arange(100) % 50
    (train if where == "train_path" else val)[60] = 77
    data = make(write(train), write(val, "val.bin"))
    trainer = make_trainer(max_steps=1)
    with pytest.raises(
        ValueError,
        match=rf"Recorder.vocab_size: found 77, expected at least 78, because token id 77 occurs in {where}='.*'. Set .* 78",
    ):
        trainer.fit(recorder(vocab_size=77), datamodule=data)
    assert trainer.global_step == 0
    model = recorder(vocab_size=78)
    make_trainer(max_steps=3).fit(model, datamodule=make(write(train), write(val, "val.bin")))
    assert len(model.seen) == 3


def test_a_model_without_vocab_size_is_not_checked(write, make_trainer, recorder):
    model = recorder(vocab_size=300)
    del model.vocab_size
    model.loss = lambda batch: model.head(model.embedding(batch["tokens"])).sum()
    make_trainer(max_steps=1).fit(model, datamodule=make(write(range(250))))
    assert len(model.seen) == 1


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dtype": "int16"}, ValueError, "dtype: found 'int16', expected one of 'uint16', 'uint32'"),
        ({"bytes_per_token": 0}, ValueError, "bytes_per_token: found 0, expected a number above 0"),
        ({"bytes_per_token": float("nan")}, ValueError, "bytes_per_token: found nan, expected a number above 0"),
        ({"context_length": 0}, ValueError, "context_length: found 0, expected an integer of at least 1"),
        ({"batch_size": -3}, ValueError, "batch_size: found -3, expected an integer of at least 1"),
        ({"val_fraction": 1.5}, ValueError, "val_fraction: found 1.5, expected a number above 0 and below 1"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        make("train.bin", **kwargs)


def test_missing_files(write, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"train_path: found '.*none.bin', which is not a file, expected a raw file of uint16 token ids",
    ):
        make(tmp_path / "none.bin").setup()
    with pytest.raises(FileNotFoundError, match=r"val_path: found '.*', which is not a file"):
        make(write(range(100)), tmp_path).setup()


@pytest.mark.parametrize(
    ("content", "dtype", "message"),
    [
        (b"", "uint16", "train_path: found .*, which is empty, expected a raw file of uint16 token ids"),
        (b"x" * 101, "uint16", "of 101 bytes, expected a multiple of the 2 bytes of dtype='uint16'"),
        (b"x" * 102, "uint32", "of 102 bytes, expected a multiple of the 4 bytes of dtype='uint32'"),
        (
            (20240520).to_bytes(4, "little") + bytes(1100),
            "uint16",
            "an llm.c data file, expected a raw file of uint16 token ids. Remove its header",
        ),
    ],
)
def test_files_that_are_no_token_files(content, dtype, message, tmp_path):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(path, dtype=dtype).setup()


def test_npy_files_are_recognized(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(
        ValueError, match=r"train_path: found '.*', a NumPy .npy file, expected a raw file of uint16 token ids.*tofile"
    ):
        make(tmp_path / "ids.npy").setup()


def test_files_smaller_than_a_window(write):
    with pytest.raises(ValueError, match=r"val split: found 5 tokens \(train 15, val 5\), expected at least 9"):
        make(write(range(20))).setup()


def test_yaml_configures_it(write):
    parser = ArgumentParser()
    parser.add_class_arguments(TokenDataModule, "data")
    path = write(range(100_000), dtype="<u4")
    config = parser.parse_string(
        f"data: {{train_path: {path}, dtype: uint32, context_length: 8, bytes_per_token: 4.5}}"
    )
    data = getattr(parser, "instantiate", parser.instantiate_classes)(config).data  # renamed in jsonargparse 4.49
    data.setup()
    assert (data.vocab_size, data.bytes_per_token) == (100_000, 4.5)
