"""A causal language model of transformers in the place of a `Reasoner`: texts of words side by side."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stepmark.hub.choice import Made
from stepmark.hub.presented import Head, base_name
from stepmark.hub.pretrained import first_line
from stepmark.hub.side_by_side import Held
from stepmark.hub.spoken import Speech
from stepmark.hub.stage import Unfit
from stepmark.hub.text_networks import FAULTS, ROUNDING, loaded, recurrent, token_ids
from stepmark.task import skip


class Speaker(nn.Module):
    """A checkpoint that reads and goes on writing texts of words and of its own tokens (`spoken.Speech`)."""

    def __init__(self, own: Any, speech: Speech) -> None:
        super().__init__()
        self.own, self.speech = own, speech
        self.base = getattr(own, base_name(own))
        self.head = Head(own, speech.size, [])
        self.shells = nn.ModuleList(self.head._shell)  # so that whoever walks over the modules knows them

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.own.parameters()).device

    @property
    def llama(self) -> NoReturn:
        """What is inside a reasoner: a method that asks for it would train or steer something."""
        skip("needs a head that is trained on hidden states, and a checkpoint folder brings no data to train on")

    def hold(self, rows: int, states: bool = False) -> Held:
        """What is read of so many texts."""
        return Held(rows, states)

    def forward(
        self, ids: Tensor, held: Held | None = None, lengths: Tensor | None = None, states: bool = False
    ) -> list[Tensor]:
        """By text, logits [T', SIZE + size] of the id after each of the last T' ids: those behind the word of a format, or
        the last one alone.

        Args: as of `Reasoner.forward`, but that no states can be had.
        """
        rows = len(ids)
        held = Held(rows, states) if held is None else held
        counts = [ids.shape[1]] * rows if lengths is None else lengths.tolist()
        told, pieces = [], []
        for row, (new, count) in enumerate(zip(ids.tolist(), counts, strict=True)):
            start = int(held.lengths[row])
            text = held.ids[row] = [*held.ids[row][:start], *new[:count]]
            tokens, places, first = self.speech.told(text)
            places = places[max(0, start - first) :]  # of the new ids
            known = held.tokens[row]
            same = next((k for k, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), len(known))
            same = min(same, len(tokens), places[0] - 1)
            del known[same:]
            told.append([place - same - 1 for place in places])
            pieces.append(tokens[same:])
        hidden = held.read(self.base, pieces)
        held.lengths[:rows] += torch.tensor(counts)
        wanted = torch.cat([hidden[row, places] for row, places in enumerate(told)])
        logits = self.speech.heard(self.head(wanted[None])[0].float())
        return list(logits.split([len(places) for places in told]))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model itself, once."""
        return self.own.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model itself."""
        return self.own.load_state_dict(*args, **kwargs)


def build(made: Made, speech: Speech, device: str) -> nn.Module:
    """A language model in eval mode without gradients, driven by `Chains`.

    Raises:
        ValueError: it cannot be driven, or not so that it gives its own logits. One line.
    """
    part = made.parts["target"]
    own = loaded(made, "target", device)
    try:
        found = Speaker(own, speech)
        wrong = recurrent(own.config) or deviates(found)
    except (Unfit, *FAULTS) as error:
        wrong = str(error) if isinstance(error, Unfit) else f"texts side by side fail ({first_line(error)})"
    if wrong:
        raise ValueError(
            f"{part}: {part.kind} cannot reason here: {wrong}; leave --reasoning out, or take another model"
        )
    return found


@torch.no_grad()
def deviates(network: Speaker) -> str:
    """What is wrong with logits of texts side by side, beside those of each alone by the model's own forward; "": nothing."""
    size = network.speech.size
    texts = [token_ids(size, 9), token_ids(size, 23)[4:]]
    parts = [[each[:3], each[3:4], each[4:]] for each in texts]
    parts[0][0], parts[0][1] = texts[0][:2], texts[0][2:4]  # at other lengths than the other
    held, worst = Held(2), 0.0
    for pieces in zip(*parts, strict=True):
        hidden = held.read(network.base, pieces)
    for row, text in enumerate(texts):
        expected = network.own(input_ids=torch.tensor([text], device=network.device), use_cache=False).logits[0, -1]
        last = len(parts[row][2])
        found, expected = network.head(hidden[row : row + 1, last - 1 : last])[0, 0].float(), expected[:size].float()
        worst = max(worst, float((found - expected).abs().max() / expected.std().clamp(min=1e-6)))
    if not worst <= ROUNDING[network.own.dtype]:
        return f"side by side its logits are {worst:.2g} of their standard deviations off its own forward's"
    return ""
