"""What tests of reasoning methods share: tiny random models, scripted ones, sessions, and a run of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tests.rigs.decoding import load as load
from tests.rigs.decoding import module_of as module_of
from torch import Tensor, nn

from stepmark.backbones.reasoners import EOS, SIZE, KeyValues, Reasoner, Verifier, built, decode, encode
from stepmark.meter.counts import Ledger, watch


def tiny(seed: int, width: int = 32, depth: int = 2) -> Any:
    """A random reasoner, with weights large enough for texts that wander."""
    model = built(Reasoner, width, depth, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval().requires_grad_(False)


class Scripted(nn.Module):
    """In the place of a reasoner: its next token has the probabilities that `says` gives to a text.

    `says`: text (words) -> {word: probability}; what is missing to 1 is shared by all other words. Its final states are these
    logarithms too. It keeps the texts that it has been asked to go on with in `asked`.
    """

    def __init__(self, says: Callable[[str], dict[str, float]]) -> None:
        super().__init__()
        self.says, self.asked = says, list[str]()
        self.config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=1, hidden_size=SIZE)
        self.llama = nn.Module()
        self.llama.config = self.config  # type: ignore[assignment]
        self.llama.model = nn.Module()
        self.llama.model.embed_tokens = nn.Embedding(SIZE, 4)
        self.device = torch.device("cpu")

    def hold(self, rows: int, states: bool = False) -> KeyValues:
        """As a reasoner's."""
        return KeyValues(rows, states)

    def forward(
        self, ids: Tensor, held: KeyValues | None = None, lengths: Tensor | None = None, states: bool = False
    ) -> Tensor:
        """Log-probabilities [B, T, V] after each token. A token's id is kept where keys would be."""
        rows, count = ids.shape
        lengths = torch.full((rows,), count) if lengths is None else lengths
        found = torch.zeros(rows, count, SIZE)
        held = KeyValues(rows) if held is None else held
        held.room(self, int(held.lengths[:rows].max()) + count)  # type: ignore[arg-type]
        for row in range(rows):
            start = int(held.lengths[row])
            for k in range(int(lengths[row])):
                held.keys[0][row, start + k] = float(ids[row, k])
                text = [int(x) for x in held.keys[0][row, : start + k + 1].flatten()]
                said = {encode(word)[0]: p for word, p in self.says(decode(text)).items()}
                rest = max(1e-9, 1 - sum(said.values())) / (SIZE - len(said))
                found[row, k] = torch.full((SIZE,), rest).log()
                for token, p in said.items():
                    found[row, k, token] = torch.tensor(max(p, 1e-9)).log()
            self.asked.append(decode(text))
            if held.stateful:
                held.states[0][row, start : start + int(lengths[row])] = found[row, : int(lengths[row])]
        held.lengths[:rows] += lengths
        return found


class Judge(nn.Module):
    """In the place of a verifier: `says`: text (words) -> probability that all is well."""

    def __init__(self, says: Callable[[str], float]) -> None:
        super().__init__()
        self.says = says
        self.reader = SimpleNamespace(device=torch.device("cpu"))

    def forward(self, ids: Tensor, held: Any = None, lengths: Any = None) -> Tensor:
        """Logits [B, T]."""
        said = [[self.says(decode(row[: k + 1].tolist())) for k in range(len(row))] for row in ids]
        return torch.tensor(said).clamp(1e-6, 1 - 1e-6).logit()


class Session(SimpleNamespace):
    """What `run` sees, everything counted as the harness counts it."""

    @property
    def spent(self) -> float:
        """Rows of the bounded networks so far."""
        return float(self.ledger.spent)

    @property
    def limit(self) -> float:
        """Rows that may be spent."""
        return float(self.ledger.limit)


def session_of(seed: int = 0, task: str = "deduce/chains", **networks: nn.Module) -> Session:
    """A session of a task with these networks by role."""
    ledger = Ledger(bounded=("model", "small", "large"))
    for name, model in networks.items():
        for part in model.modules():
            part.__dict__.pop("forward", None)
        watch(ledger, name, model, [])
    rng = torch.Generator().manual_seed(seed)
    asked = SimpleNamespace(id=task)
    return Session(task=asked, networks=networks, state={}, rng=rng, device=torch.device("cpu"), ledger=ledger)


def run(method: Any, session: Session, questions: Sequence[str], rung: int) -> list[str]:
    """The texts that a method returns for questions, as words; the end of the sequence is left out."""
    session.ledger.reset(limit=rung * len(questions), items=len(questions))
    with torch.no_grad():
        found = method.run(session, {"question": [encode(question) for question in questions]}, rung)
    assert all(EOS not in text[:-1] for text in found)
    return [decode(text) for text in found]


__all__ = ["Judge", "Reasoner", "Scripted", "Session", "Verifier", "load", "module_of", "run", "session_of", "tiny"]
