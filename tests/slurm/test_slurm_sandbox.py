"""The sandbox is a real cluster: jobs run, are preempted, lose their nodes, and nothing stays behind."""

from __future__ import annotations

import getpass
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.slurm_fixture import need_slurm, open_directory, submit, until, wait_for

from hpc.accounting import attempts
from hpc.sandbox import ClusterSpec, MissingPackagesError, Sandbox, require_packages
from hpc.sandbox.control import Connection
from hpc.sandbox.daemons import Daemons
from hpc.sandbox.packages import find_program
from hpc.sandbox.paths import SandboxPaths
from hpc.sandbox.programs import start_database
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError
from hpc.slurm.facts import read_facts
from hpc.slurm.nodelist import compress, expand
from hpc.slurm.states import JobState
from rltrain.run.errors import UserError

ROOT = Path(__file__).parents[2]
HET = "#SBATCH -N1 -p low --gpus-per-node=h100:2\n#SBATCH hetjob\n#SBATCH -N2 -p low --gpus-per-node=a100:4\n"
SMALL = ClusterSpec(nodes=2, cpu_nodes=0)


@pytest.fixture
def directory() -> Iterator[Path]:
    """For a cluster of the test's own."""
    need_slurm()
    with open_directory() as path:
        yield path


def sandbox(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.sandbox", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def processes_of(directory: Path) -> list[str]:
    """Command lines of all processes that know a directory from their arguments or their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if bytes(directory) in command + environment and int(process.name) != os.getpid():
            found.append(command.replace(b"\0", b" ").decode())
    return found


@pytest.mark.slurm
def test_its_database_leaves_the_temporary_tables_of_others_alone(directory: Path, tmp_path: Path) -> None:
    """A MariaDB that starts deletes all it finds in its directory for them, those of another sandbox too."""
    table = tmp_path / "#sql-temptable-1-2-3.MAI"
    table.write_text("of another server")
    layout = SandboxPaths(directory)
    for path in (layout.log, layout.run, layout.database.parent):
        path.mkdir()
    daemons = Daemons(layout.log, {**os.environ, "TMPDIR": str(tmp_path)})
    try:
        start_database(daemons, layout, "root" if os.geteuid() == 0 else getpass.getuser())
        daemons.wait_until(layout.database_socket.exists, "MariaDB")
    finally:
        daemons.kill("mariadbd")
    assert table.exists()


class TestInput:
    """Needs no Slurm."""

    def test_missing_packages_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(MissingPackagesError) as error:
            require_packages()
        message = str(error.value)
        assert "sbatch" in message and "apt-get install" in message and "slurm-client" in message
        assert "\n" not in message

    def test_tests_are_skipped_without_slurm_but_fail_in_ci(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match="apt-get install"):
            need_slurm()
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="apt-get install"):
            need_slurm()

    def test_client_without_slurm(self) -> None:
        with pytest.raises(SlurmError, match="not a login node"):
            SlurmClient({"PATH": "/nowhere"}).poll(["1"])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("with space", "letters, digits"),
            ("x" * 100, "too long"),
            ("full", "not empty"),
            ("file/below", "file"),
        ],
    )
    def test_directories_that_can_not_be_used(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").touch()
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=message):
            Sandbox(tmp_path / name).up()
        assert (tmp_path / "full" / "thesis.txt").exists()

    def test_shapes_that_can_not_be(self) -> None:
        for wrong in (
            {"nodes": 0},
            {"nodes": 500},
            {"gpus": -1},
            {"gpu_types": ("h100 Port=1",)},
            {"gpu_types": ()},
        ):
            with pytest.raises(UserError):
                ClusterSpec(**wrong)

    def test_a_spec_survives_its_file(self) -> None:
        spec = ClusterSpec(
            nodes=3, gpu_types=("x", "y", "z"), extra_conf="SlurmctldParameters=enable_configless"
        )
        assert ClusterSpec.from_json(spec.to_json()) == spec
        assert [spec.gpu_type(name) for name in spec.node_names] == ["x", "y", "z", None]


@pytest.mark.slurm
class TestLife:
    def test_command_line(self, directory: Path) -> None:
        up = sandbox("up", directory, "--nodes", "2", "--cpu-nodes", "0")
        assert up.returncode == 0, up.stderr
        exported = sandbox("env", directory).stdout.splitlines()
        assert exported == [f"export SLURM_CONF={directory}/etc/slurm.conf", "export OMP_NUM_THREADS=1"]
        again = sandbox("up", directory)
        assert again.returncode == 2 and "up in" in again.stderr and "Traceback" not in again.stderr
        cluster = Sandbox(directory)
        assert sorted(cluster.run("srun", "-N2", "hostname").split()) == ["node1", "node2"]
        submit(cluster, "sleep 600", "-N2")
        down = sandbox("down", directory)
        assert down.returncode == 0, down.stderr
        assert processes_of(directory) == [] and str(directory) not in Path("/proc/mounts").read_text()
        assert sandbox("env", directory).returncode == 2
        assert sandbox("down", directory).returncode == 0  # it is what was asked for

    @pytest.mark.parametrize("victim", ["owner", "server"])
    def test_nothing_outlives_a_kill(self, directory: Path, victim: str) -> None:
        code = (
            "import os, sys; from hpc.sandbox import ClusterSpec, Sandbox\n"
            "cluster = Sandbox(sys.argv[1], ClusterSpec(nodes=2, cpu_nodes=0), owner_pid=os.getpid()); cluster.up()\n"
            "print('up', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(directory)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
            assert owner.stdout and owner.stdout.readline() == b"up\n"
            cluster = Sandbox(directory)
            job = submit(cluster, "sleep 600 & sleep 600", "-N2")
            wait_for(cluster, job, JobState.RUNNING)
            with Connection(directory / "run" / "control.sock") as connection:
                pid = owner.pid if victim == "owner" else connection.server_pid
            os.kill(pid, signal.SIGKILL)
            owner.kill()
            until(lambda: processes_of(directory) == [], 120, "all processes to end")

    def test_no_accounting(self, directory: Path) -> None:
        with Sandbox(directory, SMALL, owner_pid=os.getpid()) as cluster:
            client = SlurmClient(cluster.env)
            assert not client.has_accounting
            [ended, running] = [submit(cluster, "exit 3"), submit(cluster, "sleep 600")]
            wait_for(cluster, ended)
            wait_for(cluster, running, JobState.RUNNING)
            states = {job: status.state.value for job, status in client.poll([ended, running, "999"]).items()}
            assert states == {ended: "FAILED", running: "RUNNING", "999": "UNKNOWN"}
            with pytest.raises(SlurmError, match="no accounting database"):
                attempts([ended], client)
        with pytest.raises(SlurmUnavailableError, match="squeue gave no answer in 1 s"):
            SlurmClient(cluster.env, timeout_s=1).squeue()

    @pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user lacks it anyway")
    def test_container_without_the_capability(self, directory: Path) -> None:
        drop = [find_program("setpriv"), "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        command = [*drop, sys.executable, "-m", "hpc.sandbox", "up", str(directory)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "CAP_SYS_ADMIN" in done.stderr and "Traceback" not in done.stderr
        assert processes_of(directory) == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="is what the other tests do, unless root runs them")
    def test_ordinary_user(self, directory: Path) -> None:
        python = _python_of_everybody()
        user = pwd.getpwnam("games")
        os.chown(directory, user.pw_uid, user.pw_gid)
        program = f"""
            {python} -m hpc.sandbox up {directory} --nodes 2 --cpu-nodes 0 --accounting >/dev/null || exit 1
            export SLURM_CONF={directory}/etc/slurm.conf
            srun -N2 --gpus-per-node=1 sh -c 'echo "$(id -un) on $(hostname)"' | sort
            {python} -m hpc.sandbox power-off {directory} node2
            sinfo -h -p gpu -t down -o %N
            {python} -m hpc.sandbox power-on {directory} node2
            sinfo -h -p gpu -o "%N %T"
            {python} -m hpc.sandbox down {directory}
        """
        done = subprocess.run(
            ["bash", "-c", program],
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        assert done.stdout.split("\n") == ["games on node1", "games on node2", "node2", "node[1-2] idle", ""]
        assert processes_of(directory) == []


def _python_of_everybody() -> str:
    """A Python that other users may run: the one of the virtual environment can be below /root."""
    for python in (sys.executable, "/usr/bin/python3"):
        probe = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(probe, user="games", extra_groups=[], capture_output=True).returncode == 0:
                return python
        except OSError:
            continue
    pytest.skip("no Python >= 3.11 that other users may run")


@pytest.mark.slurm
class TestNodes:
    def test_nodes_are_machines_of_their_own(self, idle_cluster: Sandbox, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        # Each node listens on the same port under its own name, and has its own /dev/shm and process ids.
        (out / "task.py").write_text(
            "import pathlib, socket, time\n"
            "name = socket.gethostname()\n"
            "server = socket.create_server((name, 29500))\n"
            "mine = pathlib.Path('/dev/shm', name)\n"
            "mine.touch()\n"
            f"there = pathlib.Path({str(out)!r})\n"
            "(there / name).write_text(server.getsockname()[0])\n"
            "while len(list(there.glob('node*'))) < 2: time.sleep(0.05)\n"
            "assert mine.exists() and not list(mine.parent.glob('node*'))[1:]\n"
            "mine.unlink()\n"
            "other = {'node1': 'node2', 'node2': 'node1'}[name]\n"
            "socket.create_connection((other, 29500), timeout=10).close(); server.accept()\n"
        )
        idle_cluster.run("srun", "-N2", "-w", "node[1-2]", sys.executable, str(out / "task.py"))
        addresses = {path.name: path.read_text() for path in out.glob("node*")}
        assert addresses.keys() == {"node1", "node2"}
        assert addresses["node1"] != addresses["node2"] and addresses["node1"].startswith("127.")

    def test_power_off_takes_the_job_along(self, idle_cluster: Sandbox) -> None:
        final = submit(idle_cluster, "sleep 600", "--no-requeue", "-w", "node6")
        again = submit(idle_cluster, "sleep 600", "--requeue", "-w", "node6")
        for job in (final, again):
            wait_for(idle_cluster, job, JobState.RUNNING)
        idle_cluster.power_off("node6")
        assert wait_for(idle_cluster, final).state is JobState.NODE_FAIL
        assert wait_for(idle_cluster, again, JobState.PENDING).state is JobState.PENDING
        states = {node.name: node.is_usable for node in SlurmClient(idle_cluster.env).nodes()}
        assert [name for name, usable in states.items() if not usable] == ["node6"]
        idle_cluster.power_on("node6")
        wait_for(idle_cluster, again, JobState.RUNNING)

    @pytest.mark.parametrize("is_on", [True, False])
    def test_power_on_takes_a_drained_node_back(self, idle_cluster: Sandbox, is_on: bool) -> None:
        """Slurm drains a node on which it could not end a step: no later job would run there."""
        idle_cluster.run("scontrol", "update", "nodename=node6", "state=drain", "reason=Kill task failed")
        if not is_on:
            idle_cluster.power_off("node6")
        idle_cluster.power_on("node6")
        job = submit(idle_cluster, "true", "-w", "node6")
        assert wait_for(idle_cluster, job).state is JobState.COMPLETED

    def test_power_on_says_why_a_node_is_not_usable(
        self, idle_cluster: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        idle_cluster.power_off("node6")
        with monkeypatch.context() as changed, pytest.raises(TimeoutError, match=r"it is down.*power_off"):
            changed.setattr(Sandbox, "_request", lambda *_, **__: None)  # it stays off
            idle_cluster.power_on("node6", timeout=0)
        idle_cluster.power_on("node6")

    def test_unknown_node(self, slurm_cluster: Sandbox) -> None:
        with pytest.raises(UserError, match="no node 'node9'"):
            slurm_cluster.power_off("node9")

    def test_facts(self, idle_cluster: Sandbox) -> None:
        client = SlurmClient(idle_cluster.env)
        assert (
            "research" in client.accounts(pwd.getpwuid(os.geteuid()).pw_name)
            and client.accounts("nobody") == []
        )
        facts = read_facts(client)
        assert facts.has_accounting and facts.accounts is None
        assert sorted((shape.count, shape.idle, shape.gpus) for shape in facts.shapes("gpu")) == [
            (3, 3, (("a100", 4),)),
            (3, 3, (("h100", 4),)),
        ]
        assert facts.default_partition and facts.default_partition.name == "gpu"

    def test_node_lists_as_slurm_reads_them(self, slurm_cluster: Sandbox) -> None:
        for text in ("n[1-3,7]", "rack[1-2]node[01-02]", "a[08-11],b,c[1]", "n[001-003]"):
            names = slurm_cluster.run("scontrol", "show", "hostnames", text).split()
            assert expand(text) == names
            assert slurm_cluster.run("scontrol", "show", "hostnames", compress(names)).split() == names


@pytest.mark.slurm
class TestJobs:
    def test_heterogeneous_job(self, idle_cluster: Sandbox, tmp_path: Path) -> None:
        steps = "".join(
            f"srun --het-group={group} -N{nodes} -n{nodes} --ntasks-per-node=1 "
            f"bash -c 'echo {group} $(hostname) $CUDA_VISIBLE_DEVICES' >> {tmp_path}/out\n"
            for group, nodes in ((0, 1), (1, 2))
        )
        status = wait_for(idle_cluster, submit(idle_cluster, HET + steps))
        assert status.state is JobState.COMPLETED
        lines = [line.split() for line in (tmp_path / "out").read_text().splitlines()]
        assert sorted(line[0] for line in lines) == ["0", "1", "1"]
        for group, node, gpus in lines:
            assert node in status.components[int(group)].nodes
            assert gpus == ("0,1" if group == "0" else "0,1,2,3")

    def test_preempted_job_is_requeued_and_accounted_for(self, idle_cluster: Sandbox, tmp_path: Path) -> None:
        script = (
            HET
            + f'echo "${{SLURM_RESTART_COUNT:-0}}" >> {tmp_path}/starts; [ "$SLURM_RESTART_COUNT" ] || sleep 600'
        )
        job = submit(idle_cluster, script)
        wait_for(idle_cluster, job, JobState.RUNNING)
        until((tmp_path / "starts").exists, 120, "the batch script")
        submit(idle_cluster, "sleep 1", "-p", "high", "-w", "node5", "--exclusive", "--begin=now+2")
        assert wait_for(idle_cluster, job, JobState.COMPLETED).state is JobState.COMPLETED
        assert (tmp_path / "starts").read_text().split() == ["0", "1"]
        client = SlurmClient(idle_cluster.env)
        until(lambda: client.poll([job])[job].state is JobState.COMPLETED, 120, "slurmdbd to hear of it")
        table = attempts([job], client)
        assert table[["component", "attempt", "state"]].values.tolist() == [
            *[[0, 0, "PREEMPTED"], [1, 0, "PREEMPTED"], [0, 1, "COMPLETED"], [1, 1, "COMPLETED"]]
        ]
        trainer = table[table.component == 1].iloc[0]
        assert trainer.nodes == ["node4", "node5"] and trainer.gpus == 8
        assert trainer.elapsed_s == (trainer.ended - trainer.started).total_seconds() >= 1
        assert trainer.gpu_hours == pytest.approx(8 * trainer.elapsed_s / 3600)

    def test_partition_that_cancels(self, idle_cluster: Sandbox) -> None:
        job = submit(idle_cluster, "exec sleep 600", "-p", "lowcancel", "-w", "node1", "--exclusive")
        wait_for(idle_cluster, job, JobState.RUNNING)
        submit(idle_cluster, "true", "-p", "high", "-w", "node1", "--exclusive")
        assert wait_for(idle_cluster, job).state is JobState.PREEMPTED

    def test_environment_does_not_change_what_the_client_asks(
        self, idle_cluster: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("SQUEUE_PARTITION", "SBATCH_PARTITION"):
            monkeypatch.setenv(name, "cpu")
        monkeypatch.setenv("SLURM_CONF", idle_cluster.env["SLURM_CONF"])
        client = SlurmClient()
        job = client.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 600").strip()
        me = pwd.getpwuid(os.geteuid()).pw_name
        assert {record.key.job: record.partition for record in client.squeue(user=me)}[job] == "gpu"
        client.cancel([job])
        assert wait_for(idle_cluster, job).state is JobState.CANCELLED

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can run jobs of other users")
    def test_second_user(self, idle_cluster: Sandbox) -> None:
        with open_directory() as shared:
            shared.chmod(0o777)
            own = submit(idle_cluster, "sleep 600", "-w", "node1")
            other = submit(idle_cluster, f"id -un > {shared}/user; sleep 600", "-w", "node1", user="games")
            for job in (own, other):
                wait_for(idle_cluster, job, JobState.RUNNING)
            until(
                lambda: (shared / "user").exists() and (shared / "user").read_text() == "games\n",
                120,
                "the job",
            )
            with pytest.raises(subprocess.CalledProcessError) as refused:
                idle_cluster.run("scancel", own, user="games")
            assert "Access/permission denied" in refused.value.stderr
            users = {
                record.key.job: record.user for record in SlurmClient(idle_cluster.env).squeue([own, other])
            }
            assert users == {own: "root", other: "games"}
