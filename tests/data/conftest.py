"""Files for the tests of data."""

import gzip
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write
