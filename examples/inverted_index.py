"""An inverted index with TF-IDF over every module of Python's standard library.

Map tasks read and split the files, a shuffle sends each term's counts to one of several reducers, and an actor keeps a
progress bar and running totals. The same index is then built serially in this process and compared term by term.

    python examples/inverted_index.py [--mappers 8] [--reducers 4] [--query json parser]
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import math
import os
import re
import sysconfig
import time

import ray
from ray.experimental import tqdm_ray

WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,}")
Counts = dict[str, int]
Postings = dict[str, dict[str, float]]
Part = dict[str, Counts]


def standard_library() -> list[str]:
    """Every .py file of this interpreter's standard library, but not of packages installed beside it."""
    root = sysconfig.get_path("stdlib")
    paths = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if d not in ("site-packages", "__pycache__"))
        paths += [os.path.join(directory, name) for name in sorted(names) if name.endswith(".py")]
    return paths


def count_words(path: str) -> Counts:
    """How often each word is in a file, in lower case."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return collections.Counter(word.lower() for word in WORD.findall(file.read()))


def reducer_of(term: str, reducers: int) -> int:
    """Which reducer has a term. Not `hash`, which differs between processes."""
    return int.from_bytes(hashlib.blake2s(term.encode(), digest_size=4).digest(), "big") % reducers


def weigh(term_counts: dict[str, Counts], documents: int) -> Postings:
    """TF-IDF of each term in each document that has it. `term_counts`: term -> {document: count}."""
    index: Postings = {}
    for term, counts in term_counts.items():
        rarity = math.log(documents / len(counts))
        index[term] = {path: (1 + math.log(count)) * rarity for path, count in counts.items()}
    return index


@ray.remote(num_cpus=0)
class Progress:
    """A progress bar, and running totals of what the mappers have read."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm_ray.tqdm(total=total, desc="reading", unit="file", flush_interval_s=0.5)
        self.files = self.words = 0

    def add(self, files: int, words: int) -> None:
        """Counts what a mapper has read."""
        self.files += files
        self.words += words
        self.bar.update(files)

    def totals(self) -> tuple[int, int]:
        """(files, words)."""
        self.bar.close()
        return self.files, self.words


@ray.remote
def map_files(
    paths: list[str], reducers: int, progress: ray.actor.ActorHandle
) -> list[dict[str, Counts]] | dict[str, Counts]:
    """Counts the words of some files. Returns one part for each reducer: term -> {document: count}."""
    parts: list[dict[str, Counts]] = [{} for _ in range(reducers)]
    files = words = 0
    for path in paths:
        counts = count_words(path)
        files += 1
        words += sum(counts.values())
        for term, count in counts.items():
            parts[reducer_of(term, reducers)].setdefault(term, {})[path] = count
        if files >= 50:
            progress.add.remote(files, words)
            files = words = 0
    # The last totals must be counted before this task is done.
    ray.get(progress.add.remote(files, words))
    # A task with one return returns the value itself.
    return parts if reducers > 1 else parts[0]


@ray.remote
def reduce_terms(documents: int, *parts: dict[str, Counts]) -> Postings:
    """Joins the parts of one reducer and weighs them."""
    joined: dict[str, Counts] = {}
    for part in parts:
        for term, counts in part.items():
            joined.setdefault(term, {}).update(counts)
    return weigh(joined, documents)


def build_distributed(paths: list[str], mappers: int, reducers: int) -> tuple[Postings, tuple[int, int]]:
    """The index, and (files, words) as the actor counted them."""
    progress = Progress.remote(len(paths))
    # Files are dealt out like cards, so that large directories do not end up in one mapper.
    shares = [paths[start::mappers] for start in range(mappers)]
    maps = [map_files.options(num_returns=reducers).remote(share, reducers, progress) for share in shares]
    columns = [[parts] for parts in maps] if reducers == 1 else maps
    reduced = [reduce_terms.remote(len(paths), *[column[r] for column in columns]) for r in range(reducers)]
    index: Postings = {}
    for part in ray.get(reduced):
        index.update(part)
    return index, ray.get(progress.totals.remote())


def build_serial(paths: list[str]) -> tuple[Postings, int]:
    """The same index by a plain loop, and the number of words."""
    joined: dict[str, Counts] = {}
    words = 0
    for path in paths:
        counts = count_words(path)
        words += sum(counts.values())
        for term, count in counts.items():
            joined.setdefault(term, {})[path] = count
    return weigh(joined, len(paths)), words


def search(index: Postings, terms: list[str], limit: int = 5) -> list[tuple[float, str]]:
    """The documents with the largest sums of weights."""
    scores: dict[str, float] = collections.defaultdict(float)
    for term in terms:
        for path, weight in index.get(term.lower(), {}).items():
            scores[path] += weight
    return sorted(((score, path) for path, score in scores.items()), reverse=True)[:limit]


def main() -> int:
    """Builds the index twice, compares, and answers a query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mappers", type=int, default=8)
    parser.add_argument("--reducers", type=int, default=4)
    parser.add_argument("--limit", type=int, default=None, help="only so many files")
    parser.add_argument("--query", nargs="+", default=["event", "loop", "coroutine"])
    arguments = parser.parse_args()

    paths = standard_library()[: arguments.limit]
    started = time.perf_counter()
    ray.init()
    init_s = time.perf_counter() - started
    started = time.perf_counter()
    index, (files, words) = build_distributed(paths, arguments.mappers, arguments.reducers)
    distributed_s = time.perf_counter() - started
    ray.shutdown()

    started = time.perf_counter()
    expected, expected_words = build_serial(paths)
    serial_s = time.perf_counter() - started

    # Dictionaries compare by content, so the order in which documents arrived does not matter; sums were not reordered.
    if index != expected or (files, words) != (len(paths), expected_words):
        missing = expected.keys() - index.keys()
        print(f"WRONG: {len(index)} terms instead of {len(expected)}, {len(missing)} missing; totals {files} {words}")
        return 1
    print(f"{files} files, {words} words, {len(index)} terms: the distributed index equals the serial one")
    print(f"start of the cluster {init_s:.2f} s, distributed {distributed_s:.2f} s, serial {serial_s:.2f} s")
    print(f"best for {' '.join(arguments.query)!r}:")
    root = sysconfig.get_path("stdlib")
    for score, path in search(index, arguments.query):
        print(f"  {score:8.2f}  {os.path.relpath(path, root)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
