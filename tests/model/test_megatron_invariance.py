"""The loss does not depend on how samples are shared out: ranks, packing, micro-batches.

Plans, micro-batches and the loss are the trainer's own; a table of random numbers stands in for the model.
"""

from __future__ import annotations

from dataclasses import replace
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


def by_steps(*parts: torch.Tensor) -> torch.Tensor:
    """The gated delta rule of one sequence, token by token: queries, keys, values, beta, log of decay."""
    state, outputs = torch.zeros(3, 2, 4), []
    for query, key, value, beta, decay in zip(*parts, strict=True):
        query, key = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (query, key))
        state = state * decay.exp()[:, None, None]
        correction = beta[:, None] * (value - torch.einsum("hkv,k->hv", state, key[0]))
        state = state + torch.einsum("k,hv->hkv", key[0], correction)
        outputs.append(torch.einsum("hkv,k->hv", state, query[0]) / 2**0.5)
    return torch.stack(outputs)


def test_linear_attention_reads_each_packed_sequence_from_its_beginning() -> None:
    from rltrain.megatron.model.layers.delta_net import convolve, delta_rule, find_places

    lengths = (3, 150, 64, 1, 70)
    places = find_places(lengths, 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2), (1, 2), (3, 4), (3,), (3,))  # one key head, three value heads
    parts = [torch.randn(sum(lengths), *shape, generator=generator) for shape in shapes]
    parts = [*parts[:3], parts[3].sigmoid(), -parts[4].exp()]
    leaves = [each.clone().requires_grad_() for each in parts]
    alone = [by_steps(*each) for each in zip(*(leaf.split(lengths) for leaf in leaves), strict=True)]
    together = delta_rule(*leaves, places)
    torch.testing.assert_close(together, torch.cat(alone), atol=3e-5, rtol=0)
    weights = torch.randn(together.shape, generator=generator)
    expected = torch.autograd.grad((torch.cat(alone) * weights).sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad((together * weights).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)

    x, kernel = torch.randn(sum(lengths), 5, generator=generator), torch.randn(5, 1, 4, generator=generator)
    padded = [torch.nn.functional.pad(each.t(), (3, 0)) for each in x.split(lengths)]
    single = [torch.nn.functional.conv1d(each[None], kernel, groups=5)[0].t() for each in padded]
    torch.testing.assert_close(convolve(x, kernel, places), torch.cat(single))


@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=12), is_sorted=st.booleans())
@settings(max_examples=30, deadline=None)
def test_short_sequences_in_one_call_attend_as_each_alone(lengths: list[int], is_sorted: bool) -> None:
    from rltrain.megatron.model.attention import PackedAttention, PackedSequences

    lengths = sorted(lengths) if is_sorted else lengths
    layer = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(layer)
    layer.softmax_scale, layer.before, layer.soft_cap, layer.softmax_offset = 0.3, None, None, None
    packed = PackedSequences.from_lengths(lengths, torch.device("cpu"))
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = ((4, 8), (2, 8), (2, 12))  # heads that share keys; values of another size
    parts = [torch.randn(sum(lengths), *shape, generator=generator, requires_grad=True) for shape in shapes]
    together = layer(*parts, None, packed)
    alone = layer(*parts, None, replace(packed, joined=None))
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    weights = torch.randn(together.shape, generator=generator)
    expected = torch.autograd.grad((alone * weights).sum(), parts)
    for mine, theirs in zip(torch.autograd.grad((together * weights).sum(), parts), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_short_sequences_of_about_the_same_length_are_one_call() -> None:
    from rltrain.megatron.model.layers.joined import join

    joined = join([3, 3, 5, 30, 31, 36, 60, 400, 401])
    assert joined is not None
    assert (joined.sequences, joined.tokens) == (7, 168)
    assert joined.calls == ((3, 5), (3, 36), (1, 60))
    assert join([7, 7, 7, 100]) is None  # a call for each length is as few
    assert join([200, 201]) is None
