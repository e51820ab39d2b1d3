"""Language models of the reasoning track: one network class, three sizes, one mixture of problems in all their formats.

Weights are those of a transformers `LlamaForCausalLM`; `Reasoner.forward` runs its layers over many texts of unequal length
at once, which the loop of transformers does not do without padding on the left. All that a method asks of a model goes
through `forward`, so that the harness counts its calls (one after the other), rows (a text each) and positions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones import Progress, Recipe

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
DIGITS = [WORDS.index(str(digit)) for digit in range(10)]
STOP = WORDS.index(".")  # where a step ends
SIZE = 512  # rows of the embedding: words that later grammars append find their place
# Shares of the training examples.
MIXTURE = {
    "<cot>": 0.18, "<prose>": 0.12, "<table>": 0.12, "<guided>": 0.12, "<think>": 0.14, "<find>": 0.1, "<verify>": 0.1,
    "<dir>": 0.03, "countdown": 0.05, "<propose>": 0.02, "<value>": 0.02,
}  # fmt: skip


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
    """Text of token ids, up to the first end-of-sequence token."""
    ids = list(ids)
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
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
                num_attention_heads=width // 32, max_position_embeddings=1024, rope_theta=1000.0,
                initializer_range=0.04, tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS,
                pad_token_id=PAD,
            )
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.llama.model.embed_tokens.weight.device

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


class Verifier(nn.Module):
    """A copy of a reasoner's layers that judges texts: logits [B, T] that all is well up to each position."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.reader = Reasoner(width, depth)
        self.head = nn.Linear(width, 1)

    def forward(self, ids: Tensor, held: KeyValues | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, T] of texts [B, T], padded on the right; `held` and `lengths` as of `Reasoner.forward`."""
        return self.head(self.reader(ids, held, lengths, states=True))[..., 0]


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


# -- what they are trained on --------------------------------------------------------------------------------------


def example(rng: random.Random, form: str) -> tuple[str, str]:
    """A prompt and its completion in one of the formats of `MIXTURE`."""
    from stepmark.datasets import countdown, problems

    if form in ("countdown", "<propose>", "<value>"):
        count = rng.choice((3, 4))
        if form == "countdown":
            state, target = countdown.question(rng, count)
            return f"{countdown.told(state, target)} <cot>", countdown.solution(state, target, rng)
        state, target = countdown.somewhere(rng, count)
        if form == "<value>":
            return f"{countdown.told(state, target)} <value>", countdown.value(state, target)
        while len(state) == 1:
            state, target = countdown.somewhere(rng, count)
        return f"{countdown.told(state, target)} <propose>", countdown.said(*rng.choice(countdown.moves(state)))
    question = problems.problem(rng, rng.randint(1, 5))
    if form == "<find>":
        return found_back(rng, question)
    steps = problems.read(question).steps
    done = rng.randint(0, len(steps))
    before = [f"{step.clause} ." for step in steps[:done]]
    if form == "<guided>":
        kind, clause = (
            (steps[done].kind, f"{steps[done].clause} .")
            if done < len(steps)
            else ("done", problems.solution(question, "<dir>"))
        )
        return " ".join([question, form, *before, "<next>"]), f"{kind} <step> {clause}"
    if form == "<verify>":
        return judged(rng, question, max(done, 1))
    return f"{question} {form}", problems.solution(question, form, rng)


def found_back(rng: random.Random, question: str) -> tuple[str, str]:
    """An answer told, a number of the question asked for."""
    from stepmark.datasets import problems

    while True:
        number = rng.randrange(len(problems.places(question)))
        completion = problems.backward(question, number)
        if completion is not None:
            return problems.asked_back(question, number, problems.read(question).answer), completion


def judged(rng: random.Random, question: str, done: int) -> tuple[str, str]:
    """The first `done` steps of a solution and the word <score>; a digit says what the last of them is worth.

    7 to 9: right; 4 to 6: rightly worked, but not the step that was due; 0 to 2: wrongly worked. One step in four stands
    behind a wrong one: it is worth what it is for itself, less three.
    """
    from stepmark.datasets import problems

    steps = list(problems.read(question).steps[:done])
    last, spoilt = steps[-1], done > 1 and rng.random() < 0.25
    worth, kind = rng.randint(7, 9), rng.random()
    other = problems.misread(question, done - 1, rng) if kind < 0.25 else None
    if other is not None:
        last, worth = other, rng.randint(4, 6)
    elif kind < 0.5:
        last, worth = problems.slip(last, rng), rng.randint(0, 2)
    if spoilt:
        k = rng.randrange(done - 1)
        steps[k], worth = problems.slip(steps[k], rng), max(0, worth - 3)
    clauses = [f"{step.clause} ." for step in (*steps[:-1], last)]
    return " ".join([question, "<verify>", *clauses, "<score>"]), str(worth)


def examples(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Training examples (prompt ids, completion ids with EOS) of the mixture."""
    rng = random.Random(f"reasoners {seed}")
    forms = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=count)
    rows = []
    for form in forms:
        prompt, completion = example(rng, form)
        rows.append((encode(prompt), [*encode(completion), EOS]))
    return rows


