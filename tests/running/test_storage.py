"""A state as files: written and read by other numbers of processes and in other layouts, damaged, in the background."""

import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import forks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from nanopref.running import optim, storage
from nanopref.running.flags import UserError
from nanopref.running.states import States

LAYOUTS = {"one": (1, False), "two alike": (2, False), "two that share": (2, True), "three that share": (3, True)}


def names(layout: str) -> list[str]:
    """Of optimisers; torch's Adafactor has none for shares of a weight."""
    return ["adamw"] if LAYOUTS[layout][1] else ["adamw", "adafactor"]


class Small(nn.Module):
    """With all that a model may have: matrices that no number of processes divides, a weight of one number, some that
    are shared, frozen or never have a gradient, buffers, and what is no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 1)
        self.shared, self.idle = self.first, nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("beta", torch.rand((), dtype=torch.float64))
        self.register_buffer("cache", torch.rand(2), persistent=False)
        self.said: list[tuple] = []

    def forward(self, x):
        return self.second(self.first(x).tanh())

    def get_extra_state(self) -> list[tuple]:
        return self.said

    def set_extra_state(self, state: list[list]) -> None:
        self.said = [tuple(x) for x in state]


def made(name: str, seed: int, sharded: bool = False) -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Small()
    if sharded:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(fully_shard(model.first, mesh=mesh) and model, mesh=mesh)
    return model, optim.OPTIMIZERS[name](model, 0.1)


def trained(name: str, sharded: bool = False) -> tuple[Small, torch.optim.Optimizer]:
    model, optimizer = made(name, 0, sharded)
    model.said = [(0.1, 3, "x", [1e-17]), (float("inf"), -1, "\ud800", [])]
    for _ in range(3):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole(model: Small, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = storage.tensors_of(model, optimizer)
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for name, x in found.items()}


def process(rank: int, port: int, layout: str, act: str, folder: Path) -> None:
    """One of some that write states of small models below a folder, or read them; what it has then is in a file."""
    torch.set_num_threads(1)
    size, sharded = LAYOUTS[layout]
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        dist.init_process_group("gloo")
    for name in [name for name in names(layout) if act == "save" or (folder / name).exists()]:
        model, optimizer = trained(name, sharded) if act == "save" else made(name, 1, sharded)
        if act == "save":
            storage.write(folder / name, model, optimizer, {"step": 3})
        else:
            assert storage.load(folder / name, model, optimizer)["step"] == 3
            assert model.said == [(0.1, 3, "x", [1e-17]), (float("inf"), -1, "\ud800", [])]
        save_file(whole(model, optimizer), folder / f"{name} {act} {rank}")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def together(layout: str, act: str, folder: Path) -> None:
    size, _ = LAYOUTS[layout]
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = [forks.Process(target=process, args=(i, port, layout, act, folder)) for i in range(size)]
    for one in found:
        one.start()
    for one in found:
        one.join(60)
    assert [one.exitcode for one in found] == [0] * size


@pytest.fixture(scope="module", params=["one", "two alike", "two that share"])
def written(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("written") / "states"
    together(request.param, "save", folder)
    return request.param, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_some_processes_have_written_others_read(layout, written, tmp_path):
    how, source = written
    shutil.copytree(source, tmp_path / "states")
    together(layout, "load", tmp_path / "states")
    for name in {*names(how)} & {*names(layout)}:
        files = {path.name[:12] for path in (source / name).glob("*.safetensors")}
        assert len(files) == LAYOUTS[how][0]  # each process has written its share
        expected = load_file(source / f"{name} save 0")
        assert {"first.weight", "beta", "optimizer.second.bias.step"} < expected.keys()
        assert not [key for key in expected if re.search("shared|frozen|cache|optimizer.idle", key)]
        for rank in range(LAYOUTS[layout][0]):
            found = load_file(tmp_path / "states" / f"{name} load {rank}")
            assert found.keys() == expected.keys()
            assert all(torch.equal(x, expected[key]) for key, x in found.items())


@pytest.fixture
def state(tmp_path) -> Path:
    storage.write(tmp_path / "state", *trained("adamw"), {"step": 3})
    return tmp_path / "state"


def test_after_it_an_optimiser_is_as_it_was(state):
    """It has taken a step, to have something to remember of each weight."""
    (model, optimizer), (expected, other) = made("adamw", 1), trained("adamw")
    frozen = model.frozen.weight.clone()
    storage.load(state, model, optimizer)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(model.frozen.weight, frozen)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert model.idle.weight not in optimizer.state and len(optimizer.state) == len(other.state) == 4
    for one, its in ((model, optimizer), (expected, other)):
        one(torch.ones(4, 5)).sum().backward()
        its.step()
    assert torch.equal(model.first.weight, expected.first.weight)


def test_a_state_in_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FILE", 64)
    model, optimizer = trained("adamw")
    storage.write(tmp_path / "state", model, optimizer, {"step": 3})
    sizes = [sum(x.nbytes for x in load_file(path).values()) for path in (tmp_path / "state").glob("*.safetensors")]
    assert max(sizes) <= 64 and len(sizes) > 4
    again = made("adamw", 1)
    storage.load(tmp_path / "state", *again)
    expected = whole(model, optimizer)
    assert all(torch.equal(x, expected[name]) for name, x in whole(*again).items())


# ---- what is not believed --------------------------------------------------------------------------------------------


def test_any_byte_that_is_another_is_noticed(state):
    for path in state.iterdir():
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            with pytest.raises((ValueError, KeyError)):
                storage._checked(state)
        path.write_bytes(content)
    storage._checked(state)


def test_a_file_too_many_or_too_few(state):
    (path,) = state.glob("*.safetensors")
    shutil.copy(path, state / "another.safetensors")
    with pytest.raises(ValueError):
        storage._checked(state)
    (state / "another.safetensors").unlink()
    storage._checked(state)
    path.unlink()
    with pytest.raises(ValueError):
        storage._checked(state)


@pytest.mark.parametrize("how", ["shape", "dtype", "more", "fewer", "optimiser", "extra"])
def test_a_state_of_something_else(how, state):
    model, optimizer = made("adafactor" if how == "optimiser" else "adamw", 1)
    if how == "shape":
        model.beta = torch.zeros(2, dtype=torch.float64)
    elif how == "dtype":
        model.beta = torch.zeros(())
    elif how == "more":
        model.register_buffer("more", torch.zeros(()))
    elif how == "fewer":
        del model.beta
    elif how == "extra":
        model.__class__ = type("Other", (nn.Module,), {})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="other tensors"):
        storage.load(state, model, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- while the run goes on -------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[True, False], ids=["of a group", "alone"])
def held_up(request, monkeypatch) -> threading.Event:
    """States are written in the background, not before somebody says so."""
    if request.param:
        request.getfixturevalue("one_process")
    ordinary, go = storage.Writer.write_data, threading.Event()

    def write_data(writer, plan, planner):
        assert go.wait(30)
        return ordinary(writer, plan, planner)

    monkeypatch.setattr(storage.Writer, "write_data", write_data)
    monkeypatch.setattr(States, "background", True)
    return go


def test_a_state_that_is_written_while_the_weights_learn_is_of_what_they_were(held_up, tmp_path):
    model, optimizer = trained("adamw")
    expected, states = whole(model, optimizer), States(tmp_path / "state", looks=True)
    states.write(3, model, optimizer, {"inputs": {}})
    with torch.no_grad():
        for x in storage.tensors_of(model, optimizer).values():
            x.fill_(9)
    states.accept()  # it is not there yet, and the run goes on
    assert not [*tmp_path.rglob("run.json")] and states.newest() is None
    held_up.set()
    states.accept(wait=True)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["3"]
    again = made("adamw", 1)
    assert States(tmp_path / "state", looks=True).load(*again, total=3)["inputs"] == {}
    assert all(torch.equal(x, expected[name]) for name, x in whole(*again).items())


def test_what_goes_wrong_in_the_background_is_said_when_it_counts(held_up, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    states = States(tmp_path / "state", looks=True)
    held_up.set()
    states.write(1, *trained("adamw"), {})
    states.accept(wait=True)
    monkeypatch.setattr(storage, "_sum_of", full)
    states.write(3, *trained("adamw"), {})
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'state'}'"):
        states.accept(wait=True)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["1"]
    states.accept()  # nothing is left of it
    assert "those after 1 steps" in states.fall_back()


# ---- what a kill leaves ----------------------------------------------------------------------------------------------


def test_states_of_which_only_some_can_count(tmp_path):
    """Between the newest, which had just come, and the last that was sound, one was to go; another half gone."""
    for looks, expected in ((True, ["2", "12"]), (False, ["12"])):
        folder = tmp_path / str(looks)
        for step in (2, 7, 12):
            storage.write(folder / str(step), *trained("adamw"), {"step": step})
        (folder / "13").mkdir()
        (folder / "13" / "shard-00001-model-00001-of-00001.safetensors").write_text("")
        (folder / "notes").mkdir()
        states = States(folder, looks)
        assert {path.name for path in folder.iterdir()} == {*expected, "notes"}
        assert states.newest() == folder / "12" and states.load(*made("adamw", 1), total=12)["step"] == 12
        states.found_sound()
        assert {path.name for path in folder.iterdir()} == {"12", "notes"}


def test_a_disk_that_is_full_in_the_middle_of_a_state(tmp_path, monkeypatch):
    states = States(tmp_path / "state", looks=True)
    states.write(1, *trained("adamw"), {})
    states.accept()
    for name, error in (("_sum_of", OSError(28, "No space left on device")), ("_as_text", UserError("x"))):
        with monkeypatch.context() as patch:
            patch.setattr(storage, name, lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)) as raised:
                states.write(2, *trained("adamw"), {})
        assert "Traceback" not in str(raised.value)
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["1"]
