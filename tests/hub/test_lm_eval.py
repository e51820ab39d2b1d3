"""lm-eval's own tasks on a checkpoint of somebody's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepmark import cli, hub, plugins
from stepmark.hub import Choice, prompts
from stepmark.runner import Runner

pytest.importorskip("lm_eval", reason="the extra stepmark[lm-eval] is not installed")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two task files: one answered by writing, one by choosing."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": "ab", "answer": "c", "options": ["c", "de"]},
        {"question": "cd", "answer": "d", "options": ["d", "f"]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\ntest_split: test\n"
    (folder / "write.yaml").write_text(
        f"task: write\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{answer}}}}'\n"
        "generation_kwargs:\n  until: '%'\n  do_sample: false\n  temperature: 0.7\n  max_gen_toks: 6\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "choose.yaml").write_text(
        f"task: choose\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: options\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


def test_own_tasks_are_answered_in_the_tokens_of_the_folder(
    reader: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    words = ["run", "--via", "lm-eval", "--backbone", str(reader), "--lm-tasks", str(tasks), "--new-tokens", "8"]
    assert cli.main([*words, "--method", "prompt_lookup", "--method", "h2o", "--method", "speculative"]) == 0
    table = capsys.readouterr().out
    lines = [line.split() for line in table.splitlines() if line.strip()]
    assert {(line[0], line[1]) for line in lines} >= {
        (task, method) for task in ("write", "choose") for method in ("prompt_lookup", "h2o", "speculative")
    }
    assert "needs a draft model" in table
    value = next(line[3] for line in lines if line[:2] == ["choose", "prompt_lookup"])
    assert value in {"0.000", "0.500", "1.000"}


def test_log_likelihoods_are_of_the_text_as_the_tokenizer_reads_it(
    reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepmark.via_lm_eval import StepmarkLM

    with hub.using(Choice(str(reader), items=1, new_tokens=8)) as made:
        runner = Runner(plugins.methods()["autoregressive"], made.task.id, "smoke", show_progress=False)
        model = StepmarkLM(runner, 8)
        for context, continuation in (("ab", "cd"), ("ab ", "cd"), ("", "cd")):
            start, rest = model._pair(context, continuation)
            assert [*start, *rest] == prompts.encode(reader, context + continuation)
            assert len(rest) >= 2
        start, rest = model._pair("ab", "c")
        with torch.no_grad():
            logp = model.judge.networks()["target"](torch.tensor([[*start, *rest]])).logits[0].double().log_softmax(-1)
        total, _ = model._loglikelihood(start, rest)
        assert total == pytest.approx(float(logp[len(start) - 1, rest[0]]), abs=1e-4)


def test_in_a_chat_template_what_goes_on_is_the_answer(reader: Path) -> None:
    """It stands behind the assistant's header and in no turn of the user's; a text without a context is no message."""
    from stepmark.via_lm_eval import StepmarkLM

    with hub.using(Choice(str(reader), items=1, new_tokens=8, chat=True)) as made:
        runner = Runner(plugins.methods()["autoregressive"], made.task.id, "smoke", show_progress=False)
        model = StepmarkLM(runner, 8)
        letters = prompts.tokenizer(reader).convert_ids_to_tokens
        for context, continuation in (("ab", " cd"), ("ab ", "cd")):
            start, rest = model._pair(context, continuation)
            assert "".join(letters(start)) == "[user]ab[a]"
            assert "".join(letters(rest)) == "cd"
        start, rest = model._pair("", "cd")
        assert "[" not in letters([*start, *rest])
        assert "[" not in letters(model._whole("cd"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "3"], "--limit is for --via lm-eval"),
        (["--via", "lm-eval", "--limit", "0"], "--limit is at least 1"),
        (["--lm-tasks", "x"], "--lm-tasks is for --via lm-eval on a checkpoint"),
    ],
)
def test_options_without_their_partner_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--method", "speculative", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_stop_string_alone_and_greedy_beside_a_temperature() -> None:
    from stepmark.via_lm_eval import temperature_of, until

    assert until("one. two; three", ". ") == "one"
    assert until("one. two; three", [";", "."]) == "one"
    assert until("one", None) == until("one", [""]) == "one"
    assert temperature_of({"do_sample": False, "temperature": 0.7}) == 0
    assert temperature_of({"temperature": 0.7}) == temperature_of({"do_sample": True, "temperature": 0.7}) == 0.7
    assert temperature_of({"do_sample": True}) == 1  # as everywhere
    assert temperature_of({}) == temperature_of({"do_sample": False, "top_p": 0.9}) == 0
    assert temperature_of({"do_sample": True, "top_p": 1.0, "top_k": 0}) == 1
    for cut in ({"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match="whole distributions"):
            temperature_of({"do_sample": True, **cut})
