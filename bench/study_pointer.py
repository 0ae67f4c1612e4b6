"""The continuous cache pointer: it raises the probability of words that the model has just read.

Source: Grave et al., arXiv:1612.04426.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

THETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def cache_weights(hidden: Tensor, start: int, stop: int, theta: float, window: int) -> Tensor:
    """The weights of earlier outputs for each of the outputs start..stop: softmax of theta h_t . h_i over the last
    `window` outputs.

    hidden: [N, H]. Returns [stop - start, stop - first] with first = max(0, start - window). Each row sums to 1, except
    that of the first output of the text: it has no earlier output and sums to 0.
    """
    first = max(0, start - window)
    scores = theta * hidden[start:stop] @ hidden[first:stop].t()
    places = torch.arange(first, stop, device=hidden.device)
    lag = places[start - first :, None] - places
    visible = (lag >= 1) & (lag <= window)
    return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)


def cache_probabilities(
    hidden: Tensor, following: Tensor, words: int, theta: float, window: int, block: int = 256
) -> Iterator[Tensor]:
    """The cache's probability of each word, [block, words] for one block of the text after the other. The weight of an
    earlier output counts for the word that followed it. hidden: [N, H]. following: int64 [N]."""
    for start in range(0, len(hidden), block):
        stop = min(start + block, len(hidden))
        weights = cache_weights(hidden, start, stop, theta, window)
        seen = following[stop - weights.shape[1] : stop]
        yield weights.new_zeros(stop - start, words).index_add_(1, seen, weights)


def mixed(model: Tensor, cache: Tensor, filled: Tensor, share: float) -> Tensor:
    """(1 - share) times the model's probabilities plus share times the cache's; the model's alone while the cache is
    empty. All [N], or model and cache [N, words] and filled [N, 1]."""
    share_now = share * filled
    return (1 - share_now) * model + share_now * cache


@dataclass(frozen=True)
class Scored:
    """For each word of a text: its probability by the model and by the cache, and 1 if the cache held any word, else 0.
    All [N]."""

    model: Tensor
    cache: Tensor
    filled: Tensor

    def nats(self, share: float) -> float:
        """Mean negative log-probability under the mixture."""
        return -mixed(self.model, self.cache, self.filled, share).log().mean().item()


@torch.no_grad()
def score(decode: Callable[[Tensor], Tensor], hidden: Tensor, following: Tensor, theta: float, window: int) -> Scored:
    """Scores a text. decode: maps the model's outputs [block, H] to its probabilities [block, words].

    It works on one block at a time, because the probabilities of a whole text would not fit in memory.
    """
    model, cache, filled = [], [], []
    start = 0
    words = decode(hidden[:1]).shape[1]
    for cached in cache_probabilities(hidden, following, words, theta, window):
        block = slice(start, start + len(cached))
        target = following[block, None]
        model.append(decode(hidden[block]).gather(1, target)[:, 0])
        cache.append(cached.gather(1, target)[:, 0])
        filled.append((cached.sum(1) > 0).to(cached.dtype))
        start += len(cached)
    return Scored(torch.cat(model), torch.cat(cache), torch.cat(filled))


def tune(
    decode: Callable[[Tensor], Tensor], hidden: Tensor, following: Tensor, window: int
) -> tuple[float, float, float]:
    """Tries all THETAS and SHARES on a validation text. Returns the best theta, its share and its nats per word."""
    tried = []
    for theta in THETAS:
        scored = score(decode, hidden, following, theta, window)
        tried += [(scored.nats(share), theta, share) for share in SHARES]
    nats, theta, share = min(tried)
    return theta, share, nats
