"""Speculative diffusion decoding: a masked-diffusion model drafts a whole block at once (Christopher et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones import lm, mdlm
from stepmark.backbones.lm import EOS, PAD, Muon, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draft_while_sure, draw, speculate

# Words that the drafter writes at most, and words of context that it sees.
BLOCK, CONTEXT = 20, mdlm.LENGTH - 20
# What the search tries: words of a draft gamma, diffusion steps T (at most gamma).
DRAFTS, STEPS = (4, 8, 12, 20), (1, 2, 3, 5)
DEPTH = 2  # layers of a drafter
TRAINED = 1200, 32  # steps, and windows of 64 words in a step: of both kinds of drafter


class Drafter(nn.Module):
    """A masked-diffusion GPT-2 that reads the last words of a text and a block of masks behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mdlm.build(64, DEPTH, seed=21, causal=False)

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

    gamma and T are tuned for each task, as in the paper: on prompts of the train split, for the fewest decoder layers run
    one after the other per word (the drafter's and the target's), which is what takes the time.

    Its control `specdiff_chain` is classic speculative decoding with a drafter of equal width, depth, data, words of a batch,
    updates and tuning: a small model of the target's kind with a cache, one call a word, gamma searched in the same way.
    It learns from every word of a completion that it reads, the diffusion model from the masked ones of 20 words in 64. The
    search tries 4 lengths for it, 15 pairs of length and steps for the diffusion model. (`speculative` has the draft model of
    the task, of one layer, which was trained for longer on more.)

    Differs from the paper: steps reveal the words of the block from the left, in T equal parts, not at random places. A
    word drawn before one to its left would not follow its q any more once that one is known to be accepted, as the
    acceptance depends on it, and the output would not be distributed as the target's. With T = 1 both are the same.

    What limits it here: the diffusion model reads 64 positions without a cache in every call. One core pays for each of
    them, where a GPU has them nearly for nothing, so that fewer calls one after the other are no less time; and what a
    call costs by its width is no part of what is tuned for. On the deep target and in sampling a target forward also
    yields fewer words than with the classic drafter.
    """

    paper = Paper(
        id="specdiff",
        title="Speculative Diffusion Decoding: Accelerating Language Generation through Diffusion",
        authors="Jacob K Christopher, Brian R. Bartoldson, Tal Ben-Nun, Michael Cardei, Bhavya Kailkhura, "
        "Ferdinando Fioretto",
        year=2024,
        arxiv="2408.05636",
    )
    tasks = ("greedy/stories_deep", "greedy/stories", "sampling/stories")
    baselines = ("autoregressive", "specdiff_chain", "speculative")
    trainings = 3
    claims = (
        Claim(
            "exact_match[specdiff,*] >= 1 and latency_ms[specdiff,96] <= 0.5 * latency_ms[autoregressive,96] "
            "and latency_ms[specdiff,96] <= 0.4 * latency_ms[specdiff_chain,96]",
            says="the output is greedy decoding's, in half of its time or less, and 2.5 times as fast as with a classic "
            "drafter of equal size and training (the paper: up to 8.7 and 2.5 times)",
            headline=True,
            setting="one CPU core pays for each of the drafter's 64 positions in every call, the paper's GPU hardly for any",
        ),
        Claim(
            "tokens[specdiff,8..64] >= tokens[specdiff_chain,8..64] and nfe[specdiff,*] <= nfe[specdiff_chain,*]",
            says="with the same target forwards as much is written as with the classic drafter",
        ),
        Claim(
            "nfe[specdiff,96] + draft_diffusion_evaluations[specdiff,96] "
            "<= 0.7 * (nfe[specdiff_chain,96] + draft_chain_evaluations[specdiff_chain,96])",
            says="at most 70 % of the network calls one after the other that the classic drafter needs",
        ),
        Claim(
            "token_bias[specdiff,*] <= 2 and nfe[specdiff,96] <= 0.6 * nfe[autoregressive,96]",
            says="sampled texts are distributed as the target's, in at most 60 % of its forwards",
            task="sampling/stories",
        ),
    )

    chain = False  # a classic drafter
    variants = (
        Variant(
            "specdiff_chain",
            says="a classic drafter of equal size, training and tuning: one call a word",
            chain=True,
            baselines=("autoregressive",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The drafter, untrained."""
        return {"draft_chain": lm.build(64, DEPTH, seed=21)} if self.chain else {"draft_diffusion": Drafter()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Train the drafter on the train split, then tune the draft. {"block": words of a draft, "steps": calls for one}."""
        (train_chain if self.chain else train_diffusion)(session)
        return self.tune(session)

    def tune(self, session: Session) -> dict[str, Tensor]:
        """Of all lengths and steps those with the fewest layers one after the other per word, on prompts of the train split."""
        prompts = [encode(text) for text in session.train["prompt"][: session.scale(4, 1)]]
        room, temperature = session.scale(90, 6), float(session.task.id.startswith("sampling/"))
        tried = [(g, g if self.chain else t) for g in DRAFTS for t in ((1,) if self.chain else STEPS) if t <= g]
        costs = []
        with torch.no_grad():
            for block, steps in session.progress(tried[: session.scale(len(tried), 2)], "gamma and T"):
                written = layers = 0.0
                for prompt in prompts:
                    calls: list[int] = []
                    target = Decoder(session.networks["target"], len(prompt) + room)
                    written += len(self.decode(session, target, prompt, room, 1e9, temperature, block, steps, calls))
                    layers += target.layer_calls + DEPTH * sum(calls)
                costs.append(layers / written)
        block, steps = tried[costs.index(min(costs))]
        return {"block": torch.tensor(block), "steps": torch.tensor(steps)}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        block, steps = (int(session.state[name]) for name in ("block", "steps"))

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(session.networks["target"], len(prompt) + room)
            return self.decode(session, target, prompt, room, rung, temperature, block, steps, [])

        return write_each(batch, write)

    def decode(
        self,
        session: Session,
        target: Decoder,
        prompt: list[int],
        room: int,
        budget: float,
        temperature: float,
        block: int,
        steps: int,
        calls: list[int],
    ) -> list[int]:
        """New token ids of one prompt, with drafts of `block` words in `steps` calls; `calls` gets those of each draft."""

        small = Decoder(session.networks["draft_chain"], len(prompt) + room) if self.chain else None

        def propose(tokens: list[int], most: int) -> tuple[list[int], Tensor | None]:
            if small is None:
                drafter = session.networks["draft_diffusion"]
                written, q = denoise(drafter, tokens, block, steps, temperature, session.rng, target.device)
                calls.append(steps)
                length = min(most, written.index(EOS) + 1 if EOS in written else block)
                return written[:length], None if temperature == 0 else q[:length]
            small.rollback(min(small.length, len(tokens) - 1))

            def after(draft: list[int]) -> Tensor:
                return small.forward((tokens + draft)[small.length :], last=1)[0]

            draft, chances = draft_while_sure(after, min(block, most), EOS, temperature, session.rng)
            calls.append(len(draft))
            return draft, chances

        return speculate(target, prompt, room, budget, temperature, propose, session.rng)


def train_chain(session: Session) -> None:
    """Train the classic drafter on the completions of the same texts, as many words a step and as many steps."""
    steps, batch = session.scale(TRAINED, (3, 4))
    pairs = list(zip(session.train["prompt"], session.train["target"], strict=True))[: session.scale(8000, 40)]
    rows = [(encode(prompt), [*encode(text), EOS]) for prompt, text in pairs]
    stream = lm.batches(rows, batch * mdlm.LENGTH, session.seed)
    lm.fit(session.networks["draft_chain"], session.progress, steps=steps, lr=5e-3, seed=session.seed, stream=stream)


def train_diffusion(session: Session) -> None:
    """Train the diffusion drafter on blocks behind random beginnings of texts."""
    steps, batch = session.scale(TRAINED, (3, 4))
    pairs = list(zip(session.train["prompt"], session.train["target"], strict=True))[: session.scale(8000, 40)]
    texts = [(encode(prompt), [*encode(text), *[EOS] * BLOCK]) for prompt, text in pairs]
    drafter: Any = session.networks["draft_diffusion"]
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
        masked_loss(drafter, torch.tensor(rows, device=session.device), session.rng).backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        for optimiser, rate in zip(optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 30) * (1 - step / steps)
            optimiser.step()
            optimiser.zero_grad()


def masked_loss(drafter: nn.Module, ids: Tensor, rng: torch.Generator) -> Tensor:
    """Cross-entropy over masked words of the block, a uniform number of them; a quarter of the blocks masked whole."""
    hidden = torch.randint(1, BLOCK + 1, (len(ids),), generator=rng, device=ids.device)
    hidden[: len(ids) // 4] = BLOCK  # what every first step sees
    masked = mdlm.mask_some(ids[:, CONTEXT:], hidden, rng)
    seen = ids.clone()
    seen[:, CONTEXT:][masked] = mdlm.MASK
    losses = nn.functional.cross_entropy(drafter(seen).transpose(1, 2), ids[:, CONTEXT:], reduction="none")
    return ((losses * masked).sum(1) / hidden).mean()


def denoise(
    drafter: nn.Module,
    tokens: list[int],
    length: int,
    steps: int,
    temperature: float,
    rng: torch.Generator,
    device: torch.device,
) -> tuple[list[int], Tensor]:
    """The first `length` words of a block behind a text in `steps` calls, and what each was drawn from, [length, V]."""
    block, q = [mdlm.MASK] * BLOCK, []
    for step in range(steps):
        first, last = step * length // steps, (step + 1) * length // steps
        found = drafter(torch.tensor([window(tokens, block)], device=device))[0, first:last].double()
        q.append((found / (temperature or 1.0)).softmax(-1))
        if temperature == 0:
            block[first:last] = found.argmax(-1).tolist()
        else:
            u = torch.rand(last - first, generator=rng, device=device).tolist()
            block[first:last] = [draw(p, uniform) for p, uniform in zip(q[-1], u, strict=True)]
    return block[:length], torch.cat(q)
