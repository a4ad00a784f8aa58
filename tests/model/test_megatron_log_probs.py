"""Vocabulary-parallel log-probs and entropy, and their gradients, against torch in double precision."""

from __future__ import annotations

import pytest
import torch

from rltrain.megatron.training.log_probs import log_probs_and_entropy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("padding", "chunk_size"), [(0, -1), (3, -1), (3, 1), (0, 7), (0, 64)])
def test_values_and_gradients(temperature: float, padding: int, chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(20, 50 + padding, generator=generator) * 5).requires_grad_()
    targets = torch.randint(0, 50, (20,), generator=generator)
    weights = torch.randn(2, 20, generator=generator)
    log_probs, entropy = log_probs_and_entropy(
        logits, targets, temperature=temperature, vocab_size=50, chunk_size=chunk_size
    )
    (weights[0] @ log_probs + weights[1] @ entropy).backward()

    exact = logits.detach()[:, :50].double().requires_grad_()
    log_p = torch.log_softmax(exact / temperature, -1)
    exact_log_probs, exact_entropy = (
        log_p.gather(1, targets[:, None]).squeeze(1),
        -(log_p.exp() * log_p).sum(-1),
    )
    (weights[0].double() @ exact_log_probs + weights[1].double() @ exact_entropy).backward()

    torch.testing.assert_close(log_probs.double(), exact_log_probs, atol=3e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=3e-5, rtol=0)
    assert logits.grad is not None and exact.grad is not None
    torch.testing.assert_close(logits.grad[:, :50].double(), exact.grad, atol=1e-5, rtol=0)
    assert not logits.grad[:, 50:].any()  # columns that pad the vocabulary


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([1]))
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.item() == -2e4 and entropy.item() == 0.0
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_no_tokens() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits, torch.zeros(0, dtype=torch.int64))
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,)


@pytest.mark.parametrize("used", ["log_probs", "entropy", "both"])
def test_bf16_logits_get_the_gradient_of_fp32_rounded_once(used: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 33, generator=generator) * 4).bfloat16().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    targets = torch.randint(0, 33, (9,), generator=generator)
    log_p = exact.log_softmax(-1)
    expected = (log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1))
    found = log_probs_and_entropy(logits, targets, chunk_size=4)
    assert found[0].dtype == found[1].dtype == torch.float32
    take = {"log_probs": slice(0, 1), "entropy": slice(1, 2), "both": slice(0, 2)}[used]
    torch.stack(found)[take].sum().backward()
    torch.stack(expected)[take].sum().backward()
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), atol=1e-5, rtol=0)
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16 and exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=2**-8)
