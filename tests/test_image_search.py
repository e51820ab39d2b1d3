"""Search at inference: which noises and paths a verifier is shown, which of them it keeps, and how it is trained."""

from __future__ import annotations

import pytest
import torch
from rigs.images import batch_of, idle_session, module_of
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.session import Session
from stepmark.tracks.image import schedules

torch.set_num_threads(1)

search = module_of("diffusion_its_search")
SEARCHES = {
    kind: plugins.load_class(plugins.methods()[f"diffusion_its_search{name}"])
    for kind, name in {"random": "", "zero-order": "_zero_order", "paths": "_paths"}.items()
}


class Straight(nn.Module):
    """A flow to the fixed point of its own noise: image = noise / 2, along a straight line, from any time."""

    prediction = "flow"

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t.view(-1, *[1] * (x.dim() - 1))
        eps = x / (t + (1 - t) / 2)
        return eps - eps / 2


class Brightness(nn.Module):
    """A verifier that likes class k the more, the nearer the mean pixel is to k / 10; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(x.clone())
        classes = torch.arange(10) / 10
        return -100 * (x.mean((1, 2, 3))[:, None] - classes).square()


def searched(kind: str, rung: int, n: int = 20) -> tuple[Tensor, dict[str, Tensor], Brightness, Session]:
    """Images of a search with a network and a verifier that are known exactly."""
    verifier, batch = Brightness(), batch_of(n, (1, 8, 8), 10)
    session = idle_session("search/digits", teacher=Straight(), verifier=verifier)
    session.begin("run", 1, rung * n)
    return SEARCHES[kind]().run(session, batch, rung), batch, verifier, session


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_best_of_what_was_judged_is_returned(kind: str) -> None:
    """Of all images shown to the verifier, each item gets the one that it likes best for this item's wish."""
    rung, n = 64, 20
    found, batch, verifier, session = searched(kind, rung, n)
    shown = torch.cat([part.view(-1, n, *part.shape[1:]) for part in verifier.shown])  # [tries, n, ...]
    values = [search.approval(Brightness(), tried, batch["condition"]) for tried in shown]
    if kind == "paths":  # of the last round: before, predictions are judged that lead on
        values = values[-4:]
        shown = shown[-4:]
    best = torch.stack(values).argmax(0)
    torch.testing.assert_close(found, shown[best, torch.arange(n)])
    assert session.spent <= rung * n
    assert len(verifier.shown) > 1 and len(best.unique()) > 1


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_rung_that_leaves_no_choice_is_spent_on_steps(kind: str) -> None:
    found, batch, verifier, session = searched(kind, 4)
    session.begin("run", 1)
    torch.testing.assert_close(found, module_of("euler").Euler().run(session, batch, 4))
    assert not verifier.shown


def test_a_pivot_moves_to_its_better_neighbour_and_noises_keep_unit_variance() -> None:
    """Images are half their noise here: every one judged is a neighbour of the best before its round."""
    n, method = 50, SEARCHES["zero-order"]
    found, batch, verifier, _ = searched("zero-order", 64, n)
    noises = [2 * part for part in verifier.shown]
    torch.testing.assert_close(noises[0], batch["noise"], rtol=1e-4, atol=1e-4)
    pivot, liked = noises[0], search.approval(Brightness(), noises[0] / 2, batch["condition"])
    scale = (1 + method.reach**2) ** 0.5
    for first in range(1, len(noises), method.neighbours):
        centre = pivot
        for noise in noises[first : first + method.neighbours]:
            step = (noise * scale - centre) / method.reach
            assert abs(float(step.std()) - 1) < 0.05 and abs(float((step * centre).mean())) < 0.05
            assert abs(float(noise.std()) - 1) < 0.05
            value = search.approval(Brightness(), noise / 2, batch["condition"])
            better = (value > liked)[:, None, None, None]
            pivot, liked = torch.where(better, noise, pivot), torch.maximum(value, liked)
    torch.testing.assert_close(found, pivot / 2, rtol=1e-4, atol=1e-4)
    assert not torch.equal(pivot, noises[0])


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_noising_again_keeps_the_marginal(prediction: str) -> None:
    schedule = schedules.Schedule(prediction)
    draw = torch.Generator().manual_seed(0)
    x0, eps, noise = (
        torch.randn(200_000, 1, generator=draw) * scale + shift for scale, shift in ((0.5, 2), (1, 0), (1, 0))
    )
    at = schedule.alpha(0.5) * x0 + schedule.sigma(0.5) * eps
    found = search.noise_again(schedule, at, noise, 0.5, 0.7)
    alpha, sigma = schedule.alpha(0.7), schedule.sigma(0.7)
    assert float(found.mean()) == pytest.approx(2 * alpha, abs=0.01)
    assert float(found.std()) == pytest.approx((alpha**2 / 4 + sigma**2) ** 0.5, rel=0.01)


