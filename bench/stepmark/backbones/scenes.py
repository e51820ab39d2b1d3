"""Networks of the captioned scenes: an autoencoder of the pictures, an encoder of the captions, the latent denoiser.

Everything else of the track works on the latents of `scenes_vae`, 8x8x4, which `Autoencoder.encode` scales to unit variance:
they cost what digits cost. Captions become the states of `scenes_text`, which is trained first, to say what lies where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepmark.backbones import Progress, Recipe, load
from stepmark.task import load_split
from stepmark.tracks.scenes.captions import (
    BACKGROUNDS,
    COLOURS,
    END,
    LENGTH,
    PAD,
    PLACES,
    SHAPES,
    SIZES,
    START,
    TEXTURES,
    VOCABULARY,
    read,
)

LATENT = (4, 8, 8)
WIDTH = 64  # of the states of captions
GUIDANCE_DIM = 64  # of the embedding of a guidance scale


# latents ----------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """A `diffusers.AutoencoderKL` of pictures [B, 3, 32, 32] in [-1, 1] and latents [B, 4, 8, 8] of unit variance.

    `vae` is the wrapped model. Of the encoder's Gaussian the mean is taken, so that a picture has one latent.
    """

    def __init__(self) -> None:
        super().__init__()
        from diffusers import AutoencoderKL  # seconds to import: only when a network is built

        model: Any = AutoencoderKL
        self.vae = model(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            latent_channels=LATENT[0],
            norm_num_groups=8,
            sample_size=32,
            mid_block_add_attention=False,
        )
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))  # 1 / standard deviation of the means on the training pictures

    def encode(self, x: Tensor) -> Tensor:
        """Latents [B, 4, 8, 8] of pictures [B, 3, 32, 32]."""
        return self(x)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures [B, 3, 32, 32] of latents, as they come from the decoder: not cut off at -1 and 1."""
        return self(z)

    def forward(self, x: Tensor) -> Tensor:
        """What three channels are encoded to, and four decoded: an evaluation either way."""
        if x.shape[1] == LATENT[0]:
            return self.vae.decode(x / self.scale, return_dict=False)[0]
        return self.vae.encode(x).latent_dist.mean * self.scale


def pictures() -> Tensor:
    """What the autoencoder is trained on: the training pictures of every data set of the track [N, 3, 32, 32]."""
    parts = [load_split(name, "train")["x0"] for name in ("scenes32", "pastel32", "parts32", "edits32")]
    tryon, clips = (load_split(name, "train") for name in ("tryon32", "clips32"))
    parts += [
        tryon["x0"],
        tryon["garment"],
        tryon["agnostic"],
        clips["x0"][:, ::4].flatten(0, 1),
        clips["without"][:, 3],
    ]
    return torch.cat(parts)


def _train_vae(network: nn.Module, progress: Progress, steps: int = 16_000) -> dict[str, float]:
    """Absolute error of the pixels and 1e-6 of the divergence from a standard normal (Rombach et al. 2022, appendix G),
    without an adversary: the eye asks for sharp edges, and these pictures have no texture to be invented.

    With activations in bfloat16 for the first 10 000 of 12 000 steps, which took half the time, 76, 37 and 7 % of the
    captions of one, two and three objects are right in what is decoded; of the pictures themselves 100, 99 and 95 %.
    """
    assert isinstance(network, Autoencoder)
    everything = pictures()
    draw = torch.Generator().manual_seed(901)
    with _training(network, steps, rate=2e-3, ema=0.999) as step:
        for _ in progress(range(steps), "train"):
            x = everything[torch.randint(len(everything), (32,), generator=draw)]
            posterior = network.vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=draw)
            drawn = network.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
            step((drawn - x).abs().mean() + 1e-6 * posterior.kl().mean())
    with torch.no_grad():
        sample = everything[torch.randperm(len(everything), generator=draw)[:4_000]]
        means = torch.cat([network.vae.encode(part).latent_dist.mean for part in sample.split(200)])
        network.scale.copy_(1 / means.std())
        held_out = load_split("scenes32", "test")["x0"]
        drawn = torch.cat([network.decode(network.encode(part)) for part in held_out.split(200)])
    return {"l1_scenes32": (drawn - held_out).abs().mean().item(), "deviation": means.std().item()}


# captions ---------------------------------------------------------------------------------------


