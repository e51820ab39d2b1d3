"""Language models of the reasoning track: one network class, one vocabulary, and verifiers. Recipes stand in the modules of
what they learn, as `deducers` and `solvers`.

Weights are those of a transformers `LlamaForCausalLM`; `Reasoner.forward` runs its layers over many texts of unequal length
at once, which the loop of transformers does not do without padding on the left. All that a method asks of a model goes
through `forward`, so that the harness counts its calls (one after the other), rows (a text each) and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.words import said

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, EOS, UNKNOWN = 0, 1, 2
# The order fixes the token ids of the committed weights: never reorder, only append, up to `SIZE`.
_WORDS = (
    *"<pad> <eos> <unk> 0 1 2 3 4 5 6 7 8 9 + - * / = ( ) ; . , ? | -> : X ans so wait yes no left then "
    "<dir> <cot> <prose> <table> <think> </think> <find> <guided> <next> <step> <verify> <score> <propose> <value> "
    "impossible likely sure done "
    "tom anna ben sue max lily sam rosa pears coins shells cards stamps nuts boxes of the "
    "has finds buys wins loses sells eats gives more fewer than double how many does have "
    "is isnt true false unknown <proof> <select> <infer> <holds> <rules> <goal> <agree> <follows> <whole> "
    "alma boris carlo dora edgar fiona gus hanna ivan jana kurt lena milo nora oscar petra quinn rita stefan tilda "
    "ugo vera walter xenia yuri zoe adam bella cyrus delia enzo flora gino helga igor julia karim lotte marco nadia".split(),
    # What deduction is about: 175 words that mean nothing.
    *[
        f"{a}{v}{b}{w}"
        for a, b in zip("bdfgklmnprstvz", "zlmtbrkpdnvsgf", strict=True)
        for v in "aeiou"
        for w in "aeiou"
    ][::2],
    # Of procedures, programs, worked examples and analogies.
    *"sort rotate delete replace count sum gather edits a b c d e f g h i j first last turn none end <states> <last> "
    "x y z l m push pop at if while < > do <trace> second third again <wish> good bad "
    "boss friend teacher doctor rival cousin up swap drop".split(),
    # Of the world that is known by heart.
    *"mate boss friend home trade pet born from in land near tongue coin food tool by kin life work past about see "
    "talk pay greet feed lend older odd make <needs> <back> <why> <exclude> <ways> <parts>".split(),
)
WORDS = tuple(dict.fromkeys(_WORDS))  # a word that several grammars share stands once
SIZE = 512  # rows of the embedding: words that later grammars append find their place


DIGITS = [WORDS.index(str(digit)) for digit in range(10)]
STOP = WORDS.index(".")  # where a step ends


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """One id per word between blanks, no special tokens added."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return tokenizer().encode(text).ids


def decode(ids: Sequence[int]) -> str:
    """Text of token ids, a word's or a checkpoint's, up to the first end-of-sequence token."""
    ids = list(ids)
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    if any(i >= SIZE for i in ids):  # a checkpoint wrote them
        return said(ids)
    return " ".join(WORDS[i] if i < len(WORDS) else "<unk>" for i in ids)


# -- the network ---------------------------------------------------------------------------------------------------


class KeyValues:
    """Keys and values of B texts, each at a length of its own; row b of layer l is written where row b stands.

    `lengths` int64 [B]: tokens held of each text. `keys`, `values`: by layer [B, slots, H, D]. `states`: where they are kept,
    the final states of the same tokens, one tensor [B, slots, D]; else nothing.
    """

    def __init__(self, rows: int, states: bool = False) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.states: list[Tensor] = []
        self.stateful = states

    def room(self, model: Reasoner, slots: int) -> None:
        """Have room for so many tokens of each text."""
        have = self.keys[0].shape[1] if self.keys else 0
        if slots <= have:
            return
        config, weight = model.llama.config, model.llama.model.embed_tokens.weight
        shape, depth = (len(self.lengths), max(slots, have + 32)), config.num_hidden_layers
        heads = (config.num_key_value_heads, config.head_dim)
        kinds = [(self.keys, depth, heads), (self.values, depth, heads)]
        for held, count, inner in (*kinds, (self.states, int(self.stateful), (config.hidden_size,))):
            for number in range(count):  # one by one, so that no more than one of them is there twice
                wider = weight.new_zeros((*shape, *inner))
                if number < len(held):
                    wider[:, :have] = held[number]
                held[number : number + 1] = [wider]

    def take(self, rows: Sequence[int]) -> KeyValues:
        """A copy that holds these rows, in this order; a row may come several times."""
        other = KeyValues(0, self.stateful)
        index = torch.tensor(list(rows), dtype=torch.long)
        other.lengths = self.lengths[index]
        used = int(other.lengths.max()) if len(index) else 0
        there = index.to(self.keys[0].device) if self.keys else index
        for held, copy in zip(
            (self.keys, self.values, self.states), (other.keys, other.values, other.states), strict=True
        ):
            copy += [each[there, :used] for each in held]
        return other

    def swap(self, some: Sequence[int], others: Sequence[int]) -> None:
        """Exchange rows, each of some with one of others."""
        pairs, turned = [*some, *others], [*others, *some]
        self.lengths[pairs] = self.lengths[turned]
        for held in (*self.keys, *self.values, *self.states):
            held[pairs] = held[turned]


