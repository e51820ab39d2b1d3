"""Every way of decoding that needs no training on language models that somebody brings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stepmark import hub, plugins, record, run
from stepmark.cell import Cell
from stepmark.hub import Choice, decoding, source
from stepmark.judge import Judge
from stepmark.method import Method
from stepmark.runner import Runner
from stepmark.task import scored_as
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.metrics import agreement


def measured(method: str, task: str, rung: int, seed: int = 0) -> record.Record:
    """Without timing; at a seed above 0 without the audit too, which calls a method six times."""
    return run.measure(Cell(method, task, rung, seed, "smoke"), timing=False, show_progress=False)


def training_free(track: str, *kinds: str) -> list[str]:
    """Methods of one process that name a task of these kinds, add no network and prepare nothing."""
    found = []
    for info in plugins.methods().values():
        if info.track == track and any(t.startswith(kinds) for t in info.tasks):
            method = plugins.load_class(info)()
            if method.ranks == 1 and not prepares(method):
                found.append(info.id)
    return sorted(found)


def prepares(method: Method) -> bool:
    """Whether a method does anything offline: a variant may, where its plain method returns at once."""
    nothing: Any = None
    try:
        return bool(method.networks(nothing)) or method.prepare(nothing) is not None
    except AttributeError:  # it asked something of the session
        return True


def change(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


LOSSLESS = ["autoregressive", "jacobi", "lookahead_decoding", "prompt_lookup", "speculative"]


def greedy(network: nn.Module, prompt: list[int], room: int, stop: set[int]) -> list[int]:
    """Plain greedy decoding by whole forwards, one for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + room and (len(text) == len(prompt) or text[-1] not in stop):
        with torch.no_grad():
            text.append(int(network(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_decoding_is_lossless(made: Path, opened: Callable[..., hub.Made], name: str) -> None:
    """Grouped queries, tied and untied heads, two families: texts are those of the model's own forward."""
    from transformers import AutoModelForCausalLM

    target = opened(name, draft=str(made / "draft"), items=2, new_tokens=12, rungs=(12,))
    own = AutoModelForCausalLM.from_pretrained(made / name).eval()
    inputs = Judge(target.task.id).inputs(2, 0)
    stops = [5, 2, 60] if name == "llama_tied" else [2]
    texts = [greedy(own, prompt, 12, set(stops)) for prompt in inputs["prompt"]]
    expected = [[stops[0] if token in stops else token for token in text] for text in texts]
    for method in LOSSLESS:
        runner = Runner(plugins.methods()[method], target.task.id, "smoke", show_progress=False)
        assert runner.run(inputs, 12, 0).outputs == expected, method
    found = measured("speculative", target.task.id, 12, 0 if name == "llama" else 1)
    assert (found.status, found.message, found.flags) == ("ok", None, [])
    assert found.quality["exact_match"].value == 1
    assert name != "llama" or found.counts["nfe_equivalent"] > 0


def test_texts_are_drawn_at_a_temperature(made: Path, opened: Callable[..., hub.Made]) -> None:
    """By the methods that can, and judged by the model's own distributions at that temperature."""
    target = opened("llama", draft=str(made / "draft"), items=4, new_tokens=12, rungs=(12,), temperature=0.5)
    assert target.task.id.endswith("_at0p5") and list(target.task.metrics) == ["tokens", "token_bias"]
    assert Judge(target.task.id).inputs(4, 0)["temperature"] == [0.5] * 4
    tasks = plugins.methods()["speculative"].tasks, plugins.methods()["harp"].tasks
    assert target.task.id in tasks[0] and target.task.id not in tasks[1]
    found = measured("speculative", target.task.id, 12)
    assert (found.status, found.message, found.flags) == ("ok", None, [])
    network, drawn = source.load("checkpoint/target"), torch.Generator().manual_seed(0)

    def bias(temperature: float, texts: int = 40) -> float:
        written = []
        for _ in range(texts):
            text = [7, 8, 9]
            for _ in range(12):
                with torch.no_grad():
                    logits = network(torch.tensor([text])).logits[0, -1].double()
                p = (logits / max(temperature, 1e-6)).softmax(-1)
                text.append(int(torch.multinomial(p, 1, generator=drawn)))
            written.append(text[3:])
        batch = {"prompt": [[7, 8, 9]] * texts, "temperature": [0.5] * texts}
        return decoding.bias(network, batch, written, np.zeros((1, 1), dtype=int)).value

    assert 0.5 < bias(0.5) < 1.6
    assert bias(0.05) > 3


def test_a_name_that_looks_like_a_temperature_is_none() -> None:
    plain, drawn = Choice("/somewhere/tiny_at0p7").id, Choice("/somewhere/tiny", temperature=0.7).id
    assert drawn == "checkpoint/tiny_at0p7" != plain
    assert "token_bias" in scored_as("decoding", drawn)["metrics"]
    assert "exact_match" in scored_as("decoding", plain)["metrics"]


def test_any_of_several_ends_ends_a_text(made: Path, tmp_path: Path, alone: None) -> None:
    """A method knows one end-of-sequence token: the network writes that one where it would write any of them."""
    shutil.copytree(made / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").unlink()

    def written(ends: int | list[int] | None) -> tuple[list[int], list[int], record.Record]:
        change(eos_token_id=ends)(tmp_path / "llama")
        with hub.using(Choice(str(tmp_path / "llama"), items=1, new_tokens=12, rungs=(12,))) as target:
            runner = Runner(plugins.methods()["autoregressive"], target.task.id, "smoke", show_progress=False)
            inputs = Judge(target.task.id).inputs(1, 1)
            return inputs["prompt"][0], runner.run(inputs, 12, 1).outputs[0], measured("jacobi", target.task.id, 12, 1)

    prompt, text, found = written(None)
    assert len(text) == 12 and found.quality["exact_match"].value == 1
    other = next(token for token in range(96) if token not in [*prompt, *text])
    place = next(i for i in range(3, 12) if text[i] not in text[:i])
    _, cut, found = written([other, text[place]])
    assert cut == [*text[:place], other]
    assert (found.status, found.quality["exact_match"].value) == ("ok", 1)
    assert found.quality["tokens"].value == place + 1


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_drafting_without_sublayers_is_lossless(opened: Callable[..., hub.Made], name: str) -> None:
    """Self-speculative decoding searches its mask on training data; with any mask its texts are greedy decoding's."""
    target = opened(name, items=2, new_tokens=20)
    network = source.load("checkpoint/target")
    inputs = decoding.inputs(target.task, 2, torch.Generator().manual_seed(3), torch.device("cpu"))
    method = plugins.load_class(plugins.methods()["self_speculative_decoding"])()
    skipped = torch.tensor([[False, False], [True, True], [True, False]])
    for prompt in inputs["prompt"]:
        decoder = Decoder(network, len(prompt) + 20)
        with torch.no_grad():
            text = method.decode(decoder, prompt, 20, 0.0, 200.0, skipped, torch.Generator().manual_seed(0))
        assert agreement(network, prompt, text) == len(text)
        assert len(text) == 20 or text[-1] == decoder.eos


@pytest.mark.parametrize("method", training_free("decoding", "greedy/", "recall/"))
def test_every_training_free_decoding_method_runs(opened: Callable[..., hub.Made], method: str) -> None:
    target = opened("llama", items=2, new_tokens=8, rungs=(4,))
    found = measured(method, target.task.id, 4, 0 if method in {"h2o", "lookahead_decoding"} else 1)
    if method in {"speculative", "llmcad", "chain_of_drafts", "tree_fixed_threshold"}:
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
    with pytest.raises(ValueError, match=r"has no tokenizer\.json to read --prompts with"), hub.using(choice):
        pass
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "llama")
    with hub.using(choice) as target:
        batch = decoding.inputs(target.task, 9, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert sorted(batch["prompt"]) == [[2, 3], [3, 4, 5], [4, 5]]
    assert target.task.n == 3


def test_ties_are_as_wide_as_the_model_rounds(opened: Callable[..., hub.Made]) -> None:
    """In float32 next to nothing; in bfloat16 what passes on a cache differ by, in which greedy decoding stays greedy."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        target = opened("llama", items=2, new_tokens=12, rungs=(12,), dtype=dtype)
        assert source.load("checkpoint/target").own.dtype == getattr(torch, dtype)
        cell = measured("autoregressive", target.task.id, 12, 1)
        assert (cell.status, cell.message, cell.quality["exact_match"].value) == ("ok", None, 1.0)
        found[dtype] = cell.quality["tie"].value
        ids = target.task.id
    assert found["float32"] == decoding.TIE
    assert 0.005 < found["bfloat16"] < 1
    assert ids.endswith("_bfloat16")


def test_a_wrong_text_is_no_tie_in_bfloat16(opened: Callable[..., hub.Made]) -> None:
    target = opened("llama", items=2, new_tokens=12, rungs=(12,), dtype="bfloat16")
    judge = Judge(target.task.id)
    inputs = judge.inputs(2, 0)
    runner = Runner(plugins.methods()["autoregressive"], target.task.id, "smoke", show_progress=False)
    outputs = runner.run(inputs, 12, 0).outputs
    least = judge.networks()["target"]
    with torch.no_grad():
        ids = torch.tensor([[*inputs["prompt"][0], *outputs[0][:5]]])
        outputs[0][5] = int(least(ids).logits[0, -1].argmin())
    found = judge.score(inputs, outputs, 0)
    assert found["exact_match"].value == 0.5
    assert found["first_divergence"].value == (5 + len(outputs[1])) / 2


def test_a_table_of_texts_says_what_a_token_costs(made: Path, opened: Callable[..., hub.Made]) -> None:
    """Speed-up per token sets a longer text against its baseline's; the prefill alone is the time to the first token."""
    from stepmark.leaderboard import pace, tables
    from stepmark.leaderboard.rows import cells

    from stepmark.admission import from_folders

    target = opened("llama", draft=str(made / "draft"), items=2, new_tokens=8, rungs=(1, 4))
    found = [
        run.measure(Cell(method, target.task.id, rung, 0, "smoke"), show_progress=False)
        for method in ("autoregressive", "prompt_lookup")
        for rung in (1, 4)
    ]
    read = found[3].latency
    assert read is not None and read.baseline_samples_ms is not None
    # The baseline writes a token a forward; which drafts a model of random weights proves right is chance, so they are set.
    assert set(read.baseline_tokens) == {4} and min(read.tokens) >= 4 and read.items == 1
    assert len(read.tokens) == len(read.samples_ms) == len(read.baseline_tokens)
    wrote = [4 + i % 4 for i in range(len(read.tokens))]
    found[3] = found[3].model_copy(update={"latency": read.model_copy(update={"tokens": wrote})})
    table = {(r.method, r.rung): r for r in cells(found, from_folders(found))}
    mine, base = table["prompt_lookup", 4], table["autoregressive", 4]
    got = pace.pace(mine, table.values())
    assert got.tokens_per_forward == pytest.approx(mine.quality["tokens"].value / mine.nfe)  # type: ignore[operator]
    own, theirs = np.array(read.samples_ms), np.array(read.baseline_samples_ms)
    assert got.ms_per_token == pytest.approx(own.sum() / sum(wrote))
    assert got.p95_ms_per_token == pytest.approx(np.quantile(own / wrote, 0.95))
    assert got.speedup == pytest.approx(theirs.sum() / (4 * len(theirs)) / got.ms_per_token)
    assert got.first_ms == table["prompt_lookup", 1].latency_ms.value  # type: ignore[union-attr]
    assert pace.pace(base, table.values()).tokens_per_forward == 1
    head = tables.show(found).splitlines()[2]
    assert all(name in head for name in pace.HEAD)


@pytest.mark.parametrize("method", ["h2o", "sink_window"])
def test_a_share_of_a_short_prompt_is_no_cache_of_two_tokens(opened: Callable[..., hub.Made], method: str) -> None:
    """Of a prompt of 24 tokens nothing is evicted yet: the text is greedy decoding's."""
    target = opened("llama", items=2, new_tokens=8, rungs=(8,))
    found = measured(method, target.task.id, 8, 1)
    assert (found.status, found.quality["exact_match"].value) == ("ok", 1)
