"""Whole pipelines of diffusers, tiny and random: the wrapper's steps are the pipeline's own, from the prompt on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepmark import hub, record, run
from stepmark.cell import Cell
from stepmark.cli import main
from stepmark.hub import Choice, image, source, tasks
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, euler_step

pytestmark = pytest.mark.usefixtures("alone")

PROMPTS = ("a red fox", "a blue fox")
VOCABULARY = "<pad> <s> </s> <unk> a red blue fox".split()


def tokenizer(length: int) -> Any:
    """Of eight words; every text begins and ends with a token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=length
    )


def clip(width: int, projection: int = 0) -> Any:
    """A text encoder of CLIP, with a projection where a width for it is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8,
        max_position_embeddings=12, eos_token_id=2, bos_token_id=1, pad_token_id=0, projection_dim=projection or 8,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width: int, many: bool = False) -> Any:
    """A text encoder of T5, or of its sister for many languages."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    shape = {"vocab_size": 8, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return (UMT5EncoderModel(UMT5Config(**shape)) if many else T5EncoderModel(T5Config(**shape))).eval()


def sd3(long: bool = True) -> Any:
    """As Stable Diffusion 3.5: a shifted schedule, and T5 or none."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=20, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
        text_encoder=clip(8, 8), tokenizer=tokenizer(12), text_encoder_2=clip(16, 12), tokenizer_2=tokenizer(12),
        text_encoder_3=t5(32) if long else None, tokenizer_3=tokenizer(256) if long else None,
    )  # fmt: skip


def flux(told: bool) -> Any:
    """As FLUX.1 dev, which is told its guidance, or as schnell."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=told, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    decoder = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, norm_num_groups=2)  # fmt: skip
    return FluxPipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=told), vae=decoder,
        text_encoder=clip(8), tokenizer=tokenizer(12), text_encoder_2=t5(24), tokenizer_2=tokenizer(512),
    )  # fmt: skip


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    network = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(tokenizer(256), t5(24, many=True), None, network, scheduler)


def sdxl(told: bool) -> Any:
    """As Stable Diffusion XL, or as its latent consistency model, which is told its guidance."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), time_cond_proj_dim=10 if told else None,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=clip(8), text_encoder_2=clip(16, 12), tokenizer=tokenizer(12), tokenizer_2=tokenizer(12),
        unet=network, scheduler=scheduler,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "sd3": sd3,
    "sd3_short": lambda: sd3(long=False),
    "flux": lambda: flux(told=False),
    "flux_told": lambda: flux(told=True),
    "aura_flow": aura_flow,
    "sdxl": lambda: sdxl(told=False),
    "sdxl_told": lambda: sdxl(told=True),
}


class Pipelines:
    """Pipelines by name: in memory, and as `save_pretrained` writes them."""

    def __init__(self, root: Path) -> None:
        self.root, self._made = root, dict[str, Any]()
        self.prompts = root / "prompts.txt"
        self.prompts.write_text("\n".join(PROMPTS))

    def __call__(self, name: str) -> Any:
        """The pipeline, whose folder is `root / name`."""
        if name not in self._made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self._made[name] = MAKERS[name]()
            for network in ("transformer", "unet"):
                for values in getattr(getattr(self._made[name], network, None), "parameters", list)():
                    values.data += 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
            self._made[name].set_progress_bar_config(disable=True)
            self._made[name].save_pretrained(self.root / name)
        return self._made[name]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Pipelines:
    return Pipelines(tmp_path_factory.mktemp("pipelines"))


def asked(pipeline: Any, name: str, noise: Tensor, steps: int, guidance: float, **more: Any) -> Tensor:
    """What the pipeline itself makes of the noise, in latents."""
    size = {"output_type": "latent", "num_inference_steps": steps}
    size |= {"height": noise.shape[2] * pipeline.vae_scale_factor, "width": noise.shape[3] * pipeline.vae_scale_factor}
    if name == "flux":
        more |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(noise)}
    else:
        more |= {"guidance_scale": guidance}
    if not name.startswith("flux"):
        return pipeline(latents=noise, **size, **more).images
    found = pipeline(latents=pipeline._pack_latents(noise, *noise.shape), **size, **more).images
    return pipeline._unpack_latents(found, size["height"], size["width"], pipeline.vae_scale_factor)


def stepped(noise: Tensor, condition: Tensor, times: list[float]) -> Tensor:
    """Euler's (or DDIM's) steps of the network that is open."""
    denoise, x = Denoiser(source.load("checkpoint/teacher"), condition), noise
    with torch.no_grad():
        for t, s in pairwise(times):
            flow = denoise.schedule.flow
            x = euler_step(x, denoise.output(x, t), t, s) if flow else ddim_step(denoise.schedule, *denoise(x, t), s)
    return x


def noise_of(target: hub.Made, n: int = 2) -> Tensor:
    return torch.randn(n, *target.shape, generator=torch.Generator().manual_seed(0))


def near(found: Tensor, expected: Tensor, part: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() < part * expected.abs().max())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_steps_are_those_of_the_whole_pipeline(pipelines: Pipelines, name: str, guidance: float) -> None:
    """Tokenizers, text encoders, clock, packing, places and guidance: the same latents on the pipeline's own grid."""
    pipeline, n = pipelines(name), 4
    choice = Choice(str(pipelines.root / name), prompts=str(pipelines.prompts), guidance=guidance)
    with hub.using(choice) as target:
        noise = noise_of(target)
        expected = asked(pipeline, name, noise, n, guidance, prompt=list(PROMPTS))
        times = uniform_times(n) if name.startswith("sdxl") else pipeline.scheduler.sigmas.tolist()
        found = stepped(noise, torch.tensor([0, 1]), times)
        other = stepped(noise, torch.tensor([1, 0]), times)
    assert near(found, expected)
    assert not near(other, expected, 1e-3)  # prompts make a difference
    assert "2 prompts of prompts.txt" in target.task.summary
    told = name.endswith("told")
    assert ("an input that costs no second row" in target.task.summary) is told
    assert target.task.price == (1 if told or guidance == 1 else 2)


