"""What listens on the nodes of real runs, in networks of their own, and what a stranger on another node gets of it.

As a program (`python test_slurm_sockets.py MODEL PROMPTS`) it runs them, and prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from helpers.local_job import NEIGHBOUR, OPEN_PATHS, SYSTEM_PYTHON, name_of, wait_until  # noqa: E402
from helpers.run_files import lines_of  # noqa: E402
from helpers.slurm_fixture import need_slurm, until  # noqa: E402

from hpc.chaos.actions import processes_of  # noqa: E402
from hpc.chaos.isolated import disk_for_runs, is_isolated, isolate  # noqa: E402
from hpc.sandbox import ClusterSpec, Sandbox  # noqa: E402

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.learning]  # minutes on two cores

NODES, STRANGER = 4, "node4"
FLAGS = (
    "--partition=gpu --num-gpus-per-node=1 --num-rollout=1000 --rollout-batch-size=2 --n-samples-per-prompt=2"
    " --rollout-max-response-len=8 --label-key=label --custom-rm-path=fakes.reward.by_content --wandb-mode=disabled"
)
LAYOUTS = {
    # An engine of two nodes, and a trainer apart; then two ranks that share their nodes with an engine each.
    "apart": "--nodes=3 --rollout-num-gpus-per-engine=2 --update-weight-transport=distributed",
    "colocated": "--nodes=2 --colocate",
}
ASKED = (
    "/",
    "/state",
    "/server_info",
    "/model_info",
    "/workers",
    "/generate",
    "/docs",
    "/stop",
    "/roles/engine",
)
_LISTENS = "0A"


def listening_sockets(pid: int) -> dict[str, tuple[str, int]]:
    """Address and port of every socket that listens in the network of a process, by its inode."""
    found = {}
    for name, size in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTENS:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, 2 * size, 8)]
                family = socket.AF_INET if size == 4 else socket.AF_INET6
                found[rest[5]] = (socket.inet_ntop(family, b"".join(words)), int(port, 16))
    return found


def owners(network: str) -> dict[str, set[str]]:
    """Command lines of the processes that have a socket of a network open, by its inode."""
    found: dict[str, set[str]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if str((path / "ns/net").readlink()) == network:
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                for inode in sockets_of(path):
                    found.setdefault(inode, set()).add(command)
    return found


def sockets_of(process: Path) -> Iterator[str]:
    for file in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(file.readlink())):
                yield match[1]


def look(cluster: Sandbox, run_dir: Path) -> dict[str, Any]:
    """Who listens where on each of the run's nodes, and what a stranger gets of it."""
    processes = [each for each in processes_of(run_dir) if "SLURMD_NODENAME" in each.env]
    at = {each.env["SLURMD_NODENAME"]: each.pid for each in processes}
    shown = cluster.run("scontrol", "--oneliner", "show", "node")
    addresses = dict(re.findall(r"NodeName=(\S+) .*?NodeAddr=(\S+)", shown))
    sockets: list[tuple[str, str, str, int]] = []  # node, who, address, port
    for node, pid in at.items():
        heard, who = listening_sockets(pid), owners(str(Path(f"/proc/{pid}/ns/net").readlink()))
        for inode in heard.keys() & listening_sockets(pid).keys():
            sockets += [(node, name_of(command), *heard[inode]) for command in who.get(inode, {"nobody"})]
    urls = {f"http://{address}:{port}{path}" for _, name, address, port in sockets
            if name in ("supervisor", "router", "engine", "rollout process")
            for path in (*OPEN_PATHS, *ASKED)}  # fmt: skip
    tokens = {each.env["SLURMLIME_TOKEN"] for each in processes if "SLURMLIME_TOKEN" in each.env}
    assert len(tokens) == 1
    return {
        "addresses": {node: addresses[node] for node in at},
        "sockets": sorted(set(sockets)),
        "answered": ask(cluster, sorted(urls)),
        "shows_token": any(word in " ".join(each.command) for each in processes for word in tokens),
    }


def ask(cluster: Sandbox, urls: list[str]) -> list[str]:
    """Which URLs answer another user of a node that is not of the job."""
    daemon = next(path for path in Path("/proc").glob("[0-9]*/cmdline") if _is_stranger(path, cluster))
    command = ["nsenter", f"--net={daemon.parent}/ns/net", "--setuid=65534", "--setgid=65534", "--",
               str(SYSTEM_PYTHON), "-I", "-B", "-c", NEIGHBOUR.read_text()]  # fmt: skip
    asked = json.dumps({"files": [], "sockets": [], "urls": urls})
    env = {"PATH": os.environ["PATH"]}  # without a proxy
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, cwd="/", env=env)
    said = json.loads(done.stdout)
    assert said["user"] == 65534
    return said["urls"]


