"""Self-verification: a probe of a hidden state says whether the answer just stated is right (Zhang et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.reasoners import EOS, STOP, WORDS, decode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.stopping import ANSWER, END, SO, Thoughts, read_states, stated, traces

CUES = {WORDS.index("wait"), WORDS.index("no")}  # words that turn back: a chunk ends before them
TRACES = 400  # train questions that the probe learns from
# Of the probe: decay of Adam, chunks of a batch, epochs at most, epochs without a gain, weights of right chunks that are tried.
DECAY, BATCH, EPOCHS, PATIENCE, BALANCES = 1e-3, 64, 200, 10, (0.5, 1.0, 2.0)
RESERVE = {"confidence": 2 * ANSWER}


def chunks(text: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
    """(tokens of the thought, number stated last) at the end of each chunk of a thought that begins at `start`: before a word
    that turns back, or the end of the thought. Those that state no number are part of the next one."""
    for k in range(start + 1, len(text)):
        if text[k] in CUES or text[k] == END:
            digits = stated(text[start:k])
            if digits is not None:
                yield k - start, int(decode(digits).replace(" ", ""))
        if text[k] == END:
            return


@dataclass
class Chunks:
    """Of whole thoughts about train questions, at the ends of their chunks: states [M, D], whether the number stated is the
    right answer [M], the thought that each is of [M], how many tokens were thought before it; and by thought its tokens."""

    states: Tensor
    right: Tensor
    owner: list[int]
    before: list[int]
    lengths: list[int]


def labelled(session: Session, count: int) -> Chunks:
    """Chunks of `traces`."""
    seen = session.once(traces, count)
    whole, starts, answers = (seen[name].tolist() for name in ("lengths", "starts", "answers"))
    texts = [row[:length] for row, length in zip(seen["ids"].tolist(), whole, strict=True)]
    states = read_states(session.networks["model"], texts)
    found = Chunks(states[0][:0], torch.zeros(0, device=session.device), [], [], [])
    for owner, (text, start, answer) in enumerate(zip(texts, starts, answers, strict=True)):
        found.lengths.append((text.index(END) if END in text else len(text)) - start)
        for tokens, number in chunks(text, start):
            found.states = torch.cat([found.states, states[owner][start + tokens - 1][None]])
            found.right = torch.cat([found.right, found.right.new_tensor([number == answer])])
            found.owner.append(owner)
            found.before.append(tokens)
    return found


def fitted(
    session: Session, states: Tensor, right: Tensor, balance: float, held: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """(accuracy on held-out chunks, weights of a linear probe): weighted cross entropy, as they were best on those chunks."""
    probe = nn.Linear(states.shape[1], 1).to(states.device)
    for parameter in probe.parameters():
        nn.init.zeros_(parameter)
    optimiser = torch.optim.Adam(probe.parameters(), lr=1e-3, weight_decay=DECAY)
    (seen, marks), (unseen, truth) = (states[~held], right[~held]), (states[held], right[held])
    weight = balance * (marks == 0).sum() / marks.sum().clamp(min=1)
    kept, best, since = {name: value.clone() for name, value in probe.state_dict().items()}, float("inf"), 0
    for _ in range(session.scale(EPOCHS, 3)):
        for rows in torch.randperm(len(seen), generator=session.rng, device=session.device).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(probe(seen[rows])[:, 0], marks[rows], pos_weight=weight)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            lost = float(F.binary_cross_entropy_with_logits(probe(unseen)[:, 0], truth, pos_weight=weight))
        since += 1
        if lost < best:
            kept, best, since = {name: value.clone() for name, value in probe.state_dict().items()}, lost, 0
        if since >= PATIENCE:
            break
    logits = unseen @ kept["weight"][0] + kept["bias"]
    return float(((logits > 0) == (truth > 0.5)).float().mean()), kept


def matched(found: Chunks, sure: Sequence[bool]) -> tuple[int, float]:
    """What controls need that end thoughts as soon as the first chunk does that is `sure`: (after how many chunks, so that as
    many tokens are thought, to the nearest; with what probability at each chunk that is met, so that as many are ended)."""
    places: list[list[tuple[int, bool]]] = [[] for _ in found.lengths]
    for owner, before, certain in zip(found.owner, found.before, sure, strict=True):
        if before < found.lengths[owner]:  # at its own end there is nothing to leave
            places[owner].append((before, certain))
    tokens = met = ends = 0
    for mine, length in zip(places, found.lengths, strict=True):
        at = next((k for k, (_, certain) in enumerate(mine) if certain), None)
        tokens += length if at is None else mine[at][0]
        met += len(mine) if at is None else at + 1
        ends += at is not None
    fixed = [
        sum(mine[m][0] if m < len(mine) else length for mine, length in zip(places, found.lengths, strict=True))
        for m in range(1 + max(map(len, places)))
    ]
    return 1 + min(range(len(fixed)), key=lambda m: abs(fixed[m] - tokens)), ends / max(met, 1)


def trained(session: Session, count: int, threshold: float) -> dict[str, Tensor]:
    """The probe, "weight" [1, D] and "bias" [1]; "chunks" and "coin", what its controls need (`matched`)."""
    found = labelled(session, count)
    held = torch.tensor([owner % 5 == 4 for owner in found.owner], device=session.device)
    best = {"weight": found.states.new_zeros(1, found.states.shape[1]), "bias": found.states.new_zeros(1)}
    if len(held) and held.any() and not held.all():  # at smoke there may be a chunk or none
        tried = [fitted(session, found.states, found.right, balance, held) for balance in BALANCES]
        best = max(tried, key=lambda each: each[0])[1]
    sure = (found.states @ best["weight"][0] + best["bias"]).sigmoid() > threshold
    after, coin = matched(found, sure.tolist())
    return best | {"chunks": torch.tensor(float(after)), "coin": torch.tensor(coin)}


class HiddenStateSelfVerification(Method):
    """Self-verification from hidden states: the thought ends when a probe is sure that the answer stated last is right.

    A thought is cut into chunks before the words that turn back, ``wait`` and ``no``. A chunk that ends in a result,
    ``= 1 2 .`` or ``so 1 2 .``, has an intermediate answer; one that does not, as a step checked again, ``... = 7 yes .``,
    is part of the next. From the final state h at its last token a probe says how likely that answer is right:

        p = sigmoid(w h + b)

    Where p exceeds 0.85 the thought ends and the answer just stated is given. The probe is trained on whole thoughts of the
    model about train questions, sampled at temperature 0.6; a chunk is right where its number is the right answer. The loss
    is cross entropy with right chunks weighted by a times wrong over right ones; Adam at 1e-3, weight decay 1e-3, batches
    of 64, at most 200 epochs, ended after 10 without a gain on a fifth of the thoughts held out; a of 0.5, 1 and 2 by the
    accuracy there. These are values of the official grid.

    The word that turns back has to be written before it is known that a chunk has ended. With it comes the state, which
    therefore costs nothing; what is lost where a thought ends is that word. Where the rung ends a thought, the answer is asked
    for, as `forced_thinking` does, the whole thought that all is compared with.

    Its controls: `static_exit` ends the thought after the m-th such chunk, m with as many tokens on train thoughts as the
    probe, `random_exit` at such chunks by a coin that ends as many, `confidence_exit` where the probability of the answer
    that is asked for there exceeds 0.85 (it costs three rows), and `first_answer_exit` at the first sentence that begins
    with ``so``: these texts have a word for the answer, which texts of the paper have not, and who knows it needs no probe.

    Differs from the paper: labels are read off the texts, where the paper asks another model for them. The probe is linear;
    the official grid also has hidden layers of 16 and 32, smaller learning rates and other decays. Words that turn back are
    two, and a chunk starts at such a word, not at the paragraph that holds one.

    What limits it here: a thought has few words that turn back, so that there are few places to leave at, and the answer is
    said late, after all steps.
    """

    paper = Paper(
        id="hidden_state_self_verification",
        title="Reasoning Models Know When They're Right: Probing Hidden States for Self-Verification",
        authors="Anqi Zhang, Yulin Chen, Jane Pan, Chen Zhao, Aurojit Panda, Jinyang Li, He He",
        year=2025,
        arxiv="2504.05419",
        code="AngelaZZZ-611/reasoning_models_probing",
    )
    tasks = ("solve/problems",)
    baselines = (
        "forced_thinking",
        "static_exit",
        "random_exit",
        "confidence_exit",
        "first_answer_exit",
        "chain_of_thought",
    )
    trainings = 3
    claims = (
        Claim(
            "accuracy[hidden_state_self_verification,128..512] >= accuracy[forced_thinking,128..512] - 0.01 "
            "and nfe[hidden_state_self_verification,128..512] <= 0.8 * nfe[forced_thinking,128..512]",
            says="a fifth of the tokens is saved and no fewer answers are right (the paper: 24 %)",
            headline=True,
            setting="thoughts of eight sentences with three places to leave at",
        ),
        Claim(
            "accuracy[hidden_state_self_verification,128..512] > accuracy[static_exit,128..512] "
            "and accuracy[hidden_state_self_verification,128..512] > accuracy[random_exit,128..512]",
            says="more answers are right than where as many tokens are thought and nothing is looked at",
        ),
        Claim(
            "accuracy[hidden_state_self_verification,128..512] >= accuracy[confidence_exit,128..512] - 0.01 "
            "and nfe[hidden_state_self_verification,128..512] < nfe[confidence_exit,128..512]",
            says="with fewer tokens as right as by the probability of the answer",
        ),
        Claim(
            "accuracy[hidden_state_self_verification,128..512] >= accuracy[first_answer_exit,128..512] - 0.01 "
            "and nfe[hidden_state_self_verification,128..512] <= nfe[first_answer_exit,128..512]",
            says="the state tells the answer before the word for it does",
        ),
    )
    rule, threshold = "probe", 0.85
    variants = (
        Variant("static_exit", says="ends after a fixed number of chunks", rule="static"),
        Variant("random_exit", says="ends at chunks by a coin", rule="coin"),
        Variant("confidence_exit", says="ends where the answer that is asked for is likely", rule="confidence"),
        Variant("first_answer_exit", says="ends at the first sentence that says the answer", rule="first"),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The probe, untrained."""
        return (
            {"probe": nn.Linear(session.networks["model"].llama.config.hidden_size, 1)} if self.rule == "probe" else {}
        )

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Train the probe; {"chunks", "coin"} of the controls that know nothing but how soon it ends thoughts."""
        if self.rule in ("confidence", "first"):
            return {}
        found = session.once(trained, session.scale(TRACES, 6), self.threshold)
        if self.rule == "probe":
            session.networks["probe"].load_state_dict({name: found[name] for name in ("weight", "bias")})
        return {name: found[name] for name in ("chunks", "coin")}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Texts whose thoughts end where the answer stated is believed to be right."""
        reserve, states = RESERVE.get(self.rule, ANSWER), self.rule == "probe"
        thoughts = Thoughts(session.networks["model"], batch["question"], rung, reserve, states)
        chains, met = thoughts.chains, [0] * len(batch["question"])
        while going := thoughts.thinking():
            thoughts.write(going, session.rng, limit=1)  # the first word of a sentence: does it turn back?
            turned = [i for i in going if chains.texts[i][-1] in CUES]
            at = [i for i in turned if stated(thoughts.written(i)[:-1]) is not None]
            for i in at:
                met[i] += 1
            for i in self.leaving(session, thoughts, at, met) if at else ():
                chains.cut(i, len(chains.texts[i]) - 1)
                thoughts.settle(i, [*(stated(thoughts.written(i)) or []), EOS])
            thoughts.write([i for i in thoughts.thinking() if chains.texts[i][-1] != STOP], session.rng)
            for i in thoughts.paused(going) if self.rule == "first" else ():
                digits = stated(thoughts.written(i)) or []
                if digits and thoughts.written(i)[-len(digits) - 2] == SO:
                    thoughts.settle(i, [*digits, EOS])
        return thoughts.finish()

    def leaving(self, session: Session, thoughts: Thoughts, at: list[int], met: list[int]) -> list[int]:
        """Those of the texts one word behind the end of a chunk whose thought ends there."""
        if self.rule == "first":
            return []
        if self.rule == "static":
            return [i for i in at if met[i] >= int(session.state["chunks"])]
        if self.rule == "coin":
            drawn = torch.rand(len(at), generator=session.rng, device=session.device).tolist()
            return [i for i, u in zip(at, drawn, strict=True) if u < float(session.state["coin"])]
        if self.rule == "confidence":
            sure = torch.tensor([logprob for _, logprob in thoughts.ask(at, back=1)]).exp()
        else:
            sure = session.networks["probe"](thoughts.chains.states(at, back=1))[:, 0].sigmoid()
        return [i for i, p in zip(at, sure.tolist(), strict=True) if p > self.threshold]
