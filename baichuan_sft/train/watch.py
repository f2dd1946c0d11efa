"""A side process per rank that notices when a rank or host is gone, stopped or cut off, and ends the others.

It imports nothing but the standard library and shares no lock with the rank, so a rank that hangs in a
collective, or is stopped, does not stop it. Rank 0's is the hub: all others beat to it, it decides for all.

    rank  -> watch   stdin: ``step 17``, ``error ...``, ``bye`` (a good end, or one that all ranks agreed on)
    watch -> rank    stdout: ``port 4711`` once it is joined, then at most one verdict
    watch <-> hub    one JSON object per line; silence of more than the limit is a verdict
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time

BEAT = 2.0  # seconds between two beats; four in the limit where that is short
TICK = 0.5  # seconds between two looks at the rank
JOIN = 60.0  # seconds more than the limit for the first beat: interpreters that start from a slow disk
JUMP = 5.0  # a tick that took so much longer: this process or machine was suspended, so nobody is late; half
# the limit where that is less
FACTS = {"host", "rank", "local_rank", "step", "state", "error"}  # of a beat
REACTION = 4.0  # seconds a rank has to end by itself after a verdict


class Peer:
    """What is known of another side process, over its connection."""

    def __init__(self, sock, now):
        self.sock, self.buffer, self.heard, self.fine = sock, b"", now, now
        self.facts = {}

    def say(self, message):
        with contextlib.suppress(OSError):  # a full or broken connection shows as silence
            self.sock.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def hear(self):
        """Messages since the last call; None at the end of the connection, or where no watch is speaking."""
        try:
            data = self.sock.recv(65536)
            *lines, self.buffer = (self.buffer + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError, RecursionError):
            return None
        known = all(isinstance(one, dict) and ("verdict" in one or one.keys() >= FACTS) for one in messages)
        return messages if data and known else None


def describe(facts, what):
    return f"host {facts['host']}, rank {facts['rank']}: {what}, last step {facts['step']}"


class Watch:
    def __init__(self, own, limit, size, hub):
        self.own, self.limit, self.parent = own, limit, os.getppid()
        self.beat, self.jump = min(BEAT, limit / 4), min(JUMP, limit / 2)
        self.state, self.error, self.buffer = "run", "", b""
        now = time.monotonic()
        self.fine = self.begun = now  # when this rank was last seen running, and when the watch began
        self.absent = set() if hub else set(range(1, size))  # ranks whose side process has not said a word
        self.server, self.peers = None, []
        if hub is None:
            self.server = listen()
        else:
            self.peers = [Peer(socket.create_connection(hub, timeout=limit), now)]
            self.peers[0].facts = {"host": hub[0], "rank": 0, "local_rank": 0, "step": 0, "state": "run"}
        for sock in [self.server] if self.server else [self.peers[0].sock]:
            sock.setblocking(False)
        os.write(1, b"port %d\n" % (self.server or self.peers[0].sock).getsockname()[1])

    def look_at_rank(self):
        if os.getppid() != self.parent:
            return "gone"
        try:
            with open(f"/proc/{self.parent}/stat") as stat:
                return "stopped" if stat.read().rpartition(")")[2].split()[0] == "T" else "run"
        except OSError:  # gone since
            return "gone"

    def read_rank(self):
        data = os.read(0, 65536)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "step":
                self.own["step"] = int(rest)
            elif word == "error":
                self.error = rest
            elif word == "bye":
                self.state = "bye"
        return bool(data)

    def hear(self, peer, now):
        """Take in what a peer says; a verdict where it tells one, or is gone."""
        messages = peer.hear()
        for message in messages or []:
            peer.heard = now
            if "verdict" in message:
                return message
            peer.facts = message
            self.absent.discard(message["rank"])
        if messages is None:
            self.peers.remove(peer)
            if peer.facts and peer.facts["state"] != "bye":
                return {"verdict": describe(peer.facts, "its host closed the connection"), "of": peer.facts}
        return None

    def judge(self, now):
        """The first peer that is late, gone or stopped, as a verdict."""
        if self.absent and now - self.begun > self.limit + JOIN:
            facts = {"host": "?", "rank": min(self.absent), "local_rank": -1, "step": 0, "state": "run"}
            return facts, "its watch never came (a firewall?); --peer_timeout 0 goes without"
        known = [peer for peer in self.peers if peer.facts and peer.facts["state"] != "bye"]
        everyone_stopped = self.state == "stopped" and all(p.facts["state"] == "stopped" for p in known)
        for peer in known:
            if peer.facts["state"] != "stopped" or everyone_stopped:
                peer.fine = now
            if peer.facts["state"] == "gone":
                return peer.facts, peer.facts["error"] or "its process is gone"
            if now - peer.heard > self.limit:
                return peer.facts, f"no sign of life for {self.limit:g} s"
            if self.server and now - peer.fine > self.limit:
                return peer.facts, f"stopped (SIGSTOP) for {self.limit:g} s"
        self.fine = now if self.state != "stopped" or everyone_stopped else self.fine
        if self.state == "gone":
            return {**self.own, "error": self.error}, self.error or "its process is gone"
        if self.server and now - self.fine > self.limit:
            return self.own, f"stopped (SIGSTOP) for {self.limit:g} s"
        return None

    def run(self):
        """Until the rank says goodbye, or a verdict; which is returned."""
        inputs, last, beaten = [0], time.monotonic(), 0.0
        while True:
            socks = [peer.sock for peer in self.peers] + ([self.server] if self.server else [])
            ready = select_ready(inputs + [sock.fileno() for sock in socks])
            now = time.monotonic()
            if now - last > TICK + self.jump:
                self.fine = self.begun = now
                for peer in self.peers:
                    peer.fine = peer.heard = now
            last = now
            if 0 in ready and not self.read_rank():
                inputs = []
            if self.server and self.server.fileno() in ready:
                with contextlib.suppress(OSError):  # gone again, as a port scanner is
                    self.peers.append(Peer(self.server.accept()[0], now))
                    self.peers[-1].sock.setblocking(False)
            told = [self.hear(peer, now) for peer in list(self.peers) if peer.sock.fileno() in ready]
            if self.state != "bye":
                state, self.state = self.state, self.look_at_rank()
                beaten = beaten if state == self.state else 0.0
            while self.state == "gone" and inputs and select_ready(inputs, 0) and self.read_rank():
                pass  # its last words
            verdict = next((message for message in told if message), None)
            if verdict is None and (found := self.judge(now)):
                verdict = {"verdict": describe(*found), "of": found[0]}
            if now - beaten > self.beat or self.state == "bye":
                beaten = now
                for peer in self.peers:
                    peer.say({**self.own, "state": self.state, "error": self.error})
            if verdict:
                for peer in self.peers:
                    peer.say(verdict)
                return verdict
            if self.state == "bye":
                return None


def listen():
    """A server that IPv4 and IPv6 reach, where there is IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def select_ready(files, seconds=TICK):
    poller = select.poll()  # select() stops at file 1,024
    for file in files:
        poller.register(file, select.POLLIN)
    return {file for file, _ in poller.poll(seconds * 1000)}


