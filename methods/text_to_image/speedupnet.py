"""SpeedUpNet: adapters beside cross-attention take the work of guidance with negative prompts, and of small steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_coefficients, ddim_step
from stepmark.tracks.image.training import fit
from stepmark.tracks.scenes.captions import LENGTH, negative_prompt, positive, read, tokens, write
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.inside import cross_attentions, processed
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, column, ddim

FINE = 16  # guided steps of the paths that are learned from


class Offset(nn.Module):
    """The adapter of one cross-attention layer: keys and values for the negative and once more for the positive prompt, and a
    gain and a shift for what is read with them. It starts with the layer's own keys and values, gains of 1, shifts of 0.
    """

    def __init__(self, attn: Any) -> None:
        super().__init__()
        shape, width = attn.to_k.weight.shape, attn.to_k.out_features
        for kind in ("negative", "positive"):
            for part in ("key", "value"):
                linear = nn.Linear(shape[1], width, bias=False)
                linear.weight.data.copy_((attn.to_k if part == "key" else attn.to_v).weight)
                setattr(self, f"{kind}_{part}", linear)
            setattr(self, f"{kind}_gain", nn.Parameter(torch.ones(width)))
            setattr(self, f"{kind}_shift", nn.Parameter(torch.zeros(width)))

    def forward(self, attn: Any, hidden: Tensor, prompts: Tensor) -> Tensor:
        """What the layer gives for hidden [B, pixels, width] and the states of both prompts, one behind the other [B, 64, 64]."""
        told, unwanted = prompts.split(LENGTH, 1)
        query = attn.head_to_batch_dim(attn.to_q(hidden))

        def attend(key: nn.Module, value: nn.Module, states: Tensor) -> Tensor:
            keys, values = attn.head_to_batch_dim(key(states)), attn.head_to_batch_dim(value(states))
            return attn.batch_to_head_dim(attn.get_attention_scores(query, keys) @ values)

        own = attend(attn.to_k, attn.to_v, told)
        found = own
        for kind, states, sign in (("negative", unwanted, -1), ("positive", told, 1)):
            read_out = attend(getattr(self, f"{kind}_key"), getattr(self, f"{kind}_value"), states)
            level = own.flatten(1).norm(dim=1) / read_out.flatten(1).norm(dim=1).clamp(min=1e-6)
            read_out = read_out * level[:, None, None]
            found = found + sign * (getattr(self, f"{kind}_gain") * read_out + getattr(self, f"{kind}_shift"))
        return attn.to_out[0](found)


def plugged(network: nn.Module, adapters: Any) -> AbstractContextManager[None]:
    """Inside, the adapters stand in the cross-attention layers of a network, which is not changed; afterwards it is as before."""

    def processor(adapter: nn.Module) -> Any:
        return lambda attn, hidden, encoder_hidden_states, **_: adapter(attn, hidden, encoder_hidden_states)

    return processed(cross_attentions(network), map(processor, adapters))


def accelerated(network: nn.Module, adapters: nn.Module, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
    """eps [B, 4, 8, 8] of a network with adapters, at times t [B], for states of both prompts [B, 64, 64]: one evaluation."""
    with plugged(network, adapters):
        return network(x, schedule_of(network).network_time(t).to(x.dtype), prompts)


@torch.no_grad()
def paths(session: Session, base: Any, count: int, guidance: float) -> dict[str, Tensor]:
    """From noise to latents in 16 guided DDIM steps of the base, for captions and negative prompts drawn at random.

    {"x": [17, N, 4, 8, 8], "eps": guided predictions [16, N, 4, 8, 8], "prompts": [N, 64, 64]}. Negative prompts are those of
    training captions, or empty, half of each; of captions and pictures of another style nothing is used but the words.
    """
    captions = [read(text) for text in session.train["text"][: session.scale(20_000, 100)]]
    told = tokens([write(replace(positive(caption), pastel=False)) for caption in captions])
    unwanted = tokens([negative_prompt(caption) for caption in captions if caption.absent is not None])
    device = session.device

    def drawn(n: int) -> Tensor:
        return torch.randint(n, (count,), generator=session.rng, device=device)

    ids, negative = told.to(device)[drawn(len(told))], unwanted.to(device)[drawn(len(unwanted))]
    empty = torch.rand(count, generator=session.rng, device=device) < 0.5
    negative = torch.where(empty[:, None], base.null_condition(negative), negative)
    noise = torch.randn(count, *LATENT, generator=session.rng, device=device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in session.progress(torch.arange(count, device=device).split(64), "paths"):
        denoise = GuidedByCaption(base, {"condition": ids[rows], "negative": negative[rows]}, guidance)
        x, states, guided = noise[rows], [noise[rows]], []
        for t, s in pairwise(uniform_times(FINE)):
            x0, eps = denoise(x, t)
            x = ddim_step(denoise.schedule, x0, eps, s)
            states.append(x)
            guided.append(eps)
        no, yes = denoise.condition.chunk(2)
        parts.append((torch.stack(states), torch.stack(guided), torch.cat([yes, no], 1)))
    x, eps, prompts = (torch.cat(each, dim) for each, dim in zip(zip(*parts, strict=True), (1, 1, 0), strict=True))
    return {"x": x, "eps": eps, "prompts": prompts}


def landing(schedule: Any, x: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where one DDIM step from x at times t [B] leads to at times s [B]."""
    pairs = zip(t.tolist(), s.tolist(), strict=True)
    a, b = x.new_tensor([ddim_coefficients(schedule, *pair) for pair in pairs]).t()
    return column(a) * x + column(b) * eps