def train_reasoner(network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3) -> dict[str, float]:
    """Completions of the mixture, about 3 000 tokens an update."""
    from stepmark.backbones.lm import batches, fit

    stream = batches(examples(seed, 60_000), 3_000, seed)
    return fit(network.llama, progress, steps=steps, lr=lr, seed=seed, stream=stream)


def labelled(model: nn.Module, seed: int, count: int) -> list[tuple[list[int], list[tuple[int, bool]], bool]]:
    """Texts of `count` fresh questions, written by a model at temperature 1: (token ids, [(where a step ends, whether all
    is well up to there)], whether the answer is right)."""
    from stepmark.backbones.chains import Chains
    from stepmark.datasets import problems

    rng, draw = random.Random(f"verifiers {seed}"), torch.Generator().manual_seed(seed)
    found = []
    while len(found) < count:
        asked = [problems.problem(rng, rng.randint(1, 5)) for _ in range(min(100, count - len(found)))]
        chains = Chains(model, [encode(f"{question} <cot>") for question in asked])
        with torch.no_grad():
            chains.write(limit=80, temperature=1.0, generator=draw)
        for i, question in enumerate(asked):
            own = chains.written(i)
            seen = problems.check(question, decode(own))
            ends = [chains.starts[i] + k for k, token in enumerate(own) if token == STOP]
            marks = [(end, all(seen.steps[: k + 1])) for k, end in enumerate(ends[: len(seen.steps)])]
            found.append((chains.texts[i], marks, seen.right))
    return found


def train_verifier(
    network: nn.Module, progress: Progress, process: bool, seed: int, steps: int = 500
) -> dict[str, float]:
    """Start as `reasoner`; cross entropy of whether all is well, at the end of each step (process) or of the text (outcome).

    The texts are the reasoner's own, at temperature 1. The report says how well the judgements part right from wrong on
    texts of other questions: the area under the ROC curve.
    """
    from stepmark.backbones import load

    assert isinstance(network, Verifier)
    writer = load("reasoner")
    network.reader.load_state_dict(writer.state_dict())
    rows = labelled(writer, seed, 6_400)
    rng = random.Random(f"verifier {seed}")
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-4, weight_decay=0.01)
    for step in progress(range(steps), "verifier"):
        for group in optimiser.param_groups:
            group["lr"] = 3e-4 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        said, truth = _judgements(network, rng.sample(rows[:6_000], 48), process)
        loss = F.binary_cross_entropy_with_logits(said, truth)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        said, truth = _judgements(network, rows[6_000:], process)
    return {"auroc": auroc(said, truth), "right": float(truth.mean())}


def _judgements(network: Verifier, rows: Sequence[Any], process: bool) -> tuple[Tensor, Tensor]:
    """Logits [M] and truths [M] of all places of these texts that are judged."""
    longest = max(len(ids) for ids, _, _ in rows)
    said = network(torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _, _ in rows]))
    places = [
        (row, at, fine)
        for row, (ids, marks, right) in enumerate(rows)
        for at, fine in (marks if process else [(len(ids) - 1, right)])
    ]
    row, at, fine = zip(*places, strict=True)
    return said[list(row), list(at)], torch.tensor(fine, dtype=torch.float32)


def auroc(said: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of scores [M] for truths [M] of 0 and 1; ties count half. NaN where all are alike."""
    right, wrong = said[truth > 0.5], said[truth <= 0.5]
    if not len(right) or not len(wrong):
        return float("nan")
    above = (right[:, None] > wrong[None]).float() + 0.5 * (right[:, None] == wrong[None]).float()
    return float(above.mean())


RECIPES: dict[str, Recipe] = {
    "reasoner_small": Recipe(
        partial(built, Reasoner, 96, 4, 21), partial(train_reasoner, steps=2_400, seed=21),
        "Llama, width 96, 4 layers, word problems in ten formats and countdown",
    ),
    "reasoner": Recipe(
        partial(built, Reasoner, 192, 4, 22), partial(train_reasoner, steps=2_400, seed=22),
        "Llama, width 192, 4 layers, the same data",
    ),
    "reasoner_large": Recipe(
        partial(built, Reasoner, 288, 6, 23), partial(train_reasoner, steps=2_400, seed=23, lr=2e-3),
        "Llama, width 288, 6 layers, the same data",
    ),
    "reasoner_process": Recipe(
        partial(built, Verifier, 192, 4, 24), partial(train_verifier, process=True, seed=24),
        "a copy of reasoner with a head: is all well up to the end of this step?",
    ),
    "reasoner_outcome": Recipe(
        partial(built, Verifier, 192, 4, 25), partial(train_verifier, process=False, seed=25),
        "a copy of reasoner with a head: is the answer of this text right?",
    ),
}  # fmt: skip
