"""What the trainer does with kernels of GPUs, with plain torch in the kernels' place where they run on a GPU only."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.megatron import make_config, tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rltrain.arguments.groups.training import LOGITS_WORKSPACE
from rltrain.arguments.hf_config import read_model_shape
from rltrain.megatron import device
from rltrain.run.errors import UserError

device.set_up()

from rltrain.data.prefixes import Prefixes, lay_out  # noqa: E402
from rltrain.megatron.model import attention, build, experts, prefix_attention  # noqa: E402
from rltrain.megatron.model.attention import PackedSequences  # noqa: E402
from rltrain.megatron.model.context_parallel import own_positions  # noqa: E402
from rltrain.megatron.model.layers.soft_cap import capped_attention, soft_capped_  # noqa: E402
from rltrain.megatron.training.log_probs import log_probs_and_entropy  # noqa: E402

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
LENGTHS = [16, 8, 8, 24]


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of what is allocated while it is entered: `now`, and the `most` at one time."""

    now = most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in known:
                self.now += each.untyped_storage().nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(each.untyped_storage(), self._free, each.untyped_storage().nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def held(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that are left after `work`, and the most meanwhile."""
    with HeldBytes() as bytes_:
        result = work()
        return bytes_.now, bytes_.most + 0 * id(result)


def plain_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, of_q: Tensor, of_k: Tensor, max_q: int, max_k: int, **how: Any
) -> Tensor:
    """In place of torch's kernel: as its documentation says, sequence by sequence; the last query sees all keys."""
    before, after = how["window_size"]
    assert after == 0 and of_q.dtype == of_k.dtype == torch.int32
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert max_q >= int(of_q.diff().max()) and max_k >= int(of_k.diff().max())
    outputs = []
    for q, k, v in zip(
        query.tensor_split(of_q[1:-1].long()),
        key.tensor_split(of_k[1:-1].long()),
        value.tensor_split(of_k[1:-1].long()),
        strict=True,
    ):
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        if before >= 0:
            mask = mask.triu(len(k) - len(q) - before)
        q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=how["scale"], enable_gqa=how["enable_gqa"]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def heads(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(sum(lengths), n, 8, generator=generator) for n in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 4])
def test_one_call_for_all_lengths_with_context_parallelism(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attn)
    query, key, value = heads(LENGTHS)
    whole = attention.varlen_attention(query, key, value, PackedSequences.from_lengths(LENGTHS, CPU), None)
    for rank in range(size):
        packed = PackedSequences.from_lengths(LENGTHS, CPU, size, rank)
        own = torch.from_numpy(own_positions(LENGTHS, size, rank))
        assert packed.attended is not None
        part = attention.varlen_attention(
            query[own], key[packed.attended], value[packed.attended], packed, None
        )
        torch.testing.assert_close(part, whole[own])


def test_values_of_latent_attention_become_as_wide_as_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attn)
    (query, key, value), packed = heads(LENGTHS), PackedSequences.from_lengths(LENGTHS, CPU)
    whole = attention.varlen_attention(query, key, value, packed, None)
    narrow = attention.varlen_attention(query, key, value[..., :5], packed, None)
    torch.testing.assert_close(narrow, whole[..., :5])


SINKS = [0.5, -1.0, 2.0, 0.0]


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("before", [None, 3])
def test_the_kernel_for_all_lengths_gives_what_a_call_a_length_gives(
    before: int | None, sinks: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attn)
    one_rank = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_group", lambda: one_rank)
    layer = attention.PackedAttention.__new__(attention.PackedAttention)
    torch.nn.Module.__init__(layer)
    layer.softmax_scale, layer.before, layer.soft_cap = 0.3, before, None
    layer.softmax_offset = None if sinks is None else torch.tensor(sinks)
    packed = PackedSequences.from_lengths(LENGTHS, CPU)
    plain = layer(*heads(LENGTHS), None, packed)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: True)
    torch.testing.assert_close(layer(*heads(LENGTHS), None, packed), plain)


