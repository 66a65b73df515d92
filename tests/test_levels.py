"""Memory that does not hold everything: what fits runs at once, what is large waits, what never fits is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.errors import InputError
from mllama_jax.generate import engine, levels, runner, warm
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.levels import Level, Need, choose, free_memory, levels_of, row_bytes
from mllama_jax.generate.requests import Request
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.processing.chat import Prompt
from mllama_jax.serve import service as serving
from mllama_jax.serve.service import Limits, Service
from mllama_jax.serve.throughput import listening
from tests.served import asked, post

Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def model(tiny_directory: Path) -> Mllama:
    return mllama_jax.load(tiny_directory, dtype="float32")


def shrink(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Chunks of so many tokens, and levels from four of them on."""
    for module, name, value in ((engine, "STEPS", 4), (levels, "CHUNK", chunk), (levels, "LEAST", 4 * chunk)):
        monkeypatch.setattr(module, name, value)


def test_what_fits_is_a_level(model: Mllama) -> None:
    """With as many rows as fit beside those that are read at once, which is at least one."""

    def fitting(memory: int | None) -> list[tuple[int, int, int, int]]:
        found = levels_of(model.model, rows=16, context=2048, pictures=(1, 4), memory=memory)
        return [(level.rows, level.positions, level.tiles, level.together) for level in found]

    def rows(n: int, *size: int) -> int:
        return n * row_bytes(model.model, *size)

    ample = [(16, 512, 4, 8), (16, 512, 16, 8), (16, 2048, 4, 8), (16, 2048, 16, 8)]
    assert fitting(None) == fitting(rows(24, 2048, 16)) == ample
    assert fitting(rows(19, 2048, 16))[-1] == (16, 2048, 16, 3)
    assert fitting(rows(7, 2048, 16))[-1] == (6, 2048, 16, 1)
    assert [size[1:3] for size in fitting(rows(2, 512, 16))] == [(512, 4), (512, 16)]
    with pytest.raises(InputError, match="a slot of 512 positions takes"):
        fitting(rows(1, 512, 4))


def test_a_row_takes_as_much_as_is_reckoned(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 32)
    served = Engine(model.model, model.params, slots=3, context=512, pictures=(1, 4))
    assert len(served.scheduler.levels) == 4
    for level in served.scheduler.levels:
        served.scheduler.begin_anew(level)
        held = sum(x.nbytes for x in jax.tree.leaves(served.runner.caches))
        assert held == 3 * row_bytes(model.model, level.positions, level.tiles)


def test_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, used: int):
            self.used = used

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 80 * 2**30, "bytes_in_use": self.used * 2**30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(20), Device(22)])
    assert free_memory() == pytest.approx((0.9 * 80 - 22) * 2**30, abs=2**20)
    assert warm.spare_memory() == pytest.approx(0.1 * 80 * 2**30, abs=2**20)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(79)])
    assert free_memory() == 0


def test_levels_change_no_more_than_they_must() -> None:
    small, long, wide, both = found = [
        Level(8, 512, 4, 8), Level(4, 2048, 4, 1), Level(6, 512, 16, 1), Level(2, 2048, 16, 1)
    ]  # fmt: skip

    def after(now: Level, *needs: tuple[int, int]) -> Level | None:
        return choose(found, now, [Need(*need) for need in needs])

    little, much, many = (10, 0), (1000, 4), (10, 8)
    assert after(small, *[little] * 8) is small
    assert after(small, *[little] * 9) is None
    assert after(small, little, much) is long
    assert after(long, *[little] * 4) is long
    assert after(long, *[little] * 5) is small
    assert after(long, little, many) is wide
    assert after(small, much, many) is both
    assert after(small, much, many, little) is None


def ask(model: Mllama, tokens: list[int], *images: Image.Image, new: int = 6) -> Request:
    answer = Answer(SamplingParams(max_new_tokens=new, stop_ids=()), (), None)
    return Request.of(model.config, Prompt(tokens, list(images)), answer)


