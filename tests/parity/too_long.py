"""A conversation that does not fit, for every family that sees: what is said of it, and what is left out when asked."""

import re
from dataclasses import replace

import pytest

from intermodal.generate.engine import TooLong
from intermodal.models.generative import Generative


def check_too_long(model, first, more, monkeypatch):
    """The error counts every item as it is in the prompt; with `drop_oldest` the older turn goes, with its media, and the reply is that
    to the rest alone.

    Args:
        first: user and assistant, with media.
        more: a user's turn.
    """
    talk, processor = [*first, more], model.processor
    whole = processor.conversation(talk, reply=True)
    wanted = model.generate([more], max_new_tokens=3)
    short = replace(model.config_text, context=len(whole.ids))
    monkeypatch.setattr(Generative, "config_text", property(lambda self: short))
    with pytest.raises(TooLong) as caught:
        model.generate(talk, max_new_tokens=3)
    said = re.search(r"has (\d+) tokens \((.*)\), the model's context", str(caught.value))
    counts = dict(part.split(": ") for part in said[2].split(", "))
    text = int(counts.pop("text"))
    each = {kind: [len(plan) for plan in whole.plans if plan.kind == kind] for kind in ("image", "video")}
    assert counts == {f"{kind} {number}": str(length) for kind in each for number, length in enumerate(each[kind], 1)}
    assert text + sum(map(int, counts.values())) == int(said[1]) == len(whole.ids)
    assert counts
    kept = model.generate(talk, max_new_tokens=3, too_long="drop_oldest")
    assert (kept.ids, kept.usage["prompt_tokens"]) == (wanted.ids, wanted.usage["prompt_tokens"])
