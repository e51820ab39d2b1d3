"""Language models of checkpoint folders, for a `Decoder` that drives the layers itself.

Any causal language model of transformers whose layers are called like Llama's: whether they are is not looked up but
tried when the model is loaded (`drives`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepmark.hub.choice import Made
from stepmark.hub.pretrained import opened, whole
from stepmark.hub.text_tasks import end, ends, vocabulary
from stepmark.tracks.decoding.decoder import Decoder

KNOWN = "Llama, Mistral, Qwen2 and Qwen3"


class Head(nn.Module):
    """An output head over the first `size` tokens, whose end-of-sequence tokens are one: the first of `ends`."""

    def __init__(self, head: nn.Module, size: int, ends: list[int]) -> None:
        super().__init__()
        self.head, self.size, self.ends = head, size, ends

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., size]: the greatest of the ends at the first of them, the others never."""
        logits = self.head(hidden)[..., : self.size]
        if len(self.ends) < 2:
            return logits
        greatest = logits[..., self.ends].amax(-1)
        logits = logits.clone()
        logits[..., self.ends] = float("-inf")
        logits[..., self.ends[0]] = greatest
        return logits


def build(made: Made, role: str, device: str) -> nn.Module:
    """A language model in float32, in eval mode without gradients, ready for a `Decoder`."""
    import transformers

    part = made.parts[role]
    rope = part.config.get("rope_parameters") or part.config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        raise ValueError(f"{part}: positions that hang on the length of the text (rope_type dynamic) cannot be driven")
    size = vocabulary(made)
    model, info = opened(
        transformers.AutoModelForCausalLM,
        part.folder,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told in `info`
        **({"variant": part.variant} if part.variant else {}),
    )
    whole(part.folder, info)
    stops = [token for token in ends(made.parts["target"]) if token < size]
    model.config.eos_token_id = end(made.parts["target"])
    model = model.to(device).eval().requires_grad_(False)
    if not drives(model):
        raise ValueError(
            f"{part}: {part.kind} is not driven layer by layer as Llama is ({KNOWN} are); it cannot be measured"
        )
    if len(stops) > 1 or size < int(part.config["vocab_size"]):
        model.lm_head = Head(model.lm_head, size, stops)
    return model


@torch.no_grad()
def drives(model: Any) -> bool:
    """Whether a `Decoder`, in two passes with a cache, gives the logits of one call of the model."""
    ids = [(7 * i + 3) % model.config.vocab_size for i in range(12)]
    try:
        decoder = Decoder(model, len(ids))
        found = torch.cat([decoder.forward(ids[:5]), decoder.forward(ids[5:11]), decoder.forward(ids[11:])])
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError):
        return False
    expected = model(torch.tensor([ids], device=model.device)).logits[0]
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max().clamp(min=1))
