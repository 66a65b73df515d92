"""The engine: whatever comes, goes and fails beside it, a request gets what it gets alone."""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mllama_jax import Mllama, SamplingParams
from mllama_jax.errors import InputError
from mllama_jax.generate import decode, engine, levels, requests, runner, scheduler, slots
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.requests import Request
from mllama_jax.model.mllama import MllamaModel
from mllama_jax.processing.chat import Prompt, load_template
from mllama_jax.processing.image import open_image
from mllama_jax.serve.hosts import Connection, FollowedEngine, Follower, Leader, Order, obey
from mllama_jax.train.pictures import recipe
from tests.conftest import SMALL

Draw = Callable[..., Image.Image]
IMAGE = 768
SCHEDULES = 60


@dataclasses.dataclass(frozen=True)
class Case:
    prompt: Prompt
    params: SamplingParams
    alone: Answer  # what it gets alone


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Mllama:
    """Few layers, so that thousands of steps are quick."""
    assert SMALL.vision is not None
    config = dataclasses.replace(
        SMALL,
        text=dataclasses.replace(SMALL.text, layers=3, cross_layers=(1,)),
        vision=dataclasses.replace(SMALL.vision, layers=1, taps=(0,)),
    )
    params = jax.jit(lambda key: recipe.start(key, config))(jax.random.key(0))
    directory = tmp_path_factory.mktemp("tiny")
    return Mllama(MllamaModel(config), params, None, load_template(directory), directory)


