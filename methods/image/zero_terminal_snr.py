"""Zero terminal SNR: a schedule that ends in the pure noise that sampling starts from, and what goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import from_x0_eps, leading_times, schedule_of, to_x0_eps
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.image.training import fit


def zero_terminal(signal: Tensor) -> Tensor:
    """sqrt(abar) [N] of a schedule, moved and stretched so that the last is 0 and the first what it was (algorithm 1)."""
    return (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])


def signal_of(network: nn.Module, repaired: bool) -> Tensor:
    """sqrt(abar) float64 [N] of a network's schedule: as it is, or repaired, with its last timestep made pure noise."""
    schedule = schedule_of(network)
    signal = schedule.alpha((torch.arange(schedule.steps, dtype=torch.float64) + 1) / schedule.steps)
    return zero_terminal(signal) if repaired else signal


def trailing_timesteps(n: int, steps: int) -> list[int]:
    """round(N - i N / n) - 1 for i < n: the last timestep is always the first to be sampled (table 2)."""
    return [round(steps - i * steps / n) - 1 for i in range(n)]


def leading_timesteps(n: int, steps: int) -> list[int]:
    """(n - 1) k, ..., k, 0 with k = N // n: sampling begins below the last timestep (table 2)."""
    return [i * (steps // n) for i in reversed(range(n))]


def rescaled_guidance(null: Tensor, conditional: Tensor, guidance: float, share: float) -> Tensor:
    """null + w (conditional - null), a share of it scaled to the deviation of the conditional prediction (equations 14 to
    16). Deviations are those over all values of an item.
    """
    guided = torch.lerp(null, conditional, guidance)
    shape = (-1, *[1] * (null.dim() - 1))
    ratio = (conditional.flatten(1).std(1) / guided.flatten(1).std(1)).view(shape)
    return torch.lerp(guided, ratio * guided, share)


def sample_v(
    network: nn.Module,
    signal: Tensor,
    x: Tensor,
    condition: Tensor,
    timesteps: Sequence[int],
    guidance: float,
    share: float,
) -> Tensor:
    """Images [B, ...] by DDIM with a network that predicts v, from the first of the timesteps, which fall. One row a step
    and item, two where guidance is not 1.
    """
    guided = guidance != 1.0
    asked = torch.cat([network.null_condition(condition), condition]) if guided else condition
    for n, after in zip(timesteps, [*timesteps[1:], -1], strict=True):
        rows = torch.cat([x, x]) if guided else x
        output = network(rows, torch.full((len(rows),), float(n), dtype=x.dtype, device=x.device), asked)
        if guided:
            null, conditional = output.chunk(2)
            output = rescaled_guidance(null, conditional, guidance, share)
        alpha, onward = float(signal[n]), float(signal[after]) if after >= 0 else 1.0
        x0, eps = to_x0_eps("v", output, x, alpha, (1 - alpha**2) ** 0.5)
        x = onward * x0 + (1 - onward**2) ** 0.5 * eps
    return x


def sample_leading(denoise: Denoiser, x: Tensor, steps: int) -> Tensor:
    """Images [B, ...] by DDIM with an untouched network on the "leading" timesteps, which begin below the last one."""
    for t, s in pairwise(leading_times(steps, denoise.schedule.steps)):
        x = ddim_step(denoise.schedule, *denoise(x, t), s)
    return x


class ZeroTerminalSNR(Method):
    """Zero terminal SNR: a model fine-tuned so that its last timestep is the pure noise that sampling starts from.

    On common schedules sqrt(abar_T) > 0: the last training timestep still shows a little of the picture, its brightness
    most of all. Sampling starts from noise that shows nothing, which the model takes for a picture of medium brightness.
    Three fixes:

        s'_t = (s_t - s_T) s_1 / (s_1 - s_T),   s_t = sqrt(abar_t)           (algorithm 1: s'_T = 0, s'_1 = s_1)
        loss = |v_theta(x_t, t) - v|^2,   v = s'_t eps - (1 - s'_t^2)^{1/2} x0    (equation 9)
        timesteps round(T - i T / S) - 1,   i = 0..S-1                        (table 2, "trailing")

    v because at s'_T = 0 noise prediction is trivial and says nothing of x0. The student starts from the teacher, which
    predicts eps on the flawed schedule, and samples with DDIM; one evaluation a step.

    The fourth fix is `zero_terminal_snr_guided`. Once the model may predict any brightness, strong classifier-free
    guidance overshoots the range of the data. The guided prediction is scaled back to the deviation of the conditional
    one, and mixed with itself unscaled as full scaling looks too plain (equations 14 to 16):

        v_cfg  = v_null + w (v_cond - v_null)
        v_rs   = v_cfg std(v_cond) / std(v_cfg)
        output = phi v_rs + (1 - phi) v_cfg,   w = 5,   phi = 0.7

    Schedule, training and grid are the same. A guided step evaluates two rows, so the rung pays for half as many steps.
    `zero_terminal_snr_unscaled` has phi = 0.

    Three controls take the fixes apart. `leading_finetuned` has none of them but as much further training, as in the
    paper's own comparison: the student learns on the schedule as it was, where v says the same as eps, and samples on the
    timesteps of the original DDIM and of many pipelines since, (n - 1) k, ..., k, 0 with k = N // n, so that sampling
    begins below the last timestep with what is pure noise only there (section 3.3). The fewer the steps, the lower it
    begins. `trailing_finetuned` is the same student on the trailing grid. `ddim_leading` is the teacher, untouched, on the
    leading grid, `ddim` the same on the trailing one.

    Differs from the paper: pictures instead of latents, of 64 values, so the flawed schedule keeps more signal at its end;
    brightness is not named by the condition; w = 5 instead of 7.5.

    What limits it here: the brightness of a picture is one number, independent of the rest and of a known law, so that
    the task cannot tell the fixes from starting where training ended. `ddim_offset`, the untouched teacher on the
    trailing grid, begun from noise to which sqrt(abar_T) times the mean of a random training picture is added, is
    nearer to the brightness of the data than the fine-tuned student at every number of steps, and its pictures are
    better up to 25. Guidance makes the named mark clearer and leaves the unnamed brightness nearly alone, so that there
    is little overexposure to repair, and scaling back makes pictures worse; and scoring clamps images to the range of
    the data, as a picture file would.
    """

    paper = Paper(
        id="zero_terminal_snr",
        title="Common Diffusion Noise Schedules and Sample Steps are Flawed",
        authors="Lin, Liu, Li, Yang",
        year=2023,
        arxiv="2305.08891",
    )
    tasks = ("class_to_image/shades",)
    baselines = ("leading_finetuned", "ddim_leading", "ddim")
    claims = (
        Claim(
            "w1_brightness[zero_terminal_snr,*] < min(w1_brightness[leading_finetuned,*], w1_brightness[ddim_offset,*]) "
            "and fd[zero_terminal_snr,*] < min(fd[leading_finetuned,*], fd[ddim_offset,*])",
            says="brightness is nearer to that of the data than with the flawed schedule and grid and as much training, and than "
            "without any training from noise that has the brightness of a random training picture; and pictures are better",
            headline=True,
            setting="the brightness of these pictures is one number of a known law, independent of all else; that of photographs "
            "is not",
        ),
        Claim(
            "w1_brightness[zero_terminal_snr,*] < w1_brightness[leading_finetuned,*] "
            "and fd[zero_terminal_snr,*] < fd[leading_finetuned,*]",
            says="the same against the flawed schedule and grid alone, the paper's own baseline",
        ),
        Claim(
            "w1_brightness[zero_terminal_snr,*] < w1_brightness[trailing_finetuned,*] "
            "and fd[zero_terminal_snr,*] < fd[trailing_finetuned,*]",
            says="grid and as much further training alone do not mend it: the schedule must be fixed too",
        ),
    )

    finetuned, repaired = True, True  # a student instead of the teacher; on the schedule that ends in pure noise
    grid = "trailing"  # or "leading": the timesteps of a student
    guidance, share = 1.0, 0.0  # w, phi
    variants = (
        Variant(
            "zero_terminal_snr_guided",
            says="with strong guidance, rescaled so that nothing is overexposed",
            guidance=5.0,
            share=0.7,
            baselines=("zero_terminal_snr_unscaled", "zero_terminal_snr"),
            claims=(
                Claim(
                    "fd[zero_terminal_snr_guided,*] < fd[zero_terminal_snr_unscaled,*]",
                    says="rescaled guidance keeps to the data better than plain guidance of the same strength",
                    setting="the condition names the mark alone, so that guidance overexposes nothing; the paper's prompts "
                    "name the whole picture, and w is 7.5",
                ),
            ),
        ),
        Variant(
            "zero_terminal_snr_unscaled",
            says="with plain classifier-free guidance of the same strength, nothing scaled back",
            guidance=5.0,
            baselines=("zero_terminal_snr",),
        ),
        Variant(
            "trailing_finetuned",
            says="the trailing grid with a model that was trained as much further, on the flawed schedule",
            repaired=False,
            baselines=(),
        ),
        Variant(
            "leading_finetuned",
            says="none of the fixes, but as much further training: the flawed schedule and the leading grid",
            repaired=False,
            grid="leading",
            baselines=(),
        ),
        Variant(
            "ddim_leading",
            says="DDIM with the teacher on the leading grid, which begins below the last timestep",
            finetuned=False,
            repaired=False,
            baselines=("ddim",),
            claims=(
                Claim(
                    "fd[ddim,5..10] < fd[ddim_leading,5..10]",
                    says="with few steps the trailing grid is better than the leading one",
                ),
            ),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")} if self.finetuned else {}

    def prepare(self, session: Session) -> None:
        if self.finetuned:
            session.networks["student"].load_state_dict(session.once(finetune_v, self.repaired))

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        teacher, x, condition = session.networks["teacher"], batch["noise"], batch["condition"]
        if not self.finetuned:
            return sample_leading(Denoiser(teacher, condition), x, rung)
        steps = rung if self.guidance == 1.0 else rung // 2
        signal, student = signal_of(teacher, self.repaired), session.networks["student"]
        timesteps = (trailing_timesteps if self.grid == "trailing" else leading_timesteps)(steps, len(signal))
        return sample_v(student, signal, x, condition, timesteps, self.guidance, self.share)


# --- training --------------------------------------------------------------------------------------------------------


def finetune_v(session: Session, repaired: bool) -> dict[str, Tensor]:
    """Train the student, a copy of the teacher, to predict v on the teacher's schedule, repaired or as it is; conditions
    are sometimes dropped. Returns its weights.
    """
    student = session.networks["student"]
    data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
    signal = signal_of(session.networks["teacher"], repaired).to(session.device)
    noise_scale = (1 - signal.square()).sqrt()

    def loss() -> Tensor:
        rows = torch.randint(len(data), (128,), generator=session.rng, device=session.device)
        index = torch.randint(len(signal), (128,), generator=session.rng, device=session.device)
        eps = torch.randn(data[rows].shape, generator=session.rng, device=session.device)
        dropped = torch.rand(128, generator=session.rng, device=session.device) < 0.15
        condition = torch.where(dropped, student.null_condition(label[rows]), label[rows])
        alpha, sigma = (part[index].float().view(-1, 1, 1, 1) for part in (signal, noise_scale))
        target = from_x0_eps("v", data[rows], eps, alpha, sigma)
        return (student(alpha * data[rows] + sigma * eps, index.float(), condition) - target).square().mean()

    fit(session, student, loss, session.scale(5000, 4), rate=1e-3, ema=0.997, clip=1.0)
    return student.state_dict()
