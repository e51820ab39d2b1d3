"""Multi-Concept T2I-Zero: the words of every object are kept to themselves, in the caption's states and in attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, normalize, pad

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.scenes.captions import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Caption,
    read,
    texts,
    write,
)
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.inside import cross_attentions, processed
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, ddim

NOUNS = {*SHAPES, "object"}
LOOKS = NOUNS | {*SIZES, *COLOURS, *TEXTURES}
MOST = 3  # objects of a caption


def objects_of(ids: Tensor, naming: set[str]) -> tuple[Tensor, Tensor]:
    """Whose words are whose in captions int64 [B, 32]: the number of the object that each word is about, int64 [B, 32] (-1: of
    none), and which of these words name it, bool [B, 32]. What must not be there is no object.
    """
    owner = torch.full(ids.shape, -1)
    names = torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts(ids.cpu())):
        words, at, caption = text.split(), 0, read(text)
        for number, thing in enumerate(caption.objects):
            length = len(write(Caption(objects=(thing,))).split())
            for place in range(at, at + length):
                owner[row, 1 + place] = number  # the first token is the start
                names[row, 1 + place] = words[place] in naming
            related = number == 0 and caption.relation is not None
            at += length + (len(RELATIONS[caption.relation or 0].split()) if related else 1)
    return owner.to(ids.device), names.to(ids.device)


def similarities(states: Tensor) -> Tensor:
    """Cosines [B, 32, 32] of the states [B, 32, 64] of words with each other."""
    unit = normalize(states, dim=-1)
    return unit @ unit.transpose(1, 2)


def corrected(states: Tensor, owner: Tensor, names: Tensor, similar: Tensor, threshold: float, window: float) -> Tensor:
    """Correction by similarities: states [B, 32, 64] in which each word that names an object is the mean of the words of this
    object, weighted by how similar (`similar` [B, 32, 32]) and how near they are; those below the threshold are left out.
    """
    place = torch.arange(states.shape[1], device=states.device, dtype=states.dtype)
    near = torch.exp(-0.5 * ((place[:, None] - place) / window).square())
    own = (owner[:, :, None] == owner[:, None]) & (owner >= 0)[:, None]
    weight = torch.where(own & (similar >= threshold), similar * near, 0.0)
    mean = weight @ states / weight.sum(2, keepdim=True).clamp(min=1e-6)
    return torch.where(names[..., None], mean, states)


def blurred(maps: Tensor) -> Tensor:
    """Maps [B, K, side, side] behind a Gaussian of three pixels and deviation 1, edges mirrored."""
    line = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], device=maps.device, dtype=maps.dtype).square())
    line = line / line.sum()
    flat = pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return conv2d(flat, torch.outer(line, line)[None, None]).view(maps.shape)


def kept(maps: Tensor, concepts: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Cross-token non-maximum suppression: which words may speak at which pixel, bool [B, pixels, 32].

    Args:
        maps: attention [B, pixels, 32] from every pixel to every word. concepts: bool [B, K, 32], the words of each.
        rng: chance decides, and not the maps: the control.

    A word of a concept is silent where the blurred map of another concept is greater than that of its own; all other words
    speak everywhere.
    """
    side = round(maps.shape[1] ** 0.5)
    strength = blurred((concepts.to(maps.dtype) @ maps.transpose(1, 2)).unflatten(2, (side, side))).flatten(2)
    if rng is not None:
        strength = torch.rand(strength.shape, generator=rng, device=maps.device, dtype=maps.dtype)
    strength = strength.masked_fill(~concepts.any(2)[..., None], -1.0)
    lost = strength < strength.amax(1, keepdim=True)  # [B, K, pixels]
    return (lost.to(maps.dtype).transpose(1, 2) @ concepts.to(maps.dtype)) == 0


