"""On-policy distillation: a teacher grades every token of the student's own responses. NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def reverse_kl(log_probs: Floats, teacher_log_probs: Floats) -> Floats:
    """log π_student − log π_teacher of each sampled token: its expectation is KL(student ‖ teacher). [n].

    MiniLLM (https://arxiv.org/abs/2306.08543, section 2.1), estimated on the student's samples.
    """
    return log_probs - teacher_log_probs


def with_distillation(advantages: Floats, reverse_kls: Floats, *, opd_kl_coef: float) -> Floats:
    """A_t − opd_kl_coef·(log π_student − log π_teacher)_t, token by token, without a discount. [n].

    On-policy distillation (https://thinkingmachines.ai/blog/on-policy-distillation): with A = 0 it is
    distillation alone, otherwise the teacher's grade is added to the estimator's.
    """
    return (advantages - opd_kl_coef * reverse_kls.astype(np.float64)).astype(np.float32)