@pytest.mark.parametrize("before", [None, 3])
def test_a_sink_is_one_more_score(before: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MASKED_QUERIES", 5)
    one_rank = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_group", lambda: one_rank)
    layer = attention.PackedAttention.__new__(attention.PackedAttention)
    torch.nn.Module.__init__(layer)
    layer.softmax_scale, layer.before, layer.soft_cap = 0.3, before, None
    layer.softmax_offset = torch.tensor(SINKS)
    found = layer(*heads([16]), None, PackedSequences.from_lengths([16], CPU))
    query, key, value = (each.transpose(0, 1) for each in heads([16]))  # [heads, tokens, head_dim]
    scores = 0.3 * query @ key.repeat_interleave(2, 0).transpose(1, 2)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    scores = scores.masked_fill(~(mask if before is None else mask.triu(-before)), -torch.inf)
    more = torch.tensor(SINKS)[:, None, None].expand(4, 16, 1)
    shares = torch.cat([more, scores], -1).softmax(-1)[..., 1:]
    torch.testing.assert_close(found, (shares @ value.repeat_interleave(2, 0)).transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("window", "cap", "sinks"),
    [(None, None, None), (7, None, None), (7, 0.5, None), (None, None, SINKS), (7, None, SINKS)],
)
def test_shared_beginnings_in_one_call_and_in_several(
    window: int | None, cap: float | None, sinks: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has one call for all segments; torch's own attention stands in for it here."""
    rng = np.random.default_rng(0)
    tokens = [np.array([*range(first, first + 12), *rng.integers(0, 3, n)], np.int32)
              for first, n in ((0, 3), (0, 9), (0, 9), (0, 20), (40, 1), (40, 30), (90, 5))]  # fmt: skip
    samples = range(len(tokens))
    layout = lay_out(samples, {i: len(tokens[i]) for i in samples}, Prefixes.of(tokens, least=1))
    layer = attention.PackedAttention.__new__(attention.PackedAttention)
    torch.nn.Module.__init__(layer)
    layer.softmax_scale, layer.before, layer.soft_cap = 0.3, window, cap
    layer.softmax_offset = None if sinks is None else torch.tensor(sinks, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(layout.total, n, 8, generator=generator) for n in (4, 2, 2)]
    results = []
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attn)
    for small, kernel, queries in ((256, False, 256), (0, False, 256), (0, False, 5), (0, True, 256)):
        monkeypatch.setattr(prefix_attention, "_SMALL", small)
        monkeypatch.setattr(attention, "_MASKED_QUERIES", queries)
        monkeypatch.setattr(attention, "has_varlen_kernel", lambda query, kernel=kernel: kernel)
        packed = PackedSequences.sharing(layout.lengths, layout.keys, layout.families, CPU)
        given = [each.clone().requires_grad_() for each in heads]
        output = layer(*given, None, packed)
        output.square().sum().backward()
        gradients = [each.grad for each in given]
        if layer.softmax_offset is not None:
            gradients.append(layer.softmax_offset.grad)
            layer.softmax_offset.grad = None
        results.append([output.detach(), *gradients])
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("queries", [6, 10])
def test_attention_without_a_mask(queries: int) -> None:
    q, k, v = (each.unsqueeze(0).transpose(1, 2) for each in heads([10]))
    mask = torch.ones(queries, 10, dtype=torch.bool).tril(10 - queries)
    expected = F.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=mask, enable_gqa=True)
    found = attention.attend_without_mask(q[:, :, :queries], k, v, None)
    torch.testing.assert_close(found, expected)


def test_memory_of_packed_attention_has_no_scores() -> None:
    """In tensors that have sizes only: beside the gradients nothing as large as even a mask would be."""
    packed = PackedSequences.from_lengths([8192, 8192], torch.device("meta"))
    q, k, v = (
        torch.empty(16384, n, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2)
    )
    _, most = held(lambda: attention.varlen_attention(q, k, v, packed, None).sum().backward())
    assert q.grad is not None and k.grad is not None and k.grad.shape == k.shape
    assert most < 4 * q.nbytes + 2 * k.nbytes + 4 * 16384 * 8 * 4 < 8192 * 8192 * 2