class Reasoner(nn.Module):
    """A Llama that reads and goes on writing texts of unequal length side by side."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=SIZE, hidden_size=width, intermediate_size=8 * round(width / 3), num_hidden_layers=depth,
                num_attention_heads=width // 32, max_position_embeddings=1024,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                initializer_range=0.04, tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS,
                pad_token_id=PAD,
            )
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.llama.model.embed_tokens.weight.device

    def hold(self, rows: int, states: bool = False) -> KeyValues:
        """What so many texts are read into."""
        return KeyValues(rows, states)

    def forward(
        self, ids: Tensor, held: KeyValues | None = None, lengths: Tensor | None = None, states: bool = False
    ) -> Tensor:
        """Logits [B, T, V] of the token after each position, or the final states [B, T, D].

        Args:
            ids: int64 [B, T], padded on the right.
            held: what stands before, of the first B rows; the new tokens are added to it, and where it keeps final states,
                theirs too.
            lengths: int64 [B], how many of the T tokens are none of the padding; None: all.
        """
        inner, rows, count = self.llama.model, ids.shape[0], ids.shape[1]
        device = ids.device
        starts = held.lengths[:rows] if held is not None else torch.zeros(rows, dtype=torch.long)
        last = int(starts.max()) + count
        positions = starts[:, None] + torch.arange(count)
        # Where all rows stand at one length, a triangle masks; else each row has a mask of its own.
        level = bool((starts == starts[0]).all())
        seen = None if held is None or (level and count == 1) else positions[:, None, :, None] >= torch.arange(last)
        seen = None if seen is None else seen.to(device)
        at = positions.to(device)
        hidden = inner.embed_tokens(ids)
        cos, sin = inner.rotary_emb(hidden, at)
        if held is not None:
            held.room(self, last)
        row = torch.arange(rows, device=device)[:, None]
        for number, layer in enumerate(inner.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                part(x).unflatten(-1, (-1, attention.head_dim))
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = _turn(q, cos, sin), _turn(k, cos, sin)
            if held is not None:
                keys, values = held.keys[number], held.values[number]
                keys[row, at], values[row, at] = k, v
                k, v = keys[:rows, :last], values[:rows, :last]
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, is_causal=held is None
            )
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if held is not None:
            held.lengths[:rows] += count if lengths is None else lengths
        hidden = inner.norm(hidden)
        if held is not None and held.stateful:
            held.states[0][row, at] = hidden
        if states:
            return hidden
        logits = self.llama.lm_head(hidden)
        logits[..., len(WORDS) :] = -1e4  # rows of the embedding that are no words yet
        return logits


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B, T, H, D], angles [B, T, D]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]


def built(kind: type[nn.Module], width: int, depth: int, seed: int) -> Any:
    """An untrained network with weights N(0, 0.04) from `seed`."""
    with torch.random.fork_rng(devices=[]):
        network = kind(width, depth)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.04, generator=generator)
    return network


def looking_back(network: Reasoner, offsets: Sequence[int] = (1, 2), peak: float = 20.0, constant: float = 0.3) -> None:
    """Let heads 0, 1, ... of the first layer attend to the token `offsets` before, to about three quarters.

    A constant in the first channel of all embeddings drives queries and keys; the keys are turned beforehand, so that the
    rotary product has its maximum at that distance.
    """
    inner = network.llama.model
    attention, table = inner.layers[0].self_attn, inner.embed_tokens.weight
    size, width = attention.head_dim, table.shape[1]
    frequencies = 1.0 / network.llama.config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    share = (frequencies > 0.12).float()
    share = share / share.sum()
    with torch.no_grad():
        table[:, 0] = constant
        scaled = constant / ((constant**2 + 0.04**2 * (width - 1)) / width) ** 0.5  # behind the norm
        amplitude = (peak * size**0.5 * share).sqrt() / scaled
        for head, offset in enumerate(offsets):
            rows = slice(head * size, (head + 1) * size)
            for part in (attention.q_proj, attention.k_proj):
                part.weight[rows] *= 0.3
            turn = frequencies * offset
            attention.q_proj.weight[rows, 0] = torch.cat([amplitude, torch.zeros(size // 2)])
            attention.k_proj.weight[rows, 0] = torch.cat([amplitude * turn.cos(), amplitude * turn.sin()])


class Verifier(nn.Module):
    """A copy of a reasoner's layers that judges texts: logits [B, T] that all is well up to each position."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.reader = Reasoner(width, depth)
        self.head = nn.Linear(width, 1)

    def forward(self, ids: Tensor, held: KeyValues | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, T] of texts [B, T], padded on the right; `held` and `lengths` as of `Reasoner.forward`."""
        return self.head(self.reader(ids, held, lengths, states=True))[..., 0]
