"""This machine: cores and threads, ports, addresses, open files, GPUs."""

from __future__ import annotations

import ipaddress
import os
import re
import resource
import socket
from contextlib import suppress
from pathlib import Path

from hpc.doctor.check import Check, fail, ok, warn

_FEW_FILES = 4096


def check_machine(processes: int, is_batch: bool) -> list[Check]:
    """All checks that need no run.

    Args:
        processes: that will compute on this machine at once.
        is_batch: whether the job will run on other machines, which must reach each other.
    """
    cores = len(os.sched_getaffinity(0))
    checks = [check_ports("127.0.0.1"), check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])]
    if is_batch:
        return [*checks, check_address(host_addresses())]
    return [*checks, check_threads(os.environ.get("OMP_NUM_THREADS"), cores, processes)]


def check_ports(host: str) -> Check:
    """Whether ports can be opened and reached."""
    try:
        with socket.create_server((host, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((host, port), timeout=5):
                return ok("ports", f"port {port} of {host} could be opened and reached")
    except OSError as error:
        return fail(
            "ports", f"no port of {host} can be used: {error}", "a firewall or a sandbox is in the way"
        )


def check_open_files(limit: int) -> Check:
    """Whether the soft limit of open files is enough for hundreds of requests in flight."""
    if limit != resource.RLIM_INFINITY and limit < _FEW_FILES:
        return warn(
            "open files",
            f"the limit is {limit}",
            f"ulimit -n {_FEW_FILES}: each request in flight takes one open file",
        )
    return ok("open files", "no limit" if limit == resource.RLIM_INFINITY else f"the limit is {limit}")


def check_threads(omp_num_threads: str | None, cores: int, processes: int) -> Check:
    """Whether OMP_NUM_THREADS makes sense for so many cores and processes."""
    cores_text = (
        f"{cores} core{'s' * (cores != 1)} for {processes} computing process{'es' * (processes != 1)}"
    )
    if omp_num_threads is None:
        return ok("threads", f"{cores_text}; OMP_NUM_THREADS is not set, so every process chooses")
    if not omp_num_threads.isdigit() or not int(omp_num_threads):
        return fail(
            "threads",
            f"OMP_NUM_THREADS is {omp_num_threads!r}, which is not a number",
            "unset OMP_NUM_THREADS",
        )
    threads = int(omp_num_threads)
    if threads > cores:
        advice = f"export OMP_NUM_THREADS={max(1, cores // max(processes, 1))}: threads that share a core slow it down"
        return warn("threads", f"OMP_NUM_THREADS={threads}, but {cores_text}", advice)
    return ok("threads", f"{cores_text}, OMP_NUM_THREADS={threads}")


def host_addresses() -> list[str]:
    """Addresses of this machine's name, IPv4 first; none if the name has no address."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return [address for address in addresses if not address.startswith("fe80:")]  # of use on one cable only


def check_address(addresses: list[str]) -> Check:
    """Whether the machine's own name leads to an address that others can reach."""
    name = socket.gethostname()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").lstrip("=^").split(",")[0]
        if wanted and not _has_interface(wanted) and not os.environ[variable].startswith("^"):
            return fail("network", f"{variable} is {wanted}, and this machine has no interface of that name",
                        f"one of: {', '.join(interfaces())}; or unset {variable}")  # fmt: skip
    if not addresses:
        return warn("network", f"the name {name} has no address", "nodes must find each other by name")
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        return warn("network", f"the name {name} stands for {addresses[0]}, which only this machine can reach",
                    "fine if the nodes' names do not; --probe-nodes looks")  # fmt: skip
    return ok("network", f"{name} is {', '.join(addresses)}; interfaces: {', '.join(interfaces())}")


def interfaces() -> list[str]:
    """Names of the network interfaces, without loopback."""
    return sorted(path.name for path in Path("/sys/class/net").glob("*") if path.name != "lo")


def _has_interface(name: str) -> bool:
    return any(interface.startswith(name) for interface in [*interfaces(), "lo"])


def machine_memory() -> float:
    """Bytes of memory that programs could have now, in this container if it has a limit of its own."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert available
    sizes = [float(available[1]) * 1024]
    with suppress(OSError, ValueError):  # no cgroups, or "max"
        sizes.append(float(int(Path("/sys/fs/cgroup/memory.max").read_text())))
    return min(sizes)
