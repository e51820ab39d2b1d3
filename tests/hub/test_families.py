"""Decoders of transformers, family by family: tiny random ones, driven as they are and losslessly, or skipped with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stepmark import hub, plugins
from stepmark.hub import Choice, source, text_networks
from stepmark.hub.presented import Presented
from stepmark.judge import Judge
from stepmark.method import Skip
from stepmark.runner import Runner
from stepmark.tracks.decoding.decoder import Decoder

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
GPT = {"n_positions": 256, "n_embd": 32, "n_layer": 4, "n_head": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "head_dim": 8,
}  # fmt: skip
# A text of 24 + 12 tokens leaves a window of 16. What is scaled is scaled otherwise than by the size of a head.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen3": {"head_dim": 16},
    "phi": {},
    "phi3": {},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 7, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 7, "sliding_window": 16, "sliding_window_pattern": 2},
    "gpt2": GPT,
    "gpt_neox": {},
    "gptj": GPT | {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 4},
    "falcon": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "granite": {
        "attention_multiplier": 0.1,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 4.0,
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"sliding_window": 16},
    "stablelm": {},
    "nemotron": {},
    "glm4": {"head_dim": 8},
    "smollm3": {},
    "exaone4": {"sliding_window": 16},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen3_next": EXPERTS | LINEAR,
    "deepseek_v3": LATENT,
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "jamba": {"mamba_d_state": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
}
LOSSLESS = ("autoregressive", "jacobi", "prompt_lookup", "speculative", "lookahead_decoding")
RECURRENT = "needs the layers of the model one by one: some of them keep a recurrent state, not keys and values"
SINGLE = "checks several tokens in one forward; behind its cache this model reads one at a time only"
ROOM = 12


def tiny(family: str, **more: Any) -> Any:
    """A random model of a family."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**(SMALL | FAMILIES.get(family, {}) | more))
    eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, **eager).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    tiny("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, draft: Path, tmp_path: Path, alone: None) -> Iterator[tuple[Any, Any]]:
    """The model of a family, and the task that is made of its folder."""
    own = tiny(request.param)
    own.save_pretrained(tmp_path / "model")
    with hub.using(Choice(str(tmp_path / "model"), draft=str(draft), items=1, new_tokens=ROOM, rungs=(ROOM,))) as made:
        yield own, made.task


def greedy(own: nn.Module, prompt: list[int]) -> list[int]:
    """Plain greedy decoding by whole forwards, one for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + ROOM and (len(text) == len(prompt) or text[-1] != 2):
        text.append(int(own(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
def test_every_family_is_decoded_losslessly_or_skipped_with_the_reason(checkpoint: tuple[Any, Any]) -> None:
    own, task = checkpoint
    inputs = Judge(task.id).inputs(1, 0)
    expected = [greedy(own, prompt) for prompt in inputs["prompt"]]
    network = source.load("checkpoint/target")
    kinds, single = network.kinds, getattr(network.model.layers[0], "single", False)
    for method in LOSSLESS:
        said, outputs = decoded(method, task.id, inputs)
        if said and method == "lookahead_decoding":
            assert said == (RECURRENT if kinds.layers else kinds.trees)
        elif said:
            assert said == SINGLE, method
            assert single
        else:
            assert outputs == expected, method


def decoded(method: str, task: str, inputs: dict[str, Any]) -> tuple[str, Any]:
    """Why a method is skipped, and what it writes where it is not."""
    runner = Runner(plugins.methods()[method], task, "smoke", show_progress=False)
    try:
        return "", runner.run(inputs, ROOM, 0).outputs
    except Skip as reason:
        return str(reason), None


@pytest.mark.parametrize("checkpoint", ["gemma3_text", "gpt2", "granite"], indirect=True)
def test_methods_that_attend_by_themselves_take_the_scale_of_the_model(checkpoint: tuple[Any, Any]) -> None:
    """A cache that evicts nothing gives the model's own text; one in integers nearly so."""
    _, task = checkpoint
    inputs = Judge(task.id).inputs(1, 0) | {"max_new_tokens": [4]}
    inputs["prompt"] = [prompt[:10] for prompt in inputs["prompt"]]  # within the window
    plain = Runner(plugins.methods()["autoregressive"], task.id, "smoke", show_progress=False).run(inputs, 4, 0)
    for method in ("kv_int8", "tova", "h2o"):
        found = Runner(plugins.methods()[method], task.id, "smoke", show_progress=False).run(inputs, 4, 0)
        if method == "kv_int8":
            assert found.outputs == plain.outputs


@pytest.mark.parametrize(
    ("checkpoint", "method", "said"),
    [
        ("gpt_oss", "h2o", "would leave out the model's soft caps or sinks"),
        ("deepseek_v3", "h2o", "takes values for as large as keys"),
        ("lfm2", "h2o", "some of them keep a recurrent state"),
        ("gptj", "h2o", "other than this model does"),
        ("gemma3_text", "h2o", "knows nothing of the model's window of 16 tokens"),
        ("smollm3", "sink_window", "do not turn as Llama's do"),
        ("glm4", "sink_window", "do not turn as Llama's do"),
    ],
    indirect=["checkpoint"],
)
def test_what_a_model_does_not_allow_is_skipped(checkpoint: tuple[Any, Any], method: str, said: str) -> None:
    _, task = checkpoint
    runner = Runner(plugins.methods()[method], task.id, "smoke", show_progress=False)
    with pytest.raises(Skip, match=said):
        runner.run(Judge(task.id).inputs(1, 0), ROOM, 0)


def test_a_forward_that_is_driven_wrongly_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that give other logits are left alone; a model whose own cache errs is refused."""
    own = tiny("qwen3")
    assert text_networks.presented(own, 96, 2, [2]).kinds.layers == ""
    monkeypatch.setattr("stepmark.hub.layers.Layer.forward", lambda self, hidden, **_: hidden * 1.01)
    assert "other logits" in text_networks.presented(own, 96, 2, [2]).kinds.layers
    monkeypatch.setattr("stepmark.hub.whole.Whole.forward", lambda self, hidden, **_: hidden * 1.01)
    with pytest.raises(text_networks.Unfit, match="standard deviations off its own forward's"):
        text_networks.presented(own, 96, 2, [2])


def test_heads_over_a_window_see_what_the_model_sees_also_in_trees() -> None:
    """Look-ahead windows beyond a sliding window: each token sees the last 16 places of its own branch."""
    network = text_networks.presented(tiny("gemma3_text"), 96, 2, [2])
    found, expected = text_networks.tree_of(network, list(range(3, 33)))
    assert torch.allclose(found, expected, atol=1e-3)
    assert isinstance(network, Presented)
    assert network.kinds.windows[0] == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "no_such_model"}, "cannot be loaded"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "no decoder that goes on with a text"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "takes no cache of keys and values"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
    ],
)
def test_what_cannot_run_is_told_before_weights_are_read(
    draft: Path, tmp_path: Path, alone: None, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "model").mkdir()
    config = json.loads((draft / "config.json").read_text()) | change
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match=said) as caught, hub.using(Choice(str(tmp_path / "model"))):
        pass
    assert "\n" not in str(caught.value)


def test_a_model_that_also_sees_images_writes_text(tmp_path: Path, alone: None) -> None:
    """Gemma 3 from 4B on: the vocabulary and the window stand in text_config."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = Gemma3Config(
        text_config=SMALL | FAMILIES["gemma3_text"],
        vision_config=vision | {"image_size": 14, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).eval().save_pretrained(tmp_path / "model")
    with hub.using(Choice(str(tmp_path / "model"), items=1, new_tokens=4, rungs=(4,))) as made:
        runner = Runner(plugins.methods()["prompt_lookup"], made.task.id, "smoke", show_progress=False)
        inputs = Judge(made.task.id).inputs(1, 0)
        network = source.load("checkpoint/target")
        text = runner.run(inputs, 4, 0).outputs[0]
        logits = network(torch.tensor([[*inputs["prompt"][0], *text[:-1]]])).logits[0, -len(text) :]
        assert text == logits.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "qwen3_next", "exaone4"])
@pytest.mark.parametrize("back", [30, 31, 20])
def test_a_whole_model_goes_back_in_a_text_beyond_its_window(family: str, back: int) -> None:
    """Its own cache is cut, or read again from the last state that is known, or from the start."""
    network = Presented(tiny(family), 96, 2, [2], "tried so")
    ids = text_networks.token_ids(96, 36)
    decoder = Decoder(network, 40)
    decoder.forward(ids[:30])
    decoder.forward([ids[30], 5, 6, 7])
    decoder.rollback(back)
    with torch.no_grad():
        found, expected = decoder.forward(ids[back:]), network(torch.tensor([ids])).logits[0, back:]
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.std()))