def small(name: str) -> tuple[Any, Callable[[Any, Any], Any]]:
    """A transformer whose prompts cannot be read here, and its pipeline, which embeddings can be given to."""
    import diffusers

    if name == "Sana":
        return diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
            sample_size=8, timestep_scale=0.5,
        ), lambda network, scheduler: diffusers.SanaPipeline(None, None, None, network, scheduler)  # fmt: skip
    if name == "Lumina2":
        return diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=12,
        ), lambda network, scheduler: diffusers.Lumina2Pipeline(network, scheduler, None, None, None)  # fmt: skip
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    ), lambda network, scheduler: diffusers.QwenImagePipeline(scheduler, None, None, None, network)  # fmt: skip


def alone_in(folder: Path, name: str) -> Any:
    """The pipeline of a network that is in a folder of its own, with a scheduler beside it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    network, of = small(name)
    scheduler = FlowMatchEulerDiscreteScheduler()
    network.save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    return of(network.eval(), scheduler)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["Sana", "Lumina2", "QwenImage"])
def test_networks_whose_prompts_cannot_be_read_follow_made_up_ones(
    tmp_path: Path, pipelines: Pipelines, name: str
) -> None:
    """The same latents as the pipeline makes of the same embeddings; with --prompts the reason is said."""
    pipeline = alone_in(tmp_path / name, name)
    if name == "QwenImage":
        with pytest.raises(ValueError, match=r'says no sample_size.*write there.*"sample_size": 128'):
            tasks.made_from(Choice(str(tmp_path / name)))
        change(tmp_path / name, sample_size=8)
    with pytest.raises(ValueError, match="leave --prompts out: standard-normal embeddings"):
        tasks.made_from(Choice(str(tmp_path / name), prompts=str(pipelines.prompts)))
    with hub.using(Choice(str(tmp_path / name))) as target:
        noise, wrapper = noise_of(target), source.load("checkpoint/teacher")
        words, mask = wrapper.table_embeddings[:2], wrapper.table_mask[:2]
        given: dict[str, Any] = {"prompt_embeds": words, "output_type": "latent", "num_inference_steps": 4}
        given["prompt_embeds_mask" if name == "QwenImage" else "prompt_attention_mask"] = mask
        side = 8 * pipeline.vae_scale_factor
        given |= {"true_cfg_scale": 1.0} if name == "QwenImage" else {"guidance_scale": 1.0}
        given |= {"use_resolution_binning": False} if name == "Sana" else {}
        latents = pipeline._pack_latents(noise, 2, 4, 8, 8) if name == "QwenImage" else noise
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(latents=latents, height=side, width=side, **given).images
        if name == "QwenImage":
            expected = pipeline._unpack_latents(expected, side, side, pipeline.vae_scale_factor)[:, :, 0]
        assert near(stepped(noise, torch.tensor([0, 1]), pipeline.scheduler.sigmas.tolist()), expected)


def measured(task: str, rung: int, method: str = "euler") -> record.Record:
    return run.measure(Cell(method, task, rung, 0, "smoke"), timing=False, show_progress=False)


@pytest.mark.parametrize(
    ("name", "guidance", "rows"),
    [("sd3", 1.0, 1), ("sd3", 3.0, 2), ("flux", 3.0, 2), ("flux_told", 3.0, 1), ("sdxl_told", 3.0, 1)],
)
def test_rows_and_flops_of_an_evaluation(pipelines: Pipelines, name: str, guidance: float, rows: int) -> None:
    """The price of guidance: two rows, or none where the network is told it. An evaluation's FLOPs are one of the
    reference's, and grow as the rows do."""
    pipelines(name)
    method = "ddim" if name.startswith("sdxl") else "euler"
    with hub.using(Choice(str(pipelines.root / name), guidance=guidance, items=2, rungs=(4,))) as target:
        found = measured(target.task.id, 4, method)
        assert target.task.id.endswith("_w3" if guidance != 1 else name)
    assert found.status == "ok", (found.message, found.flags)
    assert not found.flags
    assert found.handles["teacher"]["calls"] == 4 / rows
    assert found.handles["teacher"]["evaluations"] / 2 == found.counts["nfe"] == 4
    assert found.counts["nfe_equivalent"] == pytest.approx(4, rel=1e-6)
    assert found.counts["flops_outside"] == 0


