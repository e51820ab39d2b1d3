from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.fusing import fused
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import euler_step
from stepmark.tracks.image.training import fit, sinusoids


class DecoupledBlock(nn.Module):
    """A transformer block on [B, L, width] whose norms and residuals are modulated by c, [B, 1 or L, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """As x."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c).chunk(6, -1)
        inner = fused("adaptive_norm", x, scale, shift)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(inner).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(mixed)
        return x + gate_mlp * self.mlp(fused("adaptive_norm", x, scale_mlp, shift_mlp))


class DecoupledDiT(nn.Module):
    """A decoupled diffusion transformer (Wang et al. 2025): z = encoder(x_t, t, y), v = decoder(x_t, t, z).

    The encoder's blocks are modulated by time and class, the decoder's token by token by z = SiLU(t + what the encoder
    found). Called as network(x, t, condition) it gives (v, z); called with the z of another step, the encoder is left
    out.
    """

    prediction = "flow"

    def __init__(
        self, size: int, channels: int, kinds: int, width: int = 64, encoder: int = 4, decoder: int = 2, patch: int = 2
    ) -> None:
        super().__init__()
        self.patch, self.width, planes = patch, width, channels * patch**2
        self.place = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.see, self.draw = nn.Linear(planes, width), nn.Linear(planes, width)  # one for each half
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.kind = nn.Embedding(kinds, width)
        self.encoder = nn.ModuleList(DecoupledBlock(width, 4) for _ in range(encoder))
        self.decoder = nn.ModuleList(DecoupledBlock(width, 4) for _ in range(decoder))
        self.last_modulation, self.last = nn.Linear(width, 2 * width), nn.Linear(width, planes)
        for layer in (self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v [B, C, H, W] and z [B, L, width] for x [B, C, H, W], t float [B], condition int64 [B]."""
        silu = torch.nn.functional.silu
        tokens, time = self.tokens(x), self.time(sinusoids(t, 64))[:, None]
        if z is None:
            state, c = self.see(tokens) + self.place, silu(time + self.kind(condition)[:, None])
            for block in self.encoder:
                state = block(state, c)
            z = silu(time + state)
        h = self.draw(tokens) + self.place
        for block in self.decoder:
            h = block(h, z)
        return self.velocity(h, z, x.shape[-1] // self.patch), z

    def tokens(self, x: Tensor) -> Tensor:
        """The patches [B, L, C patch^2] of x [B, C, H, W]."""
        return torch.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)

    def velocity(self, h: Tensor, c: Tensor, grid: int) -> Tensor:
        """v [B, C, H, W] of the last tokens [B, L, width], modulated by c, [B, 1 or L, width]; `grid` patches to a row."""
        shift, scale = self.last_modulation(c).chunk(2, -1)
        out = self.last(fused("adaptive_norm", h, scale, shift))
        return torch.pixel_shuffle(out.transpose(1, 2).unflatten(2, (grid, -1)), self.patch)


class UndividedDiT(DecoupledDiT):
    """The same blocks in one run, all modulated by time and class: a diffusion transformer as it was. There is no z."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v as of the decoupled one, and what the last block gives; z is not looked at."""
        time = self.time(sinusoids(t, 64))[:, None]
        h, c = self.see(self.tokens(x)) + self.place, torch.nn.functional.silu(time + self.kind(condition)[:, None])
        for block in (*self.encoder, *self.decoder):
            h = block(h, c)
        return self.velocity(h, c, x.shape[-1] // self.patch), h


def sample_decoupled(
    network: nn.Module, x: Tensor, condition: Tensor, steps: int, recomputed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Euler steps of a decoupled transformer whose encoder runs in the `recomputed` steps only (0 among them), its z being
    kept in between. Returns the samples [B, ...] and the z of every step [steps, B, L, width].
    """
    z, kept = None, []
    for step, (t, s) in enumerate(pairwise(uniform_times(steps))):
        time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        v, z = network(x, time, condition, None if step in recomputed else z)
        x = euler_step(x, v, t, s)
        kept.append(z)
    return x, torch.stack(kept)


@torch.no_grad()
def state_similarity(session: Session, network: nn.Module, steps: int) -> Tensor:
    """S [steps, steps]: mean cosine of the tokens of z between any two steps, on noises with classes of the train split."""
    label, n = session.train["condition"].to(session.device), session.scale(64, 8)
    condition = label[torch.randint(len(label), (n,), generator=session.rng, device=session.device)]
    noise = torch.randn(n, *session.train["x0"].shape[1:], generator=session.rng, device=session.device)
    states = sample_decoupled(network, noise, condition, steps, range(steps))[1]
    unit = torch.nn.functional.normalize(states.flatten(1, 2), dim=-1)
    return torch.einsum("ind,jnd->ij", unit, unit) / unit.shape[1]


def chosen_steps(similarity: Tensor, count: int) -> list[int]:
    """The `count` steps to recompute at, step 0 among them, that maximise the sum over steps i of S[i, last one <= i].

    Dynamic programming (Wang et al. 2025, section 4.3): best[k][i] is the least loss of the first i steps with k
    recomputations, the last of them at some j < i, so that best[k][i] = min over j of best[k-1][j] + the sum of 1 - S[l, j]
    for l = j .. i - 1.
    """
    loss = (1 - similarity.double()).tolist()
    steps, infinite = len(loss), float("inf")
    spans = [[0.0] * (steps + 1) for _ in range(steps)]  # spans[j][i]: steps j .. i - 1 use the z of step j
    for j in range(steps):
        for i in range(j, steps):
            spans[j][i + 1] = spans[j][i] + loss[i][j]
    best = [[0.0] + [infinite] * steps]
    origin: list[list[int]] = []
    for _ in range(count):
        reached = [
            min((best[-1][j] + spans[j][i], j) for j in range(i)) if i else (infinite, 0) for i in range(steps + 1)
        ]
        best.append([value for value, _ in reached])
        origin.append([j for _, j in reached])
    chosen, end = [], steps
    for places in reversed(origin):
        end = places[end]
        chosen.append(end)
    return chosen[::-1]


def masked_features(session: Session, patch: int = 2, width: int = 32) -> Callable[[Tensor], Tensor]:
    """A small self-supervised encoder, images -> [B, L, width]: it is trained to fill in patches that were blanked."""
    data, rng, device = session.train["x0"].to(session.device), session.rng, session.device
    layers = [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
    trunk = nn.Sequential(nn.Conv2d(data.shape[1], width, patch, stride=patch), *layers)
    whole = nn.Sequential(trunk, nn.SiLU(), nn.Conv2d(width, data.shape[1] * patch**2, 1)).to(device)

    def loss() -> Tensor:
        x = data[torch.randint(len(data), (128,), generator=rng, device=device)]
        target = torch.pixel_unshuffle(x, patch)
        blank = (torch.rand(len(x), 1, *target.shape[2:], generator=rng, device=device) < 0.5).to(x.dtype)
        missing = whole(x * (1 - blank.repeat_interleave(patch, 2).repeat_interleave(patch, 3)))
        return (blank * (missing - target).square()).mean()

    fit(session, whole, loss, session.scale(400, 4))
    return torch.no_grad()(lambda x: trunk(x).flatten(2).transpose(1, 2))


def fit_decoupled(session: Session, steps: int = 900, layer: int = 2, weight: float = 0.5) -> dict[str, Tensor]:
    """Train the network "ddt" on flow matching, with tokens of an encoder layer aligned to `masked_features`; its weights.

    loss = |v - (eps - x0)|^2 + weight (1 - cos(projection(encoder layer), features of the clean image)), times
    distributed as the sigmoid of a normal variable.
    """
    network, rng, device = session.networks["ddt"], session.rng, session.device
    data, label = (session.train[key].to(device) for key in ("x0", "condition"))
    features, seen = masked_features(session), []
    size = features(data[:1]).shape[-1]
    project = nn.Sequential(nn.Linear(network.width, network.width), nn.SiLU(), nn.Linear(network.width, size)).to(
        device
    )
    hook = network.encoder[layer - 1].register_forward_hook(lambda module, given, found: seen.append(found))
    schedule = schedule_of(network)

    def loss() -> Tensor:
        pick = torch.randint(len(data), (64,), generator=rng, device=device)
        x0, t = data[pick], torch.randn(64, generator=rng, device=device).sigmoid()
        eps = torch.randn(x0.shape, generator=rng, device=device)
        v = network(add_noise(schedule, x0, eps, t), t, label[pick])[0]
        alike = torch.nn.functional.cosine_similarity(project(seen.pop()), features(x0), dim=-1)
        return (v - (eps - x0)).square().mean() + weight * (1 - alike).mean()

    fit(session, nn.ModuleList([network, project]), loss, session.scale(steps, 4), clip=1.0)
    hook.remove()
    return network.state_dict()


def fit_undivided(session: Session) -> dict[str, Tensor]:
    """The same training, draw for draw, where "ddt" is the undivided network."""
    return fit_decoupled(session)


class DDT(Method):
    """DDT: a diffusion transformer split into an encoder, which may be left out in some steps, and a decoder.

    The encoder (4 of 6 blocks) turns x_t, time and class into z, the decoder draws the velocity from x_t and z, by which
    each of its tokens is modulated (equations 2 to 5):

        z_t = Encoder(x_t, t, y),   v_t = Decoder(x_t, t, z_t)
        loss = |v_t - (eps - x0)|^2 + 0.5 (1 - cos(h(encoder block 2), r(x0)))

    where r are features of a self-supervised encoder of clean images. z changes slowly from step to step, so that half
    of the steps keep the z of an earlier one and run the decoder alone. Which ones is found by dynamic programming: the
    recomputed steps maximise the sum over all steps of the mean cosine between a step's own z and the one it is given,
    S_ij, measured on 64 trajectories in prepare (section 4.3, equations 6 to 8). The variants share network and training:
    `ddt_every_step` shares nothing; `ddt_uniform` takes as many steps at equal distances; `ddt_fifth` and
    `ddt_uniform_fifth` run the encoder K = N / 5 times in N steps (once where there are fewer than ten), a ratio of
    sharing of 0.8. `ddt_undivided` is what `ddt_every_step` is measured against: as many blocks of the same width in one
    run, modulated by time and class, with the same training, alignment of block 2 too. (The teacher of the task, which
    `euler` samples, learned twice as long, at another rate and without alignment.)

    Differs from the paper: learned positions instead of rotary ones and layer norms instead of root mean squares; a GELU
    layer in place of a gated one, no norm of queries and keys, and modulations of blocks that begin at zero too; a
    projection h of two layers, not three, and the optimiser of all students of this track; the features r come from a
    small convolutional network trained to fill in blanked patches, in place of DINOv2; no guidance, hence no class
    dropped in training; 900 updates, and weights averaged over the last hundred or so. A step costs one evaluation of the
    rung with or without its encoder: what sharing saves shows in FLOPs.

    What limits it here: after 900 updates both networks, divided or not, are far from the teacher and close to each other,
    and beyond eight steps more give worse images. With the encoder in half of the steps a stale z is then no loss at 16 and
    50 steps, and at 50 the Frechet distance is the lower, the fewer runs of the encoder there are: no similarity of z can
    foretell that, and the steps that are found are now better than equal ones and now worse. What half of the runs cost
    shows at eight steps and fewer. That training converges sooner, which the paper reports of split networks, is not
    measured: both arms get equal updates.
    """

    paper = Paper(
        id="ddt",
        title="DDT: Decoupled Diffusion Transformer",
        authors="Wang, Tian, Huang, Wang",
        year=2025,
        arxiv="2504.05741",
        code="MCG-NJU/DDT",
    )
    tasks = ("class_to_image/digits_dit",)
    baselines = ("ddt_every_step", "ddt_uniform")
    trainings = 3
    claims = (
        Claim(
            "fd[ddt_every_step,16..50] < fd[ddt_undivided,16..50]",
            says="split into encoder and decoder, a diffusion transformer is better than one of as many blocks as it was, "
            "after the same training",
            headline=True,
            setting="900 updates, after which more steps make the images of both worse",
        ),
        Claim(
            "fd[ddt,4..50] <= 1.1 * fd[ddt_every_step,4..50] and flops[ddt,4..50] < 0.75 * flops[ddt_every_step,4..50]",
            says="with the encoder in half of the steps the images are as good, for less than three quarters of the cost "
            "(at 16 and 50 steps a stale z lowers fd here)",
            setting="the paper shares among 250 steps, of which neighbours are alike",
        ),
        Claim(
            "latency_ms[ddt,16..50] < latency_ms[ddt_every_step,16..50]",
            says="and sampling is faster",
        ),
        Claim(
            "fd[ddt,4..50] <= fd[ddt_uniform,4..50]",
            says="steps that dynamic programming finds are no worse than every other one",
            setting="900 updates, after which a stale z lowers fd at many steps: fd does not tell what sharing costs",
        ),
    )

    divided = True  # into encoder and decoder
    shared, found = 2, True  # steps for each run of the encoder; whether they are searched for or at equal distances
    variants = (
        Variant(
            "ddt_every_step",
            says="DDT without sharing: the decoupled transformer with its encoder in every step",
            shared=1,
            found=False,
            baselines=("ddt_undivided", "euler"),
        ),
        Variant(
            "ddt_undivided",
            says="Undivided: a diffusion transformer of as many blocks, with the same training",
            shared=1,
            found=False,
            divided=False,
            baselines=("euler",),
        ),
        Variant(
            "ddt_uniform",
            says="DDT with its encoder in every other step",
            found=False,
            baselines=("ddt_every_step",),
            claims=(
                Claim(
                    "fd[ddt_uniform,4..50] <= 1.25 * fd[ddt_every_step,4..50] "
                    "and flops[ddt_uniform,4..50] < 0.75 * flops[ddt_every_step,4..50]",
                    says="every other encoder can be left out at little loss, for less than three quarters of the cost",
                    setting="the paper shares among 250 steps, of which neighbours are alike",
                ),
            ),
        ),
        Variant(
            "ddt_fifth",
            says="DDT with its encoder in a fifth of the steps, those that dynamic programming finds",
            shared=5,
            baselines=("ddt_every_step", "ddt_uniform_fifth"),
            claims=(
                Claim(
                    "fd[ddt_fifth,16..50] <= fd[ddt_uniform_fifth,16..50]",
                    says="where four of five encoders are left out, found steps are no worse than equal ones",
                    setting="900 updates, after which a stale z lowers fd at many steps: fd does not tell what sharing costs",
                ),
                Claim(
                    "fd[ddt_fifth,16..50] <= 1.1 * fd[ddt_every_step,16..50] "
                    "and flops[ddt_fifth,16..50] < 0.55 * flops[ddt_every_step,16..50]",
                    says="and the images are within 10 % of those of all encoders, for little more than half of the cost "
                    "(at 50 steps a stale z lowers fd here)",
                    setting="the paper shares among 250 steps, of which neighbours are alike",
                ),
            ),
        ),
        Variant(
            "ddt_uniform_fifth",
            says="DDT with its encoder in a fifth of the steps, at equal distances",
            shared=5,
            found=False,
            baselines=(),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        data, kinds = session.train["x0"], 1 + int(session.train["condition"].max())
        return {"ddt": (DecoupledDiT if self.divided else UndividedDiT)(data.shape[-1], data.shape[1], kinds)}

    def prepare(self, session: Session) -> dict[str, Tensor] | None:
        session.networks["ddt"].load_state_dict(session.once(fit_decoupled if self.divided else fit_undivided))
        if not self.found:
            return None
        rungs = session.scale(session.task.rungs, session.task.smoke_rungs)
        similar = {rung: state_similarity(session, session.networks["ddt"], rung) for rung in rungs}
        return {f"steps_{n}": torch.tensor(chosen_steps(s, max(1, n // self.shared))) for n, s in similar.items()}

    def steps(self, session: Session, rung: int) -> list[int]:
        """Those of `rung` steps in which the encoder runs."""
        if self.found:
            chosen = session.state.get(f"steps_{rung}")
            return list(range(rung)) if chosen is None else chosen.tolist()
        runs = max(1, rung // self.shared)
        return [i * rung // runs for i in range(runs)]

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, steps = session.networks["ddt"], self.steps(session, rung)
        return sample_decoupled(network, batch["noise"], batch["condition"], rung, steps)[0]
