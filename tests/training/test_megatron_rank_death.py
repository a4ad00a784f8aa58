"""A trainer rank that is killed: the others stop too, in a way that lets the job run again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers.local_job import wait_until
from helpers.megatron import (
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    running_ranks,
    tiny_config,
    write_hf_model,
)

from rltrain.arguments.config import Config
from rltrain.run.errors import EXIT_NEVER_RESTART, EXIT_REQUEUE
from rltrain.run.processes import descendants, parse_stat

pytestmark = pytest.mark.slow


def die_in_the_second_rollout(config: Config, work: Path) -> None:
    """Rank 1 is killed while rank 0 waits for its gradients; a checkpoint of the first rollout is there."""
    actor = make_actor(config, work)
    actor.train(0, make_batch(8))
    actor.save(0)
    if os.environ["RANK"] == "1":
        (work / "helpers.json").write_text(json.dumps(descendants(os.getpid())))
        os.kill(os.getpid(), signal.SIGKILL)
    actor.train(1, make_batch(8))


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what is left until its parent asks for it."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())[2] != "Z"
    except OSError:
        return False


def start_again(config: Config, work: Path) -> int:
    """Where the next attempt goes on."""
    return make_actor(config, work).start_rollout_id


def test_the_other_ranks_stop_and_the_run_goes_on_later(tmp_path: Path) -> None:
    model = write_hf_model(tmp_path / "model", tiny_config())
    config = make_config(
        model, save=str(tmp_path / "c"), actor_num_gpus_per_node=2, distributed_timeout_minutes=1
    )
    with running_ranks(die_in_the_second_rollout, config, tmp_path / "first") as ranks:
        code = ranks[0].wait(240)  # the distributed timeout, and the start
        assert ranks[1].wait(60) == -signal.SIGKILL
        # Neither "done" nor "saved" nor "would fail again": the attempt failed, and may be run again.
        assert code not in (0, EXIT_REQUEUE, EXIT_NEVER_RESTART), ranks[0].said()
    # What serves megatron-core's queue of written files ends with its rank.
    helpers = json.loads((tmp_path / "first" / "helpers.json").read_text())
    assert helpers
    wait_until(lambda: not any(map(is_running, helpers)), 60)
    assert run_ranks(start_again, config, tmp_path / "second") == [1, 1]
