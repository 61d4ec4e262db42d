"""Keeps the control plane of a detached head node running: starts it, and starts it again when it crashes.

`ray start --head` leaves this process behind, because nothing else that outlives the command could do it. It is run as
``python -S -E supervisor.py`` with JSON on standard input and imports nothing of `ray`. SIGTERM ends it and the control
plane. It gives up, and ends, when the control plane crashes too often.
"""

import json
import os
import signal
import subprocess
import sys
import time

RESTARTS_LIMIT = 20
WINDOW_S = 60.0


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[19])


def note(path: str, pid: int) -> None:
    """Writes the control plane's process into the node's record, by which `ray stop` finds it."""
    try:
        with open(path) as file:
            record = json.load(file)
        record["processes"]["gcs_server"] = {"pid": pid, "start_time": start_time(pid)}
    except (OSError, ValueError):
        return  # The starter has not written the record yet; it asks for the pid itself.
    temporary = f"{path}.{os.getpid()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(record, file)
    os.replace(temporary, path)


def main() -> int:
    """Runs until SIGTERM."""
    job = json.loads(sys.stdin.buffer.read())
    with open("/proc/self/comm", "w") as comm:
        comm.write("ray-supervisor")
    child = None

    def leave(*_: object) -> None:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    starts: list[float] = []
    try:
        while True:
            now = time.monotonic()
            starts = [at for at in starts if now - at < WINDOW_S] + [now]
            if len(starts) > RESTARTS_LIMIT:
                print(
                    f"the control plane ended {RESTARTS_LIMIT} times within {WINDOW_S:.0f} s: giving up",
                    file=sys.stderr,
                )
                return 1
            if len(starts) > 3:
                time.sleep(min(1.0, 0.01 * 2 ** (len(starts) - 3)))
            child = subprocess.Popen(job["command"], stdin=subprocess.PIPE, cwd="/")
            # The pid comes first, so that it can be found whatever happens next.
            with open(job["pid_path"] + ".tmp", "w") as file:
                file.write(str(child.pid))
            os.replace(job["pid_path"] + ".tmp", job["pid_path"])
            note(job["record_path"], child.pid)
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps(job["config"]).encode())
                child.stdin.close()
            except BrokenPipeError:
                pass
            status = child.wait()
            print(f"gcs_server (pid {child.pid}) ended with status {status}; it is started again", file=sys.stderr)
            sys.stderr.flush()
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


if __name__ == "__main__":
    sys.exit(main())