class CaptionEncoder(nn.Module):
    """A `transformers.CLIPTextModel` of captions: ids int64 [B, 32] to states [B, 32, 64].

    `text` is the wrapped model. CLIP reads from the left; padding behind the end is masked by that.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                pad_token_id=PAD,
                bos_token_id=START,
                eos_token_id=END,
                attention_dropout=0.0,
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        """States [B, 32, 64] of ids [B, 32]."""
        return self.text(input_ids=ids).last_hidden_state


HEADS = {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "texture": len(TEXTURES)}


class _Places(nn.Module):
    """What a caption says lies in each of the nine places, read from its states by attention: only for training."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = nn.Parameter(torch.randn(len(PLACES) + 1, WIDTH) * 0.3)  # and of the background
        self.look = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, kinds + 1) for name, kinds in HEADS.items()})
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS) + 1)

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """Logits by attribute [B, 9, kinds + 1] (the last: nothing there, or not said) and of the background [B, 9]."""
        found = self.look(self.ask.expand(len(states), -1, -1), states, states, need_weights=False)[0]
        said = {name: head(found[:, :-1]) for name, head in self.heads.items()}
        return said | {"background": self.background(found[:, -1])}


def _what_is_said(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """Targets of `_Places`: the truth where the caption says it, else the class of what is not said."""
    n = len(data["text"])
    found = {name: torch.full((n, len(PLACES)), kinds) for name, kinds in HEADS.items()}
    found["background"] = torch.full((n,), len(BACKGROUNDS))
    for i, text in enumerate(data["text"]):
        caption = read(text)
        if caption.background is not None:
            found["background"][i] = caption.background
        for thing in caption.objects:
            if thing.place is not None:
                for name in HEADS:
                    value = getattr(thing, name)
                    if value is not None:
                        found[name][i, thing.place] = value
    return found


def _train_text(network: nn.Module, progress: Progress, steps: int = 2_000) -> dict[str, float]:
    """All kinds of captions of the training splits; the heads are thrown away."""
    assert isinstance(network, CaptionEncoder)
    parts = [load_split(name, "train") for name in ("scenes32", "pastel32")]
    ids = torch.cat([part["tokens"] for part in parts])
    said = [_what_is_said(part) for part in parts]
    targets = {name: torch.cat([each[name] for each in said]) for name in said[0]}
    draw = torch.Generator().manual_seed(911)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(912)
        places = _Places()
    both = nn.ModuleList([network, places])
    with _training(both, steps, rate=1e-3, ema=0.99) as step:
        for _ in progress(range(steps), "train"):
            rows = torch.randint(len(ids), (128,), generator=draw)
            logits = places(network(ids[rows]))
            step(sum((_loss(logits[name], targets[name][rows]) for name in targets), torch.zeros(())))
    report = {}
    for split in ("one", "two", "three"):
        data = load_split("scenes32", split)
        with torch.no_grad():
            logits = places(network(data["tokens"]))
        right = [logits[name].argmax(-1).eq(target) for name, target in _what_is_said(data).items()]
        whole = torch.stack([each.flatten(1).all(1) if each.dim() > 1 else each for each in right]).all(0)
        report[f"understood_{split}"] = whole.float().mean().item()
    return report


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), target.flatten())


# the denoiser -----------------------------------------------------------------------------------


