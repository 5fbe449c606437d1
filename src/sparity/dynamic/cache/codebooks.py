"""Product quantisation: parts of a vector as numbers of the centroids that lie nearest (Jegou et al. 2011)."""

import torch
from torch import Tensor


def codebooks(vectors: Tensor, parts: int, bits: int, iterations: int) -> Tensor:
    """k-means of each part of some vectors, float32 `[parts, centroids, width / parts]`.

    Lloyd's algorithm. Centroids begin at vectors spaced evenly over all, so that nothing is drawn; one that no vector
    is nearest to stays where it is.

    Args:
        vectors: `[tokens, width]`, at least one; `parts` divides the width.
        parts: into which each is cut.
        bits: `2 ** bits` centroids of each part, or as many as there are vectors.
        iterations: of k-means.
    """
    cut = vectors.float().reshape(len(vectors), parts, -1).transpose(0, 1)  # [parts, tokens, width / parts]
    count = min(2**bits, len(vectors))
    books = cut[:, torch.arange(count, device=vectors.device) * len(vectors) // count].clone()
    for _ in range(iterations):
        found = nearest(vectors, books).long().T  # [parts, tokens]
        sums = torch.zeros_like(books).scatter_add_(1, found[..., None].expand_as(cut), cut)
        sizes = torch.zeros(books.shape[:2], device=books.device).scatter_add_(1, found, torch.ones_like(cut[..., 0]))
        moved = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp_min(1), books)
        if torch.equal(moved, books):
            break
        books = moved
    return books


def nearest(vectors: Tensor, books: Tensor) -> Tensor:
    """Which centroid lies nearest to each part of some vectors, of equals the first: uint8 `[tokens, parts]`.

    Args:
        vectors: `[tokens, width]`.
        books: float32 `[parts, centroids, width / parts]`, 256 centroids at the most.
    """
    cut = vectors.float().reshape(len(vectors), books.shape[0], -1).transpose(0, 1)
    far = books.square().sum(-1)[:, None] - 2 * cut @ books.transpose(1, 2)  # but for each vector's own square
    return far.argmin(-1).T.to(torch.uint8)


def products(queries: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """Products of queries with the vectors that codes stand for, float32 `[queries, tokens]`, by one table per part.

    Args:
        queries: `[queries, width]`.
        codes: uint8 `[tokens, parts]`.
        books: float32 `[parts, centroids, width / parts]`.
    """
    cut = queries.float().reshape(len(queries), books.shape[0], -1).transpose(0, 1)
    tables = cut @ books.transpose(1, 2)  # [parts, queries, centroids]
    index = codes.long().T[:, None].expand(-1, len(queries), -1)
    return tables.gather(2, index).sum(0)
