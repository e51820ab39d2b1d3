"""A causal language model of transformers as a `Decoder` of the track asks for one: embeddings, layers, norm, head.

Nothing of a family is written down here. What a layer is called with (rotary angles, masks, a window, whatever the family
has) is asked of the model's own forward, run once for a pass with layers that only listen; what comes before the first
layer and after the last one is the model's own code too. A model whose layers cannot be driven so, as where states are
recurrent, is one layer to the `Decoder`: its own forward on its own cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepmark.task import skip
from stepmark.tracks.decoding.decoder import KeyValueCache

HELD = "stepmark_held"  # what the track's `HeldAttention` asks a configuration for
OURS = "stepmark_hub_held"  # what it gets: the same, honouring what the family scales
NAMES = {
    "self_attn": ("self_attn", "attn", "attention", "self_attention", "temporal_block"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
}


class Unfit(Exception):
    """A model cannot be driven in some way; one line says why."""


# -- asking a model's own forward ---------------------------------------------------------------------------------------


class Seen(DynamicCache):
    """An empty cache that says it holds `length` tokens in every layer."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a pass comes after."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same, where masks ask."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask, and the position of the first."""
        return self.length + query_length, 0


class Listener(nn.Module):
    """Stands in the place of a layer and notes what it is called with. `answers`: of how many parts, None: a tensor."""

    def __init__(self, real: nn.Module, answers: int | None) -> None:
        super().__init__()
        self.real, self.answers = real, answers
        self.names = list(inspect.signature(type(real).forward).parameters)[1:]
        self.heard: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("real"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states as they came."""
        self.heard = dict(zip(self.names, args, strict=False)) | kwargs
        hidden = self.heard.pop(self.names[0])
        self.heard[""] = hidden
        return hidden if self.answers is None else (hidden, *[None] * (self.answers - 1))


class Stage:
    """The base of a model with listeners for layers: what each layer is called with in a pass, and what follows the last."""

    def __init__(self, base: nn.Module, path: Sequence[str], answers: int | None) -> None:
        shell = top = _shallow(base)
        for name in path[:-1]:
            inner = _shallow(getattr(shell, name))
            shell._modules[name] = inner
            shell = inner
        real = getattr(shell, path[-1])
        self.listeners = [Listener(layer, answers) for layer in real]
        shell._modules[path[-1]] = nn.ModuleList(self.listeners)
        self.shell, self.inner = top, shell
        self.asked: tuple[Tensor, Any] | None = None
        self.width = 0  # of hidden states

    def ask(self, hidden: Tensor, positions: Tensor, start: int) -> Tensor:
        """Have the listeners hear what layers are called with for `hidden` [1, T, D] at `positions` [1, T] behind `start`
        slots; returns the last hidden state of the base, the layers having changed nothing."""
        cache = Seen(start)
        found = self.shell(inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=True)
        for listener in self.listeners:
            listener.heard = {
                name: _CACHE if isinstance(value, Seen) else value for name, value in listener.heard.items()
            }
        return found[0]

    def heard(self, index: int, hidden: Tensor, positions: Tensor, start: int, same: Any) -> dict[str, Any]:
        """What layer `index` is called with, "" being the hidden states that come to the first layer. Passes are told
        apart by the identity of `positions` and `same`."""
        if self.asked is None or self.asked[0] is not positions or self.asked[1] is not same:
            self.ask(hidden, positions, start)
            self.asked = (positions, same)
        return self.listeners[index].heard


_CACHE = object()  # in what a layer is called with: its cache


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.__dict__.pop("forward", None)
    return twin


# -- layers -------------------------------------------------------------------------------------------------------------


class Slots(KeyValueCache):
    """A `KeyValueCache` for any family: values may be smaller than keys, and slots know their places in the text."""

    places: list[int]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As in `KeyValueCache`."""
        if self._keys[layer] is None:
            self._keys[layer], self._values[layer] = (
                part.new_empty(*part.shape[:2], self.capacity, part.shape[3]) for part in (keys, values)
            )
        return super().update(keys, values, layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a pass comes after."""
        return self.start

    def compact(self, start: int, kept: Sequence[int]) -> None:
        """As in `KeyValueCache`."""
        if self.places:
            self.places[start : start + len(kept)] = [self.places[slot] for slot in kept]
        super().compact(start, kept)


class Layer(nn.Module):
    """A layer of a model that is called as Llama's are: `position_embeddings` are the positions, twice."""

    def __init__(self, real: nn.Module, index: int, stage: Stage, kinds: Kinds) -> None:
        super().__init__()
        self.real, self.index, self.kinds = real, index, kinds
        self._stage = (stage,)  # no child: its modules are the model's

    @property
    def self_attn(self) -> nn.Module:
        """The attention, whatever it is called."""
        return self._part("self_attn")

    @property
    def mlp(self) -> nn.Module:
        """The feed-forward part, whatever it is called."""
        return self._part("mlp")

    def _part(self, which: str) -> nn.Module:
        name = self._name(which)
        if name is None or not hasattr(self._modules["real"], name):
            skip(f"needs the parts of a layer: {type(self.real).__name__} has none called {which}")
        return getattr(self.real, name)

    def _name(self, which: str) -> str | None:
        return next((name for name in NAMES[which] if hasattr(self.real, name)), None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES:
            setattr(self.real, self._name(name) or name, value)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states [1, T, D]. `attention_mask`: bool [1, 1, T, S]; None, or causal: the model's own is taken."""
        assert position_embeddings is not None
        positions, stage = position_embeddings[0], self._stage[0]
        slots = isinstance(past_key_values, KeyValueCache)
        start = past_key_values.start if slots else 0
        if slots and type(past_key_values) is KeyValueCache:
            past_key_values.__class__ = Slots
            past_key_values.places = []
        if not slots and self.kinds.held:
            skip(self.kinds.held)
        heard = stage.heard(self.index, hidden, positions, start, attention_mask)
        asked = {name: past_key_values if value is _CACHE else value for name, value in heard.items()}
        first = asked.pop("")
        hidden = first if self.index == 0 else hidden
        if slots:
            mask = self.kinds.mask(self.index, attention_mask, positions[0], past_key_values, hidden.dtype)
            if mask is not None:
                asked["attention_mask"] = mask
        _held.cache, _held.layer, _held.window = past_key_values, self.index, self.kinds.windows[self.index]
        found = self.real(hidden, **asked)
        return found[0] if isinstance(found, tuple) else found


class Kinds:
    """What a model's layers are, and what cannot be done with them ("": it can; else why not).

    windows: tokens that a layer sees, None: all. chunked: whether windows are chunks. trees: drafts as trees. held:
    attention over caches that evict. moves: keys that are moved to other positions. layers: layers one by one.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        kinds = DynamicCache(config=config).layers
        self.windows = [getattr(kind, "sliding_window", None) for kind in kinds]
        self.chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
        self.trees = self.held = self.moves = self.layers = ""
        self._drawn: tuple[Any, dict[Any, Tensor | None]] = None, {}

    def mask(self, index: int, given: Tensor | None, positions: Tensor, cache: Slots, dtype: Any) -> Tensor | None:
        """The mask of a layer where a `Decoder` asks for another than the causal one; None: it does not."""
        start, stop = cache.start, cache.start + len(positions)
        if given is None or given is self._drawn[0]:
            if given is not None:
                return self._of(index, given, cache, positions, dtype)
            cache.places[:] = range(stop)
            return None
        self._drawn = given, {}
        at = positions.tolist()
        causal = at == list(range(start, stop)) and bool(given[0, 0].equal(_causal(start, stop, given.device)))
        if causal:
            cache.places[:] = range(stop)
            self._drawn[1]["causal"] = None
            return None
        if self.trees:
            skip(self.trees)
        cache.places[:] = [*cache.places[:start], *range(len(cache.places), start), *at]
        return self._of(index, given, cache, positions, dtype)

    def _of(self, index: int, given: Tensor, cache: Slots, positions: Tensor, dtype: Any) -> Tensor | None:
        drawn, window = self._drawn[1], self.windows[index]
        if "causal" in drawn:
            return None
        if window not in drawn:
            seen = given
            if window is not None and int(positions.max()) >= window:
                if self.chunked:
                    skip("trees of drafts beyond the first chunk of chunked attention are not driven")
                places = torch.tensor(cache.places, device=given.device)
                seen = given & (positions[:, None] - places < window)
            if self.config._attn_implementation == "eager":
                seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
                    ~seen, torch.finfo(dtype).min
                )
            drawn[window] = seen
        return drawn[window]


def _causal(start: int, stop: int, device: torch.device) -> Tensor:
    at = torch.arange(stop, device=device)
    return at[start:, None] >= at


_held = SimpleNamespace(cache=None, layer=0, window=None)  # which cache the layer that runs asks


def ask_cache(
    module: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention that asks the cache for its outputs, which takes d^-0.5 for scale: queries make up for another one."""
    cache, size = _held.cache, queries.shape[-1]
    if softcap is not None or s_aux is not None:
        skip("attends by itself over its cache, and would leave out the model's soft caps or sinks")
    if values.shape[-1] != size:
        skip("attends by itself over its cache, and takes values for as large as keys")
    if _held.window is not None and int(cache.now[-1]) >= _held.window:
        skip(f"attends by itself over its cache, and knows nothing of the model's window of {_held.window} tokens")
    if scaling is not None:
        queries = queries * (scaling * size**0.5)
    try:
        outputs = cache.attend_from(_held.layer, queries[0], keys[0], values[0])
    except RuntimeError:
        if queries.dtype == torch.float32:
            raise
        skip(
            f"attends by itself over its cache, in float32; this model is in {str(queries.dtype).removeprefix('torch.')}"
        )
    return outputs.transpose(0, 1)[None], None


ALL_ATTENTION_FUNCTIONS.register(OURS, ask_cache)


# -- a model that is one layer ------------------------------------------------------------------------------------------


class Past:
    """What one text left in a model's own cache, and how to go back in it.

    Attention's states are cut. A recurrent state cannot be: the one before the last pass is kept, and what was read since
    is read again.
    """

    def __init__(self, config: Any) -> None:
        self.own = DynamicCache(config=config)
        self.length = self.mark = 0
        self.recurrent = any(self.own.is_linear)
        self.before: list[Any] = []
        self.fed: Tensor | None = None  # embeddings [1, length, D] of all, where states are recurrent
        if not self.recurrent:
            self.own.activate_past_recording()  # of sliding layers: what leaves the window stays until the next crop

    def again(self, start: int, hidden: Tensor, config: Any) -> tuple[int, Tensor]:
        """Go back to at most `start` tokens. Returns how many are left, and what is to be read behind them."""
        if not self.recurrent:
            if self.length:
                self.own.crop(start - self.length)
            self.length = start + hidden.shape[1]
            return start, hidden
        whole = hidden if self.fed is None else torch.cat((self.fed[:, :start], hidden), 1)
        if start < self.mark:
            self.own, self.mark = DynamicCache(config=config), 0
        elif start < self.length:
            self._restore()
        else:
            self.mark = start
        self._keep()
        self.fed, self.length = whole, whole.shape[1]
        return self.mark, whole[:, self.mark :]

    def _keep(self) -> None:
        self.before = [
            copy.deepcopy({n: v for n, v in vars(layer).items() if n not in ("keys", "values")}) if linear else None
            for layer, linear in zip(self.own.layers, self.own.is_linear, strict=True)
        ]

    def _restore(self) -> None:
        for layer, state in zip(self.own.layers, self.before, strict=True):
            if state is not None:
                vars(layer).update(copy.deepcopy(state))
            if getattr(layer, "keys", None) is not None and layer.keys.numel():
                layer.keys, layer.values = layer.keys[:, :, : self.mark], layer.values[:, :, : self.mark]


class Whole(nn.Module):
    """All layers of a model at once, by its own forward on its own cache.

    `single`: behind a cache the model reads one token at a time only.
    """

    def __init__(self, base: nn.Module, config: Any, reason: str, single: bool = False) -> None:
        super().__init__()
        self.base, self.config, self.reason, self.single = base, config, reason, single

    def _needed(self) -> NoReturn:
        skip(f"needs the layers of the model one by one: {self.reason}")

    @property
    def self_attn(self) -> nn.Module:
        """There is none."""
        self._needed()

    @property
    def mlp(self) -> nn.Module:
        """There is none."""
        self._needed()

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        """Last hidden states [1, T, D] of the base, its norm included."""
        assert position_embeddings is not None
        positions = position_embeddings[0]
        if not isinstance(past_key_values, KeyValueCache):
            self._needed()
        start, count = past_key_values.start, hidden.shape[1]
        expected = torch.arange(start, start + count, device=positions.device)
        causal = attention_mask is None or attention_mask[0, 0].equal(_causal(start, start + count, positions.device))
        if not causal or not positions[0].equal(expected):
            self._needed()
        past = vars(past_key_values).setdefault("past", Past(self.config))
        first, read = past.again(start, hidden, self.config)
        if self.single and first and read.shape[1] > 1:
            skip("checks several tokens in one forward; behind its cache this model reads one at a time only")
        places = torch.arange(first, first + read.shape[1], device=hidden.device)[None]
        found = self.base(inputs_embeds=read, position_ids=places, past_key_values=past.own, use_cache=True)
        return found[0][:, -count:]


# -- the whole ----------------------------------------------------------------------------------------------------------


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
        shell = _shallow(model)
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
        found = stage.listeners[_held.layer].heard.get("position_embeddings")
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
        return self.model.embed_tokens.weight.device

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
    ids = torch.arange(3, 3 + length, device=embed.weight.device)[None] % embed.weight.shape[0]
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
