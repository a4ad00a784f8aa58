"""Functions written as slime's search, retool and multi-agent examples train for two steps, with other import lines.

Their job's roles reach each other by IPv6 addresses, where this machine has any.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pandas as pd
import pytest
from fakes.slime_examples import search, tools
from helpers.local_job import SUBMIT_ON_IPV6, has_ipv6
from helpers.tiny_model import make_tokenizer

from analysis import Run, load_run

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
TASKS, SAMPLES, STEPS = ("search", "tools", "agents"), 2, 2
FLAGS = [
    *("--custom-generate-function-path", "fakes.slime_examples.by_task.generate"),
    *("--custom-rm-path", "fakes.slime_examples.by_task.reward_func", "--reward-key", "score"),
    *("--label-key", "label", "--rollout-batch-size", "3", "--n-samples-per-prompt", str(SAMPLES)),
    *(
        "--num-rollout",
        str(STEPS),
        "--rollout-max-response-len",
        "8",
        "--lr",
        "1e-3",
        "--wandb-mode",
        "disabled",
    ),
    *("--update-weight-transport", "distributed"),
]
PROGRAM = ["-c", SUBMIT_ON_IPV6] if has_ipv6() else ["-m", "hpc.submit"]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Each step has a prompt for each of the three."""
    directory = tmp_path_factory.mktemp("slime_examples")
    rows = [{"input": f"{i}+{i}=", "label": str(2 * i), "metadata": {"task": TASKS[i % 3]}} for i in range(6)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ["--hf-checkpoint", str(tiny_model), "--prompt-data", str(directory / "prompts.jsonl")]
    done = subprocess.run(
        [sys.executable, *PROGRAM, "--name", "tasks", "--runs-dir", str(directory), *where, *FLAGS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_run(directory / "tasks")


def rows_of(run: Run, task: str) -> pd.DataFrame:
    samples = run.read_samples(columns="all")
    assert samples["failure"].isna().all()
    return samples[
        samples["metadata"].map(
            lambda each: (json.loads(each) if isinstance(each, str) else each)["task"] == task
        )
    ]


def stretches(row: pd.Series) -> list[tuple[int, list[int]]]:
    """The response as (mask, tokens) wherever the mask changes."""
    response = list(row["tokens"])[-row["response_length"] :]
    pairs = zip(response, row["loss_mask"], strict=True)
    return [(mask, [token for token, _ in part]) for mask, part in groupby(pairs, key=lambda pair: pair[1])]


def text(tokens: list[int]) -> str:
    return make_tokenizer().decode(tokens)


def ids(words: str) -> list[int]:
    return make_tokenizer()(words, add_special_tokens=False)["input_ids"]


def test_both_steps_are_trained(run: Run) -> None:
    steps = run.steps[run.steps["step"] >= 0]
    assert steps["step"].tolist() == list(range(STEPS))
    assert steps["train/grad_norm"].notna().all()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_every_role_has_an_ipv6_address(run: Run) -> None:
    ready = run.events[run.events["kind"] == "role_ready"].set_index("role")["url"].to_dict()
    assert ready.keys() == {"router", "engine", "rollout", "trainer"}
    assert all("://[::1]:" in url for url in ready.values()), ready


def test_a_search_answers_between_the_turns(run: Run) -> None:
    rows = rows_of(run, "search")
    assert len(rows) == SAMPLES * STEPS
    for _, row in rows.iterrows():
        found, parts = 0, stretches(row)
        for (mask, turn), (said, answer) in zip(parts[::2], parts[1::2], strict=False):
            assert (mask, said) == (1, 0) and 0 < len(turn) <= search.TOKENS_PER_TURN
            digit = re.search(r"\d", text(turn))
            expected = (
                f" found: {search.DOCUMENTS[digit[0]]}. " if digit else " i found no digit. try again: "
            )
            assert answer == ids(expected)
            found += digit is not None
        assert text([token for _, part in parts for token in part]) == row["response"]
        assert len(row["rollout_log_probs"]) == row["response_length"]
        assert row["reward"] == pytest.approx(1 - 0.5**found)


def test_results_of_tools_are_not_trained_on(run: Run) -> None:
    rows = rows_of(run, "tools")
    assert len(rows) == SAMPLES * STEPS
    for _, row in rows.iterrows():
        parts = stretches(row)
        assert [mask for mask, _ in parts] == [1, 0, 1, 0, 1]
        for (_, turn), (_, answer) in zip(parts[::2], parts[1::2], strict=False):
            assert 0 < len(turn) <= tools.TOKENS_PER_TURN
            digits = [int(each) for each in text(turn) if each.isdigit()]
            assert answer == ids(f"(interpreter: {sum(digits)})")
        prompt = list(row["tokens"])[: -row["response_length"]]
        assert text(prompt).startswith("system: use code.user: ")
        zeros = [p for p, mask in zip(row["rollout_log_probs"], row["loss_mask"], strict=True) if not mask]
        assert not any(zeros)
        assert row["reward"] == pytest.approx(-0.8)


def test_agents_become_a_sample_each_of_one_rollout(run: Run) -> None:
    rows = rows_of(run, "agents")
    assert len(rows) == 3 * SAMPLES * STEPS
    for _, rollout in rows.groupby(["step", "rollout_id"]):
        prompts = sorted(rollout["prompt"])
        solutions = rollout[rollout["prompt"].str.startswith("solve: ")]
        assert [prompt.partition(":")[0] for prompt in prompts] == ["rewrite", "solve", "solve"]
        assert all(solution in prompts[0] for solution in solutions["response"])
        for _, row in rollout.iterrows():
            assert list(row["tokens"])[: -row["response_length"]] == ids(row["prompt"])
            assert list(row["loss_mask"]) == [1] * row["response_length"]
            digits = sum(letter.isdigit() for letter in row["response"])
            assert row["reward"] == pytest.approx(digits / 8 * 0.8)  # as the example weighs it
