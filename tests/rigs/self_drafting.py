"""What tests of methods that draft with the target itself share: an adapter, small windows, a session, a test of texts."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import stats
from stepmark.methods.decoding.kangaroo import ExitAdapter
from torch import Tensor, nn

from rigs import decoding as rig
from stepmark import plugins
from stepmark.meter.counts import Ledger, watch
from stepmark.tracks import decoding

TASKS = {task.id: task for task in decoding.TASKS}
SMALL = {"lookahead_decoding": {"W": 4, "N": 4, "G": 3}, "jacobi": {"WINDOW": 5}}


def adapter_of(model: nn.Module, seed: int = 0) -> nn.Module:
    """An untrained adapter: bad drafts on purpose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ExitAdapter(model).eval().requires_grad_(False)


def load(name: str, **constants: Any) -> Any:
    """A method with small windows; of the constants, which are those of several methods, it gets its own."""
    kind = plugins.load_class(plugins.methods()[name])
    own = {c: v for c, v in constants.items() if hasattr(kind, c) or c in kind.run.__globals__}
    return rig.load(name, **SMALL.get(name, {}) | own)


def session_of(model: nn.Module, seed: int = 0, skipped: Tensor | None = None, adapter: nn.Module | None = None) -> Any:
    """What `run` sees, with everything counted as the harness counts it."""
    ledger = Ledger(bounded=("target",))
    for part in model.modules():
        part.__dict__.pop("forward", None)
    layers = decoding.layers(TASKS["greedy/sums"], "target", model)
    watch(ledger, "target", model, layers)
    if skipped is None:
        skipped = torch.rand(len(layers), 2, generator=torch.Generator().manual_seed(seed)) < 0.4
    return SimpleNamespace(
        networks={"target": model, "adapter": adapter or adapter_of(model, seed)},
        state={"skipped": skipped},
        rng=torch.Generator().manual_seed(seed),
        device=torch.device("cpu"),
        ledger=ledger,
    )


def p_value(texts: list[tuple[int, ...]], probabilities: np.ndarray, vocabulary: int) -> float:
    """Of texts of one length against the probabilities of all such texts, by a chi-square test."""
    length = len(texts[0])
    counts = Counter(texts)
    observed = np.array([counts[text] for text in itertools.product(range(vocabulary), repeat=length)])
    keep = probabilities * len(texts) >= 5
    observed = np.append(observed[keep], observed[~keep].sum())
    expected = np.append(probabilities[keep], probabilities[~keep].sum()) * len(texts)
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    return float(stats.chisquare(observed, expected).pvalue)