def test_joint_attention_is_in_the_flops(pipelines: Pipelines) -> None:
    """What torch counts of Flux is its products, with attention over the tokens of text and image together."""
    from torch.utils.flop_counter import FlopCounterMode

    pipelines("flux")
    with hub.using(Choice(str(pipelines.root / "flux"))) as target:
        network = source.load("checkpoint/teacher")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(noise_of(target, 1), torch.tensor([0.5]), torch.tensor([0]))
    words, patches, width = 512, 16, 32
    every, each = words + patches, 2 * width * width
    attention = 4 * every**2 * width
    double = every * each * (4 + 8) + attention + 2 * 6 * each  # q, k, v, out and the two layers behind; modulations
    single = every * each * (3 + 4 + 5) + attention + 3 * each
    into = 2 * width * (patches * 16 + words * 24)
    out = 2 * width * patches * 16 + 2 * each
    time = 2 * width * 256 + each + 2 * width * 8 + each
    assert counter.get_total_flops() == double + single + into + out + time


@pytest.mark.parametrize("name", ["sd3", "flux_told"])
def test_a_large_transformer_in_bfloat16_is_sampled_in_float32(pipelines: Pipelines, name: str) -> None:
    pipelines(name)
    ends = {}
    for dtype in ("float32", "bfloat16", "float16"):
        choice = Choice(str(pipelines.root / name), guidance=2.0, dtype=dtype, prompts=str(pipelines.prompts))
        with hub.using(choice) as target:
            network = source.load("checkpoint/teacher")
            assert next(network.model.parameters()).dtype == getattr(torch, dtype)
            ends[dtype] = image.solution(network, noise_of(target), torch.tensor([0, 1]), 8)
            assert ends[dtype].dtype == torch.float32
    size = ends["float32"].square().mean().sqrt()
    for dtype in ("bfloat16", "float16"):
        assert 0 < (ends[dtype] - ends["float32"]).square().mean().sqrt() < 0.1 * size


