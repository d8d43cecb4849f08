"""What a run has read or made, and must find as it was when it goes on: a digest of each input in inputs.json."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import require
from nanopref.running.parallel import rank

OF_A_MODEL = re.compile(r".*\.(safetensors|jinja)|(.*config|tokenizer|.*map|.*index)\.json")


class Inputs:
    """The digests in a run's folder, by the names of inputs. Only the first process of several looks and writes."""

    def __init__(self, folder: Path):
        self._path = folder / "inputs.json"
        found = read_object(self._path)
        whole = found.pop("digest", "") == digest(json.dumps(found))
        self.digests: dict[str, str] = found if whole else {}  # what is spoilt is forgotten, as if nothing were known

    def pin(self, name: str, found: str, message: str) -> None:
        """Remember the digest of an input; UserError with this message where another is remembered."""
        if rank() > 0:
            return
        require(self.digests.get(name, found) == found, message)
        if name not in self.digests:
            self.digests[name] = found
            content = self.digests | {"digest": digest(json.dumps(self.digests))}
            write_atomic(self._path, json.dumps(content, indent=2) + "\n")


def digest(*parts: str | bytes) -> str:
    """SHA-256 of what is said one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def fingerprint(path: Path) -> str:
    """The digest of a file; of a folder, that of the model in it, or in the run that it is, wherever it lies."""
    if path.is_file():
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    return digest(*(f"{file.relative_to(path)} {fingerprint(file)}\n" for file in _of_a_model(path)))


def _of_a_model(folder: Path) -> Iterator[Path]:
    model = folder / "model"
    for place in (model if model.is_dir() else folder, folder / "sft" / "model"):  # where a run may have begun
        files = sorted(place.iterdir()) if place.is_dir() else []
        yield from (file for file in files if file.is_file() and OF_A_MODEL.fullmatch(file.name))


def paths_in(word: str) -> list[str]:
    """A flag's word cut where a path in it may begin or end: of a reward it stands before or behind a colon, and a
    weight behind it. Joined they are the word."""
    return [word] if Path(word).exists() else re.split("([:*])", word)


def fingerprint_of_word(word: str) -> str:
    """A flag's word with the fingerprint of what it names in the place of its path: the same wherever that lies. Code
    keeps its name: a judge that failed may be mended."""
    return "".join(
        fingerprint(Path(part)) if part and Path(part).exists() and not part.endswith(".py") else part
        for part in paths_in(word)
    )
