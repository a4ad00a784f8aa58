"""Flags of the algorithms: what contradicts itself is refused by name, and roles get flags of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.megatron import tiny_config, tiny_experts_config

from rltrain.arguments import UserError, dump, parse
from rltrain.arguments.groups.critic import use_critic
from rltrain.arguments.model_flags import check_lora

REQUIRED = ["--hf-checkpoint", "m", "--prompt-data", "p", "--rollout-batch-size", "8", "--num-rollout", "4"]
PPO = ["--advantage-estimator", "ppo"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lambd 0.9", "ppo has one"),
        ("--lambd 1.5 --advantage-estimator ppo", "--lambd 1.5: a discount is between 0 and 1"),
        ("--critic-lr 1e-5", "--critic-lr 1e-05: --advantage-estimator grpo has no critic"),
        ("--num-critic-only-steps 3", "only ppo has one"),
        ("--advantage-estimator ppo --num-critic-only-steps -1", "can't be negative"),
        ("--advantage-estimator ppo --value-clip 0", "--value-clip 0.0: it must be greater than 0"),
        ("--use-opd", "needs --opd-type"),
        ("--opd-type sglang", "--opd-type: it needs --use-opd"),
        ("--use-opd --opd-type megatron", "--opd-teacher-load and --opd-type megatron belong together"),
        ("--use-opd --opd-type sglang --opd-teacher-load t", "belong together"),
        ("--use-opd --opd-type sglang --loss-type sft_loss", "--loss-type sft_loss has none"),
        ("--loss-type custom_loss", "belong together"),
        ("--custom-loss-function-path a.b", "belong together"),
        ("--disable-compute-advantages-and-returns", "only a custom loss or sft_loss"),
        ("--ref-update-interval 2", "nothing uses a reference"),
        ("--ref-update-interval 0 --use-kl-loss", "at least 1"),
        ("--keep-old-actor --use-rollout-logprobs", "Give one"),
        ("--use-opsm --advantage-estimator cispo", "CISPO keeps every token"),
        ("--max-skipped-steps 0", "--max-skipped-steps is 0"),
        ("--lora-rank -1", "--lora-rank is -1"),
        ("--lora-alpha 8", "--lora-alpha does nothing without --lora-rank"),
        ("--lora-target-modules q_proj", "does nothing without --lora-rank"),
        ("--lora-rank 8 --lora-alpha 0", "--lora-alpha 0: it must be greater"),
        ("--lora-rank 8 --lora-target-modules lm_head", "lm_head: that layer can't have an adapter"),
        (
            "--lora-rank 8 --advantage-estimator ppo",
            "--lora-rank 8 does not go with --advantage-estimator ppo",
        ),
        ("--lora-rank 8 --only-train-params-name-list mlp", "not go with --only-train-params-name-list"),
        ("--lora-rank 8 --freeze-params-name-list mlp", "not go with --freeze-params-name-list"),
        ("--lora-rank 8 --custom-model-provider-path a.b", "not go with --custom-model-provider-path"),
        ("--lora-rank 8 --ckpt-format torch", "not go with --ckpt-format torch"),
    ],
)
def test_refusals_name_the_flag(flags: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, *flags.split()])
    assert words in str(caught.value)


def test_adapters_are_scaled_by_two_and_on_all_layers_unless_flags_say() -> None:
    lora = parse([*REQUIRED, "--lora-rank", "8"]).lora
    assert (lora.lora_alpha, lora.lora_target_modules, lora.scale) == (16.0, ["all-linear"], 2.0)
    assert lora.is_target("o_proj")
    given = parse(
        [*REQUIRED, "--lora-rank", "8", "--lora-alpha", "4", "--lora-target-modules", "q_proj", "k_proj"]
    ).lora
    assert (given.scale, given.is_target("k_proj"), given.is_target("v_proj")) == (0.5, True, False)


def test_adapters_that_the_model_cannot_have_are_refused() -> None:
    phi, experts = tiny_config("Phi3ForCausalLM", pad_token_id=None), tiny_experts_config()
    latent = tiny_config("Glm4MoeLiteForCausalLM", head_dim=64, num_key_value_heads=4)
    for name, model, words in (
        ("q_proj", phi, "this Phi3ForCausalLM has qkv_proj, o_proj, gate_up_proj, down_proj."),
        ("up_proj", experts, "has q_proj, k_proj, v_proj, o_proj (with experts, only attention"),
        ("q_proj", latent, "Glm4MoeLiteForCausalLM has latent attention"),
    ):
        config = parse([*REQUIRED, "--lora-rank", "8", "--lora-target-modules", name])
        with pytest.raises(UserError) as caught:
            check_lora(model, config.lora)
        assert words in str(caught.value)
    check_lora(tiny_config(), parse([*REQUIRED, "--lora-rank", "8"]).lora)


def test_fine_tuning_does_without_advantages() -> None:
    """As every fine-tuning script of slime says."""
    config = parse([*REQUIRED, "--loss-type", "sft_loss", "--disable-compute-advantages-and-returns"])
    assert config.algorithm.compute_advantages_and_returns is False


def test_the_critic_takes_the_policys_flags_but_its_own(tmp_path: Path) -> None:
    plain = parse([*REQUIRED, *PPO, "--save", "runs/c", "--lr", "1e-4", "--lr-warmup-iters", "3"]).of_critic()
    assert (plain.optimizer.lr, plain.optimizer.lr_warmup_iters, plain.checkpoint.load) == (1e-4, 0, None)
    assert plain.checkpoint.save == str(Path("runs/c/critic").absolute())
    args = parse(
        [*REQUIRED, *PPO, "--critic-lr", "5e-4", "--critic-lr-warmup-iters", "2", "--critic-save", "k"]
    )
    own = args.of_critic()
    assert (own.optimizer.lr, own.optimizer.lr_warmup_iters) == (5e-4, 2)
    assert own.checkpoint.save == str(Path("k").absolute())
    assert (
        args.optimizer.lr == 1e-6 and use_critic(args.algorithm) and not use_critic(parse(REQUIRED).algorithm)
    )


def test_roles_of_a_file_come_over_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "roles.yaml"
    file.write_text(
        "megatron:\n"
        "- role: actor\n  overrides: {lr: 2e-6, hf_checkpoint: m}\n"
        "- role: critic\n  args: {lr: 1e-5, custom_advantage_function_path: null, load: elsewhere}\n"
    )
    args = parse(
        [*REQUIRED, *PPO, "--lr", "1e-3", "--critic-lr", "1e-4", "--megatron-config-path", str(file)]
    )
    critic = args.of_critic()
    assert (args.optimizer.lr, critic.optimizer.lr) == (2e-6, 1e-5)  # numbers, though YAML reads texts
    assert critic.checkpoint.load == str(Path("elsewhere").absolute())
    assert isinstance(dump(args)["critic_overrides"], str)  # TOML has no null


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("megatron: 3", "a list of roles"),
        ("megatron: [{role: judge}]", "role 'judge': it is actor or critic"),
        ("megatron: [{role: critic}, {role: critic}]", "critic appears twice"),
        ("megatron: [{role: critic, overrides: {lrr: 1}}]", "critic: unknown name 'lrr'; did you mean lr?"),
        ("megatron: [{role: critic, overrides: {lr: fast}}]", "lr is 'fast', which is not possible"),
        (
            "megatron: [{role: critic, overrides: {tensor_model_parallel_size: 2}}]",
            "tensor_model_parallel_size is 2, and 1 for the whole run",
        ),
        ("megatron: [{role: critic, overrides: 1}]", "overrides must hold names with values"),
        ("- 1", "names with values"),
    ],
)
def test_files_of_roles_that_make_no_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "roles.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, *PPO, "--megatron-config-path", str(file)])
    assert words in str(caught.value) and str(file) in str(caught.value)


def test_a_critic_without_ppo_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "roles.yaml"
    file.write_text("megatron: [{role: critic, overrides: {lr: 1.0}}]")
    with pytest.raises(UserError, match="only --advantage-estimator ppo trains one"):
        parse([*REQUIRED, "--megatron-config-path", str(file)])


def test_hooks_are_known_by_their_older_names() -> None:
    args = parse([*REQUIRED, "--custom-megatron-before-log-prob-hook", "a.b"])
    assert args.functions.custom_megatron_before_log_prob_hook_path == "a.b"
