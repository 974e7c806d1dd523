"""Files are whole or not there."""

import pytest

from lightning_mue.files import whole_file


def write(path, text, error=None):
    with whole_file(path) as part:
        part.write_text(text)
        if error is not None:
            raise error


def test_a_file_is_replaced_whole_or_left_alone(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write(path, "one")
    with pytest.raises(OSError, match="full"):
        write(path, "half of tw", OSError("disk full"))
    assert path.read_text() == "one"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]
