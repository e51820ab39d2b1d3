"""MixDQ: bits for the layers of a few-step student, by how much each of them matters to content or to quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.consistency import sample
from stepmark.tracks.text_to_image.students import UPDATES, lcm_student

BITS = (2, 4, 8)  # of weights
CONTENT = ("attn2", "ff")  # what is in the names of layers that content hangs on; of the others it is quality
RATIOS = np.linspace(0.46, 1.36, 10)  # of the mean bits of content to those of quality, as in the authors' code


# -- integers ---------------------------------------------------------------------------------------------------------


def to_integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers int8 [out, n] of so many bits, and their steps [out], of a weight [out, ...]: the greatest of a row is
    2^(bits - 1) - 1 steps."""
    rows, most = weight.detach().flatten(1), 2 ** (bits - 1) - 1
    steps = rows.abs().amax(1).clamp(min=1e-8) / most
    return (rows / steps[:, None]).round().clamp(-most - 1, most).to(torch.int8), steps


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers int8 of 2, 4 or 8 bits, 8 / bits to a byte: uint8 [numel bits / 8]."""
    values = (integers.flatten().to(torch.int16) + 2 ** (bits - 1)).view(-1, 8 // bits)
    return (values << (bits * torch.arange(8 // bits, device=values.device))).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` was given, flat."""
    shifts = bits * torch.arange(8 // bits, device=packed.device, dtype=torch.int16)
    return (((packed[:, None].to(torch.int16) >> shifts) & (2**bits - 1)) - 2 ** (bits - 1)).flatten()


def rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x on a grid of 256 values from low <= 0 to high >= 0, of which one is 0; beyond them cut off."""
    step = ((high - low) / 255).clamp(min=1e-8)
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, 255) - zero) * step


class IntegerLayer(nn.Module):
    """A linear map or a convolution. Once `store` was called its weights lie as integers, several to a byte, with a step for each
    output, and inputs are rounded to 8 bits between `low` and `high`, or left alone where these are equal. With a `first` output
    [out], of the token that every caption starts with, that token is not asked again and is no part of what is rounded.
    """

    def __init__(self, layer: Any) -> None:
        """The layer as it is, in floats."""
        super().__init__()
        self.weight: Any = layer.weight
        self.bias: Any = layer.bias
        self.packed: Any
        self.steps: Any
        self.low: Any
        self.high: Any
        self.first: Any
        self.shape = layer.weight.shape
        self.how = {"stride": layer.stride, "padding": layer.padding} if isinstance(layer, nn.Conv2d) else {}

    def put(self, **values: Tensor) -> None:
        """Take these tensors instead of the weight; parameters, so that their bytes count as the model's."""
        self._parameters.pop("weight", None)
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def store(self, weight: Tensor, bits: int, low: Tensor, high: Tensor, first: Tensor | None) -> None:
        """Take over a weight in so many bits, the range of the inputs, and the first output."""
        integers, steps = to_integers(weight, bits)
        more = {} if first is None else {"first": first}
        self.put(packed=pack(integers, bits), steps=steps, low=low, high=high, **more)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, of integer weights and rounded inputs."""
        if "first" in self._parameters:
            return torch.cat([self.first.expand(len(x), 1, -1), self.asked(x[:, 1:])], 1)
        return self.asked(x)

    def asked(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None:
            bits = 8 * self.packed.numel() // self.shape.numel()
            weight = (unpack(self.packed, bits).view(self.shape[0], -1) * self.steps[:, None]).view(self.shape)
            x = rounded(x, self.low, self.high) if self.high > self.low else x
        function: Callable[..., Tensor] = conv2d if len(self.shape) == 4 else linear
        return function(x, weight, self.bias, **self.how)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        """Whether there are integers, and how many bytes of them, is known only from what is loaded."""
        names = ("packed", "steps", "low", "high", "first")
        known = {name: state[prefix + name] for name in names if prefix + name in state}
        if known:
            device = next(self.parameters()).device
            self.put(**{name: torch.zeros_like(value, device=device) for name, value in known.items()})
        super()._load_from_state_dict(state, prefix, *rest)


def layers_of(network: Any) -> dict[str, Any]:
    """Linear maps and convolutions of a student's UNet, by name."""
    return {name: part for name, part in network.unet.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}


def is_content(name: str) -> bool:
    """Whether a layer of that name is of the content group."""
    return any(f".{part}." in name for part in CONTENT)


def hears_captions(name: str) -> bool:
    """Whether the inputs of a layer are the states of captions."""
    return name.endswith(("attn2.to_k", "attn2.to_v"))


# -- what a layer is worth --------------------------------------------------------------------------------------------


def sqnr(found: Tensor, wanted: Tensor) -> float:
    """10 log10 of the power of what was wanted over that of the error."""
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum().clamp(min=1e-20)))


