"""What the fuzzers of folders share: ways to damage a folder's files, and how long and how much they may take."""

import contextlib
import copy
import json
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

from hypothesis import strategies as st

DEEP = b"[" * 100_000
NUMBERS = [
    -1, 0, 1, 2, 3, 8, 2**24, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e30, 1e400, float("nan"),
]  # fmt: skip
WORDS = [
    "", "x", "8", "Ġ", "true", "gpt2", "llama", "F8_E4M3", "BF16", "\ud800", "\x1b[31m\n", "../x", "映",
    "x" * 100_000,
]  # fmt: skip
WEIRD = st.sampled_from(
    [None, True, False, *NUMBERS, *WORDS, [], {}, [1], ["x"], [[]], {"x": 1}, {"type": []}, [0] * 1000, [2**62] * 3]
)
NO_JSON = [b"", b"\x00", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"x": "\xff"}']
NO_JSON += [DEEP, b'{"a":' * 100_000, b'{"x": ' + DEEP[:900] + b"]" * 900 + b"}", b'{"x": ' + b"9" * 5000 + b"}"]


@contextlib.contextmanager
def within(seconds: float):
    """Fail where it takes longer."""

    def late(*_):
        raise AssertionError(f"takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)  # where it hangs; the clock of this process decides
    start = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < seconds


@contextlib.contextmanager
def memory(more: int):
    """This process may take so many bytes more than it has."""
    before, has = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (has + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Folder:
    """The files of a valid folder, by name; hypothesis is not to print them."""

    def __init__(self, folder: Path):
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def spoilt(self, draw, into: Path) -> set[str]:
        """Write a copy in which a file or two are damaged or missing; which."""
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        names = draw(st.sets(st.sampled_from(sorted(self.files)), min_size=1, max_size=2))
        for name, data in self.files.items():
            if name not in names:
                (into / name).write_bytes(data)
            elif draw(st.integers(0, 15)):
                (into / name).write_bytes(damaged(draw, data, name))
        return names


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The way to everything in an object of JSON; of what has many parts, to the first few and the last."""
    children = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    found = [path] if path else []
    for key, child in children[:24] + children[24:][-2:]:
        found += places(child, (*path, key))
    return found


def changed(draw, content: object) -> object:
    """An object of JSON in which something is another."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 2))):
        where = places(content)
        if not where:
            return copy.deepcopy(draw(WEIRD))
        *way, last = draw(st.sampled_from(where))
        parent = content
        for key in way:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "other", "rename", "many"]))
        if how == "replace":
            parent[last] = copy.deepcopy(draw(WEIRD))
        elif how == "delete":
            del parent[last]
        elif how == "other":  # what stands elsewhere
            other = content
            for key in draw(st.sampled_from(where)):
                other = other[key]
            parent[last] = copy.deepcopy(other)
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from([*WORDS, *map(str, parent)]))] = parent.pop(last)
        elif how == "many" and isinstance(parent, list):
            parent.extend(copy.deepcopy([parent[last]]) * draw(st.sampled_from([1, 1000])))
    return content


def damaged(draw, data: bytes, name: str) -> bytes:
    """The bytes of a file with something wrong in them."""
    ways = ["none of its kind", "cut", "garbled", "longer"]
    ways += ["changed"] * 9 if name.endswith((".json", ".safetensors")) else []
    how = draw(st.sampled_from(ways))
    if how == "none of its kind":
        return draw(st.sampled_from(NO_JSON) | st.binary(max_size=20))
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "longer":
        return data + draw(st.binary(min_size=1, max_size=9))
    if how == "garbled":
        data = bytearray(data)
        for _ in range(draw(st.integers(1, 9))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    if name.endswith(".json"):
        return json.dumps(changed(draw, json.loads(data))).encode()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(changed(draw, json.loads(data[8 : 8 + length]))).encode()
    length = draw(st.sampled_from([len(header)] * 9 + [0, 1, length, 2**40, 2**64 - 1]))
    return struct.pack("<Q", length) + header + data[8 + struct.unpack("<Q", data[:8])[0] :]
