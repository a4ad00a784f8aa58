"""Sandboxes: what a program in them can reach, the limits that it meets, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.local_job import wait_until, wait_until_async

from rltrain.agents.sandbox import kinds
from rltrain.agents.sandbox.commands import apptainer, bubblewrap, outermost, pyxis
from rltrain.agents.sandbox.limits import MIB, Ended, Limits, SandboxError
from rltrain.agents.sandbox.sandbox import Sandbox
from rltrain.run.errors import UserError

LIMITS = Limits(memory=200 * MIB, processes=24, disk=4 * MIB, output=1000, file=MIB)
KINDS: tuple[kinds.Kind, ...] = ("bubblewrap", "none")


@pytest.fixture(scope="module", autouse=True)
def _bubblewrap_works() -> None:
    try:
        kinds.check("bubblewrap")
    except UserError as error:
        pytest.skip(str(error))


def with_sandbox(
    use: Callable[[Sandbox], Awaitable[Any]], kind: kinds.Kind = "bubblewrap", **more: Any
) -> Any:
    async def main() -> Any:
        async with Sandbox(kinds.launch(kind, LIMITS), LIMITS, **more) as sandbox:
            return await use(sandbox)

    return asyncio.run(main())


def run(*command: str, kind: kinds.Kind = "bubblewrap", seconds: float = 30, **more: Any) -> Ended:
    return with_sandbox(lambda sandbox: sandbox.run(command, seconds=seconds, **more), kind)


def python(program: str, **more: Any) -> Ended:
    return run("python3", "-c", program, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_has_input_output_files_and_an_exit_code(kind: kinds.Kind) -> None:
    async def use(sandbox: Sandbox) -> tuple[Ended, Ended, bytes]:
        await sandbox.write("work/tool", b"#!/bin/sh\ncat; echo $WORD >&2; echo made > made; exit 3\n", 0o755)
        first = await sandbox.run(
            ["work/tool"], given=b"x" * 300_000, environment={"WORD": "said"}, seconds=30
        )
        second = await sandbox.run(["no-such-program"], seconds=30)
        return first, second, await sandbox.read("made")

    ended, missing, made = with_sandbox(use, kind)
    assert (ended.code, ended.reason, ended.failure) == (3, "", "exit code 3")
    assert ended.stdout == b"x" * LIMITS.output and ended.stderr == b"said\n"  # the end of a long output
    assert ended.printed == 300_005
    assert "can't be started" in missing.failure
    assert made == b"made\n"


def test_the_system_is_read_only_and_nothing_else_is_seen(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    places = [str(tmp_path / "secret"), "/usr/x", "/etc/x", "/x", "/dev/x", "/proc/sys/kernel/hostname"]
    written = python(f"""
import os
for place in {places}:
    try:
        open(place, "a").write("x")
        print(place)
    except OSError:
        pass
print(sorted(os.listdir("/home")), os.listdir("/tmp"), os.getuid() == 0)
print(os.path.exists({str(tmp_path)!r}), sorted(set(os.environ) - {{"LC_CTYPE", "PWD"}}))
""")
    assert written.stdout.decode().splitlines() == [
        "['agent'] [] False",
        "False ['HOME', 'LANG', 'PATH', 'TMPDIR']",
    ], written


def test_the_interpreter_is_there_for_commands_too() -> None:
    real = Path(sys.executable).resolve()
    assert run(str(real), "-c", "import json; print(json.dumps([1]))").stdout == b"[1]\n"


def test_no_secret_of_ours_is_seen_by_way_of_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMLIME_TOKEN", "a-secret-token")
    looks = "cat /proc/*/environ /proc/*/cmdline 2>/dev/null | grep -ac a-secret[-]token; ls /proc/1/fd /proc/2/fd"
    ended = run("sh", "-c", looks)
    assert ended.stdout == b"0\n", ended  # nor any descriptor, such as the one that orders come through


def test_the_network_ends_at_the_one_address_that_is_let_through() -> None:
    async def main() -> Ended:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"answer to " + await reader.read(100))
            writer.close()

        allowed = await asyncio.start_server(answer, "127.0.0.1", 0)
        other = await asyncio.start_server(answer, "127.0.0.1", 0)
        to_allowed, to_other = allowed.sockets[0].getsockname(), other.sockets[0].getsockname()
        async with allowed, other, Sandbox(kinds.launch("bubblewrap", LIMITS), LIMITS, to_allowed) as sandbox:
            program = f"""
import socket
one = socket.create_connection({sandbox.address}); one.sendall(b"one"); print(one.recv(100).decode())
for address in [{to_other}, ("8.8.8.8", 53)]:
    try:
        socket.create_connection(address, timeout=5); print("reached", address)
    except OSError as error:
        print("refused")
