"""Decoding methods through lm-eval: the same answers as through the harness, and right log-likelihoods."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from stepmark import plugins
from stepmark.backbones.lm import decode, encode
from stepmark.judge import Judge
from stepmark.runner import Runner
from stepmark.task import load_split
from stepmark.tracks.decoding import MAX_NEW_TOKENS

pytest.importorskip("lm_eval", reason="the extra stepmark[lm-eval] is not installed")


def test_lm_eval_gives_the_harness_answers(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepmark.via_lm_eval import StepmarkLM, evaluate

    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = evaluate("speculative", "greedy/hops", rung=24, n=6)
    data = load_split("hops", "test")
    runner = Runner(plugins.methods()["speculative"], "greedy/hops", show_progress=False)
    batch = {
        "prompt": [encode(text) for text in data["prompt"][:6]],
        "max_new_tokens": [MAX_NEW_TOKENS["hops"]] * 6,
        "temperature": [0.0] * 6,
    }
    texts = [decode(ids) for ids in runner.run(batch, 24, seed=0).outputs]
    samples = sorted(found["samples"]["hops"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == texts
    right = [text.rpartition("ans ")[2] == answer for text, answer in zip(texts, data["answer"], strict=False)]
    assert found["results"]["hops"]["exact_match,answer"] == sum(right) / 6 > 0
    assert found["counts"]["target"] == runner.ledger.entries["target"].evaluations

    model = StepmarkLM(runner, 24)
    context, continuation = data["prompt"][0], texts[0]
    request = SimpleNamespace(args=(context, continuation))
    (total, greedy), *_ = model.loglikelihood([request])
    whole = encode(f"{context} {continuation}")
    with torch.no_grad():
        logp = Judge("greedy/hops").networks()["target"](torch.tensor([whole])).logits[0].double().log_softmax(-1)
    start = len(encode(context))
    expected = sum(float(logp[i - 1, whole[i]]) for i in range(start, len(whole)))
    assert greedy
    assert total == pytest.approx(expected, abs=1e-4)
    other = SimpleNamespace(args=(context, "ans ans"))
    assert not model.loglikelihood([other])[0][1]
    rolling = model.loglikelihood_rolling([SimpleNamespace(args=(f"{context} {continuation}",))])[0]
    assert rolling == pytest.approx(sum(float(logp[i - 1, whole[i]]) for i in range(1, len(whole))), abs=1e-4)


def test_stop_strings_and_lengths_are_kept(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepmark.via_lm_eval import StepmarkLM

    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    model = StepmarkLM(Runner(plugins.methods()["autoregressive"], "greedy/hops", show_progress=False), 24)
    context = load_split("hops", "test")["prompt"][0]
    whole, stopped, short = model.generate_until(
        [
            SimpleNamespace(args=(context, {"until": []})),
            SimpleNamespace(args=(context, {"until": [" ;"]})),
            SimpleNamespace(args=(context, {"until": [], "max_gen_toks": 2})),
        ]
    )
    assert stopped == whole.partition(" ;")[0] != whole
    assert short == " ".join(whole.split()[:2])


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("harp", "greedy/words_weak"),
        ("sink_window", "recall/needles"),
        ("w4a4_dynamic", "outliers/words"),
        ("nucleus_drafts", "drafts/stories"),
        ("wish_prompting", "preference/colours"),
        ("single_worker", "parallel/friend_lists"),
        ("transformer_moe", "learning/tongues"),
        ("random_expansion", "bilingual/stories"),
        ("char_tokens", "tokenisation/dialects"),
        ("dlm_confidence", "completion/stories64"),
        ("mdlm_bound", "likelihood/stories64"),
    ],
)
def test_every_kind_of_text_runs_under_lm_eval(
    method: str, task: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smoke tier: a figure of the task comes out, and evaluations were counted."""
    from stepmark.via_lm_eval import evaluate

    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    described = plugins.tasks()[task][1]
    found = evaluate(method, task, max(described.rungs), n=2, tier="smoke")
    (results,) = found["results"].values()
    figures = [value for value in results.values() if isinstance(value, float)]
    assert figures
    assert all(math.isfinite(value) for value in figures)
    assert sum(found["counts"].values()) > 0


def test_the_tracks_own_metrics_come_out(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures as those of the harness on the same items, from other outputs others."""
    from stepmark.via_lm_eval import evaluate

    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    n = 3
    runner = Runner(plugins.methods()["mdlm_nucleus"], "generation/stories64", show_progress=False)
    judge = Judge("generation/stories64")
    inputs = judge.inputs(n, 0)
    figures = []
    for rung in (4, 32):
        results = evaluate("mdlm_nucleus", "generation/stories64", rung, n)["results"]["generation/stories64"]
        expected = judge.score(inputs, runner.run(inputs, rung, 0).outputs, 0)
        assert {name: results[f"{name},none"] for name in expected} == {k: v.value for k, v in expected.items()}
        figures.append(results["gen_ppl,none"])
    assert figures[0] != figures[1]
