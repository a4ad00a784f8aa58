"""The memory estimate against published sizes, a real model's files, and numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.doctor.memory import (
    TrainerAsk,
    both_memory,
    checkpoint_bytes,
    count_parameters,
    critic_memory,
    engine_memory,
    trainer_memory,
)
from hpc.doctor.memory_fit import GIB, Memory, check_memory, trainer_ask
from rltrain import arguments
from rltrain.arguments.config import Config
from rltrain.arguments.groups.training import LOGITS_WORKSPACE
from rltrain.arguments.hf_config import ModelShape, read_model_shape


def shape(**config: object) -> ModelShape:
    return read_model_shape({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **config})


QWEN3_0_6B = shape(
    num_hidden_layers=28, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
QWEN2_5_0_5B = shape(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_hidden_layers=24, hidden_size=896,
    intermediate_size=4864,
    num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_3_8B = shape(
    architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=32, hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
)  # fmt: skip
# One layer: qkv 4×(2+2)·2 = 32, output 2·2×4 = 16, MLP 3×4×6 = 72; embeddings 2×10×4 = 80; norms 8 + q/k 4, last 4
SMALL = shape(
    num_hidden_layers=1, hidden_size=4, intermediate_size=6, num_attention_heads=2, num_key_value_heads=1, head_dim=2,
    vocab_size=10,
)  # fmt: skip
ASK = TrainerAsk(
    tensor=1,
    data=4,
    bf16=True,
    distributed_optimizer=False,
    sequence_parallel=False,
    recompute=False,
    tokens=100,
)


QWEN3_30B_A3B = shape(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_hidden_layers=48, hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768,
)  # fmt: skip
DEEPSEEK_V3 = shape(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", num_hidden_layers=61, hidden_size=7168,
    intermediate_size=18432, num_attention_heads=128, vocab_size=129280, num_experts_per_tok=8,
)  # fmt: skip
QWEN3_NEXT = shape(
    architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", num_hidden_layers=48, hidden_size=2048,
    intermediate_size=5120, num_attention_heads=16, vocab_size=151936,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (QWEN3_0_6B, 596_049_920),
        (QWEN2_5_0_5B, 494_032_768),
        (LLAMA_3_8B, 8_030_261_248),
        (QWEN3_30B_A3B, 30_532_122_624),
        (DEEPSEEK_V3, 671_026_404_352),
        (QWEN3_NEXT, 79_674_391_296),  # as transformers counts
    ],
)
def test_published_sizes(model: ModelShape, published: int) -> None:
    assert count_parameters(model).total == published


@pytest.mark.slow
def test_a_real_models_files(tiny_model: Path) -> None:
    from safetensors import safe_open

    config = json.loads((tiny_model / "config.json").read_text())
    stored = 0
    for path in tiny_model.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            stored += sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert count_parameters(read_model_shape(config)).total == stored


def test_share_of_a_tensor_parallel_rank() -> None:
    assert count_parameters(SMALL).split == 32 + 16 + 72 + 80
    assert count_parameters(SMALL).replicated == 8 + 4 + 4
    assert count_parameters(SMALL, 2).split == 100
    assert count_parameters(SMALL, 2).replicated == 16
    # the vocabulary of 10 is padded to 12
    assert count_parameters(SMALL, 4).split == (32 + 16 + 72 + 2 * 12 * 4) // 4


def test_share_of_a_pipeline_stage_and_of_an_experts_rank() -> None:
    whole = count_parameters(QWEN3_30B_A3B).total
    embedding, experts = 151936 * 2048, 48 * 128 * 3 * 2048 * 768
    assert count_parameters(QWEN3_30B_A3B, expert=8).total == whole - experts * 7 // 8
    stage = count_parameters(QWEN3_30B_A3B, pipeline=4).total
    assert stage == (whole - 2 * embedding - 2048) // 4 + embedding + 2048


def test_bytes_of_a_parameter() -> None:
    """bf16: 2 + 4 + (4 + 4 + 4); fp32: 4 + 4 + (4 + 4), Adam's part split by the distributed optimizer."""
    count = 8_030_261_248
    plain = trainer_memory(LLAMA_3_8B, ASK)
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * count, 4 * count, 12 * count)
    assert trainer_memory(LLAMA_3_8B, replace(ASK, distributed_optimizer=True)).optimizer == 3 * count
    single = trainer_memory(LLAMA_3_8B, replace(ASK, bf16=False))
    assert (single.weights, single.gradients, single.optimizer) == (4 * count, 4 * count, 8 * count)
    assert plain.reference == 0
    assert trainer_memory(LLAMA_3_8B, replace(ASK, keeps_reference=True)).reference == 2 * count
    assert checkpoint_bytes(LLAMA_3_8B, bf16=True) == 14 * count
    assert checkpoint_bytes(LLAMA_3_8B, bf16=False) == 12 * count


