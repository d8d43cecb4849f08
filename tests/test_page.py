"""The page in a real browser: by keyboard, after a reload, with two people, and with answers that mean harm."""

import os
import shutil
import time

import pytest
from files import jsonl
from serving import Server

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
SCRIPT = "<script>document.title = 'harm'</script><img src=x onerror=\"document.title = 'harm'\">"
WAIT = 0.45  # seconds: the page takes no answer from who cannot have read the pair

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed, in which the page could be opened")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """32 prompts with two answers each, the first of which are harmful; enough people judge each for all tests."""
    folder = tmp_path_factory.mktemp("page")
    texts = [(f"good {i}", f"bad {i}") for i in range(31)]
    rows = [{"prompt": f"prompt {i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(texts)]
    rows.insert(
        0, {"prompt": f"what is {SCRIPT}?", "chosen": f"{SCRIPT} " + "x" * 300, "rejected": "\u202eline\n\n\tnext"}
    )
    (folder / "answers.jsonl").write_bytes(jsonl(*rows))
    started = Server(folder / "people", "--data", str(folder / "answers.jsonl"), "--votes", "20")
    yield started
    started.kill()


@pytest.fixture
def visit(browser, server):
    """Opens the page for somebody who has never been there; nothing may go wrong in it."""
    contexts, errors = [], []
    expected = "Content Security Policy", "ERR_CONNECTION"  # what tests provoke

    def open_page(name: str = "", width: int = 1200, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        # what the policy forbids never becomes a request
        page.on("request", lambda request: errors.append(request.url) if server.link[:21] not in request.url else None)
        page.goto(server.link)
        if name:
            page.keyboard.type(name)
            page.keyboard.press("Enter")
            page.wait_for_selector("#ask:not([hidden])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [error for error in errors if not any(words in error for words in expected)] == []


def votes_of(server: Server, name: str) -> list[dict]:
    return [line for line in server.lines() if line["annotator"] == name]


def until(condition) -> None:
    """Wait: the page's own policy does not let the browser's driver do that in the page."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for ten seconds")


def press(page, server: Server, name: str, key: str) -> None:
    """A key, once the pair can have been read; returns when a line more is in the file."""
    before = len(votes_of(server, name))
    time.sleep(WAIT)
    page.keyboard.press(key)
    until(lambda: len(votes_of(server, name)) > before and not page.evaluate("busy"))


def shown(page) -> tuple[str, str, str]:
    return tuple(page.inner_text(f"#{part}") for part in ("prompt-text", "left", "right"))


def test_thirty_votes_by_keyboard_a_reload_and_an_undo(server, visit):
    page = visit("Ada Lovelace")
    assert page.inner_text("#count") == "0 done, 32 to go"
    for i in range(30):
        _, left, right = shown(page)
        key = "120bs"[i % 5]
        press(page, server, "Ada Lovelace", key)
        line = votes_of(server, "Ada Lovelace")[-1]
        other = "ba"["ab".index(line["shown_left"])]
        assert line["winner"] == {"1": line["shown_left"], "2": other, "0": "tie", "b": "bad", "s": "skip"}[key]
        if SCRIPT not in left + right and "line" not in left + right:
            assert (line[line["shown_left"]], line[other]) == (left, right)
        assert 0.4 < line["seconds"] < 60 and page.inner_text("#status").startswith("Saved: ")
    assert page.inner_text("#count").startswith("30 done")
    before = shown(page)
    page.reload()
    page.wait_for_selector("#ask:not([hidden])")
    assert shown(page) == before and page.inner_text("#count").startswith("30 done")
    last = votes_of(server, "Ada Lovelace")[-1]
    press(page, server, "Ada Lovelace", "u")
    assert votes_of(server, "Ada Lovelace")[-1] == last | {
        "winner": "undo", "seconds": 0.0, "time": votes_of(server, "Ada Lovelace")[-1]["time"]
    }  # fmt: skip
    assert page.inner_text("#count").startswith("29 done") and page.inner_text("#prompt-text") == last["prompt"]
    press(page, server, "Ada Lovelace", "1")
    while page.inner_text("#status") != "That was all of it. Thank you!":
        press(page, server, "Ada Lovelace", "2")
    assert page.is_hidden("#answers") and page.is_visible("#undo")