def test_the_control_of_a_search_draws_lots_and_asks_no_verifier() -> None:
    """Among as many noises: the images are not the first ones, and the verifier's choice is another."""
    verifier, batch = Brightness(), batch_of(20, (1, 8, 8), 10)
    session = idle_session("search/digits", teacher=Straight(), verifier=verifier)
    session.begin("run", 1, 64 * 20)
    found = plugins.load_class(plugins.methods()["best_of_random"])().run(session, batch, 64)
    assert not verifier.shown
    chosen = searched("random", 64)[0]
    wish = batch["condition"]
    assert search.approval(Brightness(), chosen, wish).mean() > search.approval(Brightness(), found, wish).mean()
    first = (found - batch["noise"] / 2).abs().flatten(1).amax(1) < 1e-4
    assert 0 <= int(first.sum()) < 10  # of seven noises each the first is one


def test_the_model_of_a_search_heeds_its_class_in_part() -> None:
    network, named, batch = (
        backbones.load("digits_flow_faint"),
        backbones.load("digits_flow_a"),
        batch_of(10, (1, 8, 8), 10),
    )
    t, wish = torch.full((10,), 0.6), batch["condition"]
    with torch.no_grad():
        found = network(batch["noise"], t, wish)
        null, full = named(batch["noise"], t, named.null_condition(wish)), named(batch["noise"], t, wish)
    torch.testing.assert_close(found, 0.4 * null + 0.6 * full, rtol=1e-4, atol=1e-5)
    assert (found - full).abs().max() > 0.1 and (found - null).abs().max() > 0.1


def test_the_better_paths_go_on_in_every_round() -> None:
    """With next to no noise in between a path keeps to the noise that it began with: the better of two is the last left."""
    verifier, batch, method = Brightness(), batch_of(20, (1, 8, 8), 10), SEARCHES["paths"]()
    method.forward = 1e-9
    session = idle_session("search/digits", teacher=Straight(), verifier=verifier)
    session.begin("run", 1, 64 * 20)
    found, wish = method.run(session, batch, 64), batch["condition"]
    first = verifier.shown[0].view(4, 20, 1, 8, 8)  # two copies of the given noise's image and of another's
    liked = torch.stack([search.approval(Brightness(), images, wish) for images in first])
    assert len(liked.argmax(0).remainder(2).unique()) == 2
    torch.testing.assert_close(found, first[liked.argmax(0), torch.arange(20)], rtol=0, atol=1e-3)
    later = verifier.shown[1].view(4, 20, 1, 8, 8)  # and in the second round there is nothing else
    torch.testing.assert_close(later, found.expand_as(later), rtol=0, atol=1e-3)


def test_paths_are_noised_again_by_a_sixteenth_and_each_copy_by_its_own_noise() -> None:
    times: list[float] = []

    class Asked(Straight):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            times.append(float(t.flatten()[0]))
            return super().forward(x, t, condition)

    verifier, batch = Brightness(), batch_of(20, (1, 8, 8), 10)
    session = idle_session("search/digits", teacher=Asked(), verifier=verifier)
    session.begin("run", 1, 64 * 20)
    SEARCHES["paths"]().run(session, batch, 64)
    assert times == pytest.approx([1.0, *(k / 8 + 1 / 16 for k in range(7, 0, -1))])
    for shown in verifier.shown:
        tries = shown.view(4, 20, 1, 8, 8)
        assert all(float((tries[i] - tries[j]).abs().amax()) > 0.05 for i in range(4) for j in range(i))


def test_the_verifier_learns_to_read_images_with_some_noise() -> None:
    session = idle_session("search/digits")
    session.begin("prepare", 3)
    torch.manual_seed(3)
    session.networks["verifier"] = search.new_verifier(session)
    session.scale = lambda embedded, smoke: 150 if embedded == 1000 else embedded  # type: ignore[method-assign]
    data, label = session.train["x0"], session.train["condition"]
    weights = search.train_verifier(session)
    verifier = search.new_verifier(session)
    verifier.load_state_dict(weights)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for level in (0.0, 0.2):
            assert float((verifier(data + level * noise).argmax(1) == label).float().mean()) > 0.8
