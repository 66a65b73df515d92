"""The page in Chromium, by keyboard where a user would: ask about a picture, stop, fail, show a key, start anew."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from mllama_jax.train.pictures import held_out
from tests.served import Start, starting

CHROMIUM = Path(os.environ.get("MLLAMA_CHROMIUM", "/usr/bin/chromium"))
QUIET = (  # a browser that talks to nobody but the server, and needs no user of its own
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ASKED = "**/v1/chat/completions"
EXAMPLE = next(example for example in held_out("scenes", 100) if len(example.boxes) == 1 and " " in example.answer)

expect.set_options(timeout=60_000)  # the server compiles on the way


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def url(start: Start) -> str:
    return start("--slots", "2", "--context", "512", MLLAMA_API_KEYS="secret")[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM.exists(), f"{CHROMIUM} is not there; name another in MLLAMA_CHROMIUM"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page as a new visitor finds it, behind its key. Nothing may go wrong in its script."""
    page, mistakes = browser.new_page(), list[Error]()
    page.on("pageerror", lambda mistake: mistakes.append(mistake))
    page.goto(url)
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page).to_have_title("pictures-4m")
    yield page
    page.close()
    assert not mistakes


def ask(page: Page, text: str) -> None:
    page.get_by_label("Question").fill(text)
    page.keyboard.press("Enter")


def show(page: Page) -> None:
    """Choose the example's picture."""
    EXAMPLE.images[0].save(file := io.BytesIO(), "PNG")
    page.get_by_label("Picture").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()})
    expect(page.get_by_alt_text("picture to send: a.png")).to_be_visible()


def test_a_picture_is_asked_about_and_words_show_where_they_look(page: Page) -> None:
    show(page)
    ask(page, EXAMPLE.question)
    expect(page.locator("#rate")).to_have_text(re.compile(r"\d+ tokens"))
    items = page.get_by_role("listitem")
    expect(items.first.get_by_role("img")).to_be_visible()
    expect(items.last).to_have_text(EXAMPLE.answer)
    page.get_by_label("Where it looks").check()
    words = items.last.locator(".looked > span")
    expect(words).to_have_text(EXAMPLE.answer.split())
    words.first.focus()
    words.first.press("ArrowRight")
    expect(words.nth(1)).to_be_focused()
    expect(page.locator("canvas")).to_have_count(1)
    width, height, pixels = page.locator("canvas").evaluate(
        "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    red = Image.fromarray(np.array(pixels, np.uint8).reshape(height, width, 4)[..., 0]).resize(EXAMPLE.images[0].size)
    heat, (box,) = np.asarray(red, float), EXAMPLE.boxes
    assert heat[box.top : box.bottom, box.left : box.right].mean() > 3 * heat.mean()
    page.get_by_label("Where it looks").uncheck()
    expect(page.locator("canvas")).to_have_count(0)


def test_an_answer_that_streams_can_be_stopped(page: Page) -> None:
    event = 'data: {"choices": [{"delta": {"content": "Once upon"}}]}\\n\\n'
    page.evaluate(  # a server that goes on and on
        "event => { const real = fetch; fetch = (path, options) => new Promise((answer, fail) => {"
        " const endless = new ReadableStream({ start(c) { c.enqueue(new TextEncoder().encode(event));"
        " options.signal.addEventListener('abort', () => c.error(options.signal.reason)) } });"
        " fetch = real; answer(new Response(endless)) }) }",
        event.replace("\\n", "\n"),
    )
    ask(page, "Tell me a story.")
    expect(page.get_by_role("listitem").last).to_have_text("Once upon")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_label("Question")).to_be_focused()
    expect(page.get_by_role("listitem").last).to_have_text("Once upon")


def test_a_fault_is_told_and_the_question_is_there_again(page: Page) -> None:
    page.route(ASKED, lambda route: route.fulfill(status=429, body='{"error": {"message": "too many requests wait"}}'))
    show(page)
    ask(page, "What is it?")
    expect(page.get_by_role("alert")).to_have_text("Not answered: too many requests wait")
    expect(page.get_by_label("Question")).to_have_value("What is it?")
    expect(page.get_by_alt_text("picture to send: a.png")).to_be_visible()
    page.unroute(ASKED)
    page.get_by_label("Question").press("Enter")
    expect(page.locator(".assistant")).to_have_count(1)
    expect(page.locator("#rate")).to_have_text(re.compile(r"\d+ tokens"))


def test_an_answer_that_a_guard_finds_unsafe_is_taken_back(page: Page) -> None:
    choices = [
        {"delta": {"content": "Take a"}, "finish_reason": None},
        {"delta": {}, "finish_reason": "content_filter"},
    ]
    body = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices) + "data: [DONE]\n\n"
    page.route(ASKED, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "How?")
    expect(page.get_by_role("alert")).to_have_text("Not answered: the answer was judged unsafe")
    expect(page.locator(".assistant")).to_have_count(0)


def test_a_reload_forgets_the_conversation_but_not_the_key(page: Page) -> None:
    ask(page, "Hello")
    expect(page.locator("#rate")).to_have_text(re.compile(r"\d+ tokens"))
    page.reload()
    expect(page).to_have_title("pictures-4m")
    expect(page.get_by_role("listitem")).to_have_count(0)
    expect(page.get_by_label("API key")).to_be_hidden()
    page.evaluate("sessionStorage.setItem('key', 'wrong')")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("a valid key is needed")
    expect(page.get_by_label("API key")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        assert (np.asarray(picture.convert("L")).mean() > 128) == (scheme == "light")
