"""Track reasoning, tasks of knowledge: a closed world known by heart, common facts better than rare ones.

The datasets tell the questions and formats: `stepmark.datasets.knowledge`, and `stepmark.datasets.fact_chains` for know/chains.

accuracy: share whose text ends in the right answer; answered: in an answer of the kind that is asked for. valid: share whose
facts are all so as well, and from which, with one law each, the answer follows. found: share of the pages that hold the
facts needed among those that a text names (``see TITLE .``). pairs: F1 of the relations that it names between ``<needs>`` and
``<cot>``. agree: share of questions answered as their twins are, a claim and its denial oppositely, a set in two orders
alike. relations: share of options rightly called impossible, likely or sure. f1, precision, recall: of the things named.

Of some questions only, accuracy as far (over two or three facts), rare (one of them among the rarer half), unseen (a verb
between such things was never met), large (sets of 7 and 8), refutable (two or three options break a law).

Of chains, macro F1 over all questions together, what is not said counting as wrong: chain (is all of it right?), attribution
(steps by the pages), logic (does the answer follow?), relevance (of steps); and shares of the steps rightly called supported,
and contradicted. Whoever calls all chains right has a macro F1 of 1/3, about.

What chance gives: could and claims 1/2; odd 1/5 to 1/8; options 1/4, and .61 by an exact exclusion with a guess among the rest;
years .4 by always taking the second place of work.
"""

from __future__ import annotations

from stepmark.task import Task
from stepmark.tracks.reasoning import check as check
from stepmark.tracks.reasoning import handles as handles
from stepmark.tracks.reasoning import inputs as inputs
from stepmark.tracks.reasoning import layers as layers
from stepmark.tracks.reasoning import reference_call as reference_call
from stepmark.tracks.reasoning import score as score

TASKS = (
    Task(
        id="know/hops",
        version=1,
        summary="1 to 3 relations over facts known by heart, common and rare",
        dataset="knowledge",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "found": "higher",
            "far": "higher",
            "rare": "higher",
            "written": "lower",
        },
        n=480,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/could",
        version=1,
        summary="Yes or no by relations that the question does not name",
        dataset="knowledge",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "pairs": "higher",
            "unseen": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/years",
        version=1,
        summary="Where somebody worked in a year, of people about whom nobody has asked",
        dataset="knowledge",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "found": "higher",
            "rare": "higher",
            "written": "lower",
        },
        n=320,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/claims",
        version=1,
        summary="Claims and their denials, true or false, about what is known more or less well",
        dataset="knowledge",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "agree": "higher",
            "far": "higher",
            "rare": "higher",
            "written": "lower",
        },
        n=480,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/odd",
        version=1,
        summary="The odd one out of 5 to 8, more than the model has seen but for 5, in two orders",
        dataset="knowledge",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128, 256),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "valid": "higher",
            "agree": "higher",
            "large": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/options",
        version=1,
        summary="One of four options, of which 1 to 3 break a law, about facts that are seldom told",
        dataset="knowledge",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 32, 64, 128),
        metrics={
            "accuracy": "higher",
            "answered": "higher",
            "relations": "higher",
            "refutable": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/make",
        version=1,
        summary="What can be made on the way to a thing, by alternatives and their parts",
        dataset="knowledge",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512, 1024),
        metrics={
            "f1": "higher",
            "precision": "higher",
            "recall": "higher",
            "written": "lower",
        },
        n=200,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="know/chains",
        version=1,
        summary="What each step of a chain is worth, and the whole, held against pages",
        dataset="fact_chains",
        backbones={"model": "scholar"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(4, 16, 32, 64),
        metrics={
            "chain": "higher",
            "attribution": "higher",
            "logic": "higher",
            "relevance": "higher",
            "supported": "higher",
            "contradicted": "higher",
            "answered": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(16,),
        probe=4,
    ),
)
