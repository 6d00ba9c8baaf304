"""`intermodal eval`: any source, two tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from ..data.loader import ENDLESS
from ..data.readers import open_source
from ..data.source import Reject
from ..data.stream import StreamSource, first_samples
from ..errors import IntermodalError
from ..models.clip import DualEncoder
from ..weights.load import load_encoder
from .retrieval import recall
from .zeroshot import TEMPLATES, accuracy, class_embeddings, per_class

CHUNK = 256


def evaluate_source(
    model: str | DualEncoder,
    spec: str,
    task: str,
    *,
    classes: Path | None = None,
    templates: Sequence[str] | None = None,
    count: int = 1000,
    by_class: bool = False,
    allow_urls: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores of a model on a source; zero-shot with `by_class` also for each class, worst first.

    Retrieval scores every caption of a sample; pictures that share one count as its positives. Zero-shot takes a sample's first
    caption as its class. Unusable samples are counted under `rejected`. `scenes:` means held-out
    combinations in the training styles.

    Raises:
        IntermodalError: an unknown task, no usable sample, or a caption that is not among the classes.
    """
    if task not in ("retrieval", "zeroshot"):
        raise IntermodalError(f"unknown task {task!r}: retrieval or zeroshot")
    encoder = load_encoder(model) if isinstance(model, str) else model
    source = _held_out(spec, encoder.config.vision.image_size, allow_urls)
    images, captions, rejected = [], [], 0
    chunk: list[Any] = []
    total = count if isinstance(source, StreamSource) or len(source) >= ENDLESS else min(count, len(source))
    for sample in track(first_samples(source, total), "embedding", total, disable=not progress, transient=True):
        if isinstance(sample, Reject):
            rejected += 1
            continue
        chunk.append(sample.image)
        captions.append(sample.texts)
        if len(chunk) == CHUNK:
            images.append(encoder.embed_images(chunk))
            chunk = []
    images += [encoder.embed_images(chunk)] if chunk else []
    if not captions:
        raise IntermodalError(f"{spec}: none of its first {total} samples is usable")
    import torch

    image = torch.cat(images)
    scores: dict[str, Any] = {"samples": len(captions), "rejected": rejected}
    if task == "zeroshot":
        names = (
            list(dict.fromkeys(line.strip() for line in classes.read_text().splitlines() if line.strip()))
            if classes
            else sorted({t[0] for t in captions})
        )
        number = {name: i for i, name in enumerate(names)}
        absent = sorted({t[0] for t in captions} - set(names))
        if absent:
            raise IntermodalError(f"{classes}: {len(absent)} captions are not among the classes, the first: {absent[0]!r}")
        vectors = class_embeddings(encoder.embed_texts, names, templates or TEMPLATES)
        labels = [number[t[0]] for t in captions]
        scores |= {"classes": len(names)} | accuracy(image, vectors, labels)
        return scores | ({"per class": per_class(image, vectors, labels, names)} if by_class else {})
    return scores | retrieval_scores(image, encoder, captions)


def retrieval_scores(image_NE, encoder: DualEncoder, captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Recall@1/5/10 both ways over every caption of every picture, as CLIP_benchmark counts it (`zeroshot_retrieval.py:evaluate`).

    A caption that several pictures have is one text with several positives: CLIP_benchmark would count each copy as a mistake of
    the others.

    Args:
        captions: for each picture all its captions.
    """
    texts = list(dict.fromkeys(text for own in captions for text in own))
    number = {text: i for i, text in enumerate(texts)}
    texts_of = [[number[text] for text in own] for own in captions]
    return recall(image_NE, encoder.embed_texts(texts), texts_of)


def _held_out(spec: str, side: int, allow_urls: bool = False):
    """A source; of composed scenes the test side, in an order that no training has."""
    from ..data.scenes import Scenes

    source = open_source(spec, side=side, allow_urls=allow_urls)
    return Scenes(replace(source.config, split="test", seed=777)) if isinstance(source, Scenes) else source
