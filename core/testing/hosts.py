"""Two hosts on one machine: network namespaces joined by a virtual cable, on which bytes are counted and slowed down.

Needs Linux, root, `ip` and `tc` (iproute2), and `unshare`, `nsenter` and `setpriv` (util-linux). A namespace lives as
long as the process that holds it, and that ends with this one: nothing is left behind, whatever happens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

INTERFACE = "eth0"
"""Each host's end of the cable."""

PORT = 29500
"""Where ranks meet; free, since nothing else runs in a new namespace."""

QUEUE_MS = 500
"""How long a slowed cable may hold a packet before it drops one: longer than TCP's windows fill it for."""


def problem() -> str:
    """Why this machine cannot have such hosts, in one line; empty where it can."""
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}: install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "not root, which network namespaces need"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


class Host:
    """A network namespace, which a process holds open."""

    def __init__(self, address: str) -> None:
        self.address = address
        # It ends when this process does, which closes the pipe that it reads.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self.namespace = Path(f"/proc/{self._holder.pid}/ns/net")
        while self.namespace.readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        return self._holder.pid

    def command(self, *command: str) -> list[str]:
        """`command` as it is run on this host; it is killed when this process ends."""
        return ["nsenter", f"--net={self.namespace}", "setpriv", "--pdeathsig", "KILL", *command]

    def run(self, *command: str) -> None:
        subprocess.run(self.command(*command), check=True, capture_output=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@contextmanager
def two_hosts(rate: str | None = None) -> Generator[tuple[Host, Host]]:
    """Two hosts and a cable; `rate`, as `tc` writes it ("1gbit"), slows it down in both directions."""
    hosts = Host("10.0.0.1"), Host("10.0.0.2")
    try:
        one, other = (("name", INTERFACE, "netns", str(host.pid)) for host in hosts)
        subprocess.run(["ip", "link", "add", *one, "type", "veth", "peer", *other], check=True, capture_output=True)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", INTERFACE, "up")
            if rate is not None:
                # A burst of 256 KiB is several of the largest packets (64 KiB), and nothing beside what is measured.
                slow = ("tbf", "rate", rate, "burst", "256kb", "latency", f"{QUEUE_MS}ms")
                host.run("tc", "qdisc", "add", "dev", INTERFACE, "root", *slow)
        yield hosts
    finally:
        for host in hosts:
            host.close()


def start_ranks(hosts: Sequence[Host], placement: str, *command: str) -> list[subprocess.Popen[str]]:
    """`command` as a rank for each digit of `placement`, on the host with that number: "0011", or "0101" alternating.

    The environment says what torchrun would. A rank's output is piped.
    """
    processes = list[subprocess.Popen[str]]()
    for rank, number in enumerate(placement):
        place = {
            "RANK": rank, "WORLD_SIZE": len(placement), "LOCAL_RANK": placement[:rank].count(number),
            "LOCAL_WORLD_SIZE": placement.count(number), "GROUP_RANK": number, "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        env = {**os.environ, **{key: str(value) for key, value in place.items()}}
        prefixed = hosts[int(number)].command(*command)
        processes.append(subprocess.Popen(prefixed, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def bytes_sent() -> int:
    """What the host of this process has sent over the cable so far, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])
    raise LookupError(f"this process's network namespace has no {INTERFACE}")
