"""lmms-eval over a model of ours, which finds it by the entry point `lmms_eval.models`.

lmms-eval itself needs torch; the model does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from mllama_jax import load
from mllama_jax.errors import InputError
from mllama_jax.evaluate.batching import in_batches, sampling
from mllama_jax.processing.image import open_image

if TYPE_CHECKING:
    from mllama_jax.generate.sampling import SamplingParams
    from mllama_jax.processing.chat import Prompt


def manifest() -> ModelManifest:
    return ModelManifest("mllama_jax", simple_class_path="mllama_jax.evaluate.lmms.LmmsModel")


class LmmsModel(lmms):
    """`--model mllama_jax --model_args pretrained=DIRECTORY`: pictures first, then the text, through the template."""

    is_simple = True

    def __init__(
        self, pretrained: str, dtype: str = "bfloat16", batch_size: int | str | None = None, device: str | None = None
    ) -> None:
        """`batch_size` rows are asked at once; `device` is what the harness passes to every model, and not used."""
        super().__init__()
        self.model, self.batch = load(pretrained, dtype=dtype), int(batch_size or 16)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, which ends before any of its `until` texts."""
        jobs = []
        for request in requests:
            context, settings, visual, number, task, split = request.arguments
            images = visual(self.task_dict[task][split][number]) or []
            if not all(hasattr(image, "convert") for image in images):
                raise InputError(f"{task}: question {number} shows what is no picture; videos and sound are not read")
            content = [{"type": "image", "image": open_image(image)} for image in images]
            conversation = [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]
            jobs.append((self.model.prompt(conversation), sampling(settings)))

        def work(some: Sequence[tuple[Prompt, SamplingParams]]) -> list[str]:
            prompts, params = zip(*some, strict=True)
            return [completion.text for completion in self.model.complete(prompts, params)]

        def keep(i: int, text: str) -> None:
            self.cache_hook.add_partial("generate_until", requests[i].arguments[:2], text)

        return in_batches(jobs, self.batch, lambda job: len(job[0].tokens), work, keep, quiet=False)

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        raise InputError("lmms-eval tasks by log-likelihood are not supported; lm-eval's are")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        raise InputError("lmms-eval tasks of several rounds are not supported")
