"""--overwrite: what it removes, when, and what it leaves alone."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanopref.running import replace
from nanopref.running.flags import RunFlags, UserError
from nanopref.running.folder import Run


def a_run(folder: Path, **settings) -> Run:
    run = Run(RunFlags(out=str(folder), **settings))
    run.begin()
    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def old_run(folder: Path) -> dict[str, bytes]:
    """A run with results, as its files."""
    run = a_run(folder)
    run.log({"loss": 1.0})
    run.keep(lambda: ["x\n"], "feedback.jsonl")
    states = ("state/7/run.json", "state/7/shard-00001-model-00001-of-00001.safetensors", "state-2/12/run.json")
    for name in ("model/config.json", "sft/model/model.safetensors", *states, "report.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return tree(folder)


def test_the_old_run_is_there_until_the_new_one_has_something_to_show(tmp_path):
    before = old_run(tmp_path / "run")
    new = a_run(tmp_path / "run", overwrite=True, seed=7)
    assert tree(tmp_path / "run" / replace.OLD) == before
    new.log({"loss": 2.0})
    assert tree(tmp_path / "run").keys() == {"config.json", "metrics.jsonl"}


@pytest.mark.parametrize("shown", ["a row", "a file that took long", "a row of a stage"])
def test_what_counts_as_something_to_show(shown, tmp_path):
    old_run(tmp_path / "run")
    new = a_run(tmp_path / "run", overwrite=True, save_seconds=0.0)
    if shown == "a row":
        new.log({"loss": 2.0})
    elif shown == "a row of a stage":
        a_run(tmp_path / "run" / "sft").log({"loss": 2.0})
    else:
        new.keep(lambda: ["y\n"], "feedback.jsonl")
    assert not replace.is_aside(tmp_path / "run")


def test_a_file_that_was_made_in_a_moment_is_no_result(tmp_path):
    old_run(tmp_path / "run")
    a_run(tmp_path / "run", overwrite=True).keep(lambda: ["y\n"], "feedback.jsonl")
    assert replace.is_aside(tmp_path / "run")


def test_a_new_run_that_ends_without_a_result_gives_the_old_one_back(tmp_path, capsys):
    before = old_run(tmp_path / "run")
    new = a_run(tmp_path / "run", overwrite=True, seed=7)
    (tmp_path / "run" / "thesis.txt").write_text("written meanwhile")
    with pytest.raises(UserError), new.stage("test"):
        raise UserError("something went wrong")
    with pytest.raises(UserError, match="holds a run: add --resume"):
        Run(RunFlags(out=str(tmp_path / "run")))
    assert "holds the run again that --overwrite had set aside" in capsys.readouterr().out
    assert tree(tmp_path / "run") == before | {"thesis.txt": b"written meanwhile"}


def test_at_its_end_the_process_gives_it_back_itself(tmp_path):
    before = old_run(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "run")  # of which no process has a lock
    words = "from nanopref.running.flags import *; from nanopref.running.folder import Run\n"
    words += f"Run(RunFlags(out={str(tmp_path / 'run')!r}, overwrite=True, seed=7)).begin(); raise SystemExit(2)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", words], env=environment).returncode == 2
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["thesis.txt", ".git/HEAD", "model/notes.md", "sft/thesis.txt", "state/7/x.bin"])
def test_a_folder_with_other_files_is_left_as_it_is(name, tmp_path):
    old_run(tmp_path / "run")
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("of somebody else")
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match=f"would remove .*{name}, which is of no run"):
        Run(RunFlags(out=str(tmp_path / "run"), overwrite=True))
    assert tree(tmp_path / "run") == before


def test_a_link_to_the_folder_stays_and_one_inside_it_is_not_ours(tmp_path):
    old_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    a_run(tmp_path / "link", overwrite=True, seed=7).log({"loss": 2.0})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "run" / "metrics.jsonl").exists()
    (tmp_path / "elsewhere.pt").write_text("x")
    (tmp_path / "run" / "state" / "7").mkdir(parents=True)
    (tmp_path / "run" / "state" / "7" / "a.safetensors").symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match=r"a\.safetensors, which is of no run"):
        Run(RunFlags(out=str(tmp_path / "run"), overwrite=True))


def test_the_current_folder(tmp_path, monkeypatch):
    old_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    a_run(Path("."), overwrite=True, seed=7).log({"loss": 2.0})
    assert tree(Path(".")).keys() == {"config.json", "metrics.jsonl"}


def test_a_stage_in_which_another_process_works(tmp_path):
    old_run(tmp_path / "run")
    words = "from nanopref.running.flags import *; from nanopref.running.folder import Run\n"
    words += f"Run(RunFlags(out={str(tmp_path / 'run' / 'sft')!r})).begin(); print(1, flush=True); input()"
    (tmp_path / "run" / "sft" / "model" / "model.safetensors").unlink()
    (tmp_path / "run" / "sft" / "model").rmdir()
    environment, pipe = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", words], env=environment, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"1\n"
        before = tree(tmp_path / "run")
        with pytest.raises(UserError, match="another process is at work there"):
            Run(RunFlags(out=str(tmp_path / "run"), overwrite=True)).begin()
        assert tree(tmp_path / "run") == before
        other.communicate(b"\n")


def test_a_mount_point_that_holds_what_file_systems_hold(tmp_path):
    """A new volume may hold lost+found, and cannot itself be renamed."""
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    a_run(tmp_path / "volume").log({"loss": 1.0})
    a_run(tmp_path / "volume", overwrite=True, seed=7).log({"loss": 2.0})
    assert (tmp_path / "volume" / "lost+found").is_dir()


def test_a_real_mount_point(tmp_path):
    out = tmp_path / "volume"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        old_run(out)
        a_run(out, overwrite=True, seed=7).log({"loss": 2.0})
        assert tree(out).keys() == {"config.json", "metrics.jsonl"}
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


# ---- folders that only look like what is set aside ------------------------------------------------------------------


@pytest.mark.parametrize("name", [".old", ".moving", replace.OLD, replace.MOVING])
def test_a_folder_of_that_name_that_is_no_run_of_ours(name, tmp_path):
    """Beside a run, where `--out` of another would be, and in a folder that is no run."""
    for place in (tmp_path, tmp_path / "project"):
        (place / name).mkdir(parents=True)
        (place / name / "notes.txt").write_text("precious")
    (tmp_path / "project" / "notes.txt").write_text("newer")
    (tmp_path / "project" / "config.json").write_text("{}")
    a_run(tmp_path / "run").log({"loss": 1.0})
    before = tree(tmp_path)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="no run of ours"):
            Run(RunFlags(out=str(tmp_path / "project"), **how))
    assert tree(tmp_path) == before


def test_a_run_beside_one_that_is_set_aside(tmp_path):
    """Of a run in a folder that holds another run, as an experiment's may."""
    old_run(tmp_path / "run")
    a_run(tmp_path / "run", overwrite=True)
    replace._aside.clear()  # as in another process
    a_run(tmp_path / "run" / "sft").log({"loss": 2.0})
    assert replace.is_aside(tmp_path / "run")


