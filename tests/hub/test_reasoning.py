"""Methods of the reasoning track on checkpoints that somebody brings: tiny random ones, with a tokenizer of English words."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from stepmark.datasets import countdown, deduction, problems
from torch import Tensor

from stepmark import admission, hub, plugins, record, run
from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import DIGITS, EOS, SIZE, STOP, WORDS, decode, encode
from stepmark.cell import Cell
from stepmark.cli import main
from stepmark.hub import Choice, english, source
from stepmark.hub.reasoning_networks import Speaker, deviates
from stepmark.hub.side_by_side import Held
from stepmark.hub.spoken import Speech
from stepmark.judge import Judge
from stepmark.task import BadOutput, Skip, load_split, scored_as

LANGUAGES = list(english.LANGUAGES)
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.3, "head_dim": 8,
}  # fmt: skip
# Windows shorter than the prompts, tied embeddings, positions of two kinds: what tells rows that are laid wrongly.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "query_pre_attn_scalar": 7,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": 16},
    "gpt2": {"n_positions": 2048, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 2},
}


@lru_cache(maxsize=4)
def spelling(pattern: str = r" ?[A-Za-z]+|[0-9]|\n+|[^A-Za-z0-9\n]", more: tuple[str, ...] = ()) -> Any:
    """A tokenizer whose tokens are words with the space before them, single digits, signs and new lines."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "\n", "\n\n", " ", *more]
    words += [f" {word}" for word in (*english.ADJECTIVES, *english.NAMES)]
    for language, pieces in english.PIECES.items():
        words += pieces.values()
        if language == "deduction":
            pieces = pieces | dict(zip(deduction.CONCEPTS, (f" {word}" for word in english.ADJECTIVES), strict=False))
            pieces |= dict(zip(deduction.NAMES, (f" {word}" for word in english.NAMES), strict=False))
        for form, said in english.FORMS[language].items():
            told = [said.asks, said.cue]
            for prompt, completion in english.shown(language, form):
                asked, _, rest = prompt.partition(form)
                told.append(english.question(language, asked.strip(), pieces))
                told.append(english.spelt(f"{rest} {completion}", pieces))
            words += [piece for text in told for piece in re.findall(pattern, text)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def saved(folder: Path, family: str = "llama", tokenizer: Any = None, **more: Any) -> Any:
    """A random model of a family in a folder, with a tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    tokenizer = spelling() if tokenizer is None else tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CONFIG_MAPPING[family](**(SMALL | {"vocab_size": len(tokenizer) + 5} | FAMILIES[family] | more))
        own = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    own.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return own


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasoning") / "tiny"
    saved(folder)
    return folder


@pytest.fixture(scope="module")
def asked(brought: Path) -> Iterator[Callable[[str], hub.Made]]:
    """Switch to a language of the tiny checkpoint; the one before is closed."""
    state: dict[str, Any] = {}

    def close() -> None:
        if state:
            state.pop("context").__exit__(None, None, None)
            state.clear()

    def switch(language: str) -> hub.Made:
        if state.get("language") != language:
            close()
            context = hub.using(Choice(str(brought), reasoning=language, items=2, rungs=(48,)))
            state["made"], state["context"], state["language"] = context.__enter__(), context, language
        return state["made"]

    yield switch
    close()


def network() -> Speaker:
    found: Any = source.load("checkpoint/target")
    return found


def question(language: str, number: int = 0) -> list[int]:
    return encode(load_split(language, "train")["question"][number])


def plain(own: Any, tokens: list[int]) -> Tensor:
    """Logits [V] after a text by one plain forward of the model itself."""
    with torch.no_grad():
        return own(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


# -- English -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "form"), [(each, form) for each in LANGUAGES for form in english.FORMS[each]])
def test_what_is_shown_is_read_back_word_by_word(asked: Callable[[str], hub.Made], language: str, form: str) -> None:
    """An example's completion, as the tokenizer reads its English, says the words that it was made of."""
    asked(language)
    speech = source.speech()
    for _, completion in english.shown(language, form):
        whole = speech._tokens(english.spelt(completion, speech.pieces), english.FORMS[language][form].cue)
        known = {token: word for word, token in speech.token.items()}
        said = speech.say([known.get(token, SIZE + token) for token in whole])
        expected = completion if "<step>" not in completion else completion.replace("<step> ", "step : ")
        assert said == expected.replace("done step", "</think> step"), (form, completion)


def test_no_example_is_a_question_that_is_scored() -> None:
    """Neither a word problem, nor a set of numbers, nor statements of a split that tests."""
    tests = {
        "problems": set(load_split("problems", "test")["question"]),
        "countdown": {
            str(countdown.read(q)[0]) for name in ("test", "game24") for q in load_split("countdown", name)["question"]
        },
        "deduction": {q for name in ("test", "deep", "dense") for q in load_split("deduction", name)["question"]},
    }  # fmt: skip
    for language, forms in english.FORMS.items():
        for form in forms:
            for prompt, _ in english.shown(language, form):
                told = prompt.partition(" <")[0]
                told = str(countdown.read(told)[0]) if language == "countdown" else told
                assert told not in tests[language], (form, prompt)


def test_questions_are_told_in_english() -> None:
    pieces = english.PIECES["problems"]
    told = "tom has 3 boxes of 1 2 pears . then the pears of tom double . how many pears does tom have ?"
    assert english.question("problems", told, pieces) == (
        "Question: Tom has 3 boxes of 12 pears. Then the pears of Tom double. How many pears does Tom have?\n"
    )
    assert english.question("countdown", "4 , 1 2 -> 2 4", pieces) == "Numbers: 4,12\nTarget: 24\n"
    words = {"boris": " Ben", "zepa": " red", "is": " is", "isnt": " not"}
    assert english.question("deduction", "boris isnt zepa ? boris is zepa", words) == (
        "Statements: Ben not red.\nQuestion: Ben is red?\n"
    )


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        (
            "problems",
            "3*4=12. 12 - 5 = 7\u2212no. The answer is 7 pears.",
            "3 * 4 = 1 2 . 1 2 - 5 = 7 - no . the ans 7",
        ),
        ("problems", "3\u00d74=12. Answer: $12.", "3 * 4 = 1 2 . ans 1 2"),
        ("problems", "Answer 3. Answer 45, I think", "ans 3 . ans 4 5"),
        ("problems", "The answer is not known", "the ans is not known"),
        ("countdown", "4+6=10:8,10;", "4 + 6 = 1 0 left 8 , 1 0 ."),
        ("deduction", "Ben isn't red. Answer: false, since", "ben isnt red . ans false"),
        ("deduction", "Answer is not red", "ans isnt red"),
    ],
)
def test_texts_are_read_back_by_rules(language: str, text: str, words: str) -> None:
    back = {"answer": "ans"}
    back |= {"not": "isnt"} if language == "deduction" else {":": "left", ";": "."} if language == "countdown" else {}
    assert english.read_back(language, text, back) == words


