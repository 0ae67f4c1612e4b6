"""The continuous cache: a language model that points back to the words it has just read (Grave et al.,
arXiv:1612.04426)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

THETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def cache_weights(hidden: Tensor, start: int, stop: int, theta: float, window: int) -> Tensor:
    """How much the outputs start..stop of a text look back at each of those before: softmax of theta h_t . h_i over
    the last window ones. hidden: [N, H]; returns [stop - start, stop - first] with first = max(0, start - window);
    each line sums to one, but that of the very first output, which has none before it, to nothing."""
    first = max(0, start - window)
    scores = theta * hidden[start:stop] @ hidden[first:stop].t()
    places = torch.arange(first, stop, device=hidden.device)
    lag = places[start - first :, None] - places
    visible = (lag >= 1) & (lag <= window)
    return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)


def cache_probabilities(
    hidden: Tensor, following: Tensor, words: int, theta: float, window: int, block: int = 256
) -> Iterator[Tensor]:
    """For block after block of a text, the cache's probability of each word [block, words]: an output that looks back
    at an earlier one points to the word that followed that. hidden: [N, H]; following: int64 [N]."""
    for start in range(0, len(hidden), block):
        stop = min(start + block, len(hidden))
        weights = cache_weights(hidden, start, stop, theta, window)
        seen = following[stop - weights.shape[1] : stop]
        yield weights.new_zeros(stop - start, words).index_add_(1, seen, weights)


def mixed(model: Tensor, cache: Tensor, filled: Tensor, share: float) -> Tensor:
    """(1 - share) of the model's probabilities and share of the cache's; the model's alone where the cache is not
    filled yet. All [N], or model and cache [N, words] and filled [N, 1]."""
    share_now = share * filled
    return (1 - share_now) * model + share_now * cache


@dataclass(frozen=True)
class Scored:
    """The probabilities that model and cache gave to the words that came, and whether the cache held any: all [N]."""

    model: Tensor
    cache: Tensor
    filled: Tensor

    def nats(self, share: float) -> float:
        """Mean negative log-probability under the mixture."""
        return -mixed(self.model, self.cache, self.filled, share).log().mean().item()


@torch.no_grad()
def score(decode: Callable[[Tensor], Tensor], hidden: Tensor, following: Tensor, theta: float, window: int) -> Scored:
    """decode: the model's outputs [block, H] to its probabilities [block, words]; one block at a time, since those of
    a whole text over a whole vocabulary would fill the memory."""
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
    """The theta, the share and the nats per word of the mixture that fits a (validation) text best."""
    tried = []
    for theta in THETAS:
        scored = score(decode, hidden, following, theta, window)
        tried += [(scored.nats(share), theta, share) for share in SHARES]
    nats, theta, share = min(tried)
    return theta, share, nats
