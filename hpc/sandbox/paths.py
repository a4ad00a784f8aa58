"""Where everything of a sandbox lies below its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SandboxPaths:
    """The paths below a sandbox's directory."""

    root: Path

    @property
    def etc(self) -> Path:
        """slurm.conf and its companions."""
        return self.root / "etc"

    @property
    def slurm_conf(self) -> Path:
        """The file that SLURM_CONF names."""
        return self.etc / "slurm.conf"

    @property
    def spec(self) -> Path:
        """The ClusterSpec as JSON; marks the directory as a sandbox's."""
        return self.root / "sandbox.json"

    @property
    def run(self) -> Path:
        """Sockets and process ids."""
        return self.root / "run"

    @property
    def control_socket(self) -> Path:
        """Where the process in charge takes commands: it can be connected to as long as the cluster is up."""
        return self.run / "control.sock"

    @property
    def munge_socket(self) -> Path:
        """munged's."""
        return self.run / "munge.sock"

    @property
    def database_socket(self) -> Path:
        """MariaDB's, in a directory of mode 0700: anyone who can reach it is the database's administrator."""
        return self.run / "database" / "mariadb.sock"

    @property
    def database(self) -> Path:
        """Where MariaDB's files are, visible to it alone."""
        return self.state / "mariadb"

    @property
    def log(self) -> Path:
        """One log for each daemon."""
        return self.root / "log"

    @property
    def state(self) -> Path:
        """State of the daemons: slurmctld's state, spool directories, munge's key, the database, device files."""
        return self.root / "state"