@pytest.mark.parametrize(
    ("name", "method"),
    [("sd3", "euler"), ("flux", "euler"), ("flux_told", "dpm_solver_pp"), ("aura_flow", "euler"), ("sdxl", "ddim")],
)
def test_one_command_measures_a_pipeline(pipelines: Pipelines, tmp_path: Path, name: str, method: str) -> None:
    pipelines(name)
    done = main(["run", "--backbone", str(pipelines.root / name), "--prompts", str(pipelines.prompts), "--guidance", "2",
                 "--dtype", "bfloat16", "--method", method, "--rung", "4", "--tier", "smoke", "--items", "2",
                 "--no-timing", "--quiet", "--results", str(tmp_path)])  # fmt: skip
    (found,) = record.read_all(tmp_path)
    assert done == 0
    assert (found.status, found.task) == ("ok", f"checkpoint/{name}_w2_bfloat16"), found.message
    assert found.quality["endpoint_error"].value > 0


# -- what is refused ------------------------------------------------------------------------------------------------


def copied(pipelines: Pipelines, name: str, to: Path) -> Path:
    pipelines(name)
    shutil.copytree(pipelines.root / name, to / name)
    return to / name


def spoil_schedule(folder: Path, **values: Any) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("flux", lambda f: shutil.rmtree(f / "vae"), r"says no sample_size, nor does a vae/ beside it: write there"),
    ("flux", lambda f: change(f / "transformer", sample_size=7), "no patches of 2 x 2"),
    ("flux", lambda f: change(f / "transformer", in_channels=96, out_channels=16), "takes 96 channels and gives 16"),
    ("sd3", lambda f: spoil_schedule(f, _class_name="DDIMScheduler"), "predicts velocities, and its scheduler_config"),
    ("sd3", lambda f: spoil_schedule(f, invert_sigmas=True), "invert_sigmas turns time around"),
    ("sd3", lambda f: change(f / "transformer", joint_attention_dim=None), "lacks joint_attention_dim, the width of"),
    ("sd3", lambda f: shutil.rmtree(f / "tokenizer_2"), r"no tokenizer_2/ and text_encoder_2/ to read --prompts"),
    (
        "sd3",
        lambda f: shutil.rmtree(f / "text_encoder_3"),
        "names text_encoder_3, and it or its tokenizer is not there",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "words"), REFUSED)
def test_what_cannot_be_measured_is_said_before_weights_are_read(
    pipelines: Pipelines, tmp_path: Path, name: str, spoil: Callable[[Path], object], words: str
) -> None:
    folder = copied(pipelines, name, tmp_path)
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        tasks.made_from(Choice(str(folder), prompts=str(pipelines.prompts)))
    assert "\n" not in str(error.value)


def test_a_transformer_is_measured_from_its_own_folder(pipelines: Pipelines, tmp_path: Path) -> None:
    """Inside its pipeline, or taken out of it with a scheduler and the side of its latents."""
    folder = copied(pipelines, "flux", tmp_path)
    inside = tasks.made_from(Choice(str(folder / "transformer")))
    shutil.move(folder / "transformer", tmp_path / "taken")
    shutil.copytree(folder / "scheduler", tmp_path / "taken" / "scheduler")
    change(tmp_path / "taken", sample_size=12)
    taken = tasks.made_from(Choice(str(tmp_path / "taken")))
    assert (inside.shape, taken.shape) == ((4, 8, 8), (4, 12, 12))
    assert inside.task.checkpoint != taken.task.checkpoint
    with hub.using(Choice(str(tmp_path / "taken"), items=2, rungs=(2,))):
        assert measured("checkpoint/taken", 2).status == "ok"


def test_all_encoders_are_in_the_digest(pipelines: Pipelines, tmp_path: Path) -> None:
    folder = copied(pipelines, "sd3", tmp_path)
    choice = Choice(str(folder), prompts=str(pipelines.prompts))
    before = tasks.made_from(choice).task.checkpoint
    t5(32).save_pretrained(folder / "text_encoder_3")
    assert tasks.made_from(choice).task.checkpoint != before
