"""Rewards in processes: what a reward function returns, raises, or hangs in, costs its own sample only."""

from __future__ import annotations

import argparse
import asyncio
import gc
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.local_job import wait_until_async

from rltrain.arguments.config import Config
from rltrain.rewards.pool import RewardPool
from rltrain.rewards.rules import reward_function_path
from rltrain.rewards.text import exact_match
from rltrain.rewards.worker import Grade, checked
from rltrain.run.errors import UserError
from rltrain.sample import Sample

pytestmark = pytest.mark.slow

FUNCTIONS = '''
import asyncio, os, time

def graded(args, sample):
    """Does what the sample's label says."""
    if sample.label == "raise":
        raise ValueError("bad label\\nand more")
    if sample.label == "hang":
        time.sleep(600)
    if sample.label == "exit":
        os._exit(3)
    if sample.label == "nan":
        return float("nan")
    if sample.label == "text":
        return "good"
    if sample.label == "pid":
        return os.getpid()
    print("a print must not break the protocol")
    sample.metadata["seen"] = True
    return sample.response == sample.label

async def graded_async(args, sample):
    await asyncio.sleep(600 if sample.label == "sleep" else 0.05)
    return graded(args, sample)
'''


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_functions.py").write_text(FUNCTIONS)
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    (tmp_path / "threaded_functions.py").write_text(thread + FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def make_config(**changes: Any) -> Config:
    return Config.from_values({"reward_timeout": 3.0, **changes})


def sample(label: str) -> Sample:
    return Sample(response="42", label=label)


def with_pool(path: str, use: Callable[[RewardPool], Awaitable[Any]], **changes: Any) -> Any:
    async def main() -> Any:
        pool = await RewardPool.start(make_config(**changes), path)
        try:
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(main())


def grade_all(path: str, labels: list[str], **changes: Any) -> list[Grade]:
    return with_pool(
        path, lambda pool: asyncio.gather(*(pool.grade(sample(label)) for label in labels)), **changes
    )


@pytest.mark.parametrize("name", ["graded", "graded_async"])
def test_each_sample_gets_its_own_grade(name: str) -> None:
    labels = ["42", "raise", "41", "hang", "nan", "exit", "text", "42", "41"]
    grades = dict(enumerate(grade_all(f"reward_functions.{name}", labels)))
    assert {i: grade.reward for i, grade in grades.items() if grade.failure is None} == {
        0: 1,
        2: 0,
        7: 1,
        8: 0,
    }
    failures = {labels[i]: grade.failure for i, grade in grades.items() if grade.failure is not None}
    assert failures["raise"].startswith("ValueError: bad label (reward_functions.py:")
    assert failures["hang"] == "the reward took longer than --reward-timeout 3 s"
    assert failures["exit"] == "the reward function ended its process"
    assert "nan" in failures["nan"] and "finite" in failures["nan"]
    where = f"reward_functions.{name} \\(reward_functions.py:\\d+\\)"
    assert re.fullmatch(f"{where}: the reward is 'good'; expected a number", failures["text"])
    assert all(grade.reward is None for grade in grades.values() if grade.failure)


def test_a_hung_process_is_killed_and_replaced() -> None:
    async def use(pool: RewardPool) -> list[Grade]:
        return [await pool.grade(sample(label)) for label in ("pid", "hang", "pid")]

    before, hung, after = with_pool("reward_functions.graded", use)
    assert hung.failure is not None
    assert before.reward != after.reward
    assert not psutil.pid_exists(int(before.reward))


@pytest.mark.parametrize("module", ["reward_functions", "threaded_functions"])
def test_rewards_that_hang_do_not_hold_up_others(module: str) -> None:
    """Also where the module has started a thread, so that its processes can't be forked."""

    async def use(pool: RewardPool) -> set[int]:
        first = await pool.grade(sample("pid"))  # so that it is known what a reward takes
        hung = [asyncio.ensure_future(pool.grade(sample("hang"))) for _ in range(3)]
        await asyncio.sleep(0)
        later = [await pool.grade(sample("pid")) for _ in range(3)]
        assert not any(each.done() for each in hung)
        running = {int(grade.reward) for grade in (first, *later)}
        for each in hung:
            each.cancel()
        await asyncio.wait(hung)
        assert len(pool._workers) == 1 and not psutil.pid_exists(int(first.reward))
        return running

    pids = with_pool(f"{module}.graded", use, reward_timeout=60.0)
    # One more where a grade was late that only had to wait for the machine.
    assert len(pids) >= 2 and not any(psutil.pid_exists(pid) for pid in pids)


def test_the_process_that_others_are_forked_from_is_replaced_too() -> None:
    async def use(pool: RewardPool) -> list[Grade]:
        before = await pool.grade(sample("pid"))
        psutil.Process(int(before.reward)).parent().kill()
        psutil.wait_procs([psutil.Process(int(before.reward))], timeout=10)
        return [before, await pool.grade(sample("42")), await pool.grade(sample("pid"))]

    before, lost, after = with_pool("reward_functions.graded", use)
    assert lost.failure in (None, "the reward function ended its process")
    assert before.reward != after.reward and after.failure is None


@pytest.mark.parametrize("name", ["graded", "graded_async"])
def test_a_job_that_ends_all_its_processes_at_once_leaves_no_error_behind(name: str) -> None:
    """The process that others are forked from, and those with it, may die before the pool is closed."""
    unheard: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(str(what)))
        pool = await RewardPool.start(make_config(reward_num_workers=3), f"reward_functions.{name}")
        before = await pool.grade(sample("pid"))
        psutil.Process(int(before.reward)).parent().kill()
        # The pool has not seen it yet.
        await wait_until_async(lambda: not any(worker._process for worker in pool._workers))
        await pool.close()

    asyncio.run(main())
    gc.collect()  # a task that nobody asked for its error says so when it is forgotten
    assert unheard == []


