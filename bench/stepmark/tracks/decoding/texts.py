"""Track decoding, tasks of open texts: several drafts of one text, or a text that follows a wish.

Tasks `drafts/...` ask for several continuations, `preference/...` for texts that follow a wish. A rung counts target
forwards as on the other tasks. `run` receives {"prompt": lists of token ids, "max_new_tokens": ints} and returns one
list of token ids per prompt. Of `drafts/...`: also "drafts", how many are asked for; a list holds the drafts one after
the other, each filled up to `max_new_tokens` with the padding token. Of `preference/...`: also "plain", the prompt
without the wish, and "temperature"; a list holds one text, nothing after its end-of-sequence token.

Wishes are followed weakly: after a prompt with a wish the target gives its colour 0.29 and the hero's favourite more, so
that the likeliest word is the wished colour in about one event of eight. Measured over whole texts: prompting follows the
wish in about two events of five, beam search, which is what a task that any likely text solves would reward, in about one
of eight, the target's own best spans in a third. Asked backwards, the target tells a wish from other colours by 1.2 nats
at its first event.

Stories come from a known grammar, so that texts are judged by their exact likelihood (`story_likelihood`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call

TASKS = (
    Task(
        id="drafts/stories",
        version=1,
        summary="Three drafts of the next ten words of a story, 4-layer target",
        dataset="stories",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(4, 10, 28),
        metrics={
            "perplexity": "lower",
            "best": "lower",
            "grammatical": "higher",
            "distinct": "higher",
            "tokens": "higher",
        },
        n=64,
        batch=4,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(10,),
        probe=1,
    ),
    Task(
        id="preference/colours",
        version=2,
        summary="Stories with a wished colour, sampled at temperature 1, 4-layer target that follows wishes weakly",
        dataset="wishes",
        backbones={"target": "lm_wishes"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(32, 96, 192),
        metrics={"compliance": "higher", "accuracy": "higher", "perplexity": "lower", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(16,),
        probe=1,
    ),
)

DRAFTS, DRAFT_TOKENS, STORY_TOKENS = 3, 10, 96
# What an impossible word counts as: it makes a text unlikely without making every average infinite.
FLOOR = 1e-3


# -- what the harness calls ---------------------------------------------------------------------------------------


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` prompts of the test split; of `drafts/...` each with a beginning of its text, cut where there is a choice."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    data = load_split(task.dataset, "test")
    chosen = torch.randperm(len(data["prompt"]), generator=generator)[:n].tolist()
    if task.id.startswith("preference/"):
        found = {"prompt": [encode(data["prompt"][i]) for i in chosen]}
        found["plain"] = [encode(data["plain"][i]) for i in chosen]
        return found | {"max_new_tokens": [STORY_TOKENS] * n, "temperature": [1.0] * n}
    prompts = []
    for i in chosen:
        words = data["target"][i].split()
        open_ = choices(data["prompt"][i].partition(" <story>")[0], words[: len(words) - DRAFT_TOKENS + 1], DRAFTS)
        cut = open_[int(torch.randint(len(open_), (), generator=generator))]
        prompts.append(encode(" ".join([data["prompt"][i], *words[:cut]])))
    return {"prompt": prompts, "max_new_tokens": [DRAFT_TOKENS] * n, "drafts": [DRAFTS] * n}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per prompt, of the right length, nothing after the end of a text."""
    from stepmark.backbones.lm import EOS, PAD, VOCABULARY

    if not isinstance(outputs, list) or len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return a list of {len(batch['prompt'])} lists of token ids")
    for ids, limit, drafts in zip(outputs, batch["max_new_tokens"], drafts_of(batch), strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(VOCABULARY) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(VOCABULARY)})")
        if "drafts" in batch and len(ids) != drafts * limit:
            raise BadOutput(f"an output has {len(ids)} tokens; {drafts} drafts of {limit} are asked for")
        if not 1 <= len(ids) <= drafts * limit:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {limit}")
        for draft in (ids[start : start + limit] for start in range(0, len(ids), limit)):
            stop = draft.index(PAD) if PAD in draft and "drafts" in batch else len(draft)
            if stop == 0 or EOS in draft[: stop - 1] or any(i != PAD for i in draft[stop:]):
                raise BadOutput("a text is empty or goes on after its end")


