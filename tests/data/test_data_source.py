"""The data source: order, groups, exact resume, prompts as tokens."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import make_tokenizer

from rltrain.data.prompt_file import Prompt
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import TAKEN_AS_NAMED, load_tokenizer, named_class, render
from rltrain.run.errors import UserError
from rltrain.sample import Sample


def prompts(groups: list[list[Sample]]) -> list[Any]:
    return [group[0].prompt for group in groups]


def flat(groups: list[list[Sample]]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(sample) for group in groups for sample in group]


def test_groups_hold_numbered_samples_with_prompt_tokens(make_args) -> None:
    source = RolloutDataSource(make_args().namespace)
    groups = source.get_samples(3) + source.get_samples(1)
    assert [[sample.index for sample in group] for group in groups] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [{sample.group_index for sample in group} for group in groups] == [{0}, {1}, {2}, {3}]
    first, second = groups[3]
    assert (first.prompt, first.label, first.metadata) == ("3+3=", "6", {"number": 3})
    assert first.tokens == make_tokenizer()("3+3=").input_ids
    first.tokens.append(1)
    first.metadata["number"] = 9
    assert second.tokens == make_tokenizer()("3+3=").input_ids and second.metadata == {"number": 3}


def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own(make_args) -> None:
    source = RolloutDataSource(make_args("--rollout-shuffle").namespace)
    taken = prompts(source.get_samples(15)) + prompts(source.get_samples(25))
    assert len(source) == 20
    assert sorted(taken[:20]) == sorted(taken[20:]) and len(set(taken[:20])) == 20
    assert taken[:20] != taken[20:]
    assert taken == prompts(RolloutDataSource(make_args("--rollout-shuffle").namespace).get_samples(40))
    assert taken != prompts(
        RolloutDataSource(make_args("--rollout-shuffle", "--rollout-seed", "7").namespace).get_samples(40)
    )


def test_without_shuffle_the_order_is_the_files(make_args) -> None:
    taken = prompts(RolloutDataSource(make_args().namespace).get_samples(22))
    assert taken[:3] == ["0+0=", "1+1=", "2+2="] and taken[20:] == taken[:2]


@pytest.mark.parametrize("steps", [1, 5, 6, 11])
def test_resume_goes_on_exactly_where_it_stopped(make_args, steps: int) -> None:
    config = make_args("--rollout-shuffle")
    unbroken, stopped = RolloutDataSource(config.namespace), RolloutDataSource(config.namespace)
    for step in range(steps):
        unbroken.get_samples(4)
        stopped.get_samples(4)
        stopped.save(step)
    stopped.get_samples(3)  # taken, but the step never finished
    resumed = RolloutDataSource(config.namespace)
    resumed.load(steps - 1)
    assert flat(resumed.get_samples(9)) == flat(unbroken.get_samples(9))


def test_resume_keeps_groups_that_were_given_back(make_args) -> None:
    config = make_args()
    source = RolloutDataSource(config.namespace)
    group = source.get_samples(2)[1]
    group[0].append_response_tokens(tokens=[5, 6], log_probs=[-0.5, -0.25])
    group[0].status = Sample.Status.ABORTED
    source.add_samples([group])
    source.save(0)
    expected = flat(source.get_samples(3))
    resumed = RolloutDataSource(config.namespace)
    resumed.load(0)
    assert resumed.get_buffer_length() == 1
    assert flat(resumed.get_samples(3)) == expected
    assert resumed.get_buffer_length() == 0


def test_loading_minus_one_or_an_unknown_state_starts_at_the_beginning(make_args, capsys) -> None:
    source = RolloutDataSource(make_args().namespace)
    source.get_samples(3)
    source.load(-1)
    assert capsys.readouterr().out == ""
    assert prompts(source.get_samples(1)) == ["0+0="]
    source.load(41)
    assert "no state of rollout 41" in capsys.readouterr().out
    assert prompts(source.get_samples(1)) == ["0+0="]


def test_the_state_beside_a_checkpoint_of_another_run_is_taken(make_args, tmp_path: Path) -> None:
    config = make_args()
    source = RolloutDataSource(config.namespace)
    source.get_samples(3)
    source.save(6)
    other = make_args("--load", str(Path(config.rollout.rollout_state_dir).parent))
    other = other.replace(rollout_state_dir=str(tmp_path / "other" / "checkpoints" / "rollout_state"))
    resumed = RolloutDataSource(other.namespace)
    resumed.load(6)
    assert prompts(resumed.get_samples(1)) == ["3+3="]


def test_prompts_that_are_too_long_are_left_out_and_counted(make_args) -> None:
    source = RolloutDataSource(
        make_args("--rollout-max-prompt-len", "4").namespace
    )  # "9+2=" fits, "10+3=" does not
    assert (len(source), source.num_prompts_too_long) == (10, 10)
    with pytest.raises(UserError, match="all 20 prompts are longer than --rollout-max-prompt-len 2"):
        RolloutDataSource(make_args("--rollout-max-prompt-len", "2").namespace)


def test_too_few_prompts_that_are_short_enough_are_refused(make_args) -> None:
    with pytest.raises(
        UserError, match=r"10 prompts are longer .* and the 10 others .* --rollout-batch-size 11"
    ):
        RolloutDataSource(make_args("--rollout-max-prompt-len", "4", "--rollout-batch-size", "11").namespace)


def test_chat_template_is_applied_and_text_becomes_the_users_message(make_args) -> None:
    source = RolloutDataSource(make_args("--apply-chat-template").namespace)
    (sample, _), *_ = source.get_samples(1)
    assert sample.prompt == "user:0+0=.assistant:"
    assert sample.tokens == make_tokenizer()(sample.prompt).input_ids


def test_messages_without_a_template_are_refused_unless_a_custom_function_takes_them(
    make_args, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "hi"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"input": chat, "label": "x"}))
    with pytest.raises(UserError, match="--apply-chat-template"):
        RolloutDataSource(make_args("--prompt-data", str(path)).namespace).get_samples(1)
    config = make_args("--prompt-data", str(path), "--custom-generate-function-path", "some.module.generate")
    (sample, _), *_ = RolloutDataSource(config.namespace).get_samples(1)
    assert sample.prompt == chat and sample.tokens == []


def test_a_tokenizer_without_template_or_no_tokenizer_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        render(Prompt("hi"), make_tokenizer(chat_template=None), chat_template=True, kwargs={})
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))


def write_tokenizer(directory: Path, named: str, model_type: str) -> Path:
    """One of a few merges, whose files name its class and the model's type."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0, "a": 1, "b": 2, "\u0120": 3, "ab": 4}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab, [("a", "b")])), eos_token="<eos>"
    ).save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": named}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


