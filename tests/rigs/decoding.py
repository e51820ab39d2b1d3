"""What tests of decoding methods share: random targets, plain decoding to compare with, sessions, and a run of a method."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stepmark import plugins
from stepmark.meter.counts import Ledger, watch


def tiny(seed: int, layers: int = 3, vocabulary: int = 13, eos: int = 1, width: int = 16, shared: int = 1) -> Any:
    """A random Llama with 2 query heads on `shared` key/value heads; weights large enough for texts that wander."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=shared,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.4, generator=generator)
    return model.eval().requires_grad_(False)


def greedy_without_cache(model: nn.Module, prompt: list[int], room: int, eos: int = 1) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + room and (len(tokens) == len(prompt) or tokens[-1] != eos):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def last_logits(model: Any, ids: list[int]) -> Tensor:
    """Logits after a text, read whole and without a cache."""
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return found


@lru_cache
def truth_of(seed: int) -> tuple[Any, list[int], list[int]]:
    """A random model of 3 or 4 layers, a prompt, and the first 30 greedy tokens."""
    model, prompt = tiny(seed, layers=3 + seed % 2), prompt_of(seed)
    return model, prompt, greedy_without_cache(model, prompt, 30)


def load(name: str, **constants: Any) -> Any:
    """A method with some of its own constants, or of its module's, replaced. KeyError where it has no such constant."""
    method = plugins.load_class(plugins.methods()[name])()
    scope = method.run.__globals__
    for constant, value in constants.items():
        if hasattr(method, constant):
            setattr(method, constant, value)
        elif constant in scope:
            scope[constant] = value
        else:
            raise KeyError(f"{name} has no constant {constant}")
    return method


def module_of(name: str) -> Any:
    """The names that a method's file defines."""
    return SimpleNamespace(**plugins.load_class(plugins.methods()[name]).run.__globals__)


def session_of(seed: int = 0, **networks: Any) -> Any:
    """What `run` sees, everything counted as the harness counts it."""
    ledger = Ledger(bounded=("target", "student"))
    for name, model in networks.items():
        for part in model.modules():
            part.__dict__.pop("forward", None)
        watch(ledger, name, model, list(getattr(getattr(model, "model", None), "layers", [])))
    rng = torch.Generator().manual_seed(seed)
    return SimpleNamespace(networks=networks, state={}, rng=rng, device=torch.device("cpu"), ledger=ledger)


def batch_of(prompts: list[list[int]], room: int, temperature: float = 0.0) -> dict[str, Any]:
    n = len(prompts)
    return {"prompt": prompts, "max_new_tokens": [room] * n, "temperature": [temperature] * n}


def run(method: Any, session: Any, prompts: list[list[int]], room: int, budget: int, temperature: float = 0.0) -> Any:
    session.ledger.reset(limit=budget * len(prompts))
    with torch.no_grad():
        return method.run(session, batch_of(prompts, room, temperature), budget)


def prompt_of(seed: int, vocabulary: int = 13) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (3 + seed % 5,), generator=generator).tolist()
