"""`intermodal eval`: any source, two tasks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from ..data.loader import ENDLESS
from ..data.readers import open_source
from ..data.source import Apart, Reject, Sample, Source
from ..data.stream import StreamSource, first_samples
from ..errors import IntermodalError, SampleError
from ..inputs.image import open_image
from ..models.clip import DualEncoder
from .embed import encoder_on, problems_of
from .retrieval import recall
from .templates import TEMPLATES, checked
from .zeroshot import ClassNames, accuracy, class_embeddings, per_class

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 16
"""Pictures that are held at full size: so many are decoded, embedded and dropped."""
OF_ENDLESS = 1000
"""Samples of a source that has no end, where nothing else is asked for."""
TOLD = 5
"""Rejected samples that the result names, besides all files that could not be read."""


def evaluate_source(
    model: str | DualEncoder,
    spec: str,
    task: str,
    *,
    classes: Path | None = None,
    templates: Sequence[str] | None = None,
    count: int | None = None,
    by_class: bool = False,
    allow_urls: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores of a model on a source; zero-shot with `by_class` also for each class, worst first.

    Retrieval scores every caption of a sample; pictures that share one count as its positives. Zero-shot takes a sample's first
    caption as its class; the classes are those of the whole source, however many samples are scored. Unusable samples and files are
    counted under `rejected` and the first are named under `rejects`. `scenes:` means held-out combinations in the training styles.

    Args:
        classes: a file of class names (`ClassNames`) instead of the source's captions. A tar's `.cls` without a `.txt` is the number of
            one of its lines, the first being 0, as CLIP_benchmark's `classnames.txt` has it.
        count: of a source that ends so many samples, drawn at random and the same at every call; None: all. Of a source that does not end
            the first ones; None: 1000.

    Raises:
        IntermodalError: an unknown task, settings of the other one, a template without {}, no usable sample, or a caption that is not
            among the classes.
    """
    _check(task, {"classes": classes, "templates": templates, "by class": by_class})
    templates = checked(templates or TEMPLATES)
    named = ClassNames.read(classes) if classes else None
    encoder = encoder_on(model, device)
    source = _held_out(spec, encoder.config.vision.image_size, allow_urls, named.lines if named else None)
    rejects = problems_of(source)
    known: list[str] = []
    if isinstance(source, StreamSource) or len(source) >= ENDLESS:
        whole, total = None, count or OF_ENDLESS
        samples = first_samples(source, total)
    else:
        whole = len(source)
        chosen = _chosen(whole, count)
        total = len(chosen)
        if task == "zeroshot" and named is None:
            known = _classes(source, range(whole))
        elif named is not None:  # a label without a name is told before all is embedded
            named.numbers(_classes(source, chosen))
        samples = _samples(source, chosen)
    images, captions = _embedded(encoder, track(samples, "embedding", total, disable=not progress, transient=True), rejects)
    if not captions:
        why = f"; the first: {rejects[0].key}: {rejects[0].reason}" if rejects else ""
        raise IntermodalError(f"{spec}: none of {total} samples is usable{why}")
    import torch

    image = torch.cat(images)
    files = len(problems_of(source))
    scores: dict[str, Any] = {"samples": len(captions), "of": whole, "rejected": len(rejects)}
    if rejects:
        scores["rejects"] = [asdict(reject) for reject in rejects[: files + TOLD]]
    if task == "zeroshot":
        labels = [texts[0] for texts in captions]
        return scores | _zero_shot(image, encoder, labels, named or ClassNames.plain(known or labels), templates, by_class)
    return scores | retrieval_scores(image, encoder, captions)


def _check(task: str, zero_shot: Mapping[str, Any]) -> None:
    """Raises IntermodalError: an unknown task, or retrieval with a setting that only zero-shot has."""
    if task not in ("retrieval", "zeroshot"):
        raise IntermodalError(f"unknown task {task!r}: retrieval or zeroshot")
    given = [name for name, value in zero_shot.items() if value]
    if task == "retrieval" and given:
        raise IntermodalError(f"{' and '.join(given)}: only zero-shot has that; give --task zeroshot, or leave it out")


def _zero_shot(
    image_NE: Tensor, encoder: DualEncoder, labels: Sequence[str], named: ClassNames, templates: Sequence[str], by_class: bool
) -> dict[str, Any]:
    """Accuracy over all pictures, and with `by_class` of each class."""
    vectors = class_embeddings(encoder.embed_texts, named.names, templates)
    numbers = named.numbers(labels)
    scores = {"classes": len(named.names)} | accuracy(image_NE, vectors, numbers)
    return scores | ({"per class": per_class(image_NE, vectors, numbers, named.names)} if by_class else {})


def _embedded(encoder: DualEncoder, samples: Iterable[Any], rejects: list[Reject]) -> tuple[list[Tensor], list[Any]]:
    """Embeddings of pictures, (CHUNK, E) each, and a caption list for each picture; samples that are rejects go to `rejects`."""
    images: list[Tensor] = []
    captions: list[Any] = []
    chunk: list[Any] = []
    for sample in samples:
        if isinstance(sample, Reject):
            rejects.append(sample)
            continue
        chunk.append(sample.image)
        captions.append(sample.texts)
        if len(chunk) == CHUNK:
            images.append(encoder.embed_images(chunk))
            chunk = []
    images += [encoder.embed_images(chunk)] if chunk else []
    return images, captions


def retrieval_scores(image_NE, encoder: DualEncoder, captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Recall@1/5/10 both ways over every caption of every picture, as CLIP_benchmark counts it (`zeroshot_retrieval.py:evaluate`).

    A caption that several pictures have is one text with several positives: CLIP_benchmark would count each copy as a mistake of
    the others.

    Args:
        captions: for each picture all its captions.
    """
    texts = list(dict.fromkeys(text for own in captions for text in own))
    number = {text: i for i, text in enumerate(texts)}
    positives = [[number[text] for text in own] for own in captions]
    return recall(image_NE, encoder.embed_texts(texts), positives)


def _chosen(length: int, count: int | None) -> Sequence[int]:
    """All numbers below `length`, or `count` random ones in rising order: the first of a sorted folder are of few classes."""
    return range(length) if count is None or count >= length else sorted(random.Random(length).sample(range(length), count))


def _samples(source: Source, chosen: Sequence[int]) -> Iterator[Sample | Reject]:
    for index in chosen:
        try:
            sample = source[index]
            sample.image = open_image(sample.image)
        except SampleError as error:
            yield Reject(f"{source.name}/{index}", str(error))
            continue
        yield sample


def _classes(source: Source, numbers: Sequence[int]) -> list[str]:
    """The first captions of samples, each once, sorted; samples without one are left out here and rejected later."""
    found = set()
    for index in numbers:
        try:
            found.add((source.captions_at(index) if isinstance(source, Apart) else source[index].texts)[0])
        except SampleError:
            continue
    return sorted(found)


def _held_out(spec: str, side: int, allow_urls: bool = False, classes: Sequence[str] | None = None):
    """A source; of composed scenes the test side, in an order that no training has."""
    from ..data.scenes import Scenes

    source = open_source(spec, side=side, allow_urls=allow_urls, classes=classes)
    return Scenes(replace(source.config, split="test", seed=777)) if isinstance(source, Scenes) else source