def _is_stranger(path: Path, cluster: Sandbox) -> bool:
    """Whether this is the slurmd of the node that no run has; other sandboxes may be up."""
    try:
        words = path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    own = any(word.startswith(f"{cluster.directory}/") for word in words)
    return words[0].endswith("slurmd") and STRANGER in words and own


def run_layouts(model: Path, prompts: Path) -> dict[str, Any]:
    """Look at one run of each layout after its first step."""
    with tempfile.TemporaryDirectory(prefix="slurmlime-sockets-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        spec = ClusterSpec(nodes=NODES, cpu_nodes=0, gpus=1, networks=True)
        with (
            disk_for_runs(directory) as runs,
            Sandbox(directory / "slurm", spec, owner_pid=os.getpid()) as cluster,
        ):
            return {layout: run_one(cluster, runs, layout, model, prompts) for layout in LAYOUTS}


def run_one(cluster: Sandbox, runs: Path, layout: str, model: Path, prompts: Path) -> dict[str, Any]:
    """Look at a run after its first step, while its trainer is stopped, and end it."""
    inputs = [
        f"--hf-checkpoint={model}",
        f"--prompt-data={prompts}",
        f"--runs-dir={runs}",
        f"--name={layout}",
    ]
    words = [*FLAGS.split(), *LAYOUTS[layout].split(), *inputs, "--detach"]
    env = {**cluster.env, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "hpc.submit", *words], env=env, check=True, stdout=subprocess.DEVNULL
    )
    metrics = runs / layout / "metrics.jsonl"
    wait_until(lambda: lines_of(metrics), 300, lambda: "the first step:\n" + cluster.run("squeue"), pause=0.1)
    trainers = [
        each.pid for each in processes_of(runs / layout) if each.env.get("SLURMLIME_ROLE") == "trainer"
    ]
    for pid in trainers:
        os.kill(pid, signal.SIGSTOP)
    try:
        return look(cluster, runs / layout)
    finally:
        for pid in trainers:
            os.kill(pid, signal.SIGCONT)
        cluster.run("scancel", "--full", "--signal=KILL", f"--name={layout}")
        cluster.run("scancel", f"--name={layout}")
        until(lambda: not cluster.run("squeue", "-h"), 240, "the jobs to end")


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need_slurm()
    prompts = tmp_path_factory.mktemp("sockets") / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"input": f"{i}+1=", "label": str(i + 1)}) + "\n" for i in range(20))
    )
    command = [sys.executable, __file__, str(tiny_model), str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    looked = json.loads(done.stdout.splitlines()[-1])
    if looked is None:
        pytest.skip("networks and disks of one's own take root")
    return looked


def documented() -> dict[str, set[str]]:
    """Where each process listens, as docs/security.md says."""
    table = (TESTS.parent / "docs/security.md").read_text().partition("\n|---|---|---|---|\n")[2]
    where: dict[str, set[str]] = {}
    for row in table.partition("\n\n")[0].splitlines():
        _, process, _, place, *_ = (cell.strip() for cell in row.split("|"))
        where.setdefault(process, set()).add(place)
    return where


def test_every_socket_of_a_job_is_in_the_documentation(seen: dict[str, Any]) -> None:
    told, found = documented(), {}
    for looked in seen.values():
        for node, name, address, _ in looked["sockets"]:
            here = {looked["addresses"][node]: "node", "0.0.0.0": "all interfaces", "::": "all interfaces"}
            if "slurmd " not in name:  # the node's own, which is there without a job
                found.setdefault(name, set()).add(here.get(address, address))
    assert found.keys() == told.keys()
    # What only the node itself reaches may listen there.
    beyond = {name: more for name, places in found.items() if (more := places - told[name] - {"127.0.0.1"})}
    assert beyond == {}
    assert all("node" in found[name] for name in told if told[name] == {"node"})


def test_without_the_token_another_node_gets_counters_only(seen: dict[str, Any]) -> None:
    for looked in seen.values():
        assert not looked["shows_token"]
        names = {
            (address, port): name for _, name, address, port in looked["sockets"] if name != "engine's ranks"
        }
        answered: dict[str, set[str]] = {}
        for url in looked["answered"]:
            host, port, path = re.fullmatch(r"http://(.+):(\d+)(/.*)", url).groups()
            answered.setdefault(names[host, int(port)], set()).add(path)
        # So it does reach what it may not use. The further nodes of an engine describe what says that they are there.
        assert {"/health", "/metrics"} <= answered["engine"] <= {"/health", "/metrics", "/docs"}
        assert answered.pop("router") <= OPEN_PATHS - {"/metrics"}
        assert answered.keys() == {"engine"}


if __name__ == "__main__":
    isolate([__file__, *sys.argv[1:]])
    print(json.dumps(run_layouts(*map(Path, sys.argv[1:])) if is_isolated() else None))
