"""Real people: a page that asks which of two answers is better. `python -m nanopref.people`

A browser shows a prompt with two answers, side by side in random order, and what a person says of them is a line of
OUT/votes.jsonl, which train_rm.py and train_dpo.py take as --data. One model answers each prompt twice; several meet,
and nobody sees which is which. --report says how far people agree with one another and with themselves.
"""

import errno
import hmac
import itertools
import json
import os
import secrets
import shlex
import signal
import socket
import sys
import threading
import unicodedata
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanopref import models
from nanopref.data.formats import read
from nanopref.evaluation import agreement
from nanopref.feedback.ballots import Ballots, Refused, read_pairs, read_votes
from nanopref.feedback.collect import training_prompts
from nanopref.models.sampling import respond
from nanopref.running import flags, parallel, terminal
from nanopref.running.files import PARTIAL, lock, write_atomic
from nanopref.running.flags import UserError, flag, require
from nanopref.running.parallel import say

PAGE = Path(__file__).with_suffix(".html")
CHOICES = ("left", "right", "tie", "bad", "skip")
LIMITS = {"annotator": 60, "why": 2000}  # characters
LARGEST = 16_384  # bytes of a request
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = (  # nothing is loaded, from here or elsewhere, but what stands in the page itself
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAME = ("model", "prompts", "data", "seed", "max_new_tokens")  # flags that say which pairs a folder holds
Found = tuple[str, str, str, tuple[str, ...]]  # a prompt, two answers, and who wrote them where that is asked


@dataclass
class Config:
    """Ask people which answer is better, on a page that this command serves; then learn from OUT/votes.jsonl.

    Example: python -m nanopref.people --model out/sft
    """

    model: tuple[str, ...] = flag(
        (), "who answers: one model answers each prompt twice, several meet blind; run or Hugging Face folders"
    )
    prompts: str = flag("", "what they answer: the prompts of this file; default: those of the built-in task")
    data: str = flag("", "compare the answers in this file instead: pairs, rankings, the feedback.jsonl of a run …")
    report: str = flag("", "show no page, but what the votes in this folder say")
    out: str = flag("out/people", "the folder of pairs.jsonl and votes.jsonl; the same command goes on where it was")
    pairs: int = flag(100, "how many pairs of answers are compared", least=1)
    votes: int = flag(1, "how many people judge each pair", least=1)
    host: str = flag("127.0.0.1", "the address to listen at: by default this machine alone can open the page")
    port: int = flag(8765, "0 takes one that is free", least=0, most=65535)
    max_new_tokens: int = flag(64, "longest response that is sampled", least=1)
    seed: int = flag(0, "another seed, other prompts and answers", least=0, below=2**32)
    device: str = flag("auto", "auto, cpu or cuda")


def main(config: Config) -> None:
    flags.check(config)
    if config.report:
        agreement.conclude(Path(config.report), read_pairs(Path(config.report)), read_votes(Path(config.report)))
        return
    uvicorn = _server()
    require(bool(config.model) != bool(config.data), "name who answers with --model (python -m nanopref.sft trains one "
            "in out/sft), or a file of answers with --data, and not both")  # fmt: skip
    require(len({*config.model}) == len(config.model), "--model: name each model once")
    require(not config.prompts or bool(config.model), "--prompts are for a --model to answer; --data has its own")
    folder = Path(config.out)
    source = given_pairs(config) if config.data else sampled_pairs(config)
    listening = listen(config.host, config.port)
    ballots, key = opened(folder, config)
    stop = threading.Event()
    threading.Thread(target=gather, args=(source, ballots, config.pairs, stop), daemon=True).start()
    announce(config, listening, key)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    log = {"log_level": "error", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 3}
    try:
        uvicorn.Server(uvicorn.Config(application(ballots, key, stop.is_set), **log)).run(sockets=[listening])
    finally:
        stop.set()
        n, path = ballots.total(), folder / "votes.jsonl"
        say(f"\n{n} votes are in {path}; what they say, and how to learn from them:")
        say(f"  python -m nanopref.people --report {shlex.quote(str(folder))}")
        start = f" --init {shlex.quote(config.model[0])}" if config.model else ""
        rate = "" if config.prompts or config.data else " --lr 1e-3"  # so few pairs need large steps, of a small model
        out = shlex.quote(f"{folder}-dpo")
        say(f"  python train_dpo.py --data {shlex.quote(str(path))}{start} --epochs 8{rate} --out {out}")


# ---- the pairs -------------------------------------------------------------------------------------------------------


def sampled_pairs(config: Config) -> Callable[[int], Iterator[Found]]:
    """What gives pairs without end, a few at a time so that the first are there at once, after so many that are there
    already. Raises UserError for models and prompts that are none."""
    device = parallel.start(config.device, config.seed)
    policies = [models.load(name) for name in config.model]
    for policy, _ in policies:
        policy.to(device)
    asked = read(config.prompts)[1] if config.prompts else []
    prompts = list(dict.fromkeys(group.prompt for group in asked if group.prompt.strip()))
    require(bool(prompts) or not config.prompts, f"{config.prompts}: holds no prompt")
    meetings = list(itertools.combinations(range(len(policies)), 2)) or [(0, 0)]

    def pairs(done: int) -> Iterator[Found]:
        setting = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
        for size in itertools.chain((8, 16, 32), itertools.repeat(64)):
            drawn = prompts or training_prompts("", done + size, f"people {config.seed}")
            asked = [drawn[i % len(drawn)] for i in range(done, done + size)]
            for turn, meeting in enumerate(meetings):
                mine = asked[turn :: len(meetings)]
                sides = enumerate(meeting if mine else ())
                found = [respond(*policies[who], mine, stream=f"people {done} {k}", **setting) for k, who in sides]
                names = tuple(config.model[who] for who in meeting) if len(policies) > 1 else ()
                # an answer without an end is no answer: as text it would be given one
                texts = [[answer.text if answer.ended else "" for answer in side] for side in found]
                yield from ((x, a, b, names) for x, a, b in zip(mine, *texts, strict=False))
            done += size

    return pairs


def given_pairs(config: Config) -> Callable[[int], Iterator[Found]]:
    """The same of a file's answers, each pair once: one of every prompt, then the next of each."""
    answers: dict[str, dict[str, None]] = {}
    for group in read(config.data)[1]:
        for prompt, response in zip(group.asked(), group.responses, strict=True):
            answers.setdefault(prompt, {})[response] = None
    found = [[(prompt, *pair, ()) for pair in itertools.combinations(texts, 2)] for prompt, texts in answers.items()]
    require(any(found), f"{config.data}: holds no prompt with two different answers")
    return lambda done: (pair for row in itertools.zip_longest(*found) for pair in row if pair)


def gather(source: Callable[[int], Iterator[Found]], ballots: Ballots, n: int, stop: threading.Event) -> None:
    """Fill up to n pairs while people vote, and tell when all are there."""
    try:
        found = itertools.islice(source(len(ballots.pairs)), 20 * n)
        while len(ballots.pairs) < n and not stop.is_set() and (pair := next(found, None)):
            ballots.add(*pair)
        if len(ballots.pairs) < n and not stop.is_set():
            say(f"there are {len(ballots.pairs)} pairs and no more: other answers are alike, empty or without an end")
    except Exception as error:  # the page goes on with what is there
        say(terminal.line(f"error: no more pairs: {error}"))
    finally:
        stop.set()


# ---- the server ------------------------------------------------------------------------------------------------------


def _server() -> Any:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise UserError("the page needs a web server: pip install 'nanopref[people]'") from None
    return uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)  # by whose name the server knows to send small answers at once
        if os.name == "posix":  # elsewhere it would let two servers share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)  # here and not by the server, so that a port in use is known before anything is written
    except socket.gaierror:
        raise UserError(f"--host {host}: no such address") from None
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        reason = "is in use; choose another, or 0 for one that is free" if used else f"cannot be had ({error.strerror})"
        raise UserError(f"{'' if used else f'--host {host} '}--port {port}: {reason}") from None
    return found