def test_scores_with_a_soft_cap_are_not_kept() -> None:
    q, k, v = (torch.empty(1, n, 2048, 16, device="meta", requires_grad=True) for n in (8, 2, 2))
    mask = torch.empty(2048, 2048, device="meta", dtype=torch.bool)
    outputs: list[Tensor] = []
    left, most = held(lambda: outputs.append(capped_attention(q, k, v, mask, None, 50.0)))
    assert left < 2 * q.nbytes < 8 * 2048 * 2048 * 4 < most
    outputs[0].sum().backward()
    assert q.grad is not None and k.grad is not None and k.grad.shape == k.shape


def test_logits_are_capped_in_place_and_rounded_once() -> None:
    logits = (torch.arange(-40, 40) / 2).bfloat16().view(20, 1, 4).requires_grad_()
    expected = 5 * torch.tanh(logits.float() / 5)
    held_before = logits * 1
    found = soft_capped_(held_before, 5.0)
    assert found.data_ptr() == held_before.data_ptr() and torch.equal(found, expected.bfloat16())
    (mine,) = torch.autograd.grad(found.float().square().sum(), logits)
    (theirs,) = torch.autograd.grad(expected.square().sum(), logits)
    torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.05)


def test_rotary_embeddings_read_nothing_back() -> None:
    """A tensor without contents cannot be read: the original's `tolist` raises here."""
    from megatron.core.models.common.embeddings import rope_utils

    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=True, multi_latent_attention=False, mrope_section=None
    )
    for size in (1, 2):
        group = SimpleNamespace(size=lambda size=size: size, rank=lambda: 0)
        with FakeTensorMode():
            offsets = torch.tensor([0, 8, 24], dtype=torch.int32)
            t, freqs = torch.empty(24 // size, 2, 8), torch.empty(24, 1, 1, 8)
            found = rope_utils.apply_rotary_pos_emb(t, freqs, config, cu_seqlens=offsets, cp_group=group)
        assert found.shape == t.shape


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 8], [8, 0, 0]])
def test_the_product_of_all_experts(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 16, generator=generator).bfloat16().requires_grad_()
    weights = [torch.randn(24, 16, generator=generator).bfloat16().requires_grad_() for _ in counts]
    grad = torch.randn(8, 24, generator=generator).bfloat16()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        found = experts.grouped_linear(x, counts, *weights)
    assert sum(saved) == x.nbytes + 4 * len(counts) + sum(weight.nbytes for weight in weights)
    gradients = torch.autograd.grad(found, [x, *weights], grad)
    parts = zip(x.split(counts), weights, strict=True)
    expected = torch.cat([F.linear(tokens, weight) for tokens, weight in parts])
    torch.testing.assert_close(found, expected)
    for ours, loops in zip(gradients, torch.autograd.grad(expected, [x, *weights], grad), strict=True):
        torch.testing.assert_close(ours, loops)


def test_a_cpu_and_fp32_have_a_product_an_expert() -> None:
    assert not experts.has_grouped_product(torch.ones(8, 16, dtype=torch.bfloat16), torch.ones(8, 16))
    with FakeTensorMode():
        x = torch.empty(8, 16, device="cuda", dtype=torch.bfloat16)
        assert experts.has_grouped_product(x, torch.empty(24, 16, device="cuda", dtype=torch.bfloat16))
        assert not experts.has_grouped_product(x, torch.empty(24, 16, device="cuda"))
        odd = torch.empty(24, 15, device="cuda", dtype=torch.bfloat16)
        assert not experts.has_grouped_product(x, odd)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_memory_beside_bf16_logits(with_entropy: bool) -> None:
    """16384 positions of Qwen3 on a device whose tensors have sizes only: 4 bytes a logit and 8 are the limits."""
    count, vocabulary = 16384, 151936
    logits = torch.empty(count, vocabulary, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets = torch.empty(count, dtype=torch.int64, device="meta")
    outputs: list[Tensor] = []
    left, most = held(lambda: outputs.extend(log_probs_and_entropy(logits, targets)))
    assert most < LOGITS_WORKSPACE + 200 * count  # of the logits' size: nothing, not even 0.1 bytes each
    assert left < 50 * count
    loss = outputs[0].sum() + (outputs[1].sum() if with_entropy else 0)
    _, most = held(loss.backward)
    assert 0 <= most - 2 * logits.numel() < LOGITS_WORKSPACE + 200 * count  # the gradient, in bf16


SOME_OF: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": {
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
    },
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
WITH_A_GPU = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.set_device = lambda index: None
from rltrain.megatron import device
device.set_up()
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe import moe_utils
assert not HAVE_TE and moe_utils.te_general_gemm is None
assert rope_utils._apply_rotary_pos_emb_thd.__module__ == "rltrain.megatron.repairs"
for method in (DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict,
               DistributedOptimizer._set_main_param_and_optimizer_states):
    assert method.__module__ == "rltrain.megatron.repairs", method
