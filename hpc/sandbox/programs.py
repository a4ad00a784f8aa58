"""The programs of a sandbox: nodes (slurmd in namespaces of their own), the controller, MariaDB and slurmdbd."""

from __future__ import annotations

import os
import shlex
import socket

from hpc.sandbox import slurm_conf
from hpc.sandbox.daemons import DaemonError, Daemons
from hpc.sandbox.network import INSIDE
from hpc.sandbox.packages import find_program
from hpc.sandbox.paths import SandboxPaths
from hpc.sandbox.spec import Addresses

# The shell is the node's process 1 and reaps what jobs leave behind. It ends with slurmd, and everything
# in the node with it. Nodes share the machine's file system but for /dev/shm and /etc/hosts.
_INIT = """\
hostname {name} && mount --bind {hosts} /etc/hosts && mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 1
{slurmd} -D -N {name} -f {conf} &
wait $!
"""
# In a network of its own: the server hands in the cable.
_WIRED = """\
until {ip} link set {inside} up 2>/dev/null; do sleep 0.02; done
{ip} addr add {address}/24 dev {inside} && {ip} link set lo up || exit 1
"""
ACCOUNT = "research"
# Small and fast: the data lives no longer than the daemon.
_SMALL = (
    "--skip-log-bin",
    "--performance-schema=OFF",
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=8M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--innodb-doublewrite=OFF",
)
# Memory that only this process sees: a thousand fdatasync calls cost nothing there, and nothing stays behind.
_RUN = """\
mount -t tmpfs -o size=1g,mode=0700 tmpfs {directory} && {install} >/dev/null && exec {serve}
"""


def node_command(name: str, layout: SandboxPaths, address: str | None = None) -> list[str]:
    """Start a node. Killing this process (`unshare`) kills all that runs in the node, like a power cut.

    With an `address` it waits for the cable of a network of its own.
    """
    script = _INIT.format(
        name=shlex.quote(name),
        hosts=shlex.quote(str(layout.etc / "hosts")),
        slurmd=shlex.quote(find_program("slurmd")),
        conf=shlex.quote(str(layout.slurm_conf)),
    )
    namespaces = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc"]
    if address is not None:
        script = _WIRED.format(ip=find_program("ip"), inside=INSIDE, address=address) + script
        namespaces.append("--net")
    return unshare(*namespaces, "--", find_program("bash"), "-c", script)


def controller_command(layout: SandboxPaths, name: str, again: bool = False) -> list[str]:
    """Start slurmctld with an empty state, or `again` with its own, under the host name that slurm.conf knows it by."""
    hosts = shlex.quote(str(layout.etc / "hosts"))
    slurmctld = [find_program("slurmctld"), "-D", *([] if again else ["-c"]), "-f", str(layout.slurm_conf)]
    # It ends the process that its file names; on a machine of its own that would be none of another controller's.
    named, own = (shlex.quote(f"{layout.run}/{file}") for file in ("slurmctld.pid", f"slurmctld-{name}.pid"))
    script = (
        f"hostname {name} && mount --bind {hosts} /etc/hosts && touch {named} {own} && mount --bind {own} {named}"
        f" && exec {shlex.join(slurmctld)}"
    )
    return unshare("--uts", "--mount", "--", find_program("bash"), "-c", script)


def check_namespaces(daemons: Daemons) -> None:
    """Try whether this machine lets us make namespaces at all.

    Raises:
        DaemonError: it does not; the message says what to change.
    """
    try:
        daemons.run(unshare("--mount", "--pid", "--fork", "--uts", "--", "true"))
    except DaemonError as error:
        raise DaemonError(
            f"{error}. The nodes are Linux namespaces, which need CAP_SYS_ADMIN (a container: --privileged), or for an"
            " ordinary user a kernel that allows user namespaces (user.max_user_namespaces > 0)."
        ) from None


def unshare(*arguments: str) -> list[str]:
    """unshare(1); an ordinary user gets the privilege for it from a user namespace."""
    privilege = [] if os.geteuid() == 0 else ["--map-current-user", "--keep-caps"]
    return [find_program("unshare"), *privilege, *arguments]


def start_database(daemons: Daemons, layout: SandboxPaths, user: str) -> None:
    """Make an empty MariaDB and start it. Returns at once."""
    layout.database.mkdir(mode=0o700)
    layout.database_socket.parent.mkdir(mode=0o700)
    # A directory of its own for temporary tables: a MariaDB that starts deletes all that it finds there.
    directories = [f"--datadir={layout.database}/data", f"--tmpdir={layout.database}"]
    common = ["--no-defaults", *directories, f"--user={user}", *_SMALL]
    install = [find_program("mariadb-install-db"), *common, "--skip-test-db"]
    install += ["--auth-root-authentication-method=normal"]
    serve = [find_program("mariadbd"), *common, "--skip-networking", f"--socket={layout.database_socket}"]
    serve += [f"--pid-file={layout.database}/mariadbd.pid", f"--log-error={layout.log}/mariadbd.log"]
    serve += ["--innodb-lock-wait-timeout=900"]  # slurmdbd complains about the default
    script = _RUN.format(directory=layout.database, install=shlex.join(install), serve=shlex.join(serve))
    daemons.start("mariadbd", unshare("--mount", "--", find_program("bash"), "-c", script))


def start_slurmdbd(daemons: Daemons, layout: SandboxPaths, addresses: Addresses, user: str) -> None:
    """Start slurmdbd on the database that was started, and register the cluster, one account, one user."""
    daemons.wait_until(layout.database_socket.exists, "MariaDB")
    conf = layout.etc / "slurmdbd.conf"
    conf.touch(mode=0o600)  # slurmdbd insists
    conf.write_text(slurm_conf.slurmdbd_conf(addresses, layout, user))
    daemons.env["MYSQL_UNIX_PORT"] = str(layout.database_socket)  # libmariadb's name for the socket's path
    daemons.start("slurmdbd", [find_program("slurmdbd"), "-D"])
    daemons.wait_until(lambda: _listens(addresses.slurmdbd_port), "slurmdbd", timeout=60)
    sacctmgr = [find_program("sacctmgr"), "-i"]
    daemons.run([*sacctmgr, "add", "cluster", slurm_conf.CLUSTER_NAME])
    daemons.run([*sacctmgr, "add", "account", ACCOUNT, "Description=sandbox", "Organization=sandbox"])
    daemons.run([*sacctmgr, "add", "user", user, f"Account={ACCOUNT}", "AdminLevel=Admin"])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