def ssim(found: Tensor, wanted: Tensor) -> float:
    """Structural similarity of pictures [n, 3, H, W] in [-1, 1], each channel as one window: the mean."""
    a, b = ((each.flatten(2) + 1) / 2 for each in (found, wanted))
    mean_a, mean_b = a.mean(2), b.mean(2)
    a, b = a - mean_a[..., None], b - mean_b[..., None]
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
    form = (2 * (a * b).mean(2) + 0.03**2) / (a.square().mean(2) + b.square().mean(2) + 0.03**2)
    return float((light * form).mean())


@contextmanager
def instead(layers: Sequence[Any], weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, layers have other weights; afterwards their own."""
    own = [layer.weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight
        yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.data = weight


def coarse(layer: Any, bits: int) -> Tensor:
    """The weight of a layer as so many bits have it."""
    integers, steps = to_integers(layer.weight, bits)
    return (integers * steps[:, None]).view(layer.weight.shape)


class Trial:
    """A float student on a few captions, always with the same noises: the pictures it makes in `steps` steps, and what goes
    into it and comes out of it at every one of the steps.

    Attributes:
        inputs: of the student, all steps one behind the other. wanted, pictures: its outputs for them, and the end in pixels.
        low, high: least and greatest input of every layer, by name; of what reads captions without their first token.
    """

    @torch.no_grad()
    def __init__(self, session: Session, student: Any, prompts: int, steps: int) -> None:
        ids, device = session.train["tokens"].to(session.device), session.device
        rows = torch.randint(len(ids), (prompts,), generator=session.rng, device=device)
        noise = torch.randn(prompts, *LATENT, generator=session.rng, device=device, dtype=session.dtype)
        self.batch = {"noise": noise, "condition": ids[rows]}
        self.student, self.steps, self.vae = student, steps, session.networks["vae"]
        self.seed, self.device, self.layers = session.seed, device, layers_of(student)
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        asked: list[Any] = []
        hooks = [student.register_forward_pre_hook(lambda _, given: asked.append(given))]
        hooks += [
            layer.register_forward_pre_hook(lambda _, given, name=name: self.widen(name, given[0]))
            for name, layer in self.layers.items()
        ]
        self.pictures = self.drawn()
        for hook in hooks:
            hook.remove()
        self.inputs = tuple(torch.cat(part) for part in zip(*asked, strict=True))
        self.wanted = student(*self.inputs)

    def widen(self, name: str, x: Tensor) -> None:
        """Take note of the inputs of a layer."""
        x = x[:, 1:] if hears_captions(name) else x
        zero = x.new_zeros(())
        self.low[name] = torch.minimum(self.low.get(name, zero), x.min())
        self.high[name] = torch.maximum(self.high.get(name, zero), x.max())

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """The inputs of a layer in 8 bits; the first token of captions as it is."""
        if hears_captions(name):
            return torch.cat([x[:, :1], rounded(x[:, 1:], self.low[name], self.high[name])], 1)
        return rounded(x, self.low[name], self.high[name])

    @torch.no_grad()
    def drawn(self) -> Tensor:
        """Pictures [n, 3, 32, 32] of the student as it stands."""
        rng = torch.Generator(self.device).manual_seed(self.seed)
        latents = sample(self.student, self.batch, self.steps, rng, GUIDANCE, schedule_of(self.student))
        return self.vae(latents).clamp(-1, 1)

    @torch.no_grad()
    def quality(self) -> float:
        """SQNR of the outputs at all steps, of the student as it stands."""
        return sqnr(self.student(*self.inputs), self.wanted)

    def content(self) -> float:
        """SSIM to the student's own pictures, of the student as it stands."""
        return ssim(self.drawn(), self.pictures)


def sensitivity(session: Session, prompts: int, steps: int) -> dict[str, Tensor]:
    """How well the student does with one layer at a time in 2, 4 or 8 bits: {"quality": [layers, 3], "content": [layers, 3] (of
    layers of the content group, else 0)}; with its inputs in 8 bits: "inputs" [layers], content or quality as the layer is.
    """
    trial = Trial(session, float_student(session), prompts, steps)
    quality = torch.zeros(len(trial.layers), len(BITS))
    content, inputs = torch.zeros_like(quality), torch.zeros(len(trial.layers))
    asked = list(trial.layers.items())[: session.scale(len(quality), 2)]
    for i, (name, layer) in enumerate(session.progress(asked, "sensitivity")):
        for j, bits in enumerate(BITS):
            with instead([layer], [coarse(layer, bits)]):
                quality[i, j] = trial.quality()
                if is_content(name):
                    content[i, j] = trial.content()
        hook = layer.register_forward_pre_hook(lambda _, given, name=name: trial.rounded(name, given[0]))
        inputs[i] = trial.content() if is_content(name) else trial.quality()
        hook.remove()
    return {"quality": quality, "content": content, "inputs": inputs}


def float_student(session: Session) -> Any:
    """The few-step student, a plain consistency model told the guidance scale."""
    student = session.clone("teacher")
    student.load_state_dict(session.once(lcm_student, session.scale(UPDATES, 2)))
    return student.requires_grad_(False)


# -- who gets how many bits -------------------------------------------------------------------------------------------


def allocate(scores: Tensor, sizes: Sequence[int], mean: float, choices: Sequence[int] = BITS) -> list[int]:
    """Bits for each layer that make the sum of their scores greatest, of no more than `mean` bits for a weight: an integer
    programme.

    scores: [layers, 3], of every layer at each of BITS. choices: those of BITS that may be taken.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    picked = [BITS.index(bits) for bits in choices]
    gain = scores[:, picked].double().numpy()
    layers, kinds = gain.shape
    one_each = np.kron(np.eye(layers), np.ones(kinds))
    weight = np.kron(np.asarray(sizes, float) / sum(sizes), np.asarray(choices, float))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], -np.inf, mean + 1e-9)]
    found = milp(-gain.ravel(), constraints=limits, integrality=np.ones(gain.size), bounds=Bounds(0, 1))
    if found.x is None:
        raise ValueError(f"no allocation of {mean:g} bits: {found.message}")
    return [choices[int(k)] for k in found.x.reshape(layers, kinds).argmax(1)]


def splits(content: int, quality: int, mean: float) -> list[tuple[float, float]]:
    """Mean bits of the two groups of so many weights that together have `mean`: (content, quality), for RATIOS of the two, where
    content has 2 to 8 and quality 4 to 8."""
    share, found = content / quality, []
    for ratio in RATIOS.tolist():
        of_quality = mean * (1 + share) / (ratio * share + 1)
        if 4 <= of_quality <= 8 and 2 <= ratio * of_quality <= 8:
            found.append((ratio * of_quality, of_quality))
    return found


def left_in_floats(names: Sequence[str], inputs: Tensor) -> set[str]:
    """Of each group, the layer that suffers most from rounded inputs."""
    groups = ([i for i, name in enumerate(names) if is_content(name) == kind] for kind in (True, False))
    return {names[min(group, key=lambda i: float(inputs[i]))] for group in groups}


class MixDQ(Method):
    """MixDQ: post-training quantisation of a few-step student, weights in 2, 4 or 8 bits as each layer needs, inputs in 8.

    What a few-step model loses first is content, not quality, and no single measure sees both. So, of the layers of the UNet
    (metric-decoupled sensitivity, section 4.2), cross-attention and feed-forward make the content group, all others that of
    quality. One layer at a time is put into b bits, and

        s_ib = SSIM(pictures, those of the float student)       content
        s_ib = SQNR(outputs, those of the float student)        quality, over the states of all steps

    Bits are then allotted by an integer programme for each group,

        max sum_ib s_ib c_ib,   sum_b c_ib = 1,   sum_ib b c_ib n_i <= B sum_i n_i,   c_ib in {0, 1}

    n_i the number of weights, with 2, 4 or 8 bits for content and 4 or 8 for quality. Ten ratios of the two groups' bits are
    tried, and the one whose pictures are nearest to the float student's is kept. The first token of a caption is the same in all
    of them and its state stands out: its keys and values are computed beforehand, in floats, and what is rounded are the other
    tokens (BOS-aware, section 4.1). Weights have a symmetric step for each output, inputs a fixed range for each layer, both by
    the extremes. Inputs of the most sensitive layer of each group stay in floats, one in a hundred.

    `mixdq` has 4 bits for a weight on average, `mixdq_w8a8` 8. The student is a latent consistency model of 240 updates, told the
    scale; a rung of n is n steps of it, at most 8. Calibration and search see 6 captions in 4 steps.

    Weights lie as integers, 8 / b of them to a byte, and are unpacked at every call: products are those of floats, with what
    integers leave of them. Differs from the paper: no integer kernels; input bits are not mixed but 8 or none, in a range of the
    extremes over all steps, theirs a moving average; one target of mean bits is solved for, not ten below it. That a model is
    three to four times smaller is no figure of the records, and not claimed.

    Controls: `mixdq_float`, the student itself; `mixdq_uniform_w4a8` and `mixdq_uniform_w8a8`, the same bits for all layers and
    nothing else; `mixdq_random`, bits by chance with the same mean; `mixdq_single_metric`, one integer programme for all layers
    by SQNR; `mixdq_w8a8_all_tokens`, with the first token rounded like the others.

    What limits it here: layers of 4000 weights, where the steps of 64 outputs are a part of the bytes that counts. The encoder of
    the captions is small and may have no outlier in its first token.
    """

    paper = Paper(
        id="mixdq",
        title="MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision "
        "Quantization",
        authors="Zhao, Ning, Fang, Liu, Huang, Lin, Yan, Dai, Wang",
        year=2024,
        arxiv="2405.17873",
        code="thu-nics/MixDQ",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("mixdq_float", "mixdq_uniform_w4a8", "mixdq_random")
    trainings = 3
    claims = (
        Claim(
            "caption[mixdq_w8a8,1..8] >= caption[mixdq_float,1..8] - 0.01 and fd[mixdq_w8a8,1..8] <= 1.02 * fd[mixdq_float,1..8] "
            "and caption[mixdq,1..8] >= caption[mixdq_float,1..8] - 0.03 and fd[mixdq,1..8] <= 1.1 * fd[mixdq_float,1..8] "
            "and caption[mixdq,1..8] > caption[mixdq_uniform_w4a8,1..8] and caption[mixdq,1..8] > caption[mixdq_random,1..8]",
            says="with 8 bits nothing is lost and with 4 hardly anything, where the same bits for all layers, or bits by "
            "chance, lose more",
            headline=True,
        ),
        Claim(
            "caption[mixdq_w8a8,1..8] > caption[mixdq_uniform_w8a8,1..8]",
            says="rounding all layers and tokens alike falls short even with 8 bits",
            setting="the encoder of these captions is small, and its first token may stand out less than that of CLIP",
        ),
        Claim(
            "caption[mixdq,1..8] > caption[mixdq_single_metric,1..8]",
            says="two measures for two groups are better than one for all layers",
        ),
        Claim(
            "1.45 * latency_ms[mixdq_w8a8,1..8] <= latency_ms[mixdq_float,1..8]",
            says="and it is 1.45 times as fast",
            setting="there are no integer kernels here: weights are unpacked at every call, which costs time",
        ),
    )

    bits, how = 4, "decoupled"  # mean bits of a weight; or "single", "uniform", "random"; "float": nothing is quantised
    aware = True  # of the first token
    prompts, steps, longest = 6, 4, 8
    variants = (
        Variant("mixdq_w8a8", says="8 bits for all weights", bits=8),
        Variant(
            "mixdq_w8a8_all_tokens", says="8 bits, with the first token rounded like the others", bits=8, aware=False
        ),
        Variant("mixdq_float", says="the few-step student, in floats", how="float", baselines=("ddim_guided",)),
        Variant(
            "mixdq_uniform_w4a8",
            says="4 bits for the weights of every layer, 8 for all inputs, all tokens alike",
            how="uniform",
            aware=False,
            baselines=("mixdq_float",),
        ),
        Variant(
            "mixdq_uniform_w8a8",
            says="8 bits for the weights of every layer and for all inputs, all tokens alike",
            how="uniform",
            bits=8,
            aware=False,
            baselines=("mixdq_float",),
        ),
        Variant("mixdq_single_metric", says="one integer programme for all layers, by SQNR", how="single"),
        Variant(
            "mixdq_random",
            says="bits for the layers by chance, with the same mean",
            how="random",
            baselines=("mixdq_float", "mixdq_uniform_w4a8"),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The student, of layers that can become integer ones."""
        student: Any = session.clone("teacher").requires_grad_(False)
        for name, layer in layers_of(student).items():
            owner, _, own = name.rpartition(".")
            setattr(student.unet.get_submodule(owner), own, IntegerLayer(layer))
        return {"student": student}

    def prepare(self, session: Session) -> None:
        student: Any = session.networks["student"]
        floats, known = float_student(session), dict[str, Tensor]()
        size = session.scale((self.prompts, self.steps), (2, 1))
        if self.how not in ("float", "uniform"):  # before the student is loaded, so that the same one is asked for
            known |= session.once(sensitivity, *size)
        student.load_state_dict(floats.state_dict())
        if self.how == "float":
            return
        trial = Trial(session, floats, *size)
        bits = self.allotted(session, trial, known)
        left = left_in_floats(list(trial.layers), known["inputs"].cpu()) if known else set()
        start = floats.words(floats.null_condition(trial.batch["condition"][:1]))[:, :1]
        for name, layer in trial.layers.items():
            low, high = (trial.low[name], trial.high[name]) if name not in left else (start.new_zeros(()),) * 2
            first = layer(start)[0, 0] if self.aware and hears_captions(name) else None
            if first is None and hears_captions(name) and name not in left:
                low, high = torch.minimum(low, start.min()), torch.maximum(high, start.max())
            student.unet.get_submodule(name).store(layer.weight, bits[name], low, high, first)

    def allotted(self, session: Session, trial: Trial, known: Mapping[str, Tensor]) -> dict[str, int]:
        """Bits of the weights of each layer."""
        names, sizes = list(trial.layers), [layer.weight.numel() for layer in trial.layers.values()]
        if self.how == "uniform" or self.bits == max(BITS):
            return dict.fromkeys(names, self.bits)
        if self.how == "random":
            scores = torch.rand(len(names), len(BITS), generator=session.rng, device=session.device).cpu()
            return dict(zip(names, allocate(scores, sizes, self.bits), strict=True))
        if self.how == "single":
            return dict(zip(names, allocate(known["quality"].cpu(), sizes, self.bits), strict=True))
        groups = [[i for i, name in enumerate(names) if is_content(name) == kind] for kind in (True, False)]
        best: tuple[float, dict[str, int]] = (float("inf"), {})
        content, quality = (sum(sizes[i] for i in group) for group in groups)
        means_of_groups = splits(content, quality, self.bits)
        for means in means_of_groups[: session.scale(len(means_of_groups), 1)]:
            bits: dict[str, int] = {}
            for group, mean, measure, choices in zip(
                groups, means, ("content", "quality"), (BITS, BITS[1:]), strict=True
            ):
                chosen = allocate(known[measure].cpu()[group], [sizes[i] for i in group], mean, choices)
                bits |= {names[i]: b for i, b in zip(group, chosen, strict=True)}
            layers = list(trial.layers.values())
            with instead(layers, [coarse(layer, bits[name]) for name, layer in trial.layers.items()]):
                error = float((trial.drawn() - trial.pictures).square().mean())
            best = min(best, (error, bits), key=lambda pair: pair[0])
        return best[1]

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        return sample(student, batch, min(rung, self.longest), session.rng, GUIDANCE, schedule_of(student))