def test_a_right_solution_in_english_is_judged_right(asked: Callable[[str], hub.Made]) -> None:
    """And a wrong one wrong: tokens of the tokenizer's own, spaces and names among them."""
    for language, form in (("problems", "<prose>"), ("problems", "<table>"), ("problems", "<think>"),
                           ("countdown", "<cot>"), ("deduction", "<proof>")):  # fmt: skip
        task, speech = asked(language).task, source.speech()
        if language == "problems":
            told = problems.problem(random.Random(3), 3)
            completion = problems.solution(told, form)
        elif language == "countdown":
            state, target = countdown.question(random.Random(3), 4)
            told, completion = countdown.told(state, target), countdown.solution(state, target, random.Random(3))
        else:
            asked_for = deduction.question(random.Random(3), 3, 2)
            told, completion = deduction.told(asked_for), deduction.solution(asked_for, form)
        text = english.spelt(completion, speech.pieces)
        wrong = re.sub("true|false", lambda found: {"true": "false", "false": "true"}[found[0]], text)
        wrong = re.sub(r"[0-9](?=[^0-9]*$)", lambda found: str((int(found[0]) + 1) % 10), wrong)
        known = {token: word for word, token in speech.token.items()}
        outputs = []
        for each in (text, wrong):
            cue = english.FORMS[language][form].cue
            outputs.append([*(known.get(t, SIZE + t) for t in speech._tokens(each + "\n", cue)[:-1]), EOS])
        judge = Judge(task.id)
        batch = {"question": [encode(told)] * 2}
        judge.check(batch, outputs)
        found = [judge.score({"question": batch["question"][:1]}, [ids], 0)["accuracy"].value for ids in outputs]
        assert found == [1.0, 0.0], (form, text, wrong)


