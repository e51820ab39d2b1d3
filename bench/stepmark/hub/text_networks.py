"""Language models of checkpoint folders: loaded, presented to a `Decoder`, and tried against their own forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.hub.choice import Made, Part
from stepmark.hub.layers import Kinds
from stepmark.hub.presented import Presented
from stepmark.hub.pretrained import first_line, opened, whole
from stepmark.hub.stage import Unfit
from stepmark.hub.text_tasks import end, ends, vocabulary
from stepmark.task import Skip
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeldCache, HeldDecoder

TRIED = 12  # tokens on which a driven model is held against its own forward
# By how much of their standard deviation logits may differ between a forward and the same one in parts.
ROUNDING = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}


def build(made: Made, role: str, device: str) -> nn.Module:
    """A language model in eval mode without gradients, ready for a `Decoder`.

    Raises:
        ValueError: it cannot be driven, or not so that it gives its own logits. One line.
    """
    part, own = made.parts[role], loaded(made, role, device)
    stops = [token for token in ends(made.parts["target"]) if token < vocabulary(made)]
    try:
        return presented(own, vocabulary(made), end(made.parts["target"]), stops)
    except Unfit as reason:
        raise ValueError(f"{part}: {part.kind} cannot be measured: {reason}") from None


def loaded(made: Made, role: str, device: str) -> Any:
    """A language model as transformers has it, in eval mode without gradients.

    Raises:
        ValueError: it cannot be loaded, or is none that can be driven. One line.
    """
    import transformers

    part = made.parts[role]
    config = decided(part)
    softly = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    own, info = opened(
        transformers.AutoModelForCausalLM,
        part.folder,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, made.choice.dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told in `info`
        **({"attn_implementation": "eager"} if softly else {}),  # the fused kernel has no soft caps
        **({"variant": part.variant} if part.variant else {}),
    )
    whole(part.folder, info)
    return own.to(device).eval().requires_grad_(False)


def decided(part: Part) -> Any:
    """The configuration of a language model that can be driven, as far as a configuration says.

    Raises:
        ValueError: it cannot. One line, before any weights are read.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = opened(AutoConfig, part.folder, trust_remote_code=False)
    said = f"{part}: {part.kind} cannot be measured"
    if part.config.get("quantization_config"):
        raise ValueError(
            f"{said}: its weights are quantised; load it where it is trusted, dequantize(), save_pretrained"
        )
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{said}: to transformers it is no decoder that goes on with a text")
    asked = inspect.signature(kind.forward).parameters
    if "past_key_values" not in asked or "inputs_embeds" not in asked:
        raise ValueError(
            f"{said}: it takes no cache of keys and values as past_key_values, and could not go back in a text"
        )
    return config


def presented(own: Any, size: int, stop: int, stops: list[int]) -> Presented:
    """A model as a `Decoder` asks for it: layer by layer where that gives its own logits, else as a whole.

    Raises:
        Unfit: neither does.
    """
    why = recurrent(own.config)
    if not why:
        try:
            found = Presented(own, size, stop, stops)
            if deviates(found, own) is None:
                _capabilities(found)
                return found
            why = "driven one by one they give other logits than the model's own forward"
        except (Unfit, *FAULTS) as error:
            why = str(error) if isinstance(error, Unfit) else f"they are not called as others are ({first_line(error)})"
    wrong: str | None = None
    for single in (False, True):
        try:
            found = Presented(own, size, stop, stops, why, single)
            wrong = deviates(found, own, single)
        except FAULTS as error:
            raise Unfit(f"its own forward on its own cache fails ({first_line(error)})") from error
        if wrong is None:
            return found
    raise Unfit(str(wrong))


FAULTS = (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError, NotImplementedError, Skip)


