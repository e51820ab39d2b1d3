"""Top-k activations: a model with SiLU of which only the greatest activations of each token count, without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.models import SparseLinear, write_greedily

KEPT = 0.4  # share of the neurons, as many as relufication leaves open


class TopkMlp(nn.Module):
    """A gated feed-forward block: down(h) with h = silu(gate x) * up x, all but the greatest |h| of a token set to zero."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.act_fn = dense.gate_proj, dense.up_proj, dense.act_fn
        self.down_proj = SparseLinear(dense.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, D] -> [.., T, D]."""
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        least = hidden.abs().topk(round(KEPT * hidden.shape[-1]), dim=-1).values[..., -1:]
        return self.down_proj(hidden * (hidden.abs() >= least))


class TopkActivations(Method):
    """Magnitude pruning of activations: of each token the 40 % greatest of the feed-forward block are used.

    h = silu(W_gate x) * (W_up x); all but the greatest |h| are set to zero, and W_down reads only the columns that
    remain. Gate and up projection are needed in full to know which. Nothing is trained.
    """

    tasks = ("converted/stories", "converted/words")
    baselines = ("autoregressive",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with other feed-forward blocks on its own weights."""
        student: Any = session.clone("target")
        for layer in student.model.layers:
            layer.mlp = TopkMlp(layer.mlp)
        return {"student": student}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)
