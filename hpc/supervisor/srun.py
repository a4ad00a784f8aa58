"""Start the processes of a job as steps of the Slurm job that this process is the batch script of, and read what srun
says of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc.planning.processes import MAIN_ROLE, RoleProcess
from hpc.planning.slurm_tables import Value
from hpc.slurm.nodelist import expand
from hpc.supervisor.causes import End, TaskExit, end_of_step, failed_nodes_in, parse_exits
from hpc.supervisor.launcher import Handle
from hpc.supervisor.said import Said, allow_many_files
from hpc.supervisor.task import CLEANS_UP, END, make_spec
from rltrain.run import processes
from rltrain.run.errors import EXIT_REQUEUE

CANARY = "canary"

# What sbatch's flags leave in the environment, where srun takes them for its own.
_INPUTS = re.compile(
    r"SLURM_(N(TASKS|PROCS|NODES)|NTASKS_PER_\w+|CPUS_PER_\w+|GPUS(_PER_\w+)?|GRES(_FLAGS)?|MEM_(PER_\w+|BIND\w*)"
    r"|TRES_\w+|CPU_BIND\w*|GPU_BIND\w*|DISTRIBUTION|EXPORT_ENV|EXCLUSIVE|OVERCOMMIT|THREADS_PER_CORE|HINT|CONSTRAINT|TIMELIMIT)"
    r"(_(HET|PACK)_GROUP_\d+)?"
)


@dataclass(frozen=True)
class Allocation:
    """The nodes, GPUs and CPUs of the job.

    Attributes:
        nodes: names of the nodes, a tuple for each component.
        gpus: `--gpus-per-node` of each component, None for none.
        cpus: CPUs of a node, for each component.
        is_het: whether it is a heterogeneous job.
    """

    nodes: tuple[tuple[str, ...], ...]
    gpus: tuple[str | None, ...]
    cpus: tuple[int | None, ...]
    is_het: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Allocation:
        """Read what Slurm tells the batch script."""
        size = int(env.get("SLURM_HET_SIZE", 0))
        suffixes = [f"_HET_GROUP_{k}" for k in range(size)] or [""]
        cpus = [env.get(f"SLURM_CPUS_PER_TASK{suffix}") for suffix in suffixes]
        return cls(
            nodes=tuple(tuple(expand(env[f"SLURM_JOB_NODELIST{suffix}"])) for suffix in suffixes),
            gpus=tuple(env.get(f"SLURM_GPUS_PER_NODE{suffix}") for suffix in suffixes),
            cpus=tuple(int(count) if count else None for count in cpus),
            is_het=size > 0,
        )

    @property
    def all_nodes(self) -> tuple[str, ...]:
        """Names of all nodes."""
        return tuple(node for nodes in self.nodes for node in nodes)


def step_command(
    process: RoleProcess, allocation: Allocation, spec: str, extra: Mapping[str, Value], python: str
) -> list[str]:
    """The srun command of a role. Steps overlap: each sees all that its nodes have, and takes what is planned."""
    where = process.placement
    assert where is not None
    names = [allocation.nodes[where.component][i] for i in where.nodes]
    command = ["srun", f"--job-name={process.role}"]
    if allocation.is_het:
        command.append(f"--het-group={where.component}")
    command += [
        f"--nodes={len(names)}",
        f"--ntasks={process.count}",
        f"--ntasks-per-node={where.tasks_per_node}",
    ]
    command += [f"--nodelist={','.join(names)}", "--distribution=block", "--overlap"]
    if cpus := allocation.cpus[where.component]:
        command.append(f"--cpus-per-task={max(1, cpus // where.tasks_per_node)}")
    if gpus := allocation.gpus[where.component]:
        command.append(f"--gpus-per-node={gpus}")
    # A rank that ends early must not take the others along: the supervisor decides.
    command += ["--export=ALL", "--input=none", "--unbuffered", "--kill-on-bad-exit=0", "--wait=60"]
    command += [f"--{name}" if value is True else f"--{name}={value}" for name, value in extra.items()]
    return [*command, python, "-m", "hpc.supervisor.task", spec]


@dataclass
class SrunLauncher:
    """Steps of the job that this process runs in.

    Attributes:
        allocation: the job's nodes.
        extra: further flags of srun.
        python: interpreter of the tasks.
    """

    allocation: Allocation
    extra: Mapping[str, Value] = field(default_factory=dict)
    python: str = "python3"

    def __post_init__(self) -> None:
        """This process ends orphans, and has a file open for each step."""
        processes.become_subreaper()
        self._limit_files = allow_many_files()

    def start(self, process: RoleProcess, env: Mapping[str, str], log_dir: Path) -> Handle:
        """See `Launcher`."""
        gpus = process.placement.gpus if process.placement else None
        ranks = process.role == MAIN_ROLE
        spec = make_spec(
            process.role, process.index, process.argv, log_dir, gpus, ranks=ranks, spans=process.spans
        )
        command = step_command(process, self.allocation, spec, self.extra, self.python)
        srun_log = log_dir / f"srun-{process.name}.log"
        logs = [log_dir / f"{name}.log" for name in process.names]
        return self._start(
            command, {**env, **process.env}, srun_log, logs, cleans_up=process.role in CLEANS_UP
        )

    def start_canary(self, env: Mapping[str, str], log_dir: Path) -> Handle:
        """A step that does nothing but die of the signal by which Slurm announces a preemption.

        With a grace time only steps get it, the batch process would not know.
        """
        command = [
            "srun",
            f"--job-name={CANARY}",
            "--nodes=1",
            "--ntasks=1",
            "--overlap",
            "--cpus-per-task=1",
        ]
        command += ["--het-group=0"] if self.allocation.is_het else []
        command += [
            f"--nodelist={self.allocation.nodes[0][0]}",
            "--export=NONE",
            "--input=none",
            "/bin/sleep",
            "infinity",
        ]
        return self._start(command, env, log_dir / f"srun-{CANARY}.log", [])

    def close(self) -> list[int]:
        """See `Launcher`."""
        return processes.kill_descendants(os.getpid())

    def _start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        task_logs: list[Path],
        *,
        cleans_up: bool = False,
    ) -> _StepHandle:
        said = Said(log)
        die_with_us = processes.dying_with_us(signal.SIGTERM)

        def prepare() -> None:
            self._limit_files()
            die_with_us()

        process = subprocess.Popen(
            command,
            env=srun_env(env),
            stdin=subprocess.DEVNULL,
            stdout=said.fd,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
        return _StepHandle(process, log, said, task_logs, cleans_up)


def srun_env(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for srun: without the flags that it would take from there."""
    return {name: value for name, value in env.items() if not _INPUTS.fullmatch(name)}


