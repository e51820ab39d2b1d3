"""Methods that look again or ahead with the target: HARP's second pass, Medusa's heads."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rigs.decoding import load, run, tiny, truth_of
from scipy import stats
from torch import Tensor

from stepmark.backbones import lm
from stepmark.meter.counts import Ledger, watch
from stepmark.tracks.decoding.decoder import Decoder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def session_of(model: Any, seed: int = 0) -> Any:
    """What `run` sees, with everything counted as the harness counts it."""
    ledger = Ledger(bounded=("target",))
    for part in model.modules():
        part.__dict__.pop("forward", None)
    watch(ledger, "target", model, list(model.model.layers))
    rng = torch.Generator().manual_seed(seed)
    return SimpleNamespace(networks={"target": model}, state={}, rng=rng, device=torch.device("cpu"), ledger=ledger)


# -- HARP -------------------------------------------------------------------------------------------------------------


def harp(**settings: float) -> Any:
    method = load("harp")
    for name, value in settings.items():
        setattr(method, name, value)
    return method


def test_harp_without_hesitation_or_without_drops_is_greedy_decoding() -> None:
    for seed in range(4):
        model, prompt, truth = truth_of(seed)
        session = session_of(model)
        assert run(harp(theta=1e9), session, [prompt], 30, 1000)[0] == truth
        assert session.ledger.spent == len(truth)
        assert run(harp(theta=-1.0, delta=0.0), session, [prompt], 30, 1000)[0] == truth
        assert session.ledger.spent == 2 * len(truth), "not one second pass a token"
        short = run(harp(theta=-1.0, delta=0.0), session, [prompt], 30, 7)[0]
        assert short == truth[: len(short)]
        assert session.ledger.spent <= 7


def test_harp_mixes_clean_logits_with_those_of_the_dropped_embeddings() -> None:
    """Every token is recomputed without caches from the same masks; a second pass that left traces in the cache of the
    first, or masks of other positions, would change the text."""
    hesitated = 0
    for seed in range(4):
        model, prompt, _ = truth_of(seed)
        session = session_of(model, seed)
        got = run(harp(theta=1.5 / math.log(2), beta=0.3), session, [prompt], 20, 1000)[0]
        rng, tokens = torch.Generator().manual_seed(seed), list(prompt)
        with torch.no_grad():
            for token in got:
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                p = logits.softmax(-1)
                if float(stats.entropy(p.double().numpy(), base=2)) > 1.5 / math.log(2):
                    embedded = model.model.embed_tokens(torch.tensor([tokens]))
                    kept = torch.rand(embedded.shape, generator=rng) >= 0.2
                    other = model(inputs_embeds=embedded * kept, use_cache=False).logits[0, -1]
                    logits, hesitated = 0.3 * logits + 0.7 * other, hesitated + 1
                assert token == int(logits.argmax())
                tokens.append(token)
    assert hesitated > 5


# -- Medusa -----------------------------------------------------------------------------------------------------------

TREE = [(0,), (1,), (0, 0), (2,), (0, 2), (1, 1), (0, 2, 0), (1, 1, 3), (0, 2, 0, 1)]


def medusa_session(model: Any, heads: Any) -> Any:
    session = session_of(model)
    session.networks["heads"] = heads
    session.state["tree"] = torch.tensor([[*path, *[-1] * (4 - len(path))] for path in TREE])
    return session


def test_medusa_with_bad_heads_is_greedy_decoding() -> None:
    kept = 0
    for seed in range(8):
        model, prompt, truth = truth_of(seed)
        method = load("medusa")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = method.run.__globals__["MedusaHeads"](model)
            for parameter in heads.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
        session = medusa_session(model, heads)
        for budget in (1, 2, 5, 9, 1000):
            got = run(method, session, [prompt], 30, budget)[0]
            assert got == truth[: len(got)]
            assert len(got) >= min(budget, len(truth)), "fewer than one token per forward"
            assert session.ledger.spent <= budget
        assert got == truth
        kept += len(got) - int(session.ledger.spent)
    assert kept > 0, "no guess is ever accepted"


@pytest.mark.parametrize("path", [(0, 2, 0, 1), (1, 1, 3), (0, 0), (2,)])
def test_medusa_keeps_the_whole_branch_that_is_right(path: tuple[int, ...], decoders: list[Decoder]) -> None:
    """Heads that put the true tokens at the ranks of one branch, and others elsewhere: that branch is kept each time.

    The tokens after a kept branch come from keys and values moved from the tree into place, so wrong positions, a
    wrong mask or a wrong move would show in the text that follows.
    """
    for seed in range(4):
        model, prompt, truth = truth_of(seed)

        def oracle(hidden: Tensor, prompt: list[int] = prompt, truth: list[int] = truth) -> Tensor:
            known = decoders[-1].length + 1 - len(prompt)  # new tokens so far
            logits = torch.randn(1, 4, 13, generator=torch.Generator().manual_seed(known))
            for k, rank in enumerate(path):
                token = truth[known + k] if known + k < len(truth) else 5
                order = [word for word in logits[0, k].argsort(descending=True).tolist() if word != token]
                order.insert(rank, token)
                logits[0, k, order] = torch.arange(13, 0, -1.0)
            return logits

        session = medusa_session(model, oracle)
        got = run(load("medusa"), session, [prompt], 30, 1000)[0]
        assert got == truth
        assert session.ledger.spent <= 1 + -(-(len(truth) - 1) // (len(path) + 1))


def test_untrained_medusa_heads_repeat_the_target() -> None:
    model = tiny(3)
    heads = load("medusa").run.__globals__["MedusaHeads"](model)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(heads(hidden), model.lm_head(hidden)[:, None].expand(-1, 4, -1))


def test_medusas_heads_are_residual_blocks_of_the_paper() -> None:
    """softmax(W2 (SiLU(W1 h + b) + h)) of every head by itself."""
    heads = load("medusa").run.__globals__["MedusaHeads"](tiny(3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        hidden = torch.randn(5, 16, generator=generator)
        for k, (block, output) in enumerate(zip(heads.blocks, heads.outputs, strict=True)):
            inner = hidden @ block.weight.t() + block.bias
            wanted = (inner * inner.sigmoid() + hidden) @ output.weight.t()
            torch.testing.assert_close(heads(hidden)[:, k], wanted, rtol=1e-4, atol=1e-4)


def test_medusas_heads_learn_what_stands_ahead_of_answers() -> None:
    """Head k from the target's last state, normalised, for the token k + 1 places on, its loss weighed by 0.8^k; the
    accuracies are those of the trained heads on batches that they were not trained on."""
    names = load("medusa").run.__globals__
    model = lm.build(32, 2, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.eval().requires_grad_(False)
    heads, read, said, pulled = names["MedusaHeads"](model), list[Tensor](), list[Tensor](), list[Tensor]()

    def note(_: Any, given: Any, output: Tensor) -> None:
        read.append(given[0])
        if output.requires_grad:
            said.append(output.detach())
            output.register_hook(pulled.append)

    heads.register_forward_hook(note)
    words = torch.randint(6, 140, (60, 16), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [(lm.decode(row[:6]), lm.decode(row[6:])) for row in words]
    session = SimpleNamespace(
        networks={"target": model, "heads": heads},
        train={"prompt": [prompt for prompt, _ in texts], "target": [text for _, text in texts]},
        scale=lambda embedded, smoke: smoke,
        seed=0,
        device=torch.device("cpu"),
        progress=lambda steps, says: steps,
    )
    with torch.enable_grad():
        found = names["train_heads"](session)
    rows = [(lm.encode(prompt), [*lm.encode(text), lm.EOS]) for prompt, text in texts]
    states, ahead = list[Tensor](), list[Tensor]()
    for ids, labels in itertools.islice(lm.batches(rows, 300, 0), 3):
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state
        places = (labels >= 0).nonzero().tolist()
        told = [[*row, *[-100] * 4] for row in labels.tolist()]
        states.append(torch.stack([hidden[row, i] for row, i in places]))
        ahead.append(torch.tensor([[told[row][i + k] for k in range(1, 5)] for row, i in places]))
    for number, logits in enumerate(said[:2]):  # the first batch is held back
        q, labels = logits.softmax(-1), ahead[1 + number]
        torch.testing.assert_close(read[number], states[1 + number])
        for k in range(4):
            known = labels[:, k] >= 0
            wanted = torch.zeros_like(q[:, k])
            one = torch.nn.functional.one_hot(labels[known, k], q.shape[2])
            wanted[known] = 0.8**k * (q[known, k] - one) / known.sum()
            torch.testing.assert_close(pulled[number][:, k], wanted, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        guesses = heads(states[0]).topk(6).indices
    for k in range(4):
        known = ahead[0][:, k] >= 0
        right = (guesses[known, k] == ahead[0][known, k, None]).double().mean(0).sort(descending=True).values
        torch.testing.assert_close(found["accuracy"][k].double(), right, rtol=1e-4, atol=1e-5)


def test_chain_and_tree_stand_on_the_same_heads() -> None:
    """One training for both; the chain is the first guess of every head, the tree has it and more."""
    weights = {"outputs.0.weight": torch.ones(2)}
    falling = torch.tensor([0.6, 0.3, 0.05, 0.03, 0.01, 0.01]).expand(4, 6)
    asked: list[str] = []

    def once(function: Any) -> dict[str, Tensor]:
        asked.append(function.__name__)
        return weights | {"accuracy": falling}

    trees = {}
    for name in ("medusa", "medusa_chain"):
        loaded: list[Any] = []
        heads = SimpleNamespace(load_state_dict=loaded.append)
        trees[name] = load(name).prepare(SimpleNamespace(networks={"heads": heads}, once=once))["tree"].tolist()
        assert loaded == [weights]
    assert asked == ["train_heads"] * 2
    assert trees["medusa_chain"] == [[0, -1, -1, -1], [0, 0, -1, -1], [0, 0, 0, -1], [0, 0, 0, 0]]
    assert len(trees["medusa"]) == 20 and [0, 0, 0, 0] in trees["medusa"] and [1, -1, -1, -1] in trees["medusa"]


def test_medusa_tree_holds_the_likeliest_paths() -> None:
    build = load("medusa").run.__globals__["sparse_tree"]
    accuracy = torch.rand(3, 4, generator=torch.Generator().manual_seed(2)).sort(dim=1, descending=True).values
    every = [path for depth in (1, 2, 3) for path in itertools.product(range(4), repeat=depth)]
    likely = {path: float(np.prod([accuracy[k, r] for k, r in enumerate(path)])) for path in every}
    tree = build(accuracy, 15)
    assert set(tree) == set(sorted(every, key=lambda path: -likely[path])[:15])
    assert all(path[:-1] in tree[:i] or len(path) == 1 for i, path in enumerate(tree)), "a child before its parent"
