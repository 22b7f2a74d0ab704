"""Shaped links on one machine: network namespaces as nodes, each on a veth pair to a bridge, with `tc tbf` both ways.

The bridge and its ports are in a namespace too, so nothing in the machine's own network is touched and its firewall
does not see our packets; and whoever deletes the namespaces has deleted everything. Their names carry the process that
made them, so a later start finds and removes what a killed one has left.

The shaper: a token bucket lets bursts of `burst` bytes through at once. A veth link carries packets of up to 64 KiB,
which are cut into Ethernet frames only where a card would do it (GSO); a burst smaller than such a packet makes the
shaper cut it in software, which costs CPU time that a real node does not spend. So the burst is a little over 64 KiB,
and at least what the link carries in `_BURST_S`, in case the shaper is woken late (on a busy two-core machine bursts
of 80 kB lost up to 15 per cent of 1 Gbit/s, 200 kB nothing). The queue behind it holds what the link carries in
`QUEUE_S`: a host's or a switch's buffer; a full queue drops, as there.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.signals import signals_held
from common.errors import DatpsError, PeerLostError, SpecError, refusal

NODE_DEVICE = "eth0"
_NETWORK = "10.77.0.0/16"
_PREFIX = "datps-bench"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-[0-9a-f]{{6}}-(?:switch|node\d+)")
CONGESTION_CONTROL = "cubic"
"""Of TCP on all links: the kernel's own default, whatever this machine has set, so that two machines compare."""
_BURST_BYTES = 80_000
_BURST_S = 0.0016
QUEUE_S = 0.02
_COMMAND_S = 20.0
_FIRST_RATE_BPS = 10**9


@dataclass(frozen=True, kw_only=True)
class Node:
    """One network namespace with an address."""

    index: int
    namespace: str
    address: str
    device: str = NODE_DEVICE

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on this node."""
        return [_tool("ip"), "netns", "exec", self.namespace, *command]


@dataclass(frozen=True, kw_only=True)
class LinkCount:
    """What has crossed one node's link since it was made, Ethernet headers included, and what its queues dropped."""

    sent_bytes: int
    received_bytes: int
    dropped_packets: int


@dataclass(frozen=True, kw_only=True)
class Links:
    """Nodes on one switch.

    Attributes:
        switch: the namespace of the bridge and its ports.
        nodes: by index.
    """

    switch: str
    nodes: tuple[Node, ...]

    def shape(self, rate_bps: int) -> None:
        """Sets the rate of every link, in both directions."""
        for node in self.nodes:
            for namespace, device in ((node.namespace, NODE_DEVICE), (self.switch, _port(node.index))):
                _run(shaping_command(namespace, device, rate_bps))

    def count(self) -> list[LinkCount]:
        """By node."""
        counts = []
        for node in self.nodes:
            sent, dropped = _queue_count(node.namespace, NODE_DEVICE)
            received, dropped_there = _queue_count(self.switch, _port(node.index))
            counts.append(LinkCount(sent_bytes=sent, received_bytes=received, dropped_packets=dropped + dropped_there))
        return counts


def shaping_command(namespace: str, device: str, rate_bps: int) -> list[str]:
    """Replaces a device's queue by a token bucket."""
    burst = max(_BURST_BYTES, round(rate_bps / 8 * _BURST_S))
    limit = burst + round(rate_bps / 8 * QUEUE_S)
    shaper = ["tbf", "rate", f"{rate_bps}bit", "burst", str(burst), "limit", str(limit)]
    return ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shaper]


@contextmanager
def shaped_links(nodes: int) -> Iterator[Links]:
    """Makes nodes and links, not yet shaped; removes them on leaving, whatever happened.

    Raises:
        SpecError: this machine, user or kernel cannot do that; the message names what is missing.
    """
    refuse_where_impossible()
    remove_leftovers()
    stem = f"{_PREFIX}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(3)}"
    links = Links(
        switch=f"{stem}-switch",
        nodes=tuple(
            Node(index=index, namespace=f"{stem}-node{index}", address=f"10.77.{index // 200}.{index % 200 + 1}")
            for index in range(nodes)
        ),
    )
    try:
        _make(links)
        yield links
    finally:
        with signals_held():
            _remove([node.namespace for node in links.nodes] + [links.switch])