class SpeedUpNet(Method):
    """SpeedUpNet (SUN): adapters for cross-attention that make one evaluation do what guidance with a negative prompt does in
    two, and one step what several do; trained on one model, they serve all that were tuned from it.

    In every cross-attention layer of the frozen network, with queries Q, the prompt c and the negative prompt n,

        Z = A(Q, K c, V c) - (g_n N[A(Q, K_n n, V_n n)] + h_n) + (g_p N[A(Q, K_p c, V_p c)] + h_p)

    where A is attention, N[.] brings what was read to the norm of A(Q, K c, V c), and K_n, V_n, K_p, V_p, g, h are all that is
    trained: 6 % of the network's parameters. The adapters start with the layer's own K and V, where with n = c they change
    nothing. First they learn the offset of guidance at states of guided sampling,

        |eps_sun(x_t, t, c, n) - (eps(x_t, n) + w (eps(x_t, c) - eps(x_t, n)))|^2,   w = 3

    then multi-step consistency: one step of SUN is to land where the guided network lands in several,

        |DDIM(x_t, eps_sun; t -> s) - x_s|^2,   s = t - 1/m,   m = 4 or 8

    with x_t and x_s on one path of 16 guided steps: 4 or 2 of its steps for one. All end points are not the same, as they are
    for consistency models, so that in 4 or 8 steps the picture stays the network's own. A rung of n evaluations is n DDIM
    steps of one evaluation, at most 8.

    On `text_to_image/scenes_pastel` the adapters are trained on "base" and plugged into "teacher", a copy that was tuned to
    another style, without more training. No picture is used there or elsewhere, only captions: paths begin at noise.

    The form of the adapters is that of the authors' code; they publish no training, and that adapters start with the layer's
    own weights is a reading. Differs from the paper: states are those of guided paths and not noised pictures, the solver is
    DDIM; norms are those of each picture and not of the batch, so that pictures do not hang on their neighbours; 512 paths, 100
    updates of the first kind and 250 of the second.

    Three controls: `speedupnet_offset_only` learns guidance for as many updates in all and never long steps;
    `speedupnet_deaf` is given the empty caption for every negative prompt; the guided samplers with as many evaluations.

    What limits it here: adapters reach the network through its words only, and long steps ask for more than words.
    """

    paper = Paper(
        id="speedupnet",
        title="SpeedUpNet: A Plug-and-Play Hyper-Network for Accelerating Text-to-Image Diffusion Models",
        authors="Chai, Zheng, Cao, Chen, Wang, Ma",
        year=2023,
        arxiv="2312.08887",
        code="williechai/speedup-plugin-for-stable-diffusions",
    )
    tasks = ("negative/scenes_eps", "text_to_image/scenes_pastel")
    baselines = ("dpm_guided", "ddim_guided", "speedupnet_offset_only")
    trainings = 3
    claims = (
        Claim(
            "caption[speedupnet,4..8] >= 0.95 * caption[dpm_guided,64] "
            "and absent[speedupnet,4..8] >= 0.95 * absent[dpm_guided,64] and fd[speedupnet,4..8] <= 1.1 * fd[dpm_guided,64] "
            "and nfe_equivalent[speedupnet,4] <= 0.08 * nfe_equivalent[dpm_guided,64] "
            "and absent[speedupnet,4..8] > absent[speedupnet_deaf,4..8] "
            "and caption[speedupnet,4..8] > max(caption[speedupnet_offset_only,4..8], caption[dpm_guided,4..8])",
            says="in four to eight evaluations, four of which cost a tenth of what twenty-five guided steps do, captions and "
            "negative prompts are heeded and pictures are as good as by the guided solver in thirty-two steps; the negative "
            "prompt is what does it, and neither guidance folded in alone nor the solver in as many evaluations does as well",
            headline=True,
        ),
        Claim(
            "latency_ms[speedupnet,4] <= 0.08 * latency_ms[dpm_guided,64]",
            says="and take a tenth of the time of twenty-five guided steps",
            headline=True,
            setting="a network so small that a call takes longer than its arithmetic",
        ),
        Claim(
            "caption[speedupnet,4..8] >= 0.95 * caption[dpm_guided,64] and fd[speedupnet,4..8] <= 1.1 * fd[dpm_guided,64] "
            "and caption[speedupnet,4..8] > caption[dpm_guided,4..8] and caption[speedupnet,4..8] >= caption[lcm_lora,4..8]",
            says="plugged into a copy tuned to another style, without training, they do the same there, and no worse than an "
            "adapter that was distilled for consistency",
            task="text_to_image/scenes_pastel",
            headline=True,
        ),
    )

    consistent, deaf = True, False
    guidance, longest, count = GUIDANCE, 8, 512
    batch, rate, first, second = 32, 1e-3, 100, 250
    variants = (
        Variant(
            "speedupnet_offset_only",
            says="trained as long, to guidance alone: no loss of several steps in one",
            consistent=False,
            baselines=("dpm_guided",),
        ),
        Variant(
            "speedupnet_deaf",
            says="the empty caption in the place of every negative prompt",
            deaf=True,
            tasks=("negative/scenes_eps",),
            baselines=("speedupnet_offset_only",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"adapters": nn.ModuleList(Offset(layer) for layer in cross_attentions(self.base(session)))}

    @staticmethod
    def base(session: Session) -> nn.Module:
        """What the adapters are trained on: another network than they are used with where the task has one."""
        return session.networks["base" if "base" in session.networks else "teacher"]

    def prepare(self, session: Session) -> None:
        trained = session.once(
            adapt, self.consistent, self.guidance, self.count, self.batch, self.rate, self.first, self.second
        )
        session.networks["adapters"].load_state_dict(trained)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        teacher: Any = session.networks["teacher"]
        told = teacher.words(batch["condition"])
        heard = "negative" in batch and not self.deaf
        unwanted = teacher.words(batch["negative"]) if heard else teacher.null_condition(told)
        with plugged(teacher, session.networks["adapters"]):
            denoise = Denoiser(teacher, torch.cat([told, unwanted], 1))
            return ddim(denoise, batch["noise"], uniform_times(min(rung, self.longest)))


def adapt(
    session: Session, consistent: bool, guidance: float, count: int, size: int, rate: float, first: int, second: int
) -> dict[str, Tensor]:
    """Adapters trained on the base of a session: their weights."""
    base = SpeedUpNet.base(session)
    adapters = nn.ModuleList(Offset(layer) for layer in cross_attentions(base)).to(session.device)
    schedule, known = schedule_of(base), paths(session, base, session.scale(count, 2), guidance)
    times = torch.tensor(uniform_times(FINE), device=session.device)
    size = session.scale(size, 2)

    def drawn(n: int, often: int) -> Tensor:
        return torch.randint(n, (often,), generator=session.rng, device=session.device)

    def offset() -> Tensor:
        rows, at = drawn(len(known["prompts"]), size), drawn(FINE, size)
        eps = accelerated(base, adapters, known["x"][at, rows], times[at], known["prompts"][rows])
        return (eps - known["eps"][at, rows]).square().mean()

    def several_in_one() -> Tensor:
        rows, stride = drawn(len(known["prompts"]), size), FINE // (4, 8)[int(drawn(2, 1))]
        at = stride * drawn(FINE // stride, size)
        x, t = known["x"][at, rows], times[at]
        eps = accelerated(base, adapters, x, t, known["prompts"][rows])
        return (landing(schedule, x, eps, t, times[at + stride]) - known["x"][at + stride, rows]).square().mean()

    fit(session, adapters, offset, session.scale(first, 1), rate, clip=1.0)
    fit(session, adapters, several_in_one if consistent else offset, session.scale(second, 1), rate / 2, clip=1.0)
    return adapters.state_dict()