def opened(folder: Path, config: Config) -> tuple[Ballots, str]:
    """The folder's votes and the key of its link, both of which outlive the server. Raises UserError where the folder
    holds pairs of other flags, or another server works in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    path, mine = folder / "config.json", {name: getattr(config, name) for name in SAME}
    mine = json.loads(json.dumps(mine))
    if path.exists():
        try:
            before = json.loads(path.read_text())["flags"]
            changed = [f"--{name.replace('_', '-')} {before[name]}" for name in SAME if before[name] != mine[name]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--out {folder}: holds something that is no votes of ours; choose another") from None
        require(not changed, f"--out {folder}: its pairs were made with {', '.join(changed)}; choose another --out")
    else:
        others = [path for path in folder.iterdir() if not path.name.endswith(PARTIAL)]
        require(not others, f"--out {folder}: holds something that is no votes of ours; choose another")
        write_atomic(path, json.dumps({"flags": asdict(config)}, indent=2) + "\n")
    ballots, secret = Ballots(folder, config.votes), folder / "key"
    key = secret.read_text().strip() if secret.exists() else ""
    if len(key) < 16:  # a kill may have left it empty
        key = secrets.token_urlsafe(16)
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:  # for its owner alone
            f.write(key)
    return ballots, key


def announce(config: Config, listening: socket.socket, key: str) -> None:
    """Print the link, and open it where there is a screen."""
    address, port = listening.getsockname()[:2]
    name = socket.gethostname() if address in ("0.0.0.0", "::") else f"[{address}]" if ":" in address else address
    link = f"http://{name}:{port}/?key={key}"
    say(f"which answer is better? Open this link; Ctrl-C ends it, and the same command goes on.\n\n  {link}\n")
    if address not in ("127.0.0.1", "::1"):
        say(f"--host {config.host}: whoever reaches this machine and has the link can read the answers and vote, and "
            "the way there is not encrypted; without the link nobody can do anything.")  # fmt: skip
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(link)


def application(ballots: Ballots, key: str, complete: Callable[[], bool]) -> Any:
    """The page, and the three things that it asks for: what to show next, to vote, and to undo."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.routing import Route

    page = PAGE.read_text(encoding="utf-8")

    async def show_page(request: Request):
        if not hmac.compare_digest(request.query_params.get("key", "").encode(), key.encode()):
            return PlainTextResponse("The link is not complete: open it as it was printed.\n", 403, HEADERS)
        nonce = secrets.token_urlsafe(16)
        policy = {"Content-Security-Policy": POLICY.format(nonce)}
        return HTMLResponse(page.replace("{nonce}", nonce), headers=HEADERS | policy)

    def route(path: str, act: Callable, *names: str) -> Route:
        def carried_out(asked: dict[str, Any]) -> dict[str, Any]:
            found = act(asked["annotator"], *(asked[name] for name in names))
            return found | state_of(ballots, asked["annotator"], complete())

        async def endpoint(request: Request):
            origin, host = request.headers.get("origin"), request.headers.get("host")
            ours = origin is None or origin.partition("://")[2] == host
            if not ours or not hmac.compare_digest(request.headers.get("x-key", "").encode(), key.encode()):
                reason = "refused: the key of the link is missing, or another site has asked"
                return JSONResponse({"error": reason}, 403, HEADERS)
            try:
                asked = checked(await body(request), ("annotator", *names))
                return JSONResponse(await run_in_threadpool(carried_out, asked), headers=HEADERS)
            except Refused as error:
                return JSONResponse({"error": str(error)}, 400, HEADERS)
            except OSError as error:
                return JSONResponse({"error": f"nothing could be written: {error.strerror}"}, 507, HEADERS)

        return Route(path, endpoint, methods=["POST"])

    asked = route("/next", lambda annotator: {}), route("/undo", ballots.undo, "number")
    voted = route("/vote", ballots.vote, "id", "again", "choice", "seconds", "why")
    return Starlette(routes=[Route("/", show_page), *asked, voted])


