"""Recall@k between two sets of embeddings, in tiles: 100k x 100k never becomes a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

TILE = 2048


@torch.no_grad()
def ranks(queries_QE: Tensor, items_NE: Tensor, positives: Sequence[Sequence[int]], tile: int = TILE) -> Tensor:
    """(Q,) for each query, how many items score strictly better than its best positive: rank 0 is a hit at 1.

    Of items that score exactly as the positive, those with a smaller number count as better, as a stable descending sort has it. All
    scores are of one product, tile by tile, a positive's too: taken in another way it would differ by a rounding, and of equal items one
    would be before the others.

    Args:
        queries_QE, items_NE: embeddings; the score is their product.
        positives: for each query the item numbers that are right.

    Raises:
        ValueError: a query has no positive, or a positive is not an item.
        InputError: embeddings that are not finite, which have no order.
    """
    if len(positives) != len(queries_QE):
        raise ValueError(f"{len(positives)} lists of positives for {len(queries_QE)} queries")
    for query, right in enumerate(positives):
        if not right or min(right) < 0 or max(right) >= len(items_NE):
            raise ValueError(f"query {query} has positives {list(right)[:5]}; it needs at least one among {len(items_NE)} items")
    for name, vectors in (("queries", queries_QE), ("items", items_NE)):
        wrong = torch.nonzero(~vectors.isfinite().all(1)).flatten().tolist()
        if wrong:
            raise InputError(
                f"{len(wrong)} of {len(vectors)} {name} have embeddings that are not finite, the first is number {wrong[0]}"
            )
    found = [
        _ranks_of_tile(queries_QE[start : start + tile], items_NE, positives[start : start + tile], tile)
        for start in range(0, len(queries_QE), tile)
    ]
    return torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.long)


def _ranks_of_tile(queries: Tensor, items: Tensor, positives: Sequence[Sequence[int]], tile: int) -> Tensor:
    best, at = _best_positive(queries, items, positives, tile)
    better = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    for low in range(0, len(items), tile):
        scores = queries @ items[low : low + tile].T
        better += (scores > best[:, None]).sum(1)
        numbers = torch.arange(low, low + scores.shape[1], device=scores.device)
        better += ((scores == best[:, None]) & (numbers < at[:, None])).sum(1)
    return better


def _best_positive(queries: Tensor, items: Tensor, positives: Sequence[Sequence[int]], tile: int) -> tuple[Tensor, Tensor]:
    """Score and number of each query's best positive; the smallest number among equals. Tiles without a positive are left out."""
    counts = torch.tensor([len(right) for right in positives])
    row = torch.arange(len(queries)).repeat_interleave(counts).to(queries.device)
    number = torch.tensor([one for right in positives for one in right], device=queries.device)
    score = torch.empty(len(number), dtype=queries.dtype, device=queries.device)
    for low in range(0, len(items), tile):
        inside = torch.nonzero((number >= low) & (number < low + tile)).squeeze(1)
        if len(inside):
            score[inside] = (queries @ items[low : low + tile].T)[row[inside], number[inside] - low]
    best = score.new_full((len(queries),), -torch.inf).scatter_reduce(0, row, score, "amax")
    least = torch.where(score == best[row], number, len(items))
    return best, number.new_full((len(queries),), len(items)).scatter_reduce(0, row, least, "amin")


def recall(
    image_NE: Tensor, text_ME: Tensor, texts_of_image: Sequence[Sequence[int]], at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall both ways; a picture may have any number of captions, and a caption any number of pictures.

    Args:
        texts_of_image: for each picture the numbers of its captions.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k`: how often any of the positives is among the first k.

    Raises:
        ValueError: a picture without a caption, or a caption without a picture.
    """
    images_of_text: list[list[int]] = [[] for _ in range(len(text_ME))]
    for image, texts in enumerate(texts_of_image):
        for text in texts:
            images_of_text[text].append(image)
    to_text = ranks(image_NE, text_ME, texts_of_image)
    to_image = ranks(text_ME, image_NE, images_of_text)
    out = {f"image_to_text_recall@{k}": (to_text < k).float().mean().item() for k in at}
    return out | {f"text_to_image_recall@{k}": (to_image < k).float().mean().item() for k in at}
