"""What stands for media in a rendered conversation, as text: which item each is, and what a family writes in its place."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .media import MediaError, Plan


def rendered_order(text: str, kinds: Sequence[str], names: dict[str, str]) -> list[int]:
    """Numbers of the media of a conversation, counted from 0 as they stand in the messages, in the order in which a template wrote their
    placeholders. Each kind's own order is kept, as transformers pairs them: LLaVA-OneVision's writes a message's pictures before its clips.
    Where the counts differ all stay as they are, and `rewrite` tells.

    Args:
        kinds: of the media, as they stand in the messages.
        names: the placeholder token of each kind, as text.
    """
    named = {name: kind for kind, name in names.items()}
    there = [named[name] for name in re.findall("|".join(map(re.escape, named)), text)] if named else []
    if sorted(there) != sorted(kinds):
        return list(range(len(kinds)))
    numbers = {kind: iter([number for number, other in enumerate(kinds) if other == kind]) for kind in set(kinds)}
    return [next(numbers[kind]) for kind in there]


def rewrite(
    text: str, spans: Sequence[tuple[int, int]], plans: Sequence[Plan], names: dict[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """Put the text of items that have one in the place of their placeholder, and move `spans` (characters) along.

    Args:
        names: the placeholder token of each kind, as text.

    Raises:
        MediaError: the rendered text holds another number of placeholders than there are items.
    """
    kinds = {name: kind for kind, name in names.items()}
    found = list(re.finditer("|".join(map(re.escape, kinds)), text)) if kinds else []
    given, there = [plan.kind for plan in plans], [kinds[match.group()] for match in found]
    if there != given:  # as many of each kind, in the order of the messages
        raise MediaError(
            f"the rendered conversation has the media placeholders {there}, the messages give {given}; does a text part contain a "
            f"placeholder token itself, or does the template drop or reorder media?"
        )
    edits: list[tuple[int, int, str]] = []
    for index, (match, plan) in enumerate(zip(found, plans, strict=True)):
        if plan.boundary:
            after = text[match.end() : match.end() + 1]
            if index + 1 < len(found) and found[index + 1].start() == match.end():
                end = ""  # the next item brings it
            else:
                end = plan.boundary if after in "<" or after.isspace() else f"{plan.boundary} "
            edits.append((match.start(), match.end(), plan.boundary + match.group() + end))
        if plan.text is None:
            continue
        start = match.start() - plan.instead.index(match.group())
        stop = start + len(plan.instead)
        if text[max(start, 0) : stop] != plan.instead:
            raise MediaError(f"the template does not write a {plan.kind} as {plan.instead!r}, which this model's format replaces")
        edits.append((start, stop, plan.text))

    def moved(at: int) -> int:
        return at + sum(len(new) - (stop - start) for start, stop, new in edits if stop <= at)

    out, read = "", 0
    for start, stop, new in edits:
        out, read = out + text[read:start] + new, stop
    return out + text[read:], [(moved(start), moved(stop)) for start, stop in spans]
