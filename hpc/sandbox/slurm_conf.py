"""The text of every configuration file of a sandbox: pure functions of its shape and its addresses."""

from __future__ import annotations

from dataclasses import dataclass

from hpc.sandbox.paths import SandboxPaths
from hpc.sandbox.spec import BACKUP, Addresses, ClusterSpec

CLUSTER_NAME = "sandbox"


@dataclass(frozen=True)
class Partition:
    """A line `PartitionName=`. Jobs of a lower tier make way for those of a higher one."""

    name: str
    tier: int
    preempt_mode: str = "OFF"
    grace_s: int = 0
    max_time: str = "UNLIMITED"
    default: bool = False


# All but `cpu` hold the GPU nodes.
PARTITIONS = (
    Partition("gpu", tier=10, max_time="2-00:00:00", default=True),
    Partition("low", tier=1, preempt_mode="REQUEUE"),
    Partition("lowgrace", tier=1, preempt_mode="REQUEUE", grace_s=10),
    Partition("lowcancel", tier=1, preempt_mode="CANCEL", grace_s=2),
    Partition("high", tier=100),
    Partition("cpu", tier=10, max_time="1-00:00:00"),
)


def slurm_conf(spec: ClusterSpec, addresses: Addresses, layout: SandboxPaths, user: str) -> str:
    """slurm.conf. `user` runs every daemon; if it is root, all users of the machine may submit."""
    sections = [
        _identity(spec, addresses, layout, user),
        _RESOURCES,
        _accounting(spec, addresses, layout),
        _SCHEDULING,
        spec.extra_conf.rstrip("\n") + "\n" if spec.extra_conf else "",
        _nodes(spec, addresses),
        _partitions(spec),
    ]
    return "\n".join(section for section in sections if section)


def gres_conf(spec: ClusterSpec, layout: SandboxPaths) -> str:
    """gres.conf: each GPU has a device file, as slurmd declares a node with fewer of them invalid."""
    lines = []
    for name in spec.gpu_node_names:
        if kind := spec.gpu_type(name):
            files = f"{layout.state}/dev/gpu[0-{spec.gpus - 1}]"
            lines.append(f"NodeName={name} Name=gpu Type={kind} File={files}\n")
    return "".join(lines)


def hosts_file(spec: ClusterSpec, addresses: Addresses, hostname: str) -> str:
    """/etc/hosts of the nodes: the machine's own name still means the machine."""
    lines = ["127.0.0.1 localhost", f"{addresses.controller} {hostname}"]
    if addresses.controller_name != "localhost":
        lines.append(f"{addresses.controller} {addresses.controller_name}")
    if spec.backup:
        lines.append(f"{addresses.backup} {BACKUP}")
    lines += [f"{addresses.node(index)} {name}" for index, name in enumerate(spec.node_names)]
    return "\n".join(lines) + "\n"


def slurmdbd_conf(addresses: Addresses, layout: SandboxPaths, user: str) -> str:
    """slurmdbd.conf; slurmdbd looks for it beside slurm.conf."""
    return f"""\
AuthType=auth/munge
AuthInfo={layout.munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={addresses.slurmdbd_port}
SlurmUser={user}
DebugLevel=info
LogFile={layout.log}/slurmdbd.log
PidFile={layout.run}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CommitDelay=0
"""


def _identity(spec: ClusterSpec, addresses: Addresses, layout: SandboxPaths, user: str) -> str:
    # cred_expire: a requeued job waits that long before it may start again; Slurm's default is 120 s.
    # NoCtldInAddrAny: slurmctld on one address only. The same for slurmd (NoInAddrAny) breaks srun inside a node:
    # the kernel's source address for all of 127/8 is 127.0.0.1, where srun would then not listen.
    # More than a busy machine makes it wait: the backup then takes over.
    second = f"SlurmctldHost={BACKUP}({addresses.backup})\n" if spec.backup else ""
    timeout = 10 if spec.backup else 5
    return f"""\
ClusterName={CLUSTER_NAME}
SlurmctldHost={addresses.controller_name}({addresses.controller})
{second}\
SlurmctldPort={addresses.slurmctld_port}
SlurmctldTimeout={timeout}
CommunicationParameters=NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={layout.munge_socket},cred_expire=5
StateSaveLocation={layout.state}/slurmctld
SlurmdSpoolDir={layout.state}/slurmd-%n
SlurmctldPidFile={layout.run}/slurmctld.pid
SlurmdPidFile={layout.run}/slurmd-%n.pid
SlurmctldLogFile={layout.log}/slurmctld.log
SlurmdLogFile={layout.log}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
"""


# config_overrides: nodes have what slurm.conf says, not what slurmd finds.
# ReturnToService=2: a node that comes back is used again, whatever the reason for which it was down.
_RESOURCES = """\
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
DefMemPerCPU=1000
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
ReturnToService=2
"""

# Heterogeneous jobs are started by the backfill scheduler alone: it runs every second.
_SCHEDULING = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_resolution=1,bf_hetjob_immediate,nohold_on_prolog_fail
KillWait=2
CompleteWait=0
MinJobAge=600
InactiveLimit=0
SlurmdTimeout=5
BatchStartTimeout=10
MessageTimeout=10
"""


def _accounting(spec: ClusterSpec, addresses: Addresses, layout: SandboxPaths) -> str:
    if not spec.accounting:
        return "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none\n"
    kinds = [f"gres/gpu:{kind}" for kind in spec.gpu_types] if spec.gpus else []
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={addresses.slurmdbd_port}
AccountingStoragePass={layout.munge_socket}
AccountingStorageTRES={",".join(["gres/gpu", *kinds])}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
"""


def _nodes(spec: ClusterSpec, addresses: Addresses) -> str:
    lines = []
    for index, name in enumerate(spec.node_names):
        kind = spec.gpu_type(name)
        gres = f" Gres=gpu:{kind}:{spec.gpus} Feature={kind}" if kind else ""
        lines.append(
            f"NodeName={name} NodeHostname={name} NodeAddr={addresses.node(index)}"
            f" Port={addresses.slurmd_port(index)} CPUs={spec.cpus} RealMemory={spec.memory_mb}{gres} State=UNKNOWN\n"
        )
    return "".join(lines)


def _partitions(spec: ClusterSpec) -> str:
    gpu_nodes = ",".join(spec.gpu_node_names)
    cpu_nodes = ",".join(name for name in spec.node_names if name not in spec.gpu_node_names)
    lines = []
    for partition in PARTITIONS:
        nodes = cpu_nodes if partition.name == "cpu" else gpu_nodes
        if nodes:
            lines.append(
                f"PartitionName={partition.name} Nodes={nodes} Default={'YES' if partition.default else 'NO'}"
                f" PriorityTier={partition.tier} PreemptMode={partition.preempt_mode} GraceTime={partition.grace_s}"
                f" MaxTime={partition.max_time} DefaultTime=60\n"
            )
    return "".join(lines)