def refuse_where_impossible() -> None:
    """Raises what is missing.

    Raises:
        SpecError: not Linux, not root, no `ip` or `tc`.
    """
    context = "network namespaces and shaped links; `datps bench exchange` needs neither"
    if sys.platform != "linux":
        raise SpecError(refusal("Linux", "platform", sys.platform, context))
    if os.geteuid() != 0:
        raise SpecError(refusal("root (user id 0)", "user_id", os.geteuid(), context))
    for tool in ("ip", "tc"):
        if _found(tool) is None:
            raise SpecError(refusal(f"the program `{tool}` (package iproute2)", "found", "none", context))


def remove_leftovers() -> list[str]:
    """Removes the namespaces of processes that are gone; returns their names."""
    left = []
    for name in _names():
        match = _NAME.fullmatch(name)
        if match and _started(int(match[1])) != match[2]:
            left.append(name)
    _remove(left)
    return left


def our_namespaces() -> list[str]:
    """All namespaces that a laboratory has made, this process's or another's."""
    return [name for name in _names() if _NAME.fullmatch(name)]


def _make(links: Links) -> None:
    try:
        _run(["ip", "netns", "add", links.switch])
    except DatpsError as error:
        raise SpecError(refusal("permission to make network namespaces", "refused", error)) from None
    try:
        for command in _making_commands(links):
            _run(command)
        links.shape(_FIRST_RATE_BPS)
    except PeerLostError as error:
        rule = f"a kernel with veth, bridge, tbf and {CONGESTION_CONTROL}"
        raise SpecError(refusal(rule, "refused", error)) from None


def _making_commands(links: Links) -> Iterator[list[str]]:
    switch = links.switch
    yield ["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"]
    yield ["ip", "-n", switch, "link", "set", "bridge", "up"]
    for node in links.nodes:
        name, port = node.namespace, _port(node.index)
        yield ["ip", "netns", "add", name]
        yield ["ip", "-n", name, "link", "set", "lo", "up"]
        pair = ["type", "veth", "peer", "name", NODE_DEVICE, "netns", name]
        yield ["ip", "-n", switch, "link", "add", port, *pair]
        yield ["ip", "-n", switch, "link", "set", port, "master", "bridge", "up"]
        yield ["ip", "-n", name, "address", "add", f"{node.address}/16", "dev", NODE_DEVICE, "noprefixroute"]
        yield ["ip", "-n", name, "link", "set", NODE_DEVICE, "up"]
        route = [_NETWORK, "dev", NODE_DEVICE, "src", node.address]
        yield ["ip", "-n", name, "route", "add", *route, "congctl", CONGESTION_CONTROL]


def _port(index: int) -> str:
    return f"port{index}"


def _remove(namespaces: Sequence[str]) -> None:
    """Ends what runs in them, and deletes them; never raises for one that is gone."""
    for name in namespaces:
        with suppress(DatpsError):
            for pid in _run(["ip", "netns", "pids", name]).split():
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(pid), 9)
    for name in namespaces:
        with suppress(DatpsError):
            _run(["ip", "netns", "delete", name])


def _names() -> list[str]:
    return [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines() if line.strip()]


def _queue_count(namespace: str, device: str) -> tuple[int, int]:
    queues = json.loads(_run(["tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device]))
    return int(queues[0].get("bytes", 0)), int(queues[0].get("drops", 0))


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; with its number it names the process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _found(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin")


def _tool(tool: str) -> str:
    found = _found(tool)
    if found is None:
        raise SpecError(refusal(f"the program `{tool}` (package iproute2)", "found", "none"))
    return found


def _run(command: Sequence[str]) -> str:
    """Runs `ip` or `tc`; returns what it says.

    Raises:
        PeerLostError: it fails or hangs.
    """
    try:
        done = subprocess.run(
            [_tool(command[0]), *command[1:]],
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise PeerLostError(refusal(f"an answer within {_COMMAND_S:g} s", "command", " ".join(command))) from None
    if done.returncode != 0:
        raise PeerLostError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
