"""Every image sampler that needs no training on networks that somebody brings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepmark import hub, plugins, record, run, suite
from stepmark.cell import Cell
from stepmark.hub import Choice, image, source
from stepmark.judge import Judge
from stepmark.method import Method
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, euler_step


def measured(method: str, task: str, rung: int, seed: int = 0) -> record.Record:
    """Without timing; at a seed above 0 without the audit too, which calls a method six times."""
    return run.measure(Cell(method, task, rung, seed, "smoke"), timing=False, show_progress=False)


def training_free(track: str, *kinds: str) -> list[str]:
    """Methods of one process that name a task of these kinds, add no network and prepare nothing."""
    found = []
    for info in plugins.methods().values():
        if info.track == track and any(t.startswith(kinds) for t in info.tasks):
            method = plugins.load_class(info)()
            if method.ranks == 1 and not prepares(method):
                found.append(info.id)
    return sorted(found)


def prepares(method: Method) -> bool:
    """Whether a method does anything offline: a variant may, where its plain method returns at once."""
    nothing: Any = None
    try:
        return bool(method.networks(nothing)) or method.prepare(nothing) is not None
    except AttributeError:  # it asked something of the session
        return True


TARGETS = [
    ("unet_text", {"guidance": 3.0}, 4),
    ("dit", {"guidance": 1.5}, 4),
    ("pixart", {"guidance": 2.0}, 4),
    ("dit_flow", {}, 2),
    ("dit_flow", {"guidance": 2.0}, 4),
    ("sd3", {"guidance": 2.0}, 4),
    ("flux", {"guidance": 2.0}, 2),
]
ON = [
    (name, options, rung, method)
    for name, options, rung in TARGETS
    for method in training_free("image", "class_", "sampling")
]


@pytest.mark.parametrize(("name", "options", "rung", "method"), ON)
def test_every_training_free_image_method_runs(
    opened: Callable[..., hub.Made], name: str, options: dict[str, Any], rung: int, method: str
) -> None:
    target = opened(name, items=2, rungs=(rung, 2 * rung), **options)
    info = plugins.methods()[method]
    if not any(task.startswith(target.family) for task in info.tasks):
        assert target.task.id not in info.tasks
        assert target.task.id not in {cell.task for cell in suite.cells(suite.Selection(methods=(method,)))}
        return
    audited = name == "dit"  # the cheapest
    found = measured(method, target.task.id, rung, 0 if audited else 1)
    assert found.status in {"ok", "skipped"}, (found.message, found.flags)
    if found.status == "skipped":
        assert "guides by itself" in str(found.message) or "Stepmark's own UNet" in str(found.message)
        return
    assert found.counts["nfe"] <= rung
    assert found.counts["nfe"] == found.handles["teacher"]["evaluations"] / 2
    if audited:
        assert found.counts["nfe_equivalent"] == pytest.approx(found.counts["nfe"], rel=1e-6)
    assert found.quality["endpoint_error"].value > 0
    assert found.environment["checkpoint"] == target.task.summary
    assert set(found.digests) == {"method", "track", "task", "dataset", "backbone_teacher"}


def test_a_guided_evaluation_counts_twice(opened: Callable[..., hub.Made]) -> None:
    """A rung is NFE: with guidance it buys half as many steps, each of two rows."""
    plain = measured("ddim", opened("dit", items=2, rungs=(8,)).task.id, 8)
    guided = measured("ddim", opened("dit", items=2, rungs=(8,), guidance=2.0).task.id, 8)
    assert plain.handles["teacher"]["calls"] == 8
    assert guided.handles["teacher"]["calls"] == 4
    assert plain.counts["nfe"] == guided.counts["nfe"] == 8
    assert plain.counts["flops"] == pytest.approx(guided.counts["flops"], rel=1e-6)


def reference_samples(folder: Path, noise: Tensor, given: Callable[[nn.Module], dict[str, Tensor]], n: int) -> Tensor:
    """n steps as diffusers' own scheduler takes them, guided by 2 where `given` holds null rows first."""
    import diffusers

    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    network = getattr(diffusers, kind).from_pretrained(folder).eval()
    own = {} if "Flow" in config["_class_name"] else {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config, **own)
    if own:
        scheduler.set_timesteps(n)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    x, words = noise, given(network)
    for t in scheduler.timesteps:
        rows = torch.cat([x, x]) if words and len(next(iter(words.values()))) == 2 * len(x) else x
        with torch.no_grad():
            out = network(rows, timestep=t.expand(len(rows)).float(), return_dict=False, **words)[0][:, : x.shape[1]]
        if len(rows) > len(x):
            null, conditional = out.chunk(2)
            out = null + 2.0 * (conditional - null)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", ["unet_text", "unet_class", "dit", "dit_flow"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_steps_are_those_of_the_schedulers_of_diffusers(
    made: Path, opened: Callable[..., hub.Made], name: str, guidance: float
) -> None:
    """Noise, data, v and velocity, with a learned variance and with guidance: the same samples as their own loop."""
    target = opened(name, guidance=guidance)
    network = source.load("checkpoint/teacher")
    noise = torch.randn(2, *target.shape, generator=torch.Generator().manual_seed(0))
    condition = torch.tensor([1, 0])
    null = torch.full_like(condition, {"unet_text": 16, "unet_class": 3}.get(name, 10))
    rows = torch.cat([null, condition]) if guidance != 1 else condition
    words = {"encoder_hidden_states": network.table_embeddings[rows]} if name == "unet_text" else {"class_labels": rows}
    denoise, x, times = Denoiser(network, condition), noise, uniform_times(5)
    with torch.no_grad():
        for t, s in pairwise(times):
            if denoise.schedule.flow:
                x = euler_step(x, denoise.output(x, t), t, s)
            else:
                x = ddim_step(denoise.schedule, *denoise(x, t), s)
    expected = reference_samples(made / name, noise, lambda network: words, 5)
    assert torch.allclose(x, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


class Bell(nn.Module):
    """The noise prediction of data that are N(0, 0.1^2): its ODE only scales, so that its solution is known."""

    prediction = "epsilon"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha, sigma = (part(((t + 1) / 1000).double()) for part in (schedule_of(self).alpha, schedule_of(self).sigma))
        return (sigma / (0.01 * alpha**2 + sigma**2)).to(x.dtype)[:, None] * x


def test_the_endpoint_is_the_exact_solution() -> None:
    """The ODE down to the first training timestep, and the data predicted there."""
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = schedule_of(Bell())
    first, last = (0.01 * schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 for t in (1.0, 1 / 1000))
    exact = noise * (last / first) ** 0.5 * 0.01 * schedule.alpha(1 / 1000) / last
    found = [image.solution(Bell(), noise, torch.zeros(3), steps) for steps in (48, 96)]
    errors = [float((x / exact - 1).abs().max()) for x in found]
    assert errors[1] < 2e-3
    assert 3 < errors[0] / errors[1] < 6  # second order


def test_the_endpoint_is_where_many_steps_lead(
    opened: Callable[..., hub.Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving the steps of Heun's method moves it a little; DDIM closes in on it at its first order."""
    monkeypatch.setattr(image, "STEPS", 64)
    target = opened("dit", items=2, guidance=2.0, rungs=(8, 16, 64))
    errors = [measured("ddim", target.task.id, rung, 1).quality for rung in (16, 64)]
    assert errors[0]["reference_error"].value == errors[1]["reference_error"].value
    assert errors[1]["reference_error"].value < 0.2 * errors[1]["endpoint_error"].value
    assert 2.5 < errors[0]["endpoint_error"].value / errors[1]["endpoint_error"].value < 6


def test_prompts_are_encoded_by_the_pipeline_itself(made: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("<pad> <unk> a red blue fox".split())}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=6)
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 6,
    }
    encoder = CLIPTextModel(CLIPTextConfig(**shape, max_position_embeddings=6, eos_token_id=0)).eval()
    shutil.copytree(made / "unet_text", tmp_path / "pipe" / "unet")
    shutil.move(tmp_path / "pipe" / "unet" / "scheduler", tmp_path / "pipe" / "scheduler")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    fast.save_pretrained(tmp_path / "pipe" / "tokenizer")
    encoder.save_pretrained(tmp_path / "pipe" / "text_encoder")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n\na blue fox\n")
    with hub.using(Choice(str(tmp_path / "pipe"), prompts=str(prompts), guidance=2.0, items=3)) as target:
        network = source.load("checkpoint/teacher")
        generator = torch.Generator().manual_seed(0)
        batch = image.inputs(target.task, 3, generator, torch.device("cpu"))
        first = target.task, plugins.source_digests(plugins.methods()["ddim"], target.task)
    assert batch["condition"].tolist() == [0, 1, 0]
    assert "2 prompts of prompts.txt" in first[0].summary
    ids = fast(["a red fox", "a blue fox", ""], padding="max_length", max_length=6, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(network.table_embeddings, encoder(ids)[0], atol=1e-6)
    prompts.write_text("a red fox\n")
    with hub.using(Choice(str(tmp_path / "pipe"), prompts=str(prompts), guidance=2.0, items=3)) as target:
        again = plugins.source_digests(plugins.methods()["ddim"], target.task)
    assert {name for name in again if again[name] != first[1][name]} == {"dataset"}


@pytest.mark.parametrize("name", ["unet_text", "dit", "dit_flow", "pixart"])
def test_a_network_in_bfloat16_is_sampled_in_float32(opened: Callable[..., hub.Made], name: str) -> None:
    """Its own solution is what it is held against, and is near the one in full precision."""
    ends, inputs = {}, {}
    for dtype in ("float32", "bfloat16"):
        target = opened(name, items=2, guidance=2.0, dtype=dtype)
        network = source.load("checkpoint/teacher")
        assert next(network.model.parameters()).dtype == getattr(torch, dtype)
        inputs = inputs or Judge(target.task.id).inputs(2, 0)
        ends[dtype] = image.solution(network, inputs["noise"], inputs["condition"], 8)
        assert ends[dtype].dtype == torch.float32
    apart = (ends["bfloat16"] - ends["float32"]).square().mean().sqrt()
    assert 0 < apart < 0.1 * ends["float32"].square().mean().sqrt()
