"""`intermodal eval`: any source, two tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from ..data.loader import ENDLESS
from ..data.readers import open_source
from ..data.source import Sample
from ..data.stream import StreamSource
from ..errors import IntermodalError, SampleError
from ..inputs.image import open_image
from ..models.clip import DualEncoder
from ..weights.load import load_encoder
from .retrieval import recall
from .zeroshot import TEMPLATES, accuracy, class_embeddings, per_class

CHUNK = 256


def usable(source, count: int) -> Iterator[Sample | SampleError]:
    """Up to `count` samples with their pictures decoded, or the error of each that cannot be used."""
    for index in range(count if isinstance(source, StreamSource) else min(count, len(source))):
        try:
            sample = source.next() if isinstance(source, StreamSource) else source[index]
            sample.image = open_image(sample.image)
            yield sample
        except SampleError as error:
            yield error


def evaluate_source(
    model: str | DualEncoder,
    spec: str,
    task: str,
    *,
    classes: Path | None = None,
    templates: Sequence[str] | None = None,
    count: int = 1000,
    by_class: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores of a model on a source; zero-shot with `by_class` also for each class, worst first.

    Pictures that share a caption count as positives of it. Unusable samples are counted under `rejected`. `scenes:` means held-out
    combinations in the training styles.

    Raises:
        IntermodalError: an unknown task, no usable sample, or a caption that is not among the classes.
    """
    if task not in ("retrieval", "zeroshot"):
        raise IntermodalError(f"unknown task {task!r}: retrieval or zeroshot")
    encoder = load_encoder(model) if isinstance(model, str) else model
    source = _held_out(spec, encoder.config.vision.image_size)
    images, captions, rejected = [], [], 0
    chunk: list[Any] = []
    total = count if isinstance(source, StreamSource) or len(source) >= ENDLESS else min(count, len(source))
    for sample in track(usable(source, total), "embedding", total, disable=not progress, transient=True):
        if isinstance(sample, SampleError):
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
            [line.strip() for line in classes.read_text().splitlines() if line.strip()]
            if classes
            else sorted({t[0] for t in captions})
        )
        absent = sorted({t[0] for t in captions} - set(names))
        if absent:
            raise IntermodalError(f"{classes}: {len(absent)} captions are not among the classes, the first: {absent[0]!r}")
        vectors = class_embeddings(encoder.embed_texts, names, templates or TEMPLATES)
        labels = [names.index(t[0]) for t in captions]
        scores |= {"classes": len(names)} | accuracy(image, vectors, labels)
        return scores | ({"per class": per_class(image, vectors, labels, names)} if by_class else {})
    return scores | retrieval_scores(image, encoder, captions)


def retrieval_scores(image, encoder: DualEncoder, captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Recall both ways over distinct captions; a caption of several pictures has several positives."""
    from .retrieval import ranks

    texts = list(dict.fromkeys(text for own in captions for text in own[:1]))
    number = {text: i for i, text in enumerate(texts)}
    text = encoder.embed_texts(texts)
    pictures: list[list[int]] = [[] for _ in texts]
    for row, own in enumerate(captions):
        pictures[number[own[0]]].append(row)
    if all(len(rows) == 1 for rows in pictures):
        return recall(image, text, [rows[0] for rows in pictures], at=(1, 5, 10))
    to_text = ranks(image, text, [[number[own[0]]] for own in captions])
    to_image = ranks(text, image, pictures)
    out = {f"image_to_text_recall@{k}": (to_text < k).float().mean().item() for k in (1, 5, 10)}
    return out | {f"text_to_image_recall@{k}": (to_image < k).float().mean().item() for k in (1, 5, 10)}


def _held_out(spec: str, side: int):
    """A source; of composed scenes the test side, in an order that no training has."""
    from ..data.scenes import Scenes

    source = open_source(spec, side=side)
    return Scenes(replace(source.config, split="test", seed=777)) if isinstance(source, Scenes) else source
