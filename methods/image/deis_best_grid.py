from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.solvers import Denoiser, best_grids, deis_sample


class DEISBestGrid(Method):
    """DEIS of order 3 on the grid that suits it best.

    Of six common grids (equal steps in t, in its square root, in log-SNR, those of Karras et al., and equal steps shifted
    towards the noise and towards the data) the one is taken, for every step count, on which this solver ends nearest to the
    exact solution of the teacher's ODE. At few steps the grid moves a sampler more than its order does, so that samplers
    should be compared each on a grid that suits it.
    """

    paper = Paper(
        id="deis",
        title="Fast Sampling of Diffusion Models with Exponential Integrator",
        authors="Zhang, Chen",
        year=2023,
        arxiv="2204.13902",
        code="qsh-zh/deis",
    )
    tasks = ("class_to_image/digits_eps", "class_to_image/digits_eps_b", "sampling/mixtures_eps")
    baselines = ("deis", "ddim")
    claims = (Claim("fd[deis_best_grid,8] < fd[deis,8]", says="the grid improves DEIS at eight evaluations"),)

    def prepare(self, session: Session) -> dict[str, Tensor]:
        return best_grids(session, deis_sample)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        return deis_sample(denoise, batch["noise"], session.state[f"times_{rung}"].tolist())
