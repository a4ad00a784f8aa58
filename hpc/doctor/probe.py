"""Look at the nodes with a short job that reports what each sees. `python -m hpc.doctor.probe DIR` is that job."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.doctor.check import Check, fail, ok, warn
from hpc.doctor.machine import host_addresses
from hpc.doctor.storage import nearest_existing
from hpc.gpus import local_gpus
from hpc.slurm.client import SlurmClient, SlurmError
from rltrain import packages

_QUEUE_SECONDS = 120
_MARK = "SLURMLIME_PROBE "
_PACKAGES = ("torch", "megatron-core", "sglang", "sglang-router")


def probe_nodes(
    client: SlurmClient, runs_dir: Path, partition: str, nodes: int, options: Sequence[str] = ()
) -> list[Check]:
    """Start one task on each of `nodes` nodes for a few seconds and report what they see.

    Args:
        client: should allow for a few minutes.
        options: further ones for srun, such as `--account=x`.
    """
    shared = nearest_existing(runs_dir)
    mark = shared / f".slurmlime-probe-{secrets.token_hex(4)}"
    mark.touch(mode=0o600)
    command = [
        "srun", f"--partition={partition}", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
        "--cpus-per-task=1", "--time=2", f"--immediate={_QUEUE_SECONDS}", "--job-name=slurmlime-probe",
        f"--chdir={shared}", *options, sys.executable, "-m", "hpc.doctor.probe", str(mark),
    ]  # fmt: skip
    try:
        answers = read_answers(client.run(*command))
    except SlurmError as error:
        return [
            fail("nodes", f"the probe job failed: {error}", "nodes may all be busy, or lack this directory")
        ]
    finally:
        mark.unlink(missing_ok=True)
    return judge(answers, nodes, str(shared), {name: packages.installed_version(name) for name in _PACKAGES})


def read_answers(output: str) -> list[dict[str, Any]]:
    """The answers of the tasks; other lines (a login script's greeting) are left out."""
    lines = (line for line in output.splitlines() if line.startswith(_MARK))
    return [json.loads(line.removeprefix(_MARK)) for line in lines]


def judge(
    answers: Sequence[dict[str, Any]], nodes: int, shared: str, versions: dict[str, str | None]
) -> list[Check]:
    """Checks from the nodes' answers; `versions` are those of this machine's packages."""
    if len(answers) < nodes:
        return [
            fail(
                "nodes",
                f"only {len(answers)} of {nodes} nodes answered",
                "see the partition's nodes: sinfo -R",
            )
        ]
    blind = [answer["host"] for answer in answers if not answer["sees_mark"]]
    checks = [
        fail(
            "shared directory", f"{', '.join(blind)} can't see {shared}", "a --runs-dir that all nodes share"
        )
        if blind
        else ok(
            "shared directory", f"{shared} is seen from {', '.join(answer['host'] for answer in answers)}"
        )
    ]
    differing = [
        f"{answer['host']} has {name} {version or 'not at all'}, this machine {versions.get(name) or 'not at all'}"
        for answer in answers
        for name, version in answer["packages"].items()
        if version is None or version != (versions.get(name) or version)
    ]
    if differing:
        checks.append(
            warn("packages on nodes", "; ".join(differing), "submit with the environment that nodes have")
        )
    else:
        checks.append(
            ok("packages on nodes", ", ".join(f"{k} {v}" for k, v in answers[0]["packages"].items()))
        )
    if old := {answer["driver"]: answer["host"] for answer in answers if answer["driver"]}:
        checks.append(
            fail("driver of nodes", "; ".join(f"{host}: {problem}" for problem, host in old.items()))
        )
    lonely = [
        answer["host"]
        for answer in answers
        if all(ip == "::1" or ip.startswith("127.0.0.1") for ip in answer["addresses"])
    ]
    if lonely:
        checks.append(fail("network of nodes", f"{', '.join(lonely)}: the node's own name is not an address that other"
                           " nodes can reach", "ask the site, or give nodes' addresses in /etc/hosts"))  # fmt: skip
    gpus = sorted({answer["gpus"] for answer in answers})
    checks.append(ok("GPUs on nodes", f"{' or '.join(map(str, gpus))} visible without asking for any"))
    return checks


def look(mark: Path) -> dict[str, Any]:
    """The view from this node: the marker file, packages, addresses, GPUs, cores."""
    return {
        "host": os.uname().nodename,
        "sees_mark": mark.exists(),
        "packages": {name: packages.installed_version(name) for name in _PACKAGES},
        "driver": packages.driver_problem(packages.torch_cuda(), packages.driver_cuda()),
        "addresses": host_addresses(),
        "gpus": len(local_gpus()),
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    print(_MARK + json.dumps(look(Path(sys.argv[1]))), flush=True)