# -- words and tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_may_be_written_has_the_models_probabilities(asked: Callable[[str], hub.Made], language: str) -> None:
    """Every token is one id, none is lost or counted twice; ends of texts and of steps have the sum of theirs."""
    asked(language)
    speech = source.speech()
    logits = torch.randn(3, speech.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given, found = logits.softmax(-1), speech.heard(logits).softmax(-1)
    assert torch.allclose(found.sum(-1), torch.ones(3, dtype=torch.float64))
    together = [token for several in speech.together.values() for token in several]
    assert len(together) == len(set(together))
    for word, token in speech.token.items():
        several = speech.together.get(word, [token])
        assert torch.allclose(found[:, word], given[:, several].sum(-1))
        assert float(found[:, [SIZE + each for each in several]].max()) < 1e-300
    rest = [t for t in range(speech.size) if t not in together and t not in speech.token.values()]
    assert torch.allclose(found[:, [SIZE + t for t in rest]], given[:, rest])
    assert float(found[:, [w for w in range(SIZE) if w not in speech.token]].max()) < 1e-300


def test_new_lines_and_ends_end_a_text_and_a_stop_before_one_a_step(tmp_path: Path, alone: None) -> None:
    saved(
        tmp_path / "lines", tokenizer=spelling(r" ?[A-Za-z]+|[0-9]|\.\n+|\n+|[^A-Za-z0-9\n]", (".\n", ".\n\n", "x\n"))
    )
    with hub.using(Choice(str(tmp_path / "lines"), reasoning="problems", items=1, rungs=(32,))):
        speech = source.speech()
        tokens = {name: speech._tokens(name) for name in (".", ".\n", ".\n\n")}
        assert speech.together[STOP] == [token for (token,) in tokens.values()]
        spelled = hub.prompts.tokenizer(speech.folder).convert_ids_to_tokens(speech.together[EOS])
        assert set(spelled) == {"</s>", "\n", "\n\n", "x\n"}


def test_words_that_are_put_in_are_read_as_if_the_model_had_written_them(asked: Callable[[str], hub.Made]) -> None:
    """Digits, signs and cues of a method are the tokens that worked examples show; a number behind a word has its space."""
    asked("problems")
    speech = source.speech()
    text = speech.told([*question("problems"), *encode("<cot> 3 * 4 = 1 2 . 1 2 - 5 = 7 . ans 7")]).tokens
    prompt = speech.prompt((*question("problems"), *encode("<cot>")))
    assert text[: len(prompt)] == prompt
    assert text[len(prompt) :] == speech._tokens("3*4=12. 12-5=7. Answer 7", "\n")
    told = speech.told([*question("problems"), *encode("<verify> 3 * 4 = 1 2 . <score>")])
    assert told.tokens[-len(speech._tokens("\nWorth:\n")) :] == speech._tokens("\nWorth:\n")
    assert len(told.places) == 1 and told.places[0] == len(told.tokens)


def test_places_count_the_tokens_of_each_id(asked: Callable[[str], hub.Made]) -> None:
    asked("problems")
    speech = source.speech()
    ids = [*question("problems"), *encode("<cot> 3 * 4 . 1 2")]  # the full stop is followed by a space
    told = speech.told(ids)
    start = len(speech.prompt(tuple(ids[:-6])))
    assert [place - start for place in told.places] == [0, 1, 2, 3, 4, 6, 7]
    assert told.first == len(ids) - 7
    assert speech.told(encode(".")).places == [1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_prompt_shows_its_format_and_ends_in_its_cue(asked: Callable[[str], hub.Made], language: str) -> None:
    asked(language)
    speech = source.speech()
    for form, said in english.FORMS[language].items():
        words = [*question(language), *encode(form)]
        text = hub.prompts.decode(speech.folder, speech.prompt(tuple(words)))
        assert text.startswith(said.asks) and text.endswith(said.cue)
        assert text.count(f"{said.cue}") >= english.SHOTS + 1
        assert "<" not in text, text


def test_decode_leaves_words_as_they_are_and_needs_a_voice_for_others(
    asked: Callable[[str], hub.Made], alone: None
) -> None:
    assert decode(encode("tom has 3 pears . ans 7")) == "tom has 3 pears . ans 7"
    with pytest.raises(KeyError, match="--backbone FOLDER"):
        decode([SIZE + 3])


# -- texts side by side ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Speaker]]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    own = saved(folder, request.param)
    with hub.using(Choice(str(folder), reasoning="problems", items=1, rungs=(32,))):
        yield own, network()


def agree(own: Any, chains: Chains, chosen: list[int] | None = None) -> None:
    """What comes next, as texts are held side by side, is what the model's own plain forward says."""
    speech: Speech = chains.model.speech  # type: ignore[attr-defined]
    chosen = list(range(len(chains))) if chosen is None else chosen
    with torch.no_grad():
        found = chains.read(chosen)
    for i, row in zip(chosen, found, strict=True):
        expected = speech.heard(plain(own, speech.told(chains.texts[i]).tokens)[: speech.size].float())
        assert torch.allclose(row.log_softmax(-1)[:SIZE], expected.log_softmax(-1)[:SIZE], atol=2e-3), i
        assert torch.allclose(row.log_softmax(-1), expected.log_softmax(-1), atol=2e-3), i


def test_texts_of_unequal_length_agree_with_the_models_own_forward(family: tuple[Any, Speaker]) -> None:
    """Prompts of two formats, forked, written at unequal lengths, cut, put into and swapped."""
    own, model = family
    prompts = [[*question("problems", k), *encode(form)] for k, form in ((0, "<cot>"), (1, "<dir>"), (2, "<verify>"))]
    chains: Any = Chains(model, prompts)  # type: ignore[arg-type]
    agree(own, chains)
    forked: Any = chains.take([0, 0, 2, 1])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        forked.write(limit=[9, 2, 5, 1], temperature=1.0, generator=generator)
    agree(own, forked)
    forked.cut(0, len(forked.texts[0]) - 4)
    forked.put(1, encode("1 2 - 5 = 7 . ans"))
    forked.put(2, encode(". <score>"))
    agree(own, forked, [2, 1])  # rows that are none of the first
    with torch.no_grad():
        forked.write([3, 0], limit=3, temperature=1.0, generator=generator)
    agree(own, forked)


def test_pieces_are_scored_as_by_the_models_own_forward(family: tuple[Any, Speaker]) -> None:
    own, model = family
    prompt, piece = [*question("problems"), *encode("<cot>")], encode("3 * 4 = 1 2 .")
    for known in (False, True):
        chains: Any = Chains(model, [prompt, prompt[5:]])  # type: ignore[arg-type]
        with torch.no_grad():
            if known:
                chains.read()
            found = chains.score([1, 0], [piece[:3], piece])
        assert list(map(len, found)) == [3, len(piece)]
        for text, scores in zip((prompt[5:], prompt), found, strict=True):
            for k, score in enumerate(scores):
                logits = plain(own, model.speech.told([*text, *piece[:k]]).tokens)[: model.speech.size]
                assert score == pytest.approx(
                    float(model.speech.heard(logits.float()).log_softmax(-1)[piece[k]]), abs=2e-3
                )


def test_what_stands_already_is_not_read_again(
    asked: Callable[[str], hub.Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that is written costs one token of the model, however long the prompt; a fork costs none."""
    asked("problems")
    read: list[list[int]] = []
    original = Held.read
    monkeypatch.setattr(
        Held, "read", lambda self, base, pieces: read.append(list(map(len, pieces))) or original(self, base, pieces)
    )
    chains: Any = Chains(network(), [[*question("problems", k), *encode("<cot>")] for k in (0, 1)])  # type: ignore[arg-type]
    with torch.no_grad():
        chains.read()
        assert min(read[0]) > 100
        chains.take([0, 1, 0]).write(limit=3, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert read[1:] == [[1] * len(row) for row in read[1:]] and len(read) == 3


def test_a_model_that_is_not_itself_side_by_side_is_refused(brought: Path, alone: None) -> None:
    """Keys that are laid one slot off are seen before anything is measured."""
    with hub.using(Choice(str(brought), reasoning="problems", items=1, rungs=(32,))):
        model = network()
        assert deviates(model) == ""
        with pytest.MonkeyPatch.context() as patch:
            original = Held._laid
            patch.setattr(
                Held, "_laid", lambda self, rows, last, ahead: original(self, rows, last, (ahead - 1).clamp(min=0))
            )
            assert "off its own forward's" in deviates(model)


def test_hidden_states_are_refused(brought: Path, alone: None) -> None:
    with hub.using(Choice(str(brought), reasoning="problems", items=1, rungs=(32,))):
        for ask in (lambda: Chains(network(), [[STOP]], states=True), lambda: network().llama):  # type: ignore[arg-type]
            with pytest.raises(Skip, match="a checkpoint folder brings no data"):
                ask()


# -- methods -----------------------------------------------------------------------------------------------------------


def named(language: str) -> list[str]:
    """Methods and variants that name a task of this language."""
    from stepmark.hub.reasoning_tasks import FAMILIES as OF

    return sorted(m.id for m in plugins.methods().values() if any(t.startswith(OF[language][0]) for t in m.tasks))


RUN = {
    "problems": {"chain_of_thought", "direct_answer", "self_consistency", "tab_cot", "step_guided_reasoning",
                 "self_verification_cot", "self_eval_guided_decoding", "phi_decoding", "likelihood_beam",
                 "thinkless_terminator", "forced_thinking", "convergence_point"},
    "countdown": {"chain_of_thought", "tree_of_thoughts", "trusted_chains", "random_strategy"},
    "deduction": {"chain_of_thought", "self_consistency", "selection_inference", "lambada", "cop_deductive", "natural_program"},
}  # fmt: skip
REFUSED: dict[str, dict[str, str]] = {
    "problems": {"best_of_n": "a verifier", "weighted_vote": "a verifier", "learn_to_stop": "data"},
    "countdown": {"meta_reasoner": "data"},
    "deduction": {},
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_method_runs_or_is_skipped_with_a_reason(asked: Callable[[str], hub.Made], language: str) -> None:
    """Within its budget, with texts that the check accepts; nothing fails."""
    made = asked(language)
    judge = Judge(made.task.id)
    inputs = judge.inputs(2, 0)
    ran, skipped = set[str](), dict[str, str]()
    papers = [name for name in named(language) if plugins.methods()[name].base is None]
    for name in dict.fromkeys((*papers, *RUN[language], *REFUSED[language])):
        assert made.task.id in plugins.methods()[name].tasks
        try:
            runner = _runner(name, made.task.id)
            call = runner.run(inputs, 48, 0)
        except Skip as reason:
            skipped[name] = str(reason)
            continue
        assert 0 < call.spent <= 2 * 48
        judge.check(inputs, call.outputs)
        assert all(metric in judge.score(inputs, call.outputs, 0) for metric in made.task.metrics)
        ran.add(name)
    assert RUN[language] <= ran, skipped
    assert all("\n" not in reason and len(reason) < 160 for reason in skipped.values())
    for name, why in REFUSED[language].items():
        assert why in skipped[name], (name, skipped.get(name))


def test_a_search_is_skipped_where_it_begins_to_ask_a_verifier(asked: Callable[[str], hub.Made]) -> None:
    """At a rung with room for one chain it writes that, as it does everywhere."""
    made = asked("problems")
    inputs = Judge(made.task.id).inputs(1, 0)
    assert _runner("a_star_decoding", made.task.id).run(inputs, 64, 0).outputs
    with pytest.raises(Skip, match="needs a verifier"), torch.no_grad():
        _runner("a_star_decoding", made.task.id).run(inputs, 256, 0)


def _runner(name: str, task: str) -> Any:
    from stepmark.runner import Runner

    return Runner(plugins.methods()[name], task, "smoke", show_progress=False)


def test_greedy_chains_are_greedy_decoding(asked: Callable[[str], hub.Made], brought: Path) -> None:
    """`chain_of_thought`, token for token, is the likeliest id by whole forwards of the model itself."""
    from transformers import AutoModelForCausalLM

    made = asked("problems")
    own, speech = AutoModelForCausalLM.from_pretrained(brought).eval(), source.speech()
    inputs = Judge(made.task.id).inputs(2, 0)
    found = _runner("chain_of_thought", made.task.id).run(inputs, 12, 0)
    for ids, text in zip(inputs["question"], found.outputs, strict=True):
        whole = [*ids, *encode("<cot>")]
        while len(whole) < len(ids) + 13 and whole[-1] != EOS:
            whole.append(int(speech.heard(plain(own, speech.told(whole).tokens)[: speech.size]).argmax()))
        assert text == whole[len(ids) + 1 :]
    assert found.spent == sum(map(len, found.outputs))


def test_a_cell_is_measured_and_counted_like_an_embedded_one(asked: Callable[[str], hub.Made]) -> None:
    """With the audit: no flag, a row for each token, and NFE-equivalents from one token of the model."""
    made = asked("problems")
    found = run.measure(Cell("chain_of_thought", made.task.id, 48, 0, "smoke"), timing=False, show_progress=False)
    assert (found.status, found.message, found.flags) == ("ok", None, [])
    assert found.task == "checkpoint/tiny_problems" and found.checkpoint
    assert set(found.quality) == set(made.task.metrics)
    assert found.counts["nfe"] == pytest.approx(found.quality["written"].value)
    assert found.counts["nfe_equivalent"] > found.counts["nfe"]  # a prompt has hundreds of tokens


def test_records_are_known_without_the_folder(asked: Callable[[str], hub.Made], alone: None) -> None:
    for language in LANGUAGES:
        task = scored_as("reasoning", f"checkpoint/tiny_{language}_bfloat16")
        mine = next(t for _, t in plugins.tasks().values() if t.dataset == language)
        assert task["unit"] == mine.unit and next(iter(task["metrics"])) == next(iter(mine.metrics))
        assert task["metrics"].items() <= mine.metrics.items()  # without those of some questions only
    brought: Any = record.Record.model_construct(
        checkpoint="ab", track="reasoning", task="checkpoint/tiny_countdown", method="tree_of_thoughts"
    )
    assert admission.from_folders([brought])["checkpoint/tiny_countdown"][1].metrics["written"] == "lower"


def test_a_name_that_looks_like_a_language_is_none() -> None:
    plain_one, asked_one = Choice("/x/tiny_problems"), Choice("/x/tiny", reasoning="problems")
    assert asked_one.id == "checkpoint/tiny_problems" != plain_one.id
    assert scored_as("reasoning", Choice("/x/my_countdown", reasoning="problems").id) == scored_as(
        "reasoning", asked_one.id
    )


def test_another_language_is_another_checkpoint(brought: Path, alone: None) -> None:
    seen = set()
    for language in LANGUAGES:
        with hub.using(Choice(str(brought), reasoning=language, items=1, rungs=(32,))) as made:
            seen |= {made.task.checkpoint, hub.digests.of_inputs(made)}
            assert f"--reasoning {language}" in made.task.words
    assert len(seen) == 2 * len(LANGUAGES)


def test_the_check_refuses_what_is_no_text(asked: Callable[[str], hub.Made]) -> None:
    made = asked("problems")
    judge, batch = Judge(made.task.id), {"question": [question("problems")]}
    top = SIZE + source.speech().size
    judge.check(batch, [[top - 1, DIGITS[3], EOS]])
    for wrong in ([[top]], [[]], [[EOS, EOS]], [[1.0]], [], [[STOP] * 401]):
        with pytest.raises(BadOutput):
            judge.check(batch, wrong)


# -- what cannot be done is said in one line ---------------------------------------------------------------------------


def refused(choice: Choice) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as found, hub.using(choice):
        pass
    text = str(found.value)
    assert "\n" not in text and len(text) < 330, text
    return text


def test_a_folder_without_a_tokenizer_is_refused(brought: Path, tmp_path: Path, alone: None) -> None:
    shutil.copytree(brought, tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer.json" in refused(Choice(str(tmp_path / "mute"), reasoning="problems"))


def test_a_context_that_is_too_short_is_refused(brought: Path, tmp_path: Path, alone: None) -> None:
    shutil.copytree(brought, tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 300}))
    text = refused(Choice(str(tmp_path / "short"), reasoning="problems"))
    assert "than the 300 that it sees at once" in text and "longer context" in text


def test_merged_digits_are_refused_where_numbers_are_read(tmp_path: Path, alone: None) -> None:
    merged = tuple(str(number) for number in range(10, 800))
    saved(tmp_path / "merged", tokenizer=spelling(r" ?[A-Za-z]+|[0-9]{1,3}|\n+|[^A-Za-z0-9\n]", merged))
    for language in ("problems", "countdown"):
        text = refused(Choice(str(tmp_path / "merged"), reasoning=language))
        assert "for each part of '12'" in text and "--reasoning deduction" in text
    with hub.using(Choice(str(tmp_path / "merged"), reasoning="deduction", items=1, rungs=(32,))) as made:
        assert made.task.id == "checkpoint/merged_deduction"


def test_words_that_are_no_tokens_are_refused(reader: Path) -> None:
    """A tokenizer of letters."""
    config = reader / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    assert "'Answer'" in refused(Choice(str(reader), reasoning="problems"))
    assert "tokens of their own" in refused(Choice(str(reader), reasoning="deduction"))


def test_options_of_decoding_are_refused(brought: Path, made: Path, alone: None) -> None:
    for option, more in (
        ("--draft", {"draft": str(made / "draft")}),
        ("--chat", {"chat": True}),
        ("--temperature", {"temperature": 0.5}),
        ("--new-tokens", {"new_tokens": 5}),
        ("--prompts", {"prompts": "a.txt"}),
    ):
        assert refused(Choice(str(brought), reasoning="problems", **more)).startswith(option)  # type: ignore[arg-type]
    assert "makes images" in refused(Choice(str(made / "dit"), reasoning="problems"))


def test_a_recurrent_model_is_refused(tmp_path: Path, alone: None) -> None:
    FAMILIES["lfm2"] = {"layer_types": ["conv", "full_attention"]}
    try:
        saved(tmp_path / "recurrent", "lfm2")
    finally:
        del FAMILIES["lfm2"]
    assert "recurrent state" in refused(Choice(str(tmp_path / "recurrent"), reasoning="problems"))


def test_the_command_line(brought: Path, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "--backbone", str(brought), "--reasoning", "countdown", "--tier", "smoke", "--no-timing"]
    more = ["--method", "chain_of_thought", "--rung", "32", "--results", str(tmp_path / "results"), "--items", "2"]
    assert main([*asked, *more]) == 0
    out = capsys.readouterr()
    assert "Countdown with three and four numbers by LlamaForCausalLM in tiny" in out.err
    written = list((tmp_path / "results").rglob("*.jsonl"))
    assert [path.name for path in written if path.parent.name == "reasoning"] == ["chain_of_thought.jsonl"]
    assert main(["run", "--reasoning", "problems"]) == 2
    assert "--reasoning is for a checkpoint of your own" in capsys.readouterr().err
    assert main([*asked, "--via", "lm-eval"]) == 2
    assert "leave out --reasoning" in capsys.readouterr().err
    assert main([*asked[:5], "--method", "lambada"]) == 2  # of another language
    assert "lambada does not apply" in capsys.readouterr().err


def test_words_of_all_languages_are_words_of_the_track() -> None:
    """What is told in English is there: no piece stands for a word that was renamed."""
    for language, pieces in english.PIECES.items():
        assert set(pieces) <= set(WORDS), language
        assert len({piece.strip().lower() for piece in pieces.values()}) == len(pieces), language
    assert {*deduction.CONCEPTS, *deduction.NAMES} <= set(WORDS)
    told = [*english.ADJECTIVES, *english.NAMES]
    assert len({word.lower() for word in told}) == len(told)
    assert not {word.lower() for word in told} & {
        piece.strip().lower() for piece in english.PIECES["deduction"].values()
    }
