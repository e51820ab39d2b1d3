"""Verifiers of word problems that see what the reasoner expected: beside its states they read how likely it held each token.

A copy of the reasoner with a head on it (`Verifier`) tells right from wrong texts of one question little better than a coin:
what comes next is worked out in the last layer of the position before, so that no layer of a copy can hold it against the
token that is read. Here the reasoner stays as it is, and small layers behind it are given both.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.reasoners import STOP, Reasoner, built
from stepmark.backbones.solvers import taught

INNER, MORE = 128, 2  # width and number of the layers behind the reasoner
LEAST = -8.0  # log-probability of a token below which it does not matter how much less likely it was


class Grader(nn.Module):
    """A reasoner and, behind it, causal layers that judge texts: logits [B, T] that all is well up to each position."""

    def __init__(self, width: int, depth: int) -> None:
        """`width`, `depth`: of the reasoner."""
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        self.reader = Reasoner(width, depth).requires_grad_(False)
        self.state, self.surprise = nn.Linear(width, INNER), nn.Linear(5, INNER)
        self.judge = LlamaModel(
            LlamaConfig(
                vocab_size=1, hidden_size=INNER, intermediate_size=8 * round(INNER / 3), num_hidden_layers=MORE,
                num_attention_heads=INNER // 32, max_position_embeddings=1024, initializer_range=0.04,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
        self.head = nn.Linear(INNER, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T] of texts int64 [B, T], padded on the right."""
        with torch.no_grad():
            states = self.reader(ids, states=True)
            heard = surprises(self.reader.llama.lm_head(states), ids)
        told = self.state(states) + self.surprise(heard)
        return self.head(self.judge(inputs_embeds=told, use_cache=False).last_hidden_state)[..., 0]


def surprises(logits: Tensor, ids: Tensor) -> Tensor:
    """How each of some tokens int64 [B, T] was expected, from logits [B, T, V] of the token after each: float [B, T, 5].

    Its log-probability; by how much it was less likely than the likeliest; the entropy of what was expected; and of the
    sentence that it stands in, up to it, the least of the second and the sum of the first.
    """
    expected = logits[:, :-1].log_softmax(-1)
    said, best = expected.gather(2, ids[:, 1:, None])[..., 0], expected.amax(-1)
    entropy = -(expected.exp() * expected).sum(-1)
    # Nothing was expected of the first token.
    said, short, entropy = (
        F.pad(each, (1, 0)) for each in (said.clamp(min=LEAST), (said - best).clamp(min=LEAST), entropy)
    )
    stops = (ids == STOP).cumsum(1)
    sentence = stops - (ids == STOP).long()  # a full stop ends its own
    near = (sentence[:, :, None] == sentence[:, None]).tril()  # [B, T, T]: no later, in the same sentence
    least = torch.where(near, short[:, None], 0.0).amin(-1)
    return torch.stack([said, short, entropy, least, (near * said[:, None]).sum(-1)], -1)


def train_grader(
    network: nn.Module, progress: Progress, process: bool, seed: int, steps: int = 500
) -> dict[str, float]:
    """Behind `reasoner`, which learns nothing more; `solvers.taught` says of what and what the report holds."""
    from stepmark.backbones import load

    assert isinstance(network, Grader)
    writer = load("reasoner")
    network.reader.load_state_dict(writer.state_dict())
    return taught(network, progress, writer, process, seed, steps, 1e-3)


def _untrained(seed: int) -> Grader:
    network: Grader = built(Grader, 192, 4, seed)
    with torch.no_grad():
        network.surprise.weight.mul_(10.0)  # few numbers beside some hundred, which are to be heard at once
    return network


RECIPES: dict[str, Recipe] = {
    "grader_process": Recipe(
        partial(_untrained, 27), partial(train_grader, process=True, seed=27),
        "verifier of word problems, reads how likely `reasoner` held each token, judges every step",
    ),
    "grader_outcome": Recipe(
        partial(_untrained, 28), partial(train_grader, process=False, seed=28),
        "verifier of word problems, reads how likely `reasoner` held each token, judges whole texts",
    ),
}  # fmt: skip
