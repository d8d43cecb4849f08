"""What a run has read or made, and must find as it was when it goes on: a digest of each input in inputs.json."""

import hashlib
import json
import re
from pathlib import Path

from nanopref.running.files import read_object, write_atomic
from nanopref.running.flags import require
from nanopref.running.parallel import rank

OF_A_MODEL = re.compile(r".*\.(safetensors|jinja)|(.*config|tokenizer|.*map|.*index)\.json")
NO_PATHS = {"true", "specificity", "rules", "asks", "rates", "implicit"}  # in the notation of --reward


class Inputs:
    """The digests in a run's folder, by the names of inputs."""

    def __init__(self, folder: Path):
        self._path = folder / "inputs.json"
        found = read_object(self._path)
        whole = found.pop("digest", "") == digest(json.dumps(found))
        self.digests: dict[str, str] = found if whole else {}  # what is spoilt is forgotten, as if nothing were known

    def pin(self, name: str, found: str, message: str) -> None:
        """Remember the digest of an input; UserError with this message where another is remembered."""
        require(self.digests.get(name, found) == found, message)
        self.remember(name, found)

    def remember(self, name: str, found: str | None) -> None:
        """The same of what was made just now, whatever it was before; or forget it, with None."""
        if self.digests.get(name) == found:
            return
        self.digests = {k: x for k, x in (self.digests | {name: found}).items() if x is not None}
        content = self.digests | {"digest": digest(json.dumps(self.digests))}
        if rank() > 0:  # they know the same
            return
        write_atomic(self._path, json.dumps(content, indent=2) + "\n")


def digest(*parts: str | bytes) -> str:
    """SHA-256 of what is said one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def fingerprint(path: Path) -> str:
    """The digest of a file; of a folder, that of the model in it, wherever it lies."""
    if path.is_file():
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    place = path / "model" if (path / "model").is_dir() else path
    files = sorted(place.iterdir()) if place.is_dir() else []
    files = [file for file in files if file.is_file() and OF_A_MODEL.fullmatch(file.name)]
    return digest(*(f"{file.name} {fingerprint(file)}\n" for file in files))


def parts_of(word: str) -> list[str]:
    """A word of --reward cut where a path in it begins and ends, each as long as there is one: it stands before or
    behind a colon, and a weight behind it. Joined they are the word."""
    pieces, parts = re.split("([:*])", word), []
    while pieces:
        n = next((n for n in range(len(pieces), 1, -1) if is_path("".join(pieces[:n]))), 1)
        parts.append("".join(pieces[:n]))
        pieces = pieces[n:]
    return parts


def is_path(part: str) -> bool:
    """Whether a part of a flag's word names something that is there."""
    return part not in {"", *NO_PATHS} and Path(part).exists()


def paths_in(parts: list[str]) -> list[Path]:
    """What is read of that: of a policy's implicit reward also the policy that it began as."""
    found = [Path(part) for part in parts if is_path(part)]
    for run in found if parts[0] == "implicit" else ():
        start = (read_object(run / "config.json").get("flags") or {}).get("init") or run / "sft"
        found = [*found, *([Path(start)] if Path(start).exists() else [])]
    return found


def fingerprint_of_word(parts: list[str]) -> str:
    """The parts of a flag's word, with the fingerprint of what is named in the place of its path: the same wherever
    that lies. Code keeps its name: a judge that failed may be mended. Of a policy's implicit reward β counts too."""
    found = ["" if is_path(part) and not part.endswith(".py") else part for part in parts]
    read = [path for path in paths_in(parts) if path.suffix != ".py"]
    if parts[0] == "implicit":
        read += [file for path in read if (file := path / "config.json").is_file()]
    return "".join([*found, *map(fingerprint, read)])
