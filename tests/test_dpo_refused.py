"""train_dpo.py fed with nonsense: one sentence, exit code 2, and nothing written that was not there."""

import gzip
import json
import random
from pathlib import Path

import by_hand
import pytest
from helpers import lines, refused, results, start, stopped

import train_dpo
from nanopref.learning.objectives import OBJECTIVES
from nanopref.running.flags import CODE

SMALL = {"batch_size": 8, "epochs": 1, "max_new_tokens": 4, "eval_prompts": 2, "device": "cpu"}
GOOD = {"prompt": "a", "chosen": " b", "rejected": " c"}
BAD_FILES = {
    "not JSON": (b"{}x\n", "line 1: not JSON"),
    "not an object": (b"[1]\n", "pairs.jsonl, row 1: must be an object with named fields, found a int"),
    "lacks a field": (lines(GOOD, {"prompt": "a", "chosen": "b"}), "line 2: has no field 'rejected'"),
    "wrong type": (lines({**GOOD, "chosen": 3}), "'chosen' must be text, found a int"),
    "only empty answers": (lines({**GOOD, "chosen": " "}), "holds no usable pair"),
    "only equal answers": (lines({**GOOD, "rejected": " b"}), "holds no usable pair"),
    "invalid UTF-8": (lines(GOOD) + b'{"prompt": "\xff"}\n', "line 2: not valid UTF-8"),
    "no pair": (b"\n\n", "holds no row"),
    "one prompt": (lines(GOOD, {**GOOD, "chosen": "d"}), "hold only one prompt"),
    "nothing compared": (
        lines({"text": "a"}, {"text": "b"}),
        "pairs.jsonl: text: they do not say which answer is better",
    ),
    "rankings": (
        lines(*({"prompt": x, "responses": ["b", "c", "d"]} for x in "xy")),
        "pairs.jsonl: rankings: use --loss plackett-luce",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run, and what it began with: pairs in FOLDER/pairs.jsonl, a model in FOLDER/init."""
    folder = tmp_path_factory.mktemp("finished")
    rng = random.Random(0)
    rows = [{"prompt": by_hand.text(rng, 2, 5), "chosen": " good", "rejected": " bad"} for _ in range(12)]
    config = train_dpo.Config(
        out=str(folder / "run"), data=by_hand.write(folder / "pairs.jsonl", rows),
        init=by_hand.tiny_model(folder / "init"), **SMALL,
    )  # fmt: skip
    train_dpo.train(config)
    return folder / "run"


def refuse(capsys, out: Path, message: str, **settings) -> None:
    config = train_dpo.Config(out=str(out), **{"device": "cpu", **settings})
    refused(train_dpo.train, config, message, capsys)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(case, tmp_path, capsys):
    content, message = BAD_FILES[case]
    (tmp_path / "pairs.jsonl").write_bytes(content)
    refuse(capsys, tmp_path / "out", message, data=str(tmp_path / "pairs.jsonl"))


TWO = {"prompt": "x", "responses": ["b", "c"]}
WRONG_KINDS = {  # (what the file holds, --loss) -> what is said of it
    ("labels", "dpo"): ([{"prompt": "x", "completion": "b", "label": True}], "labels: use --loss kto or binary"),
    ("ratings", "ipo"): ([TWO | {"scores": [1, 2]}], "ratings: use --loss infonca or nca"),
    ("pairs", "regression"): ([GOOD], "pairs: use --loss dpo or cdpo"),
    ("pairs in an array", "regression"): ([[GOOD]], "pairs: use --loss dpo or cdpo"),
    ("prompts", "kto"): ([{"prompt": "x"}], "prompts: they do not say which answer is better"),
    ("responses", "dpo"): ([{"prompt": "x", "response": "b"}], "responses: they do not say which answer is better"),
    ("responses to one prompt", "preferred"): ([{"prompt": "x", "response": "b"}], "hold only one prompt"),
    ("labels of one kind", "kto"): (
        [{"prompt": x, "completion": "b", "label": 1} for x in "xy"], "rows.jsonl: needs good and bad answers (label 1",
    ),
    ("a bad label", "kto"): ([{"prompt": "x", "completion": "b", "label": 2}], "'label' must be 1 or true (good)"),
    ("a bad score", "nca"): ([TWO | {"scores": [1, None]}], "'scores' must be a number below 1e15, found None"),
}  # fmt: skip


@pytest.mark.parametrize("what, loss", WRONG_KINDS)
def test_a_file_of_the_wrong_kind_is_refused(what, loss, tmp_path, capsys):
    rows, message = WRONG_KINDS[what, loss]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    refuse(capsys, tmp_path / "out", message, data=str(tmp_path / "rows.jsonl"), loss=loss)


def test_a_truncated_gz_is_refused(tmp_path, capsys):
    rows = lines(*[{**GOOD, "prompt": str(random.Random(i).random())} for i in range(200)])
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(rows)[:-40])
    refuse(capsys, tmp_path / "out", "damaged or cut off", data=str(tmp_path / "pairs.jsonl.gz"))


def test_a_missing_file_or_folder_is_refused(tmp_path, capsys):
    refuse(capsys, tmp_path / "out", "no such file", data=str(tmp_path / "none.jsonl"))
    refuse(capsys, tmp_path / "out", "a folder, not a file", data=str(tmp_path))
    refuse(capsys, tmp_path / "out", "no model folder there", init=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "--beta must be above 0"),
        ({"beta": float("nan")}, "--beta must be a finite number"),
        ({"loss": "cross-entropy"}, f"--loss must be one of {', '.join([*OBJECTIVES, CODE])}, not cross-entropy"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"device": "gpu9"}, "no such device"),
        ({"device": "meta"}, "only cpu and cuda"),
        ({"annotators": 2}, "must be odd"),
        ({"label_smoothing": 0.6}, "--label-smoothing must be below 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "--loss ipo has no use for --label-smoothing"),
        ({"judged": "x.jsonl", "data": "y.jsonl"}, "--judged belongs to the built-in task"),
        ({"judged": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"judged": "x.jsonl", "reward": ("out/rm",)}, "people have --judged already"),
        (
            {"data": "x.jsonl", "answers": 2},
            "--feedback, --answers, --select, --voters are for answers that are sampled",
        ),
        (
            {"data": "x.jsonl", "select": "rso"},
            "--feedback, --answers, --select, --voters are for answers that are sampled",
        ),
        ({"loss": "preferred", "beta": 0.2}, "--loss preferred has no use for --beta"),
        ({"lr": -1.0}, "--lr must be above 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"sft_steps": 0}, "--sft-steps must be at least 1"),
        ({"noise": float("inf")}, "--noise must be a finite number"),
        ({"warmup": -1}, "--warmup must be at least 0"),
        ({"prompts": 1}, "--prompts must be at least 20"),
        ({"save_seconds": -1.0}, "--save-seconds must be at least 0"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
)
def test_bad_flags_are_refused(settings, message, tmp_path, capsys):
    refuse(capsys, tmp_path / "out", message, **settings)


# ---- a folder that holds something -----------------------------------------------------------------------------------


def test_an_out_that_holds_another_run_is_left_alone(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    settings = SMALL | {"data": str(finished.parent / "pairs.jsonl"), "init": str(finished.parent / "init")}
    for changed, message in [
        ({}, "add --resume to continue it, --overwrite to replace it"),
        ({"resume": True, "beta": 0.3}, "was started with --beta 0.1"),
    ]:
        config = train_dpo.Config(out=str(finished), **settings, **changed)
        assert message in stopped(train_dpo.train, config, capsys)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_overwrite_spares_what_the_run_wants_to_read(finished, tmp_path, capsys):
    inside = finished / "rows.jsonl"
    inside.write_bytes((finished.parent / "pairs.jsonl").read_bytes())
    init = {"init": str(finished.parent / "init")}
    for settings in ({"data": str(inside)}, init | {"judged": str(inside)}, {"init": str(finished)}):
        config = train_dpo.Config(out=str(finished), overwrite=True, **SMALL, **settings)
        assert "--overwrite would remove" in stopped(train_dpo.train, config, capsys)
    assert inside.exists() and (finished / "model" / "config.json").exists()
    inside.unlink()


@pytest.mark.parametrize("config", [None, "{}", '{"flags": [], "versions": {}}', "not JSON"])
def test_a_folder_that_is_no_run_is_never_overwritten(config, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    if config:
        (tmp_path / "config.json").write_text(config)
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        message = stopped(train_dpo.train, train_dpo.Config(out=str(tmp_path), device="cpu", **settings), capsys)
        assert "no run of ours" in message
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("loss", ["dpo", "simpo"])  # with and without a reference
def test_data_that_changed_are_noticed_on_resume(loss, tmp_path, capsys, no_picture):
    rows = [{"prompt": f"film {i}", "chosen": " good", "rejected": " bad"} for i in range(12)]
    settings = SMALL | {"init": by_hand.tiny_model(tmp_path / "init"), "out": str(tmp_path / "out"), "loss": loss}
    settings["data"] = by_hand.write(tmp_path / "pairs.jsonl", rows)
    train_dpo.train(train_dpo.Config(**settings))
    by_hand.write(tmp_path / "pairs.jsonl", [*rows[:-1], {**rows[-1], "chosen": " new"}])
    message = stopped(train_dpo.train, train_dpo.Config(resume=True, **settings), capsys)
    assert "--data is not what the run" in message and "began with" in message


# ---- what is not refused, but said -----------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_cut_and_counted(tmp_path, capsys, no_picture):
    rows = [{"prompt": f"{i} " + "film " * 9 * i, "chosen": " good", "rejected": " bad"} for i in range(12)]
    data, init = by_hand.write(tmp_path / "pairs.jsonl", rows), by_hand.tiny_model(tmp_path / "init", block_size=32)
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), data=data, init=init, **SMALL))
    count = results(tmp_path / "out")[1]["data"]["prompts cut on the left to fit the context"]
    assert count >= 8 and f"{count} prompts cut on the left" in capsys.readouterr().out


def test_the_command_line_exits_with_2_and_one_line(tmp_path):
    process = start("train_dpo.py", "--data", "nowhere.jsonl", "--out", str(tmp_path / "out"))
    output, errors = process.communicate()
    assert process.returncode == 2 and errors == "error: nowhere.jsonl: no such file\n" and output == ""


def test_real_human_preferences_are_read_trained_on_and_reported(real_data, tmp_path, capsys, no_picture):
    """A few steps on HH, from nothing: every quirk of the file is met, and what was dropped or cut is said."""
    rows = gzip.open(real_data / "hh_harmless.jsonl.gz", "rb").read().splitlines(keepends=True)
    quirks = [i for i in (86, 516, 925, 1103, 1254) if i < len(rows)]
    (tmp_path / "hh.jsonl").write_bytes(b"".join(rows[i] for i in [*range(40), *quirks]))
    settings = SMALL | {"data": str(tmp_path / "hh.jsonl"), "sft_steps": 2}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), **settings))
    output = capsys.readouterr().out
    assert "4 rows dropped: the chosen answer is empty" in output and "prompts cut on the left" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["rows dropped: the chosen answer is empty"] == 4
    assert {"kl", "response_length", "held_out"} <= report.keys() and "true_reward" not in report
    assert {"sft", "dpo"} <= report["seconds"].keys()
