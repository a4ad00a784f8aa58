"""Our training step against a bare Megatron-core loop over the same micro-batches, and against transformers.

    python benchmarks/trainer_step.py [--shape tiny] [--samples 256] [--longest 32] [--bf16]
    python benchmarks/trainer_step.py --shape 135M --samples 16 --longest 128 --rounds 3
    python benchmarks/trainer_step.py --shape 1.7B --samples 64 --longest 1024 --bf16    # on a GPU

The bare loop has the same model and optimizer, takes micro-batches that are already tensors, and computes
Megatron-core's own cross entropy: no log-probs, no policy loss, no metrics, no packing. transformers trains the same
shape on the same tokens with the same loss and optimizer, in micro-batches padded to their longest sample, up to the
same token budget. On a CPU the step is also held against a product of two large matrices in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rltrain import arguments
from rltrain.data.batch import TrainBatch
from rltrain.run.role import Registry, RoleContext

# Of a Qwen3 model: layers, hidden size, feed-forward size, heads, key and value heads, their size, vocabulary.
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 16, 512),
    "20M": (8, 512, 1024, 4, 2, 128, 512),  # about
    "75M": (8, 1024, 2048, 4, 2, 256, 512),
    "135M": (30, 576, 1536, 9, 3, 64, 49152),  # SmolLM2's
    "0.5B": (24, 896, 4864, 14, 2, 64, 151936),  # as Qwen2.5-0.5B
    "1.7B": (28, 2048, 6144, 16, 8, 128, 151936),  # Qwen3-1.7B
}
MATRIX = 2048  # rows and columns of the two that are multiplied
MAX_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 weights; ours and bare with an fp32 master copy"
    )
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--longest", type=int, default=32, help="tokens of a prompt and of a response, at most"
    )
    parser.add_argument("--rounds", type=int, default=25, help="measured ones; a fifth as many warm up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        actor = make_actor(options, Path(directory))
        batch = make_batch(options)
        ours, bare, padded, product = race(
            options.rounds,
            lambda: actor.train(0, batch),
            bare_step(actor, batch),
            transformers_step(Path(directory), batch, options.bf16),
            matrix_product(options.bf16),
        )
    print(
        f"trainer step: bare loop / ours = {bare / ours:.3f} (aim: 0.95); ours {ours * 1e3:.1f} ms, bare"
        f" {bare * 1e3:.1f} ms, {batch.num_tokens / ours:,.0f} tokens/s, {of_peak(actor, batch, ours, product)}\n"
        f"trainer step: transformers with padding / ours = {padded / ours:.3f} (aim: over 1); transformers"
        f" {padded * 1e3:.1f} ms"
    )


def of_peak(actor: Any, batch: TrainBatch, seconds: float, product: float) -> str:
    """Model FLOPs utilisation: a step is a forward and a backward pass, which costs two of them.

    Args:
        seconds: Of a step.
        product: Of a matrix product, from which the peak of a device comes that has no known one.
    """
    from rltrain.megatron.device import peak_flops
    from rltrain.megatron.training.flops import sequence_flops

    lengths = zip(batch.tokens, batch.response_lengths, strict=True)
    flops = sum(3 * sequence_flops(actor.shape, len(tokens), response) for tokens, response in lengths)
    measured = 2 * MATRIX**3 / product
    peak, of = (known, "MFU") if (known := peak_flops()) else (measured, "of a bare matrix product")
    return (
        f"{flops / seconds / 1e12:.3g} TFLOP/s, {flops / seconds / peak:.1%} {of} ({peak / 1e12:.3g} TFLOP/s)"
    )


def matrix_product(bf16: bool) -> Callable[[], Any]:
    """A product of two square matrices, in the precision of the step."""
    import torch

    from rltrain.megatron.device import device

    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = torch.randn(2, MATRIX, MATRIX, dtype=dtype, device=device())
    return lambda: left @ right


def synchronize() -> None:
    """Wait for what a GPU has still to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def race(rounds: int, *candidates: Callable[[], Any]) -> list[float]:
    """Median seconds of each, run in turns so that the machine's moods hit all alike."""
    times: list[list[float]] = [[] for _ in candidates]
    warm_up = math.ceil(rounds / 5)
    for number in range(warm_up + rounds):
        for candidate, taken in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            synchronize()
            if number >= warm_up:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def make_actor(options: argparse.Namespace, directory: Path) -> Any:
    """The trainer, alone in this process, on a Qwen3 shape."""
    import torch.distributed as dist

    from rltrain.megatron import device
    from rltrain.megatron import ranks as distributed

    layers, hidden, ffn, heads, kv_heads, head_dim, vocabulary = SHAPES[options.shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4 * options.longest,
    }
    (directory / "config.json").write_text(json.dumps(config))
    args = arguments.parse(
        f"--hf-checkpoint {directory} --random-init --prompt-data none --num-rollout 1 --lr 1e-5"
        f" --rollout-batch-size {options.samples} --use-dynamic-batch-size --max-tokens-per-gpu {MAX_TOKENS}".split()
        + ["--bf16"] * options.bf16
    )
    device.set_up()
    distributed.join(args.parallel, args.optimizer.seed, dist.HashStore(), 0, 1)
    from rltrain.megatron.actor import MegatronTrainActor

    context = RoleContext(directory, 0, "trainer", 0, "", "")
    return MegatronTrainActor(args, context, Registry(context))