def test_large_requests_wait_and_whoever_came_later_waits_behind_them(
    model: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is large, and whatever becomes large on the way, everyone gets what each gets alone."""
    shrink(monkeypatch, 16)
    memory = 2 * row_bytes(model.model, 256, 16)  # one row at the largest level
    served = Engine(model.model, model.params, slots=6, context=256, pictures=(1, 4), memory=memory)
    shown = [picture(i, 200, 200) for i in range(4)]  # of four tiles
    image = model.config.image_token
    requests = [
        ask(model, [512, image, *range(20)], shown[0], new=200),  # grows out of what all fit into
        *(ask(model, [512, 2, i], new=60) for i in range(6)),
        ask(model, [512, 3], new=30),
        ask(model, [512, *[4] * 150]),
        ask(model, [512, 5]),
        ask(model, [512, *[image] * 4, *[6] * 90], *shown),
        ask(model, [512, 7], new=70),
        ask(model, [512, image, 8], shown[2]),
        *(ask(model, [512, 9, i]) for i in range(6)),
    ]
    for each in requests:
        served.submit(each)
    came: list[Request] = []
    together, rows = 0, set()
    while served.busy:
        list(served.step())
        active = [slot for slot in sorted(served.scheduler.slots, key=lambda slot: slot.used) if slot.request]
        came += [slot.request for slot in active if slot.request and slot.request not in came]
        together = max(together, len(active))
        rows.add(len(served.scheduler.slots))
    assert came == requests
    assert together == 6
    assert {1, 6} <= rows
    assert served.scheduler._clock > len(requests)  # some had to give way and come again
    rows_of = [(each.prompt.tokens, each.prompt.images) for each in requests]
    alone = model.generate_tokens(*zip(*rows_of, strict=True), max_new_tokens=200, stop_ids=())
    for each, expected in zip(requests, alone, strict=True):
        assert each.answer.tokens == expected[: each.answer.params.max_new_tokens]


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How many programs were compiled so far, in all threads."""
    jax.config.update("jax_log_compiles", True)
    yield lambda: caplog.text.count("Finished XLA compilation")
    jax.config.update("jax_log_compiles", False)


@pytest.mark.parametrize(("spare", "at_once"), [(None, runner.PICTURES), (0, 1)])
def test_pictures_go_one_by_one_where_several_do_not_fit(
    model: Mllama, monkeypatch: pytest.MonkeyPatch, spare: int | None, at_once: int
) -> None:
    shrink(monkeypatch, 32)
    monkeypatch.setattr(warm, "spare_memory", lambda: spare)
    served = Engine(model.model, model.params, slots=1, context=32, pictures=(1, 1))
    for _ in warm.warm_up(served):
        pass
    assert served.runner.at_once == at_once


def test_a_server_holds_what_fits(
    model: Mllama, monkeypatch: pytest.MonkeyPatch, picture: Draw, compilations: Callable[[], int]
) -> None:
    """Of six slots six are used by short requests at once; of long ones there is one at a time, and those that are long
    and show much are refused. Nothing is compiled for all that."""
    shrink(monkeypatch, 32)
    monkeypatch.setattr(serving, "free_memory", lambda: 2 * row_bytes(model.model, 512, 14))
    service = Service(model, "it", slots=6, context=500, limits=Limits(pictures=4))
    fitting = [(level.rows, level.positions, level.tiles) for level in service.worker.engine.scheduler.levels]
    assert fitting == [(6, 128, 4), (3, 128, 16), (1, 512, 4)]
    asyncio.run(service.warm_up(lambda *_: None))
    assert (compiled := compilations()) > 10
    served, there, running = service.worker.engine, threading.Event(), []
    step = served.step

    def counted() -> Iterator[tuple[Request, str]]:
        there.wait(60)
        yield from step()
        running.append(sum(slot.request is not None for slot in served.scheduler.slots))

    monkeypatch.setattr(served, "step", counted)
    prompts = [[5 + i] * length for i, length in enumerate([3, 4, 5, 6, 7, 8, 200, 9, 300, 10, 11])]
    with listening(service) as port, ThreadPoolExecutor(16) as pool:
        url = f"http://127.0.0.1:{port}"

        def complete(prompt: list[int]) -> str:
            body = {"prompt": prompt, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
            status, told = post(url, "/v1/completions", body)
            assert status == 200
            return told["choices"][0]["text"]

        answers = []
        for prompt in prompts:  # in this order, and none is begun before all are there
            answers.append(pool.submit(complete, prompt))
            while service.worker.open < len(answers):
                assert not answers[-1].done()
                time.sleep(0.01)
        there.set()
        assert all(answer.result() for answer in answers)
        assert max(running) == 6
        assert compilations() == compiled
        params = SamplingParams(max_new_tokens=100, stop_ids=())
        alone = model.complete([Prompt(prompt, []) for prompt in prompts], [params] * len(prompts))
        assert [answer.result() for answer in answers] == [each.text for each in alone]

        content = [{"type": "image", "image": picture(i, 200, 200)} for i in range(4)]
        shown: Any = asked([{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}])
        status, told = post(url, "/v1/chat/completions", {"messages": shown, "max_tokens": 128})
        assert status == 400
        assert "exceed the 128 positions that fit into memory beside 16 tiles of pictures" in told["error"]["message"]
        assert post(url, "/v1/chat/completions", {"messages": shown, "max_tokens": 2})[0] == 200
        assert post(url, "/v1/chat/completions", {"messages": shown, "stop": ["e"]})[0] == 200
