"""Accounting: a private MariaDB (in memory, Unix socket only) and slurmdbd on top of it."""

from __future__ import annotations

import shlex
import socket

from hpc.sandbox import config
from hpc.sandbox.daemons import Daemons
from hpc.sandbox.layout import Layout
from hpc.sandbox.nodes import unshare
from hpc.sandbox.packages import find_program
from hpc.sandbox.spec import Addresses

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


def start_database(daemons: Daemons, layout: Layout, user: str) -> None:
    """Make an empty MariaDB and start it. Returns at once."""
    layout.database.mkdir(mode=0o700)
    layout.database_socket.parent.mkdir(mode=0o700)
    common = ["--no-defaults", f"--datadir={layout.database}/data", f"--user={user}", *_SMALL]
    install = [find_program("mariadb-install-db"), *common, "--skip-test-db"]
    install += ["--auth-root-authentication-method=normal"]
    serve = [find_program("mariadbd"), *common, "--skip-networking", f"--socket={layout.database_socket}"]
    serve += [f"--pid-file={layout.database}/mariadbd.pid", f"--log-error={layout.log}/mariadbd.log"]
    serve += ["--innodb-lock-wait-timeout=900"]  # slurmdbd complains about the default
    script = _RUN.format(directory=layout.database, install=shlex.join(install), serve=shlex.join(serve))
    daemons.start("mariadbd", unshare("--mount", "--", find_program("bash"), "-c", script))


def start_slurmdbd(daemons: Daemons, layout: Layout, addresses: Addresses, user: str) -> None:
    """Start slurmdbd on the database that was started, and register the cluster, one account, one user."""
    daemons.wait_until(layout.database_socket.exists, "MariaDB")
    conf = layout.etc / "slurmdbd.conf"
    conf.touch(mode=0o600)  # slurmdbd insists
    conf.write_text(config.slurmdbd_conf(addresses, layout, user))
    daemons.env["MYSQL_UNIX_PORT"] = str(layout.database_socket)  # libmariadb's name for the socket's path
    daemons.start("slurmdbd", [find_program("slurmdbd"), "-D"])
    daemons.wait_until(lambda: _listens(addresses.slurmdbd_port), "slurmdbd", timeout=60)
    sacctmgr = [find_program("sacctmgr"), "-i"]
    daemons.run([*sacctmgr, "add", "cluster", config.CLUSTER_NAME])
    daemons.run([*sacctmgr, "add", "account", ACCOUNT, "Description=sandbox", "Organization=sandbox"])
    daemons.run([*sacctmgr, "add", "user", user, f"Account={ACCOUNT}", "AdminLevel=Admin"])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
