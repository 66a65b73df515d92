"""lm-evaluation-harness over a model of ours: what its tasks ask, answered in batches on all devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from PIL import Image

from mllama_jax import load
from mllama_jax.errors import InputError
from mllama_jax.evaluate.batching import in_batches, sampling
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.processing.chat import Prompt, tokenize
from mllama_jax.processing.image import open_image

if TYPE_CHECKING:
    from mllama_jax import Mllama

PLACEHOLDER, IMAGE = "<image>", "<|image|>"  # of a picture, in tasks and in prompts
__all__ = ["HarnessModel", "make_table", "run", "tasks_of", "version"]
Pair = tuple[list[int], list[int], list[Any]]  # a context, its continuation, what a request has beside: pictures


class HarnessModel(TemplateLM):
    """A model as lm-eval 0.4 asks for one; `--model mllama_jax --model_args pretrained=DIRECTORY` where it is imported.

    `batch` rows are asked at once in each group of devices. Contexts begin with one beginning of text.
    """

    MULTIMODAL = True

    def __init__(
        self, pretrained: str | Path | Mllama, dtype: str = "bfloat16", batch: int = 16, **harness: Any
    ) -> None:
        """`pretrained` is a checkpoint or a loaded model; what else the harness passes to every model is not used."""
        super().__init__()
        self.model = load(pretrained, dtype=dtype) if isinstance(pretrained, str | Path) else pretrained
        if self.model.tokenizer is None:
            raise InputError(f"{self.model.directory}: has no tokenizer, which tasks need")
        self.batch = batch * self.model.groups

    # ---- What TemplateLM builds on ----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.model.config.stops[0]

    @property
    def prefix_token_id(self) -> int:
        return self.model.config.bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.directory).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Only names the template: `apply_chat_template` renders it."""
        return "the checkpoint's own" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        messages = [{**message, "content": _parts(message["content"])} for message in chat_history]
        rendered = self.model.template.render(
            messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt
        )
        return rendered if add_generation_prompt else rendered.removesuffix("<|eot_id|>")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        assert self.model.tokenizer is not None
        tokens = tokenize(string.replace(PLACEHOLDER, IMAGE), self.model.tokenizer)
        if add_special_tokens is False or tokens[:1] == [self.prefix_token_id]:
            return tokens
        return [self.prefix_token_id, *tokens]

    # ---- What is asked ----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation of a context, with pictures or without: log-probability, whether greedy makes it."""
        pairs: list[Pair] = []
        for context, continuation, *rest in _arguments(requests):
            if context:
                encoded = self._encode_pair(context, continuation)
            else:
                encoded = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            pairs.append((*encoded, rest))
        return self._score(pairs, disable_tqdm, self._keeper("loglikelihood", requests))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows as long as the context where it is longer."""
        windows: list[tuple[int, tuple[list[int], list[int]]]] = []
        for i, (text,) in enumerate(_arguments(requests)):
            tokens = self.tok_encode(text, add_special_tokens=False)
            each = get_rolling_token_windows(tokens, self.prefix_token_id, self.model.config.text.context - 1, 1)
            windows += [(i, make_disjoint_window(window)) for window in each]
        scores = self._score([(context, own, []) for _, (context, own) in windows], disable_tqdm, _forget)
        totals = [0.0] * len(requests)
        for (i, _), (logprob, _) in zip(windows, scores, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, which ends before any of its `until` texts."""
        jobs = [(self.tok_encode(context), rest, sampling(own)) for context, own, *rest in _arguments(requests)]

        def work(some: Sequence[tuple[list[int], list[Any], SamplingParams]]) -> list[str]:
            prompts = [Prompt(tokens, _visuals(rest)) for tokens, rest, _ in some]  # opened now, for there are many
            return [each.text for each in self.model.complete(prompts, [params for _, _, params in some])]

        keep = self._keeper("generate_until", requests)
        return in_batches(jobs, self.batch, lambda job: len(job[0]), work, keep, quiet=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        return self._score([(context, own, []) for _, context, own in requests], disable_tqdm, _forget)

    # ---- How --------------------------------------------------------------------------------------------------------

    def _keeper(self, kind: str, requests: Sequence[Instance]) -> Callable[[int, Any], None]:
        """Puts the answer to a request where a run that goes on finds it."""
        return lambda i, answer: self.cache_hook.add_partial(kind, requests[i].args, answer)

    def _score(self, pairs: Sequence[Pair], quiet: bool, keep: Callable[[int, Any], None]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context and pictures: log-probability, whether greedy makes it."""

        def work(some: Sequence[Pair]) -> list[tuple[float, bool]]:
            found = self.model.following([a + b for a, b, _ in some], [_visuals(rest) for _, _, rest in some])
            return [
                (float(logprob[len(context) - 1 :].sum()), bool(likeliest[len(context) - 1 :].all()))
                for (context, _, _), (logprob, likeliest) in zip(some, found, strict=True)
            ]

        return in_batches(pairs, self.batch, lambda pair: len(pair[0]) + len(pair[1]), work, keep, quiet=quiet)


register_model("mllama_jax")(HarnessModel)


def version() -> str:
    return f"lm-eval {metadata.version('lm-eval')}"


class _Tasks(TaskManager):
    """Tasks whose data cannot be fetched cost a line; lm-eval builds them once it has set its seeds, not before."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except OSError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"--tasks: {', '.join(task_list)}: the data cannot be had: {reason}; the Hub's needs a "
                "first run where huggingface.co answers, which keeps it in HF_HOME"
            ) from None


def tasks_of(include: Path | None, tasks: Sequence[str]) -> TaskManager:
    """lm-eval's tasks and those of a folder; InputError where one is not among them, or there is no such folder."""
    if include is not None and not include.is_dir():
        raise InputError(f"--include: {include}: expected a folder of .yaml files, got none")
    manager = _Tasks(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise InputError(f"--tasks: {', '.join(unknown)}: not known to lm-eval; `lm-eval ls tasks` lists its own")
    return manager


def run(
    model: HarnessModel, tasks: Sequence[str], manager: TaskManager, folder: Path, *, chat: bool, limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run tasks: results as lm-eval gives them, and every request's answer.

    Answers are kept in `folder` as they come, and not asked for again. Not so with several processes, which would
    have to have kept the same ones.
    """
    cache = str(folder / "requests") if jax.process_count() == 1 else None
    found: Any = simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat, use_cache=cache
    )
    records = [
        {"task": task, "id": sample["doc_id"], "target": sample["target"], "responses": sample["resps"]}
        | {metric: sample[metric] for metric in sample["metrics"]}
        for task, samples in found["samples"].items()
        for sample in samples
    ]
    return {name: found[name] for name in ("results", "versions", "n-shot", "higher_is_better", "n-samples")}, records


def _forget(i: int, answer: Any) -> None:
    """Keep nothing."""


def _arguments(requests: Sequence[Instance]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _parts(text: str) -> list[dict[str, str]]:
    """A message as parts, a picture at each placeholder."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i:
            parts.append({"type": "image", "image": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _visuals(rest: Sequence[Any]) -> list[Image.Image]:
    """The pictures among what follows a request's texts."""
    return [open_image(image) for extra in rest for image in extra.get("visual") or []]
