"""The programs of a sandbox, and the Debian packages that contain them."""

from __future__ import annotations

import os
import shutil

from rltrain.run.errors import UserError

PACKAGE_OF = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "unshare": "util-linux",
}
_NETWORK_PACKAGE_OF = {"ip": "iproute2"}  # for `ClusterSpec.networks` only
ACCOUNTING_PACKAGE_OF = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
}
# slurmdbd finds its database through a plugin, and mariadb-install-db needs programs of the client package.
_ACCOUNTING_COMPANIONS = ("slurm-wlm-mysql-plugin", "mariadb-client-core")
# Daemons lie in directories that are not on an ordinary user's PATH.
_SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"


class MissingPackagesError(UserError):
    """Slurm is not installed here, or not all of it."""


def search_path() -> str:
    """PATH with the directories of daemons added."""
    return os.environ.get("PATH", "") + ":" + _SYSTEM_DIRECTORIES


def find_program(name: str) -> str:
    """Absolute path of a program.

    Raises:
        MissingPackagesError: it is not installed; the message has the command that installs it.
    """
    path = shutil.which(name, path=search_path())
    if path is None:
        package = (PACKAGE_OF | ACCOUNTING_PACKAGE_OF | _NETWORK_PACKAGE_OF).get(name, name)
        raise MissingPackagesError(_hint([name], [package]))
    return path


def require_packages(accounting: bool = False) -> None:
    """Check that everything a sandbox starts is installed.

    Raises:
        MissingPackagesError: one line with what is missing and the command that installs it.
    """
    wanted = PACKAGE_OF | (ACCOUNTING_PACKAGE_OF if accounting else {})
    missing = [name for name in wanted if shutil.which(name, path=search_path()) is None]
    if missing:
        packages = list(dict.fromkeys(wanted[name] for name in missing))
        if set(missing) & set(ACCOUNTING_PACKAGE_OF):
            packages += _ACCOUNTING_COMPANIONS
        raise MissingPackagesError(_hint(missing, packages))


def _hint(programs: list[str], packages: list[str]) -> str:
    return (
        f"the sandbox needs {', '.join(programs)}, which this machine lacks. On Debian or Ubuntu:"
        f" sudo apt-get install --no-install-recommends {' '.join(packages)}"
    )
