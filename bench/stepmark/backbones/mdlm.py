"""Language models of the diffusion_lm track, over the first 64 words of stories, and their recipes.

Both are transformers `GPT2LMHeadModel`s of the same size. The masked-diffusion model looks in both directions, as in
DiffuGPT (Gong et al. 2025): learned positions tell masked words apart, which rotary ones cannot in an all-masked text.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.lm import EOS, VOCABULARY, Muon, encode

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

LENGTH = 64
MASK = VOCABULARY.index("<mask>")
START = EOS  # what the autoregressive model reads before the first word


def build(width: int, depth: int, seed: int, causal: bool) -> GPT2LMHeadModel:
    """An untrained GPT-2: head size 32, MLP of 4 widths, embeddings tied, weights N(0, 0.04) from `seed`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=LENGTH,
        n_embd=width,
        n_layer=depth,
        n_head=width // 32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=START,
        eos_token_id=EOS,
    )
    # transformers draws from the global generator while building: keep that out of sight, then draw explicitly.
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.04, generator=generator)
    for block in model.transformer.h:
        block.attn.is_causal = causal
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, L, V] of token ids [B, L] from the parts of a GPT-2: no mask is built, attention knows its direction."""
    inner: Any = model.transformer
    hidden = inner.wte(ids) + inner.wpe(torch.arange(ids.shape[1], device=ids.device))
    for block in inner.h:
        hidden = block(hidden)
    return model.lm_head(inner.ln_f(hidden))


@lru_cache(maxsize=1)
def train_tokens() -> Tensor:
    """Token ids of the train split, int64 [n, 64]."""
    from stepmark.task import load_split

    return torch.tensor([encode(text) for text in load_split("stories64", "train")["text"]])


def mask_some(tokens: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Which words to mask, bool [B, L]: `count` [B] of each text, every set of that size equally likely."""
    noise = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    return noise.argsort(1).argsort(1) < count[:, None]


def word_losses(model: nn.Module, tokens: Tensor, masked: Tensor) -> Tensor:
    """Sum over the masked words of -log p(word) / how many they are, [B]: over a uniform number of masked words and a
    uniform choice of them, L times its mean is the negative ELBO of masked diffusion (Nie et al. 2025, equation 6)."""
    found = logits(model, tokens.masked_fill(masked, MASK))
    found = found.index_fill(2, torch.tensor([MASK], device=tokens.device), -torch.inf)  # no clean word is a mask
    losses = F.cross_entropy(found.transpose(1, 2), tokens, reduction="none")
    return (losses * masked).sum(1) / masked.sum(1)


def spread(count: int, generator: torch.Generator) -> Tensor:
    """`count` numbers of words to mask in 1..LENGTH, uniform and stratified: int64 [count]."""
    device = generator.device
    u = (torch.rand((), generator=generator, device=device) + torch.arange(count, device=device)) / count
    return 1 + (u * LENGTH).long().clamp(max=LENGTH - 1)


def fit(
    model: nn.Module, progress: Progress, *, steps: int, lr: float, seed: int, batch: int, masked: bool
) -> dict[str, float]:
    """Train with Muon (matrices of the blocks) and AdamW (the rest), cosine schedule, 40 steps of warm-up.

    Returns: {"loss": mean loss of the last 100 steps in nats per word, "tokens": tokens seen}.
    """
    model.train()
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(seed)
    data, losses = train_tokens(), []
    order = torch.randperm(len(data), generator=generator)
    for step in progress(range(steps), "language model"):
        rate = lr * min(1.0, (step + 1) / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        tokens = data[order[torch.arange(step * batch, (step + 1) * batch) % len(order)]]
        if masked:
            loss = word_losses(model, tokens, mask_some(tokens, spread(batch, generator), generator)).mean()
        else:
            shifted = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], 1)
            loss = F.cross_entropy(logits(model, shifted).flatten(0, 1), tokens.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    last = losses[-100:]
    return {"loss": sum(last) / len(last), "tokens": float(steps * batch * LENGTH)}


def train_masked(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 5 minutes on one core."""
    return fit(model, progress, steps=1000, lr=3e-3, seed=11, batch=32, masked=True)


def train_causal(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 2 minutes on one core."""
    return fit(model, progress, steps=400, lr=3e-3, seed=12, batch=32, masked=False)


RECIPES: dict[str, Recipe] = {
    "mdlm_stories": Recipe(
        build=lambda: build(128, 4, seed=11, causal=False),
        train=train_masked,
        summary="GPT-2 looking both ways, width 128, 4 layers: masked diffusion over the first 64 words of stories",
    ),
    "ar_stories": Recipe(
        build=lambda: build(128, 4, seed=12, causal=True),
        train=train_causal,
        summary="GPT-2, width 128, 4 layers: autoregressive over the first 64 words of stories",
    ),
}
