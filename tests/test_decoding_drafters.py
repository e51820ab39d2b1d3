"""Workers on a shared cache, drafts from a masked-diffusion model, spans that are checked against the input."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rigs.decoding import batch_of, last_logits, load, session_of
from scipy import stats
from stepmark.datasets import friend_lists
from stepmark.methods.decoding.hogwild_inference import BlockDecoder, write_together
from torch import Tensor

from stepmark.backbones import lm
from stepmark.task import load_split
from stepmark.tracks.decoding import parallel as decoding_parallel
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.parallel import answers
from stepmark.tracks.decoding.speculation import draw, speculate, verify_sampling
from stepmark.tracks.decoding.texts import nucleus

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(seed: int, depth: int, spread: float = 0.3, width: int = 64) -> Any:
    """A random Llama over the tasks' vocabulary; the greater the spread of its weights, the surer it is."""
    model = lm.build(width, depth, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread, generator=generator)
    return model.eval().requires_grad_(False)


def words_of(seed: int, length: int) -> list[int]:
    return torch.randint(6, 140, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- Hogwild! inference -----------------------------------------------------------------------------------------------


def test_each_reader_sees_one_text_in_its_own_order() -> None:
    """With one layer, states hang on words alone: every reader's logits are those of a plain text in its order.

    Blocks grow by unequal pieces, so that the place of each moves under the others' keys, which stay as they are.
    """
    model, views = model_of(0, 1), [(0,), (0, 2, 3, 1), (0, 3, 1, 2), (2, 1, 0, 3)]
    texts = {block: words_of(10 + block, 30) for block in range(4)}
    decoder, ends = BlockDecoder(model, 40, views), dict.fromkeys(range(4), 0)
    with torch.no_grad():
        for pieces in ((7, 2, 1, 0), (0, 1, 4, 1), (0, 3, 1, 2), (2, 1, 1, 1), (0, 0, 1, 0)):
            new = {block: texts[block][ends[block] : ends[block] + pieces[block]] for block in range(4)}
            found = decoder.write(new)
            ends = {block: ends[block] + pieces[block] for block in range(4)}
            assert set(found) == {block for block in range(4) if pieces[block]}
            for block, logits in found.items():
                plain = [token for other in views[block] for token in texts[other][: ends[other]]]
                torch.testing.assert_close(logits, last_logits(model, plain), rtol=1e-3, atol=1e-3)
    assert decoder.spent == 5


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_training_and_inference_see_the_same(workers: int) -> None:
    """Deep models: a row of transcripts in one pass, by queries moved in the row, and step by step on the blocks."""
    model = model_of(1, 3)
    rows = [
        (words_of(1, 9), [words_of(5 + w, 12 - 3 * w) for w in range(workers)]),
        (words_of(2, 6), [words_of(8 + w, 7 + 2 * w) for w in range(workers)]),
    ]
    view = lm.WorkersView(model)
    ids, labels = view.batch(rows)
    with torch.no_grad():
        found = model.lm_head(lm.hidden_states(model, ids, [True] * 3))
        model.config._attn_implementation = "sdpa"
        views = [(0,), *[(0, *(o for o in range(1, workers + 1) if o != w), w) for w in range(1, workers + 1)]]
        for row, (prompt, texts) in enumerate(rows):
            decoder, new = BlockDecoder(model, 30, views), {0: prompt}
            starts = [len(prompt) + sum(map(len, texts[:w])) for w in range(workers)]
            for time in range(max(map(len, texts))):
                new |= {w + 1: text[time : time + 1] for w, text in enumerate(texts)}
                for block, logits in decoder.write(new).items():
                    if block > 0:
                        torch.testing.assert_close(logits, found[row, starts[block - 1] + time], rtol=1e-3, atol=1e-3)
                new = {}
            for w, text in enumerate(texts):
                assert labels[row, starts[w] : starts[w] + len(text)].tolist() == [*text[1:], -100]
    assert (labels >= 0).sum() == sum(len(text) - 1 for _, texts in rows for text in texts)


def test_hogwild_writes_what_two_readers_of_one_text_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method on models of one layer, against plain passes over prompt, other and self; every budget is kept."""
    ended = set()
    said: list[dict[int, Tensor]] = []
    for seed in range(4):
        model, prompt = model_of(seed, 1, 0.5), words_of(seed, 8)
        model.model.embed_tokens.weight[lm.EOS] *= 1.5
        texts: list[list[int]] = [[], []]
        names = [lm.encode("tom"), lm.encode("anna")]
        history, heard = [], list[dict[int, Tensor]]()
        for _ in range(10):
            seen = [[*name, *text] for name, text in zip(names, texts, strict=True)]
            heard.append({})
            for w in (0, 1):
                if lm.EOS not in texts[w]:
                    heard[-1][w + 1] = last_logits(model, [*prompt, *seen[1 - w], *seen[w]])
                    texts[w].append(int(heard[-1][w + 1].argmax()))
            history.append([*texts[0], *texts[1]])
            if all(lm.EOS in text for text in texts):
                break
        ended.add(len(history))
        session = session_of(target=model)
        for budget in (1, 3, 10):
            session.ledger.reset(limit=budget)
            method = load("hogwild_inference")
            decoder = method.run.__globals__["BlockDecoder"]
            write = decoder.write
            monkeypatch.setattr(decoder, "write", lambda *given, of=write: said.append(of(*given)) or said[-1])
            said.clear()
            with torch.no_grad():
                (found,) = method.run(session, batch_of([prompt], 40), budget)
            assert found == history[min(budget, len(history)) - 1]
            for logits, wanted in zip(said, heard, strict=False):
                for block, row in wanted.items():
                    torch.testing.assert_close(logits[block], row, rtol=1e-3, atol=1e-3)
    assert len(ended) > 1, "no worker ever stops before the other"


def test_workers_without_a_shared_cache_write_as_if_each_were_alone() -> None:
    """Two workers who see the prompt and themselves, against plain passes; the other's text changes nothing."""
    differ = 0
    for seed in range(4):
        model, prompt = model_of(seed, 2, 0.5), words_of(seed, 8)
        session = session_of(target=model)
        texts: list[list[int]] = [[], []]
        for _ in range(6):
            for name, text in zip(("tom", "anna"), texts, strict=True):
                if lm.EOS not in text:
                    text.append(int(last_logits(model, [*prompt, *lm.encode(name), *text]).argmax()))
        for method, same in (("hogwild_unshared", True), ("hogwild_inference", False)):
            session.ledger.reset(limit=6)
            with torch.no_grad():
                (found,) = load(method).run(session, batch_of([prompt], 40), 6)
            assert not same or found == [*texts[0], *texts[1]]
            differ += found != [*texts[0], *texts[1]]
    assert differ, "with a shared cache nobody ever minds the other"


def test_a_single_worker_is_plain_decoding() -> None:
    model, prompt = model_of(3, 3), words_of(3, 9)
    with torch.no_grad():
        (found,) = load("single_worker").run(session_of(target=model), batch_of([prompt], 12), 20)
        shared = write_together(BlockDecoder(model, 30, [(0,), (0, 1)]), {0: prompt, 1: lm.encode("tom")}, (1,), 12, 20)
    text = [*prompt, *lm.encode("tom")]
    for token in found:
        assert token == int(last_logits(model, text).argmax())
        text.append(token)
    assert shared[1] == found


def test_the_untrained_model_learns_lists_by_single_workers_from_what_the_target_was_before() -> None:
    """It starts as `source`, sees lists of one worker under either name, each with its end, and is what runs."""
    for name in ("hogwild_untrained", "single_untrained"):
        method, cloned, seen = load(name), list[str](), list[dict[str, Any]]()
        names = type(method).prepare.__globals__
        model, student = model_of(0, 1), model_of(1, 1)
        train = {"prompt": [f"1 {word}" for word in ("alma", "tilda", "arno")], "target": ["1 2 .", "3 .", "4 5 6 ."]}
        session = session_of(target=model, student=student)
        session.clone = lambda role, cloned=cloned, student=student: cloned.append(role) or student
        session.train, session.seed, session.progress = train, 0, lambda steps, says: steps
        session.scale, session.once = lambda embedded, smoke: smoke, lambda function, session=session: function(session)
        assert method.networks(session) == {"student": student} and cloned == ["source"]
        names["fit"] = lambda network, *_, seen=seen, **given: seen.append({"network": network} | given)
        method.prepare(session)
        assert seen[0]["network"] is student
        rows, (ids, labels) = [], next(seen[0]["stream"])
        for row, told in zip(ids.tolist(), labels.tolist(), strict=True):
            first, last = (next(places) for places in ((i for i, t in enumerate(told) if t >= 0), iter([len(told)])))
            text = [token for token in told[first:last] if token >= 0]
            rows.append((lm.decode(row[: first + 1]), text))
        asked = [f"{prompt} {who}" for prompt, who in zip(train["prompt"], ("tom", "anna", "tom"), strict=True)]
        told = [[*lm.encode(text), lm.EOS] for text in train["target"]]
        assert sorted(rows) == sorted(zip(asked, told, strict=True))
        with torch.no_grad():
            method.run(session, batch_of([words_of(0, 5)], 4), 2)
        spent = session.ledger.evaluations()
        assert spent["student"] == 2 and not spent["target"]


def test_whoever_is_free_takes_the_next_question() -> None:
    """Every question once, each by the worker who has written least when it is its turn."""
    _, asked = friend_lists.example(random.Random(0), 8)
    texts = friend_lists.transcripts(asked, 2)
    begun = sorted((time, int(word)) for text in texts for time, word in enumerate(text) if word.isdigit())
    assert [number for _, number in begun] == list(range(1, 9))
    assert abs(len(texts[0]) - len(texts[1])) <= 7
    assert friend_lists.transcripts(asked, 1)[0][:3] == ["1", asked[0][0], asked[0][1][0]]


def test_answers_are_scored_by_the_number_of_their_question() -> None:
    task = decoding_parallel.TASKS[0]
    data = load_split("friend_lists", "test")
    prompt, told, friends = data["prompt"][0], data["target"][0], data["answer"][0].split(" , ")
    assert answers(told) == [(str(number), names) for number, names in enumerate(friends, start=1)]
    solutions = [part.strip() + " ." for part in told.split(".")[:-1]]
    texts = [
        told,
        " ".join([*solutions[1::2], "<eos>", *solutions[0::2], "<eos>"]),
        " ".join([*solutions[:4], "5 alma arno tilda .", *solutions[4:]]),  # the first answer counts
        " ".join([*solutions[:3], solutions[3][:-2], "<eos>", *solutions[4:6]]),  # cut before its full stop
    ]
    batch, resample = batch_of([lm.encode(prompt)] * 4, 100), np.array([[0, 1, 2, 3]])
    outputs = [lm.encode(text) for text in texts]
    decoding_parallel.check(task, batch, outputs)
    found = decoding_parallel.score(task, batch, outputs, {}, resample)
    assert found["accuracy"].value == pytest.approx((1 + 1 + 7 / 8 + 5 / 8) / 4)
    assert found["complete"].value == 0.5
    assert found["repeated"].value == pytest.approx((1 / 9) / 4)


# -- speculative diffusion --------------------------------------------------------------------------------------------


def test_diffusion_drafts_leave_greedy_decoding_as_it_is() -> None:
    """Untrained drafters, bad on purpose, and one that copies the target; T calls per draft of any length."""
    for seed in (0, 1):
        model, prompt = model_of(seed, 2, 0.5), words_of(seed, 7)
        truth = speculate(Decoder(model, 60), prompt, 30, 99, 0.0, lambda tokens, most: ([], None))

        class Oracle(torch.nn.Module):
            def forward(self, ids: Tensor) -> Tensor:
                context = [i for i in ids[0, :-20].tolist() if i != lm.PAD]
                done = len(context) - len(prompt)
                logits = torch.zeros(1, 20, len(lm.VOCABULARY))
                for place, token in enumerate(truth[done : done + 20]):
                    logits[0, place, token] = 9.0
                return logits

        for drafter, most in ((load("specdiff").run.__globals__["Drafter"](), 30), (Oracle(), 3)):
            session = session_of(target=model, draft_diffusion=drafter.eval().requires_grad_(False))
            session.state = {"block": torch.tensor(20), "steps": torch.tensor(3)}
            for budget in (2, 60):
                session.ledger.reset(limit=budget)
                with torch.no_grad():
                    (found,) = load("specdiff").run(session, batch_of([prompt], 30), budget)
                assert found == truth[: len(found)]
                spent = session.ledger.evaluations()
                assert len(found) >= min(budget, len(truth))
                assert spent["draft_diffusion"] == 3 * (spent["target"] - 1)
            assert found == truth
            assert spent["target"] <= most


def test_diffusion_drafts_leave_the_distribution_as_it_is() -> None:
    """Two words from a drafter, each of which hangs on the other where it is known: what is kept follows the target's own
    table, and would not if the second word were drawn before the first."""
    method = load("specdiff", BLOCK=2, CONTEXT=3)
    denoise = method.run.__globals__["denoise"]
    mask = method.run.__globals__["mdlm"].MASK
    first, second = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.1, 0.1, 0.8], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])

    def drafter(ids: Tensor) -> Tensor:
        """Second word: likely equal to the first one. Where that is masked, either is drawn as if from afar."""
        left, right = ids[0, 3:].tolist()
        close = torch.full((3,), 0.2)
        if left != mask:
            close[left] = 5.0
        ahead = torch.tensor([0.1, 0.1, 0.8])
        if right != mask:
            ahead = torch.full((3,), 0.05)
            ahead[(right + 1) % 3] = 5.0
        return torch.stack([ahead, close]).log()[None]

    rng, counts = torch.Generator().manual_seed(0), np.zeros((3, 3))
    uniforms = torch.rand(3000, 4, generator=rng)
    for row in uniforms.tolist():
        draft, q = denoise(drafter, [4, 4, 4], 2, 2, 1.0, rng, torch.device("cpu"))
        p = torch.stack([first, second[draft[0]], torch.ones(3) / 3]).double()
        new = verify_sampling(draft, p, q, row[:3])
        if len(new) == 1:  # rejected at once: the second word is the target's
            new.append(draw(second[new[0]], row[3]))
        counts[new[0], new[1]] += 1
    expected = (first[:, None] * second).numpy() * 3000
    assert stats.chisquare(counts.ravel(), expected.ravel() / expected.sum() * 3000).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_diffusion_draft_comes_with_what_it_was_drawn_from(temperature: float) -> None:
    """As many words and calls as were tuned, cut behind the end of the text and to the room left; q of each word is the
    distribution, at the temperature, that the drafter gave when it was written."""
    method, calls, asked = load("specdiff", BLOCK=6, CONTEXT=58), list[tuple[list[int], Tensor]](), list[Any]()
    generator, ending = torch.Generator().manual_seed(0), [False]

    class Fake(torch.nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.randn(1, 6, len(lm.VOCABULARY), generator=generator)
            logits[..., lm.EOS] = -torch.inf
            if ending[0]:
                logits[0, 2] = torch.full((logits.shape[2],), -torch.inf)
                logits[0, 2, lm.EOS] = 0.0
            calls.append((ids[0].tolist(), logits[0]))
            return logits

    def speculate(*given: Any) -> list[int]:
        propose, text = given[5], words_of(0, 9)
        for most, ends, length in ((9, False, 4), (3, False, 3), (9, True, 3), (2, True, 2)):
            ending[0] = ends
            calls.clear()
            draft, q = propose(text, most)
            asked.append(draft)
            assert len(draft) == length and len(calls) == 2
            assert all(ids == [lm.PAD] * 49 + text + ids[58:] for ids, _ in calls)
            assert calls[1][0][58:60] == draft[:2] and set(calls[1][0][60:]) == {mask} == set(calls[0][0][58:])
            rows = torch.cat([calls[0][1][:2], calls[1][1][2:4]])[:length].double()
            if temperature:
                torch.testing.assert_close(q, (rows / temperature).softmax(-1))
            else:
                assert q is None and draft == rows.argmax(-1).tolist()
        return [5]

    names = method.run.__globals__
    mask, names["speculate"] = names["mdlm"].MASK, speculate
    session = session_of(target=model_of(0, 1), draft_diffusion=Fake())
    session.state = {"block": torch.tensor(4), "steps": torch.tensor(2)}
    with torch.no_grad():
        assert method.run(session, batch_of([words_of(0, 9)], 30, temperature), 60) == [[5]]
    assert len(asked) == 4


def test_the_drafter_learns_masked_words_of_the_blocks_behind_beginnings() -> None:
    """The loss of a row is the mean over its masked words, as many as drawn, a quarter of the rows masked whole; blocks
    follow a random beginning of a text and are filled with ends behind it."""
    names = load("specdiff").run.__globals__
    mask, seen = names["mdlm"].MASK, list[Tensor]()
    logits = torch.randn(16, 20, len(lm.VOCABULARY), generator=torch.Generator().manual_seed(0))

    def drafter(ids: Tensor) -> Tensor:
        seen.append(ids)
        return logits

    ids = torch.stack([torch.tensor(words_of(seed, 64)) for seed in range(16)])
    found = names["masked_loss"](drafter, ids, torch.Generator().manual_seed(1))
    hidden = seen[0] == mask
    assert not hidden[:, :44].any() and torch.equal(torch.where(hidden, ids, seen[0]), ids)
    losses = -logits.log_softmax(-1).gather(2, ids[:, 44:, None])[..., 0]
    wanted = torch.stack([row[chosen].mean() for row, chosen in zip(losses, hidden[:, 44:], strict=True)]).mean()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    counts = hidden.sum(1).tolist()
    assert counts[:4] == [20] * 4 and len(set(counts[4:])) > 6 and min(counts) >= 1

    windows: list[list[int]] = []
    session = session_of(draft_diffusion=names["Drafter"]())
    session.train = {"prompt": ["anna saw one kite"] * 3, "target": [lm.decode(words_of(s, 30)) for s in range(3)]}
    session.scale, session.progress = (
        lambda embedded, smoke: (6, 8) if smoke == (3, 4) else smoke,
        lambda steps, _: steps,
    )
    own = names["masked_loss"]
    names["masked_loss"] = lambda network, rows, rng: windows.extend(rows.tolist()) or own(network, rows, rng)
    names["train_diffusion"](session)
    whole = [[*lm.encode(f"anna saw one kite {text}"), *[lm.EOS] * 20] for text in session.train["target"]]
    every = {
        tuple(names["window"](text[:cut], text[cut : cut + 20])): cut - 4 for text in whole for cut in range(4, 35)
    }
    cuts = {every[tuple(row)] for row in windows}
    assert len(windows) == 48 and len(cuts) > 15 and min(cuts) < 5 and max(cuts) > 25


@pytest.mark.parametrize("name", ["specdiff", "specdiff_chain"])
def test_drafts_are_tuned_for_the_fewest_layers_a_word(name: str) -> None:
    """Of the target's calls and of the drafter's, two layers each; at the temperature of the task."""
    method, tried = load(name), dict[tuple[int, int], tuple[int, int, int]]()
    rng, temperatures = random.Random(0), set()

    def decode(session: Any, target: Any, *given: Any) -> list[int]:
        _, _room, _, temperature, block, steps, calls = given
        temperatures.add(temperature)
        written, target.layer_calls, spent = rng.randint(20, 90), rng.randint(40, 90), rng.randint(5, 60)
        tried[block, steps] = written, target.layer_calls, spent
        calls += [1] * (spent - 3) + [3]
        return [5] * written

    session = session_of(target=model_of(0, 1))
    session.train = {"prompt": ["anna saw one kite"]}
    session.scale = lambda embedded, smoke: 1 if (embedded, smoke) == (4, 1) else embedded  # one prompt, every pair
    session.progress = lambda steps, says: steps
    method.decode = decode
    kinds = set()
    for task in ("sampling/stories", "greedy/stories"):
        session.task = SimpleNamespace(id=task)
        for _ in range(12):
            tried.clear()
            found = method.tune(session)
            cost = {pair: (layers + 2 * calls) / words for pair, (words, layers, calls) in tried.items()}
            assert (int(found["block"]), int(found["steps"])) == min(cost, key=cost.__getitem__)
            kinds |= set(cost)
        assert temperatures == {float(task.startswith("sampling"))}
        temperatures.clear()
    every = [(g, t) for g in (4, 8, 12, 20) for t in (1, 2, 3, 5) if t <= g]
    assert kinds == set([(g, g) for g in (4, 8, 12, 20)] if name == "specdiff_chain" else every)


def test_the_drafter_reads_the_end_of_the_text_and_looks_both_ways() -> None:
    own = load("specdiff", BLOCK=20, CONTEXT=44).run.__globals__
    assert own["window"](list(range(10, 70)), [3] * 20) == [*range(26, 70), *[3] * 20]
    assert own["window"]([7, 8], [3]) == [lm.PAD] * 42 + [7, 8, 3]
    drafter = own["Drafter"]().eval()
    ids = torch.tensor([own["window"](words_of(0, 50), [own["mdlm"].MASK] * 20)])
    changed = ids.clone()
    changed[0, -1] = 9
    with torch.no_grad():
        assert (drafter(ids)[0, 0] - drafter(changed)[0, 0]).nan_to_num(0).abs().max() > 0
        assert drafter(ids).shape == (1, 20, len(lm.VOCABULARY))
        assert bool((drafter(ids)[..., own["mdlm"].MASK] == -torch.inf).all()), "a mask is no word"


def test_the_classic_drafter_of_equal_training_leaves_greedy_decoding_as_it_is() -> None:
    """Its drafts cost a call a word; a draft of the target itself is kept whole, and the tuning finds the longest best."""
    model, prompt = model_of(3, 2, 0.5), words_of(3, 7)
    truth = speculate(Decoder(model, 60), prompt, 30, 99, 0.0, lambda tokens, most: ([], None))
    for drafter in (model_of(9, 2, 0.5), copy.deepcopy(model)):
        session = session_of(target=model, draft_chain=drafter)
        session.state = {"block": torch.tensor(4), "steps": torch.tensor(4)}
        with torch.no_grad():
            (found,) = load("specdiff_chain").run(session, batch_of([prompt], 30), 60)
        assert found == truth
    spent, calls, method = session.ledger.evaluations(), list[int](), load("specdiff_chain")
    session.ledger.reset()
    with torch.no_grad():
        method.decode(session, Decoder(model, 60), prompt, 30, 60, 0.0, 4, 4, calls)
    assert sum(calls) == session.ledger.evaluations()["draft_chain"] == spent["draft_chain"]
    read = session.ledger.entries["draft_chain"].as_dict()["positions"]
    assert read <= len(prompt) + len(truth) + sum(calls), "the cache of the drafter is not kept"
    assert spent["target"] <= 1 + -(-(len(truth) - 1) // 5)
    assert spent["draft_chain"] <= 4 * (spent["target"] - 1)


# -- Diver ------------------------------------------------------------------------------------------------------------


def diver_without_caches(
    own: Any, model: Any, prompt: list[int], room: int, temperature: float, rng: torch.Generator, told_too: bool = True
) -> tuple[list[int], int]:
    """The method by its definition: each span and each text that is asked about in a pass of its own.

    Candidates are at least a tenth as likely as the likeliest, a span has at most 8 tokens. Without `told_too` spans by
    their likelihood alone.
    """
    written: list[int] = []
    divergences = 0
    x = prompt[:-1]  # the input: all of the prompt before the sign that the story begins

    def near(p: Tensor) -> list[int]:
        order = p.argsort(descending=True).tolist()[:8]
        return [token for token in order if p[token] >= 0.1 * p.max()]

    while len(written) < room and lm.EOS not in written:
        p = last_logits(model, prompt + written).softmax(-1)
        first = near(p)
        if len(first) == 1:
            written.append(first[0])
            continue
        divergences += 1
        spans, scores = [], []
        for token in first:
            span, likely = [token], float(p[token].log())
            while span[-1] != lm.EOS and len(span) < 8:
                after = last_logits(model, prompt + written + span).softmax(-1)
                if len(near(after)) > 1:  # the candidates of the span diverge again
                    break
                span.append(int(after.argmax()))
                likely += float(after.max().log())
            told = 0.0
            for number, word in enumerate(x if told_too else ()):
                asked = [*written, *(i for i in span if i != lm.EOS), *own["ASK"], *x[:number]]
                told += float(last_logits(model, asked).log_softmax(-1)[word])
            scores.append(likely + told)
            spans.append(span)
        u = float(torch.rand((), generator=rng))
        weights = torch.tensor(scores) / (temperature or 1.0)
        written += spans[draw(weights.softmax(-1), u) if temperature else int(weights.argmax())]
    return written[:room], divergences


@pytest.mark.parametrize("temperature", [0.0, 20.0])  # so high that spans which tell the input worse are drawn too
def test_diver_is_its_definition(temperature: float) -> None:
    """Trees, kept branches and the running cache of the backward passes change nothing; the budget holds for both directions."""
    method = load("diver")
    own, divergences, sure = method.run.__globals__, 0, 0
    for seed in range(3):
        model = model_of(seed, 2, 0.5)
        prompt = [*words_of(seed, 4), *lm.encode("let golden <story>")]
        truth, found = diver_without_caches(own, model, prompt, 14, temperature, torch.Generator().manual_seed(seed))
        divergences, sure = divergences + found, sure + len(truth)
        session = session_of(seed, target=model)
        with torch.no_grad():
            (text,) = method.run(session, batch_of([prompt], 14, temperature), 500)
            assert text == truth
            for budget in (1, 6, 12):
                session.ledger.reset()
                (text,) = method.run(session, batch_of([prompt], 14, temperature), budget)
                assert sum(session.ledger.evaluations().values()) <= budget
                assert text
    assert 3 < divergences < sure, "the model never hesitates, or always"


def test_spans_by_likelihood_alone_ask_nothing_of_the_input(decoders: list[Decoder]) -> None:
    """The control: the same spans at a divergence, none of which is read backwards."""
    method, diverged = load("diver_likelihood"), 0
    for seed in range(2):
        model = model_of(seed, 2, 0.5)
        prompt = [*words_of(seed, 4), *lm.encode("let golden <story>")]
        rng = torch.Generator().manual_seed(seed)
        truth, found = diver_without_caches(method.run.__globals__, model, prompt, 10, 1.0, rng, told_too=False)
        with torch.no_grad():
            (text,) = method.run(session_of(seed, target=model), batch_of([prompt], 10, 1.0), 500)
        assert text == truth
        assert decoders[-1].spent == 0 < decoders[-2].spent, "a pass backwards was paid for"
        diverged += found
    assert diverged > 3


def test_whole_texts_are_drawn_alike_and_the_one_that_tells_the_input_best_is_kept() -> None:
    """The control: texts from the nucleus of 0.8 at the temperature, each from the prompt on, while the budget has room
    for one as long as the last and for the pass that asks; log p(input | text) of each recomputed by plain passes."""
    own = load("verify_whole").run.__globals__
    chosen = set()
    for seed in range(3):
        model = model_of(seed, 1, 0.2)
        prompt = [*words_of(seed, 2), *lm.encode("let <story>")]
        session = session_of(seed, target=model)
        for budget in (3, 20, 33):
            session.ledger.reset(limit=budget)
            session.rng.manual_seed(seed)
            with torch.no_grad():
                (found,) = load("verify_whole").run(session, batch_of([prompt], 6, 0.6), budget)
            used = sum(session.ledger.evaluations().values())
            session.ledger.reset()
            rng, texts, spent = torch.Generator().manual_seed(seed), list[list[int]](), 1
            while not texts or spent + len(texts[-1]) + 1 <= budget:
                text = list[int]()
                while not text or (text[-1] != lm.EOS and len(text) < 6 and spent + bool(texts) + 1 <= budget):
                    spent += bool(text)
                    p = nucleus((last_logits(model, [*prompt, *text]) / 0.6).softmax(-1), 0.8)
                    text.append(draw(p, float(torch.rand((), generator=rng))))
                texts.append(text)
            if len(texts) == 1 or spent + 1 > budget:
                assert found == texts[0] and used == spent
                continue
            x, scores = prompt[:-1], []
            for text in texts:
                told = [*(token for token in text if token != lm.EOS), *own["ASK"]]
                rows = [last_logits(model, [*told, *x[:i]]).log_softmax(-1)[word] for i, word in enumerate(x)]
                scores.append(float(sum(rows)))
            best = max(range(len(texts)), key=scores.__getitem__)
            assert found == texts[best] and used == spent + 1
            chosen.add(best)
    assert len(chosen) > 1


def test_texts_that_end_at_once_do_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a text takes no pass, and a budget of passes alone would never be used up."""
    method = type(load("verify_whole"))
    monkeypatch.setattr(method, "told", lambda backward, before, texts, x: torch.zeros(len(texts)))
    ends = torch.full((1, len(lm.VOCABULARY)), -1e9)
    ends[0, lm.EOS] = 0.0
    target = SimpleNamespace(spent=1, device="cpu", forward=lambda ids, last=1: ends, rollback=lambda length: None)
    assert method.decode_whole(target, None, [5, 6], 6, 5, 0.6, torch.Generator()) == [lm.EOS]
