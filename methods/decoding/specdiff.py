"""Speculative diffusion decoding: a masked-diffusion model drafts a whole block at once (Christopher et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones import mdlm
from stepmark.backbones.lm import EOS, PAD, Muon, encode
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draw, speculate

# Words of a draft, diffusion steps that write them, and words of context that the drafter sees (gamma, T).
BLOCK, STEPS, CONTEXT = 20, 3, mdlm.LENGTH - 20


class Drafter(nn.Module):
    """A masked-diffusion GPT-2 that reads the last words of a text and a block of masks behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mdlm.build(64, 2, seed=21, causal=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, BLOCK, V] of the clean words of the block; ids [B, CONTEXT + BLOCK], masks where not yet written."""
        found = mdlm.logits(self.network, ids)[:, CONTEXT:]
        return found.index_fill(2, torch.tensor([mdlm.MASK], device=ids.device), -torch.inf)


def window(tokens: list[int], block: list[int]) -> list[int]:
    """What the drafter reads: the end of a text, padded on the left, and a block."""
    context = tokens[-CONTEXT:]
    return [PAD] * (CONTEXT - len(context)) + context + block


class SpecDiff(Method):
    """Speculative diffusion decoding: drafts come from a discrete diffusion model, whose cost does not grow with them.

    Given the text so far, a block of gamma masks behind it is denoised in T steps of one network call each; the target
    reads the whole draft in one pass and keeps x_i with probability min(1, p_i(x_i) / q_i(x_i)), where q_i is the
    categorical that the diffusion model drew x_i from; at the first rejection it draws from norm(max(0, p_i - q_i))
    (algorithm 1). Greedy decoding takes the likeliest words and keeps the longest prefix that the target agrees with. A
    classic drafter needs gamma calls one after the other for gamma words; here it is T, so that long drafts pay.

    The drafter is an absorbing-mask model trained on the train split: of the block that follows a random beginning of
    a text, a uniform number of words is masked, and the loss is the mean cross-entropy over these (the weights of the
    masked-diffusion bound). It is smaller than the target, of the same vocabulary.

    Differs from the paper: steps reveal the words of the block from the left, in T equal parts, not at random places. A
    word drawn before one to its left would not follow its q any more once that one is known to be accepted, as the
    acceptance depends on it, and the output would not be distributed as the target's. With T = 1 both are the same.
    """

    paper = Paper(
        id="specdiff",
        title="Speculative Diffusion Decoding: Accelerating Language Generation through Diffusion",
        authors="Jacob K Christopher, Brian R. Bartoldson, Tal Ben-Nun, Michael Cardei, Bhavya Kailkhura, "
        "Ferdinando Fioretto",
        year=2024,
        arxiv="2408.05636",
    )
    tasks = ("greedy/stories", "greedy/stories_deep", "sampling/stories")
    baselines = ("autoregressive", "speculative")
    claims = (
        Claim(
            "exact_match[specdiff,96] >= 1 and nfe[specdiff,96] <= 0.5 * nfe[autoregressive,96]",
            says="the output is greedy decoding's, in at most half of its target forwards",
        ),
        Claim(
            "nfe[specdiff,96] + draft_diffusion_evaluations[specdiff,96] "
            "<= 0.7 * (nfe[speculative,96] + draft_evaluations[speculative,96])",
            says="at most 70 % of the network calls one after the other that a classic draft model needs",
        ),
        Claim(
            "nfe[specdiff,96] <= nfe[speculative,96]",
            says="long drafts save more target forwards than those of a classic draft model",
        ),
        Claim(
            "latency_ms[specdiff,96] <= 0.57 * latency_ms[speculative,96]",
            says="1.75 times as fast as with a classic draft model, the paper's best case",
            task="greedy/stories_deep",
        ),
        Claim(
            "token_bias[specdiff,96] <= 2 and nfe[specdiff,96] <= 0.6 * nfe[autoregressive,96]",
            says="sampled texts are distributed as the target's, in at most 60 % of its forwards",
            task="sampling/stories",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The drafter, untrained."""
        return {"draft_diffusion": Drafter()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Train the drafter on blocks of the train split."""
        count, batch, steps = session.scale((8000, 32, 450), (40, 4, 3))
        pairs = list(zip(session.train["prompt"], session.train["target"], strict=True))[:count]
        texts = [(encode(prompt), [*encode(text), *[EOS] * BLOCK]) for prompt, text in pairs]
        drafter = session.networks["draft_diffusion"]
        inner = [p for p in drafter.network.transformer.h.parameters() if p.ndim == 2]
        chosen = {id(p) for p in inner}
        others = [p for p in drafter.parameters() if id(p) not in chosen]
        optimisers = [Muon(inner, lr=5e-3), torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)]
        rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
        for step in session.progress(range(steps), "drafter"):
            rows = []
            for _ in range(batch):
                prompt, text = texts[int(torch.randint(len(texts), (), generator=session.rng, device=session.device))]
                cut = int(torch.randint(len(text) - BLOCK + 1, (), generator=session.rng, device=session.device))
                rows.append(window(prompt + text[:cut], text[cut : cut + BLOCK]))
            ids = torch.tensor(rows, device=session.device)
            hidden = torch.randint(1, BLOCK + 1, (batch,), generator=session.rng, device=session.device)
            hidden[: batch // 4] = BLOCK  # what every first step sees
            masked = mdlm.mask_some(ids[:, CONTEXT:], hidden, session.rng)
            seen = ids.clone()
            seen[:, CONTEXT:][masked] = mdlm.MASK
            losses = nn.functional.cross_entropy(drafter(seen).transpose(1, 2), ids[:, CONTEXT:], reduction="none")
            ((losses * masked).sum(1) / hidden).mean().backward()
            nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
            for optimiser, rate in zip(optimisers, rates, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / 30) * (1 - step / steps)
                optimiser.step()
                optimiser.zero_grad()
        return {}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        drafter = session.networks["draft_diffusion"]

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(session.networks["target"], len(prompt) + room)

            def propose(tokens: list[int], most: int) -> tuple[list[int], Tensor | None]:
                written, q = denoise(drafter, tokens, temperature, session.rng, target.device)
                length = min(most, written.index(EOS) + 1 if EOS in written else BLOCK)
                return written[:length], None if temperature == 0 else q[:length]

            return speculate(target, prompt, room, rung, temperature, propose, session.rng)

        return write_each(batch, write)


def denoise(
    drafter: nn.Module, tokens: list[int], temperature: float, rng: torch.Generator, device: torch.device
) -> tuple[list[int], Tensor]:
    """A block behind a text in `STEPS` calls: its words, and what each was drawn from, [BLOCK, V]."""
    block, q = [mdlm.MASK] * BLOCK, []
    for step in range(STEPS):
        first, last = step * BLOCK // STEPS, (step + 1) * BLOCK // STEPS
        found = drafter(torch.tensor([window(tokens, block)], device=device))[0, first:last].double()
        q.append((found / (temperature or 1.0)).softmax(-1))
        if temperature == 0:
            block[first:last] = found.argmax(-1).tolist()
        else:
            u = torch.rand(last - first, generator=rng, device=device).tolist()
            block[first:last] = [draw(p, uniform) for p, uniform in zip(q[-1], u, strict=True)]
    return block, torch.cat(q)