class Painter(nn.Module):
    """A `diffusers.UNet2DConditionModel` of latents with the encoder of captions in front of it, called as image denoisers
    are: eps [B, 4, 8, 8] for x [B, 4, 8, 8], t float [B] in 0..999 and captions int64 [B, 32].

    Captions may also be given by their states, float [B, 32, 64], which `words` makes of ids: encoded once, asked often.
    `guidance` [B] is a scale w that a student is told (`guidance_embedding`, by `time_cond_proj_dim`); the teacher's weights
    for it are zero.

    Its schedule is that of latent diffusion, betas whose roots grow evenly from 0.00085 to 0.012 (`alphas_cumprod`, float64
    [1000]). `unet` is the wrapped model, `words` the encoder, which stays as it is.
    """

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        model: Any = UNet2DConditionModel
        self.unet = model(
            sample_size=LATENT[1],
            in_channels=LATENT[0],
            out_channels=LATENT[0],
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=16,
            cross_attention_dim=WIDTH,
            time_cond_proj_dim=GUIDANCE_DIM,
        )
        nn.init.zeros_(self.unet.time_embedding.cond_proj.weight)
        self.words = CaptionEncoder()
        self.alphas_cumprod = scaled_linear()

    def null_condition(self, condition: Tensor) -> Tensor:
        """The empty caption, in the form of the ones that are given."""
        return _empty(condition, self.words)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Predicted noise [B, 4, 8, 8]."""
        states = condition if condition.is_floating_point() else self.words(condition)
        told = None if guidance is None else guidance_embedding(guidance)
        return self.unet(x, t, states, timestep_cond=told, return_dict=False)[0]


class FlowPainter(nn.Module):
    """A `diffusers.PixArtTransformer2DModel` of latents in patches of 2x2, with the same encoder of captions in front of it:
    v = eps - x0 [B, 4, 8, 8] for x [B, 4, 8, 8], t float [B] in [0, 1] and captions, int64 [B, 32] or their states.

    Args:
        width, depth: of the transformer; heads are of 24 channels.

    `transformer` is the wrapped model, `words` the encoder, which stays as it is.
    """

    prediction = "flow"

    def __init__(self, width: int = 96, depth: int = 6) -> None:
        super().__init__()
        from diffusers import PixArtTransformer2DModel

        model: Any = PixArtTransformer2DModel
        self.transformer = model(
            num_attention_heads=width // 24,
            attention_head_dim=24,
            in_channels=LATENT[0],
            out_channels=LATENT[0],
            num_layers=depth,
            sample_size=LATENT[1],
            patch_size=2,
            cross_attention_dim=width,
            caption_channels=WIDTH,
            norm_type="ada_norm_single",
            use_additional_conditions=False,
        )
        self.words = CaptionEncoder()

    def null_condition(self, condition: Tensor) -> Tensor:
        """The empty caption, in the form of the ones that are given."""
        return _empty(condition, self.words)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predicted velocity [B, 4, 8, 8]."""
        states = condition if condition.is_floating_point() else self.words(condition)
        return self.transformer(x, encoder_hidden_states=states, timestep=t * 1000, return_dict=False)[0]


def _empty(condition: Tensor, words: nn.Module) -> Tensor:
    """The caption that says nothing, in the form of some: ids [B, 32], or states [B, 32, 64]."""
    empty = torch.full((len(condition), LENGTH), PAD, device=condition.device)
    empty[:, 0], empty[:, 1] = START, END
    return words(empty[:1]).expand_as(condition) if condition.is_floating_point() else empty