def test_keys_that_say_nothing(server, visit):
    """A key that is held, the second half of a double click, a shortcut of the browser's, what is typed as a reason."""
    page = visit("Bob")
    time.sleep(WAIT)
    page.keyboard.down("1")
    page.keyboard.down("1")  # repeats
    page.keyboard.down("1")
    page.keyboard.up("1")
    until(lambda: page.evaluate("state.said === 1"))
    page.keyboard.press("1")
    time.sleep(WAIT)
    page.keyboard.press("Control+b")
    page.keyboard.press("x")
    page.keyboard.press("w")
    page.keyboard.type("bus 102: u")
    assert len(votes_of(server, "Bob")) == 1
    page.keyboard.press("Escape")
    press(page, server, "Bob", "2")
    assert votes_of(server, "Bob")[-1]["why"] == "bus 102: u" and page.input_value("#why") == ""
    time.sleep(WAIT)
    page.dblclick("[data-choice=tie]", delay=20)
    time.sleep(WAIT)
    assert [line["winner"] for line in votes_of(server, "Bob")][2:] == ["tie"]


def test_two_people_at_once_each_judge_every_pair(server, visit):
    names = ("Cleo", "Dan")
    pages = {name: visit(name) for name in names}
    assert len({shown(page)[0] for page in pages.values()}) == 1  # each from the first pair on
    for _ in range(3):
        for name, page in pages.items():
            press(page, server, name, "1")
    said = {name: [line["id"] for line in votes_of(server, name)] for name in names}
    assert all(len(set(ids)) == 3 for ids in said.values())
    assert all(line["winner"] == line["shown_left"] for name in names for line in votes_of(server, name))


def test_a_harmful_answer_is_text(server, visit):
    page = visit("Mallory")
    while SCRIPT not in page.inner_text("#prompt-text"):
        press(page, server, "Mallory", "s")
    assert page.title() == "Which answer is better?" and page.query_selector("img") is None
    prompt, left, right = shown(page)
    assert prompt == f"what is {SCRIPT}?" and any(text == f"{SCRIPT} " + "x" * 300 for text in (left, right))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    time.sleep(WAIT)
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => document.title = 'blocked')")  # what harm would want to do
    until(lambda: page.evaluate("document.title === 'blocked'"))


def test_for_a_phone_and_for_who_does_not_see(visit):
    for scheme, width in (("light", 390), ("dark", 390), ("light", 1200), ("dark", 1200)):
        page = visit(f"Eve {scheme} {width}", width, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        boxes = [page.locator(f"[data-choice={side}]").bounding_box() for side in ("left", "right")]
        assert all(box["height"] >= 44 for box in boxes)
        assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1200)
        if folder := os.environ.get("NANOPREF_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/page-{scheme}-{width}.png", full_page=True)
    names = {
        button.inner_text(): button.get_attribute("aria-keyshortcuts") for button in page.query_selector_all("button")
    }
    assert {"1", "2", "0", "b", "s", "u"} <= {*names.values()}
    for role, name in (("button", "Answer 1 is better"), ("button", "Equally good"), ("article", "Answer 2"),
                       ("region", "Prompt"), ("progressbar", "How far you are")):  # fmt: skip
        assert page.get_by_role(role, name=name).count() == 1, name
    assert page.evaluate("document.activeElement.id") == "prompt"  # where a screen reader goes on to read
    assert page.get_attribute("#status", "aria-live") == "polite"
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.choice || document.activeElement.id"))
    assert {"left", "right", "tie", "bad", "skip", "why", "again"} <= reached


def test_a_server_that_is_away_is_asked_again(server, visit):
    page = visit("Fay")
    time.sleep(WAIT)
    server.kill()
    page.keyboard.press("2")
    page.wait_for_selector("#status.wrong")
    assert "nothing is lost" in page.inner_text("#status")
    server.start()
    until(lambda: page.evaluate("state.said === 1"))
    assert len(votes_of(server, "Fay")) == 1 and page.inner_text("#status") == "Saved: answer 2."
