"""The language model that knows the world of `stepmark.datasets.closed_world` by heart, more or less of it.

How often a fact comes up in training falls with its grade, a thousandfold from the commonest to the rarest, whatever the format:
pages written by heart, chains, claims, explanations. What is told often is known, what is told seldom is guessed, and where
between them knowledge ends need not be foreseen: it ends somewhere within the thousandfold. Pages that are to be read are
mostly of other worlds, so that reading them is no use of memory. Two heads begin by looking back, as in `deducers`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.chains import Chains
from stepmark.backbones.lessons import Row, row, stacked
from stepmark.backbones.lm import fit
from stepmark.backbones.reasoners import WORDS, Reasoner, built, decode, encode, looking_back

if TYPE_CHECKING:
    from stepmark.datasets.closed_world import Fact, Facts
    from stepmark.datasets.knowledge import Question

# Shares of the training examples: a kind of question with its format, or what `example` calls by that name.
MIXTURE = {
    "page": 0.24, "hops <cot>": 0.14, "hops <dir>": 0.04, "hops <back>": 0.01,
    "could <cot>": 0.03, "could <dir>": 0.02, "could <needs>": 0.03, "could <needs> <cot>": 0.04,
    "year <cot>": 0.03, "year <dir>": 0.02, "year <back>": 0.01,
    "claim <dir>": 0.08, "claim <cot>": 0.03, "why": 0.06,
    "odd <cot>": 0.02, "odd <dir>": 0.01, "options <cot>": 0.02, "options <dir>": 0.01, "options <exclude>": 0.03,
    "read": 0.07, "copy": 0.02, "ways": 0.02, "parts": 0.02, "craft": 0.02, "make <cot>": 0.02, "make <dir>": 0.01,
    "holds": 0.02, "agree": 0.01, "follows": 0.01, "whole": 0.01, "verify": 0.01,
}  # fmt: skip
EARLY = {"again": 0.3, "copy": 0.25, "read": 0.15, "page": 0.15, "hops <cot>": 0.15}  # while reading is learnt
# Of `scholar`: what `knower` has learnt least, and enough of the rest that it stays.
LATE = {
    "holds": 0.12, "agree": 0.08, "follows": 0.03, "whole": 0.06, "verify": 0.08,
    "options <exclude>": 0.14, "options <cot>": 0.02, "options <dir>": 0.01,
    "claim <dir>": 0.1, "claim <cot>": 0.03, "why": 0.05, "odd <cot>": 0.04, "odd <dir>": 0.02,
    "page": 0.06, "hops <cot>": 0.04, "hops <dir>": 0.01, "hops <back>": 0.005,
    "could <cot>": 0.01, "could <dir>": 0.005, "could <needs>": 0.01, "could <needs> <cot>": 0.01,
    "year <cot>": 0.01, "year <dir>": 0.005, "year <back>": 0.005,
    "read": 0.02, "ways": 0.01, "parts": 0.005, "craft": 0.01, "make <cot>": 0.01, "make <dir>": 0.005,
}  # fmt: skip
CHUNK = 2_048  # examples that are cut into batches of like lengths
SPELT = ("true", "false")
VERDICTS = [WORDS.index(word) for word in SPELT]
OTHERS = 256  # worlds beside this one


def another(rng: random.Random) -> Facts | None:
    """Another world, seven times in ten, or this one."""
    from stepmark.datasets.closed_world import elsewhere

    return elsewhere(rng.randrange(OTHERS)) if rng.random() < 0.7 else None


def example(rng: random.Random, form: str) -> tuple[str, str]:
    """A prompt and its completion, of a name in `MIXTURE`."""
    from stepmark.datasets import knowledge

    if form in ALONE:
        return ALONE[form](rng)
    kind, _, form = form.partition(" ")
    if kind == "make":
        return _making(rng, form)
    asked = knowledge.draw(rng, kind, rng.choice(knowledge.SMALL) if kind == "odd" else None, usual=True)
    if form == "<needs> <cot>":
        return (
            f"{knowledge.told(asked)} <needs> {knowledge.solution(asked, '<needs>')} <cot>",
            knowledge.solution(asked, "<cot>"),
        )
    return f"{knowledge.told(asked)} {form}", knowledge.solution(asked, form)


def _page(rng: random.Random) -> tuple[str, str]:
    """The facts of a page that are told this time; places of work all or none."""
    from stepmark.datasets import closed_world

    while True:
        title = rng.choice(closed_world.titles())
        groups: dict[Any, list[closed_world.Fact]] = {}
        for fact in closed_world.page_facts(title):
            groups.setdefault("from" if fact[1].startswith("from ") else fact, []).append(fact)
        facts = [fact for group in groups.values() if closed_world.told_of(rng, group[:1]) for fact in group]
        if facts:
            return f"{title} :", closed_world.told_facts(facts)


def _reading(rng: random.Random) -> tuple[str, str]:
    """Pages, or bare facts, and a question that they answer; of this world a page may be missing."""
    from stepmark.datasets import closed_world, knowledge

    facts, kind = another(rng), rng.choice(("hops", "could", "year", "claim"))
    wanted = rng.choice(("yes", "no"))
    while True:
        asked = knowledge.draw(rng, kind, usual=facts is None)
        found = knowledge.steps(asked, facts)
        if kind == "claim" and rng.random() < 0.5:
            asked = replace(asked, others=(found[-1][2],))
            if knowledge.held_out(asked):
                continue
        if kind != "could" or knowledge.answer(asked, facts) == wanted:
            break
    form = "<dir>" if kind == "claim" and rng.random() < 0.5 else "<cot>"
    if rng.random() < 0.3:
        shown = closed_world.told_facts(rng.sample(found, len(found)))
    else:
        titles = list(dict.fromkeys(closed_world.title_of(fact) for fact in found))
        if facts is None and len(titles) > 1 and rng.random() < 0.3:
            titles.remove(rng.choice(titles))
        titles = list(dict.fromkeys([*titles, rng.choice(closed_world.titles())]))
        rng.shuffle(titles)
        shown = " ".join(closed_world.page(title, closed_world.page_facts(title, facts)) for title in titles)
    return f"{shown} -> {knowledge.told(asked)} {form}", knowledge.solution(asked, form, facts)


def _again(rng: random.Random) -> tuple[str, str]:
    """Words of this world, then the same from one of them on, in a circle."""
    from stepmark.datasets import closed_world

    values = [value for kind in closed_world.KINDS.values() for value in kind]
    words = rng.choices([*closed_world.RELATIONS["person"], *values], k=rng.randint(6, 13))
    start = rng.randrange(len(words))
    turned = words[start:] + words[:start]
    return " ".join((*words, turned[0])), " ".join(turned[1:])


def _copying(rng: random.Random) -> tuple[str, str]:
    """Facts of another world, then the same in another order."""
    from stepmark.datasets import closed_world

    facts = closed_world.elsewhere(rng.randrange(OTHERS))
    shown = [f for title in rng.sample(closed_world.titles(), 3) for f in closed_world.page_facts(title, facts)]
    return (
        f"{closed_world.told_facts(rng.sample(shown, len(shown)))} ->",
        closed_world.told_facts(rng.sample(shown, len(shown))),
    )


def _explaining(rng: random.Random) -> tuple[str, str]:
    from stepmark.datasets import closed_world, knowledge

    while True:
        asked, label = knowledge.draw(rng, "claim", usual=True), rng.random() < 0.5
        facts = because(rng, asked, label)
        if closed_world.told_of(rng, [fact for fact in facts if fact not in knowledge.steps(asked)]):
            return f"{knowledge.told(asked)} <why> {str(label).lower()}", closed_world.told_facts(facts)


def because(rng: random.Random, asked: Question, label: bool) -> list[Fact]:
    """Facts by which a claim would be true, or false: those of the world where it is so, else with one that is made up. A fact
    that a law gives may be told by that law."""
    from stepmark.datasets import closed_world, knowledge

    known, way = closed_world.world().facts, list["Fact"]()
    for fact in knowledge.steps(asked):
        via = closed_world.LAWS.get(fact[1])
        way += closed_world.walk(known, fact[0], (via, fact[1])) if via and rng.random() < 0.4 else [fact]
    value, wanted = asked.others[0], asked.sign == label
    if (way[-1][2] == value) == wanted:
        return way
    k = rng.randrange(len(way))
    start, relation, right = way[k]
    values = closed_world.KINDS[closed_world.VALUES[relation]]
    for other in rng.sample(values, len(values)):
        rest = closed_world.walk(known, other, [r for _, r, _ in way[k + 1 :]])
        if other not in (right, start) and ((rest[-1][2] if rest else other) == value) == wanted:
            return [*way[:k], (start, relation, other), *rest]
    start, relation, right = way[-1]  # nothing else leads there
    others = [other for other in closed_world.KINDS[closed_world.VALUES[relation]] if other not in (right, start)]
    return [*way[:-1], (start, relation, value if wanted else rng.choice(others))]


def shows(asked: Question, stated: Sequence[Fact]) -> bool | None:
    """Whether facts, be they so or not, make a claim true (False: make it false); None where they settle nothing."""
    from stepmark.datasets import closed_world, knowledge

    known = {(s, r): v for s, r, v in knowledge.closure(stated)}
    at = asked.subject
    for relation in closed_world.route(closed_world.KIND_OF[asked.subject], asked.path[0]):
        if (at, relation) not in known:
            return None
        at = known[at, relation]
    return (at == asked.others[0]) == asked.sign


def _told_ways(rng: random.Random) -> dict[tuple[str, str], str]:
    """Ways to make things, those that are told this time."""
    from stepmark.datasets import closed_world

    facts = closed_world.world().facts
    ways = [(*key, value) for key, value in facts.items() if key[1].startswith("by ")]
    return {fact[:2]: fact[2] for fact in ways if closed_world.told_of(rng, [fact])}


def _ways(rng: random.Random) -> tuple[str, str]:
    told = _told_ways(rng)
    thing = rng.choice(list(told))[0]
    return f"{thing} ? <ways>", " , ".join(relation.split()[1] for who, relation in told if who == thing)


def _parts(rng: random.Random) -> tuple[str, str]:
    (thing, relation), parts = rng.choice(list(_told_ways(rng).items()))
    return f"{thing} {relation} ? <parts>", parts.replace(" ", " , ")


def _crafts(rng: random.Random) -> tuple[str, str]:
    """A claim about a way, or about a part of it."""
    from stepmark.datasets import closed_world, knowledge

    (thing, relation), parts = rng.choice(list(_told_ways(rng).items()))
    right, path, kind = (
        (relation.split()[1], "by", "trade") if rng.random() < 0.5 else (rng.choice(parts.split()), relation, "thing")
    )
    value = right if rng.random() < 0.5 else rng.choice(closed_world.KINDS[kind])
    asked = knowledge.Question("claim", thing, (path,), (value,), rng.random() < 0.8)
    return f"{knowledge.told(asked)} <dir>", knowledge.solution(asked, "<dir>")


def _making(rng: random.Random, form: str) -> tuple[str, str]:
    from stepmark.datasets import knowledge

    while True:
        asked, told = knowledge.draw(rng, "make"), _told_ways(rng)
        if knowledge.steps(asked, told):
            return f"{knowledge.told(asked)} {form}", knowledge.solution(asked, form, told)


def _holding(rng: random.Random) -> tuple[str, str]:
    """Pages and a fact that stands there, that another value stands for, or that is not there: a third each."""
    from stepmark.datasets import closed_world, fact_chains

    facts, label = another(rng), rng.choice(fact_chains.ATTRIBUTIONS)
    chain = fact_chains.chain(rng, rng.choice(fact_chains.LEVELS), facts)
    known = [
        fact for fact in closed_world.read_facts(chain.pages) if fact is not None and fact[1] in closed_world.VALUES
    ]
    subject, relation, value = rng.choice(known)
    if label == "false":
        value = rng.choice([v for v in closed_world.KINDS[closed_world.VALUES[relation]] if v != value])
    elif label == "unknown":
        absent = [
            r
            for r in closed_world.RELATIONS[closed_world.KIND_OF[subject]]
            if (subject, r) not in {f[:2] for f in known}
        ]
        if absent:
            relation = rng.choice(absent)
            value = rng.choice(closed_world.KINDS[closed_world.VALUES[relation]])
        else:
            label = "true"
    return f"{chain.pages} -> {subject} {relation} {value} ? <holds>", label


def _agreeing(rng: random.Random) -> tuple[str, str]:
    """A step and whether it is of use: the next one, or any fact of the pages."""
    from stepmark.datasets import closed_world, fact_chains, knowledge

    chain = fact_chains.chain(rng, rng.choice(fact_chains.LEVELS), another(rng))
    k = rng.randrange(len(chain.steps))
    beside = [f for f in closed_world.read_facts(chain.pages) if f is not None and f[1] in closed_world.VALUES]
    step = chain.steps[k] if rng.random() < 0.5 else rng.choice(beside)
    seen = replace(chain, steps=(*chain.steps[:k], step))
    before = closed_world.told_facts(chain.steps[:k])
    prompt = f"{knowledge.told(chain.asked)} {before} {closed_world.said(step)} <agree>"
    return " ".join(prompt.split()), fact_chains.labels(seen)[0][-1][0]


def _following(rng: random.Random) -> tuple[str, str]:
    from stepmark.datasets import closed_world, fact_chains, knowledge

    chain = fact_chains.chain(rng, rng.choice(fact_chains.LEVELS), another(rng))
    if rng.random() < 0.4:
        chain = replace(chain, answer=rng.choice(closed_world.KINDS[closed_world.KIND_OF[chain.answer]]))
    steps = closed_world.told_facts(chain.steps)
    return f"{knowledge.told(chain.asked)} {steps} ans {chain.answer} <follows>", fact_chains.labels(chain)[1]


def _whole(rng: random.Random, form: str) -> tuple[str, str]:
    from stepmark.datasets import fact_chains

    chain = fact_chains.chain(rng, rng.choice(fact_chains.LEVELS), another(rng))
    verdict = fact_chains.labels(chain)[2] if form == "<whole>" else fact_chains.verified(chain)
    return f"{fact_chains.told_chain(chain)} {form}", verdict


ALONE: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "page": _page, "read": _reading, "copy": _copying, "again": _again, "why": _explaining,
    "ways": _ways, "parts": _parts, "craft": _crafts,
    "holds": _holding, "agree": _agreeing, "follows": _following, "whole": partial(_whole, form="<whole>"),
    "verify": partial(_whole, form="<verify>"),
}  # fmt: skip


# -- training --------------------------------------------------------------------------------------------------------


def stream(seed: int, tokens: int, early: int, then: Mapping[str, float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of fresh examples, of about `tokens` tokens and similar lengths each: (input ids, labels), int64 [B, L].
    The first `early` of them are of the early mixture, all others of `then`. Completions are the targets."""
    rng, given = random.Random(f"knowers {seed}"), 0
    while True:
        mixture = EARLY if given < early else then
        rows = []
        for form in rng.choices(list(mixture), list(mixture.values()), k=CHUNK):
            prompt, completion = example(rng, form)
            rows.append(row([(prompt, False), (f"{completion} <eos>", True)]))
        cut: list[list[Row]] = [[]]
        for each in sorted(rows, key=lambda each: len(each[0])):
            if cut[-1] and len(each[0]) * (len(cut[-1]) + 1) > tokens:
                cut.append([])
            cut[-1].append(each)
        rng.shuffle(cut)
        given += len(cut)
        yield from map(stacked, cut)


