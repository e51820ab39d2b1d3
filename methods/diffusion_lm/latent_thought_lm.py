"""Latent thought language models: a text is explained by latent vectors that are inferred anew for each (Kong et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepmark.backbones.lm import EOS, VOCABULARY, Muon, encode
from stepmark.backbones.mdlm import LENGTH, START
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session

# (mean, log standard deviation, noise), [B, ...] each -> (bound [B], its gradients by mean and log deviation)
BoundAndGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def divergence(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, diag std^2) || N(0, I)), [B]."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).sum(1)


def infer(bound: BoundAndGradient, shape: torch.Size, steps: int, rate: float, rng: torch.Generator) -> list[Tensor]:
    """The fast learning: mean and log deviation [B, ...] after `steps` of Adam up the bound, from the prior on."""
    local = [torch.zeros(shape, device=rng.device), torch.zeros(shape, device=rng.device)]
    first, second = [torch.zeros_like(p) for p in local], [torch.zeros_like(p) for p in local]
    for step in range(1, steps + 1):
        noise = torch.randn(shape, generator=rng, device=rng.device)
        _, *gradients = bound(local[0], local[1], noise)
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient.square()
            unbiased = first[i] / (1 - 0.9**step), (second[i] / (1 - 0.999**step)).sqrt()
            local[i] = local[i] + rate * unbiased[0] / (unbiased[1] + 1e-8)
    return local


class ThoughtDecoder(nn.Module):
    """A GPT-2 with a short view: layer l attends to the last `window` words and, across, to its own latent vectors.

    What a text says at one place and needs at another has to pass through the latent vectors [B, layers, own, width].
    """

    def __init__(self, width: int, depth: int, own: int, window: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        config = GPT2Config(
            vocab_size=len(VOCABULARY),
            n_positions=LENGTH,
            n_embd=width,
            n_layer=depth,
            n_head=width // 32,
            add_cross_attention=True,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.04,
            bos_token_id=START,
            eos_token_id=EOS,
            attn_implementation="sdpa",
        )
        self.gpt = GPT2LMHeadModel(config)
        self.latents = (depth, own, width)
        back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        self.register_buffer("seen", (back >= 0) & (back < window), persistent=False)

    def log_likelihood(self, tokens: Tensor, z: Tensor) -> Tensor:
        """log p(tokens | z), [B]."""
        inner: Any = self.gpt.transformer
        before = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], 1)
        hidden = inner.wte(before) + inner.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for i, block in enumerate(inner.h):
            hidden = block(hidden, attention_mask=self.seen[None, None], encoder_hidden_states=z[:, i].contiguous())
        found = self.gpt.lm_head(inner.ln_f(hidden))
        return -cross_entropy(found.transpose(1, 2), tokens, reduction="none").sum(1)

    def bound(self, tokens: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
        """One draw of the ELBO, E_q log p(tokens | z) - KL(q || N(0, I)), [B]."""
        return self.log_likelihood(tokens, mean + log_std.exp() * noise) - divergence(mean, log_std)

    def forward(self, tokens: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The bound and its gradients by mean and log deviation: one evaluation, its backward pass inside."""
        with torch.enable_grad():
            mean, log_std = mean.detach().requires_grad_(True), log_std.detach().requires_grad_(True)
            value = self.bound(tokens, mean, log_std, noise)
            gradients = torch.autograd.grad(value.sum(), (mean, log_std))
        return value.detach(), *gradients


class LatentThoughtLM(Method):
    """Latent thought model: p(x) = integral p(z) prod p(x_i | z, the last w words), with q(z) inferred for each text.

    z holds latent vectors, a share for each layer, with a standard normal prior (section 2.1). For every text the local
    mean and deviation of q(z) = N(mean, diag std^2) start at the prior and take T_fast steps of Adam up the ELBO, at
    rate 0.3; in training one slow step of the decoder on the inferred q follows (algorithm 1). -ELBO bounds -log p.

    A rung is T_fast + 1 evaluations: T_fast gradients, one draw of the bound. The ladder is T_fast = 1, 4, 8, 16, 32;
    training uses 16, the paper's default.

    Differs from the paper: 2 layers of width 64, 4 latent vectors each, a window of 8 words where theirs is 256 of 1024;
    Muon for the decoder's matrices, minutes of training. The decoder is smaller than the track's other models, so that
    nothing is claimed against them.
    """

    paper = Paper(
        id="latent_thought_lm",
        title="Scalable Language Models with Posterior Inference of Latent Thought Vectors",
        authors="Deqian Kong, Minglu Zhao, Dehong Xu, Bo Pang, Shu Wang, Edouardo Honig, Zhangzhang Si, Chuan Li, "
        "Jianwen Xie, Sirui Xie, Ying Nian Wu",
        year=2025,
        arxiv="2502.01567",
    )
    tasks = ("likelihood/stories64",)
    baselines = ("ar_lm", "mdlm_bound")
    claims = (
        Claim(
            "nll[latent_thought_lm,17] < nll[latent_thought_lm,5] and nll[latent_thought_lm,5] < nll[latent_thought_lm,2]",
            says="more steps of inference give a better bound: 16 than 4 than 1",
        ),
        Claim("nll[latent_thought_lm,33] < nll[latent_thought_lm,17]", says="and more steps than in training still do"),
        Claim("excess[latent_thought_lm,17] >= 0", says="the bound stays above the grammar's own entropy"),
    )

    width, depth, own, window = 64, 2, 4, 8
    fast, fast_rate, steps, batch, rate = 16, 0.3, 150, 32, 5e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The decoder, untrained."""
        return {"decoder": ThoughtDecoder(self.width, self.depth, self.own, self.window)}

    def prepare(self, session: Session) -> None:
        """Dual-rate learning."""
        decoder: Any = session.networks["decoder"]
        tokens = torch.tensor(
            [encode(text) for text in session.train["text"][: session.scale(16_000, 64)]], device=session.device
        )
        matrices = [p for p in decoder.gpt.transformer.h.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        slow: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=self.rate),
            torch.optim.AdamW(
                [p for p in decoder.parameters() if id(p) not in chosen], self.rate, (0.9, 0.98), 1e-8, 0.0
            ),
        ]
        batch, fast = session.scale(self.batch, 2), session.scale(self.fast, 2)
        steps = session.scale(self.steps, 2)
        for step in session.progress(range(steps), "latent thought model"):
            rate = self.rate * min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            text = tokens[torch.randint(len(tokens), (batch,), generator=session.rng, device=session.device)]
            shape = torch.Size((batch, *decoder.latents))
            decoder.requires_grad_(False)  # the fast steps need no gradient of the weights
            mean, log_std = infer(lambda m, s, e: decoder(text, m, s, e), shape, fast, self.fast_rate, session.rng)
            decoder.requires_grad_(True)
            noise = torch.randn(shape, generator=session.rng, device=session.device)
            (-decoder.bound(text, mean, log_std, noise).mean() / LENGTH).backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            for optimiser in slow:
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.step()
                optimiser.zero_grad()

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
        """-ELBO of each text in nats, one draw after rung - 1 fast steps."""
        decoder, tokens = session.networks["decoder"], batch["tokens"]
        shape = torch.Size((len(tokens), self.depth, self.own, self.width))
        mean, log_std = infer(lambda m, s, e: decoder(tokens, m, s, e), shape, rung - 1, self.fast_rate, session.rng)
        noise = torch.randn(shape, generator=session.rng, device=session.device)
        return -decoder(tokens, mean, log_std, noise)[0].double()