assert torch.cuda.Stream.__module__ != "rltrain.megatron.cpu"
"""


def test_a_gpu_without_transformer_engine_has_the_same_repairs() -> None:
    """The GPU is a mock; what is asked is which of Megatron-core's functions are replaced."""
    done = subprocess.run([sys.executable, "-c", WITH_A_GPU], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("architecture", "own"),
    [("MistralForCausalLM", False), ("Gemma2ForCausalLM", True), ("GptOssForCausalLM", True)],
)
def test_windows_with_context_parallelism_where_attention_is_not_transformer_engines(
    architecture: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "use_transformer_engine", lambda: True)
    shape = read_model_shape(tiny_config(architecture, sliding_window=7, **SOME_OF.get(architecture, {})))
    config = make_config(Path("model"), context_parallel_size=2)
    with nullcontext() if own else pytest.raises(UserError, match="which TransformerEngine's context"):
        assert build._window_config(shape, config.parallel, config.model)["window_size"] == (6, 0)


def test_each_ranks_biases_of_experts_count_in_the_norm_of_gradients() -> None:
    """TransformerEngine marks those of the second layer as copies, which they are only where an expert is split."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    layer, expert = torch.nn.Module(), torch.nn.Linear(2, 2)
    expert.weight.tensor_model_parallel = True  # type: ignore[assignment]
    layer.mlp = torch.nn.ModuleDict({"experts": torch.nn.ModuleDict({"linear_fc2": expert})})
    model = torch.nn.ModuleDict({"decoder": layer})
    config = SimpleNamespace(
        expert_model_parallel_size=2, expert_tensor_parallel_size=1, tensor_model_parallel_size=2
    )
    build._mark_experts([model], config)  # type: ignore[list-item, arg-type]
    second = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    assert all(param_is_not_tensor_parallel_duplicate(each, second) for each in model.parameters())
    assert not any(each.allreduce for each in model.parameters())


def test_plain_queries_and_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = SimpleNamespace(query_rank=None)
    monkeypatch.setattr(build, "use_transformer_engine", lambda: True)
    monkeypatch.setattr(build, "normalises_plain_queries", lambda: False)
    assert build._latent_norms(latent) == {"qk_layernorm": True}  # type: ignore[arg-type]
    monkeypatch.setattr(build, "normalises_plain_queries", lambda: True)
    with pytest.raises(UserError, match=r"Install one before 0.19, such as 0\.18\.2"):
        build._latent_norms(latent)  # type: ignore[arg-type]


def test_random_states_of_a_gpu_do_not_reach_a_cpu() -> None:
    """A run that goes on where there is no GPU: its trackers keep the seeds that they have."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from rltrain.megatron.checkpoint.state import restore_rng, rng_state

    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()
    try:
        tracker.set_states({"model-parallel-rng": torch.get_rng_state()})
        own = rng_state()
        of_a_gpu = {name: torch.zeros(16, dtype=torch.uint8) for name in own["tracker"]}
        restore_rng({**own, "cuda": torch.zeros(16, dtype=torch.uint8), "tracker": of_a_gpu})
        with tracker.fork():
            torch.rand(1)
        restore_rng(own)
        kept = tracker.get_states()
        assert all(torch.equal(kept[name], own["tracker"][name]) for name in own["tracker"])
    finally:
        tracker.set_states(before)
