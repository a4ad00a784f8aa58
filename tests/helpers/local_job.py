"""A `submit` process on this machine, with small stand-ins for the roles (tests/fakes), and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.run_files import events_of, lines_of
from rltrain.run.layout import RunLayout

TESTS = Path(__file__).parents[1]
NEIGHBOUR = TESTS / "fakes" / "neighbour.py"
FAKE_SUBMIT = TESTS / "fakes" / "submit.py"
SERVICES = {"router": ["serve"], "engine": ["serve", "leak"], "rollout": ["serve"]}


# `submit` of a job whose machines reach each other by IPv6 addresses. A class of this program, not of a module, is what
# the job's process gets by value.
SUBMIT_ON_IPV6 = """
import sys
from hpc import submit
from hpc.supervisor import supervisor

class OnIPv6(supervisor.Supervisor):
    def _host(self):
        return "::1"

supervisor.Supervisor = OnIPv6
sys.exit(submit.main())
"""


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


# What `submit` says of a run that leaves these flags out.
ASSUMED = (
    "chosen because the trainer has no GPU: --no-bf16 --no-use-distributed-optimizer\n"
    "--actor-num-gpus-per-node is not given: one trainer rank here (slime takes 8)\n"
)


# For what takes seconds on a quiet machine; whoever waits is woken when it happens.
PATIENCE = 240.0


def wait_until(
    condition: Callable[[], object],
    seconds: float = PATIENCE,
    what: str | Callable[[], str] = "what has not happened",
    pause: float = 0.02,
) -> None:
    """Probe until the condition holds; fails the test when time is up, and says what it has waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(pause)


async def wait_until_async(
    condition: Callable[[], object], seconds: float = PATIENCE, pause: float = 0.005
) -> None:
    """The same, while other tasks go on."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(pause)


class Job:
    """A `submit` process with fake roles, and a mark in its environment by which all that it starts is known."""

    def __init__(self, directory: Path) -> None:
        self.layout = RunLayout(directory / "runs" / "job")
        self.directory = directory
        self.mark = f"SLURMLIME_TEST_MARK={uuid.uuid4().hex}"
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self,
        *flags: str,
        steps: int = 2,
        grace: float = 2 * PATIENCE,
        stdout: int = subprocess.PIPE,
        preexec: Callable[[], object] | None = None,
        **roles: list[str],
    ) -> subprocess.Popen[str]:
        name, _, value = self.mark.partition("=")
        plan = {**SERVICES, "trainer": ["train"], **roles}
        fake = {
            "FAKE_PLAN": json.dumps(plan),
            "FAKE_ENGINES": str(len(plan["engine"])),
            "FAKE_GRACE": str(grace),
        }
        process = subprocess.Popen(
            [sys.executable, str(FAKE_SUBMIT), "--name=job", f"--num-rollout={steps}", *flags],
            cwd=self.directory,
            env={**os.environ, "PATH": str(self.directory / "bin"), **fake, name: value},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,
            start_new_session=True,  # so that a signal to its group spares pytest
        )
        self.started.append(process)
        return process

    def finish(self, *flags: str, steps: int = 2, **roles: list[str]) -> tuple[int, str, str]:
        process = self.start(*flags, steps=steps, **roles)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def living(self) -> list[int]:
        """Every process that carries the mark, however it got away."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def events(self, kind: str) -> list[dict]:
        return events_of(self.layout, kind)

    def steps(self) -> list[int]:
        return [row["step"] for row in lines_of(self.layout.metrics)]

    def supervisor_pid(self) -> int:
        return json.loads(self.layout.lock.read_text())["pid"]

    def phase(self) -> str:
        return json.loads(self.layout.status.read_text())["phase"] if self.layout.status.exists() else ""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    it = Job(tmp_path)
    yield it
    for pid in it.living():
        os.kill(pid, signal.SIGKILL)
    for process in it.started:
        process.communicate()


# What a process of a job is called in docs/security.md, by a part of its command line.
_PROCESSES = {
    "sglang::router": "router",
    "rltrain.sglang.router": "router",
    "sglang::scheduler": "engine's ranks",
    "sglang": "engine",
    "rltrain.rollout": "rollout process",
    "rltrain.train": "trainer's ranks",
    "submitit": "supervisor",
    "hpc.batch": "supervisor",
}


def process_tree(*roots: int) -> list[psutil.Process]:
    """These processes and all that they have started."""
    tree = [psutil.Process(root) for root in roots]
    return list({each.pid: each for root in tree for each in (root, *root.children(recursive=True))}.values())


def listening(processes: Iterable[psutil.Process]) -> dict[str, set[tuple[str, int]]]:
    """The addresses and ports at which a job's processes listen, by what docs/security.md calls them."""
    found: dict[str, set[tuple[str, int]]] = {}
    for process in processes:
        try:
            command, sockets = " ".join(process.cmdline()), process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        for each in sockets:
            if each.status == psutil.CONN_LISTEN or each.type != socket.SOCK_STREAM:
                found.setdefault(name_of(command), set()).add(tuple(each.laddr))
    return found


def name_of(command: str) -> str:
    """What docs/security.md calls a process with this command line; the command line if it calls it nothing."""
    known = (name for part, name in _PROCESSES.items() if part in command)
    return "srun" if command.startswith("srun ") else next(known, command)  # it names what it starts


