"""Checkpoint folders: a task made from a model somebody brings, and every method that needs no training on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepmark import plugins, record, run, suite
from stepmark.backbones import checkpoint
from stepmark.backbones.checkpoint import Choice
from stepmark.cli import main
from stepmark.method import Method, Skip
from stepmark.tracks import decoding_checkpoint, image_checkpoint
from stepmark.tracks.decoding import Decoder, agreement
from stepmark.tracks.image import Denoiser, ddim_step, euler_step, schedule_of, uniform_times


def folders(root: Path) -> None:
    """Tiny networks with random weights, as `save_pretrained` writes them."""
    from diffusers import (
        DDIMScheduler,
        DiTTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
        PixArtTransformer2DModel,
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
    scaled = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for name, network, scheduler in (
        ("unet_text", cross, scaled),
        ("unet_class", unet, DDIMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2")),
        ("dit", dit, DDIMScheduler(prediction_type="v_prediction")),
        ("dit_flow", straight, FlowMatchEulerDiscreteScheduler()),
        ("pixart", pixart, DDIMScheduler()),
    ):
        network.save_pretrained(root / name)
        scheduler.save_pretrained(root / name / "scheduler")
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
        patch.setattr(image_checkpoint, "STEPS", 8)
        yield


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is open."""
    monkeypatch.delenv(checkpoint.VARIABLE, raising=False)


@pytest.fixture(scope="module")
def opened(made: Path) -> Iterator[Callable[..., checkpoint.Made]]:
    """Switch to a checkpoint; the one before is closed."""
    state: dict[str, Any] = {}

    def close() -> None:
        if state:
            state.pop("context").__exit__(None, None, None)
            state.clear()

    def switch(name: str, **options: Any) -> checkpoint.Made:
        choice = Choice(str(made / name), **options)
        if state.get("choice") != choice:
            close()
            context = checkpoint.using(choice)
            state["made"] = context.__enter__()
            state["context"], state["choice"] = context, choice
        return state["made"]

    yield switch
    close()


def measured(method: str, task: str, rung: int, seed: int = 0) -> record.Record:
    """Without timing; at a seed above 0 without the audit too, which calls a method six times."""
    return run.measure(run.Cell(method, task, rung, seed, "smoke"), timing=False, show_progress=False)


def training_free(track: str, *kinds: str) -> list[str]:
    """Methods of one process that name a task of these kinds, add no network and prepare nothing."""
    found = []
    for info in plugins.methods().values():
        if info.track == track and any(t.startswith(kinds) for t in info.tasks):
            kind = plugins.load_class(info)
            if kind.networks is Method.networks and kind.prepare is Method.prepare and kind.ranks == 1:
                found.append(info.id)
    return sorted(found)


# -- images ---------------------------------------------------------------------------------------------------------

TARGETS = [
    ("unet_text", {"guidance": 3.0}, 4),
    ("dit", {"guidance": 1.5}, 4),
    ("pixart", {"guidance": 2.0}, 4),
    ("dit_flow", {}, 2),
    ("dit_flow", {"guidance": 2.0}, 4),
]
ON = [
    (name, options, rung, method)
    for name, options, rung in TARGETS
    for method in training_free("image", "class_", "sampling")
]


@pytest.mark.parametrize(("name", "options", "rung", "method"), ON)
def test_every_training_free_image_method_runs(
    opened: Callable[..., checkpoint.Made], name: str, options: dict[str, Any], rung: int, method: str
) -> None:
    target = opened(name, items=2, rungs=(rung, 2 * rung), **options)
    info = plugins.methods()[method]
    if not target.suits(info):
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


def test_a_guided_evaluation_counts_twice(opened: Callable[..., checkpoint.Made]) -> None:
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
    made: Path, opened: Callable[..., checkpoint.Made], name: str, guidance: float
) -> None:
    """Noise, data, v and velocity, with a learned variance and with guidance: the same samples as their own loop."""
    target = opened(name, guidance=guidance)
    network = checkpoint.load("checkpoint/teacher")
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
    found = [image_checkpoint.solution(Bell(), noise, torch.zeros(3), steps) for steps in (48, 96)]
    errors = [float((x / exact - 1).abs().max()) for x in found]
    assert errors[1] < 2e-3
    assert 3 < errors[0] / errors[1] < 6  # second order


