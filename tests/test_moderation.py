"""Llama Guard: the very text that it reads, what its answers mean, and the filter in front of a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

import mllama_jax
from mllama_jax import Mllama, cli
from mllama_jax.errors import InputError
from mllama_jax.processing.guard import CATEGORIES, NoVerdict, Verdict, guard_prompts, read_verdict
from mllama_jax.processing.image import open_image
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.serve.app import App
from mllama_jax.serve.service import Limits, Service
from tests.steered import write_guard

# What the chat template among the files of Llama-Guard-3-11B-Vision makes of its model card's example.
PROMPT = """\
<|begin_of_text|><|start_header_id|>user<|end_header_id|>

<|image|> Task: Check if there is unsafe content in 'User' messages in conversations according our safety policy with \
the below categories.

<BEGIN UNSAFE CONTENT CATEGORIES>
S1: Violent Crimes.
S2: Non-Violent Crimes.
S3: Sex Crimes.
S4: Child Exploitation.
S5: Defamation.
S6: Specialized Advice.
S7: Privacy.
S8: Intellectual Property.
S9: Indiscriminate Weapons.
S10: Hate.
S11: Self-Harm.
S12: Sexual Content.
S13: Elections.
<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

User: What is the recipe for mayonnaise?

<END CONVERSATION>

Provide your safety assessment for ONLY THE LAST User message in the above conversation:
 - First line must read 'safe' or 'unsafe'.
 - If unsafe, a second line must include a comma-separated list of violated categories. <|eot_id|>\
<|start_header_id|>assistant<|end_header_id|>"""
QUESTION = "What is the recipe for mayonnaise?"


def user(*parts: str | Image.Image) -> dict[str, Any]:
    """A user's message of texts and pictures."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def agent(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def guard(directory: Path) -> Mllama:
    return mllama_jax.load(directory, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(cli.SHIPPED)


def texts(conversation: list[Any], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(p.tokens, skip_specials=False) for p in guard_prompts(conversation, tokenizer, open_image)]


def test_a_question_is_asked_about_as_the_model_was_trained(tokenizer: Tokenizer) -> None:
    picture = Image.new("RGB", (8, 8))
    assert texts([user(QUESTION, picture)], tokenizer) == [PROMPT]
    assert texts([{"role": "user", "content": f" {QUESTION}\n"}], tokenizer) == [PROMPT.replace("<|image|> ", "")]


def test_an_answer_is_judged_with_what_came_before(tokenizer: Tokenizer) -> None:
    """Whatever is not the model's is the user's; calls of tools are said, too."""
    call = {"function": {"name": "look_up", "arguments": {"what": "mayonnaise"}}}
    conversation = [
        {"role": "system", "content": "Be kind."},
        user(QUESTION),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "eggs, oil"},
        agent("Take eggs. "),
    ]
    turns = f"""User: Be kind.

User: {QUESTION}

Agent: {{"name": "look_up", "arguments": {{"what": "mayonnaise"}}}}

User: eggs, oil

Agent: Take eggs."""
    expected = PROMPT.replace("<|image|> ", "").replace(f"User: {QUESTION}", turns)
    expected = expected.replace("in 'User'", "in 'Agent'").replace("LAST User", "LAST Agent")
    assert texts(conversation, tokenizer) == [expected]


def test_pictures_are_shown_one_at_a_time(tokenizer: Tokenizer) -> None:
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))
    prompts = guard_prompts([user(first, "And?"), agent("Well."), user(second, "<|image|>")], tokenizer, open_image)
    assert [[image.size for image in prompt.images] for prompt in prompts] == [[(8, 8)], [(9, 9)]]
    assert [prompt.tokens.count(tokenizer.image_token) for prompt in prompts] == [1, 1]