def own_addresses() -> set[str]:
    """Where a process may listen that only this machine should reach; gloo takes what the host's name means."""
    own = {"127.0.0.1"}
    with suppress(OSError):
        own.add(socket.gethostbyname(socket.gethostname()))
    return own


SYSTEM_PYTHON = Path("/usr/bin/python3")
OPEN_TO_ALL = Path("/etc/passwd")
# Of docs/security.md: what tells a stranger counters and the model's path.
OPEN_PATHS = {
    "/health",
    "/liveness",
    "/readiness",
    "/v1/models",
    "/get_server_info",
    "/engine_metrics",
    "/metrics",
}


@dataclass(frozen=True)
class Seen:
    """What others see of a run while it trains.

    Attributes:
        ports: See `listening`.
        secret_shown: Programs that have the job's token, or another secret, on their command line.
        taken: What `fakes/neighbour.py` got, of what it tried; None where we can't become another user.
    """

    ports: dict[str, set[tuple[str, int]]]
    secret_shown: list[str]
    taken: dict[str, Any] | None


def documented_processes() -> set[str]:
    """What listens, according to docs/security.md."""
    table = (TESTS.parent / "docs/security.md").read_text().partition("\n|---|---|---|---|\n")[2]
    return {row.split("|")[1].strip() for row in table.partition("\n\n")[0].splitlines()}


def look_at_run(work: Path, model: Path, *flags: str, **env: str) -> Seen:
    """A run on its real parts is looked at after its first step, and ends well."""
    prompts = [{"input": f"{i}+1=", "label": str(i + 1)} for i in range(20)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    words = [
        "--name=run",
        "--label-key=label",
        f"--hf-checkpoint={model}",
        f"--prompt-data={work}/prompts.jsonl",
    ]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with (work / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "hpc.submit", *words, *flags],
            cwd=work,
            env={**os.environ, "PYTHONPATH": paths, **env},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:

            def has_begun() -> bool:
                assert process.poll() is None, (work / "said").read_text()
                return bool(lines_of(work / "runs/run/metrics.jsonl"))

            wait_until(has_begun, 600, (work / "said").read_text)
            looked = look_at(process.pid, work / "runs/run", [*env.values()])
            assert process.wait(600) == 0, (work / "said").read_text()
        finally:
            process.terminate()
            process.wait(120)
    return looked


def look_at(pid: int, run_dir: Path, secrets: Iterable[str] = ()) -> Seen:
    """Look at the run that `pid` has submitted; its trainer is stopped meanwhile, so that it can't end."""
    trainers = [each for each in process_tree(pid) if "rltrain.train" in command_of(each)]
    for trainer in trainers:
        trainer.suspend()
    try:
        processes = [each for each in process_tree(pid) if command_of(each)]
        ports = listening(processes)
        (token,) = {token for each in trainers if (token := each.environ().get("SLURMLIME_TOKEN"))}
        shown = [command_of(each) for each in processes]
        taken = visit(processes, ports, run_dir) if os.getuid() == 0 and SYSTEM_PYTHON.exists() else None
        return Seen(ports, [line for line in shown if any(word in line for word in (token, *secrets))], taken)
    finally:
        for trainer in trainers:
            trainer.resume()


def command_of(process: psutil.Process) -> str:
    """Its command line; empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def visit(
    processes: list[psutil.Process], ports: dict[str, set[tuple[str, int]]], run_dir: Path
) -> dict[str, Any]:
    """What another user gets of a run; and of a file that is open to all, without which this would prove nothing."""
    files, sockets = [str(OPEN_TO_ALL)], set()
    for process in processes:
        files += [f"/proc/{process.pid}/{name}" for name in ("environ", "maps", "mem", "fd", "cwd")]
        with suppress(psutil.NoSuchProcess, OSError):
            files += [file.path for file in process.open_files() if "/slurmlime-" in file.path]
            files += re.findall(r"/dev/shm/\S+", Path(f"/proc/{process.pid}/maps").read_text())
            sockets |= {each.laddr for each in process.net_connections("unix") if each.laddr}
    urls = [
        f"http://{address}:{port}{path}"
        for name in ("supervisor", "router", "engine", "rollout process")
        for address, port in ports.get(name, ())
        for path in (
            *OPEN_PATHS,
            "/",
            "/state",
            "/server_info",
            "/model_info",
            "/workers",
            "/generate",
            "/docs",
        )
    ]
    # Of the run's directory by itself: that pytest's are closed, too, must not be what stops him.
    descriptor = os.open(run_dir, os.O_PATH)
    files += [f"/proc/self/fd/{descriptor}/{path.relative_to(run_dir)}" for path in run_dir.rglob("*")]
    try:
        done = subprocess.run(
            [str(SYSTEM_PYTHON), "-I", "-B", "-c", NEIGHBOUR.read_text()],
            input=json.dumps({"files": files, "sockets": sorted(sockets), "urls": urls}),
            capture_output=True,
            text=True,
            user=65534,
            group=65534,
            extra_groups=[],
            pass_fds=[descriptor],
            cwd="/",
        )
    finally:
        os.close(descriptor)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"tried": len(files)}
