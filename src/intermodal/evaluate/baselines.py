"""What guessing the captions of any captioned pictures gives: to be read beside what a model scores on them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data.source import Sample
from ..inputs.image import open_image
from .scenes import nearest_by_pixels

SIDE = 32
"""Raw pixels are compared at this size."""


def caption_baselines(samples: Sequence[Sample], seed: int = 0) -> dict[str, float]:
    """Shares of a random half's pictures whose first caption is found, out of all different ones, with the other half to learn from.

    Chance; the most common caption; the likeliest one by its words alone, without the picture (text only); that of the nearest
    picture by raw pixels; and a reader who knows every word of the true caption and not their order (bag of words).
    """
    order = list(samples)
    random.Random(seed).shuffle(order)
    known, asked = order[: len(order) // 2], order[len(order) // 2 :]
    if not known:
        return {}
    captions = sorted({sample.texts[0] for sample in samples})
    true = [sample.texts[0] for sample in asked]
    common = Counter(sample.texts[0] for sample in known)
    words = Counter(word for sample in known for word in sample.texts[0].split())
    total = sum(words.values()) + len(words)

    def likelihood(caption: str) -> float:
        return float(np.mean([np.log((words[word] + 1) / total) for word in caption.split()] or [-np.inf]))

    nearest = nearest_by_pixels([_small(sample) for sample in asked], [_small(sample) for sample in known], SIDE)
    bags = [(caption, set(caption.split())) for caption in captions]
    fits = {caption: sum(bag <= own for _, bag in bags) for caption, own in bags}
    likeliest = max(captions, key=likelihood)
    return {
        "chance": 1 / len(captions),
        "most common": true.count(common.most_common(1)[0][0]) / len(true),
        "text only": true.count(likeliest) / len(true),
        "nearest raw pixels": float(np.mean([known[at].texts[0] == text for at, text in zip(nearest.tolist(), true, strict=True)])),
        "bag of words": float(np.mean([1 / fits[text] for text in true])),
    }


def _small(sample: Sample) -> np.ndarray:
    return np.asarray(open_image(sample.image).resize((SIDE, SIDE)))
