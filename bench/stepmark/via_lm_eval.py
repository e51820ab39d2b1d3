"""Decoding methods seen through EleutherAI's lm-eval: any method of the track as an `lm_eval.api.model.LM`.

    evaluate("speculative", "greedy/words", rung=32)["results"]["words"]["exact_match,answer"]

The tasks are built from Stepmark's own datasets in memory: no task files, no downloads. Greedy answers are the same
as through the harness, which also counts here: `StepmarkLM.counts` holds the evaluations of every network.
Needs the extra `stepmark[lm-eval]`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import LM
from torch import nn

from stepmark import plugins
from stepmark.backbones.lm import EOS, decode, encode
from stepmark.run import Bench
from stepmark.task import load_split
from stepmark.tracks.decoding import MAX_NEW_TOKENS


class StepmarkLM(LM):
    """A prepared method at one rung. Text in and out is space-separated words of Stepmark's vocabulary."""

    def __init__(self, bench: Bench, rung: int, seed: int = 0) -> None:
        super().__init__()
        self.bench, self.rung, self.seed = bench, rung, seed
        self.counts: dict[str, float] = {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of the contexts, up to the first stop string of each request."""
        texts: list[str] = []
        size = self.bench.task.batch
        for index, start in enumerate(range(0, len(requests), size)):
            arguments = [request.args for request in requests[start : start + size]]
            most = MAX_NEW_TOKENS[self.bench.task.dataset]
            batch = {
                "prompt": [encode(context) for context, _ in arguments],
                "max_new_tokens": [min(most, options.get("max_gen_toks") or most) for _, options in arguments],
                "temperature": [float(options.get("temperature") or 0.0) for _, options in arguments],
            }
            outputs = self.bench.run(batch, self.rung, self.seed, index)
            for name, figures in self.bench.ledger.snapshot().items():
                self.counts[name] = self.counts.get(name, 0.0) + figures["evaluations"]
            for ids, (_, options) in zip(outputs, arguments, strict=True):
                text = decode(ids)
                for stop in options.get("until") or []:
                    text = text.partition(stop)[0] if stop else text
                texts.append(text)
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it the greedy one) under the target: a lossless method changes neither."""
        return [self._loglikelihood(encode(request.args[0]), encode(request.args[1])) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text) under the target, from its second word on: the vocabulary has no start token."""
        found = []
        for request in requests:
            ids = encode(request.args[0])
            found.append(self._loglikelihood(ids[:1], ids[1:])[0])
        return found

    def _loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        target: nn.Module = self.bench.judges()["target"]
        ids = torch.tensor([[*(context or [EOS]), *continuation]], device=self.bench.device)
        with torch.no_grad():
            logp = target(ids[:, :-1], use_cache=False).logits[0, -len(continuation) :].double().log_softmax(-1)
        taken = logp.gather(1, ids[0, -len(continuation) :, None])[:, 0]
        return float(taken.sum()), bool((taken == logp.amax(1)).all())


def local_task(dataset: str, n: int) -> dict[str, Any]:
    """lm-eval's description of a workload: its first `n` test questions, answered by generation, exact match."""
    from datasets import Dataset  # type: ignore[attr-defined]  # Hugging Face's, not our folder of that name

    data = load_split(dataset, "test")
    rows = [{"prompt": p, "answer": a} for p, a in zip(data["prompt"][:n], data["answer"][:n], strict=True)]
    return {
        "task": dataset,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": MAX_NEW_TOKENS[dataset]},
        "filter_list": [
            {
                "name": "answer",
                "filter": [{"function": "regex", "regex_pattern": r"ans (.*)$"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def evaluate(
    method: str, task: str, rung: int, n: int = 96, device: str = "cpu", tier: str = "embedded"
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` of a method on the workload of a greedy task; adds "counts" (evaluations by network).

    Raises KeyError for an unknown method or task, ValueError for stories, which have no answer to match.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    bench = Bench(plugins.methods()[method], task, tier, device, show_progress=False)
    if bench.task.dataset == "stories":
        raise ValueError("stories have no answer; use sums, words or hops")
    model = StepmarkLM(bench, rung)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[local_task(bench.task.dataset, n)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return dict(found or {}) | {"counts": model.counts}