def test_adapters_alone_have_gradients_and_an_optimizer() -> None:
    """Of rank 16: on q and o 2·(4096 + 4096), on k and v 2·(4096 + 1024), on the MLP 3·(4096 + 14336), 32 layers."""
    count, adapters = 8_030_261_248, 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert adapters == 41_943_040  # as published for all linear layers
    found = trainer_memory(LLAMA_3_8B, replace(ASK, lora_rank=16))
    assert (found.weights, found.gradients) == (2 * (count + adapters), 4 * adapters)
    assert found.optimizer == 12 * adapters
    assert checkpoint_bytes(LLAMA_3_8B, bf16=True, lora_rank=16) == 2 * count + 14 * adapters


def test_a_critic_has_one_number_where_the_policy_has_logits() -> None:
    count = 8_030_261_248 - 128256 * 4096 + 4096 + 1
    policy, critic = trainer_memory(LLAMA_3_8B, ASK), critic_memory(LLAMA_3_8B, ASK)
    assert (critic.weights, critic.gradients, critic.optimizer) == (2 * count, 4 * count, 12 * count)
    assert (critic.activations, critic.logits) == (policy.activations, (2 * 2 + 2 * 4) * ASK.tokens)
    assert critic_memory(LLAMA_3_8B, replace(ASK, keeps_reference=True)).reference == 0
    assert both_memory(policy, critic, in_turn=True) == policy.total
    assert both_memory(policy, critic, in_turn=False) == policy.total + 18 * count
    assert both_memory(policy, None, in_turn=False) == policy.total
    assert checkpoint_bytes(LLAMA_3_8B, bf16=True, critic=True) == 14 * (8_030_261_248 + count)


def test_activations() -> None:
    # a token and layer: 4·4 hidden + (2·2 + 2·1)·2 heads + 3·6 MLP = 46 numbers
    assert trainer_memory(SMALL, ASK).activations == 100 * 46 * 2
    assert trainer_memory(SMALL, replace(ASK, bf16=False)).activations == 100 * 46 * 4
    assert trainer_memory(SMALL, replace(ASK, tensor=2)).activations == 100 * (16 + 15) * 2
    assert (
        trainer_memory(SMALL, replace(ASK, tensor=2, sequence_parallel=True)).activations
        == 100 * (8 + 15) * 2
    )
    two = replace(SMALL, num_layers=2)
    assert trainer_memory(two, ASK).activations == 2 * 100 * 46 * 2
    assert trainer_memory(two, replace(ASK, recompute=True)).activations == 100 * (46 + 2 * 4) * 2


def test_logits() -> None:
    """They and their gradient in their own type, and two fp32 numbers for each that is worked on."""
    assert trainer_memory(SMALL, ASK).logits == (2 * 2 + 2 * 4) * 100 * 10
    assert trainer_memory(SMALL, replace(ASK, tensor=4)).logits == (2 * 2 + 2 * 4) * 100 * 3
    assert (
        trainer_memory(SMALL, replace(ASK, log_probs_chunk_size=8)).logits == (2 * 2 * 100 + 2 * 4 * 8) * 10
    )
    long = trainer_memory(QWEN3_0_6B, replace(ASK, tokens=16384)).logits
    assert 0 <= 4 * 16384 * 151936 + LOGITS_WORKSPACE - long < 8 * 151936
    single = replace(ASK, tokens=16384, bf16=False)
    assert trainer_memory(QWEN3_0_6B, single).logits - long == 4 * 16384 * 151936


def test_engine() -> None:
    # Llama 3 8B: 2 × 32 layers × 8 heads × 128 numbers × 2 bytes = 128 KiB a token
    engine = engine_memory(LLAMA_3_8B, 1, bf16=True)
    assert (engine.weights, engine.kv_per_token) == (2 * 8_030_261_248, 128 * 1024)
    assert engine.tokens_in(engine.weights + 10.5 * 128 * 1024) == 10
    assert engine.tokens_in(engine.weights - 1) == 0
    assert engine_memory(LLAMA_3_8B, 4, bf16=True).kv_per_token == 32 * 1024
    assert engine_memory(LLAMA_3_8B, 16, bf16=True).kv_per_token == 16 * 1024  # 8 heads are copied
    assert engine_memory(LLAMA_3_8B, 1, bf16=False).kv_per_token == 256 * 1024