class Suppression:
    """What stands in for the processor of a cross-attention layer: softmax attention, then `kept`, the same for all heads."""

    def __init__(self, concepts: Tensor, rng: torch.Generator | None) -> None:
        self.concepts, self.rng = concepts, rng

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query, key, value = (
            attn.head_to_batch_dim(project(given))
            for project, given in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        maps = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
        maps = maps * kept(maps.mean(1), self.concepts, self.rng)[:, None]
        return attn.to_out[0](attn.batch_to_head_dim(maps.flatten(0, 1) @ value))


class T2IZero(Method):
    """Multi-Concept T2I-Zero: captions of several objects mended without training, by what their words tell the network.

    Two faults are blamed for objects that are missing or mixed up: one concept dominates the others, and a word tells of more
    than of itself. Correction by similarities makes what names an object local. With e_i the states of the words,

        s_ij = cos(e_i, e_j),   0 where s_ij < tau
        e_i <- sum_j s_ij g_ij e_j / sum_j s_ij g_ij,   g_ij = exp(-(i - j)^2 / (2 sigma^2))

    for all i that name an object, j over the words of the same object: the window ends where the words of the next object
    begin. Cross-token non-maximum suppression keeps objects apart in the picture: in every cross-attention layer the maps of
    an object's words, summed, averaged over heads and blurred, are compared pixel by pixel,

        A_j(pixel) <- A_j(pixel) if blur(A_k) is the greatest there, else 0,   j a word of object k

    before the values are mixed. Other words, of places, of the background, are left as they are. Both are done to the
    conditional half of a guided step, at every step of DDIM with guidance w = 3, and cost no evaluation.

    There is no official code; this is a reading of the paper. The threshold tau = 0.3, sigma = 2 words and the blur of three
    pixels are choices made here, and that the mean ends with the object and takes the place of the word's own state. An
    object's words are its size, colour, texture and shape, found by the grammar of the captions; `t2i_zero_nouns` takes the
    shape alone. Nothing is put in the place of what was suppressed.

    `t2i_zero_random` is the control: as many words are silent, but chance decides whose, at every pixel, layer and step, and
    the weights of the mean are drawn instead of found. `t2i_zero_correction` and `t2i_zero_suppression` are the halves.

    What limits it here: two captions in five name one object, and to these only the correction is done. The encoder of the
    captions was trained to tell objects and places apart, which CLIP was not, so that there may be little to mend. Maps have
    8x8 and 4x4 pixels, and an object is as large as one of nine places.
    """

    paper = Paper(
        id="t2i_zero",
        title="Multi-Concept T2I-Zero: Tweaking Only The Text Embeddings and Nothing Else",
        authors="Tunanyan, Xu, Navasardyan, Wang, Shi",
        year=2023,
        arxiv="2310.07419",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("ddim_guided", "t2i_zero_random")
    claims = (
        Claim(
            "caption[t2i_zero,16..64] > max(caption[ddim_guided,16..64], caption[t2i_zero_random,16..64]) "
            "and fd[t2i_zero,16..64] <= 1.1 * fd[ddim_guided,16..64] "
            "and nfe_equivalent[t2i_zero,16..64] <= 1.05 * nfe_equivalent[ddim_guided,16..64]",
            says="more pictures show all that their captions say, at no cost to the pictures and none in evaluations, and not "
            "by leaving out words at random",
            headline=True,
        ),
        Claim(
            "caption[t2i_zero,16..64] > max(caption[t2i_zero_correction,16..64], caption[t2i_zero_suppression,16..64])",
            says="both halves are needed",
        ),
    )

    correct, suppress, chance = True, True, False
    naming = "looks"  # the words of an object: all that say what it looks like, or "nouns"
    threshold, window = 0.3, 2.0  # tau; sigma, in words
    variants = (
        Variant("t2i_zero_correction", says="the states are corrected, attention is left alone", suppress=False),
        Variant("t2i_zero_suppression", says="attention is suppressed, the states are left alone", correct=False),
        Variant("t2i_zero_nouns", says="the shape alone stands for an object, not its attributes", naming="nouns"),
        Variant(
            "t2i_zero_random",
            says="chance decides which object keeps a pixel, and how words are weighted",
            chance=True,
            baselines=("ddim_guided",),
        ),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2:
            skip("a guided step takes two evaluations")
        teacher, x, rng = session.networks["teacher"], batch["noise"], session.rng
        denoise = GuidedByCaption(teacher, batch, GUIDANCE)
        owner, names = objects_of(batch["condition"], NOUNS if self.naming == "nouns" else LOOKS)
        if self.correct:
            null, states = denoise.condition.chunk(2)
            similar = similarities(states)
            if self.chance:
                similar = torch.rand(similar.shape, generator=rng, device=x.device, dtype=x.dtype)
            states = corrected(states, owner, names, similar, self.threshold, self.window)
            denoise.condition = torch.cat([null, states])
        concepts = torch.stack([(owner == number) & names for number in range(MOST)], 1)
        told = torch.cat([torch.zeros_like(concepts), concepts])  # the empty captions name nothing
        processor = Suppression(told, rng if self.chance else None)
        layers = cross_attentions(teacher) if self.suppress else []
        with processed(layers, [processor] * len(layers)):
            return ddim(denoise, x, uniform_times(rung // 2))
