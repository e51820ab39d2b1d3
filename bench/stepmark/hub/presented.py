"""A causal language model of transformers as a `Decoder` of the track asks for one: embeddings, layers, norm, head.

Nothing of a family is written down here. What a layer is called with (rotary angles, masks, a window, whatever the family
has) is asked of the model's own forward, run once for a pass with layers that only listen; what comes before the first
layer and after the last one is the model's own code too. A model whose layers cannot be driven so, as where states are
recurrent, is one layer to the `Decoder`: its own forward on its own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.hub.layers import HELD, OURS, Kinds, Layer, running
from stepmark.hub.stage import Stage, Unfit, shallow
from stepmark.hub.whole import Whole
from stepmark.task import skip


class Ready(nn.Module):
    """Stands in the place of a base that has run already, and has its other attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)

    def __getattr__(self, name: str) -> Any:
        if name == "decoder":
            return self
        return getattr(self.__dict__["_base"][0], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Done:
        """The hidden states as they are."""
        return Done(inputs_embeds)


class Done:
    """What a base returned: its last hidden states, and nothing else that somebody may ask for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Head(nn.Module):
    """From last hidden states to logits by the model's own forward, over the first `size` tokens.

    The end-of-sequence tokens `ends` are one, the first of them: it has the greatest of their logits, the others never.
    """

    def __init__(self, model: Any, size: int, ends: list[int]) -> None:
        super().__init__()
        self.size, self.ends = size, ends
        self.output = model.get_output_embeddings()
        shell = shallow(model)
        shell._modules[base_name(model)] = Ready(getattr(model, base_name(model)))
        self._shell = (shell,)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., size]."""
        return self.cut(self._shell[0](inputs_embeds=hidden, use_cache=False).logits)

    def cut(self, logits: Tensor) -> Tensor:
        """The logits that a method sees."""
        logits = logits[..., : self.size]
        if len(self.ends) < 2:
            return logits
        greatest = logits[..., self.ends].amax(-1)
        logits = logits.clone()
        logits[..., self.ends] = float("-inf")
        logits[..., self.ends[0]] = greatest
        return logits


class Settings:
    """What methods ask of a configuration."""

    def __init__(self, config: Any, size: int, end: int) -> None:
        self.own, self.vocab_size, self.eos_token_id = config, size, end
        self.num_hidden_layers = config.get_text_config().num_hidden_layers
        self.hidden_size = config.get_text_config().hidden_size

    @property
    def _attn_implementation(self) -> str:
        return str(self.own._attn_implementation)

    @_attn_implementation.setter
    def _attn_implementation(self, value: str) -> None:
        self.own._attn_implementation = OURS if value == HELD else value


class Inner(nn.Module):
    """Embeddings, layers and norm, as `Decoder` knows them of Llama."""

    def __init__(self, embed: nn.Module, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens, self.norm = embed, norm
        self.layers = nn.ModuleList(layers)
        self.rotary_emb = Places()


class Places(nn.Module):
    """In the place of rotary angles the positions themselves, which a model's own forward turns into what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self._ask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.stage: tuple[Any, ...] = ()

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [1, T], twice, of a table of embeddings [V, D]; of states [H, T, d] that a cache moves, cos and sin
        [1, T, d] of the layer that runs."""
        if x.ndim == 2:
            return positions, positions
        if not self.stage:
            raise Unfit("there are no layers to ask")
        stage, kinds, embed = self.stage
        if kinds.moves:
            skip(kinds.moves)
        blank = embed.weight.new_zeros(1, positions.shape[1], stage.width)
        kept = [listener.heard for listener in stage.listeners]
        stage.ask(blank, positions, 0)
        found = stage.listeners[running.layer].heard.get("position_embeddings")
        for listener, before in zip(stage.listeners, kept, strict=True):
            listener.heard = before
        if found is None:
            raise Unfit("layers are not called with rotary angles")
        return found


class Presented(nn.Module):
    """A model and its parts by the names that a `Decoder` asks for. `counted`: what is one evaluation if it runs once."""

    def __init__(
        self, own: Any, size: int, end: int, ends: list[int], one_by_one: str = "", single: bool = False
    ) -> None:
        """`one_by_one`: why layers cannot be driven one by one; "": they can. `single`: as in `Whole`."""
        super().__init__()
        self.own = own
        self.config = Settings(own.config, size, end)
        self.kinds = Kinds(own.config.get_text_config(decoder=True))
        self.lm_head = Head(own, size, ends)
        self.shells = nn.ModuleList(self.lm_head._shell)  # so that whoever walks over the modules knows them
        base = getattr(own, base_name(own))
        embed, depth = own.get_input_embeddings(), self.config.num_hidden_layers
        if one_by_one:
            self.kinds.layers = one_by_one
            self.model = Inner(embed, [Whole(base, own.config, one_by_one, single)], nn.Identity())
            self.counted = [base]
            return
        path = _path_of_layers(base, depth)
        real: Any = base.get_submodule(".".join(path))
        stage = Stage(base, path, _answers(base, real, embed))
        self.model = Inner(embed, [Layer(each, i, stage, self.kinds) for i, each in enumerate(real)], nn.Identity())
        self.model.norm = _norm(stage, embed)
        self.counted = list(real)
        self.shells.append(stage.shell)
        self.model.rotary_emb.stage = (stage, self.kinds, embed)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.own.parameters()).device

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """`logits` [B, T, size] by one plain forward of the model itself."""
        return SimpleNamespace(logits=self.lm_head.cut(self.own(input_ids=ids, use_cache=False).logits))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model itself, once."""
        return self.own.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model itself."""
        return self.own.load_state_dict(*args, **kwargs)


def base_name(own: Any) -> str:
    """Under which name a model has all but its head."""
    name = own.base_model_prefix if hasattr(own, own.base_model_prefix) else "model"
    if not isinstance(getattr(own, name, None), nn.Module):
        raise Unfit(f"{type(own).__name__} does not part its base from its head")
    return str(name)


def _path_of_layers(base: nn.Module, depth: int) -> list[str]:
    found = [n for n, part in base.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if not found:
        raise Unfit(f"{type(base).__name__} has no list of {depth} layers")
    return min(found, key=lambda name: name.count(".")).split(".")


def _blank(embed: nn.Module, base: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings [1, T, D] that mean nothing, and their positions [1, T]."""
    table = next(embed.parameters())
    ids = torch.arange(3, 3 + length, device=table.device)[None] % table.shape[0]
    return embed(ids), torch.arange(length, device=ids.device)[None]


@torch.no_grad()
def _answers(base: nn.Module, layers: Any, embed: nn.Module) -> int | None:
    """Of how many parts the answer of a layer is; None: a tensor."""
    seen: list[Any] = []
    hook = layers[0].register_forward_hook(lambda module, args, found: seen.append(found))
    try:
        hidden, positions = _blank(embed, base, 4)
        base(inputs_embeds=hidden, position_ids=positions, use_cache=False)
    finally:
        hook.remove()
    if not seen:
        raise Unfit(f"{type(base).__name__} does not call its layers one by one")
    return len(seen[0]) if isinstance(seen[0], tuple) else None


@torch.no_grad()
def _norm(stage: Stage, embed: nn.Module) -> nn.Module:
    """What the base does after its last layer."""
    hidden, positions = _blank(embed, stage.shell, 4)
    expected = stage.ask(hidden, positions, 0)
    last = stage.listeners[-1].heard[""]
    stage.width = last.shape[-1]
    if expected.shape == last.shape and torch.equal(expected, last):
        return nn.Identity()
    for part in (*stage.inner.children(), *stage.shell.children()):
        if not isinstance(part, nn.ModuleList):
            try:
                if torch.equal(part(last), expected):
                    return part
            except Exception:  # it is something else
                continue
    raise Unfit(f"{type(stage.shell).__name__} does more after its last layer than a norm")
