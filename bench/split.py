"""Simulates how the CPU walker splits its work over many cores, for machines that are not available.

    python bench/split.py                     # 2 sockets of 64 cores, GPT-2 124M
    python bench/split.py --chunks 500000     # a model of 2 billion params

Threads take pieces as in csrc/cpu/threads.cpp: first their own share in order, then the far half of the share with the
most pieces left. A claim costs one atomic operation, on the thread's own cache line or on another core's. A thread
without work reads the cache line of every thread. Two other splits are simulated for comparison: one shared counter,
whose cache line moves from core to core, and a fixed split. The costs are those of a large server, in nanoseconds.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable

OWN_LINE, OTHERS_LINE = 10.0, 150.0  # ns of an atomic operation on a cache line of this core, of another core
SCAN = 20.0  # ns per cache line that a thread without work reads; these loads overlap

CHUNK, PIECE_CHUNKS = 4096, 16  # elements of a chunk, and the most chunks of a piece

Speeds = list[float]  # ns per piece, by thread


def chunks_per_piece(chunks: int, threads: int) -> int:
    """As in csrc/cpu/threads.cpp: at least 32 pieces for each thread if there are enough chunks."""
    return max(1, min(chunks // (32 * threads), PIECE_CHUNKS))


def shares(pieces: int, speeds: Speeds) -> tuple[float, int]:
    """Own shares, then stealing. Returns the time until the last piece is done, and the number of steals."""
    threads = len(speeds)
    left = [[i * pieces // threads, (i + 1) * pieces // threads] for i in range(threads)]
    ready = [(0.0, i) for i in range(threads)]
    end, steals = 0.0, 0
    while ready:
        now, thread = heapq.heappop(ready)
        first, last = left[thread]
        cost = OWN_LINE
        if first == last:
            slowest = max(range(threads), key=lambda i: left[i][1] - left[i][0])
            begin, stop = left[slowest]
            cost = SCAN * threads + OTHERS_LINE
            if begin == stop:
                end = max(end, now + SCAN * threads)
                continue
            middle = begin + (stop - begin) // 2
            left[slowest][1] = middle
            left[thread] = [middle, stop]
            steals += 1
        left[thread][0] += 1
        heapq.heappush(ready, (now + cost + speeds[thread], thread))
    return end, steals


def counter(pieces: int, speeds: Speeds) -> tuple[float, int]:
    """One shared counter, and pieces of a quarter of the size. Claims are serialised."""
    pieces, speeds = 4 * pieces, [speed / 4 for speed in speeds]
    ready = [(0.0, i) for i in range(len(speeds))]
    free = end = 0.0
    for _ in range(pieces):
        now, thread = heapq.heappop(ready)
        free = max(free, now) + OTHERS_LINE
        done = free + speeds[thread]
        end = max(end, done)
        heapq.heappush(ready, (done, thread))
    return end, 0


def fixed(pieces: int, speeds: Speeds) -> tuple[float, int]:
    """Equal shares without stealing."""
    return max(pieces / len(speeds) * speed for speed in speeds), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=30450, help="of 4,096 elements each; GPT-2 124M has 30,450")
    parser.add_argument("--gbps", type=float, default=500.0, help="bandwidth of the whole machine")
    options = parser.parse_args()
    per_piece = chunks_per_piece(options.chunks, options.threads)
    pieces = -(-options.chunks // per_piece)
    # ns per piece and thread when all threads share the bandwidth: AdamW in float32 moves 28 bytes per element
    piece = per_piece * CHUNK * 28 / options.gbps * options.threads
    generator = random.Random(0)
    spread = [piece * generator.uniform(0.9, 1.1) for _ in range(options.threads)]
    states: dict[str, Speeds] = {
        "equal threads": [piece] * options.threads,
        "threads within 10 %": spread,
        "one thread at half speed": [2 * piece, *spread[1:]],
        "half the threads at half speed": [speed * (1 + i % 2) for i, speed in enumerate(spread)],
    }
    splits: dict[str, Callable[[int, Speeds], tuple[float, int]]] = {
        "shares and stealing": shares,
        "one shared counter": counter,
        "fixed": fixed,
    }
    print(f"{options.threads} threads, {pieces} pieces of {piece / 1000:.1f} µs; time over the ideal time")
    for state, speeds in states.items():
        ideal = pieces / sum(1 / speed for speed in speeds)
        for name, split in splits.items():
            end, steals = split(pieces, speeds)
            print(f"{state:31} {name:20} {end / ideal:5.2f}" + (f"  {steals} steals" if steals else ""))


if __name__ == "__main__":
    main()
