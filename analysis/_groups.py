"""Groups: the samples of one prompt in one step, with the unbiased estimate of pass@k."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

KEYS = ["step", "attempt", "dataset", "group_index"]


def groups_frame(samples: pd.DataFrame, threshold: float = 1.0) -> pd.DataFrame:
    """One row a group, in order of step.

    Args:
        samples: as of `Run.samples`.
        threshold: a sample is correct if its reward is at least this.

    Columns: `KEYS`, `n`, `reward_mean`, `reward_std` (of the sample, n - 1; missing if n = 1), `reward_min`,
    `reward_max`, `correct`, `response_length` (mean), `zero_std`, and `pass@k` for k = 1, 2, 4 … up to the
    largest group.
    """
    correct = (samples["reward"] >= threshold).astype("int64")
    grouped = samples.assign(correct=correct).groupby(KEYS, observed=True, sort=True)
    frame = grouped.agg(
        n=("index", "size"),
        reward_mean=("reward", "mean"),
        reward_std=("reward", "std"),
        reward_min=("reward", "min"),
        reward_max=("reward", "max"),
        correct=("correct", "sum"),
        response_length=("response_length", "mean"),
    ).reset_index()
    # Comparing, not std == 0: the mean of equal numbers can differ from them by rounding.
    frame["zero_std"] = frame["reward_min"] == frame["reward_max"]
    largest = int(frame["n"].max()) if len(frame) else 1
    for k in (2**i for i in range(largest.bit_length())):
        frame[f"pass@{k}"] = pass_at_k(frame["n"].to_numpy(), frame["correct"].to_numpy(), k)
    return frame


def pass_at_k(n: npt.ArrayLike, correct: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    """Unbiased chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    Missing where n < k. Source: Chen et al., Evaluating Large Language Models Trained on Code, 2107.03374.

    Args:
        n: samples of each problem.
        correct: how many of them are correct.
        k: at least 1.
    """
    total, right = np.asarray(n, dtype=np.int64), np.asarray(correct, dtype=np.int64)
    if k < 1 or np.any(right > total) or np.any(right < 0):
        raise ValueError("pass@k needs k >= 1 and 0 <= correct <= n")
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, max(int(total.max(initial=1)), k) + 1)))])
    wrong = total - right
    none_right = np.exp(
        logs[wrong] - logs[np.maximum(wrong - k, 0)] + logs[np.maximum(total - k, 0)] - logs[total]
    )
    return np.where(total < k, np.nan, np.where(wrong < k, 1.0, 1.0 - none_right))
