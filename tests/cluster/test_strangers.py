"""Whoever connects and is no friend: garbage, oversized frames, half connections and wrong tokens on every socket."""

import contextlib
import glob
import os
import socket
import struct
import time

import pytest
from chaos_helpers import node_answer, wait_until_nothing_is_left
from conftest import STORE_BYTES, assert_no_leaks, remember_nodes, run_program

import ray
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def nodes():
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES})
    second = cluster.add_node(num_cpus=2, resources={"second": 1}, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    remember_nodes()
    yield cluster.head_node, second, cluster
    ray.shutdown()
    cluster.shutdown()
    assert_no_leaks()


@ray.remote
def add(x):
    return x + 1


@ray.remote(num_cpus=0)
class Counter:
    def __init__(self):
        self.value = 0

    def next(self):
        self.value += 1
        return self.value


def frame(length=None, kind=1, flags=0, correlation=0, header=b"", header_length=None, payload=b""):
    """A frame, with lengths that may lie."""
    length = 16 + len(header) + len(payload) if length is None else length
    header_length = len(header) if header_length is None else header_length
    return struct.pack("<IHHQI", length, kind, flags, correlation, header_length) + header + payload


HELLO = frame(kind=0, flags=0x8000, header=b"HELI" + struct.pack("<HH", 1, 1))
PIECES = {
    "nothing": b"",
    "one byte": b"x",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "random": os.urandom(100_000),
    "oversized": frame(length=0xFFFFFFFF),
    "over the limit": frame(length=1 << 30, kind=0, flags=0x8000),
    "too short": frame(length=3),
    "header beyond frame": frame(length=20, header_length=1000),
    "truncated": frame(length=1000, header=b"abc"),
    "hello without end": HELLO[:10],
    "hello and unknown kind": HELLO + frame(kind=60_000, header=b"\x08\x01"),
    "hello and garbage": HELLO + os.urandom(10_000),
    "hello and oversized": HELLO + frame(length=0xFFFFFFF0, kind=1),
    "frame before hello": frame(kind=1, header=b"\x08\x01"),
    **{f"hello and kind {kind} of garbage": HELLO + frame(kind=kind, header=b"\xff" * 50) for kind in range(1, 80)},
    **{f"hello and kind {kind} of nothing": HELLO + frame(kind=kind) for kind in range(1, 80)},
}


def attack(connect):
    """Sends every piece over a connection of its own, and keeps some open to see that nobody waits for them."""
    kept = []
    for name, piece in PIECES.items():
        peer = connect()
        peer.settimeout(1.0)
        with contextlib.suppress(OSError):
            peer.sendall(piece)
        if name.startswith("hello and kind"):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR)
        kept.append(peer)
        if len(kept) > 10:
            kept.pop(0).close()
    return kept


def unix(path):
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(2)
    # Paths of sockets are limited to 107 bytes; the directory's descriptor makes it a short one.
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        peer.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)
    return peer


def still_works(actor, value, head, second):
    assert ray.get([add.remote(i) for i in range(20)], timeout=20) == list(range(1, 21))
    assert ray.get(add.options(resources={"second": 0.1}).remote(1), timeout=20) == 2
    assert ray.get(actor.next.remote(), timeout=20) == value
    assert ray.get(Counter.options(resources={"second": 0.1}).remote().next.remote(), timeout=20) == 1
    assert head.live_processes() and second.live_processes()
    assert len([n for n in ray.nodes() if n["Alive"]]) == 2


def test_garbage_on_the_tcp_ports(nodes):
    head, second, _ = nodes
    actor = Counter.options(resources={"second": 0.1}).remote()
    assert ray.get(actor.next.remote(), timeout=30) == 1
    pids = [head.pid("raylet"), head.pid("gcs_server"), second.pid("raylet")]
    for value, node in enumerate((head, second), 2):
        kept = attack(lambda: socket.create_connection((node.host, node.port), timeout=2))  # noqa: B023
        still_works(actor, value, head, second)
        for peer in kept:
            peer.close()
    assert pids == [head.pid("raylet"), head.pid("gcs_server"), second.pid("raylet")]
    del actor
    wait_until_nothing_is_left()


def test_garbage_on_every_unix_socket(nodes):
    head, second, _ = nodes
    actor = Counter.options(resources={"second": 0.1}).remote()
    near = Counter.remote()
    assert ray.get([actor.next.remote(), near.next.remote()], timeout=30) == [1, 1]
    ray.get([add.remote(i) for i in range(20)], timeout=20)
    pids = [head.pid("raylet"), head.pid("gcs_server"), second.pid("raylet")]
    paths = sorted(glob.glob(os.path.join(head.session_directory, "sockets", "*")))
    names = [os.path.basename(path) for path in paths]
    assert "gcs" in names and len([name for name in names if name.startswith("raylet-")]) == 2
    assert len(names) >= 6, names
    attacked = 0
    for path in paths:
        try:
            kept = attack(lambda: unix(path))  # noqa: B023
        except (FileNotFoundError, ConnectionRefusedError):
            continue  # That worker left of itself meanwhile.
        attacked += 1
        for peer in kept:
            peer.close()
        assert pids == [head.pid("raylet"), head.pid("gcs_server"), second.pid("raylet")], path
    assert attacked >= 5
    still_works(actor, 2, head, second)
    assert ray.get(near.next.remote(), timeout=20) == 2
    del actor, near
    wait_until_nothing_is_left()


def test_a_slow_stranger_is_dropped_and_many_are_borne(nodes):
    head, second, _ = nodes
    actor = Counter.remote()
    assert ray.get(actor.next.remote(), timeout=30) == 1
    peers = [socket.create_connection((head.host, head.port), timeout=2) for _ in range(200)]
    for peer in peers[::2]:
        with contextlib.suppress(OSError):
            peer.sendall(b"\x10")
    still_works(actor, 2, head, second)
    # A connection that proves nothing is ended by the node within its handshake limit.
    deadline = time.monotonic() + 30
    for peer in peers[:5]:
        peer.settimeout(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionResetError):
            while peer.recv(4096):
                pass
    for peer in peers:
        peer.close()
    assert node_answer("stats")["links"] < 100
    del actor
    wait_until_nothing_is_left()


@pytest.mark.parametrize("token", ["f" * 64, "1" * 64])
def test_a_wrong_token_is_refused(nodes, token):
    head, second, cluster = nodes
    result = run_program(
        "import ray, sys\ntry:\n    ray.init(address=sys.argv[1])\n    print('came in')\n"
        "except ray.exceptions.AuthenticationError as error:\n    print('refused', error)\n",
        cluster.address,
        environment={"RAY_AUTH_TOKEN": token},
    )
    assert "refused" in result.stdout and "came in" not in result.stdout
    assert token not in result.stdout + result.stderr


def test_a_node_with_a_wrong_token_cannot_join(nodes):
    _, _, cluster = nodes
    started = time.monotonic()
    result = run_program(
        "import sys\nfrom ray._private.node import start_node\n"
        "try:\n    node = start_node({'num_cpus': 1}, head_address=sys.argv[1])\n    print('came in')\n"
        "except Exception as error:\n    print('refused', type(error).__name__, error)\n",
        cluster.address,
        environment={"RAY_AUTH_TOKEN": "f" * 64, "RAY_START_TIMEOUT_S": "10"},
    )
    assert "refused" in result.stdout, result.stdout + result.stderr
    assert "token" in result.stdout
    assert time.monotonic() - started < 15
    assert len([n for n in ray.nodes() if n["Alive"]]) == 2
