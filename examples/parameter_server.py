"""A parameter server: workers compute gradients of a shared model, servers keep its shards.

A softmax regression is trained on handwriting-like data that the program makes. Each server actor keeps a part of the
weights; workers read all parts as read-only NumPy arrays that lie in shared memory and are not copied, and send back
gradients. The program checks that the model learnt, that it equals a training without actors, and that reads shared
memory.

    python examples/parameter_server.py [--workers 2] [--steps 60]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import ray

FEATURES, CLASSES = 784, 10


def make_data(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of ten blurred patterns with noise, and their classes."""
    random = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).normal(size=(CLASSES, FEATURES)).astype(np.float32)
    labels = random.integers(CLASSES, size=rows)
    return patterns[labels] + 3 * random.normal(size=(rows, FEATURES)).astype(np.float32), labels


def gradient(weights: np.ndarray, pictures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of the mean cross-entropy by the weights."""
    scores = pictures @ weights
    scores -= scores.max(axis=1, keepdims=True)
    chances = np.exp(scores)
    chances /= chances.sum(axis=1, keepdims=True)
    chances[np.arange(len(labels)), labels] -= 1
    return pictures.T @ chances / len(labels)


def accuracy(weights: np.ndarray, pictures: np.ndarray, labels: np.ndarray) -> float:
    """Share of the pictures whose class is told right."""
    return float(((pictures @ weights).argmax(axis=1) == labels).mean())


@ray.remote(num_cpus=0)
class Server:
    """Keeps some rows of the weights."""

    def __init__(self, rows: int, rate: float) -> None:
        self.weights = np.zeros((rows, CLASSES), dtype=np.float32)
        self.rate = rate

    def apply(self, *gradients: np.ndarray) -> np.ndarray:
        """Takes one step with the mean of the gradients. Returns the new weights."""
        self.weights = self.weights - self.rate * np.mean(gradients, axis=0)
        return self.weights

    def read(self) -> np.ndarray:
        """The weights."""
        return self.weights


@ray.remote
class Worker:
    """Computes gradients on its share of the data, which it reads from shared memory without a copy."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray, shards: int) -> None:
        self.pictures, self.labels, self.shards = pictures, labels, shards

    def is_shared(self) -> bool:
        """Whether the data is a read-only view rather than a copy."""
        return not self.pictures.flags.writeable and not self.pictures.flags.owndata

    def gradients(self, *parts: np.ndarray) -> list[np.ndarray] | np.ndarray:
        """The gradient of each shard."""
        whole = gradient(np.concatenate(parts), self.pictures, self.labels)
        # A call with one return returns the value itself.
        return np.array_split(whole, self.shards) if self.shards > 1 else whole


def train_serial(shares: list[tuple[np.ndarray, np.ndarray]], steps: int, rate: float) -> np.ndarray:
    """The same training as a plain loop."""
    weights = np.zeros((FEATURES, CLASSES), dtype=np.float32)
    for _ in range(steps):
        weights = weights - rate * np.mean([gradient(weights, x, y) for x, y in shares], axis=0)
    return weights


def main() -> int:
    """Trains, checks, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8000)
    arguments = parser.parse_args()
    rate = 0.05
    pictures, labels = make_data(arguments.rows)
    shares = list(zip(np.array_split(pictures, arguments.workers), np.array_split(labels, arguments.workers)))

    ray.init(num_cpus=max(2, arguments.workers))
    sizes = [len(part) for part in np.array_split(np.arange(FEATURES), arguments.servers)]
    servers = [Server.remote(size, rate) for size in sizes]
    workers = [Worker.remote(ray.put(x), ray.put(y), arguments.servers) for x, y in shares]
    if not all(ray.get([worker.is_shared.remote() for worker in workers])):
        print("WRONG: a worker copied its data")
        return 1
    started = time.perf_counter()
    parts = [server.read.remote() for server in servers]
    for _ in range(arguments.steps):
        # Nothing is fetched here: references go from workers to servers and back.
        made = [w.gradients.options(num_returns=arguments.servers).remote(*parts) for w in workers]
        made = [[m] for m in made] if arguments.servers == 1 else made
        parts = [server.apply.remote(*[m[i] for m in made]) for i, server in enumerate(servers)]
    weights = np.concatenate(ray.get(parts))
    distributed_s = time.perf_counter() - started
    ray.shutdown()

    started = time.perf_counter()
    expected = train_serial(shares, arguments.steps, rate)
    serial_s = time.perf_counter() - started
    test_pictures, test_labels = make_data(2000, seed=1)
    reached = accuracy(weights, test_pictures, test_labels)
    if not np.allclose(weights, expected, atol=1e-5):
        print(f"WRONG: weights differ by {np.abs(weights - expected).max()}")
        return 1
    if reached < 0.9:
        print(f"WRONG: the model did not learn: {reached:.1%}")
        return 1
    print(f"{arguments.steps} steps: {reached:.1%} of unseen pictures are told right, equal to the serial training")
    print(f"distributed {distributed_s:.2f} s, serial {serial_s:.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
