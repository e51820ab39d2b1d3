"""Language methods seen through EleutherAI's lm-eval: any method that writes or scores texts as an `lm_eval` LM.

    evaluate("speculative", "greedy/words", rung=32)["results"]["words"]["exact_match,answer"]
    evaluate("remdm", "generation/stories64", rung=32)["results"]["generation/stories64"]["gen_ppl,none"]

The tasks are built from Stepmark's own datasets in memory: no task files, no downloads. Questions with an answer become
an ordinary lm-eval task, with exact match. Of other tasks the method gets the harness's own items, and lm-eval shows the
metrics of the track; models that only tell the next word, or the likelihood of a text, are asked for those. Outputs are
the same as through the harness, which also counts here: `StepmarkLM.counts` holds the evaluations of every network.

On a checkpoint that is open the tasks are lm-eval's own (`evaluate_own`): what a faster method costs in right answers.
Needs the extra `stepmark[lm-eval]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.model import LM
from torch import nn

from stepmark import plugins, remote
from stepmark.backbones.lm import EOS, decode, encode
from stepmark.judge import Judge
from stepmark.remote import Worker
from stepmark.runner import Runner
from stepmark.task import load_split
from stepmark.tracks.decoding import MAX_NEW_TOKENS

ANSWERED = ("sums", "words", "hops")  # datasets whose texts end in an answer


class StepmarkLM(LM):
    """A prepared method at one rung, in a process of its own (`remote.Worker`) or in this one. Text in and out is
    space-separated words of Stepmark's vocabulary; on a checkpoint any text, in the tokens of its folder.

    items: the inputs of the harness; a request whose document has an "item" is answered for that one of them.
    """

    def __init__(
        self, runner: Runner | Worker, rung: int, seed: int = 0, items: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.runner, self.rung, self.seed, self.items = runner, rung, seed, items or {}
        self.judge = Judge(runner.task.id, runner.device)
        self.counts: dict[str, float] = {}
        self.outputs: dict[int, list[int]] = {}
        self.seconds = self.tokens = 0.0  # of the calls, and written in them

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of the contexts, up to the first stop string of each request."""
        texts: list[str] = []
        size = self.runner.task.batch
        for index, start in enumerate(range(0, len(requests), size)):
            asked = requests[start : start + size]
            arguments = [request.args for request in asked]
            chosen = [request.doc["item"] for request in asked] if self.items else []
            if self.items:
                batch = {key: [values[i] for i in chosen] for key, values in self.items.items()}
            else:
                brought = hasattr(self.runner.track, "new_tokens")
                most = self.runner.track.new_tokens() if brought else MAX_NEW_TOKENS[self.runner.task.dataset]
                lengths = [min(most, options.get("max_gen_toks") or most) for _, options in arguments]
                batch = {
                    "prompt": [self._prompt(asked[0], n) for asked, n in zip(arguments, lengths, strict=True)],
                    "max_new_tokens": lengths,
                    "temperature": [temperature_of(options) for _, options in arguments],
                }
            outputs = self._run(batch, index)
            self.outputs |= dict(zip(chosen, outputs, strict=bool(chosen)))
            for prompt, ids, (_, options) in zip(batch["prompt"], outputs, arguments, strict=True):
                texts.append(until(self._text(prompt, ids), options.get("until")))
        return texts

    def _prompt(self, text: str, room: int) -> list[int]:
        """Token ids of a context; on a checkpoint its last ones, as many as the model sees before `room` new ones."""
        track = self.runner.track
        return track.ids_of(text, room) if hasattr(track, "ids_of") else encode(text)

    def _whole(self, text: str) -> list[int]:
        """Token ids of a text that nobody goes on with."""
        track = self.runner.track
        return track.ids_of(text, 0, message=False) if hasattr(track, "ids_of") else encode(text)

    def _text(self, prompt: list[int], ids: list[int]) -> str:
        """What was written after a prompt, with the space that it begins with."""
        if not hasattr(self.runner.track, "text_of"):
            return decode(ids)
        before, whole = (self.runner.track.text_of(each) for each in (prompt, [*prompt, *ids]))
        return str(whole[len(before) :] if whole.startswith(before) else self.runner.track.text_of(ids))

    def _run(self, batch: dict[str, Any], index: int) -> Any:
        call = self.runner.run(batch, self.rung, self.seed, index)
        self.seconds += call.ns / 1e9
        self.judge.check(batch, call.outputs)
        for name, figures in call.handles.items():
            self.counts[name] = self.counts.get(name, 0.0) + figures["evaluations"]
        if "max_new_tokens" in batch:
            self.tokens += sum(len(ids) for ids in call.outputs)
        return call.outputs

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it the greedy one): of the target, which a lossless method does not change;
        of the method itself where it tells next words or chooses between labels."""
        if self.runner.task.id.startswith("learning/"):
            return [self._next_words(index, *request.args) for index, request in enumerate(requests)]
        if self.items:
            return self._choices(requests)
        return [self._loglikelihood(*self._pair(*request.args)) for request in requests]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what goes on: spaces between them belong to what goes on, and tokens that stand
        across the border too. In a chat template the context is a user's message, what goes on the answer."""
        track = self.runner.track
        if not hasattr(track, "ids_of"):
            return encode(context), encode(continuation)
        bare = context.rstrip()
        if bare and (answer := track.answer_of(continuation)) is not None:
            return track.ids_of(bare, len(answer)), answer
        before = track.ids_of(bare, 0) if bare else []
        whole = track.ids_of(context + continuation, 0, message=False)
        before = before or whole[:1]
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        start = min(max(shared, 1), len(whole) - 1)
        return whole[:start], whole[start:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text): where the method bounds likelihoods, the bound; else the target's, from its second word on, as the
        vocabulary has no start token."""
        found = []
        for index, request in enumerate(requests):
            ids = self._whole(request.args[0])
            if self.runner.task.id.startswith("likelihood/"):
                tokens = torch.tensor([ids], device=self.runner.device)
                found.append(-float(self._run({"tokens": tokens}, index)[0]))
            else:
                found.append(self._loglikelihood(ids[:1], ids[1:])[0])
        return found

    def _choices(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihoods of whole lines, text and label, of which the method reads all those of an item at once."""
        found, answers = [], {}
        for request in requests:
            item = request.doc["item"]
            if item not in answers:
                batch = {key: [values[item]] for key, values in self.items.items()}
                answers[item] = self._run(batch, item)["log_likelihood"][0]
            label = self.items["labels"][item].index(request.args[1].strip())
            found.append((float(answers[item][label]), label == int(answers[item].argmax())))
        return found

    def _next_words(self, index: int, context: str, continuation: str) -> tuple[float, bool]:
        before, words = encode(context), encode(continuation)
        batch = {"context": [[*before, *words[:i]] for i in range(len(words))]}
        logp = self._run(batch, index)
        taken = logp.gather(1, torch.tensor(words, device=logp.device)[:, None])[:, 0]
        return float(taken.sum()), bool((taken == logp.amax(1)).all())

    def _loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        target: nn.Module = self.judge.networks()["target"]
        ids = torch.tensor([[*(context or [EOS]), *continuation]], device=self.runner.device)
        with torch.no_grad():
            logp = target(ids[:, :-1], use_cache=False).logits[0, -len(continuation) :].double().log_softmax(-1)
        taken = logp.gather(1, ids[0, -len(continuation) :, None])[:, 0]
        return float(taken.sum()), bool((taken == logp.amax(1)).all())


