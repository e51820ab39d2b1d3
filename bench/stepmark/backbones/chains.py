"""Texts that one model writes side by side: sampled, forked, checked, pruned, at one call of the model per token of all.

What a text costs: a row of a call for each token that is sampled (the row that reads the prompt gives the first one), and a
row for each piece that is put in from outside, however long. Tokens of which nothing is asked any more cost nothing: what
stands at the end of a text is only read when its next token, or its state, is wanted. Whoever looks at the state of a token
pays for reading it, and not again when the text goes on: that row gives the next token too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from stepmark.backbones.reasoners import EOS, Reasoner


class Chains:
    """B texts of one `Reasoner`.

    Attributes:
        texts: token ids of each, the prompt in front.
        logprobs: of each token of each text, its log-probability at temperature 1; 0 for those put in from outside.
        starts: where each text's own part begins, behind the prompt.
        rows: of each text, the rows of calls that it has taken. What is read once for several texts stands in none of them.
    """

    def __init__(self, model: Reasoner, prompts: Sequence[Sequence[int]], states: bool = False) -> None:
        """`states`: keep the final states of all tokens that are read."""
        self.model = model
        self.texts = [list(prompt) for prompt in prompts]
        self.logprobs = [[0.0] * len(prompt) for prompt in prompts]
        self.starts = [len(prompt) for prompt in prompts]
        self.rows = [0] * len(self.texts)
        self._held = model.hold(len(self.texts), states)
        self._row = list(range(len(self.texts)))  # of each text, its row of `_held`
        self._text = list(range(len(self.texts)))  # of each row, its text
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
        if length >= len(self.texts[i]):
            return
        del self.texts[i][length:]
        del self.logprobs[i][length:]
        row = self._row[i]
        self._held.lengths[row] = min(int(self._held.lengths[row]), length)
        self._next.pop(i, None)

    def take(self, chosen: Sequence[int]) -> Chains:
        """New texts that begin as the chosen ones stand. One may be chosen several times: it is read once for all of them."""
        chosen = list(chosen)
        self.read([i for i, times in Counter(chosen).items() if times > 1 and not self.ended(i)])
        other = Chains(self.model, [])
        other.texts = [list(self.texts[i]) for i in chosen]
        other.logprobs = [list(self.logprobs[i]) for i in chosen]
        other.starts = [self.starts[i] for i in chosen]
        other.rows = [0] * len(chosen)
        other._held = self._held.take([self._row[i] for i in chosen])
        other._row, other._text = list(range(len(chosen))), list(range(len(chosen)))
        other._next = {new: self._next[i] for new, i in enumerate(chosen) if i in self._next}
        return other

    def read(self, chosen: Sequence[int] | None = None) -> Tensor:
        """Logits [B, V] of the next token of the chosen texts (default: all), after one call where some are not known."""
        chosen = list(range(len(self.texts))) if chosen is None else list(chosen)
        behind = [i for i in dict.fromkeys(chosen) if i not in self._next]
        for i, logits in self._forward(behind).items():
            self._next[i] = logits[-1]
        return torch.stack([self._next[i] for i in chosen]) if chosen else torch.empty(0)

    def states(self, chosen: Sequence[int], back: int = 0) -> Tensor:
        """Final states [A, D] at the last tokens of the chosen texts, or at the tokens `back` before them.

        They are those of the call that has read the token. Of texts whose token no call has read yet, one reads it.

        Raises:
            ValueError: no states are kept.
        """
        if not self._held.stateful:
            raise ValueError("these texts keep no states: Chains(model, prompts, states=True) does")
        places = {i: len(self.texts[i]) - 1 - back for i in chosen}
        self.read([i for i, place in places.items() if int(self._held.lengths[self._row[i]]) <= place])
        if not places:
            return torch.empty(0)
        return torch.stack([self._held.states[0][self._row[i], place] for i, place in places.items()])

    def check(self, chosen: Sequence[int], pieces: Sequence[Sequence[int]]) -> list[tuple[list[int], list[float]]]:
        """Put a piece behind each chosen text and read all of it, in one call, a row each. The pieces stay.

        Returns: of each, the likeliest token in the place of each token of the piece and behind it [P + 1], and the
        log-probability of each token of the piece [P].
        """
        chosen = list(chosen)
        before = {i: [self._next.pop(i)[None]] if i in self._next else [] for i in chosen}
        for i, piece in zip(chosen, pieces, strict=True):
            if not before[i]:  # after a cut all may have been read, and yet what follows the last token is not known
                row = self._row[i]
                self._held.lengths[row] = min(int(self._held.lengths[row]), len(self.texts[i]) - 1)
            self.texts[i] += list(piece)
        asked = [i for i, piece in zip(chosen, pieces, strict=True) if piece or not before[i]]
        logits = self._forward(asked)
        found = []
        for i, piece in zip(chosen, pieces, strict=True):
            table = torch.cat([*before[i], *([logits[i]] if i in logits else [])])[-len(piece) - 1 :]
            self._next[i] = table[-1]
            known = table.log_softmax(-1)
            each = [float(known[k, token]) for k, token in enumerate(piece)]
            self.logprobs[i] += each
            found.append((table.argmax(-1).tolist(), each))
        return found

    def score(self, chosen: Sequence[int], pieces: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token of a piece put behind each chosen text; the pieces stay. One call."""
        return [logprobs for _, logprobs in self.check(chosen, pieces)]

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

    def _forward(self, chosen: Sequence[int]) -> dict[int, Tensor]:
        """One call over what the chosen texts have not been read of yet, of which the last token is one: by text, logits
        [T, V] after each such token."""
        if not chosen:
            return {}
        texts, lengths = self._first(chosen), self._held.lengths
        for row, i in enumerate(texts):
            lengths[row] = min(int(lengths[row]), len(self.texts[i]) - 1)
            self.rows[i] += 1
        pieces = [self.texts[i][int(lengths[row]) :] for row, i in enumerate(texts)]
        longest = max(map(len, pieces))
        ids = torch.tensor([[*piece, *[0] * (longest - len(piece))] for piece in pieces], device=self.model.device)
        logits = self.model(ids, self._held, torch.tensor([len(piece) for piece in pieces]))
        return {i: part[: len(piece)] for i, part, piece in zip(texts, logits, pieces, strict=True)}

    def _first(self, chosen: Sequence[int]) -> list[int]:
        """The chosen texts in the order of their rows, after those that are none of the first ones have changed places with
        others: rows behind them are not run."""
        count, wanted = len(chosen), set(chosen)
        late = [i for i in chosen if self._row[i] >= count]
        early = [i for i in self._text[:count] if i not in wanted]
        if late:
            self._held.swap([self._row[i] for i in late], [self._row[i] for i in early])
        for i, other in zip(late, early, strict=True):
            self._row[i], self._row[other] = self._row[other], self._row[i]
            self._text[self._row[i]], self._text[self._row[other]] = i, other
        return self._text[:count]


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
