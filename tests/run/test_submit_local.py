"""`hpc.submit` on one machine, end to end but for the roles, which are small stand-ins (tests/fakes)."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import stat
from pathlib import Path

import psutil
import pytest
from helpers.local_job import ASSUMED, PATIENCE, Job, wait_until

pytestmark = pytest.mark.slow


def test_finishes_and_says_what_next(job: Job) -> None:
    code, out, err = job.finish()

    assert (code, err) == (0, ASSUMED)
    assert "no Slurm on this machine" in out.splitlines()[0]
    assert re.search(r"step 2/2 +reward 0\.500", out)
    assert "-m hpc.resubmit job --num-rollout 4\n" in out  # from where it was submitted
    assert job.living() == []
    assert job.steps() == [0, 1]
    assert [event["state"] for event in job.events("attempt_finished")] == ["finished"]
    ready = {(event["role"], event["index"]) for event in job.events("role_ready")}
    assert ready == {("router", 0), ("engine", 0), ("engine", 1), ("rollout", 0), ("trainer", 0)}

    assert stat.S_IMODE(job.layout.root.stat().st_mode) == 0o700
    assert job.layout.latest_logs.resolve() == job.layout.log_dir(0).resolve()
    identity = json.loads(job.layout.run_json.read_text())
    assert identity["name"] == "job"
    assert identity["packages"]["submitit"]

    code, out, _ = job.finish()  # once more
    assert code == 0
    assert "has finished its 2 steps" in out
    (job.directory / "bin").mkdir()
    (job.directory / "bin" / "sbatch").touch(mode=0o755)
    code, out, _ = job.finish(steps=3)
    assert code == 0
    assert "no --partition given: resuming job here" in out
    assert json.loads(job.layout.run_json.read_text()) == identity


def test_role_that_dies_ends_the_job(job: Job) -> None:
    code, _, err = job.finish("--max-engine-restarts=0", steps=1000, engine=["leak", "die"])

    assert code == 1 and len(job.steps()) < 1000
    assert "engine-1 exited with code 3" in err
    assert str(job.layout.log_dir(0) / "engine-1.log") in err
    assert err.rstrip().endswith("  | Traceback: the engine has no memory left")
    assert "log line 29" in err
    assert "log line 5" not in err
    assert job.living() == []
    (died,) = job.events("role_died")
    assert (died["role"], died["index"], died["exit_code"]) == ("engine", 1, 3)
    assert job.events("attempt_finished")[0]["state"] == "failed"


def test_engine_that_dies_is_started_again_alone(job: Job) -> None:
    process = job.start(steps=8, engine=["serve", "die_once"], trainer=["pause"])
    log, second = job.layout.log_dir(0) / "engine-1.log", "start 1 in place of http://127.0.0.1:1"
    wait_until(lambda: log.exists() and second in log.read_text())
    (job.layout.root / "go_on").touch()
    out, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, err) == (0, ASSUMED)
    assert "engine-1 died (exit code 3)" in out and "engine-1 is started again" in out
    assert job.steps() == list(range(8))
    assert len(job.events("attempt_started")) == len(job.events("role_died")) == 1
    assert [event["restarts"] for event in job.events("role_started") if "restarts" in event] == [1]
    assert job.living() == []


def test_engine_that_dies_again_and_again_ends_the_job(job: Job) -> None:
    code, _, err = job.finish("--max-engine-restarts=1", steps=1000, engine=["serve", "die"])

    assert code == 1
    assert "engine-1 exited with code 3" in err and "started again 1 time (--max-engine-restarts)" in err
    assert len(job.events("role_died")) == 2
    assert job.living() == []


def test_engine_that_was_never_ready_is_not_started_again(job: Job) -> None:
    code, _, err = job.finish(steps=1000, engine=["serve", "no_such_behaviour"])

    assert code == 1 and "engine-1 exited with code 1" in err
    assert len(job.events("role_died")) == 1


def test_exit_code_0_does_not_make_a_run_finished(job: Job) -> None:
    code, _, err = job.finish(trainer=["leave_early"], steps=3)
    assert code == 1 and "trainer-0 exited with code 0 before it reported that all steps are done" in err
    [end] = job.events("attempt_finished")
    assert (end["state"], end["cause"]) == ("failed", "unknown") and job.phase() == "failed"
    code, out, err = job.finish(trainer=["leave_early"], steps=3)  # it is not refused, and goes on
    assert code == 0 and job.steps() == [0, 1, 2], err
    code, out, _ = job.finish(trainer=["leave_early"], steps=3)
    assert code == 0 and "has finished its 3 steps" in out


def test_steps_that_could_not_be_saved_do_not_make_it_finished(job: Job) -> None:
    code, _, err = job.finish(trainer=["save_fails"], steps=2)
    assert code == 1 and "trainer-0 exited with code 93: the disk is full" in err
    assert job.phase() == "failed" and not job.layout.finished.exists()


def test_engine_killed_from_outside_before_it_was_ready_is_started_again(job: Job) -> None:
    code, _, err = job.finish(engine=["serve", "killed"], steps=3)
    assert code == 0, err
    assert len(job.events("attempt_started")) == 1 and job.steps() == [0, 1, 2]


def test_a_supervisor_that_does_not_answer_is_not_the_failure_of_the_code(job: Job) -> None:
    """Such as one that waits for a disk which has stopped."""
    process = job.start(trainer=["impatient"])
    wait_until((job.layout.root / "answered").exists)
    trainer = next(each["pid"] for each in job.events("role_started") if each["role"] == "trainer")
    os.kill(job.supervisor_pid(), signal.SIGSTOP)
    wait_until(lambda: psutil.Process(job.supervisor_pid()).status() == psutil.STATUS_STOPPED)
    os.kill(trainer, signal.SIGUSR1)
    wait_until(lambda: psutil.Process(trainer).status() == psutil.STATUS_ZOMBIE)
    os.kill(job.supervisor_pid(), signal.SIGCONT)
    _, err = process.communicate(timeout=PATIENCE)
    assert "trainer-0 exited with code 74: the supervisor at http" in err
    assert [each["cause"] for each in job.events("attempt_finished")] == ["unknown"]


def test_ctrl_c_saves_and_the_next_start_resumes(job: Job) -> None:
    process = job.start(steps=1000)
    wait_until(lambda: len(job.steps()) > 2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, err) == (130, ASSUMED)
    assert "saving first" in out
    assert "it resumes from here" in out
    assert job.living() == []
    assert len(job.events("stop_requested")) == 1
    done = len(job.steps())

    code, out, _ = job.finish(steps=done + 2)
    assert code == 0
    assert job.steps() == list(range(done + 2))
    assert f"step {done + 1}/{done + 2}" in out
    assert f"step {done}/" not in out  # what the earlier attempt did is not news


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_reader_that_goes_away_does_not_end_the_run(job: Job, kind: str) -> None:
    """Ctrl-C ends the `tee` behind it, too, and a terminal may be closed: the run saves all the same."""
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    process = job.start(steps=100_000, stdout=theirs)
    os.close(theirs)
    wait_until(lambda: len(job.steps()) > 2)
    os.close(ours)
    done = len(job.steps())
    wait_until(lambda: len(job.steps()) > done + 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, ASSUMED)
    assert job.events("attempt_finished")[-1]["state"] == "stopped"
    assert (job.layout.checkpoints / "latest_checkpointed_iteration.txt").exists()


def test_nohup_is_respected(job: Job) -> None:
    process = job.start(steps=10, preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_until(lambda: job.steps())
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert job.steps() == list(range(10))


def test_second_ctrl_c_stops_a_job_that_hangs(job: Job) -> None:
    process = job.start(trainer=["hang"])
    wait_until(lambda: job.phase() == "training")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: job.phase() == "stopping")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)

    assert process.returncode == 130
    assert "it begins anew, because it has no checkpoint yet" in out
    assert job.living() == []


def test_hanging_trainer_is_killed_after_the_grace_time(job: Job) -> None:
    process = job.start(trainer=["train", "hang"], steps=1000, grace=1.0)
    wait_until(lambda: job.phase() == "training")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)

    assert process.returncode == 130
    assert job.living() == []


def test_ctrl_c_while_loading_does_not_wait(job: Job) -> None:
    """Else it would for the time that saving may take."""
    process = job.start(trainer=["serve"])  # never gets further
    wait_until(lambda: job.layout.events.exists() and len(job.events("role_ready")) == 5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)

    assert process.returncode == 130
    assert job.living() == []


def test_killed_supervisor_leaves_nothing(job: Job) -> None:
    process = job.start(steps=1000)
    wait_until(lambda: job.steps())
    os.kill(job.supervisor_pid(), signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)

    assert process.returncode == 1
    assert "the supervisor ended without a result" in err
    assert job.living() == []


def test_killed_submit_leaves_nothing_and_a_saved_run(job: Job) -> None:
    process = job.start(steps=1000)
    wait_until(lambda: job.steps())
    process.kill()
    wait_until(lambda: not job.living())

    assert job.events("attempt_finished")[-1]["state"] == "stopped"
    assert (job.layout.checkpoints / "latest_checkpointed_iteration.txt").exists()


def test_killed_submit_and_supervisor_take_the_roles_with_them(job: Job) -> None:
    process = job.start(steps=1000, engine=["serve"])
    wait_until(lambda: job.steps())
    supervisor = job.supervisor_pid()
    process.kill()
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not job.living())

    assert job.events("attempt_finished") == []
    assert job.finish(steps=1)[0] == 0  # and nothing stands in the way of the next attempt


def test_second_submit_is_refused_while_the_first_runs(job: Job) -> None:
    job.start(steps=1000)
    wait_until(lambda: job.steps())
    before = job.layout.config.read_text()
    code, _, err = job.finish(steps=7)

    assert code == 2
    assert f"process {job.supervisor_pid()} on " in err
    assert job.layout.config.read_text() == before


def test_token_reaches_roles_through_the_environment_only(job: Job) -> None:
    process = job.start(steps=1000)
    wait_until(lambda: job.steps())
    environ = Path(f"/proc/{job.events('role_started')[0]['pid']}/environ").read_bytes()
    token = next(word for word in environ.split(b"\0") if word.startswith(b"SLURMLIME_TOKEN=")).partition(
        b"="
    )[2]
    assert len(token) > 30
    arguments = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in job.living()]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)

    assert len(arguments) >= 8
    written = [path.read_bytes() for path in job.layout.root.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not any(token in text for text in [*arguments, *written, out.encode(), err.encode()])


def test_live_view_on_a_terminal(job: Job) -> None:
    ours, theirs = pty.openpty()
    process = job.start(stdout=theirs)
    os.close(theirs)
    screen = b""
    while True:
        try:
            screen += os.read(ours, 65536)
        except OSError:  # the terminal is closed: it has ended
            break
    os.close(ours)

    assert process.wait(timeout=PATIENCE) == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", screen).decode()
    assert "engine-1 ended" in text
    assert re.search(r"phase +finished +\(attempt 0\)", text)
    assert re.search(r"step +2/2", text)
