"""Prompts: files of every kind that somebody may bring, our own, and how tokenizers read them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from stepmark import hub, plugins, run, samples
from stepmark.cell import Cell
from stepmark.hub import Choice, decoding, prompts, text_tasks
from stepmark.judge import Judge
from stepmark.runner import Runner


@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("plain.txt", b"once\n\n a time \n", ["once", "a time"]),
        ("marked.txt", b"\xef\xbb\xbfonce\nupon\n", ["once", "upon"]),
        ("windows.txt", b"once\r\nupon\r\n", ["once", "upon"]),
        ("wide.txt", "once\nupon".encode("utf-16"), ["once", "upon"]),
        ("lines.jsonl", b'\xef\xbb\xbf{"prompt": "a\\nb", "kind": "code"}\n\n{"prompt": "c "}\n', ["a\nb", "c "]),
        ("lines.txt", b'{"prompt": "a\\nb"}\n', ["a\nb"]),
        ("brace.txt", b"{ is a brace\n", ["{ is a brace"]),
        ("separator.jsonl", '{"prompt": "a\u2028b"}\n'.encode(), ["a\u2028b"]),
    ],
)
def test_a_file_is_read_as_it_was_meant(tmp_path: Path, name: str, data: bytes, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    assert [prompt.text for prompt in prompts.read(tmp_path / name)] == texts


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("latin.txt", "one\ncaf\xe9\n".encode("latin-1"), r"line 2: byte 0xe9 is no UTF-8; save the file as UTF-8"),
        ("empty.txt", b"\n \n", "is empty; write one prompt a line"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ("bare.jsonl", b'{"text": "a"}\n', 'line 1 has no "prompt"'),
        ("list.jsonl", b"[1]\n", 'line 1 has no "prompt"'),
        ("blank.jsonl", b'{"prompt": " "}\n', 'line 1 has no "prompt"'),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        prompts.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_our_own_prompts_are_short_and_long_of_every_kind() -> None:
    own = prompts.read(prompts.OWN)
    scored = [prompt for prompt in own if not prompt.use]
    assert Counter(p.kind for p in scored) == dict.fromkeys(
        ("story", "code", "arithmetic", "extraction", "dialogue"), 6
    )
    assert {p.kind for p in own if p.use == "calibration"} == {p.kind for p in scored}
    for kind in {p.kind for p in scored}:
        words = sorted(len(p.text.split()) for p in scored if p.kind == kind)
        assert words[0] < 20
        assert words[-1] > 60
    assert len({p.text for p in own}) == len(own)


def test_items_are_spread_over_the_kinds() -> None:
    kinds = ["a"] * 6 + ["b"] * 2 + ["c"]
    assert Counter(kinds[i] for i in prompts.spread(kinds, range(9), 6)) == {"a": 3, "b": 2, "c": 1}
    assert prompts.spread(kinds, [5, 6, 0], 2) == [5, 6]


def test_a_prompt_does_not_end_a_text(reader: Path) -> None:
    """What a tokenizer puts after finished texts is left out; what a prompt itself ends with is not."""
    a = prompts.encode(reader, "ab")
    assert (a[0], len(a)) == (1, 3)
    assert prompts.encode(reader, "ab</s>") == [*a, 2]


def test_a_chat_template_says_its_own_beginning(reader: Path) -> None:
    told = prompts.encode(reader, "hi", chat=True)
    assert prompts.decode(reader, told).replace(" ", "") == "[user]hi[a]"
    assert 1 not in told
    config = reader / "chat_template.jinja"
    config.unlink()
    prompts.tokenizer.cache_clear()
    with pytest.raises(ValueError, match="has no chat template; leave --chat out"):
        prompts.encode(reader, "hi", chat=True)


def test_real_prompts_take_the_place_of_random_tokens(reader: Path) -> None:
    """Where a folder has a tokenizer: our own, of every kind, cut to what the model sees; the written texts are kept."""
    with hub.using(Choice(str(reader), items=5, new_tokens=8, rungs=(8,))) as target:
        batch = decoding.inputs(target.task, 5, torch.Generator().manual_seed(0), torch.device("cpu"))
        texts = [prompts.decode(reader, ids).replace(" ", "") for ids in batch["prompt"]]
        own = {prompt.kind: [] for prompt in text_tasks.scored(target.choice)}  # type: ignore[var-annotated]
        for prompt in text_tasks.scored(target.choice):
            own[prompt.kind].append("".join(c for c in prompt.text if "!" <= c <= "{")[:20])
        assert all(len(ids) <= 120 for ids in batch["prompt"])
        assert len({kind for kind, starts in own.items() for text in texts if text[:20] in starts}) == 5
        record, shown = run.measured(Cell("prompt_lookup", target.task.id, 8, 0, "smoke"), timing=False)
        assert (record.status, record.flags) == ("ok", [])
        assert isinstance(shown, samples.Texts)
        assert shown.pairs[0][0] == prompts.decode(reader, Judge(target.task.id).inputs(2, 0)["prompt"][0])[:5000]


def test_chats_are_another_task(reader: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "ab"}) + "\n")
    digests: list[str] = []
    for more in ({}, {"chat": True}):  # type: dict[str, Any]
        choice = Choice(str(reader), prompts=str(tmp_path / "mine.jsonl"), new_tokens=4, **more)
        with hub.using(choice) as target:
            digests.append(target.task.checkpoint)
            assert target.task.id.endswith("_chat") is bool(more)
            assert ("--chat" in target.task.words) is bool(more)
    assert digests[0] != digests[1]


def test_prompts_that_are_not_scored_calibrate(reader: Path, tmp_path: Path) -> None:
    """Self-speculative decoding searches its mask on texts of the checkpoint, in the checkpoint's own tokens."""
    lines = [{"prompt": "ab"}, {"prompt": "cde", "use": "calibration"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with hub.using(Choice(str(reader), prompts=str(tmp_path / "mine.jsonl"), new_tokens=8, rungs=(8,))) as target:
        assert [prompt.text for prompt in text_tasks.scored(target.choice)] == ["ab"]
        runner = Runner(plugins.methods()["self_speculative_decoding"], target.task.id, "smoke", show_progress=False)
        batch = Judge(target.task.id).inputs(1, 0)
        found = runner.run(batch, 8, 0)
        plain = Runner(plugins.methods()["autoregressive"], target.task.id, "smoke", show_progress=False)
        assert found.outputs[0] == plain.run(batch, 8, 0).outputs[0][: len(found.outputs[0])]
        assert runner.session.state["skipped"].shape == (3, 2)
        from stepmark.backbones.lm import encode

        assert encode("cde") == prompts.encode(reader, "cde")
    assert encode("tom") == [encode("tom")[0]]
