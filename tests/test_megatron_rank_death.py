"""A trainer rank that is killed: the others stop too, in a way that lets the job run again."""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import socket
from pathlib import Path

import pytest
from helpers.megatron import (
    _start_rank,
    make_actor,
    make_args,
    make_batch,
    run_ranks,
    tiny_config,
    write_hf_model,
)

from rltrain.runtime import EXIT_NEVER_RESTART, EXIT_REQUEUE

pytestmark = pytest.mark.slow


def die_in_the_second_rollout(args: argparse.Namespace, work: Path) -> None:
    """Rank 1 is killed while rank 0 waits for its gradients; a checkpoint of the first rollout is there."""
    actor = make_actor(args, work)
    actor.train(0, make_batch(8))
    actor.save(0)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    actor.train(1, make_batch(8))


def start_again(args: argparse.Namespace, work: Path) -> int:
    """Where the next attempt goes on."""
    return make_actor(args, work).start_rollout_id


def test_the_other_ranks_stop_and_the_run_goes_on_later(tmp_path: Path) -> None:
    model = write_hf_model(tmp_path / "model", tiny_config())
    args = make_args(
        model, save=str(tmp_path / "c"), actor_num_gpus_per_node=2, distributed_timeout_minutes=1
    )
    work = tmp_path / "first"
    work.mkdir()
    (work / "job.pickle").write_bytes(pickle.dumps((__name__, "die_in_the_second_rollout", args)))
    with socket.create_server(("127.0.0.1", 0)) as supervisor:
        url = "http://{}:{}".format(*supervisor.getsockname())
        ranks = [_start_rank(work, url, rank, 2) for rank in range(2)]
        try:
            said = ranks[0].communicate(timeout=240)[0].decode()  # the distributed timeout, and the start
            ranks[1].wait(timeout=60)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert ranks[1].returncode == -signal.SIGKILL
    # Neither "done" nor "saved" nor "would fail again": the attempt failed, and may be run again.
    assert ranks[0].returncode not in (0, EXIT_REQUEUE, EXIT_NEVER_RESTART), said
    assert run_ranks(start_again, args, tmp_path / "second") == [1, 1]