def until(text: str, stops: str | Sequence[str] | None) -> str:
    """A text up to the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.partition(stop)[0] if stop else text
    return text


def temperature_of(options: Mapping[str, Any]) -> float:
    """0 where no sampling is asked for, whatever temperature stands beside; 1 where it is and none does.

    Raises:
        ValueError: the distribution is to be cut, which no method is asked to do.
    """
    asked, temperature = options.get("do_sample"), options.get("temperature")
    if asked is False:
        return 0.0
    value = float(1.0 if temperature is None and asked else temperature or 0.0)
    cuts = {"top_p": (None, 1, 1.0), "top_k": (None, 0, -1), "min_p": (None, 0, 0.0)}
    cut = [name for name, whole in cuts.items() if options.get(name) not in whole]
    if value and cut:
        raise ValueError(
            f"{cut[0]}: methods draw from whole distributions; take it out of the task's generation_kwargs"
        )
    return value


def local_task(dataset: str, n: int) -> dict[str, Any]:
    """lm-eval's description of a workload: its first `n` test questions, answered by generation, exact match."""
    from datasets import Dataset  # type: ignore[attr-defined]  # Hugging Face's, not our folder of that name

    data = load_split(dataset, "test")
    rows = [{"prompt": p, "answer": a} for p, a in zip(data["prompt"][:n], data["answer"][:n], strict=True)]
    return _described(dataset, Dataset.from_list(rows), "generate_until", "{{prompt}}", "{{answer}}") | {
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": MAX_NEW_TOKENS[dataset]},
        "filter_list": [
            {
                "name": "answer",
                "filter": [{"function": "regex", "regex_pattern": r"ans (.*)$"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def track_task(model: StepmarkLM) -> dict[str, Any]:
    """lm-eval's description of the items of a model, scored by the metrics of the track over all of them."""
    from datasets import Dataset  # type: ignore[attr-defined]

    task = model.runner.task
    rows = [{"item": i, "text": decode(list(ids))} for i, ids in enumerate(model.items["prompt"])]
    found: dict[str, float] = {}

    def value(name: str, chosen: Sequence[int]) -> float:
        if not found:
            batch = {key: [values[i] for i in chosen] for key, values in model.items.items()}
            outputs = [model.outputs[i] for i in chosen]
            scores = model.judge.score(batch, outputs, model.seed)
            found.update({name: score.value for name, score in scores.items()})
        return found[name]

    def process(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
        return dict.fromkeys(task.metrics, doc["item"])

    return _described(task.id, Dataset.from_list(rows), "generate_until", "{{text}}", "") | {
        "generation_kwargs": {"until": [], "do_sample": False},
        "process_results": process,
        "metric_list": [
            {"metric": name, "aggregation": partial(value, name), "higher_is_better": direction == "higher"}
            for name, direction in task.metrics.items()
        ],
    }


def next_word_task(task: str, dataset: str, n: int) -> dict[str, Any]:
    """lm-eval's description of `n` texts of the test split, each cut at another word: how likely is that word?"""
    from datasets import Dataset  # type: ignore[attr-defined]

    data, rows = load_split(dataset, "test"), []
    for i, text in enumerate(data["text"][:n]):
        words = text.split()
        cut = 2 + 7 * i % (len(words) - 2)
        rows.append({"context": " ".join(words[:cut]), "word": words[cut]})
    return _described(task, Dataset.from_list(rows), "loglikelihood", "{{context}}", "{{word}}") | {
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ]
    }


def choice_task(model: StepmarkLM) -> dict[str, Any]:
    """lm-eval's description of the items of a model that are questions with labels to choose from."""
    from datasets import Dataset  # type: ignore[attr-defined]

    data, items = load_split(model.runner.task.dataset, "test"), model.items
    answers = dict(zip(data["text"], data["answer"], strict=True))
    rows = [
        {"item": i, "text": "".join([*lines, text]), "labels": labels, "answer": answers[text]}
        for i, (lines, text, labels) in enumerate(
            zip(items["demonstrations"], items["text"], items["labels"], strict=True)
        )
    ]
    return _described(model.runner.task.id, Dataset.from_list(rows), "multiple_choice", "{{text}}", "answer") | {
        "doc_to_choice": "labels",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def whole_text_task(task: str, dataset: str, n: int) -> dict[str, Any]:
    """lm-eval's description of the first `n` texts of the test split: how likely is each?"""
    from datasets import Dataset  # type: ignore[attr-defined]

    rows = [{"text": text} for text in load_split(dataset, "test")["text"][:n]]
    return _described(task, Dataset.from_list(rows), "loglikelihood_rolling", "", "{{text}}") | {
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    }


def _described(task: str, rows: Any, output_type: str, text: str, target: str) -> dict[str, Any]:
    return {
        "task": task,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": text,
        "doc_to_target": target,
    }


def _worker(method: str, task: str, tier: str, device: str) -> Worker:
    """Who answers: in a process of its own, as for the harness, which neither lm-eval's tasks nor its answers are in."""
    return remote.ready(plugins.methods()[method], task, tier, device, show_progress=False).worker()


def evaluate(
    method: str, task: str, rung: int, n: int = 96, device: str = "cpu", tier: str = "embedded"
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` of a method on a task that it runs on; adds "counts" (evaluations by network).

    Raises:
        KeyError: unknown method or task. ValueError: a task in which no text is written or scored.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    with contextlib.closing(_worker(method, task, tier, device)) as runner:
        model = StepmarkLM(runner, rung)
        items = model.judge.inputs(n, 0)
        if task.startswith("greedy/") and runner.task.dataset in ANSWERED:
            described = local_task(runner.task.dataset, n)
        elif "prompt" in items:
            model.items = items
            described = track_task(model)
        elif "labels" in items:
            model.items = items
            described = choice_task(model)
        elif task.startswith("learning/"):
            described = next_word_task(task, runner.task.dataset, n)
        elif task.startswith("likelihood/"):
            described = whole_text_task(task, runner.task.dataset, n)
        else:
            raise ValueError(f"{task} neither writes nor scores texts: lm-eval has nothing to ask")
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[described],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        return dict(found or {}) | {"counts": model.counts}


def own_tasks(folder: str | None) -> Any:
    """lm-eval's task manager: of the task files in a folder, else of all that lm-eval brings (this takes seconds)."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=False) if folder else TaskManager()


def evaluate_own(
    method: str, task: str, tasks: Sequence[str], manager: Any, rung: int, n: int | None, device: str, tier: str
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` of a method on a checkpoint that is open, on lm-eval's own tasks; adds "counts" and
    "ms_per_token".

    Args:
        task: id of the checkpoint's task. tasks: names that `manager` knows. rung: target forwards a text may take.
        n: documents of each task at most; None: all.

    Raises:
        ValueError: a task cannot be loaded. One line.
    """
    import lm_eval

    with contextlib.closing(_worker(method, task, tier, device)) as runner:
        model = StepmarkLM(runner, rung)
        try:
            found = lm_eval.simple_evaluate(
                model=model, tasks=list(tasks), task_manager=manager, limit=n, bootstrap_iters=0, log_samples=False
            )
        except (OSError, ConnectionError) as error:
            line = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the data of {', '.join(tasks)} are not on this machine ({line}); give task files with local data_files by "
                "--lm-tasks FOLDER"
            ) from error
        speed = 1000 * model.seconds / model.tokens if model.tokens else None
        return dict(found or {}) | {"counts": model.counts, "ms_per_token": speed}