def end_rank(own, parent, verdict):
    """Tell the rank, which ends itself, one per host with a line; and kill it where it does not."""
    of = verdict["of"]
    speaker = 0
    if of["host"] == own["host"] and of["local_rank"] == 0:
        speaker = -1 if of.get("error") else 1  # that one has said its error itself
    speaks = own["local_rank"] == speaker
    with contextlib.suppress(OSError):
        os.write(1, f"{'say' if speaks else 'end'} {verdict['verdict']}\n".encode())
    until = time.monotonic() + REACTION
    while time.monotonic() < until and os.getppid() == parent:
        time.sleep(0.1)
    if os.getppid() != parent:
        return
    with open(f"/proc/{parent}/task/{parent}/children") as children:
        family = [int(pid) for pid in children.read().split() if int(pid) != os.getpid()]
    for pid in [*family, parent]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main(words):
    rank, local_rank, limit, size, hub = (
        int(words[0]),
        int(words[1]),
        float(words[2]),
        int(words[3]),
        words[4:],
    )
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # launchers send these to all; this one ends with its rank
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    own = {"host": socket.gethostname(), "rank": rank, "local_rank": local_rank, "step": 0}
    parent = os.getppid()
    try:
        verdict = Watch(own, limit, size, (hub[0], int(hub[1])) if hub else None).run()
    except OSError as error:
        text = f"no connection to rank 0's watch at {':'.join(hub)} ({error}); --peer_timeout 0 goes without"
        verdict = {"verdict": describe(own, text), "of": {**own, "host": ""}}
    if verdict:
        end_rank(own, parent, verdict)


if __name__ == "__main__":
    main(sys.argv[1:])
