"""Questions about a scene, each with the one right answer that follows from its facts."""

from __future__ import annotations

from dataclasses import dataclass

from .facts import NUMBERS, OPPOSITE, Facts, plural

KINDS = ("count", "where", "colour", "sign")
SIGN_QUESTION = "what does the sign say ?"


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def questions(facts: Facts) -> list[Question]:
    """Every question of `KINDS` that the scene answers.

    Nothing in a question gives its answer away: counting asks in the plural whatever the number, and of two things each is asked for.
    """
    out = []
    for group in facts.groups:
        out.append(Question("count", f"how many {plural(group.noun)} are there ?", NUMBERS[group.count]))
        if group.colour:
            out.append(Question("colour", f"what colour is the {group.noun} ?", group.colour))
    if facts.relation:
        first, second = facts.groups[0].noun, facts.groups[1].noun
        out.append(Question("where", f"where is the {first} ?", f"{facts.relation} the {second}"))
        out.append(Question("where", f"where is the {second} ?", f"{OPPOSITE[facts.relation]} the {first}"))
    if facts.word:
        out.append(Question("sign", SIGN_QUESTION, facts.word))
    return out