def test_what_stands_in_the_place_of_a_file_that_comes_back(tmp_path):
    before = old_run(tmp_path / "run")
    replace.set_aside(tmp_path / "run")
    (tmp_path / "run" / "report.png").mkdir()
    (tmp_path / "run" / "report.png" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"report\.png is in the place of"):
        replace.put_back(tmp_path / "run")
    (tmp_path / "run" / "report.png" / "mine.txt").rename(tmp_path / "mine.txt")
    (tmp_path / "run" / "report.png").rmdir()
    replace.put_back(tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_words_that_are_no_paths_are_none_of_the_runs_files(tmp_path, monkeypatch):
    """In the run's own folder `--reward true` reads nothing of it."""

    @dataclass
    class Config(RunFlags):
        reward: tuple[str, ...] = ("true", "rules*0.5")

    a_run(tmp_path).log({"loss": 1.0})
    monkeypatch.chdir(tmp_path)
    Run(Config(out=".", overwrite=True))
    with pytest.raises(UserError, match=r"would remove sft\*0\.5, which --reward wants to read"):
        (tmp_path / "sft").mkdir()
        Run(Config(out=".", overwrite=True, reward=("sft*0.5",)))


def test_what_is_not_ours_but_called_as_if_it_were_being_written(tmp_path):
    (tmp_path / "run" / ".mine.partial").mkdir(parents=True)
    (tmp_path / "run" / ".mine.partial" / "a").write_text("x")
    (tmp_path / "run" / ".dl.iso.partial").write_text("y")
    before = tree(tmp_path / "run")
    (tmp_path / "run" / ".config.json.17.partial").write_text("of a process that was killed before it had a run")
    a_run(tmp_path / "run").log({"loss": 1.0})
    assert not (tmp_path / "run" / ".config.json.17.partial").exists()
    (tmp_path / "run" / "state" / ".state.next.partial").mkdir(parents=True)
    (tmp_path / "run" / "state" / ".state.next.partial" / "run.json").write_text("of a process that was killed")
    (tmp_path / "run" / ".metrics.jsonl.17.partial").write_text("of another")
    a_run(tmp_path / "run", resume=True)
    assert before.items() <= tree(tmp_path / "run").items()
    assert len([name for name in tree(tmp_path / "run") if ".partial" in name]) == 2


def test_a_part_that_cannot_be_moved_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    """A mount point, or a folder of somebody else."""
    before, ordinary = old_run(tmp_path / "run"), Path.rename

    def rename(path, target):
        if path.name == "model" and replace.MOVING in str(target):
            raise OSError(16, "Device or resource busy", str(path))
        return ordinary(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="busy"):
        a_run(tmp_path / "run", overwrite=True)
    assert tree(tmp_path / "run") == before and not replace.is_aside(tmp_path / "run")


def test_a_folder_that_the_new_run_had_made_is_no_obstacle(tmp_path):
    """It was killed while it wrote the first file of its model."""
    before = old_run(tmp_path / "run")
    a_run(tmp_path / "run", overwrite=True)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / ".tokenizer.json.17.partial").write_text("{")
    (tmp_path / "run" / replace.MOVING).mkdir()
    a_run(tmp_path / "run", resume=True)
    assert tree(tmp_path / "run") == before and not (tmp_path / "run" / replace.MOVING).exists()
    (tmp_path / "run" / replace.MOVING).mkdir()
    a_run(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / replace.MOVING).exists()
