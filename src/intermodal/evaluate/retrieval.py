"""Recall@k between two sets of embeddings, in tiles: 100k x 100k never becomes a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 2048


@torch.no_grad()
def ranks(queries_QE: Tensor, items_NE: Tensor, positives: Sequence[Sequence[int]], tile: int = TILE) -> Tensor:
    """(Q,) for each query, how many items score strictly better than its best positive: rank 0 is a hit at 1.

    Of items that score exactly as the positive, those with a smaller number count as better, as a stable descending sort has it.

    Args:
        queries_QE, items_NE: embeddings; the score is their product.
        positives: for each query the item numbers that are right.

    Raises:
        ValueError: a query has no positive, or a positive is not an item.
    """
    if len(positives) != len(queries_QE):
        raise ValueError(f"{len(positives)} lists of positives for {len(queries_QE)} queries")
    for query, right in enumerate(positives):
        if not right or min(right) < 0 or max(right) >= len(items_NE):
            raise ValueError(f"query {query} has positives {list(right)[:5]}; it needs at least one among {len(items_NE)} items")
    out = torch.empty(len(queries_QE), dtype=torch.long)
    for start in range(0, len(queries_QE), tile):
        queries = queries_QE[start : start + tile]
        best, at = _best_positive(queries, items_NE, positives[start : start + tile])
        better = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        for low in range(0, len(items_NE), tile):
            scores = queries @ items_NE[low : low + tile].T
            # a positive's own score is taken from the same product, so that rounding cannot make it beat itself
            inside = (at >= low) & (at < low + scores.shape[1])
            rows = torch.nonzero(inside).squeeze(1)
            scores[rows, at[rows] - low] = best[rows]
            numbers = torch.arange(low, low + scores.shape[1], device=scores.device)
            better += ((scores > best[:, None]) | ((scores == best[:, None]) & (numbers[None] < at[:, None]))).sum(1)
        out[start : start + len(queries)] = better.cpu()
    return out


def _best_positive(queries: Tensor, items: Tensor, positives: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Score and number of each query's best positive; the smallest number among equals."""
    most = max(len(right) for right in positives)
    padded = torch.tensor(
        [[*sorted(right), *[sorted(right)[0]] * (most - len(right))] for right in positives], device=queries.device
    )
    scores = torch.stack([(queries * items[padded[:, column]]).sum(1) for column in range(most)], dim=1)
    best, column = scores.max(1)
    return best, padded.gather(1, column[:, None]).squeeze(1)


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
