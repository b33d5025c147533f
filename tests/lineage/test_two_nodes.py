"""Two nodes, each with its own torchrun and its own address, train a ladder; one of them dies.

The nodes are network namespaces where the system lets us make them, else two loopback addresses.
Slow: real processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.kills import CPU, SMALL, weights
from fourstage.ladder import LADDER
from fourstage.runs.records import read_record

REPO = Path(__file__).parents[2]
ERROR = "lost another process of this job, whose own output says why"


@dataclass
class Node:
    prefix: list[str]  # what runs a command on the node
    address: str
    interface: str


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    names = [f"fourstage-{os.getpid()}-{n}" for n in (0, 1)]
    links = [f"fs{os.getpid() % 10**6}n{n}" for n in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        yield [Node([], f"127.0.0.{n}", "lo") for n in (1, 2)]
        return
    try:
        pair = ("type", "veth", "peer", "name", links[1], "netns", names[1])
        ip("link", "add", links[0], "netns", names[0], *pair)
        for n, (name, link) in enumerate(zip(names, links, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{n + 1}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")
        prefixes = [["ip", "netns", "exec", name] for name in names]
        yield [Node(prefixes[n], f"10.77.0.{n + 1}", links[n]) for n in (0, 1)]
    finally:
        for name in names:
            ip("netns", "del", name)


def launch(nodes: list[Node], port: int, outputs: Path) -> list[subprocess.Popen]:
    """The same command on both nodes; what node n prints goes to <outputs>.n."""
    started = []
    for rank, node in enumerate(nodes):
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += [f"--node-rank={rank}", f"--local-addr={node.address}"]
        torchrun += [f"--master-addr={nodes[0].address}", f"--master-port={port}"]
        trainer = ["trainer.devices=1", "trainer.num_nodes=2", "trainer.strategy=ddp"]
        command = [*node.prefix, sys.executable, *torchrun, "train.py", *SMALL, *CPU, *trainer]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node.interface}
        with open(outputs.with_suffix(f".{rank}"), "w") as log:
            started.append(
                subprocess.Popen(
                    [*command, f"outputs={outputs}"],
                    cwd=REPO,
                    env=env,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    return started


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.slow
def test_a_node_dies_and_the_same_commands_go_on(nodes: list[Node], tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert [agent.wait(300) for agent in launch(nodes, 29411, calm)] == [0, 0]
    expected = weights(calm)
    assert len(expected) == len(LADDER)

    first, second = launch(nodes, 29412, killed)
    while not list(killed.glob("runs/ppo-*/checkpoints/last.ckpt")):
        assert first.poll() is None and second.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    for pid in [second.pid, *children(second.pid)]:  # the whole node
        os.kill(pid, signal.SIGKILL)
    assert first.wait(60) != 0
    second.wait()
    assert ERROR in killed.with_suffix(".0").read_text()
    (ppo,) = killed.glob("runs/ppo-*")
    assert read_record(ppo)["status"] == "failed"

    assert [agent.wait(300) for agent in launch(nodes, 29413, killed)] == [0, 0]
    assert f"resuming {ppo.name}" in killed.with_suffix(".0").read_text()
    assert weights(killed) == expected
