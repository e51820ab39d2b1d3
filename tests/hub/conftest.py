"""Tiny checkpoints with random weights, and which of them is open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stepmark import hub
from stepmark.hub import Choice, image, source


def folders(root: Path) -> None:
    """Tiny networks with random weights, as `save_pretrained` writes them."""
    from diffusers import (
        DDIMScheduler,
        DiTTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
        FluxTransformer2DModel,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    blocks = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    tokens = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "norm_num_groups": 4,
    }
    latent = {"in_channels": 4, "out_channels": 4}
    cross = UNet2DConditionModel(
        **blocks, **latent, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    plain = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(**blocks, **plain, in_channels=3, out_channels=3, num_class_embeds=4)
    dit = DiTTransformer2DModel(**tokens, in_channels=4, out_channels=8, num_embeds_ada_norm=10)
    straight = DiTTransformer2DModel(**tokens, **latent, num_embeds_ada_norm=10)
    pixart = PixArtTransformer2DModel(
        **tokens, in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=12
    )
    joint = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1, "joint_attention_dim": 12,
             "pooled_projection_dim": 8}  # fmt: skip
    sd3 = SD3Transformer2DModel(**joint, **latent, sample_size=8, caption_projection_dim=16, pos_embed_max_size=8)
    flux = FluxTransformer2DModel(
        **joint, in_channels=16, num_single_layers=1, axes_dims_rope=(4, 4, 8), guidance_embeds=True
    )
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scaled = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for name, network, scheduler in (
        ("unet_text", cross, scaled),
        ("unet_class", unet, DDIMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2")),
        ("dit", dit, DDIMScheduler(prediction_type="v_prediction")),
        ("dit_flow", straight, FlowMatchEulerDiscreteScheduler()),
        ("pixart", pixart, DDIMScheduler()),
        ("sd3", sd3, shifted),
        ("flux", flux, shifted),
    ):
        network.save_pretrained(root / name)
        scheduler.save_pretrained(root / name / "scheduler")
    config = root / "flux" / "config.json"  # which does not say how large an image is
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    small = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.3,
    }  # fmt: skip
    for name, kind, config, more in (
        ("llama", LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
        ("llama_tied", LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "eos_token_id": [5, 2, 60]}),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config, {}),
        ("draft", LlamaForCausalLM, LlamaConfig, {"num_hidden_layers": 1, "vocab_size": 100}),
    ):
        torch.manual_seed(1)
        kind(config(**(small | more))).save_pretrained(root / name, max_shard_size="20KB" if name == "qwen2" else "1GB")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    with torch.random.fork_rng():
        folders(root)
    return root


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of our own, and solutions by fewer steps than a real checkpoint gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPMARK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(image, "STEPS", 8)
        yield


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No checkpoint is open."""
    monkeypatch.delenv(hub.VARIABLE, raising=False)
    before = source.opened()
    source.switch(None)
    yield
    source.switch(before)


@pytest.fixture(scope="module")
def opened(made: Path) -> Iterator[Callable[..., hub.Made]]:
    """Switch to a checkpoint; the one before is closed."""
    state: dict[str, Any] = {}

    def close() -> None:
        if state:
            state.pop("context").__exit__(None, None, None)
            state.clear()

    def switch(name: str, **options: Any) -> hub.Made:
        choice = Choice(str(made / name), **options)
        if state.get("choice") != choice:
            close()
            context = hub.using(choice)
            state["made"] = context.__enter__()
            state["context"], state["choice"] = context, choice
        return state["made"]

    yield switch
    close()


@pytest.fixture
def reader(made: Path, tmp_path: Path, alone: None) -> Path:
    """The folder of a model with a tokenizer that appends an end-of-sequence token, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(33, 124))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(letters)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made_one = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made_one.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[a]"
    shutil.copytree(made / "llama", tmp_path / "model")
    made_one.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