@pytest.fixture
def args_of(tmp_path: Path):
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def make(*flags: str) -> Config:
        base = (
            f"--hf-checkpoint={tmp_path} --prompt-data=/x --num-rollout=1 --rollout-batch-size=8 --bf16"
            " --rollout-max-response-len=2048 --actor-num-gpus-per-node=8"
        )
        return arguments.parse([*base.split(), *flags])

    return make


def test_tokens_of_the_largest_micro_batch(args_of) -> None:
    assert trainer_ask(args_of()).tokens == 2048
    assert trainer_ask(args_of("--rollout-max-prompt-len=1024")).tokens == 3072
    assert (
        trainer_ask(args_of("--rollout-max-context-len=4096", "--rollout-max-prompt-len=1024")).tokens == 4096
    )
    packed = ("--use-dynamic-batch-size", "--max-tokens-per-gpu")
    assert trainer_ask(args_of(*packed, "9000")).tokens == 9000
    assert trainer_ask(args_of(*packed, "1000")).tokens == 2048  # a long sample is not cut
    ask = trainer_ask(args_of("--tensor-model-parallel-size=4"))
    assert (ask.tensor, ask.data) == (4, 2)


GPU = Memory(80 * GIB, True, "a GPU")


def test_8b_on_80_gib(args_of) -> None:
    """134.6 GiB of state do not fit on one GPU; on two halves, with Adam's part split over 4, 67.3 − 33.6 GiB do."""
    trainer, engine = check_memory(args_of(), GPU)
    assert (trainer.level, engine.level) == ("fail", "ok")
    assert "of 72.0 GiB usable" in trainer.message and "--use-distributed-optimizer" in trainer.advice
    # (0.85 × 80 × 2³⁰ − 2 × 8030261248) / 128 KiB
    assert "434523 tokens of context fit" in engine.message
    trainer, _ = check_memory(args_of("--tensor-model-parallel-size=2", "--use-distributed-optimizer"), GPU)
    assert trainer.level == "ok"


def test_colocated_the_trainer_has_what_the_engine_leaves(args_of) -> None:
    split = ("--tensor-model-parallel-size=8", "--use-distributed-optimizer", "--colocate")
    trainer, _ = check_memory(args_of(*split), GPU)
    assert trainer.level == "fail" and "of 12.0 GiB usable" in trainer.message
    trainer, _ = check_memory(args_of(*split, "--sglang-mem-fraction-static=0.5"), GPU)
    assert trainer.level == "ok" and "of 40.0 GiB usable" in trainer.message


def test_ppo_needs_memory_for_its_critic(args_of) -> None:
    """34 GiB of state of each on a quarter: in turn they fit on a GPU; together, and on a machine, both count."""
    flags = ("--tensor-model-parallel-size=4", "--recompute-granularity=full", "--recompute-method=uniform",
             "--recompute-num-layers=1", "--advantage-estimator=ppo")  # fmt: skip
    trainer, _ = check_memory(args_of(*flags), GPU)
    assert trainer.level == "ok" and "critic 3" in trainer.message
    trainer, _ = check_memory(args_of(*flags, "--no-swap-critic"), GPU)
    assert trainer.level == "warn"
    machine = Memory(450 * GIB, False, "this machine")
    assert check_memory(args_of(*flags[:-1]), machine)[0].level == "ok"
    assert check_memory(args_of(*flags), machine)[0].level == "fail"


def test_engine_that_has_no_room_for_a_sample(args_of) -> None:
    _, engine = check_memory(args_of("--rollout-max-response-len=60000"), Memory(24 * GIB, True, "a GPU"))
    assert engine.level == "fail" and "a sample may have 60000" in engine.message


def test_on_a_cpu_all_share_the_machine(args_of) -> None:
    [check] = check_memory(args_of(), Memory(24 * GIB, False, "this machine"))
    assert (
        check.level == "fail"
        and "this machine" in check.message
        and check.message.startswith("8 × trainer rank")
    )
    [check] = check_memory(args_of(), None)
    assert check.level == "ok" and "not known" in check.message