def drafts_of(batch: Mapping[str, Any]) -> list[int]:
    """How many drafts are asked for, by prompt."""
    return list(batch.get("drafts", [1] * len(batch["prompt"])))


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids and the grammar alone.

    perplexity: exp of minus the mean log-likelihood of the words under the grammar of `stories`, where all colours are as
    likely, an impossible word at `FLOOR`.
    tokens: mean number of tokens of a text. Of drafts: best, the perplexity of the likeliest draft of each prompt;
    grammatical, the share of them without an impossible word; distinct, the mean share of different ones among those
    of a prompt. Of wishes: compliance, the mean share of events whose colour is the wished one (none where no event is
    told), and accuracy, the share of complete texts of the grammar.
    """
    from stepmark.backbones.lm import EOS, PAD, VOCABULARY, decode
    from stepmark.datasets.stories import valid

    harness_only("scoring")
    names = ("grammatical", "distinct") if "drafts" in batch else ("compliance", "accuracy")
    rows = []
    for number, (ids, limit) in enumerate(zip(outputs, batch["max_new_tokens"], strict=True)):
        prompt = batch["prompt" if "drafts" in batch else "plain"][number]
        opening, _, told = decode(prompt).partition(" <story>")
        texts = [[i for i in ids[start : start + limit] if i != PAD] for start in range(0, len(ids), limit)]
        found = [story_likelihood(opening, told.split(), [VOCABULARY[i] for i in text]) for text in texts]
        if "drafts" in batch:
            grammatical = sum(impossible == 0 for _, impossible in found) / len(texts)
            own = grammatical, len(set(map(tuple, texts))) / len(texts)
        else:
            own = (
                compliance(decode(batch["prompt"][number]), decode(ids)),
                ids[-1] == EOS and valid(opening, decode(ids)),
            )
        best = max((log / len(text), log, len(text)) for (log, _), text in zip(found, texts, strict=True))
        rows.append((sum(log for log, _ in found), sum(map(len, texts)), len(texts), *best[1:], *own))
    table = np.array(rows, dtype=float)

    def over(items: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., items, 7] -> the five figures in the last dimension."""
        log, tokens, texts, best, length = (items[..., i].sum(-1) for i in range(5))
        figures = np.exp(-log / tokens), np.exp(-best / length), tokens / texts
        return np.stack([*figures, items[..., 5].mean(-1), items[..., 6].mean(-1)], -1)

    values, resamples = over(table), over(table[resample])
    order = ("perplexity", "best", "tokens", *names)
    scores = {name: Score(float(values[i]), resamples[:, i].tolist()) for i, name in enumerate(order)}
    return {name: scores[name] for name in task.metrics}


def compliance(prompt: str, text: str) -> float:
    """Share of the events of a story that are of the colour wished for in ``... let golden <story>``."""
    from stepmark.datasets.stories import COLOURS

    wish = prompt.partition(" let ")[2].split()[0]
    # The first word of a colour in each event; the refrain repeats it after "what a".
    words = text.split()
    told = [word for before, word in itertools.pairwise(words) if before == "a" and word in COLOURS][::2]
    return sum(word == wish for word in told) / len(told) if told else 0.0


# -- drawing ---------------------------------------------------------------------------------------------------------


def nucleus(p: Tensor, mass: float) -> Tensor:
    """p [V] with all but its nucleus set to nought: the fewest likeliest tokens that hold at least `mass` of it."""
    ordered, order = p.sort(descending=True)
    return p.scatter(0, order[ordered.cumsum(0) - ordered >= mass], 0.0)


# -- the grammar of stories -----------------------------------------------------------------------------------------

Walk = Generator[dict[str, float], str, str]


def _fixed(words: str) -> Walk:
    for word in words.split():
        yield {word: 1.0}
    return words


def _choice(options: Sequence[str]) -> Walk:
    """One of several phrases that differ in their first words, all as likely."""
    first = {phrase.split()[0]: phrase for phrase in options}
    word = yield dict.fromkeys(first, 1 / len(options))
    phrase = first.get(word, options[0])
    yield from _fixed(phrase.partition(" ")[2])
    return phrase


def story_walk(opening: str) -> Walk:
    """The grammar of `stepmark.datasets.stories` as a walk: yields what may come next, is sent the word that came.

    After a word that may not come it goes on as if one that may had come: a slip costs one word, not the whole rest.
    """
    from stepmark.datasets.stories import COLOURS, DAYS, PLACES, THINGS, VERBS

    hero, _, animal, *_, home, _ = opening.split()
    yield from _choice(DAYS)
    yield from _fixed(f"{hero} the {animal} went to the")
    place = yield from _choice(PLACES)
    yield from _fixed(f". near the {place}")
    for event in range(3):
        if event == 1:
            yield from _fixed("behind the")
        if event == 2:
            if (yield {"behind": 0.7, "then": 0.3}) == "then":
                break
            yield from _fixed("the")
        if event > 0:
            yield from _choice(PLACES)
        yield from _fixed(hero)
        yield from _choice(VERBS)
        yield from _fixed("a")
        colour = yield from _choice(COLOURS)
        thing = yield from _choice(THINGS)
        yield from _fixed(f". oh my , what a {colour} {thing} , said {hero} the {animal} .")
    else:
        yield from _fixed("then")
    yield from _fixed(f"{hero} the {animal} went home to the {home} . the end <eos>")
    while True:
        yield {}


def choices(opening: str, words: Sequence[str], least: int) -> list[int]:
    """Before which of the `words` of a story at least so many different words may stand."""
    walk = story_walk(opening)
    expected, found = next(walk), []
    for number, word in enumerate(words):
        if len(expected) >= least:
            found.append(number)
        expected = walk.send(word)
    return found


def story_likelihood(opening: str, told: Sequence[str], words: Sequence[str]) -> tuple[float, int]:
    """Exact log-likelihood of `words` after an opening and the words `told`, and how many of them are impossible.

    Args:
        opening: the prompt up to its full stop, ``anna the fox lives in the forest .``
    """
    walk = story_walk(opening)
    expected, log, impossible = next(walk), 0.0, 0
    for number, word in enumerate([*told, *words]):
        p = expected.get(word, 0.0)
        if number >= len(told):
            log += math.log(max(p, FLOOR))
            impossible += p == 0
        expected = walk.send(word)
    return log, impossible