@dataclass
class _StepHandle:
    process: subprocess.Popen[bytes]
    log: Path  # what srun says
    said: Said
    task_logs: list[Path]
    cleans_up: bool = False  # its tasks end by themselves on request
    _is_killed: bool = False

    @property
    def pid(self) -> int:
        """Id of srun."""
        return self.process.pid

    def poll(self) -> int | None:
        """Exit code of the first task that failed, even while others run; else of all of them."""
        if bad := self._failures():
            return bad[0].code
        code = self.process.poll()
        # 128 and the number of a signal; srun itself fails with other codes up to 255, from the numbers of errors.
        return 128 - code if code is not None and 128 < code <= 128 + signal.SIGSYS else code

    def has_ended(self) -> bool:
        """Whether srun has, which waits for all tasks."""
        return self.process.poll() is not None

    def lost_a_node(self) -> bool:
        """Whether srun says so."""
        return bool(failed_nodes_in(self._said()))

    def end(self) -> End:
        """Why it ended, as far as srun says."""
        return end_of_step(self._said(), self.poll() or 0)

    def failed_log(self) -> Path:
        """Log of the first task that failed, or srun's own if no task had begun."""
        bad = self._failures()
        task = bad[0].task if bad else 0
        log = self.task_logs[task] if task < len(self.task_logs) else self.log
        return log if log.exists() else self.log

    def _failures(self) -> list[TaskExit]:
        return [each for each in parse_exits(self._said()) if each.code != EXIT_REQUEUE]

    def _said(self) -> str:
        return self.said.read(self.process.poll() is not None)

    def terminate(self) -> None:
        """Have srun tell the tasks to clean up and end, or kill those that have nothing to clean up."""
        if self.process.poll() is None:
            processes.send_signal(self.process.pid, END if self.cleans_up else signal.SIGTERM)

    def kill(self) -> None:
        """Have srun kill the tasks; if that has been tried, end srun itself."""
        if self.process.poll() is None:
            is_first = self.cleans_up and not self._is_killed
            processes.send_signal(self.process.pid, signal.SIGTERM if is_first else signal.SIGKILL)
            self._is_killed = True


def failed_nodes(log_dir: Path) -> list[str]:
    """Nodes that failed, according to srun."""
    return failed_nodes_in("".join(path.read_text(errors="replace") for path in log_dir.glob("srun-*.log")))