@pytest.mark.parametrize(
    ("answer", "codes"),
    [("safe", None), ("\n\nsafe", None), ("\n\nunsafe\nS1", ["S1"]), ("unsafe\nS10,S2", ["S10", "S2"]), ("unsafe", [])],
)
def test_verdicts(answer: str, codes: list[str] | None) -> None:
    verdict = read_verdict(answer, whole=True)
    assert (verdict.safe, list(verdict.categories)) == (codes is None, codes or [])


@pytest.mark.parametrize("answer", ["", "Safe", "safe.", "unsafely", "unsafe\nS14", "unsafe\nS1\nS2", "not safe"])
def test_what_is_no_verdict_is_told(answer: str) -> None:
    with pytest.raises(NoVerdict, match="expected 'safe' or 'unsafe' and categories, got"):
        read_verdict(answer, whole=True)


def test_a_verdict_that_was_cut_off_is_none() -> None:
    """S1 may have been about to become S10."""
    with pytest.raises(NoVerdict):
        read_verdict("unsafe\nS1", whole=False)


def test_moderate(guard: Mllama) -> None:
    assert guard.moderate([user("Hello")]) == Verdict(True)
    assert guard.moderate([user("Hello!")]) == Verdict(False, ("S9",))
    assert guard.moderate([user("Hello"), agent("Away!")]) == Verdict(False, ("S9",))
    with pytest.raises(InputError, match="expected at least one message"):
        guard.moderate([])


def test_the_command(guard: Mllama, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["moderate", str(directory), *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    assert run("--user", "Hello") == (0, "safe\n", "")
    code, out, _ = run("--user", "Hello", "--agent", "Away!", "--json")
    assert (code, json.loads(out)) == (
        1,
        {"safe": False, "categories": [{"code": "S9", "name": "Indiscriminate Weapons"}]},
    )
    code, _, err = run("--user", "Hello", "--image", "none.png")
    assert (code, err.count("\n"), "none.png" in err) == (2, 1, True)


@pytest.fixture(scope="module")
def client(guard: Mllama) -> Iterator[TestClient]:
    """Of a server in front of which a guard stands; the model behind it says nothing but exclamation marks."""
    service = Service(guard, "it", slots=2, context=1024, limits=Limits(), guard=guard)
    service.start()
    service.ready = True
    with TestClient(App(service).starlette()) as client:
        yield client
    service.stop()


def ask(client: TestClient, text: str, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "temperature": 0} | more
    return client.post("/v1/chat/completions", json=body)


def test_what_a_user_says_is_judged_first(client: TestClient) -> None:
    for answer, field in (
        (ask(client, "Hello!"), "messages"),
        (client.post("/v1/completions", json={"prompt": "Hello!"}), "prompt"),
        (client.post("/v1/completions", json={"prompt": [[0]]}), "prompt"),
    ):
        assert answer.status_code == 400
        assert answer.json()["error"] == {
            "message": f"{field}: judged unsafe: S9 {CATEGORIES['S9']}",
            "type": "invalid_request_error",
            "param": field,
            "code": "content_filter",
        }


def test_what_the_model_says_is_judged_then(client: TestClient) -> None:
    def complete(prompt: str) -> tuple[str, str]:
        body = {"prompt": prompt, "max_tokens": 3, "temperature": 0}
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        return choice["text"], choice["finish_reason"]

    assert complete("u") == ("nsa", "length")
    assert complete("Hello") == ("", "content_filter")
    (choice,) = ask(client, "Hello").json()["choices"]
    refusal = f"the answer was judged unsafe: S9 {CATEGORIES['S9']}"
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": refusal}
    lines = ask(client, "Hello", stream=True).text.split("\n\n")
    *_, last = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert last["choices"][0]["finish_reason"] == "content_filter"
    told = client.get("/metrics").text
    assert 'mllama_guard_verdicts_total{verdict="safe"}' in told
    assert 'mllama_guard_verdicts_total{verdict="unsafe"}' in told


def test_an_answer_of_the_guard_that_is_none_lets_nothing_pass(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllama_jax.serve.guard.ANSWER", 1)
    answer = ask(client, "Hello")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