def recurrent(config: Any) -> str:
    """Why layers cannot be driven one by one, as far as a configuration says; "": it does not."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    if any(cache.is_linear):
        return "some of them keep a recurrent state, not keys and values"
    return "some of them share the keys and values of others" if any(cache.is_dummy) else ""


def token_ids(size: int, length: int) -> list[int]:
    """Token ids that mean nothing, the same each time."""
    return [(7 * i + 3) % size for i in range(length)]


@torch.no_grad()
def deviates(network: Presented, own: Any, single: bool = False) -> str | None:
    """What is wrong with a presented model's logits beside its own forward's, in one line; None: nothing.

    `single`: behind the cache it is given one token at a time.
    """
    ids = token_ids(network.config.vocab_size, TRIED)
    expected = network(torch.tensor([ids], device=network.device)).logits[0]
    unit = _unit(expected)
    allowed = ROUNDING[expected.dtype]
    noise = _distance(_in_parts(own, network, ids, single), expected) / unit
    if not noise <= allowed:
        return f"its own forward on its own cache is {noise:.2g} standard deviations of a logit off its forward without"
    driven = in_passes(network, ids) if single else _driven(network, ids)
    found = _distance(driven, expected) / unit
    if not found <= max(4 * noise, allowed / 8):
        return f"driven on a cache its logits are {found:.2g} of their standard deviations off its own forward's"
    return None


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((_finite(found) - _finite(expected)).abs().max())


def _unit(logits: Tensor) -> float:
    return float(_finite(logits).std().clamp(min=1e-6))


def _finite(logits: Tensor) -> Tensor:
    """Tokens that are never written are left out."""
    return logits.float().masked_fill(logits == float("-inf"), 0.0)


@torch.no_grad()
def in_passes(network: Presented, ids: list[int]) -> Tensor:
    """Logits [T, V] of a text by a `Decoder` on its cache: half of it at once, the rest token after token."""
    decoder, half = Decoder(network, len(ids)), max(1, len(ids) // 2)
    return torch.cat([decoder.forward(ids[:half]), *(decoder.forward([token]) for token in ids[half:])])


def _driven(network: Presented, ids: list[int]) -> Tensor:
    """Logits [T, V] by a `Decoder` in three passes, the second of which is taken back once; and in two parts of the layers."""
    decoder = Decoder(network, len(ids) + 4)
    first = decoder.forward(ids[:5])
    decoder.forward([*ids[5:7], *ids[:3]])
    decoder.rollback(7)
    middle = [decoder.forward([token]) for token in ids[7:9]]
    decoder.rollback(5)
    again = decoder.forward(ids[5:11])
    layers = decoder.layers
    hidden = decoder.embed(ids[11:])
    for part in (layers[: len(layers) // 2], layers[len(layers) // 2 :]):
        hidden = decoder.run(hidden, 11, part) if part else hidden
    found = torch.cat([first, again, decoder.logits(hidden)])
    # What was written token after token must agree as well: the worse of both is what counts.
    expected = again[2:4]
    if _distance(torch.cat(middle), expected) > _unit(expected) * ROUNDING[expected.dtype]:
        found = found * float("nan")
    return found


def _in_parts(own: Any, network: Presented, ids: list[int], single: bool) -> Tensor:
    """The model's own logits [T, V] on its own cache, in the same parts."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=own.config), []
    half = len(ids) // 2
    ends = [*range(half, len(ids) + 1)] if single else [5, 11, len(ids)]
    for start, stop in zip([0, *ends], ends, strict=False):
        part = torch.tensor([ids[start:stop]], device=network.device)
        found.append(own(input_ids=part, past_key_values=cache, use_cache=True).logits[0])
    return network.lm_head.cut(torch.cat(found))


def _capabilities(network: Presented) -> None:
    """Note what cannot be done with the layers of a model: trees, attention over caches that evict, keys that are moved."""
    kinds: Kinds = network.kinds
    ids = token_ids(network.config.vocab_size, TRIED)
    for name, trial, reason in (
        ("trees", tree_of, "its layers do not see trees of drafts as they see texts"),
        ("held", _held, "attends by itself over its cache, and other than this model does"),
        ("moves", _moved, "moves keys to other positions, and this model's do not turn as Llama's do"),
    ):
        try:
            found, expected = trial(network, ids)
            fine = _distance(found, expected) <= _unit(expected) * ROUNDING[expected.dtype]
        except Skip as error:
            reason, fine = str(error), False
        except (Unfit, *FAULTS):
            fine = False
        if not fine:
            setattr(kinds, name, reason)


@torch.no_grad()
def tree_of(network: Presented, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of two branches in one pass, and of each branch alone."""
    stem, branches = ids[:-6], [ids[-6:-3], ids[-3:]]
    decoder, length = Decoder(network, len(ids)), len(ids) - 6
    decoder.forward(stem)
    sees = torch.ones(6, len(ids), dtype=torch.bool, device=network.device)
    sees[:, length:] = torch.block_diag(*[torch.ones(3, 3).tril()] * 2).bool()
    places = torch.tensor([*range(length, length + 3)] * 2, device=network.device)
    found = decoder.logits(decoder.run(decoder.embed([*branches[0], *branches[1]]), length, None, places, sees))
    alone = [network(torch.tensor([[*stem, *each]], device=network.device)).logits[0, length:] for each in branches]
    return found, torch.cat(alone)


@torch.no_grad()
def _held(network: Presented, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits on a cache that attends by itself and evicts nothing, and the model's own."""
    cache = HeldCache(len(network.model.layers))
    decoder = HeldDecoder(network, len(ids), cache)
    found = torch.cat([decoder.forward(ids[:5]), *(decoder.forward([token]) for token in ids[5:])])
    return found, network(torch.tensor([ids], device=network.device)).logits[0]


@torch.no_grad()
def _moved(network: Presented, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Keys of every layer moved on by three positions, and those that the layer makes there."""
    from stepmark.backbones.lm import rotate_by

    found, expected = [], []
    decoder = Decoder(network, 16)
    for index, layer in enumerate(decoder.layers):
        keys = []
        for place in (4, 7):
            decoder.run(decoder.embed(ids[:1]), 0, [layer], torch.tensor([place], device=network.device))
            keys.append(decoder.cache.states(index, 1)[0][0].clone())
        amounts = torch.full(keys[0].shape[:2], 3, device=network.device)
        found.append(rotate_by(keys[0], amounts, network.model.rotary_emb).flatten())
        expected.append(keys[1].flatten())
    return torch.cat(found), torch.cat(expected)
