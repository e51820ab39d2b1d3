"""SDTT: its targets, its loss, and which teacher it learns from in which round."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rigs.masked import A, B, V, exact_denoiser, rng, tiny
from stepmark.methods.diffusion_lm import sdtt
from torch import Tensor, nn

from stepmark import plugins
from stepmark.backbones.lm import encode
from stepmark.backbones.mdlm import logits
from stepmark.task import load_split
from stepmark.tracks.diffusion_lm import MASK, sampling

torch.set_num_threads(1)


def test_targets_through_time_are_those_of_the_step_that_replaced_a_mask() -> None:
    language = {(A, A): 0.5, (B, B): 0.3, (A, B): 0.2}
    exact, calls = exact_denoiser(language), []

    def denoise(x: Tensor) -> Tensor:
        calls.append(x)
        return exact(x)

    n = 3000
    x = torch.full((n, 2), MASK)
    target = sdtt.targets_through_time(denoise, x, torch.ones(n), 0.5, 2, rng(1))
    assert len(calls) == 2  # the student saves one of two evaluations
    early = (calls[1] != MASK)[..., None]
    first, second = (sampling.word_log_probabilities(exact(c)) for c in calls)
    assert torch.equal(target, torch.where(early, first, second))
    assert float(early.double().mean()) == pytest.approx(0.5, abs=0.03)
    # On average over the teacher's runs that is the posterior, for this language as for any: a martingale.
    assert torch.allclose(target.exp().mean(0), first[0].exp(), atol=0.03)
    # At a later time and half the steps some masks remain; visible words have no target.
    y = torch.tensor([[A, MASK]]).expand(n, 2)
    target = sdtt.targets_through_time(denoise, y, torch.full((n,), 0.5), 0.125, 2, rng(2))
    assert float((calls[3][:, 1] != MASK).double().mean()) == pytest.approx(0.125 / 0.5, abs=0.03)
    assert torch.equal(target[:, 0], torch.zeros(n, V, dtype=torch.float64))
    assert torch.allclose(target[:, 1, [A, B]].exp(), torch.tensor([5 / 7, 2 / 7]).double().expand(n, 2))


def test_the_student_learns_a_mode_of_its_teacher() -> None:
    """KL(student || target): zero at the target, its minimum over constant students the geometric mean."""
    loss = sdtt.distillation_loss
    target = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    assert float(loss(target, target)) == pytest.approx(0, abs=1e-7)
    best = target.mean(0).log_softmax(0)
    here = float(loss(best.expand(2, 2), target))
    for shift in (-0.2, 0.2):
        other = (best + torch.tensor([shift, 0.0])).log_softmax(0)
        assert float(loss(other.expand(2, 2), target)) > here
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert float(loss(impossible, torch.tensor([[0.0, -torch.inf]]))) == 0


def weights(network: nn.Module) -> Tensor:
    """All weights of a network in one copy."""
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def session_of(student: Any) -> Any:
    """What `prepare` sees of a session."""
    networks = {"model": student, "student": deepcopy(student).requires_grad_(True), "teacher": deepcopy(student)}
    return SimpleNamespace(
        networks=networks,
        rng=rng(3),
        device=torch.device("cpu"),
        train={"text": load_split("stories64", "train")["text"][:40]},
        scale=lambda embedded, smoke: embedded,
        progress=lambda steps, says: steps,
    )


def test_every_round_learns_from_two_steps_of_the_student_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher holds still for a round and is then what the student has become; steps double in length."""
    session, method, asked = session_of(tiny(False)), sdtt.SDTT(), []
    method.steps, method.batch = 2, 8
    targets, student, texts = sdtt.targets_through_time, session.networks["student"], []

    def recorded(denoise: Any, x: Tensor, t: Tensor, step: float, count: int, generator: torch.Generator) -> Tensor:
        teacher = denoise.args[0]
        assert teacher is not student and not any(p.requires_grad for p in teacher.parameters())
        asked.append((step, count, weights(teacher), weights(student)))
        texts.append((x, t))
        return targets(denoise, x, t, step, count, generator)

    monkeypatch.setattr(sdtt, "targets_through_time", recorded)
    method.prepare(session)
    assert [(step, count) for step, count, *_ in asked] == [(1 / k, 2) for k in (64, 32, 16, 8) for _ in range(2)]
    for (_, _, teacher, before), (_, _, same, after) in zip(asked[::2], asked[1::2], strict=True):
        assert torch.equal(teacher, before) and torch.equal(same, teacher) and not torch.equal(after, before)
    assert len({float(teacher.sum()) for _, _, teacher, _ in asked}) == 4
    x, t = (torch.cat(part) for part in zip(*texts, strict=True))
    share = (x == MASK).double().mean(1)
    assert (share - t).abs().max() < 0.3 and (share - t).mean().abs() < 0.03  # masked with probability t
    stories = torch.tensor([encode(text) for text in session.train["text"]])
    assert ((x[:, None] == stories) | (x == MASK)[:, None]).all(2).any(1).all()


def test_every_round_warms_up_and_decays_with_a_fresh_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published rate, 3e-4, up in ten updates and down to nothing; nothing is carried over from the round before."""
    session, method = session_of(tiny(False)), sdtt.SDTT()
    method.steps, method.batch, rates, fresh = 20, 2, [], []

    class Watched(torch.optim.AdamW):
        def step(self, *args: Any, **more: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            fresh.append(not self.state)
            return super().step(*args, **more)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    method.prepare(session)
    n = len(rates) // len(method.rounds)
    assert n > 10 and rates == rates[:n] * len(method.rounds)
    assert rates[:n] == pytest.approx([3e-4 * min(1, (i + 1) / 10) * (1 - i / n) for i in range(n)])
    assert fresh == ([True] + [False] * (n - 1)) * len(method.rounds)


def test_the_loss_compares_at_the_masks_what_student_and_teacher_make_of_the_masked_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KL(student || target) by hand, at each mask of the text that both were shown."""
    student, teacher, seen = tiny(False, 1).requires_grad_(True), tiny(False, 2), []
    targets = sdtt.targets_through_time
    monkeypatch.setattr(
        sdtt, "targets_through_time", lambda *given: seen.append((given[1], targets(*given))) or seen[0][1]
    )
    text = torch.tensor([encode(text) for text in load_split("stories64", "train")["text"][:3]])
    loss = sdtt.SDTT().distil(student, sampling.denoiser(teacher), text, 8, rng(5))
    (x, target), total, count = seen[0], 0.0, 0
    with torch.no_grad():
        found = sampling.word_log_probabilities(logits(student, x))
    for row, column in (x == MASK).nonzero().tolist():
        p, q = found[row, column], target[row, column]
        total += float((p.exp() * (p - q)).nan_to_num().sum())  # a mask is no word of either: nought
        count += 1
    assert count > 20 and float(loss) == pytest.approx(total / count, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


def test_the_control_is_trained_on_its_own_loss_for_as_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"distil": 0, "own": 0}
    monkeypatch.setattr(sdtt.SDTT, "distil", lambda self, student, *_: count("distil", student))
    monkeypatch.setattr(sdtt, "word_losses", lambda student, *_: count("own", student))

    def count(kind: str, student: nn.Module) -> Tensor:
        calls[kind] += 1
        return torch.stack([p.sum() for p in student.parameters()]).sum()

    for name in ("sdtt", "sdtt_data"):
        method = sdtt.SDTT()
        method.distilled, method.steps, method.batch = plugins.load_class(plugins.methods()[name])().distilled, 1, 2
        method.prepare(session_of(tiny(False)))
    assert calls == {"distil": 4, "own": 4}