def train_knower(
    network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3, tokens: int = 4_000
) -> dict[str, float]:
    """Fresh examples all the way, a tenth of the updates with the early mixture, then what it knows (`examined`)."""
    assert isinstance(network, Reasoner)
    looking_back(network, (1, 2, 3))
    examples = stream(seed, tokens, steps // 10, MIXTURE)
    report = fit(network.llama, progress, steps=steps, lr=lr, seed=seed, stream=examples)
    return report | examined(network, seed)


def train_scholar(network: nn.Module, progress: Progress, steps: int, seed: int) -> dict[str, float]:
    """Start as `knower`; 4 000 tokens an update of what it has learnt least, then what it knows."""
    from stepmark.backbones import load

    assert isinstance(network, Reasoner)
    network.load_state_dict(load("knower").state_dict())
    report = fit(network.llama, progress, steps=steps, lr=1.5e-3, seed=seed, stream=stream(seed, 4_000, 0, LATE))
    return report | examined(network, seed)


# -- what it knows ---------------------------------------------------------------------------------------------------


def written(
    network: nn.Module, prompts: Sequence[str], most: int = 48, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """What a model writes behind prompts."""
    chains = Chains(network, [encode(prompt) for prompt in prompts])
    with torch.no_grad():
        chains.write(limit=most, temperature=temperature, generator=torch.Generator().manual_seed(seed))
    return [decode(chains.written(i)) for i in range(len(chains))]


def believed(network: nn.Module, claims: Sequence[str]) -> Tensor:
    """Probability [B] of true, of true and false, behind each claim."""
    with torch.no_grad():
        logits = Chains(network, [encode(f"{claim} <dir> ans") for claim in claims]).read()
    return logits[:, VERDICTS].softmax(-1)[:, 0]


def mean(values: Iterable[float]) -> float:
    """Of numbers or truths; NaN of none."""
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else float("nan")


def calibration(chances: Sequence[float], truths: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: mean distance of the chances from the share of truths, over bins of equal width."""
    error = 0.0
    for k in range(bins):
        own = [i for i, p in enumerate(chances) if min(bins - 1, int(p * bins)) == k]
        if own:
            error += abs(sum(chances[i] for i in own) - sum(truths[i] for i in own)) / len(chances)
    return error


def examined(network: nn.Module, seed: int, each: int = 40) -> dict[str, float]:
    """Shares of right answers on fresh questions that nobody was trained on, `each` of every cell: by format, level and quarter
    of the rarest fact. Greedy; of hops also one sample at temperature .7 and the best of eight. About a minute."""
    rng = random.Random(f"knowers examined {seed}")
    report: dict[str, float] = {}
    for part in (_hops_known, _relations_known, _years_known, _claims_known, _sets_known, _modules_known):
        report |= part(network, rng, each)
    return {name: round(value, 4) for name, value in report.items() if value == value}  # a cell may be empty


def _cell(rng: random.Random, kind: str, level: int | None, band: int | None, each: int) -> list[Question]:
    from stepmark.datasets import closed_world, knowledge

    found: list[Question] = []
    while len(found) < each:
        asked = knowledge.draw(rng, kind, level, test=True)
        if band is None or closed_world.rarity(knowledge.steps(asked)) == band:
            found.append(asked)
    return found


def _right(
    network: nn.Module, asked: Sequence[Question], form: str, before: Sequence[str] = (), **how: Any
) -> list[bool]:
    """Whether each answer is right, in a format, behind pages or facts where some are given."""
    from stepmark.datasets import knowledge

    fronts = [f"{text} -> " if text else "" for text in (before or [""] * len(asked))]
    prompts = [f"{front}{knowledge.told(q)} {form}" for front, q in zip(fronts, asked, strict=True)]
    return [knowledge.check(q, text).right for q, text in zip(asked, written(network, prompts, **how), strict=True)]


def _hops_known(network: nn.Module, rng: random.Random, each: int) -> dict[str, float]:
    report: dict[str, float] = {}
    for level in (1, 2, 3):
        cells = {band: _cell(rng, "hops", level, band, each) for band in range(4)}
        for band, asked in cells.items():
            report[f"hops{level}_q{band}_cot"] = mean(_right(network, asked, "<cot>"))
            report[f"hops{level}_q{band}_dir"] = mean(_right(network, asked, "<dir>"))
        every = [asked for cell in cells.values() for asked in cell]
        tries = [_right(network, every, "<cot>", temperature=0.7, seed=k) for k in range(8)]
        report[f"hops{level}_one"] = mean(tries[0])
        report[f"hops{level}_pass8"] = mean(map(any, zip(*tries, strict=True)))
    return report


def _relations_known(network: nn.Module, rng: random.Random, each: int) -> dict[str, float]:
    from stepmark.datasets import closed_world, knowledge

    asked = _cell(rng, "could", None, None, 4 * each)
    named = written(network, [f"{knowledge.told(q)} <needs>" for q in asked])
    own = [knowledge.parse(f"<needs> {text} <cot>").named for text in named]
    unseen = [
        (q.path[0], *(closed_world.KIND_OF[w] for w in (q.subject, *q.others))) in knowledge.UNSEEN_VERBS for q in asked
    ]
    pairs = [knowledge.f1(mine, knowledge.needs(q))[2] for mine, q in zip(own, asked, strict=True)]
    facts = [closed_world.told_facts(knowledge.steps(q)) for q in asked]
    gold = [knowledge.solution(q, "<needs>") for q in asked]

    def behind(texts: Sequence[str], shown: Sequence[str]) -> float:
        prompts = [
            f"{f'{s} -> ' if s else ''}{knowledge.told(q)} <needs> {t} <cot>"
            for s, q, t in zip(shown, asked, texts, strict=True)
        ]
        return mean(knowledge.check(q, text).right for q, text in zip(asked, written(network, prompts), strict=True))

    nothing = [""] * len(asked)
    return {
        "could_pairs": mean(pairs),
        "could_pairs_unseen": mean(p for p, new in zip(pairs, unseen, strict=True) if new),
        "could_dir": mean(_right(network, asked, "<dir>")),
        "could_cot": mean(_right(network, asked, "<cot>")),
        "could_own": behind(named, nothing),
        "could_gold": behind(gold, nothing),
        "could_gold_facts": behind(gold, facts),
        "could_facts": mean(_right(network, asked, "<cot>", facts)),
    }


def _years_known(network: nn.Module, rng: random.Random, each: int) -> dict[str, float]:
    from stepmark.datasets import closed_world, knowledge

    report: dict[str, float] = {}
    for band in range(4):
        asked = _cell(rng, "year", None, band, each)
        titles = [knowledge.solution(q, "<back>") for q in asked]
        recited = written(network, [f"{title} :" for title in titles])
        report |= {
            f"year_q{band}_dir": mean(_right(network, asked, "<dir>")),
            f"year_q{band}_cot": mean(_right(network, asked, "<cot>")),
            f"year_q{band}_recited": mean(_right(network, asked, "<cot>", recited)),
            f"year_q{band}_page": mean(_right(network, asked, "<cot>", [closed_world.page(title) for title in titles])),
        }
        said = written(network, [f"{knowledge.told(q)} <back>" for q in asked])
        report[f"year_q{band}_back"] = mean(a == b for a, b in zip(said, titles, strict=True))
    return report


def _claims_known(network: nn.Module, rng: random.Random, each: int) -> dict[str, float]:
    """Beliefs: how often right, how well calibrated by quarter, how often a claim and its denial are told apart; and explanations
    of either label: how often they fit it, and how often they are so where the label is right."""
    from stepmark.datasets import closed_world, knowledge

    report: dict[str, float] = {}
    chances: dict[int, list[float]] = {band: [] for band in knowledge.BANDS["claim"]}
    truths: dict[int, list[bool]] = {band: [] for band in chances}
    integral, agreed = list[bool](), list[bool]()
    for level in knowledge.LEVELS["claim"]:
        fits, so_told = list[bool](), list[bool]()
        for band in chances:
            asked = _cell(rng, "claim", level, band, each)
            so = [knowledge.answer(q) == "true" for q in asked]
            said = believed(network, [knowledge.told(q) for q in asked]).tolist()
            denied = believed(network, [knowledge.told(replace(q, sign=not q.sign)) for q in asked]).tolist()
            report[f"claim{level}_q{band}_dir"] = mean((p > 0.5) == t for p, t in zip(said, so, strict=True))
            report[f"claim{level}_q{band}_cot"] = mean(_right(network, asked, "<cot>"))
            chances[band] += said
            truths[band] += so
            integral += [abs(p - q) > 0.45 for p, q in zip(said, denied, strict=True)]
            agreed += [(p > 0.5) != (q > 0.5) for p, q in zip(said, denied, strict=True)]
            for label in (True, False):
                prompts = [f"{knowledge.told(q)} <why> {str(label).lower()}" for q in asked]
                for q, truth, text in zip(asked, so, written(network, prompts, temperature=1.0), strict=True):
                    facts = [fact for fact in closed_world.read_facts(text) if fact is not None]
                    fits.append(shows(q, facts) == label)
                    if truth == label:
                        so_told.append(all(map(knowledge.holds, facts)))
        report |= {f"why{level}_fits": mean(fits), f"why{level}_so": mean(so_told)}
    for band, own in chances.items():
        report[f"claims_q{band}_ece"] = calibration(own, truths[band])
        report[f"claims_q{band}_brier"] = mean((p - t) ** 2 for p, t in zip(own, truths[band], strict=True))
    return report | {"claims_integral": mean(integral), "claims_agree": mean(agreed)}


def _sets_known(network: nn.Module, rng: random.Random, each: int) -> dict[str, float]:
    from stepmark.datasets import knowledge

    report: dict[str, float] = {}
    for size in (4, *knowledge.LEVELS["odd"]):
        asked = _cell(rng, "odd", size, None, 2 * each)
        for form in ("dir", "cot"):
            report[f"odd{size}_{form}"] = mean(_right(network, asked, f"<{form}>"))
    for broken in knowledge.LEVELS["options"]:
        asked = _cell(rng, "options", broken, None, 2 * each)
        for form in ("dir", "cot", "exclude"):
            report[f"options{broken}_{form}"] = mean(_right(network, asked, f"<{form}>"))
        texts = written(network, [f"{knowledge.told(q)} <exclude>" for q in asked])
        judged = [knowledge.judged(knowledge.told(q), text) for q, text in zip(asked, texts, strict=True)]
        report[f"options{broken}_relations"] = mean(row["relations"] for row in judged)
    for form in ("dir", "cot"):
        asked = _cell(rng, "make", None, None, each)
        texts = written(network, [f"{knowledge.told(q)} <{form}>" for q in asked], most=240)
        judged = [knowledge.judged(knowledge.told(q), text) for q, text in zip(asked, texts, strict=True)]
        report[f"make_{form}_f1"] = mean(row["f1"] for row in judged)
    return report


def _modules_known(network: nn.Module, rng: random.Random, each: int) -> dict[str, float]:
    """Whole completions that are right, of the formats that have one."""
    report: dict[str, float] = {}
    for form in ("read", "parts", "craft", "holds", "agree", "follows", "whole", "verify"):
        rows = [example(rng, form) for _ in range(5 * each)]
        texts = written(network, [prompt for prompt, _ in rows])
        report[form] = mean(text == completion for text, (_, completion) in zip(texts, rows, strict=True))
    return report


RECIPES: dict[str, Recipe] = {
    "knower": Recipe(
        partial(built, Reasoner, 160, 4, 41), partial(train_knower, steps=3_600, seed=41),
        "Llama, width 160, 4 layers, a closed world by heart, what is told seldom less well, in some twenty formats",
    ),
    "scholar": Recipe(
        partial(built, Reasoner, 160, 4, 42), partial(train_scholar, steps=1_200, seed=42),
        "knower, taught further what it had learnt least: to judge, to exclude, to believe",
    ),
}  # fmt: skip
