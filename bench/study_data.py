"""The study's data: small data sets that come with Python and scikit-learn, larger ones from files."""

from __future__ import annotations

import pickle
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 20170715  # splits are the same in every run; a run's seed affects only weights, order and noise
UNKNOWN, END = "<unk>", "<end>"


@dataclass(frozen=True)
class Images:
    """Each part is (images float32 [N, C, H, W], labels int64 [N])."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def only(self, classes: range) -> Images:
        """The images of these classes only, with labels from 0."""

        def keep(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            images, labels = part
            kept = (labels >= classes.start) & (labels < classes.stop)
            return images[kept], labels[kept] - classes.start

        return Images(keep(self.train), keep(self.valid), keep(self.test))

    def first(self, count: int) -> Images:
        """At most `count` train images of each class."""
        images, labels = self.train
        kept = torch.cat([(labels == label).nonzero()[:count, 0] for label in labels.unique()])
        return Images((images[kept], labels[kept]), self.valid, self.test)


@dataclass(frozen=True)
class Corpus:
    """vocabulary: words by number. Each part: int64 [N], the text as word numbers."""

    vocabulary: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor


def checksum(*tensors: Tensor) -> str:
    """Identifies the data in the result file, so that results from other data cannot be confused with these."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy().tobytes(), value)
    return f"{value:08x}"


# ---- images


@lru_cache
def digits(longest: int) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels in -1..1 (UCI repository, E. Alpaydin and C. Kaynak).

    600 are for training, 300 for validation, the rest for the test. longest: at most this many images per part.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images = torch.from_numpy(bunch.images[:, None]).float()[order] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()[order]
    sizes = [600, 300, len(labels) - 900]
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    return Images(*((x[:longest], y[:longest]) for x, y in parts))


def find(folder: Path | None, name: str) -> Path | None:
    """The first folder in or below this one that holds the file, or None."""
    return next((path.parent for path in sorted(folder.rglob(name))), None) if folder else None


@lru_cache
def cifar10(folder: Path, valid: int = 5000) -> Images:
    """CIFAR-10 from its Python files (A. Krizhevsky, 2009), standardised by channel. The last `valid` train images are
    the validation split."""

    def read(names: Iterable[str]) -> tuple[Tensor, Tensor]:
        batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[b"labels"] for batch in batches])
        return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()

    (images, labels), (test_images, test_labels) = read(f"data_batch_{n}" for n in range(1, 6)), read(["test_batch"])
    mean = images[:-valid].mean((0, 2, 3), keepdim=True)
    deviation = images[:-valid].std((0, 2, 3), keepdim=True)
    images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
    return Images((images[:-valid], labels[:-valid]), (images[-valid:], labels[-valid:]), (test_images, test_labels))


# ---- text

BORDER = re.compile(r"[^a-z\d]*")  # table rules and underlines
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|([^\sa-z\d])\1*")


def words(text: str) -> list[str]:
    """Lower-case words, numbers, and runs of one punctuation mark."""
    lines = [line for line in text.lower().splitlines() if not BORDER.fullmatch(line.strip())]
    return [match.group() for line in lines for match in WORD.finditer(line)]


def without_repetition(topics: dict[str, str]) -> dict[str, list[str]]:
    """The words of each topic. A paragraph that occurs several times is kept once, in the longest topic that has it.

    Python's help repeats whole chapters under several names. Test text must not occur in the training text.
    """
    seen: set[tuple[str, ...]] = set()
    kept: dict[str, list[str]] = {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        for paragraph in re.split(r"\n\s*\n", text):
            found = words(paragraph)
            if found and tuple(found) not in seen:
                seen.add(tuple(found))
                kept.setdefault(name, []).extend([*found, END])
    return kept


def split_topics(topics: dict[str, list[str]], share: float = 0.1) -> Iterator[list[str]]:
    """Names of the topics for training, validation and test.

    Validation and test get about this share of the words each. No topic in them is longer than a quarter of that, so
    each covers several subjects.
    """
    total = sum(map(len, topics.values()))
    names = sorted(topics)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    rest = [names[index] for index in order]
    parts: list[list[str]] = []
    for _ in range(2):
        part: list[str] = []
        for name in list(rest):
            if len(topics[name]) <= share * total / 4 and sum(len(topics[n]) for n in part) < share * total:
                part.append(name)
                rest.remove(name)
        parts.append(part)
    yield from (rest, *parts)


def number(parts: list[list[str]], size: int | None) -> Corpus:
    """Turns words into numbers. parts: train, valid, test. The vocabulary is the most frequent words of train."""
    counts = Counter(parts[0])
    common = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = [UNKNOWN, *(word for word in common if word != UNKNOWN)][:size]
    index = {word: place for place, word in enumerate(vocabulary)}
    return Corpus(vocabulary, *(torch.tensor([index.get(word, 0) for word in part]) for part in parts))


@lru_cache
def python_topics(size: int, longest: int) -> Corpus:
    """The help texts of the running Python (pydoc_data.topics). Some of them differ between Python versions.

    size: words in the vocabulary. longest: at most this many words per part.
    """
    from pydoc_data import topics

    texts = without_repetition(topics.topics)
    parts = [[word for name in names for word in texts[name]][:longest] for names in split_topics(texts)]
    return number(parts, size)


@lru_cache
def wikitext2(folder: Path) -> Corpus:
    """WikiText-2 from its word-level files (Merity et al., arXiv:1609.07843), with its own vocabulary."""
    parts = [(folder / f"wiki.{part}.tokens").read_text(encoding="utf-8") for part in ("train", "valid", "test")]
    return number([text.replace("\n", f" {END} ").split() for text in parts], None)
