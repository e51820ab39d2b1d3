"""Tokens per second of greedy decoding, ours beside transformers', in one run on one thread.

    python bench/speed_decoding.py [--prompts 8] [--rounds 5] [--workloads sums stories]

Every way decodes the same prompts to the end, batch size 1; the ways are interleaved in rounds and the median round
counts. Outputs are compared: a lossless way that differs from plain greedy decoding stops the run.
transformers' assisted generation reads its knobs from the draft model's generation_config only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from stepmark import backbones, plugins
from stepmark.backbones.lm import encode
from stepmark.task import load_split
from stepmark.tracks.decoding import MAX_NEW_TOKENS, TASKS

Way = Callable[[list[int], int], list[int]]


def ours(method: str, networks: dict[str, Any], dataset: str, **constants: Any) -> Way:
    """A method of the suite, at a budget that never ends a text; `constants` replace its module's own."""
    task = next(t for t in TASKS if t.dataset == dataset)
    kind = plugins.load_class(plugins.methods()[method])
    instance = kind()
    session: Any = SimpleNamespace(task=task, networks=networks, state={}, rng=torch.Generator())
    namespace = kind.run.__globals__

    def way(prompt: list[int], room: int) -> list[int]:
        before = {name: namespace[name] for name in constants}
        namespace.update(constants)
        batch = {"prompt": [prompt], "max_new_tokens": [room], "temperature": [0.0]}
        output = instance.run(session, batch, 10_000)[0]
        namespace.update(before)
        return list(output)

    return way


def theirs(model: Any, draft: Any = None, k: int = 0, lookup: int = 0) -> Way:
    """`generate` of transformers: plain, assisted by `draft` with k tokens, or by prompt lookup."""
    extra: dict[str, Any] = {"prompt_lookup_num_tokens": lookup} if lookup else {}

    def way(prompt: list[int], room: int) -> list[int]:
        if draft is not None:
            draft.generation_config.num_assistant_tokens = k
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0
            extra["assistant_model"] = draft
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=room, **extra)
        return list(output[0, len(prompt) :].tolist())

    return way


def measure(ways: dict[str, Way], prompts: list[list[int]], room: int, rounds: int) -> dict[str, float]:
    """Median tokens per second of each way over the rounds; one warm-up round compares the outputs."""
    wanted = [next(iter(ways.values()))(prompt, room) for prompt in prompts]
    for name, way in ways.items():
        if [way(prompt, room) for prompt in prompts] != wanted:
            raise SystemExit(f"{name} differs from plain greedy decoding")
    tokens = sum(map(len, wanted))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for prompt in prompts:
                way(prompt, room)
            seconds[name].append(time.perf_counter() - start)
    return {name: tokens / statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    """Print one table per target and workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", default=["sums", "words", "stories"])
    parser.add_argument("--targets", nargs="+", default=["lm_target", "lm_deep"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draft = backbones.load("lm_draft")
    for target in arguments.targets:
        model = backbones.load(target)
        networks = {"target": model, "draft": draft}
        for dataset in arguments.workloads:
            ways: dict[str, Way] = {"greedy": ours("autoregressive", networks, dataset)}
            ways["transformers greedy"] = theirs(model)
            for k in (2, 4, 8):
                ways[f"speculative k={k}"] = ours("speculative", networks, dataset, DRAFTED={dataset: k})
            for k in (2, 4, 8):
                ways[f"transformers assisted k={k}"] = theirs(model, draft, k)
            ways["prompt lookup"] = ours("prompt_lookup", networks, dataset)
            ways["transformers prompt lookup 6"] = theirs(model, lookup=6)
            prompts = [encode(text) for text in load_split(dataset, "test")["prompt"][: arguments.prompts]]
            with torch.no_grad():
                speed = measure(ways, prompts, MAX_NEW_TOKENS[dataset], arguments.rounds)
            plain = speed["greedy"]
            assisted = max(v for name, v in speed.items() if name.startswith("transformers assisted"))
            print(f"\n{target}, {dataset}: tokens/s, times plain greedy, times the best assisted generation")
            for name, value in speed.items():
                print(f"  {name:30s} {value:8.0f}  {value / plain:5.2f}  {value / assisted:5.2f}", flush=True)


if __name__ == "__main__":
    main()