def test_a_process_that_is_started_while_another_is_killed_stays() -> None:
    """As when a reward hangs that shares its process, and more rewards come meanwhile."""

    async def use(pool: RewardPool) -> list[Grade]:
        (worker,) = pool._workers
        for _ in range(3):
            await asyncio.gather(worker.stop(), worker.ensure_running())
        return await asyncio.gather(*(pool.grade(sample("42")) for _ in range(8)))

    assert [grade.reward for grade in with_pool("reward_functions.graded_async", use)] == [1.0] * 8


def test_coroutines_wait_side_by_side_and_are_cancelled_alone() -> None:
    grades = grade_all("reward_functions.graded_async", ["42"] * 40 + ["sleep"])
    assert [grade.reward for grade in grades[:-1]] == [1.0] * 40
    assert max(grade.seconds for grade in grades[:-1]) < 1.9  # one after the other it would be 2 s
    assert grades[-1].failure == "the reward took longer than --reward-timeout 3 s"


def test_metadata_that_the_function_changed_comes_back() -> None:
    changed, unchanged = grade_all("reward_functions.graded", ["42", "pid"])
    assert changed.metadata == {"seen": True}
    assert unchanged.metadata is None


def test_closing_the_pool_ends_its_processes() -> None:
    async def use(pool: RewardPool) -> int:
        return int((await pool.grade(sample("pid"))).reward)

    pid = with_pool("reward_functions.graded", use)
    assert not psutil.pid_exists(pid)


def test_a_function_that_cannot_be_loaded_is_a_users_error() -> None:
    with pytest.raises(UserError, match="did you mean graded"):
        grade_all("reward_functions.gradd", ["42"])


@pytest.mark.parametrize(
    ("reward", "key", "expected"),
    [
        (True, None, 1.0),
        ("0.5", None, 0.5),
        (" 1.0\n", None, 1.0),
        ({"acc": 1, "len": 3}, "acc", {"acc": 1.0, "len": 3}),
    ],
)
def test_rewards_are_numbers_or_dicts_with_one(reward: Any, key: str | None, expected: Any) -> None:
    assert checked(reward, key) == expected


@pytest.mark.parametrize(
    ("reward", "key", "words"),
    [
        (None, None, "None"),
        ("good", None, "'good'; expected a number"),
        (10**400, None, "expected a number"),
        (float("inf"), None, "finite"),
        ({"len": 1}, "acc", "'acc'"),
        (0.5, "acc", "dict"),
    ],
)
def test_other_rewards_are_refused(reward: Any, key: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checked(reward, key)


def test_exact_match_ignores_white_space_around() -> None:
    assert exact_match(argparse.Namespace(), Sample(response=" 42\n", label="42")) == 1.0
    assert exact_match(argparse.Namespace(), Sample(response="4 2", label="42")) == 0.0


def test_a_reward_must_be_asked_for_by_a_name_that_exists() -> None:
    config = Config().replace(custom_rm_path=None, rm_type=None)
    with pytest.raises(UserError, match=r"--custom-rm-path.*exact"):
        reward_function_path(config.functions, config.rewards)
    config = config.replace(rm_type="exakt")
    with pytest.raises(UserError, match=r"--rm-type exakt.*exact"):
        reward_function_path(config.functions, config.rewards)
    config = config.replace(custom_rm_path="mine.reward")
    assert reward_function_path(config.functions, config.rewards) == "mine.reward"
