"""Zero-shot classification: a class is the mean direction of its prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES = ("{}", "a {}", "a picture of a {}", "a photo of a {}.")


@torch.no_grad()
def class_embeddings(
    embed_texts: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """(C, E) unit vectors: the mean over templates of normalised embeddings, normalised again (open_clip
    `zero_shot_classifier.py:62-63`)."""
    prompts = [template.format(name) for name in names for template in templates]
    vectors = F.normalize(embed_texts(prompts), dim=-1).unflatten(0, (len(names), len(templates)))
    return F.normalize(vectors.mean(1), dim=-1)


def accuracy(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int], at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """`top-k` accuracy of the nearest classes."""
    truth = torch.tensor(labels)
    top = (image_NE @ class_CE.T).topk(min(max(at), len(class_CE)), dim=1).indices.cpu()
    hit = top == truth[:, None]
    return {f"top-{k}": hit[:, :k].any(1).float().mean().item() for k in at}


def per_class(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each class that occurs: how many pictures, their top-1 accuracy, and what the others are taken for most; worst first."""
    guesses = (image_NE @ class_CE.T).argmax(1).tolist()
    found: dict[int, list[int]] = {}
    for true, guess in zip(labels, guesses, strict=True):
        found.setdefault(true, []).append(guess)
    rows: dict[str, dict[str, Any]] = {}
    for true, given in found.items():
        wrong = Counter(guess for guess in given if guess != true).most_common(1)
        row = {"samples": len(given), "top-1": given.count(true) / len(given)}
        rows[names[true]] = row | {"taken for": names[wrong[0][0]] if wrong else None}
    return dict(sorted(rows.items(), key=lambda item: item[1]["top-1"]))


def confusions(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int]) -> dict[tuple[int, int], int]:
    """(true class, predicted class) -> how often, mistakes only, most frequent first."""
    found: dict[tuple[int, int], int] = {}
    for true, guess in zip(labels, (image_NE @ class_CE.T).argmax(1).tolist(), strict=True):
        if true != guess:
            found[true, guess] = found.get((true, guess), 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))
