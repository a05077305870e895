"""The process beside each rank that ends it when another rank is gone.

A process and not a thread: a compiled network's kernels are launched with Python's lock held, and
such a launch blocks for ever where the GPU waits for a dead rank. It touches no GPU, needs the
standard library alone, and is run by its path (`heartbeat.watching` does).

Rank 0's watcher listens, the others connect to it. A rank that dies loses its watcher's parent,
which is certain and seen at once, however busy, stopped or deep in C code living ranks are. A
machine that is gone or cut off is seen by its silence: watchers have nothing else to do than to
beat, so theirs means what it says.

From its rank it reads lines: settings, then "left" or "ended ..."; the rank gets "verdict ...", and
"end" where it does not leave by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable

TICK_S = 0.25
BEAT_S = 2.0
# How long a watcher may be silent; sums with the waits below to less than 30 s.
SILENCE_S = 14.0
# The deaths of one machine come one after the other; they are told together.
TOGETHER_S = 1.5
# How long a rank has to leave by itself after another one died, or ended with an error that it may
# have in common with it and be writing about.
DEAD_GRACE_S, ENDED_GRACE_S = 6.0, 20.0
# How long a rank may need for "end" before it is killed.
END_S = 2.0
CAUSES = "(killed, out of memory, hanging, or the machine or its network is gone)"


def no_answer(ranks: list[int], of: int) -> str:
    """The sentence about ranks that are gone."""
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"no answer from {word} {', '.join(map(str, ranks))} of {of} {CAUSES}"


def ends_too(found: str, rank: int) -> str:
    """The line about a rank that ends because of what was found."""
    return f"{found}: rank {rank} ends too. The same command resumes"


class Line:
    """A socket or pipe that carries lines; what cannot be sent is dropped."""

    def __init__(self, reader: int, writer: int, owner: object = None) -> None:
        self._reader, self._writer, self._owner = reader, writer, owner
        self._rest = b""
        self.open = True
        self.heard_s = 0.0  # since when it is silent
        self.rank: int | None = None

    def send(self, *words: str) -> None:
        if self.open:
            with contextlib.suppress(OSError):
                os.write(self._writer, (" ".join(words) + "\n").encode())

    def read(self) -> list[str]:
        """The lines that have come; closed at the end of the file."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            try:
                data = os.read(self._reader, 65536)
            except ConnectionError:
                pass
            # Nobody who belongs here says so much without an end.
            self.open = bool(data) and len(self._rest) < 1 << 20
        self.heard_s = 0.0
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Watcher:
    """One rank's watcher, from its first connection to the end of its rank.

    Args:
        settings: rank, ranks, host, parent (process id of the rank), token, and addresses: where
            rank 0's watcher may be reached.
    """

    def __init__(self, settings: dict) -> None:
        self.rank, self.ranks = settings["rank"], settings["ranks"]
        self.parent, self.token = settings["parent"], settings["token"]
        self.addresses = settings["addresses"]
        self.hosts = {self.rank: settings["host"]}
        self.selector = selectors.DefaultSelector()
        self.me = Line(0, 1)
        os.set_blocking(0, False)
        self.selector.register(0, selectors.EVENT_READ, self.hear_rank)
        self.peers: list[Line] = []
        self.word = ""
        self.lost: set[int] = set()
        self.ended: dict[int, str] = {}
        self.tell_at = self.end_at = self.over_at = float("inf")
        self.verdict: dict | None = None
        self.beat_at = 0.0
        self.released = False

    def listen(self) -> None:
        """Rank 0's watcher: open a port and tell the rank its number."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        server.setblocking(False)

        def accept() -> None:
            with contextlib.suppress(OSError):
                self.add_peer(server.accept()[0])

        self.selector.register(server, selectors.EVENT_READ, accept)
        self.me.send("port", str(server.getsockname()[1]))

    def connect(self) -> None:
        """The others' watchers: find rank 0's, and tell the rank whether it was found."""
        hello = f"hello {self.token} {json.dumps([self.rank, self.hosts[self.rank]])}\n"
        for host, port in self.addresses:
            with contextlib.suppress(OSError):
                found = socket.create_connection((host, port), timeout=3.0)
                found.sendall(hello.encode())
                with contextlib.suppress(TimeoutError):
                    if found.recv(3) == b"hi\n":
                        self.add_peer(found).rank = 0
                        self.me.send("connected")
                        return
                # A slow one reads it later, and must not take the end for that of the rank.
                found.sendall(b"left\n")
                found.close()
        self.me.send("unreachable")
        raise SystemExit(0)

    def add_peer(self, connection: socket.socket) -> Line:
        connection.setblocking(False)
        peer = Line(connection.fileno(), connection.fileno(), connection)
        self.peers.append(peer)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self.hear_peer(peer))
        return peer

    def hear_rank(self) -> None:
        for line in self.me.read():
            kind, _, rest = line.partition(" ")
            self.word = kind
            if kind == "ended":
                self.ended[self.rank] = json.loads(rest)
        if not self.me.open:
            self.me.open = True  # for what is said to it
            if 0 in self.selector.get_map():
                self.selector.unregister(0)

    def hear_peer(self, peer: Line) -> None:
        for line in peer.read():
            kind, _, rest = line.partition(" ")
            if peer.rank is None:
                self.greet(peer, kind, rest)
            elif kind == "hosts":
                self.hosts = {int(rank): host for rank, host in json.loads(rest).items()}
            elif kind == "verdict":
                self.judge(json.loads(rest))
            elif kind == "left":
                self.forget(peer)
            elif kind == "bye":
                self.released = True
            elif kind == "ended":
                self.ended[peer.rank] = json.loads(rest)
                self.forget(peer)
            elif kind == "gone":
                self.lose(peer)
        if not peer.open:
            self.lose(peer)

    def greet(self, peer: Line, kind: str, rest: str) -> None:
        """Let a watcher in that knows the token; what else strangers say is not looked at."""
        token, _, who = rest.partition(" ")
        if (kind, token) != ("hello", self.token):
            self.forget(peer)
            return
        rank, host = json.loads(who)
        peer.rank = rank
        self.hosts[rank] = host
        peer.send("hi")
        if self.verdict is not None:
            peer.send("verdict", json.dumps(self.verdict))
        if len(self.hosts) == self.ranks:
            self.send_all("hosts", json.dumps(self.hosts))

    def forget(self, peer: Line) -> None:
        if peer in self.peers:
            self.peers.remove(peer)
            self.selector.unregister(peer._owner)
            peer._owner.close()

    def lose(self, peer: Line) -> None:
        if peer in self.peers:
            self.forget(peer)
            if peer.rank is not None:
                self.lost.add(peer.rank)

    def send_all(self, *words: str) -> None:
        for peer in self.peers:
            if peer.rank is not None:
                peer.send(*words)

    def run(self) -> None:
        """Until the rank has left and nobody is left to be told."""
        while True:
            before = time.monotonic()
            for key, _ in self.selector.select(TICK_S):
                key.data()
            # Where this process itself was stopped, the others' silence is its own.
            passed = min(time.monotonic() - before, 2 * TICK_S)
            for peer in list(self.peers):
                peer.heard_s += passed
                if peer.heard_s > SILENCE_S:
                    self.lose(peer)
            if self.is_over(time.monotonic()):
                return

    def is_over(self, now: float) -> bool:
        """One look at everything; whether this watcher is done."""
        alive = os.getppid() == self.parent
        if now >= self.beat_at:
            self.beat_at = now + BEAT_S
            self.send_all("beat")
        if not alive and not self.word:
            self.hear_rank()  # its last word may still be in the pipe
        if not alive and not self.word:
            self.word = "gone"
            self.lost.add(self.rank)
        if self.rank:
            if self.word == "ended":
                self.send_all("ended", json.dumps(self.ended[self.rank]))
            elif self.word:
                self.send_all(self.word)
            if self.word or self.released:
                return True
        self.find_trouble(now)
        if self.verdict is not None and not self.word and now >= self.end_at:
            self.end_rank()
            self.word = "gone"
            return bool(self.rank)
        if self.word and self.over_at == float("inf"):
            self.over_at = now + 2 * (SILENCE_S + ENDED_GRACE_S)
        # Rank 0's watcher stays for the others, who may still be on their way out.
        told = self.verdict is not None or not (self.lost or self.ended)
        if self.word and (told and not self.peers or now >= self.over_at):
            self.send_all("bye")
            return True
        return False

    def find_trouble(self, now: float) -> None:
        """Rank 0's watcher judges for all; without it each judges for itself."""
        if self.verdict is not None or not (self.lost or self.ended):
            return
        if self.tell_at == float("inf"):
            self.tell_at = now + (TOGETHER_S if self.rank == 0 else 0.0)
        if now < self.tell_at:
            return
        found = [no_answer(sorted(self.lost), self.ranks)] if self.lost else []
        found += list(dict.fromkeys(self.ended[rank] for rank in sorted(self.ended)))[:3]
        first: dict[str, int] = {}
        for rank in sorted(self.hosts.keys() - self.lost - self.ended.keys()):
            first.setdefault(self.hosts[rank], rank)
        grace_s = DEAD_GRACE_S if self.lost else ENDED_GRACE_S
        verdict = {"found": "; ".join(found), "speakers": list(first.values()), "grace_s": grace_s}
        self.send_all("verdict", json.dumps(verdict))
        self.judge(verdict)

    def judge(self, verdict: dict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self.end_at = time.monotonic() + verdict["grace_s"]
            self.me.send("verdict", json.dumps(verdict))

    def end_rank(self) -> None:
        """Say why, and end the rank: by its own hand, else by force."""
        if self.rank in self.verdict["speakers"]:
            line = f"mixflow-fast: error: {ends_too(self.verdict['found'], self.rank)}\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
        self.me.send("end")
        deadline = time.monotonic() + END_S
        while os.getppid() == self.parent and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGKILL)


def main() -> None:
    # Requests to stop go to the rank; its watcher stays until the rank has left.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    settings = b""
    while not settings.endswith(b"\n"):  # byte by byte: what follows is read elsewhere
        if not (byte := os.read(0, 1)):
            return
        settings += byte
    watcher = Watcher(json.loads(settings))
    start: Callable[[], None] = watcher.connect if watcher.rank else watcher.listen
    start()
    watcher.run()


if __name__ == "__main__":
    sys.exit(main())
