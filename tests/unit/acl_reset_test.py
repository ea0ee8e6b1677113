from __future__ import annotations

from pathlib import Path

import pytest

from caserver.acl_reset import NAME, ResetFile


@pytest.mark.parametrize(
    ("content", "index"),
    [(b"13", 13), (b"13\n", 13), (b" 7 \n", 7), (b"", 0), (b"x13", 0), (b"-3", 0), (b"\xff", 0), (b"9" * 60, 0)],
)
def test_the_index_is_what_the_file_begins_with(tmp_path: Path, content: bytes, index: int) -> None:
    (tmp_path / NAME).write_bytes(content)

    assert ResetFile(tmp_path).read() == index


def test_the_file_counts_once(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("13")
    reset = ResetFile(tmp_path)

    assert reset.read() == 13
    reset.remove()
    reset.remove()
    assert reset.read() == 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_none(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    reset = ResetFile(tmp_path)

    assert reset.read() == 0
    reset.remove()
    assert ResetFile(None).read() == 0
    ResetFile(None).remove()