@pytest.fixture(scope="module")
def cases(tiny: Mllama) -> list[Case]:
    """Prompts of 2 to 90 tokens that share beginnings and pictures, some drawn at random, some with penalties."""
    draw, rng = random.Random(0), np.random.default_rng(0)
    sizes = ((60, 90), (56, 56), (200, 40))
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    beginnings = [[512], [512, *range(30)], [512, IMAGE, *range(40, 60)], [512, *range(30), IMAGE, IMAGE, 5]]
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"repetition_penalty": 1.3, "logit_bias": {7: 3.0}, "logprobs": 3},
    ]
    prompts, params = [], []
    for i in range(24):
        tokens = [*draw.choice(beginnings), *(draw.randrange(500) for _ in range(draw.randint(1, 50)))]
        images = [pictures[i % 2], *draw.choices(pictures, k=2)][: tokens.count(IMAGE)]
        prompts.append(Prompt(tokens, images))
        chosen = options[max(0, i % 6 - 3)]
        params.append(SamplingParams(max_new_tokens=draw.randint(1, 14), stop_ids=(), seed=i, **chosen))
    answers = tiny._answers(prompts, params)
    return [Case(*each) for each in zip(prompts, params, answers, strict=True)]


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short blocks and chunks, so that much happens between them."""
    for module, name, value in (
        (engine, "STEPS", 4),
        (engine, "CHUNKS", 2),
        (scheduler, "WORTH_A_COPY", 8),
        (levels, "CHUNK", 16),
        (levels, "LEAST", 64),
    ):
        monkeypatch.setattr(module, name, value)


def request(model: Mllama, case: Case) -> Request:
    return Request.of(model.config, case.prompt, Answer(case.params, (), None))


def check(case: Case, answer: Answer) -> None:
    assert answer.tokens == case.alone.tokens
    np.testing.assert_allclose(answer.logprobs, case.alone.logprobs, atol=1e-5)
    for found, expected in zip(answer.top_logprobs, case.alone.top_logprobs, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


class Fault(Exception):
    """What befalls a program of the engine."""


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Every program fails now and then, before or after it has taken the caches."""
    draw = random.Random(0)

    def fails(program: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            moment = draw.random()
            if moment < 0.01:
                raise Fault
            result = program(*args, **options)
            if moment < 0.02:
                raise Fault
            return result

        return run

    for module, names in (
        (decode, ("decode", "on_host")),
        (slots, ("encode", "read", "follow", "copy_row", "take_tiles", "put_tiles", "moved")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, fails(getattr(module, name)))
    return draw


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("memory", [None, "for one at the largest level"])
def test_every_schedule_gives_what_each_gets_alone(
    tiny: Mllama, cases: list[Case], faulty: random.Random, memory: str | None
) -> None:
    """Random arrivals, cancellations and failing programs; slots keep what earlier schedules left."""
    room = 2 * levels.row_bytes(tiny.model, 256, 16) if memory else None
    served = Engine(tiny.model, tiny.params, slots=3, context=256, memory=room)
    prepared = [request(tiny, case) for case in cases]
    finished = cancelled = failed = 0
    for schedule in range(SCHEDULES):
        faulty.seed(schedule)
        draw = random.Random(schedule)
        coming = [(draw.randrange(6), draw.randrange(len(cases))) for _ in range(draw.randint(1, 7))]
        leaving = {i: draw.randrange(1, 8) for i in range(len(coming)) if draw.random() < 0.2}
        live: dict[int, tuple[Case, Request]] = {}
        for clock in range(1000):
            for i, (when, number) in enumerate(coming):
                if when == clock:
                    own = dataclasses.replace(prepared[number], answer=Answer(cases[number].params, (), None))
                    live[i] = cases[number], own
                    served.submit(own)
                if i in live and leaving.get(i) == clock and not live[i][1].answer.finish_reason:
                    case, own = live.pop(i)
                    served.cancel(own)
                    assert own.answer.tokens == case.alone.tokens[: len(own.answer.tokens)]
                    cancelled += 1
            try:
                for _ in served.step():
                    pass
            except Fault:
                failed += 1
            if clock > 6 and not served.busy:
                break
        for case, own in live.values():
            check(case, own.answer)
            finished += 1
    assert not any(slot.request for slot in served.scheduler.slots)
    assert min(finished / 2, cancelled, failed) > SCHEDULES / 30


def never(schema: Any) -> Any:
    raise NotImplementedError


class Heard(Connection):
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.message = b""

    def send(self, message: bytes) -> None:
        self.message = message


@pytest.mark.usefixtures("brisk")
def test_a_follower_runs_the_same_programs(
    tiny: Mllama, cases: list[Case], faulty: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that is told of all that comes, goes and fails; devices of several need nothing else."""
    ran: list[Any] = []

    def noting(name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            own = [x for x in args if x is not tiny.model and x is not tiny.params]
            leaves = [x for x in jax.tree.leaves((own, options)) if np.size(x) < 2000 or name == "encode"]
            ran.append((name, [np.asarray(x).tobytes() for x in leaves]))
            return program(*args, **options)

        return run

    for module, names in (
        (decode, ("decode",)),
        (slots, ("encode", "read", "follow", "copy_row", "take_tiles", "put_tiles", "moved")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, noting(name, getattr(module, name)))

    def step(engine: Engine) -> int:
        try:
            for _ in engine.step():
                pass
        except Fault:
            return 1
        return 0

    heard, draw, live, failed = Heard(), random.Random(0), [], 0
    engines = [Engine(tiny.model, tiny.params, slots=3, context=256) for _ in range(2)]
    leader, follower = Leader([heard]), Follower([FollowedEngine(engines[1], None, never)], never)
    for seed in range(200):
        orders: list[Order] = []
        if draw.random() < 0.3:
            live.append(request(tiny, draw.choice(cases)))
            orders.append(("submit", live[-1]))
        if live and draw.random() < 0.1:
            orders.append(("cancel", live.pop(draw.randrange(len(live)))))
        leader.tell_step(0, orders, failed)
        faulty.seed(seed)
        obey(engines[0], orders)
        failed += step(engines[0])
        ran, led = [], ran
        faulty.seed(seed)
        follower.follow(heard.message)
        assert ran == led
        ran = []
    assert failed > 3


def serve(engine: Engine, *asked: Request) -> None:
    for each in asked:
        engine.submit(each)
    while engine.busy:
        for _ in engine.step():
            pass


def serve_once(engine: Engine, *asked: Request) -> None:
    for each in asked:
        engine.submit(each)
    for _ in engine.step():
        pass


def ask(tiny: Mllama, tokens: list[int], *images: Image.Image, new: int = 6) -> Request:
    answer = Answer(SamplingParams(max_new_tokens=new, stop_ids=()), (), None)
    return Request.of(tiny.config, Prompt(tokens, list(images)), answer)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the vision tower was given."""
    found, encode = [], slots.encode

    def counting(model: Any, params: Any, pixels: Any, ratio_ids: Any) -> Any:
        found.append(len(pixels))
        return encode(model, params, pixels, ratio_ids)

    monkeypatch.setattr(slots, "encode", counting)
    return found


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The slot and the number of real tokens of each chunk that was read, some of them twice to fill a program."""
    found, read = [], slots.read

    def counting(*args: Any, **options: Any) -> Any:
        found.extend(zip(args[4].tolist(), (args[7] + 1).tolist(), strict=True))
        return read(*args, **options)

    monkeypatch.setattr(slots, "read", counting)
    return found


def test_a_picture_is_encoded_once_for_all_who_show_it(tiny: Mllama, picture: Draw, encoded: list[int]) -> None:
    served = Engine(tiny.model, tiny.params, slots=3, context=256)
    serve(served, *(ask(tiny, [512, i, IMAGE, 7], picture(1)) for i in range(5)))
    serve(served, ask(tiny, [512, 90, IMAGE, 7], picture(1)), ask(tiny, [512, IMAGE, 91], picture(2)))
    assert encoded == [1, 1]


def test_a_picture_that_a_request_shows_twice_is_taken_once(
    tiny: Mllama, picture: Draw, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Engine(tiny.model, tiny.params, slots=2, context=256, pictures=(3, 3))
    serve(served, ask(tiny, [512, IMAGE, 7], picture(1)))
    taken, take = [], slots.take_tiles
    monkeypatch.setattr(slots, "take_tiles", lambda *args: taken.append(1) or take(*args))
    serve(served, ask(tiny, [9, IMAGE, IMAGE, 1, IMAGE], *[picture(1)] * 3))
    assert (encoded, taken) == ([1], [1])


def test_a_picture_is_kept_once_for_all_who_show_it(tiny: Mllama, picture: Draw) -> None:
    first = ask(tiny, [512, IMAGE, 1], picture(1))
    assert ask(tiny, [512, IMAGE, 2], picture(1)).pictures[0] is first.pictures[0]
    assert ask(tiny, [512, IMAGE, 2], picture(2)).pictures[0] is not first.pictures[0]


def test_a_file_that_a_slot_holds_is_not_prepared_again(
    tiny: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, served = [], Engine(tiny.model, tiny.params, slots=1, context=256)
    picture(1).save(file := io.BytesIO(), "PNG")
    monkeypatch.setattr(requests, "open_image", lambda file: opened.append(file) or open_image(file))
    pictures = requests.Pictures(tiny.config.vision)

    def show(token: int) -> None:
        answer = Answer(SamplingParams(max_new_tokens=2, stop_ids=()), (), None)
        serve(served, Request.of(tiny.config, Prompt([512, IMAGE, token], [pictures.of(file.getvalue())]), answer))

    show(1)
    show(2)
    assert len(opened) == 1
    serve(served, ask(tiny, [512, 3]))  # takes the slot
    show(4)
    assert len(opened) == 2


def test_a_file_is_prepared_once_for_all_who_show_it_at_once(
    tiny: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, files = [], []
    for seed in (1, 2):
        picture(seed).save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    monkeypatch.setattr(requests, "open_image", lambda file: opened.append(file) or open_image(file))
    pictures = requests.Pictures(tiny.config.vision)
    with ThreadPoolExecutor(8) as threads:
        prepared = list(threads.map(pictures.of, files * 16))
    assert sorted(opened) == sorted(files)
    assert {each.digest for each in prepared[::2]} == {prepared[0].digest} != {prepared[1].digest}
    del prepared
    with pytest.raises(InputError, match="expected a picture"):
        pictures.of(b"none")
    pictures.of(files[0])
    assert len(opened) == 4  # for nobody held it any more


def test_who_comes_while_a_picture_is_encoded_is_read_with_it(
    tiny: Mllama, picture: Draw, encoded: list[int], chunks: list[tuple[int, int]]
) -> None:
    served = Engine(tiny.model, tiny.params, slots=4, context=256, pictures=(1, 1))
    serve(served, ask(tiny, [512]))  # begins
    serve_once(served, ask(tiny, [512, IMAGE, 1], picture(1)))
    serve_once(served, ask(tiny, [512, IMAGE, 2], picture(1)), ask(tiny, [512, IMAGE, 3], picture(2)))
    chunks.clear()
    serve_once(served)
    assert encoded == [1, 1]
    assert len({slot for slot, _ in chunks}) == 3


def test_who_comes_while_eight_are_read_is_read_with_those_who_were_left(
    tiny: Mllama, chunks: list[tuple[int, int]]
) -> None:
    served = Engine(tiny.model, tiny.params, slots=16, context=256, pictures=(0, 0))
    serve(served, ask(tiny, [512]))  # begins
    chunks.clear()
    serve_once(served, *(ask(tiny, [512, i], new=9) for i in range(10)))
    assert len({slot for slot, _ in chunks}) == 8
    serve_once(served, *(ask(tiny, [512, i], new=9) for i in range(20, 26)))  # the eight decode
    assert len(chunks) == 8
    serve_once(served)
    assert len(chunks) == 16
    assert len({slot for slot, _ in chunks}) == 16


def test_who_comes_for_the_same_picture_leaves_time_for_more(
    tiny: Mllama, picture: Draw, encoded: list[int], chunks: list[tuple[int, int]]
) -> None:
    served = Engine(tiny.model, tiny.params, slots=4, context=256, pictures=(1, 1))
    serve(served, ask(tiny, [512]))  # begins
    chunks.clear()
    for i in range(3):
        serve_once(served, ask(tiny, [512, IMAGE, i], picture(1)))
        assert not chunks
    serve_once(served)
    assert encoded == [1]
    assert len({slot for slot, _ in chunks}) == 3


def test_time_is_left_for_more_only_while_the_newest_picture_is_encoded(
    tiny: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Engine(tiny.model, tiny.params, slots=4, context=256, pictures=(1, 1))
    serve(served, ask(tiny, [512]))  # begins
    ready, asked = iter([False, False, True]), []

    class Piece:
        def __init__(self, picture: requests.Picture):
            self.digest = picture.digest

        def is_ready(self) -> bool:
            asked.append(self.digest)
            return next(ready)

    monkeypatch.setattr(served.runner, "encode", lambda pictures: map(Piece, pictures))
    shown = [ask(tiny, [512, IMAGE, i], picture(i)) for i in range(3)]
    serve_once(served, *shown)
    assert asked == [shown[-1].pictures[0].digest] * 3
    monkeypatch.setattr(scheduler, "LINGER", 1e-9)
    ready = itertools.repeat(False)
    serve_once(served, last := ask(tiny, [512, IMAGE, 4], picture(4)))
    assert asked[3:] == [last.pictures[0].digest]
    assert served.scheduler.waiting == deque([*shown, last])


@pytest.mark.usefixtures("brisk")
def test_many_pictures_let_the_others_go_on(
    tiny: Mllama, picture: Draw, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than PICTURES are encoded for one reading, behind a block of the others once the caches have room."""
    for module in scheduler, runner:
        monkeypatch.setattr(module, "PICTURES", 2)
    served = Engine(tiny.model, tiny.params, slots=6, context=256)
    first = ask(tiny, [512, 1, 2], new=40)
    serve_once(served, first)
    for i in range(5):
        served.submit(ask(tiny, [512, IMAGE, i], picture(i)))
    counts = []
    while served.scheduler.waiting:
        before = sum(encoded), len(first.answer.tokens)
        serve_once(served)
        counts.append((sum(encoded) - before[0], len(first.answer.tokens) - before[1]))
    first = [(0, engine.HURRY), (2, 0)]
    assert counts == [*first, (2, engine.HURRY), (0, 0), (1, engine.HURRY), (0, 0)]
    assert encoded == [2, 2, 1]


@pytest.mark.usefixtures("brisk")
def test_a_picture_that_cannot_be_encoded_costs_the_others_no_block(
    tiny: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is encoded behind a block, which is still told when that has failed, and not made again."""
    alone, first = (ask(tiny, [512, 1, 2], new=20) for _ in range(2))
    serve(Engine(tiny.model, tiny.params, slots=1, context=256), alone)
    served = Engine(tiny.model, tiny.params, slots=2, context=256)
    serve(served, ask(tiny, [512, IMAGE, 3], picture(1)))  # the caches have room for pictures
    serve_once(served, first)
    begun, run, encode = [], decode.decode, slots.encode

    def failing(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(decode, "decode", lambda *args, **more: begun.append(1) or run(*args, **more))
    monkeypatch.setattr(slots, "encode", failing)
    shown = ask(tiny, [512, IMAGE, 4], picture(2))
    with pytest.raises(RuntimeError, match="broken"):
        serve_once(served, shown)
    monkeypatch.setattr(slots, "encode", encode)
    serve_once(served)
    assert (len(begun), len(first.answer.tokens)) == (1, 1 + engine.HURRY)
    while served.busy:
        serve_once(served)
    assert first.answer.tokens == alone.answer.tokens
    assert len(shown.answer.tokens) == 6


@pytest.mark.usefixtures("brisk")
def test_the_next_block_is_under_way_when_one_comes(tiny: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several GPUs a dispatch lasts as long as a block: nobody waits for that, but where someone could be read."""
    served = Engine(tiny.model, tiny.params, slots=2, context=256)
    serve_once(served, first := ask(tiny, [512, 1], new=40))  # read
    happened, came, run, fetch = [], threading.Semaphore(1), decode.decode, decode.on_host

    def running(*args: Any, steps: int, **options: Any) -> Any:
        assert came.acquire(timeout=60)  # but for the first, not before the block that it goes on from
        happened.append(steps)
        return run(*args, steps=steps, **options)

    def fetching(tree: Any) -> Any:
        happened.append("fetched")
        came.release()
        return fetch(tree)

    monkeypatch.setattr(decode, "decode", running)
    monkeypatch.setattr(decode, "on_host", fetching)
    serve_once(served)
    serve_once(served)
    assert happened == [engine.STEPS, "fetched", engine.STEPS, "fetched", engine.STEPS]
    assert len(first.answer.tokens) == 1 + 2 * engine.STEPS
    happened.clear()
    serve_once(served, ask(tiny, [512, 2]))
    assert happened == ["fetched"]
    serve_once(served)  # read
    assert happened == ["fetched", "fetched"]


def test_a_beginning_that_a_slot_has_read_is_not_read_again(tiny: Mllama, chunks: list[tuple[int, int]]) -> None:
    served = Engine(tiny.model, tiny.params, slots=2, context=256)
    beginning = [512, *range(100)]
    first, beside = ask(tiny, [*beginning, 5, 6], new=40), ask(tiny, [*beginning, 7, 8, 9])
    served.submit(first)
    next(served.step())  # the first is read and still being answered
    serve(served, beside)
    serve(served, ask(tiny, [*beginning, 5, 6, *first.answer.tokens, 11]))
    assert [read for _, read in chunks] == [103, 3, 2]
    assert [row for row, _ in chunks] == [0, 1, 0]


@pytest.mark.usefixtures("brisk")
def test_a_long_prompt_lets_the_others_go_on(tiny: Mllama) -> None:
    """Between two blocks of the others no more than CHUNKS chunks are read, and these blocks are short."""
    served = Engine(tiny.model, tiny.params, slots=2, context=256)
    short, long = ask(tiny, [512, 1, 2], new=40), ask(tiny, [512, *range(160)])
    served.submit(short)
    list(served.step())
    served.submit(long)
    made = []
    while not long.answer.tokens:
        before = len(short.answer.tokens)
        list(served.step())
        made.append(len(short.answer.tokens) - before)
    reads = -(-161 // (levels.CHUNK * engine.CHUNKS))
    assert made == [engine.HURRY, 0] * reads


@pytest.mark.usefixtures("brisk")
def test_first_come_first_served(tiny: Mllama) -> None:
    served = Engine(tiny.model, tiny.params, slots=2, context=256)
    asked = [ask(tiny, [512, i], new=3) for i in range(6)]
    for each in asked:
        served.submit(each)
    ended: list[Request] = []
    while served.busy:
        ended += [each for each, _ in served.step() if each.answer.finish_reason]
    assert ended == asked


@pytest.mark.usefixtures("brisk")
def test_memory_follows_use(tiny: Mllama, picture: Draw) -> None:
    served = Engine(tiny.model, tiny.params, slots=2, context=256)

    def held() -> int:
        return sum(x.nbytes for x in jax.tree.leaves(served.runner.caches))

    serve(served, ask(tiny, [512, 1]))
    text = held()
    serve(served, ask(tiny, [512, IMAGE, 1], picture(1)))
    one = held()
    serve(served, ask(tiny, [512, *range(100)]))
    assert text < one < held()
    serve(served, *(ask(tiny, [512, IMAGE, i], picture(i)) for i in range(9)))
    before = held()
    serve(served, *(ask(tiny, [512, IMAGE, i], picture(i)) for i in range(9, 20)))
    assert held() == before


def test_a_cancelled_request_leaves_its_slot_at_once(tiny: Mllama) -> None:
    served = Engine(tiny.model, tiny.params, slots=1, context=256)
    first, second, third = (ask(tiny, [512, i], new=100) for i in range(3))
    for each in (first, second, third):
        served.submit(each)
    list(served.step())
    served.cancel(first)
    served.cancel(second)
    list(served.step())
    assert third.answer.tokens
    assert not second.answer.tokens


def test_what_fits_no_slot_is_refused(tiny: Mllama) -> None:
    served = Engine(tiny.model, tiny.params, slots=1, context=64)
    with pytest.raises(InputError, match="60 prompt tokens and 6 new ones exceed the 64 positions of a slot"):
        served.submit(ask(tiny, [512] * 60))
    assert not served.busy