def test_the_endpoint_is_where_many_steps_lead(
    opened: Callable[..., checkpoint.Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving the steps of Heun's method moves it a little; DDIM closes in on it at its first order."""
    monkeypatch.setattr(image_checkpoint, "STEPS", 64)
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
    with checkpoint.using(Choice(str(tmp_path / "pipe"), prompts=str(prompts), guidance=2.0, items=3)) as target:
        network = checkpoint.load("checkpoint/teacher")
        generator = torch.Generator().manual_seed(0)
        batch = image_checkpoint.inputs(target.task, 3, generator, torch.device("cpu"))
        first = target.task, plugins.source_digests(plugins.methods()["ddim"], target.task)
    assert batch["condition"].tolist() == [0, 1, 0]
    assert "2 prompts of prompts.txt" in first[0].summary
    ids = fast(["a red fox", "a blue fox", ""], padding="max_length", max_length=6, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(network.table_embeddings, encoder(ids)[0], atol=1e-6)
    prompts.write_text("a red fox\n")
    with checkpoint.using(Choice(str(tmp_path / "pipe"), prompts=str(prompts), guidance=2.0, items=3)) as target:
        again = plugins.source_digests(plugins.methods()["ddim"], target.task)
    assert {name for name in again if again[name] != first[1][name]} == {"dataset"}


# -- texts ----------------------------------------------------------------------------------------------------------

LOSSLESS = ["autoregressive", "jacobi", "lookahead_decoding", "prompt_lookup", "speculative"]


def greedy(network: nn.Module, prompt: list[int], room: int, stop: set[int]) -> list[int]:
    """Plain greedy decoding by whole forwards, one for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + room and (len(text) == len(prompt) or text[-1] not in stop):
        with torch.no_grad():
            text.append(int(network(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_decoding_is_lossless(made: Path, opened: Callable[..., checkpoint.Made], name: str) -> None:
    """Grouped queries, tied and untied heads, two families: texts are those of the model's own forward."""
    from transformers import AutoModelForCausalLM

    target = opened(name, draft=str(made / "draft"), items=2, new_tokens=12, rungs=(12,))
    own = AutoModelForCausalLM.from_pretrained(made / name).eval()
    inputs = run.Bench(plugins.methods()["autoregressive"], target.task.id, "smoke").inputs(2, 0)
    stops = [5, 2, 60] if name == "llama_tied" else [2]
    texts = [greedy(own, prompt, 12, set(stops)) for prompt in inputs["prompt"]]
    expected = [[stops[0] if token in stops else token for token in text] for text in texts]
    for method in LOSSLESS:
        bench = run.Bench(plugins.methods()[method], target.task.id, "smoke", show_progress=False)
        assert bench.run(inputs, 12, 0) == expected, method
    found = measured("speculative", target.task.id, 12, 0 if name == "llama" else 1)
    assert (found.status, found.message, found.flags) == ("ok", None, [])
    assert found.quality["exact_match"].value == 1
    assert name != "llama" or found.counts["nfe_equivalent"] > 0


def test_any_of_several_ends_ends_a_text(made: Path, tmp_path: Path, alone: None) -> None:
    """A method knows one end-of-sequence token: the network writes that one where it would write any of them."""
    shutil.copytree(made / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").unlink()

    def written(ends: int | list[int] | None) -> tuple[list[int], list[int], record.Record]:
        change(eos_token_id=ends)(tmp_path / "llama")
        with checkpoint.using(Choice(str(tmp_path / "llama"), items=1, new_tokens=12, rungs=(12,))) as target:
            bench = run.Bench(plugins.methods()["autoregressive"], target.task.id, "smoke", show_progress=False)
            inputs = bench.inputs(1, 1)
            return inputs["prompt"][0], bench.run(inputs, 12, 1)[0], measured("jacobi", target.task.id, 12, 1)

    prompt, text, found = written(None)
    assert len(text) == 12 and found.quality["exact_match"].value == 1
    other = next(token for token in range(96) if token not in [*prompt, *text])
    place = next(i for i in range(3, 12) if text[i] not in text[:i])
    _, cut, found = written([other, text[place]])
    assert cut == [*text[:place], other]
    assert (found.status, found.quality["exact_match"].value) == ("ok", 1)
    assert found.quality["tokens"].value == place + 1


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_drafting_without_sublayers_is_lossless(opened: Callable[..., checkpoint.Made], name: str) -> None:
    """Self-speculative decoding searches its mask on training data; with any mask its texts are greedy decoding's."""
    target = opened(name, items=2, new_tokens=20)
    network = checkpoint.load("checkpoint/target")
    inputs = decoding_checkpoint.inputs(target.task, 2, torch.Generator().manual_seed(3), torch.device("cpu"))
    method = plugins.load_class(plugins.methods()["self_speculative_decoding"])()
    skipped = torch.tensor([[False, False], [True, True], [True, False]])
    for prompt in inputs["prompt"]:
        decoder = Decoder(network, len(prompt) + 20)
        with torch.no_grad():
            text = method.decode(decoder, prompt, 20, 0.0, 200.0, skipped, torch.Generator().manual_seed(0))
        assert agreement(network, prompt, text) == len(text)
        assert len(text) == 20 or text[-1] == decoder.eos


@pytest.mark.parametrize("method", training_free("decoding", "greedy/", "recall/"))
def test_every_training_free_decoding_method_runs(opened: Callable[..., checkpoint.Made], method: str) -> None:
    target = opened("llama", items=2, new_tokens=8, rungs=(4,))
    found = measured(method, target.task.id, 4, 0 if method in {"h2o", "lookahead_decoding"} else 1)
    if method in {"speculative", "llmcad"}:
        assert (found.status, found.message) == ("skipped", "needs a draft model: give one with --draft FOLDER")
        return
    assert (found.status, found.message, found.flags) == ("ok", None, [])
    assert found.counts["nfe"] <= 4
    assert (found.quality["exact_match"].value == 1) or method not in LOSSLESS


def test_a_prompt_file_needs_the_tokenizer_of_the_folder(made: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("<pad> <unk> once upon a time".split())}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shutil.copytree(made / "llama", tmp_path / "llama")
    (tmp_path / "prompts.txt").write_text("once upon\na time\nupon a time\n")
    choice = Choice(str(tmp_path / "llama"), prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match=r"has no tokenizer\.json to read --prompts with"), checkpoint.using(choice):
        pass
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "llama")
    with checkpoint.using(choice) as target:
        batch = decoding_checkpoint.inputs(target.task, 9, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert sorted(batch["prompt"]) == [[2, 3], [3, 4, 5], [4, 5]]
    assert target.task.n == 3


# -- the command line, records, workers -----------------------------------------------------------------------------


def command(made: Path, name: str, results: Path, *more: str) -> int:
    return main(["run", "--backbone", str(made / name), "--tier", "smoke", "--items", "2", "--no-timing",
                 "--results", str(results), *more])  # fmt: skip


def test_one_command_from_a_folder_to_a_table(
    made: Path, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records are written, resumed and shown by a process that knows nothing of the folder."""
    options = ("--method", "unipc", "--method", "unipc_best_grid", "--method", "mmd_ddm", "--rung", "4")
    assert command(made, "dit", tmp_path, *options) == 0
    assert checkpoint.VARIABLE not in os.environ
    capsys.readouterr()
    records = {r.method: r for r in record.read_all(tmp_path)}
    assert {name: r.status for name, r in records.items()} == dict.fromkeys(
        ("unipc_best_grid", "mmd_ddm"), "skipped"
    ) | {"unipc": "ok"}
    assert records["unipc_best_grid"].message == "needs training data, and a checkpoint folder brings none"
    assert str(records["mmd_ddm"].message).startswith("trains a network of its own")
    assert records["unipc"].command == (
        "stepmark run --method unipc --backbone dit --items 2 --rung 4 --seed 0 --tier smoke"
    )
    assert main(["show", "--tier", "smoke", "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint/dit v1" in shown
    assert "Follow DiTTransformer2DModel in dit (v prediction)" in shown
    assert "endpoint_error (lower is better)" in shown
    assert main(["verify", str(next(tmp_path.rglob("unipc.jsonl")))]) == 2
    assert "name it by --backbone FOLDER" in capsys.readouterr().err
    again = ["--backbone", str(made / "dit"), "--items", "2"]
    assert main(["verify", str(next(tmp_path.rglob("unipc.jsonl"))), *again]) == 0
    assert "1 of 1 records agree" in capsys.readouterr().out
    assert command(made, "dit", tmp_path, *options) == 0
    assert "0 records written" in capsys.readouterr().out or len(list(tmp_path.rglob("*.jsonl"))) == 3


def test_the_site_leaves_out_what_the_table_shows(made: Path, tmp_path: Path, alone: None) -> None:
    from stepmark.leaderboard.groups import grouped
    from stepmark.leaderboard.rows import from_folders

    assert command(made, "llama", tmp_path, "--method", "autoregressive", "--quiet") == 0
    records = record.read_all(tmp_path)
    assert [r.task for r in records] == ["checkpoint/llama"]
    assert grouped(records) == []  # the site shows what anybody can run again
    assert [row.task for row in grouped(records, from_folders(records))] == ["checkpoint/llama"]


IN_A_WORKER = """
from stepmark import plugins, run
task = plugins.tasks()["checkpoint/llama"][1]
print(sorted(run.digests(plugins.methods()["jacobi"], task).items()))
print(run.Cell("jacobi", task.id, 2, 0, "smoke").command)
print(run.track_of(task.id)[0].__name__, task.rungs)
"""


def test_processes_that_are_started_know_the_checkpoint(made: Path, alone: None) -> None:
    """Workers get the same task by the environment that they inherit."""
    with checkpoint.using(Choice(str(made / "llama"), items=2, new_tokens=4, rungs=(2,))) as target:
        done = subprocess.run([sys.executable, "-c", IN_A_WORKER], capture_output=True, text=True, check=False)
        digests = sorted(run.digests(plugins.methods()["jacobi"], target.task).items())
        command = run.Cell("jacobi", target.task.id, 2, 0, "smoke").command
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [str(digests), command, "stepmark.tracks.decoding_checkpoint (2,)"]


def change(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("dit", lambda folder: (folder / "config.json").unlink(), "config.json is not there; give a folder"),
    (
        "dit",
        rename("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        "can run code when it is loaded",
    ),
    ("llama", rename("model.safetensors", "pytorch_model.bin"), "can run code when it is loaded"),
    ("llama", lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors; download"),
    ("dit", change(_class_name="FluxTransformer2DModel"), "FluxTransformer2DModel cannot be measured"),
    ("dit", change(num_layers=3), "the weights lack transformer_blocks.2"),
    ("dit", change(num_attention_heads=4), "cannot be loaded"),
    ("llama", change(intermediate_size=32), "other shapes than config.json asks for"),
    ("llama", change(num_hidden_layers=2), "the weights hold model.layers.2"),
    ("dit", lambda folder: shutil.rmtree(folder / "scheduler"), "has no scheduler/scheduler_config.json"),
    ("unet_text", change(in_channels=9), "takes 9 channels and gives 4"),
    ("llama", change(model_type="own", auto_map={"AutoConfig": "own.Own"}), "ask for no code of their own"),
    ("llama", lambda folder: (folder / "config.json").write_text("{") and None, "is no JSON"),
]


@pytest.mark.parametrize(("name", "spoil", "words"), BAD)
def test_a_folder_that_cannot_be_used_is_one_line(
    made: Path,
    tmp_path: Path,
    alone: None,
    name: str,
    spoil: Callable[[Path], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(made / name, tmp_path / name)
    spoil(tmp_path / name)
    assert command(tmp_path, name, tmp_path / "results") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("stepmark: ") and words in said[-1]
    assert sum(line.startswith("stepmark: ") for line in said) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--guidance", "2", "--rung", "3"), "give even rungs"),
        (("--method", "euler"), "euler does not apply to checkpoint/dit"),
        (("--draft", "x"), "--draft is for language models"),
        (("--prompts", "/nowhere"), "--prompts /nowhere is no file"),
        (("--tier", "embedded"), "leave out --tier embedded"),
        (("--task", "sampling/mixtures_eps"), "leave out --task"),
    ],
)
def test_wrong_options_are_one_line(
    made: Path, tmp_path: Path, alone: None, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(made, "dit", tmp_path, *options) == 2
    assert words in capsys.readouterr().err


def test_hub_without_a_folder_and_options_without_one_are_refused(
    alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--tier", "hub"]) == 2
    assert "add --backbone FOLDER" in capsys.readouterr().err
    assert main(["run", "--guidance", "2"]) == 2
    assert "--guidance is for a checkpoint of your own" in capsys.readouterr().err


def test_networks_share_their_weights_but_not_their_counts(opened: Callable[..., checkpoint.Made]) -> None:
    target = opened("llama_tied")
    first, second = (checkpoint.load("checkpoint/target") for _ in range(2))
    assert first.model.embed_tokens.weight is second.model.embed_tokens.weight
    first.model.layers[0].forward = None
    assert callable(second.model.layers[0].forward)
    with pytest.raises(Skip, match="--draft FOLDER"):
        checkpoint.Roles({})["draft"]
    assert plugins.tasks()[target.task.id][1] == target.task