def make_batch(options: argparse.Namespace) -> TrainBatch:
    """Random samples."""
    rng = np.random.default_rng(0)
    prompts, responses = rng.integers(1, options.longest, (2, options.samples))
    return TrainBatch(
        tokens=[rng.integers(0, SHAPES[options.shape][-1], n).astype(np.int32) for n in prompts + responses],
        response_lengths=responses.tolist(),
        loss_masks=[np.ones(n, np.int8) for n in responses],
        train_rewards=rng.normal(size=options.samples).astype(np.float32),
        rollout_log_probs=[-rng.random(n).astype(np.float32) for n in responses],
    )


def bare_step(actor: Any, batch: TrainBatch) -> Callable[[], None]:
    """One optimizer step as a Megatron-core tutorial would write it."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from rltrain.megatron.device import megatron_scope, model_scope
    from rltrain.megatron.training.share import RankShare

    policy = actor.policy
    share = RankShare(actor.config, actor.shape, batch)
    micro_batches = share.micro_batches(0, share.loss_inputs())

    def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (losses.view(-1) * mask).sum() / mask.sum()
        return loss, {"loss": loss.detach()}

    def forward_step(iterator: Iterator[Any], model: Any) -> Any:
        micro_batch = next(iterator)
        labels = micro_batch.tokens.roll(-1)
        mask = torch.zeros(labels.numel(), device=labels.device).index_fill_(0, micro_batch.rows, 1.0)
        with model_scope(model.module.config):
            losses = model(
                input_ids=micro_batch.tokens,
                position_ids=None,
                attention_mask=None,
                labels=labels,
                packed_seq_params=micro_batch.sequences,
            )
        return losses, partial(loss_func, mask)

    def step() -> None:
        with megatron_scope():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(micro_batches),
                model=policy.wrapped,
                num_microbatches=len(micro_batches),
                seq_length=1,
                micro_batch_size=1,
            )
            policy.optimizer.step()
            policy.scheduler.step(increment=1)
            # Ours begins with cleared gradients, and leaves them so.
            policy.wrapped[0].zero_grad_buffer()
            policy.optimizer.zero_grad()

    return step


def transformers_step(model_dir: Path, batch: TrainBatch, bf16: bool) -> Callable[[], None]:
    """One optimizer step of a policy gradient with transformers, right-padded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rltrain.megatron.device import device

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if bf16 else torch.float32)
    model.to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    padded = [[each.to(device()) for each in _padded(batch, indices)] for indices in _in_order(batch)]

    def step() -> None:
        optimizer.zero_grad()
        for ids, attended, mask, advantages in padded:
            logits = model(ids, attention_mask=attended).logits[:, :-1]
            log_probs = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            losses = -advantages * (log_probs - log_probs.detach()).exp() * mask
            (losses.sum(1) / mask.sum(1) / len(batch)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _in_order(batch: TrainBatch) -> list[list[int]]:
    """Samples in their order, in micro-batches that keep to the token budget with their padding."""
    result: list[list[int]] = [[]]
    longest = 0
    for i, tokens in enumerate(batch.tokens):
        longest = max(longest, len(tokens))
        if result[-1] and longest * (len(result[-1]) + 1) > MAX_TOKENS:
            result.append([])
            longest = len(tokens)
        result[-1].append(i)
    return result


def _padded(batch: TrainBatch, indices: list[int]) -> tuple[Any, Any, Any, Any]:
    """Token ids and attention mask [samples, longest], loss mask [samples, longest - 1], advantages [samples, 1]."""
    import torch

    longest = max(len(batch.tokens[i]) for i in indices)
    ids = torch.zeros((len(indices), longest), dtype=torch.int64)
    attended, mask = torch.zeros_like(ids), torch.zeros((len(indices), longest - 1))
    for row, i in enumerate(indices):
        length, response = len(batch.tokens[i]), batch.response_lengths[i]
        ids[row, :length] = torch.from_numpy(batch.tokens[i].astype(np.int64))
        attended[row, :length] = 1
        mask[row, length - response - 1 : length - 1] = 1.0
    advantages = torch.from_numpy(batch.train_rewards[indices]).unsqueeze(1)
    return ids, attended, mask, advantages


if __name__ == "__main__":
    main()
