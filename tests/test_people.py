"""The server behind the page: what it refuses, what it survives, and what it makes of bad input."""

import http.client
import json
import random
import re
import resource
import socket
import sys
import threading
import time
from collections import Counter

import pytest
from files import jsonl
from helpers import refused
from serving import Server, free_port

import train_dpo
import train_rm
from nanopref import models, people
from nanopref.data.formats import read
from nanopref.feedback.ballots import read_pairs
from nanopref.running import flags as command_flags


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """400 prompts with two answers each."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = ({"prompt": f"prompt {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(400))
    path.write_bytes(jsonl(*rows))
    return str(path)


@pytest.fixture
def serve(tmp_path):
    started = []

    def start(*words: str) -> Server:
        started.append(Server(tmp_path / f"people-{len(started)}", *words))
        return started[-1]

    yield start
    for server in started:
        server.kill()


# ---- what is shown and written ---------------------------------------------------------------------------------------


def test_a_vote_is_a_line_and_a_second_click_is_none(serve, answers):
    server = serve("--data", answers, "--pairs", "3")
    pair = server.ask("/next", annotator="Ada")["pair"]
    assert set(pair) == {"id", "again", "prompt", "left", "right"}  # nothing that tells which the file calls better
    for choice in ("left", "right"):
        state = server.vote(" Ada ", pair, choice, why="first, I said")
    assert (state["said"], state["left"]) == (1, 2) and state["pair"]["id"] != pair["id"]
    (line,) = server.lines()
    names = ("id", "prompt", "a", "b", "winner", "shown_left", "annotator", "seconds", "time", "why")
    assert tuple(line) == names and line["annotator"] == "Ada" and line["why"] == "first, I said"
    assert line[line["winner"]] == pair["left"] == line[line["shown_left"]]
    assert server.ask("/undo", annotator="Ada", number=1)["pair"] == pair
    assert server.ask("/undo", annotator="Ada", number=1)["said"] == 0  # sent twice
    assert [line["winner"] for line in server.lines()][1:] == ["undo"]
    assert server.vote("Ada", pair, "right")["said"] == 1
    assert server.lines()[-1]["winner"] != line["winner"]


def test_two_models_meet_blind(serve, sft_folder, tmp_path):
    other = tmp_path / "other"
    models.save(*models.load(sft_folder), other)
    server = serve("--model", sft_folder, str(other), "--pairs", "4", "--max-new-tokens", "96")
    while not (state := server.ask("/next", annotator="Ada"))["complete"]:
        time.sleep(0.05)
    assert sft_folder not in json.dumps(state) and str(other) not in json.dumps(state)
    for choice in ("tie", "left", "bad", "tie"):
        state = server.vote("Ada", state["pair"], choice)
    assert state["pair"] is None and state["complete"]
    assert {tuple(sorted(pair.models)) for pair in read_pairs(server.out)} == {tuple(sorted((sft_folder, str(other))))}
    server.kill()
    command_flags.execute(people.main, people.Config(report=str(server.out)))
    ranking = json.loads((server.out / "report.json").read_text())["ranking"]
    assert [row["votes"] for row in ranking] == [4, 4]


def test_from_its_side_it_cannot_be_guessed_which_answer_the_file_calls_better(serve, answers):
    server, connection = serve("--data", answers, "--pairs", "100"), None
    connection = server.connect()
    pair, good = server.ask("/next", connection, annotator="Ada")["pair"], 0
    for _ in range(100):
        good += pair["left"].startswith("good")
        pair = server.vote("Ada", pair, "skip", connection)["pair"]
    assert pair is None and 30 < good < 70
    assert {pair.prompt for pair in read_pairs(server.out)} == {f"prompt {i}" for i in range(100)}


def test_of_several_answers_every_two_are_compared(serve, tmp_path):
    """First a pair of every prompt."""
    path = tmp_path / "rankings.jsonl"
    path.write_bytes(jsonl(*({"prompt": f"p{i}", "responses": [f"{side}{i}" for side in "abc"]} for i in range(2))))
    server = serve("--data", str(path))
    until_told(server, "there are 6 pairs and no more")
    pairs = read_pairs(server.out)
    assert [pair.prompt for pair in pairs] == ["p0", "p1"] * 3
    assert {(pair.a, pair.b) for pair in pairs[::2]} == {("a0", "b0"), ("a0", "c0"), ("b0", "c0")}


def test_an_answer_without_an_end_is_none(serve, sft_folder):
    server = serve("--model", sft_folder, "--pairs", "1", "--max-new-tokens", "2")
    until_told(server, "there are 0 pairs and no more: other answers are alike, empty or without an end")
    assert server.ask("/next", annotator="Ada")["complete"]


def until_told(server: Server, words: str) -> None:
    for _ in range(500):
        if words in server.output():
            return
        time.sleep(0.02)
    raise AssertionError(server.output())


def test_what_cannot_be_written_is_said_and_not_counted(serve, answers):
    """As on a full disk: the server may write no file that is longer."""
    server = serve("--data", answers, "--pairs", "3")
    pair = server.ask("/next", annotator="Ada")["pair"]
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    said = {"annotator": "Ada", "id": pair["id"], "again": False, "choice": "left", "seconds": 1.0, "why": ""}
    status, content, _ = server.request("POST", "/vote", json.dumps(said).encode())
    assert status == 507 and b"nothing could be written" in content and server.lines() == []
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert server.vote("Ada", pair, "left")["said"] == 1


def test_the_page_is_told_where_another_tab_was_quicker(serve, answers):
    server = serve("--data", answers, "--pairs", "3")
    pair = server.ask("/next", annotator="Ada")["pair"]
    assert "stale" not in server.vote("Ada", pair, "left", why="because")
    assert not server.vote("Ada", pair, "left")["stale"]  # the same, sent twice
    assert server.vote("Ada", pair, "right")["stale"] and server.ask("/undo", annotator="Ada", number=3)["stale"]
    assert server.ask("/undo", annotator="Ada", number=1)["why"] == "because"
    assert len(server.lines()) == 2


def test_a_server_that_is_asked_to_stop_says_what_there_is(serve, answers):
    server = serve("--data", answers, "--pairs", "3")
    server.vote("Ada", server.ask("/next", annotator="Ada")["pair"], "left")
    server.process.terminate()
    code, output = server.process.finish()
    assert code == 130 and f"1 votes are in {server.out / 'votes.jsonl'}" in output and "Traceback" not in output
    assert output.endswith("stopped: start the same command to continue\n")


def test_who_hangs_up_leaves_no_trace(serve, answers):
    server = serve("--data", answers, "--pairs", "3")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /vote HTTP/1.1\r\nHost: x\r\nX-Key: %s\r\nContent-Length: 300\r\n\r\n{" % server.key.encode()
        )
    assert server.ask("/next", annotator="Ada")["pair"]
    assert "Traceback" not in server.output()


# ---- who may do what -------------------------------------------------------------------------------------------------


def test_what_is_no_request_of_the_page_changes_nothing(serve, answers):
    server = serve("--data", answers, "--pairs", "3")
    pair = server.ask("/next", annotator="Ada")["pair"]
    good = {"annotator": "Ada", "id": pair["id"], "again": False, "choice": "left", "seconds": 1.0, "why": ""}
    ours = f"http://127.0.0.1:{server.port}"

    def status(fields=good, path="/vote", method="POST", body=None, **headers) -> int:
        return server.request(method, path, json.dumps(fields).encode() if body is None else body, **headers)[0]

    for key in ("", "x", server.key[:-1], None, server.key + "x"):
        assert status(X_Key=key) == 403
        assert status(X_Key=key, path="/next") == status(X_Key=key, path="/undo") == 403
    for origin in ("http://elsewhere.example", "null", ours.replace("127.0.0.1", "localhost"), ours + "1"):
        assert status(Origin=origin) == 403
    changes = [{name: None} for name in good] + [
        {"annotator": x} for x in ("", "  ", "x" * 61, "a\nb", "\x1b", 7, "\ud800")
    ]
    changes += [{"choice": x} for x in ("a", "undo", 1)] + [{"id": "elsewhere"}, {"again": True}, {"again": 0}]
    changes += [{"seconds": x} for x in (-1, True, "1", 1e999, float("nan"))] + [{"why": "x" * 2001}, {"why": "\udfff"}]
    for change in changes:
        assert status(good | change) == 400, change
    for name in good:
        assert status({k: v for k, v in good.items() if k != name}) == 400, name
    for body in (
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"[" * 10_000,
        b"\xff",
        b"x" * 20_000,
        json.dumps(good).encode() + b" " * 16_384,
    ):
        assert status(body=body) == 400
    assert status(method="GET") == status(method="PUT") == 405 and status(path="/votes.jsonl") == 404
    assert (
        status({"annotator": "Ada"}, path="/undo") == status({"annotator": "Ada", "number": 1.0}, path="/undo") == 400
    )
    for path in ("/", "/?key=", "/?key=x", f"/?key={server.key}x"):
        assert server.request("GET", path)[0] == 403
    assert server.lines() == []
    assert status(Origin=ours) == 200 and len(server.lines()) == 1
    for name in ("Zoë\u00a0O'Neil", "👩\u200d👧", "می\u200cخواهم"):
        assert status({"annotator": name}, path="/next") == 200


def test_the_page_loads_nothing_from_elsewhere(serve, answers):
    server = serve("--data", answers, "--pairs", "3")
    pages = [server.request("GET", f"/?key={server.key}") for _ in range(2)]
    assert pages[0][0] == 200 and pages[0][1] != pages[1][1]  # a nonce is for once
    policy = pages[0][2]["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-") and "unsafe" not in policy
    nonce = policy.split("nonce-")[1].split("'")[0]
    content = pages[0][1].decode()
    assert content.count(f'nonce="{nonce}"') == 2 == content.count("<script") + content.count("<style")
    assert "http" not in content and "{nonce}" not in content and "innerHTML" not in content
    assert pages[0][2]["referrer-policy"] == "no-referrer"  # or the key would go along
    assert pages[0][2]["cache-control"] == "no-store" and "server" not in pages[0][2]


@pytest.mark.parametrize("content", ["", "\n", "short"])
def test_a_key_that_a_kill_cut_off_opens_nothing(serve, answers, content):
    server = serve("--data", answers, "--pairs", "3")
    server.kill()
    (server.out / "key").write_text(content)
    server.key = ""
    server.start()
    assert len(server.key) > 20 and (server.out / "key").stat().st_mode & 0o077 == 0
    assert server.request("GET", f"/?key={content.strip()}")[0] == 403
    assert server.ask("/next", annotator="Ada")["pair"]


def test_it_listens_here_alone_unless_it_is_told_otherwise(serve, answers):
    server = serve("--data", answers, "--pairs", "3")
    addresses = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), timeout=2)
    assert "--host" not in server.output()
    assert (server.out / "key").stat().st_mode & 0o077 == 0  # who may read the folder may not vote for others
    open_to_all = serve("--data", answers, "--pairs", "3", "--host", "0.0.0.0")
    assert "whoever reaches this machine and has the link can read the answers and vote" in open_to_all.output()
    assert open_to_all.ask("/next", annotator="Ada")["pair"] and open_to_all.key != server.key


# ---- kills and load --------------------------------------------------------------------------------------------------


def voters(server: Server, names: str, until: threading.Event, pause: float = 0.0) -> tuple[list, list, list]:
    """People who vote as fast as they can, and ask again where the server does not answer: what was acknowledged
    (who, id, again, choice), how long each took, and the threads."""
    acknowledged, seconds = [], []

    def work(name: str) -> None:
        rng, connection, pending = random.Random(name), None, None
        while not until.is_set():
            try:
                connection = connection or server.connect()
                if pending is None:
                    pair = server.ask("/next", connection, annotator=name)["pair"]
                    if pair is None:
                        return
                    pending = pair, rng.choice(("left", "right", "tie", "bad"))
                began = time.monotonic()
                server.vote(name, *pending, connection)
                seconds.append(time.monotonic() - began)
                acknowledged.append((name, pending[0]["id"], pending[0]["again"], pending[1]))
                pending = None
                time.sleep(max(0.0, pause - seconds[-1]))
            except (OSError, http.client.HTTPException):
                connection = None
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    return acknowledged, seconds, threads


def once_each(server: Server, acknowledged: list) -> None:
    """What was acknowledged is in the file, and nothing is there twice."""
    found = Counter((line["annotator"], line["id"], line["shown_left"]) for line in server.lines())
    assert set(found.values()) <= {1}
    said = {(line["annotator"], line["id"], line["shown_left"]): line for line in server.lines()}
    sides: dict[tuple[str, str], list[str]] = {}
    for annotator, id, left in said:
        sides.setdefault((annotator, id), []).append(left)
    for name, id, again, choice in acknowledged:
        line = said[name, id, sides[name, id][again]]
        assert line["winner"] == {"left": line["shown_left"]}.get(choice, line["winner"])
    assert len({(name, id, again) for name, id, again, _ in acknowledged}) == len(acknowledged) <= len(said)


def test_a_server_that_is_killed_at_any_moment_loses_nothing(serve, answers):
    """Twenty times, while four people vote as fast as they can."""
    server, over, rng = serve("--data", answers, "--pairs", "400", "--votes", "4"), threading.Event(), random.Random(0)
    acknowledged, _, threads = voters(server, "wxyz", over, pause=0.01)
    for _ in range(20):
        time.sleep(rng.uniform(0.05, 0.25))
        server.kill()
        server.start()
    time.sleep(0.2)
    over.set()
    for thread in threads:
        thread.join()
    assert len(acknowledged) > 20
    once_each(server, acknowledged)
    assert len(read_pairs(server.out)) == 400
    kind, groups, _ = read(server.out / "votes.jsonl")
    assert kind == "pairs" and groups


def test_many_votes_a_second(serve, answers):
    """200 a second for two seconds; `voters` with a longer pause is how it was measured for longer."""
    server, over = serve("--data", answers, "--pairs", "400", "--votes", "8"), threading.Event()
    acknowledged, seconds, threads = voters(server, "stuvwxyz", over, pause=0.04)
    time.sleep(2)
    over.set()
    for thread in threads:
        thread.join()
    once_each(server, acknowledged)
    assert (
        len(acknowledged) == len(server.lines()) and len(acknowledged) > 200
    )  # a busy machine may be slower than asked
    assert sorted(seconds)[len(seconds) // 2] < 0.2


# ---- what is learnt from it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, votes", [(train_dpo, "majority"), (train_dpo, "count"), (train_rm, "count")])
def test_a_file_of_votes_trains(tmp_path, sft_folder, script, votes, capsys, no_picture):
    """30 pairs: on one two people differ, one is a tie for all three, on the others it is two to one."""
    path, lines = tmp_path / "votes.jsonl", []
    for i in range(30):
        for k, name in enumerate("xyz"[: 2 if i == 0 else 3]):
            texts = {"prompt": f"p{i}", "a": f" good {i}.", "b": f" bad {i}."}
            winner = "tie" if i == 1 else "ab"[k % 2]
            lines.append({**texts, "winner": winner, "annotator": name, "shown_left": "a"})
    path.write_bytes(jsonl(*lines))
    config = {"data": str(path), "init": sft_folder, "votes": votes, "out": str(tmp_path / "run"), "device": "cpu"}
    script.train(script.Config(**config, epochs=1, eval_prompts=2, max_new_tokens=8))
    notes = json.loads((tmp_path / "run" / "report.json").read_text())["data"]
    assert notes["votes dropped: ties"] == 3
    assert notes["pairs dropped: as many people for one answer as for the other"] == 1
    sizes = re.search(r": (\d+) pairs, (\d+) more", capsys.readouterr().out).groups()
    assert sum(map(int, sizes)) == {"majority": 28, "count": 28 * 3}[votes]


# ---- bad input -------------------------------------------------------------------------------------------------------


def config(tmp_path, **given) -> people.Config:
    return people.Config(**{"out": str(tmp_path / "out"), "port": free_port()} | given)


def test_bad_input_is_a_sentence(tmp_path, sft_folder, answers, capsys):
    rows = {
        "prompts.jsonl": [{"prompt": f"p{i}"} for i in range(4)], "text.jsonl": [{"text": "once upon a time"}],
        "empty.jsonl": [], "none.jsonl": [{"question": "?"}],
    }  # fmt: skip
    for name, content in rows.items():
        (tmp_path / name).write_bytes(jsonl(*content))
    reward_model = tmp_path / "rm"
    train_rm_config = {"out": str(reward_model), "init": sft_folder, "prompts": 40, "device": "cpu", "eval_prompts": 2}
    train_rm.train(train_rm.Config(**train_rm_config, epochs=1, max_new_tokens=96))
    capsys.readouterr()
    cases = [
        ({}, "name who answers with --model (python -m nanopref.sft trains one in out/sft), or a file of answers"),
        ({"model": (sft_folder,), "data": answers}, "and not both"),
        ({"data": answers, "prompts": answers}, "--prompts are for a --model to answer"),
        ({"model": (sft_folder, sft_folder)}, "--model: name each model once"),
        ({"model": (str(tmp_path / "nowhere"),)}, "no model folder there"),
        ({"model": (str(reward_model),)}, "a reward model or a critic, which writes no text; name a policy"),
        ({"model": (sft_folder,), "prompts": str(tmp_path / "none.jsonl")}, "line 1: has no field 'prompt'"),
        ({"model": (sft_folder,), "prompts": str(tmp_path / "empty.jsonl")}, "holds no row"),
        ({"model": (sft_folder,), "prompts": str(tmp_path / "nowhere.jsonl")}, "no such file"),
        ({"model": (sft_folder,), "prompts": str(tmp_path / "text.jsonl")}, "text.jsonl: holds no prompt"),
        ({"data": str(tmp_path / "prompts.jsonl")}, "holds no prompt with two different answers"),
        ({"data": answers, "host": "no.such.host.invalid"}, "--host no.such.host.invalid: no such address"),
        ({"data": answers, "host": "192.0.2.1"}, "--host 192.0.2.1 --port"),
        ({"data": answers, "port": 65536}, "--port must be at most 65535"),
        ({"data": answers, "pairs": 0}, "--pairs must be at least 1"),
        ({"report": str(tmp_path)}, "no vote is there"),
        ({"report": str(tmp_path / "nowhere")}, "no vote is there"),
    ]
    for given, message in cases:
        refused(people.main, config(tmp_path, **given), message, capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(
            people.main, config(tmp_path, data=answers, port=port), f"--port {port}: is in use; choose another", capsys
        )


def test_without_the_extra_it_is_named(tmp_path, answers, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(people.main, config(tmp_path, data=answers), "pip install 'nanopref[people]'", capsys)


def test_a_folder_of_something_else_is_left_alone(serve, tmp_path, answers, capsys):
    more = tmp_path / "more.jsonl"
    more.write_bytes(jsonl({"prompt": "p", "chosen": "a", "rejected": "b"}))
    server = serve("--data", answers, "--pairs", "3")
    while (server.out / "pairs.jsonl").read_text().count("\n") < 3:  # which it writes as they are made
        time.sleep(0.05)
    before = {path.name: path.read_bytes() for path in server.out.iterdir()}
    same = {"data": answers, "out": str(server.out)}

    def says(**given) -> str:
        with pytest.raises(SystemExit) as stop:
            command_flags.execute(people.main, config(tmp_path, **same | given))
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "another process is at work there" in says()
    server.kill()
    assert "its pairs were made with --seed 0; choose another --out" in says(seed=1)
    assert f"its pairs were made with --data {answers}" in says(data=str(more))
    assert {path.name: path.read_bytes() for path in server.out.iterdir()} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("…")
    assert "holds something that is no votes of ours" in says(out=str(other))
    (other / "config.json").write_text("{}")  # and not even this makes it one
    assert "holds something that is no votes of ours" in says(out=str(other))
    assert {path.name for path in other.iterdir()} == {"thesis.txt", "config.json"}


def test_the_report_needs_somebody(serve, answers, capsys):
    server = serve("--data", answers, "--pairs", "3")
    server.vote("Ada", server.ask("/next", annotator="Ada")["pair"], "left")
    people.main(people.Config(report=str(server.out)))
    said = capsys.readouterr().out
    assert (
        "Ada" in said and "nobody shares a pair with anybody, so how far people agree is not known: --votes 2" in said
    )
    assert "ranking" not in json.loads((server.out / "report.json").read_text())
