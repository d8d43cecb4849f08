"""Rows of a file: JSON Lines or a JSON array, plain or `.gz`; Parquet; or a data set of the Hugging Face hub.

`owner/name`, where there is no such file here, is a data set: its split `train` or, as `owner/name:split`, another; one
that has several configurations is named with it, `owner/name/config:split`. Nothing else asks the network for anything.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanopref.running.flags import UserError, require

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
ON_THE_HUB = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?:/([\w.-]+))?(?::([\w.-]+))?")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) for each row, or "row n" where a file has no lines. Raises UserError where the file cannot
    be read or a row is no object with named fields."""
    for file in _found(str(path)):
        try:
            yield from _parquet(file) if file.suffix == ".parquet" else _json_rows(file)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            if f.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                rows = _json(str(path), f.read().removeprefix(codecs.BOM_UTF8))
                yield from ((where := f"{path}, row {i}", _object(where, row)) for i, row in enumerate(rows, 1))
                return
            for number, line in enumerate(f, 1):
                where = f"{path}, line {number}"
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield where, _object(where, _json(where, line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off after line {number} ({error})") from None


def _json(where: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError:
        raise UserError(f"{where}: not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _object(where: str, row: Any) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with named fields, found a {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: to read Parquet, pip install 'nanopref[hub]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also a date that Python has not
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no Parquet, or damaged or cut off after row {number} ({reason})") from None


# ---- a file, or those of a data set ----------------------------------------------------------------------------------


def _found(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    on_the_hub = ON_THE_HUB.fullmatch(name)
    if path.exists() or not on_the_hub or name.endswith(KINDS):
        raise UserError(f"{name}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    return _downloaded(name, *on_the_hub.groups())


def _downloaded(name: str, dataset: str, configuration: str | None, split: str | None) -> list[Path]:
    """The files of a split of a data set, which the hub's own library downloads once."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = "to load a data set of that name from the Hugging Face hub, pip install 'nanopref[hub]'"
        raise UserError(f"{name}: no such file; {hint}") from None
    split = split or "train"
    patterns = [f"{configuration + '/' if configuration else ''}*{split}*{kind}" for kind in KINDS]
    try:
        folder = Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's own errors are many, and all mean the same here
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: neither a file nor a data set that the hub could give: {reason}") from None
    files = sorted(p for p in folder.rglob("*") if _is_of(p, split) and configuration in (None, p.parent.name))
    kind = next((kind for kind in KINDS if any(p.name.endswith(kind) for p in files)), "")
    files = [p for p in files if p.name.endswith(kind)]
    hint = f"name another split as {dataset}:split" + ("" if configuration else f", or {dataset}/configuration:split")
    require(bool(files), f"{name}: the hub has no Parquet or JSON Lines there of a split {split!r}; {hint}")
    others = sorted({p.parent.name for p in files})
    require(
        len(others) == 1,
        f"{name}: has several configurations; name one as {dataset}/{others[0]}, of {', '.join(others)}",
    )
    return files


def _is_of(path: Path, split: str) -> bool:
    """Whether a file is of this split, as train.jsonl, train-00000-of-00002.parquet and train/0.parquet are."""
    named = re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+.*)?\.[a-z.]+", path.name) or path.parent.name == split
    return bool(named) and path.name.endswith(KINDS)
