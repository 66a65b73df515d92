"""What a run was like: losses and speed of each step, on the terminal, for TensorBoard, in a file, and as a plot."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.store import Store
from mllama_jax.sharding.mesh import topology_of
from mllama_jax.train.batch import Batch
from mllama_jax.train.flops import step_flops
from mllama_jax.train.recipe import Recipe
from mllama_jax.train.step import Report

FILE, PLOT = "history.jsonl", "history.png"


class History:
    """Notes each step under `out`; of a run that goes on, those behind its last checkpoint are forgotten.

    Only the first process writes: on a disk each step as it is done, in a bucket, where nothing can be appended to a
    file, when it is told to `keep` what was noted.
    """

    def __init__(self, out: str, recipe: Recipe, begun: int, config: MllamaConfig):
        self.out, self.recipe, self.begun, self.config = out, recipe, begun, config
        self.store = Store(out)
        self.first = jax.process_index() == 0
        place = topology_of(jax.devices())
        self.peak = place.chip.flops * place.devices if place else None
        lines = [json.loads(line) for line in (self.store.read(FILE) or b"").splitlines() if line.endswith(b"}")]
        self.steps: list[dict[str, float]] = [line for line in lines if line["step"] <= begun]

    def __enter__(self) -> History:
        self.last = time.monotonic()
        hidden = None if self.first else True
        self.bar = tqdm(total=self.recipe.steps, initial=self.begun, unit="step", desc=self.out, disable=hidden)
        if self.first:
            self._write()
            self.file = None if self.store.remote else open(Path(self.out, FILE), "a", buffering=1)
            self.events = SummaryWriter(f"{self.out}/events", purge_step=self.begun + 1 if self.begun else None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.bar.close()
        if self.first:
            if self.file is not None:
                self.file.close()
            self.events.close()
            if kind is None:
                self.store.write(PLOT, self.draw())

    def _write(self) -> None:
        self.store.write(FILE, "".join(json.dumps(line) + "\n" for line in self.steps).encode())

    def keep(self) -> None:
        """Have all that was noted where a run that goes on finds it."""
        if self.first and self.file is None:
            self._write()

    def add(self, step: int, batches: Batch, report: Report, held_out: float | None) -> None:
        """Note a step; its time is that since the last one."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        tokens = batches.tokens.size
        line = {
            "step": step,
            "loss": float(report.loss),
            "gradient_norm": float(report.gradient),
            "learned_tokens": float(report.count),
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        }
        if self.peak:
            line["mfu"] = step_flops(self.config, self.recipe, batches) / seconds / self.peak
        if memory := (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
            line["peak_memory"] = memory
        if held_out is not None:
            line["held_out_loss"] = held_out
            self.last = time.monotonic()
        self.steps.append(line)
        told = {k: f"{line[k]:.4g}" for k in ("loss", "held_out_loss", "tokens_per_second", "mfu") if k in line}
        if memory:
            told["memory"] = f"{memory / 2**30:.1f} GiB"
        self.bar.set_postfix(told, refresh=False)
        self.bar.update()
        if self.first:
            if self.file is not None:
                self.file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if name != "step":
                    self.events.add_scalar(name, value, step)

    def summary(self) -> dict[str, Any]:
        """Of the whole run: its last loss, the last and the best of what is held out, and the median speed."""
        held_out = [line["held_out_loss"] for line in self.steps if "held_out_loss" in line]
        found: dict[str, Any] = {"steps": len(self.steps), "resumed": self.begun, "loss": self.steps[-1]["loss"]}
        if held_out:
            found |= {"held_out_loss": held_out[-1], "best_held_out_loss": min(held_out)}
        for name in ("tokens_per_second", "mfu"):
            if values := [line[name] for line in self.steps if name in line]:
                found[name] = float(np.median(values))
        return found | {k: self.steps[-1][k] for k in ("peak_memory",) if k in self.steps[-1]}

    def draw(self) -> bytes:
        """The curves as a PNG: loss, what is held out, and tokens a second."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=(2.5, 1))
        steps = [line["step"] for line in self.steps]
        loss.plot(steps, [line["loss"] for line in self.steps], label="training", linewidth=1)
        if held_out := [(line["step"], line["held_out_loss"]) for line in self.steps if "held_out_loss" in line]:
            loss.plot(*zip(*held_out, strict=True), "o-", label="held out", markersize=3)
        loss.set(ylabel="loss", yscale="log", title=self.out)
        loss.legend()
        speed.plot(steps, [line["tokens_per_second"] for line in self.steps], color="tab:gray", linewidth=1)
        speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
        figure.savefig(drawn := io.BytesIO(), dpi=120)
        return drawn.getvalue()