"""
            return await sandbox.run(["python3", "-c", program], seconds=30)

    ended = asyncio.run(main())
    assert ended.stdout.decode().splitlines() == ["answer to one", "refused", "refused"], ended


GREEDY = {
    "time": ("while True: pass", "it took longer than 1 s"),
    "output": ("while True: print('x' * 1000)", "it took longer than 1 s"),
    "one large process": ("x = bytearray(300 << 20)", "exit code 1"),
    "many large processes": (
        "import os, time\nfor _ in range(3): os.fork()\nx = b'x' * (50 << 20)\ntime.sleep(20)",
        "more than 200 MB of memory",
    ),
    "processes": ("import os\nwhile True: os.fork()", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("greed", GREEDY)
@pytest.mark.parametrize("kind", KINDS)
def test_limits_end_the_command_and_the_next_one_runs(greed: str, kind: kinds.Kind) -> None:
    program, reason = GREEDY[greed]
    if greed == "processes" and kind == "none":
        program = "import os, time\nfor _ in range(40):\n    if not os.fork(): time.sleep(20)\ntime.sleep(20)"
        reason = "more than 24 processes"

    async def use(sandbox: Sandbox) -> tuple[Ended, Ended]:
        first = await sandbox.run(["python3", "-c", program], seconds=1 if "1 s" in str(reason) else 20)
        return first, await sandbox.run(["echo", "alive"], seconds=30)

    ended, after = with_sandbox(use, kind)
    assert ended.failure == reason if reason else ended.failure
    assert (after.code, after.stdout) == (0, b"alive\n")


@pytest.mark.slow
def test_a_full_disk_is_that_of_the_sandbox_alone() -> None:
    ended = run(
        "sh",
        "-c",
        "for d in . /tmp /dev/shm; do for i in 1 2 3; do yes > $d/$i; done; done 2>&1; df /tmp . | tail -2",
    )
    assert b"No space left on device" in ended.stdout or b"File size limit" in ended.stdout
    assert ended.stdout.decode().count("100%") == 2, ended


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_out_is_bounded(kind: kinds.Kind) -> None:
    async def use(sandbox: Sandbox) -> list[str]:
        await sandbox.run(
            ["sh", "-c", "mkfifo pipe; head -c 2000000 /dev/zero > large; ln -s /dev/zero zero"], seconds=30
        )
        said = []
        for path in ("pipe", "large", "zero", "absent", "."):
            with pytest.raises(FileNotFoundError) as error:
                await sandbox.read(path)
            said.append(str(error.value))
        return said

    pipe, large, zero, absent, folder = with_sandbox(use, kind)
    assert "pipe is not a file" in pipe and "more than 1048576 bytes" in large
    assert "zero is not a file" in zero and "No such file" in absent and folder


def left_behind(marker: str) -> list[str]:
    """Processes with the marker in their command line; temporary folders of plain sandboxes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if marker in (process.info["cmdline"] or []):
            found.append(str(process))
    return found


def parent_is_stopped(marker: str) -> bool:
    """Whether who started the marked program has got its SIGSTOP."""
    found = [each for each in psutil.process_iter(["cmdline"]) if marker in (each.info["cmdline"] or [])]
    with contextlib.suppress(psutil.NoSuchProcess):
        parents = [each.parent() for each in found]
        return any(each is not None and each.status() == psutil.STATUS_STOPPED for each in parents)
    return False


STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.kill(os.getppid(), signal.SIGKILL)
print("up", flush=True)
open("up", "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["time limit", "stop", "cancelled", "first program stopped"])
def test_nothing_is_left_of_a_sandbox(
    kind: kinds.Kind, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    marker = f"marker-{end}-{kind}-{os.getpid()}"
    mounts = Path("/proc/self/mounts").read_text()

    async def main() -> None:
        async with Sandbox(kinds.launch(kind, LIMITS), LIMITS) as sandbox:
            command = ["python3", "-c", STUBBORN, marker]
            if end == "time limit":
                assert (await sandbox.run(command, seconds=1)).reason
                assert not left_behind(marker)  # already before the sandbox stops
                return
            if end == "first program stopped":
                stop = "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(600)"
                command = ["python3", "-c", stop, marker]
            running = asyncio.create_task(sandbox.run(command, seconds=600))
            await wait_until_async(lambda: left_behind(marker), pause=0.02)
            if end == "first program stopped":
                await wait_until_async(lambda: parent_is_stopped(marker), pause=0.02)
            if end == "cancelled":
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                assert not left_behind(marker)
            else:
                await sandbox.stop()
                with pytest.raises(SandboxError):
                    await running

    asyncio.run(main())
    assert not left_behind(marker)
    assert Path("/proc/self/mounts").read_text() == mounts
    assert not list(tmp_path.glob("slurmlime-agent-*"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_when_we_are_killed(kind: kinds.Kind, tmp_path: Path) -> None:
    marker = f"marker-killed-{kind}-{os.getpid()}"
    program = f"""
import asyncio
from rltrain.agents.sandbox import kinds
from rltrain.agents.sandbox.limits import Limits
from rltrain.agents.sandbox.sandbox import Sandbox
async def main():
    async with Sandbox(kinds.launch({kind!r}, Limits()), Limits()) as sandbox:
        await sandbox.run(["sh", "-c", "sleep 600", {marker!r}], seconds=600)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as ours:
        try:
            wait_until(lambda: left_behind(marker))
        finally:
            ours.kill()
    wait_until(lambda: not left_behind(marker) and not list(tmp_path.glob("slurmlime-agent-*")))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_it_works_without_root() -> None:
    if shutil.which("setpriv") is None or not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("needs setpriv and the system's Python")
    said = subprocess.run(["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    if said.stdout.strip() != "True":
        pytest.skip("the system's Python is too old")
    program = """
import asyncio
from rltrain.agents.sandbox import kinds
from rltrain.agents.sandbox.limits import Limits
from rltrain.agents.sandbox.sandbox import Sandbox
kinds.check("bubblewrap")
limits = Limits(processes=24)
async def main():
    async with Sandbox(kinds.launch("bubblewrap", limits), limits) as sandbox:
        bomb = "import os\\nwhile True: os.fork()"
        print((await sandbox.run(["python3", "-c", bomb], seconds=20)).failure != "")
        print((await sandbox.run(["sh", "-c", "id -u; unshare -U true || echo no more"], seconds=20)).stdout.decode())
asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    # The packages, where nobody may read them: this repository may lie in a folder of root's.
    copy = Path(
        shutil.copytree(root / "rltrain" / "agents" / "sandbox", Path("/dev/shm") / f"sandbox-{os.getpid()}")
    )
    try:
        packages = copy / "packages" / "rltrain"
        (packages / "agents").mkdir(parents=True)
        shutil.copytree(
            root / "rltrain" / "run", packages / "run", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copytree(root / "rltrain" / "agents" / "sandbox", packages / "agents" / "sandbox")
        for each in (copy, *copy.rglob("*")):
            each.chmod(0o755)
        ended = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-B", "-c", program],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(packages.parent)}, cwd="/",
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(copy)
    assert ended.stdout.split() == ["True", "65534", "no", "more"], ended.stderr


def test_a_machine_that_can_t_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, program in (("bubblewrap", "bwrap"), ("apptainer", "apptainer"), ("pyxis", "srun")):
        with pytest.raises(UserError, match=f"--agent-sandbox {kind}: {program} is not installed"):
            kinds.check(kind)  # type: ignore[arg-type]
    fake = tmp_path / "bwrap"  # a fake: one that is too old, and one that is refused
    fake.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    fake.chmod(0o755)
    with pytest.raises(UserError, match=r"bubblewrap 0.4.1 is too old: 0.8 or newer"):
        kinds.check("bubblewrap")
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit\necho "bwrap: No permissions" >&2; exit 1\n'
    )
    with pytest.raises(UserError, match=r"bwrap: No permissions\. .*administrator can allow user namespaces"):
        kinds.check("bubblewrap")
    monkeypatch.setattr(kinds, "_content", lambda path: "0" if path.endswith("max_user_namespaces") else "")
    assert "User namespaces are off: /proc/sys/user/max_user_namespaces is 0." in kinds.explain_refusal("x")


def test_a_start_that_fails_says_why() -> None:
    launch = bubblewrap(sys.executable, LIMITS, ["/no/such/folder"], [], None)

    async def main() -> None:
        async with Sandbox(launch, LIMITS):
            pass

    with pytest.raises(SandboxError, match=r"did not start: bwrap: Can't find source path /no/such/folder"):
        asyncio.run(main())


def test_command_lines_of_containers() -> None:
    assert outermost(["/a/b", "/a", "/ab", "/a/"]) == ["/a", "/ab"]
    line = " ".join(apptainer("image.sif", ["/data"]).command)
    assert line == (
        "apptainer --silent exec --containall --no-home --no-privs --bind /data:/data:ro --pwd /tmp"
        " image.sif python3 -I -S"
    )
    line = " ".join(pyxis("image.sqsh", ["/data"], "17", "node3").command)
    assert line == (
        "srun --jobid=17 --overlap --nodes=1 --ntasks=1 --nodelist=node3 --input=0 --unbuffered --quiet --export=NONE"
        " --kill-on-bad-exit=1 --container-image=image.sqsh --no-container-mount-home --container-writable"
        " --no-container-remap-root --container-mounts=/data:/data:ro python3 -I -S"
    )


def test_a_container_s_program_is_spoken_to_through_pipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake srun: it only starts what comes after its options, and, as the real one, with pipes and not our socket."""
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != python3 ]; do shift; done\ncat | "$@" | cat\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert python("print(1 + 1)", kind="pyxis").stdout == b"2\n"
