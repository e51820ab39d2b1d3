"""Image denoisers: small conditional UNets (diffusers' UNet2DModel) and the exact denoiser of a Gaussian mixture.

All of them are called as `network(x, t, condition)` with x [B, C, H, W] (or [B, 2]), t float [B] and condition int64
[B] or [B, slots]. `network.prediction` says what comes back:

* "flow": v = eps - x0 for x_t = (1 - t) x0 + t eps, with t in [0, 1] (Lipman et al. 2023; Liu et al. 2023);
* "epsilon": eps for x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, with t in 0..999 and the linear variance schedule
  of DDPM (Ho et al. 2020), beta from 1e-4 to 0.02.

`network.null_condition(condition)` is the condition of the unconditional branch of classifier-free guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepmark.backbones import (
    Progress,
    Recipe,
    analogists,
    deducers,
    demonstrators,
    navigators,
    proceduralists,
    scenes,
    scenes_judges,
    solvers,
    wishers,
)
from stepmark.task import load_split

TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


def alphas_cumprod() -> Tensor:
    """abar of the 1000 training timesteps of the "epsilon" networks, float64 [1000]."""
    return torch.cumprod(1 - torch.linspace(BETA_START, BETA_END, TRAIN_TIMESTEPS, dtype=torch.float64), 0)


class ConditionalUNet(nn.Module):
    """A `diffusers.UNet2DModel` with coordinate channels and a learned table of conditions.

    Args:
        size, channels: images are [B, channels, size, size].
        widths: channels of the UNet's levels; the middle block holds self-attention.
        patch: the UNet sees patches of patch x patch pixels as channels, which saves most of the cost.
        attention: self-attention at the lowest level too.
        kinds: rows of the table that name something; one more row stands for "no condition" (guidance).
        prediction: "flow" or "epsilon".

    `unet` is the wrapped model. Embeddings of the slots of a condition are summed and passed as `class_labels`.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        widths: tuple[int, ...],
        kinds: int,
        prediction: str,
        patch: int = 1,
        attention: bool = False,
    ) -> None:
        super().__init__()
        from diffusers import UNet2DModel  # seconds to import: only when a network is built

        deeper = len(widths) - 1
        grid, planes = size // patch, channels * patch**2
        self.unet = UNet2DModel(
            sample_size=grid,
            in_channels=planes + 2,
            out_channels=planes,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * deeper + ("AttnDownBlock2D" if attention else "DownBlock2D",),
            up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D",) + ("UpBlock2D",) * deeper,
            norm_num_groups=8,
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        features = 4 * widths[0]
        self.table = nn.Embedding(kinds + 1, features)
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(features, features))
        self.kinds, self.prediction, self.patch = kinds, prediction, patch
        axis = torch.linspace(-1, 1, grid)
        self.coordinates: Tensor
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(axis, axis, indexing="ij")), persistent=False)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition of the unconditional branch, in the shape of `condition`."""
        return torch.full_like(condition, self.kinds)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction [B, C, H, W] for x [B, C, H, W], t float [B], condition int64 [B] or [B, slots]."""
        rows = self.table(condition)
        return self.denoise(x, t, rows if rows.dim() == 2 else rows.sum(1))

    def denoise(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The same with the condition given as a row [B, features] like those of the table."""
        label = self.embed(rows)
        timestep = t * TRAIN_TIMESTEPS if self.prediction == "flow" else t
        x = pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        planes = torch.cat([x, self.coordinates.to(x.dtype).expand(len(x), -1, -1, -1)], 1)
        out = self.unet(planes, timestep, class_labels=label, return_dict=False)[0]
        return pixel_shuffle(out, self.patch) if self.patch > 1 else out


class Faint(nn.Module):
    """A conditional denoiser that heeds its condition in part: null + w (conditional - null) with w < 1, as one row.

    As a model of captions does, it draws what it was asked for most of the time and something else now and then.
    """

    def __init__(self, named: ConditionalUNet, heed: float) -> None:
        super().__init__()
        self.named, self.prediction, self.kinds, self.heed = named, named.prediction, named.kinds, heed

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition of the unconditional branch, in the shape of `condition`."""
        return self.named.null_condition(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction [B, C, H, W]."""
        asked = torch.cat([self.null_condition(condition), condition])
        null, conditional = self.named(torch.cat([x, x]), torch.cat([t, t]), asked).chunk(2)
        return torch.lerp(null, conditional, self.heed)


class AnySize(nn.Module):
    """A denoiser of square images that takes other sizes too: its coordinate channels are stretched to what comes."""

    def __init__(self, named: ConditionalUNet) -> None:
        super().__init__()
        self.named, self.prediction, self.kinds = named, named.prediction, named.kinds

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition of the unconditional branch, in the shape of `condition`."""
        return self.named.null_condition(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction [B, C, H, W] for x [B, C, H, W], H = W any multiple of what the network halves."""
        axis = torch.linspace(-1, 1, x.shape[-1] // self.named.patch, device=x.device)
        self.named.coordinates = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
        return self.named(x, t, condition)


class Blended(nn.Module):
    """A denoiser whose condition blends named ones: weights float [B, kinds] of the rows of its table."""

    def __init__(self, named: ConditionalUNet) -> None:
        super().__init__()
        self.named, self.prediction, self.kinds = named, named.prediction, named.kinds

    def null_condition(self, condition: Tensor) -> Tensor:
        """No weight on anything: the prediction without a name has no place in a blend."""
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction [B, C, H, W] for x [B, C, H, W], t float [B], condition float [B, kinds]."""
        rows = condition.to(x.dtype) @ self.named.table.weight[: self.kinds]
        return self.named.denoise(x, t, rows)


class FlatDenoiser(nn.Module):
    """A residual perceptron on the pixels of small images, for data so simple that convolutions buy nothing.

    Args:
        size, channels: images are [B, channels, size, size].
        kinds: classes; one more row of the table stands for "no condition" (guidance).
        abar: products of 1 - beta, [N], of the schedule that its noise prediction is trained on.
    """

    prediction = "epsilon"

    def __init__(self, size: int, channels: int, kinds: int, abar: Tensor, width: int = 192) -> None:
        super().__init__()
        pixels = channels * size**2
        self.kinds = kinds
        self.alphas_cumprod = abar
        self.table = nn.Embedding(kinds + 1, width)
        self.enter, self.time = nn.Linear(pixels, width), nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(3)
        )
        self.leave = nn.Linear(width, pixels)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition of the unconditional branch, in the shape of `condition`."""
        return torch.full_like(condition, self.kinds)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction [B, C, H, W] for x [B, C, H, W], timesteps t float [B], condition int64 [B]."""
        angle = t[:, None] / TRAIN_TIMESTEPS * torch.logspace(0, 2, 32, device=t.device, dtype=t.dtype)
        waves = torch.cat([angle.sin(), angle.cos()], 1)
        hidden = self.enter(x.flatten(1)) + self.time(waves) + self.table(condition)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden).view(x.shape)


class MixtureDenoiser(nn.Module):
    """Exact prediction for Gaussian mixtures in the plane, in closed form: buffers only, nothing learned.

    `condition` [B] picks the mixture. With x_t = alpha x0 + sigma eps, component k of x_t is
    N(alpha mu_k, alpha^2 S_k + sigma^2 I), so with responsibilities r_k and C_k = alpha^2 S_k + sigma^2 I

        E[eps | x_t] = sigma sum_k r_k C_k^-1 (x_t - alpha mu_k)
        E[x0  | x_t] = sum_k r_k (mu_k + alpha S_k C_k^-1 (x_t - alpha mu_k)).

    Both are computed in the eigenbasis of S_k, so that no covariance is ever inverted near t = 0.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, prediction: str) -> None:
        """weights [M, K], means [M, K, 2], covariances [M, K, 2, 2] of M mixtures with K components each."""
        super().__init__()
        variances, axes = torch.linalg.eigh(covariances.double())
        self.prediction = prediction
        self.log_weights: Tensor
        self.means: Tensor
        self.variances: Tensor
        self.axes: Tensor
        self.log_abar: Tensor
        self.register_buffer("log_weights", weights.double().log())
        self.register_buffer("means", means.double())
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes)
        # log abar at the discrete timesteps, preceded by the data end (timestep -1): linear in between
        self.register_buffer("log_abar", torch.cat([torch.zeros(1).double(), alphas_cumprod().log()]))

    def null_condition(self, condition: Tensor) -> Tensor:
        """Mixtures have no unconditional branch: the same condition, so that guidance changes nothing."""
        return condition

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma [B, 1] at the network's own time: t in [0, 1] (flow), t in -1..999 (epsilon)."""
        if self.prediction == "flow":
            return (1 - t)[:, None], t[:, None]
        place = (t + 1).clamp(0, TRAIN_TIMESTEPS)
        left = place.floor().long().clamp(max=TRAIN_TIMESTEPS - 1)
        log_abar = torch.lerp(self.log_abar[left], self.log_abar[left + 1], place - left)[:, None]
        return (0.5 * log_abar).exp(), (-torch.expm1(log_abar)).sqrt()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """v or eps [B, 2] at x [B, 2], t float [B], condition int64 [B] (which mixture)."""
        alpha, sigma = (part[:, None] for part in self.signal_and_noise(t.to(self.means.dtype)))  # [B, 1, 1]
        mean, variance, axes = self.means[condition], self.variances[condition], self.axes[condition]
        offset = x.to(mean.dtype)[:, None] - alpha * mean  # [B, K, 2]
        spread = alpha**2 * variance + sigma**2
        whitened = torch.einsum("bkji,bkj->bki", axes, offset) / spread.clamp(min=1e-30)
        exponent = (whitened**2 * spread).sum(-1) + spread.log().sum(-1)
        share = torch.softmax(self.log_weights[condition] - 0.5 * exponent, 1)[:, :, None]  # [B, K, 1]
        eps = sigma[:, 0] * (share * torch.einsum("bkij,bkj->bki", axes, whitened)).sum(1)
        if self.prediction == "epsilon":
            return eps.to(x.dtype)
        pull = mean + alpha * torch.einsum("bkij,bkj->bki", axes, variance * whitened)
        return (eps - (share * pull).sum(1)).to(x.dtype)


def _rare() -> MixtureDenoiser:
    from stepmark.datasets import rare

    return MixtureDenoiser(rare.WEIGHTS, rare.MEANS, rare.COVARIANCES, "epsilon")


def _build(
    seed: int,
    size: int,
    channels: int,
    widths: tuple[int, ...],
    kinds: int,
    prediction: str,
    patch: int = 1,
    attention: bool = False,
) -> ConditionalUNet:
    """An untrained UNet whose first weights depend on the seed only."""
    with torch.random.fork_rng(devices=[]):  # diffusers draws initial weights from the global stream
        torch.manual_seed(seed)
        return ConditionalUNet(size, channels, widths, kinds, prediction, patch, attention)


def _faint(backbone: str, heed: float) -> Faint:
    from stepmark.backbones import load

    named = load(backbone)
    assert isinstance(named, ConditionalUNet)
    return Faint(named, heed)


def _any_size(backbone: str) -> AnySize:
    from stepmark.backbones import load

    named = load(backbone)
    assert isinstance(named, ConditionalUNet)
    return AnySize(named)


def _blended(backbone: str) -> Blended:
    from stepmark.backbones import load

    named = load(backbone)
    assert isinstance(named, ConditionalUNet)
    return Blended(named)


def _mixture(prediction: str) -> MixtureDenoiser:
    from stepmark.datasets import mixtures

    return MixtureDenoiser(mixtures.WEIGHTS, mixtures.MEANS, mixtures.COVARIANCES, prediction)


def train_denoiser(
    network: ConditionalUNet | FlatDenoiser,
    data: dict[str, Tensor],
    steps: int,
    seed: int,
    progress: Progress,
    batch: int = 64,
    rate: float = 2e-3,
    ema: float = 0.997,
    drop: float = 0.15,
    clip: float | None = None,
) -> dict[str, float]:
    """Train in place and leave the exponential moving average of the weights; returns {"loss": mean of the last 10 %}.

    Plain regression of v or eps with uniform times (conditional flow matching; DDPM's simple loss), AdamW with 50
    warm-up steps and a cosine down to 2 % of the rate, conditions dropped with probability `drop` for guidance.
    """
    draw = torch.Generator().manual_seed(seed)
    own = getattr(network, "alphas_cumprod", None)
    abar = alphas_cumprod() if own is None else own.double()
    signal, noise_scale = abar.sqrt().float(), (1 - abar).sqrt().float()
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)

    def factor(step: int) -> float:
        return min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    average = [p.detach().clone() for p in network.parameters()]
    losses: list[float] = []
    network.train()
    for step in progress(range(steps), "train"):
        rows = torch.randint(len(data["x0"]), (batch,), generator=draw)
        x0, condition = data["x0"][rows], data["condition"][rows]
        eps = torch.randn(x0.shape, generator=draw)
        dropped = torch.rand(batch, generator=draw) < drop
        condition = torch.where(dropped.view(-1, *[1] * (condition.dim() - 1)), network.kinds, condition)
        if network.prediction == "flow":
            t = torch.rand(batch, generator=draw)
            alpha, sigma = 1 - t, t
            target = eps - x0
        else:
            index = torch.randint(TRAIN_TIMESTEPS, (batch,), generator=draw)
            t, alpha, sigma = index.float(), signal[index], noise_scale[index]
            target = eps
        x_t = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
        loss = (network(x_t, t, condition) - target).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimiser.step()
        schedule.step()
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(average, list(network.parameters()), 1 - decay)
        if step >= steps * 0.9:
            losses.append(loss.item())
    with torch.no_grad():
        for parameter, mean in zip(network.parameters(), average, strict=True):
            parameter.copy_(mean)
    network.eval()
    return {"loss": sum(losses) / len(losses)}


