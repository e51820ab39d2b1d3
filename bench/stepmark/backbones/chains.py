"""Texts that one model writes side by side: sampled, forked, scored, pruned, at one call of the model per token of all.

What a text costs: a row of a call for each token that is sampled (the row that reads the prompt gives the first one), and a
row for each piece that is put in from outside, however long. Tokens of which nothing is asked any more cost nothing: what
stands at the end of a text is only read when its next token is wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from stepmark.backbones.reasoners import EOS, KeyValues, Reasoner


class Chains:
    """B texts of one `Reasoner`.

    Attributes:
        texts: token ids of each, the prompt in front.
        logprobs: of each token of each text, its log-probability at temperature 1; 0 for those put in from outside.
        starts: where each text's own part begins, behind the prompt.
    """

    def __init__(self, model: Reasoner, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.texts = [list(prompt) for prompt in prompts]
        self.logprobs = [[0.0] * len(prompt) for prompt in prompts]
        self.starts = [len(prompt) for prompt in prompts]
        self._held = KeyValues(len(self.texts))
        self._row = list(range(len(self.texts)))  # of each text, its row of `_held`
        self._next: dict[int, Tensor] = {}  # by text, logits [V] after its last token, where they are known

    def __len__(self) -> int:
        return len(self.texts)

    def written(self, i: int) -> list[int]:
        """What stands behind the prompt of text i."""
        return self.texts[i][self.starts[i] :]

    def ended(self, i: int) -> bool:
        """Whether text i ends with the end-of-sequence token."""
        return self.texts[i][-1] == EOS

    def put(self, i: int, tokens: Sequence[int]) -> None:
        """Append tokens to text i from outside. They are read with the next call that asks for what follows."""
        self.texts[i] += list(tokens)
        self.logprobs[i] += [0.0] * len(tokens)
        self._next.pop(i, None)

    def cut(self, i: int, length: int) -> None:
        """Forget all tokens of text i but the first `length`. Costs nothing."""
        del self.texts[i][length:]
        del self.logprobs[i][length:]
        row = self._row[i]
        self._held.lengths[row] = min(int(self._held.lengths[row]), length - 1)
        self._next.pop(i, None)

    def take(self, chosen: Sequence[int]) -> Chains:
        """New texts that begin as the chosen ones stand. One may be chosen several times: it is read once for all of them."""
        chosen = list(chosen)
        self.read([i for i, times in Counter(chosen).items() if times > 1 and not self.ended(i)])
        other = Chains(self.model, [])
        other.texts = [list(self.texts[i]) for i in chosen]
        other.logprobs = [list(self.logprobs[i]) for i in chosen]
        other.starts = [self.starts[i] for i in chosen]
        other._held = self._held.take([self._row[i] for i in chosen])
        other._row = list(range(len(chosen)))
        other._next = {new: self._next[i] for new, i in enumerate(chosen) if i in self._next}
        return other

    def read(self, chosen: Sequence[int] | None = None) -> Tensor:
        """Logits [B, V] of the next token of the chosen texts (default: all), after one call where some are not known."""
        chosen = list(range(len(self.texts))) if chosen is None else list(chosen)
        behind = [i for i in chosen if i not in self._next]
        if behind:
            pieces = self._forward(behind)
            for i, piece in zip(behind, pieces, strict=True):
                self._next[i] = piece[-1]
        return torch.stack([self._next[i] for i in chosen]) if chosen else torch.empty(0)

    def score(self, chosen: Sequence[int], pieces: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token of a piece put behind each chosen text; the pieces stay. One call."""
        first = self.read(chosen).log_softmax(-1)
        for i, piece in zip(chosen, pieces, strict=True):
            self.texts[i] += list(piece)
            self._next.pop(i, None)
        found = []
        for i, before, piece, logits in zip(chosen, first, pieces, self._forward(chosen), strict=True):
            table = torch.cat([before[None], logits.log_softmax(-1)])
            each = [float(table[k, token]) for k, token in enumerate(piece)]
            self.logprobs[i] += each
            self._next[i] = logits[-1]
            found.append(each)
        return found

    def write(
        self,
        chosen: Sequence[int] | None = None,
        *,
        stop: Collection[int] = (),
        limit: int | Sequence[int],
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        top_p: float = 1.0,
        adjust: Callable[[list[int], Tensor], Tensor] | None = None,
    ) -> list[list[int]]:
        """Sample on until a token of `stop` or the end of the sequence is written, or `limit` tokens are.

        Args:
            chosen: the texts that go on; those that have ended write nothing. Default: all.
            limit: most tokens, of all or of each chosen text.
            temperature: 0: the likeliest token. top_p: sample from the smallest set that holds so much (Holtzman 2020).
            adjust: (texts by number, logits [A, V]) -> logits, before a token is drawn.

        Returns: the new tokens of each chosen text.
        """
        chosen = list(range(len(self.texts))) if chosen is None else list(chosen)
        limits = dict(zip(chosen, [limit] * len(chosen) if isinstance(limit, int) else limit, strict=True))
        new: dict[int, list[int]] = {i: [] for i in chosen}
        ends = {EOS, *stop}
        going = [i for i in chosen if not self.ended(i) and limits[i] > 0]
        while going:
            logits = self.read(going)
            known = logits.log_softmax(-1)
            drawn = _draw(logits if adjust is None else adjust(going, logits), temperature, top_p, generator)
            each = known.gather(1, drawn[:, None].to(known.device))[:, 0].tolist()
            for i, token, logprob in zip(going, drawn.tolist(), each, strict=True):
                self.texts[i].append(token)
                self.logprobs[i].append(logprob)
                self._next.pop(i, None)
                new[i].append(token)
            going = [i for i in going if new[i][-1] not in ends and len(new[i]) < limits[i]]
        return [new[i] for i in chosen]

    def _forward(self, chosen: Sequence[int]) -> list[Tensor]:
        """One call over what the chosen texts have not been read of yet: logits [T, V] after each such token."""
        for row, i in enumerate(chosen):  # the rows in use stand first, so that the others are not run
            self._bring(i, row)
        lengths = self._held.lengths
        pieces = [self.texts[i][int(lengths[row]) :] for row, i in enumerate(chosen)]
        longest = max(map(len, pieces))
        ids = torch.tensor([[*piece, *[0] * (longest - len(piece))] for piece in pieces], device=self.model.device)
        logits = self.model(ids, self._held, torch.tensor([len(piece) for piece in pieces]))
        return [part[: len(piece)] for part, piece in zip(logits, pieces, strict=True)]

    def _bring(self, i: int, row: int) -> None:
        if self._row[i] != row:
            other = self._row.index(row)
            self._held.swap(self._row[i], row)
            self._row[i], self._row[other] = row, self._row[i]


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """A token [A] of each row of logits [A, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