def guidance_embedding(scale: Tensor) -> Tensor:
    """Sines and cosines [B, 64] of guidance scales [B], as those of timesteps, of a thousand times the scale (Luo et al. 2023,
    whose code embeds the scale less one, that of the other convention)."""
    half = GUIDANCE_DIM // 2
    rates = torch.exp(torch.arange(half, device=scale.device, dtype=scale.dtype) * (-math.log(10_000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def scaled_linear() -> Tensor:
    """abar of the 1000 training timesteps of latent diffusion, float64 [1000]."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


@torch.no_grad()
def latents(pictures: Tensor) -> Tensor:
    """What `scenes_vae` makes of pictures [N, 3, 32, 32]: [N, 4, 8, 8]."""
    network = load("scenes_vae")
    assert isinstance(network, Autoencoder)
    return torch.cat([network.encode(part) for part in pictures.split(500)])


def _train_eps(network: nn.Module, progress: Progress, steps: int = 24_000) -> dict[str, float]:
    """On the latents of the training split, behind the encoder that knows what captions say."""
    assert isinstance(network, Painter)
    network.words.load_state_dict(load("scenes_text").state_dict())
    return fit(network, load_split("scenes32", "train"), steps, 921, progress)


def _train_pastel(network: nn.Module, progress: Progress, steps: int = 1_500) -> dict[str, float]:
    """`scenes_eps`, trained on with pictures of the other style alone."""
    assert isinstance(network, Painter)
    network.load_state_dict(load("scenes_eps").state_dict())
    return fit(network, load_split("pastel32", "train"), steps, 931, progress, rate=3e-4, ema=0.995)


def _train_parts(network: nn.Module, progress: Progress, steps: int = 1_500) -> dict[str, float]:
    """`scenes_eps`, trained on with objects of two colours alone."""
    assert isinstance(network, Painter)
    network.load_state_dict(load("scenes_eps").state_dict())
    return fit(network, load_split("parts32", "train"), steps, 971, progress, rate=3e-4, ema=0.995)


def _train_flow(network: nn.Module, progress: Progress, steps: int = 24_000) -> dict[str, float]:
    """Conditional flow matching with uniform times, on the same latents and captions."""
    assert isinstance(network, FlowPainter)
    network.words.load_state_dict(load("scenes_text").state_dict())
    return fit(network, load_split("scenes32", "train"), steps, 941, progress)


def fit(
    network: Painter | FlowPainter,
    data: Mapping[str, Any],
    steps: int,
    seed: int,
    progress: Progress,
    rate: float = 1.5e-3,
    ema: float = 0.9995,
) -> dict[str, float]:
    """Train a denoiser in place on the latents of a split, batches of 64, captions left out of one picture in eight; the
    encoder of the captions stays as it is. Returns {"loss": mean of the last tenth}.
    """
    network.words.requires_grad_(False)
    x0, ids = latents(data["x0"]), data["tokens"]
    with torch.no_grad():
        states = torch.cat([network.words(part) for part in ids.split(500)])
        nothing = network.words(network.null_condition(ids[:1]))
    abar = scaled_linear()
    signal, noise = abar.sqrt().float(), (1 - abar).sqrt().float()
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    moving = nn.ModuleList(part for name, part in network.named_children() if name != "words")
    with _training(moving, steps, rate, ema) as step:
        for number in progress(range(steps), "train"):
            rows = torch.randint(len(x0), (64,), generator=draw)
            eps = torch.randn(64, *LATENT, generator=draw)
            if network.prediction == "flow":
                t = torch.rand(64, generator=draw)
                alpha, sigma, target = 1 - t, t, eps - x0[rows]
            else:
                index = torch.randint(len(signal), (64,), generator=draw)
                t, alpha, sigma, target = index.float(), signal[index], noise[index], eps
            dropped = torch.rand(64, generator=draw) < 1 / 8
            said = torch.where(dropped[:, None, None], nothing, states[rows])
            x_t = alpha.view(-1, 1, 1, 1) * x0[rows] + sigma.view(-1, 1, 1, 1) * eps
            loss = (network(x_t, t, said) - target).square().mean()
            step(loss)
            if number >= 0.9 * steps:
                losses.append(loss.item())
    return {"loss": sum(losses) / len(losses)}


# training ---------------------------------------------------------------------------------------


@contextmanager
def _training(network: nn.Module, steps: int, rate: float, ema: float) -> Iterator[Callable[[Tensor], None]]:
    """Gives a function that takes a loss and makes a step: AdamW, 100 steps of warming up, a cosine down to 2 % of the rate,
    gradients no longer than 1. At the end the network holds the exponential moving average of its weights.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)

    def factor(done: int) -> float:
        return min((done + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    average = [p.detach().clone() for p in parameters]
    done = 0

    def step(loss: Tensor) -> None:
        nonlocal done
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        decay = min(ema, (done + 1) / (done + 10))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        done += 1

    network.train()
    yield step
    network.eval()
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def _built(kind: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Untrained, with first weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):  # libraries draw initial weights from the global stream
        torch.manual_seed(seed)
        return kind()


RECIPES: dict[str, Recipe] = {
    "scenes_vae": Recipe(
        partial(_built, Autoencoder, 900), _train_vae, "scenes32 and its relatives, autoencoder to 8x8x4 latents"
    ),
    "scenes_text": Recipe(
        partial(_built, CaptionEncoder, 910), _train_text, "scenes32, encoder of captions (CLIP text model)"
    ),
    "scenes_eps": Recipe(
        partial(_built, Painter, 920),
        _train_eps,
        "scenes32, latent diffusion UNet asked by captions (noise prediction)",
    ),
    "scenes_pastel": Recipe(
        partial(_built, Painter, 930), _train_pastel, "pastel32, scenes_eps tuned to another style"
    ),
    "scenes_parts": Recipe(
        partial(_built, Painter, 970), _train_parts, "parts32, scenes_eps tuned to objects of two colours"
    ),
    "scenes_flow": Recipe(
        partial(_built, FlowPainter, 940), _train_flow, "scenes32, latent rectified-flow transformer asked by captions"
    ),
}