def _train_digits(network: nn.Module, progress: Progress, seed: int) -> dict[str, float]:
    assert isinstance(network, ConditionalUNet)
    return train_denoiser(network, load_split("digits", "train"), 3000, seed, progress)


def _train_shapes(network: nn.Module, progress: Progress, seed: int) -> dict[str, float]:
    assert isinstance(network, ConditionalUNet)
    data = load_split("shapes16", "train")
    return train_denoiser(network, data, 6000, seed, progress, ema=0.999, clip=1.0)


def _shades() -> FlatDenoiser:
    """The schedule of latent diffusion (betas whose roots grow evenly), but ending at 0.0047 instead of 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.0047**0.5, TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights from the global stream
        torch.manual_seed(600)
        return FlatDenoiser(8, 1, 3, torch.cumprod(1 - betas, 0))


def _train_shades(network: nn.Module, progress: Progress) -> dict[str, float]:
    assert isinstance(network, FlatDenoiser)
    return train_denoiser(network, load_split("shades", "train"), 10000, 601, progress, batch=128, clip=1.0)


def _digits(seed: int, prediction: str, summary: str) -> Recipe:
    build: Callable[[], nn.Module] = partial(_build, seed, 8, 1, (16, 32), 10, prediction)
    return Recipe(build, partial(_train_digits, seed=seed + 1), summary)


RECIPES: dict[str, Recipe] = {
    "mixtures_flow": Recipe(partial(_mixture, "flow"), None, "exact velocity of the 2-D mixtures"),
    "mixtures_eps": Recipe(partial(_mixture, "epsilon"), None, "exact noise prediction of the 2-D mixtures"),
    "rare_eps": Recipe(_rare, None, "exact noise prediction of the 2-D mixture with rare components"),
    "digits_flow_a": _digits(100, "flow", "digits, rectified-flow UNet, first seed"),
    "digits_flow_b": _digits(200, "flow", "digits, rectified-flow UNet, second seed"),
    "digits_flow_faint": Recipe(
        partial(_faint, "digits_flow_a", 0.6), None, "digits, digits_flow_a heeding its classes by six tenths"
    ),
    "digits_eps_a": _digits(300, "epsilon", "digits, DDPM UNet (noise prediction), first seed"),
    "digits_eps_b": _digits(400, "epsilon", "digits, DDPM UNet (noise prediction), second seed"),
    "shades_eps": Recipe(
        _shades, _train_shades, "shades, noise prediction on a schedule that does not end in pure noise"
    ),
    "shapes16_flow": Recipe(
        partial(_build, 500, 16, 3, (32, 64), 7, "flow", patch=2, attention=True),
        partial(_train_shapes, seed=501),
        "shapes16, rectified-flow UNet conditioned on shape and colour",
    ),
    "shapes16_flow_any": Recipe(
        partial(_any_size, "shapes16_flow"), None, "shapes16, shapes16_flow at any size of image"
    ),
    "shapes16_flow_blend": Recipe(
        partial(_blended, "shapes16_flow"), None, "shapes16, shapes16_flow asked for blends of shapes and of colours"
    ),
}
RECIPES |= (
    scenes.RECIPES
    | scenes_judges.RECIPES
    | deducers.RECIPES
    | solvers.RECIPES
    | navigators.RECIPES
    | demonstrators.RECIPES
    | wishers.RECIPES
    | analogists.RECIPES
    | proceduralists.RECIPES
)
# Here, for all records of image networks hang on the list of families