@pytest.mark.parametrize("named", TAKEN_AS_NAMED)
def test_the_class_that_the_files_name_is_the_one_that_transformers_would_take(
    tmp_path: Path, named: str
) -> None:
    from transformers import AutoTokenizer

    for model_type in TAKEN_AS_NAMED[named]:
        directory = write_tokenizer(tmp_path / model_type, named, model_type)
        assert named_class(directory) == named
        ours, theirs = load_tokenizer(str(directory)), AutoTokenizer.from_pretrained(directory)
        assert type(ours) is type(theirs) and ours.init_kwargs == theirs.init_kwargs
        assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert named_class(write_tokenizer(tmp_path / "other", named, "deepseek_v3")) is None
    assert named_class(write_tokenizer(tmp_path / "third", "LlamaTokenizer", "llama")) is None


@pytest.mark.slow
def test_a_tokenizer_is_loaded_and_used_without_torch(tiny_model: Path) -> None:
    code = f"""
import sys
from rltrain.data.prompt_file import Prompt
from rltrain.data.tokenizer import encode, load_tokenizer, render
tokenizer = load_tokenizer({str(tiny_model)!r})
print(tokenizer.decode(encode([render(Prompt("1+1="), tokenizer, chat_template=True, kwargs={{}})], tokenizer)[0]))
print("torch" in sys.modules)
from importlib.metadata import packages_distributions
from transformers.utils.import_utils import PACKAGE_DISTRIBUTION_MAPPING as known
by_name = ({{name: sorted(found) for name, found in each.items()}} for each in (known, packages_distributions()))
assert next(by_name) == next(by_name) and "torch" in known
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "user:1+1=.assistant:\nFalse\n" and done.returncode == 0, done.stdout + done.stderr


def test_without_prompts_samples_are_numbered_and_empty(make_args) -> None:
    config = make_args().replace(prompt_data=None, rollout_global_dataset=False)
    source = RolloutDataSource(config.namespace)
    first = source.get_samples(3)
    assert [[sample.index for sample in group] for group in first] == [[0, 1], [2, 3], [4, 5]]
    assert all(flat([[sample]]) == flat([[Sample(group_index=i, index=sample.index)]])
               for i, group in enumerate(first) for sample in group)  # fmt: skip
    source.save(0)
    again = RolloutDataSource(config.namespace)
    again.load(0)
    assert (
        flat(again.get_samples(1)) == flat(source.get_samples(1)) and source.get_samples(1)[0][0].index == 8
    )
