"""The loss does not depend on how samples are shared out: ranks, packing, micro-batches.

Plans, micro-batches and the loss are the trainer's own; a table of random numbers stands in for the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import init_single_process, make_batch, make_config
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.algorithms.reduce import token_weights
from rltrain.data.batch import TrainableTokens
from rltrain.data.packing import plan_step
from rltrain.megatron.training.micro_batch import LossInputs, TokenSplit, build_micro_batch, computed_length

pytestmark = pytest.mark.slow

BATCH = make_batch(17, seed=3, longest=30, masked=2)
TRAINABLE = TrainableTokens.of(BATCH)


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> None:
    init_single_process()


def total_loss(estimator: str, per_token: bool, plan: list[list[tuple[int, ...]]]) -> tuple[float, Any]:
    """The loss over all micro-batches of all ranks, and its gradient with respect to each log-prob."""
    from rltrain.megatron.training.loss import add_up, micro_batch_loss

    config = make_config(
        Path("unused"), advantage_estimator=estimator, calculate_per_token_loss=per_token, entropy_coef=0.01,
        use_kl_loss=True, kl_loss_type="k3", kl_loss_coef=0.1,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    counts = [TRAINABLE.count(i) for i in range(len(BATCH))]
    # The model's log-probs and entropies are packed too, as two inputs that this loss does not read.
    names = ("returns", "old_log_probs", "ref_log_probs", "old_values", "advantages")
    table: dict[str, Any] = {name: [rng.normal(size=n).astype(np.float32) for n in counts] for name in names}
    weights = TRAINABLE.spread(token_weights(BATCH.loss_masks, per_token=per_token))
    inputs = LossInputs(weights, **table)
    gradient = [np.zeros(n) for n in counts]
    sums = []
    for rank in plan:
        for indices in rank:
            built = build_micro_batch(
                BATCH, TRAINABLE, indices, inputs, split=TokenSplit(), device=torch.device("cpu")
            )
            values = built.inputs.map(lambda value: value.double())
            log_probs, entropy = values.returns.requires_grad_(), values.old_values
            loss, parts = micro_batch_loss(config, log_probs, entropy, values, built.responses)
            loss.backward()
            sums.append({**parts, "total": loss.detach()})
            sizes = [counts[i] for i in built.indices]
            assert log_probs.grad is not None
            for i, part in zip(built.indices, log_probs.grad.split(sizes), strict=True):
                gradient[i] += part.numpy()
    return float(add_up(sums)["total"]), np.concatenate(gradient)


@given(
    ranks=st.integers(1, 6),
    max_tokens=st.one_of(st.none(), st.integers(20, 400)),
    micro_batch_size=st.integers(1, 5),
    multiple=st.integers(1, 3),
    per_token=st.booleans(),
    estimator=st.sampled_from(["grpo", "gspo", "cispo"]),
)
@settings(max_examples=40, deadline=None)
def test_loss_and_gradient_depend_on_the_samples_alone(
    ranks: int,
    max_tokens: int | None,
    micro_batch_size: int,
    multiple: int,
    per_token: bool,
    estimator: str,
) -> None:
    lengths = [computed_length(tokens) for tokens in BATCH.tokens]
    plan = plan_step(
        lengths, ranks, max_tokens=max_tokens, micro_batch_size=micro_batch_size, multiple=multiple
    )
    ours = total_loss(estimator, per_token, [list(rank) for rank in plan.micro_batches])
    whole = total_loss(estimator, per_token, [[tuple(range(len(BATCH)))]])
    assert ours[0] == pytest.approx(whole[0], rel=1e-6)
    np.testing.assert_allclose(ours[1], whole[1], rtol=1e-6, atol=1e-12)
