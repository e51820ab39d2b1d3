"""Language models of the decoding and reasoning tracks, their tokenizer and their recipes.

One word-level tokenizer serves all of them; one mixture of the workloads sums, words, hops and stories trains them.
They are transformers `LlamaForCausalLM`s, so that a checkpoint of the hub takes their place by a change of weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones import Progress, Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

PAD, EOS, UNKNOWN = 0, 1, 2
# Every word of the four grammars. The order fixes the token ids of the committed weights: never reorder, only append.
VOCABULARY = tuple(
    "<pad> <eos> <unk> <cot> <dir> <story> 0 1 2 3 4 5 6 7 8 9 + - * = ; . , ? ans "
    "tom anna ben sue max lily sam rosa "
    "has finds buys wins loses sells eats then the double how many does have pears coins shells cards stamps nuts "
    "boss friend teacher doctor rival cousin "
    "alma boris carlo dora edgar fiona gus hanna ivan jana kurt lena milo nora oscar petra quinn rita stefan tilda "
    "ugo vera walter xenia yuri zoe adam bella cyrus delia enzo flora gino helga igor julia karim lotte marco nadia "
    "otto paula remy sonja theo ursula viktor wanda yvonne zeno arno bianca cesar diana emil freya georg heidi ines "
    "jonas "
    "lives in one day early morning late evening went to near behind saw found met with dreamt of tripped over a "
    "oh my what said home end "
    "fox bear cat dog owl mouse frog duck goat hare forest valley village castle barn cave "
    "river market hill lake garden beach bridge tower red blue green golden silver tiny old shiny "
    "kite drum boat hat key lamp bell ring book ball "
    # Absent from the training text: for methods that train a network of their own over this vocabulary.
    "<mask> <pause> wait check yes no so let".split()
)
# Share of the training examples by workload, and how often a solution is written out rather than answered at once.
MIXTURE = {"sums": 0.26, "words": 0.36, "hops": 0.24, "stories": 0.14}
WRITTEN_OUT = 0.8


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The tokenizer: one id per space-separated word of `VOCABULARY`, no special tokens added."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return tokenizer().encode(text).ids


def decode(ids: list[int]) -> str:
    """Text of token ids, up to the first end-of-sequence token."""
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return " ".join(VOCABULARY[i] if i < len(VOCABULARY) else "<unk>" for i in ids)


def build(width: int, depth: int, seed: int) -> LlamaForCausalLM:
    """An untrained Llama: head size 32, MLP of 8/3 the width, embeddings tied, weights N(0, 0.04) from `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=8 * round(width / 3),
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        max_position_embeddings=512,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    # transformers draws from the global generator while building: keep that out of sight, then draw explicitly.
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model


def examples(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """`count` training examples (prompt ids, completion ids with EOS) of the mixture, shuffled."""
    from stepmark.task import load_split

    rng = random.Random(f"mixture {seed}")
    rows = {name: load_split(name, "train") for name in MIXTURE}
    used = dict.fromkeys(MIXTURE, 0)
    chosen = []
    for name in rng.choices(list(MIXTURE), list(MIXTURE.values()), k=count):
        data, i = rows[name], used[name] % len(rows[name]["prompt"])
        used[name] += 1
        prompt, target = data["prompt"][i], data["target"][i]
        if data["answer"][i] and rng.random() >= WRITTEN_OUT:
            prompt, target = prompt.replace("<cot>", "<dir>"), f"ans {data['answer'][i]}"
        chosen.append((encode(prompt), [*encode(target), EOS]))
    return chosen


def batches(rows: list[tuple[list[int], list[int]]], tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of about `tokens` tokens, of similar lengths each: (input ids, labels), both int64 [B, L].

    Labels are the next tokens, -100 on the prompt and on the padding.
    """
    rng = random.Random(f"batches {seed}")
    while True:
        order = list(range(len(rows)))
        rng.shuffle(order)
        for start in range(0, len(order), 2048):
            pool = sorted(order[start : start + 2048], key=lambda i: len(rows[i][0]) + len(rows[i][1]))
            cut: list[list[int]] = [[]]
            for i in pool:
                length = len(rows[i][0]) + len(rows[i][1])
                if cut[-1] and length * (len(cut[-1]) + 1) > tokens:
                    cut.append([])
                cut[-1].append(i)
            rng.shuffle(cut)
            for chosen in cut:
                length = max(len(rows[i][0]) + len(rows[i][1]) for i in chosen) - 1
                inputs = torch.full((len(chosen), length), PAD)
                labels = torch.full((len(chosen), length), -100)
                for row, i in enumerate(chosen):
                    prompt, target = rows[i]
                    whole = torch.tensor(prompt + target)
                    inputs[row, : len(whole) - 1] = whole[:-1]
                    labels[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
                yield inputs, labels


def hidden_states(model: nn.Module, ids: Tensor, keep: list[bool]) -> Tensor:
    """Final normalised hidden states [B, L, D] of right-padded `ids`, running only the layers marked in `keep`.

    Causal attention never looks at the padding on the right, so that no mask is needed.
    """
    inner = model.model
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer, kept in zip(inner.layers, keep, strict=True):
        if kept:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return inner.norm(hidden)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices (Jordan et al. 2024), in float32 and batched by shape.

    The same rule as `torch.optim.Muon` with Nesterov momentum 0.95, 4 Newton-Schulz steps and
    `adjust_lr_fn="match_rms_adamw"`, which iterates in bfloat16, one matrix at a time: on processors without
    bfloat16 arithmetic that takes ten times as long as the gradient itself.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float = 0.05) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:  # a layer left out of this step has none
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, matrices in by_shape.items():
                updates = []
                for parameter in matrices:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(parameter.grad, momentum, group["momentum"]))
                update = orthogonalise(torch.stack(updates))
                for parameter, direction in zip(matrices, update, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonalise(matrices: Tensor, steps: int = 4) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices of a stack [M, A, B], by a quintic Newton-Schulz iteration."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    x = wide / wide.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if matrices.shape[1] <= matrices.shape[2] else x.transpose(1, 2)


def fit(
    model: nn.Module,
    progress: Progress,
    *,
    steps: int,
    lr: float,
    seed: int,
    tokens: int = 1500,
    drop: float = 0.0,
    warmup: int = 40,
    stream: Iterator[tuple[Tensor, Tensor]] | None = None,
) -> dict[str, float]:
    """Train on completions with Muon (matrices of the layers) and AdamW (the rest), cosine schedule.

    Args:
        drop: greatest probability of leaving a layer out of a step; it grows linearly from 0 at the first layer
            (stochastic depth, Huang et al. 2016, section 3), so that skipping layers stays possible at inference.
        stream: batches as `batches` gives them; default: of the mixture.

    Returns: {"loss": mean loss of the last 50 steps, "tokens": tokens seen}.
    """
    model.train()
    depth = len(model.model.layers)
    layers = list(model.model.layers.parameters())
    matrices = [p for p in layers if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(
            [p for p in model.parameters() if id(p) not in chosen], lr=lr, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]
    generator = torch.Generator().manual_seed(seed)
    stream = batches(examples(seed, 120_000), tokens, seed) if stream is None else stream
    losses: list[float] = []
    seen = 0
    for step in progress(range(steps), "language model"):
        rate = lr * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        ids, labels = next(stream)
        seen += ids.numel()
        uniform = torch.rand(depth, generator=generator)
        keep = [float(uniform[i]) >= drop * i / max(1, depth - 1) for i in range(depth)]
        wanted = labels >= 0
        logits = model.lm_head(hidden_states(model, ids, keep)[wanted])
        loss = F.cross_entropy(logits, labels[wanted])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return {"loss": sum(losses[-50:]) / len(losses[-50:]), "tokens": float(seen)}


def split_depth(source: nn.Module, target: nn.Module) -> None:
    """Initialise a deep model from a shallow one: each layer becomes r consecutive copies of itself.

    The two projections that write into the residual stream are divided by r = depth(target) / depth(source), so that
    r small steps replace one large step and no layer is idle. Only the first layer is split 8 : 1 : 1 (r = 3): its
    input, the bare embedding, is so short that a third of its step would change what its own copies see.
    """
    times = len(target.model.layers) // len(source.model.layers)
    with torch.no_grad():
        target.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
        target.model.norm.load_state_dict(source.model.norm.state_dict())
        for i, layer in enumerate(target.model.layers):
            layer.load_state_dict(source.model.layers[i // times].state_dict())
            share = 1 / times if i >= times else 0.8 if i == 0 else 0.2 / (times - 1)
            layer.self_attn.o_proj.weight *= share
            layer.mlp.down_proj.weight *= share


def train_target(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 10 minutes on one core."""
    return fit(model, progress, steps=2300, lr=3e-3, seed=1)


def train_draft(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 2 minutes on one core."""
    return fit(model, progress, steps=2300, lr=4e-3, seed=2)


def train_deep(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 5 minutes on one core, starting from the committed `lm_target`."""
    from stepmark.backbones import load

    split_depth(load("lm_target"), model)
    return fit(model, progress, steps=500, lr=1e-3, seed=3, drop=0.2)


def recall_batches(stages: list[tuple[int, int, int, int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of fresh texts with needles, by stages of growing length.

    Args:
        stages: (steps, greatest number of words, greatest number of needles, tokens of a batch). A batch holds texts of
            one length, at least an eighth of the greatest; 4 to 8 of its needles are asked for.
    """
    from stepmark.datasets.needles import example

    rng = random.Random(f"recall {seed}")
    for steps, longest, most, tokens in stages:
        for _ in range(steps):
            needles = rng.randint(max(2, most // 4), most)
            words = max(4 * needles, rng.randint(longest // 8, longest))
            asked = rng.randint(min(4, needles), min(8, needles))
            rows = []
            for _ in range(max(1, tokens // (words + 4 * asked))):
                prompt, target = example(rng, words, needles, asked)
                rows.append((encode(prompt), [*encode(target), EOS]))
            yield next(batches(rows, 10**9, 0))


def train_recall(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 5 minutes on one core.

    Half as deep at first, on facts with next to no text around them: the circuit that looks a name up forms there
    within a minute. Then texts grow, each layer becomes two (`split_depth`), and texts grow on, to 1000 words: what a
    few minutes allow. Longer texts than that are beyond what it has learnt, and recall in them falls off.
    """
    shallow = build(64, 3, seed=4)
    short = [(400, 16, 4, 1400), (300, 64, 8, 1400), (300, 256, 16, 2000)]
    first = fit(shallow, progress, steps=1000, lr=4e-3, seed=4, stream=recall_batches(short, 4))
    split_depth(shallow, model)
    long = [(150, 256, 16, 2000), (150, 512, 20, 2500), (200, 1024, 20, 3300)]
    second = fit(model, progress, steps=500, lr=2e-3, seed=5, stream=recall_batches(long, 5))
    return second | {"tokens": first["tokens"] + second["tokens"]}


def train_wishes(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 4 minutes on one core, starting from the committed `lm_target`.

    In both directions: two texts of three are written after their prompt, and of one of three a beginning is read, and
    after ``?`` the prompt that it belongs to is told. So the model can be asked what a text says of its input.
    """
    from stepmark.backbones import load
    from stepmark.task import load_split

    model.load_state_dict(load("lm_target").state_dict())
    data, rng = load_split("wishes", "train"), random.Random("wishes both ways")
    rows = []
    for prompt, text in zip(data["prompt"], data["target"], strict=True):
        if rng.random() < 2 / 3:
            rows.append((encode(prompt), [*encode(text), EOS]))
        else:
            words = text.split()
            told = " ".join(words[: rng.randint(0, len(words))])
            rows.append((encode(f"{told} ?"), [*encode(prompt.partition(" <story>")[0]), EOS]))
    return fit(model, progress, steps=900, lr=1.5e-3, seed=6, stream=batches(rows, 1500, 6))


def make_outliers(model: nn.Module, progress: Progress) -> dict[str, float]:
    """Seconds: the function of the committed `lm_target`, with channels behind its norms that stand out.

    Four gains of every norm grow by powers of two and the weights that read them shrink by the same: large models have
    such channels, and rounding feels them while the function stays what it was.
    """
    from stepmark.backbones import load

    model.load_state_dict(load("lm_target").state_dict())
    factor = torch.ones(model.config.hidden_size)
    factor[[3, 40, 77, 120]] = torch.tensor([16.0, 32.0, 16.0, 8.0])
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, block, names in (
                (layer.input_layernorm, layer.self_attn, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, layer.mlp, ("gate_proj", "up_proj")),
            ):
                norm.weight *= factor
                for name in names:
                    getattr(block, name).weight /= factor
    return {"greatest": float(factor.max())}


def rotate_by(states: Tensor, amounts: Tensor, rotary: nn.Module) -> Tensor:
    """Rotated states [.., S, d] moved on by `amounts` positions, which broadcast to [.., S] and may be negative.

    Rotary embeddings add up: what stood at position p stands at p + amount, as if it had been written there.
    """
    cos, sin = rotary(states, amounts.reshape(1, -1))
    cos, sin = (part.reshape(*amounts.shape, states.shape[-1]) for part in (cos, sin))
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin


class WorkersView:
    """Who sees what, and at which distance, where several workers write below one prompt at once: for training.

    A row holds the prompt, then the text of each worker, padded. All write one token at a time. A worker's token sees
    the prompt, what the others have written up to then and its own text, laid out in this order: its distance to the
    text of another grows with what either writes. As in Hogwild! inference, keys stay and queries are rotated.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.rotary = model.model.rotary_emb
        self.blocks = self.shifts = self.seen = torch.zeros(0)
        ALL_ATTENTION_FUNCTIONS.register("stepmark_workers", self.attend)
        model.config._attn_implementation = "stepmark_workers"

    def batch(self, rows: list[tuple[list[int], list[list[int]]]]) -> tuple[Tensor, Tensor]:
        """Lay out rows of (prompt, texts of the workers); (ids, labels) int64 [B, L] as `batches` gives them."""
        workers = len(rows[0][1])
        length = max(len(prompt) + sum(map(len, texts)) for prompt, texts in rows)
        ids, labels = torch.full((len(rows), length), PAD), torch.full((len(rows), length), -100)
        blocks, times = torch.full_like(ids, -1), torch.arange(length).repeat(len(rows), 1)
        shifts = torch.zeros(len(rows), workers + 1, length, dtype=torch.long)
        for row, (prompt, texts) in enumerate(rows):
            parts, first = [prompt, *texts], 0
            starts = [sum(map(len, parts[:block])) for block in range(len(parts))]
            for block, text in enumerate(parts):
                first, last = starts[block], starts[block] + len(text)
                ids[row, first:last] = torch.tensor(text)
                blocks[row, first:last], times[row, first:last] = block, torch.arange(len(text))
                if block == 0:
                    continue
                labels[row, first : last - 1] = ids[row, first + 1 : last]
                others = [other for other in range(1, len(parts)) if other != block]
                written = {c: torch.arange(1, len(text) + 1).clamp(max=len(parts[c])) for c in others}
                offset = torch.zeros(len(text), dtype=torch.long)
                offsets = {0: offset}
                offset = offset + len(prompt)
                for other in others:
                    offsets[other] = offset
                    offset = offset + written[other]
                for other, place in offsets.items():
                    shifts[row, other, first:last] = (offset - place) - (first - starts[other])
        of, to = blocks[:, :, None], blocks[:, None, :]
        earlier = times[:, :, None] >= times[:, None, :]
        self.seen = ((of > 0) & (to == 0)) | ((to >= 0) & (of >= 0) & ((of == 0) == (to == 0)) & earlier)
        self.seen |= torch.eye(length, dtype=torch.bool)  # padding sees itself
        self.blocks, self.shifts = blocks, shifts
        return ids, labels

    def attend(
        self, module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        """Attention outputs [B, L, H, d] of queries and keys that are rotated at their places in the row."""
        logits = queries.new_zeros(*queries.shape[:3], queries.shape[2])
        for block in range(self.shifts.shape[1]):
            moved = rotate_by(queries, self.shifts[:, block, None].expand(queries.shape[:3]), self.rotary)
            logits = torch.where((self.blocks == block)[:, None, None], moved @ keys.transpose(2, 3), logits)
        logits = (logits * queries.shape[3] ** -0.5).masked_fill(~self.seen[:, None], float("-inf"))
        return (logits.softmax(-1) @ values).transpose(1, 2), None


def train_workers(model: nn.Module, progress: Progress) -> dict[str, float]:
    """About 3 minutes on one core, starting from the committed `lm_recall`, which knows how to look a name up.

    Lists of questions answered by one worker or by two, the latter on a shared cache (`WorkersView`).
    """
    from stepmark.backbones import load
    from stepmark.datasets.friend_lists import QUESTIONS, WORKERS, example, transcripts

    model.load_state_dict(load("lm_recall").state_dict())
    view = WorkersView(model)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        rng = random.Random("workers 7")
        while True:
            workers, rows = rng.choice((1, 2, 2)), []
            for _ in range(10):
                prompt, asked = example(rng, rng.randint(4, QUESTIONS))
                named = zip(WORKERS, transcripts(asked, workers), strict=False)
                rows.append((encode(prompt), [[*encode(" ".join([name, *text])), EOS] for name, text in named]))
            yield view.batch(rows)

    report = fit(model, progress, steps=600, lr=3e-3, seed=7, stream=stream())
    model.config._attn_implementation = "sdpa"
    return report


RECIPES: dict[str, Recipe] = {
    "lm_target": Recipe(
        build=lambda: build(128, 4, seed=1),
        train=train_target,
        summary="Llama, width 128, 4 layers, on sums, words, hops and stories",
    ),
    "lm_draft": Recipe(
        build=lambda: build(64, 1, seed=2),
        train=train_draft,
        summary="Llama, width 64, 1 layer, same data: the draft model of speculative decoding",
    ),
    "lm_deep": Recipe(
        build=lambda: build(128, 12, seed=3),
        train=train_deep,
        summary="Llama, width 128, 12 layers, grown from lm_target and trained on with stochastic depth",
    ),
    "lm_recall": Recipe(
        build=lambda: build(64, 6, seed=4),
        train=train_recall,
        summary="Llama, width 64, 6 layers, trained to recall facts from texts of up to 1000 words",
    ),
    "lm_outliers": Recipe(
        build=lambda: build(128, 4, seed=6),
        train=make_outliers,
        summary="Llama, width 128, 4 layers: the function of lm_target, with outlier channels behind its norms",
    ),
    "lm_wishes": Recipe(
        build=lambda: build(128, 4, seed=5),
        train=train_wishes,
        summary="Llama, width 128, 4 layers: lm_target trained on with stories that follow a wish weakly, and to tell the wish",
    ),
    "lm_workers": Recipe(
        build=lambda: build(64, 6, seed=7),
        train=train_workers,
        summary="Llama, width 64, 6 layers: lm_recall trained on to answer lists of questions, alone or as two workers",
    ),
}
