"""RG-LCD: a consistency student that also climbs a reward, through a proxy in latents that is taught by it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from stepmark import Claim, Method, Paper, Variant
from stepmark.backbones.scenes_judges import LOGITS
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import Pair, descend, distil, sample
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.rewards import log_probability
from stepmark.tracks.text_to_image.sampling import column, noise_like
from stepmark.tracks.text_to_image.search import judged
from stepmark.tracks.text_to_image.students import UPDATES, lcm_student


class LatentReader(nn.Module):
    """The proxy: what lies where in latents [B, 4, 8, 8], logits [B, 224] as those of the readers of pictures."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, stride in ((4, 1), (width, 1), (width, 2)):
            layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 256), nn.SiLU(), nn.Linear(256, LOGITS))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z)


def preference_loss(proxy: Tensor, expert: Tensor) -> Tensor:
    """KL of the expert's preferences from the proxy's, summed over the pairs of three candidates; rewards [3, B] are logits.

    In every pair the preference is a softmax of two rewards, so that only their difference is learned.
    """
    found = proxy.new_zeros(())
    for i, j in combinations(range(len(proxy)), 2):
        own, wanted = (torch.stack([rewards[i], rewards[j]], 1) for rewards in (proxy, expert))
        found = found + kl_div(own.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    return found


class Proxy:
    """The latent proxy of a reward, and its lessons.

    Args:
        few: of a batch, how many rows the expert is asked about.
    """

    def __init__(self, session: Session, reader: nn.Module, rate: float, few: int) -> None:
        self.reader, self.few, self.session = reader, few, session
        self.optimiser = torch.optim.AdamW(reader.parameters(), lr=rate, weight_decay=0.0)

    def reward(self, z: Tensor, pair: Pair) -> Tensor:
        """The proxy's own reward [B]."""
        return log_probability(self.reader(z), pair.tokens)

    def learn(self, found: Tensor, pair: Pair) -> None:
        """One update: preferences among the student's prediction, the average's, and the data, as the expert has them."""
        assert pair.target is not None
        three = torch.cat([z[: self.few] for z in (found, pair.target, pair.x0)])
        tokens = pair.tokens[: self.few].repeat(3, 1)
        with torch.no_grad():
            expert = judged(self.session, three, tokens)
        loss = preference_loss(*(r.view(3, -1) for r in (log_probability(self.reader(three), tokens), expert)))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()


class RGLCD(Method):
    """Reward-guided latent consistency distillation: the student's one-step prediction is also to please a reward.

    To the loss of latent consistency distillation (`lcm`: pairs 20 timesteps apart, w drawn and told, average of decay 0.95) the
    reward of the student's own prediction is added, for the caption c (section 4.1),

        L = L_LCD - beta R(f(z_t, w, c, t), c)

    R here is the mean log-probability that a reader of pictures gives to what the caption says. Its gradient through the decoder
    finds patterns that please the reader and nobody else. So the student climbs a proxy R_L that reads latents (section 4.2). It
    is a small network, first taught to tell the caption of a latent from another one, a contrastive loss over two. Then,
    after every update of the student, it is taught the expert's preferences among three latents for the same caption, the
    student's prediction, that of the average, and the data,

        L_RM = sum over pairs KL(softmax(R(i), R(j)) || softmax(R_L(i), R_L(j)))

    and R is never climbed itself; it need not even have a gradient. Sampling is that of `lcm`, one evaluation a step.

    `rg_lcd_direct` is the ablation without a proxy: beta R through decoder and reader, the reward's own slope. Controls:
    `lcm` is the student without a reward, trained for longer; `lcm_strong` is told a scale of 5, which also makes captions
    truer; `rg_lcd_best_of` takes `lcm` and the reward, draws as many pictures in two steps as the budget pays for, with
    one evaluation each of decoder and reader, and keeps the one that the reward likes best.

    Differs from the paper: the reward is a reader's log-probability, not a preference model of people, and beta 0.02 instead
    of 1, since that score is a cosine, a hundredth of its logit; the proxy is a network of its own of 0.4 million weights, which
    learns whole, where theirs is an encoder in the manner of CLIP whose last layers learn; the expert is asked about 8 rows
    of a batch; 180 updates of 32 latents at a rate of 5e-4, 1e-3 for the proxy, which has learned for 200 before (there 10 000
    at 1e-6 and 3.3e-6).

    Who judges are neither the reward nor the proxy: the eye, which draws again what it sees, stands for people, and the Frechet
    distance shows what was paid for it.

    What limits it here: the reward reads small pictures well, so that there is less to be gained by fooling it than there is from
    models of taste.
    """

    paper = Paper(
        id="rg_lcd",
        title="Reward Guided Latent Consistency Distillation",
        authors="Li, Feng, Chen, Wang",
        year=2024,
        arxiv="2403.11027",
        code="Ji4chenLi/rg-lcd",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("lcm", "ddim_guided", "lcm_strong", "rg_lcd_best_of")
    claims = (
        Claim(
            "caption[rg_lcd,2] >= caption[ddim_guided,64] and caption[rg_lcd,2..8] > max(caption[lcm,2..8], "
            "caption[lcm_strong,2..8], caption[rg_lcd_best_of,2..8]) and fd[rg_lcd,2..8] < fd[lcm,2..8]",
            says="two steps are as true to the caption as thirty-two guided ones of the teacher; few steps are truer than those "
            "of a student without the reward, told a stronger guidance or chosen by the reward, and nearer to the data",
            headline=True,
        ),
        Claim(
            "fd[rg_lcd,2..8] < fd[rg_lcd_direct,2..8]",
            says="the proxy keeps the student from pictures that please the reward alone",
        ),
        Claim(
            "caption[rg_lcd_direct,2..8] > caption[lcm,2..8] and fd[rg_lcd_direct,2..8] > fd[lcm,2..8]",
            says="climbed directly, the reward makes captions truer and drives pictures from the data",
        ),
    )

    arm = "proxy"  # | "direct" | "best_of"
    variants = (
        Variant("rg_lcd_direct", says="ablation: the reward itself is climbed, through the decoder", arm="direct"),
        Variant(
            "rg_lcd_best_of",
            says="control: a student without a reward, and of its pictures the one that the reward likes best",
            arm="best_of",
            baselines=("lcm",),
        ),
    )

    beta, few, steps = 0.02, 8, 2
    updates, first = 180, 200  # of the student, of the proxy before it

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        student, updates = session.networks["student"], session.scale(self.updates, 1)
        if self.arm == "best_of":
            student.load_state_dict(session.once(lcm_student, session.scale(UPDATES, 2)))
            return
        student.words.requires_grad_(False)
        if self.arm == "direct":

            def pleased(found: Tensor, pair: Pair) -> Tensor:
                return -self.beta * judged(session, found, pair.tokens).mean()

            distil(session, student, updates, extra=pleased)
            return
        reader = LatentReader().to(session.device, session.dtype)
        reader.load_state_dict(session.once(latent_reader, session.scale(self.first, 1)))
        proxy = Proxy(session, reader, 1e-3, self.few)
        distil(
            session,
            student,
            updates,
            extra=lambda found, pair: -self.beta * proxy.reward(found, pair).mean(),
            after=proxy.learn,
        )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student = session.networks["student"]
        schedule, tries = schedule_of(student), rung // (self.steps + 2)
        if self.arm != "best_of" or tries < 2:
            return sample(student, batch, rung, session.rng, GUIDANCE, schedule)
        best = noise = batch["noise"]
        liked = torch.full((len(noise),), -torch.inf, device=noise.device)
        for _ in range(tries):
            found = sample(student, {**batch, "noise": noise}, self.steps, session.rng, GUIDANCE, schedule)
            value = judged(session, found, batch["condition"])[0]
            better = value > liked
            best, liked = torch.where(column(better), found, best), torch.maximum(value, liked)
            noise = noise_like(noise, session.rng)
        return best


# --- training --------------------------------------------------------------------------------------------------------


def latent_reader(session: Session, updates: int) -> dict[str, Tensor]:
    """A reader of latents that tells their captions from others: softmax over the own one and that of another picture."""
    reader, data = LatentReader().to(session.device, session.dtype), Latents(session)
    for step in descend(session, list(reader.parameters()), updates, 2e-3):
        z, tokens, _ = data.batch(session.scale(64, 4))
        logits = reader(z)
        own, other = (log_probability(logits, said) for said in (tokens, tokens.roll(1, 0)))
        step(-torch.stack([own, other], 1).log_softmax(1)[:, 0].mean())
    return reader.state_dict()
