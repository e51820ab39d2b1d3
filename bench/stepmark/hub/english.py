"""Reasoning in English: questions, what is asked of them, worked examples, and texts read back.

A language is one of the reasoning track's: `problems`, `countdown` or `deduction`. Its questions are told in English. What a
model is to write is told so that each word that methods look for is a piece that a tokenizer can have as one token: digits
and signs stand alone, words begin with a space. ``3 * 4 = 1 2 . ans 1 2`` is "3*4=12. Answer 12", countdown's
``4 + 6 = 1 0 left 8 , 1 0 .`` is "4+6=10:8,10;", and deduction, whose words mean nothing, has adjectives in their places:
``boris is zepa`` is " Ben is red". A format, chosen by its word, is asked for in a line and shown by examples. Of a text that
was written the words are read back by rules, and so is its answer.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stepmark.datasets import countdown, deduction, problems
from stepmark.hub.prompts import spread

LANGUAGES = {
    "problems": "arithmetic word problems",
    "countdown": "countdown, and the Game of 24",
    "deduction": "deduction from rules and facts",
}
SHOTS = 4  # worked examples of each format
DRAWN = 40  # examples that these are chosen from, so that their answers differ


@dataclass(frozen=True)
class Form:
    """How a format is asked for. `cue` stands before what is written: a line of its own where that begins with a digit."""

    asks: str
    cue: str


FORMS: dict[str, dict[str, Form]] = {
    "problems": {
        "<dir>": Form("Answer the questions at once.", "Reply:"),
        "<cot>": Form("Answer the questions. Write down every step of the calculation.", "Steps:\n"),
        "<prose>": Form("Answer the questions. Tell every step in a sentence.", "Steps:"),
        "<table>": Form("Answer the questions by tables of step, what happens, calculation and result.", "Table:\n"),
        "<think>": Form("Think about the questions and check steps again. Say Done, then the answer.", "Thoughts:\n"),
        "<find>": Form("The answers are told. Find the number X in each question.", "Steps:\n"),
        "<guided>": Form("Go on with the steps. Say what the next one is about, then write it down.", "Steps:\n"),
        "<verify>": Form(
            "Say what the last step is worth: 7 to 9 if it is right, 4 to 6 if it is not the step that was due, 0 to 2 if "
            "it is wrong, and less if a step before it is wrong.",
            "Steps:\n",
        ),
    },
    "countdown": {
        "<cot>": Form(
            "Reach the target by calculating with each number once. Behind the colon of each move stand the numbers that "
            "are left.",
            "Moves:\n",
        ),
        "<propose>": Form("Make one move, and say behind the colon which numbers are left.", "Move:\n"),
        "<value>": Form(
            "Can the target be reached by calculating with each number once? Say sure, likely or impossible.",
            "Verdict:",
        ),
    },
    "deduction": {
        "<dir>": Form("Is it true? Say true or false at once.", "Reply:"),
        "<proof>": Form(
            "Is it true? Begin with a fact, then write each rule with the new fact that it gives.", "Proof:"
        ),
        "<select>": Form("Choose the fact and the rule that lead on to the question.", "Chosen:"),
        "<infer>": Form("Say what follows.", "New:"),
        "<holds>": Form("Is there a fact that settles the question? Say it, and true or false; else unknown.", "Fact:"),
        "<rules>": Form("Name all rules that end in the last word of the question, then say done.", "Rules:"),
        "<goal>": Form("Say what has to be shown for the rule to answer the question.", "Goal:"),
        "<agree>": Form("Do the rule and the question say the same of their last word? Say yes or no.", "Verdict:"),
        "<follows>": Form("Does the last statement follow from those before it? Say yes or no.", "Verdict:"),
        "<whole>": Form("Is every step of the proof right, and the answer? Say yes or no.", "Verdict:"),
    },
}
# Words of formats within a text.
BETWEEN = {"<score>": "\nWorth:\n", "<next>": "\nNext:", "<step>": "\nStep:\n", "<proof>": "\nProof:"}

_SIGNS = {sign: sign for sign in "0123456789+-*/="}
PIECES: dict[str, dict[str, str]] = {
    "problems": {**_SIGNS, ".": ".", "|": "|", "ans": " Answer", "</think>": " Done"},
    "countdown": {**_SIGNS, ".": ";", ",": ",", "left": ":"} | {word: f" {word}" for word in countdown.VALUES},
    "deduction": {".": ".", "ans": " Answer", "isnt": " not"}
    | {word: f" {word}" for word in ("is", "true", "false", "unknown", "yes", "no", "done")},
}
# What deduction is about: more than it needs, since not every tokenizer has all of them as one token.
ADJECTIVES = (
    "red blue green black white brown pink grey golden silver cold hot warm cool wet dry big small tall short long wide "
    "narrow deep thick thin heavy light fast slow quick loud quiet soft hard smooth rough sharp flat round square strong weak "
    "rich poor young old new fresh clean dirty bright dark clear open closed full empty happy sad angry calm brave kind "
    "gentle proud shy wise clever smart foolish honest fair polite rude lazy busy tired hungry sick healthy safe dangerous "
    "simple complex easy difficult cheap expensive rare common famous popular secret public private local global "
    "foreign modern ancient early late sudden gradual steady stable solid liquid hollow bitter sweet sour salty spicy raw ripe "
    "rotten frozen broken whole perfect pure plain fancy strange normal usual random regular exact rapid brief final "
    "initial first central northern southern eastern western inner outer upper lower left right front rear direct distant "
    "close near far remote tiny huge giant massive vast great grand royal noble humble modest loyal faithful jealous "
    "curious careful careless patient eager nervous afraid bold wild tame domestic urban rural coastal tropical solar lunar "
    "digital electric magnetic nuclear chemical organic medical legal moral social political economic financial military "
    "naval civil criminal guilty innocent free bound loose tight bent straight curved parallel vertical horizontal blank "
    "visible hidden naked dressed married single double triple useful useless helpful harmful lucky lonely lovely ugly "
    "pretty beautiful handsome elegant casual formal serious funny silly crazy mad nice fine good bad evil holy "
    "sacred dead alive active passive positive negative neutral absolute relative equal similar different "
    "wooden metal plastic leather cotton glass stone paper"
).split()
NAMES = (
    "Ben Tom Anna Mary John James David Paul Peter Mark Luke Sam Max Jack Harry George Henry Charles William Robert "
    "Richard Thomas Daniel Michael Alice Emma Emily Sarah Laura Julia Lisa Maria Kate Jane Helen Rose Lucy Grace Ruth "
    "Alex Adam Simon Martin Frank Fred Joe Bob Bill Jim Tim Dan Eric Kevin Brian Steve Chris Nick Tony Andrew Anthony "
    "Matthew Jason Ryan Scott Adrian Oliver Victor Oscar Ivan Carlos Diana Linda Susan Karen Nancy Betty Carol Amy"
).split()


def spelt(words: str, pieces: Mapping[str, str]) -> str:
    """Words as a model writes them: their pieces, and a space where a number follows a word or a full stop."""
    text = ""
    for word in words.split():
        text += " " if word.isdigit() and spaced(text) else ""
        text += pieces.get(word) or piece_of(word)
    return text


def spaced(before: str) -> bool:
    """Whether a number that follows begins with a space."""
    return before[-1:].isalpha() or before[-1:] == "."


def piece_of(word: str) -> str:
    """What a word is told as that has no piece of its own."""
    return BETWEEN.get(word) or f" {word.capitalize() if word in problems.PEOPLE else word}"


def question(language: str, words: str, pieces: Mapping[str, str]) -> str:
    """A question, or whatever else stands before the word of a format, in English: some lines, the last one ended."""
    if language == "countdown":
        numbers, _, target = words.replace(" ", "").partition("->")
        return f"Numbers: {numbers}\nTarget: {target}\n"
    if language == "problems":
        return f"Question: {_sentences(words)}\n"
    context, asked, rest = words.partition(" ? ")
    goal, shown, proof = rest.partition(" <proof> ")
    told = context.split()
    statements = [spelt(" ".join(told[i : i + 3]), pieces) + "." for i in range(0, len(told), 3)]
    lines = [f"Statements:{''.join(statements)}", *([f"Question:{spelt(goal, pieces)}?"] if asked else [])]
    lines += [f"Proof:{spelt(proof, pieces)}"] if shown else []
    return "\n".join(lines) + "\n"


def _sentences(words: str) -> str:
    text = re.sub(r"(?<=\d) (?=\d)| (?=[.,?])", "", words).replace(" ans ", " Answer ")
    text = re.sub(rf"\b({'|'.join(problems.PEOPLE)})\b", lambda found: found[0].capitalize(), text)
    return re.sub(r"(^|[.?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def shown(language: str, form: str) -> list[tuple[str, str]]:
    """Worked examples of a format, prompts with the word and completions; none is of a question that is scored."""
    rng, found = random.Random(f"worked examples of {language} {form}"), list[tuple[str, str]]()
    while len(found) < DRAWN:
        prompt, completion = _DRAW[language](rng, form)
        if not _held_out(language, prompt) and prompt not in [each for each, _ in found]:
            found.append((prompt, completion))
    ends = [completion.split()[-1] for _, completion in found]
    return [found[i] for i in spread(ends, range(DRAWN), SHOTS)]


def _by_reasoners(rng: random.Random, form: str) -> tuple[str, str]:
    from stepmark.backbones.solvers import example

    while True:
        prompt, completion = example(rng, form)
        if form != "<find>" or " = " in completion:  # something is to be worked out
            return prompt, completion


def _by_countdown(rng: random.Random, form: str) -> tuple[str, str]:
    from stepmark.backbones.solvers import example

    return example(rng, "countdown" if form == "<cot>" else form)


def _by_deduction(rng: random.Random, form: str) -> tuple[str, str]:
    asked = deduction.question(rng, rng.choice((2, 3)), 1)
    if form in ("<dir>", "<proof>"):
        return f"{deduction.told(asked)} {form}", deduction.solution(asked, form)
    return deduction.module(rng, asked, form)


_DRAW: dict[str, Callable[[random.Random, str], tuple[str, str]]] = {
    "problems": _by_reasoners,
    "countdown": _by_countdown,
    "deduction": _by_deduction,
}


def _held_out(language: str, prompt: str) -> bool:
    """Whether a prompt may be of a split that is scored, as each dataset parts its own."""
    if language == "problems":
        told = prompt.partition(" ?")[0] + " ?"
    elif language == "countdown":
        told = str(countdown.read(prompt.rpartition(" ")[0])[0])
    else:
        told = prompt.partition(" <")[0]
    return zlib.crc32(told.encode()) % 10 == 0


def read_back(language: str, text: str, back: Mapping[str, str]) -> str:
    """The words of an English text, its answer found by rules. `back`: what a piece in small letters means."""
    text = text.lower().translate({0xD7: "*", 0xF7: "/", 0x2212: "-"})
    if language == "deduction":
        text = text.replace("isn't", "not").replace(" is not ", " not ")
    words = [back.get(word, word) for word in re.findall(r"</?[a-z]+>|[a-z]+|\d|[^\w\s]", text)]
    return " ".join(_answered(language, words))


def _answered(language: str, words: list[str]) -> list[str]:
    """The words up to the last answer: behind `ans`, past three others at most, a number, or true or false."""
    if "ans" not in words:
        return words
    at = len(words) - words[::-1].index("ans")
    rest = words[at:]

    def wanted(word: str) -> bool:
        return word in ("true", "false") if language == "deduction" else word.isdigit()

    start = next((k for k, word in enumerate(rest[:4]) if wanted(word)), None)
    if start is None:
        return words
    stop = next((k for k in range(start, len(rest)) if not wanted(rest[k])), len(rest))
    return [*words[:at], *rest[start : start + 1 if language == "deduction" else stop]]