def state_of(ballots: Ballots, annotator: str, complete: bool) -> dict[str, Any]:
    """What the page shows to a person."""
    shown = ballots.next(annotator)
    found: dict[str, Any] = {"complete": complete, **ballots.progress(annotator), "pair": None}
    if shown:
        left, right = (shown.pair.a, shown.pair.b) if shown.left == "a" else (shown.pair.b, shown.pair.a)
        found["pair"] = {
            "id": shown.pair.id, "again": shown.again, "prompt": shown.pair.prompt, "left": left, "right": right
        }  # fmt: skip
    return found


async def body(request: Any) -> Any:
    """The JSON of a request. Raises Refused where it is too large or none."""
    from starlette.requests import ClientDisconnect

    content = b""
    try:
        async for part in request.stream():
            content += part
            if len(content) > LARGEST:
                raise Refused(f"the request is larger than {LARGEST} bytes")
        return json.loads(content)
    except ClientDisconnect:
        raise Refused("whoever asked has gone") from None
    except (ValueError, RecursionError):
        raise Refused("the request is no JSON") from None


KINDS = {
    "annotator": str, "id": str, "why": str, "choice": str, "again": bool, "seconds": int | float, "number": int
}  # fmt: skip


def checked(asked: Any, names: Sequence[str]) -> dict[str, Any]:
    """The named fields of a request, each of its kind and within its bounds. Raises Refused."""
    if not isinstance(asked, dict):
        raise Refused("the request is no object with named fields")
    for name in names:
        value, most = asked.get(name), LIMITS.get(name, 60)
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and name != "again"):
            raise Refused(f"{name}: is missing, or not of its kind")
        if isinstance(value, str) and len(value) > most:
            raise Refused(f"{name}: must be text of at most {most} characters")
        if name == "annotator" and any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value):
            raise Refused("annotator: must be text in a line, without control characters")
        if name == "choice" and value not in CHOICES:
            raise Refused(f"choice: must be one of {', '.join(CHOICES)}")
        if name == "seconds" and not 0 <= value < 1e9:
            raise Refused("seconds: must be a number of at least 0")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise Refused(f"{name}: holds half of a surrogate pair, which no text can") from None
    if not asked["annotator"].strip():
        raise Refused("annotator: must be a name")
    return {**asked, "annotator": asked["annotator"].strip()}


if __name__ == "__main__":
    flags.main(main, Config)
