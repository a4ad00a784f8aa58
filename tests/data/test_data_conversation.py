"""Chat loss masks: against masks made by hand, for templates of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import make_tokenizer

from rltrain.data.conversation import text_and_spans, tokens_and_mask
from rltrain.run.errors import UserError

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: reasoning is only shown in turns after the last question, where there is always some.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last and '(think)' not in m['content'] %}(think)(done)"
    "{% endif %}{% if loop.index0 < ns.last %}{{ m['content'].split('(done)')[-1] }}{% else %}{{ m['content'] }}"
    "{% endif %}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}.{% endfor %}"
PLAIN += "{% if add_generation_prompt %}assistant:{% endif %}"


def trained(template: str, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The conversation, and its parts that are trained on."""
    tokenizer = make_tokenizer(template)

    def render(messages: list[dict[str, Any]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    text, spans = text_and_spans(messages, render)
    return text, [text[start:end] for start, end in spans]


def talk(*contents: str, roles: str = "ua") -> list[dict[str, Any]]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": names[roles[i % len(roles)]], "content": content} for i, content in enumerate(contents)]


def test_every_turn_of_the_assistant_with_its_end_is_trained_on() -> None:
    text, parts = trained(CHATML, talk("be brief", "hi", "hello", "bye", "so long", roles="suaua"))
    assert text == (
        "<system>be brief</>\n<user>hi</>\n<assistant>hello</>\n<user>bye</>\n<assistant>so long</>\n"
    )
    assert parts == ["hello</>", "so long</>"]


def test_dropped_reasoning_and_added_reasoning() -> None:
    text, parts = trained(REASONING, talk("hi", "(think)hm(done)hello", "bye", "(think)er(done)so long"))
    assert text.startswith("<user>hi</>\n<assistant>hello</>\n")
    assert parts == ["hello</>", "(think)er(done)so long</>"]
    assert trained(REASONING, talk("hi", "hello"))[1] == ["(think)(done)hello</>"]


def test_end_marks_that_also_stand_in_the_text() -> None:
    assert trained(PLAIN, talk("a.b", "c.d", "e", "f.")) == (
        "user:a.b.assistant:c.d.user:e.assistant:f..",
        ["c.d.", "f.."],
    )


def test_tools_answer_and_the_assistant_goes_on() -> None:
    assert trained(CHATML, talk("2+2", "calc", "4", "it is 4", roles="uata"))[1] == ["calc</>", "it is 4</>"]
    assert trained(CHATML, talk("q", "one", "two", roles="uaa"))[1] == ["one</>", "two</>"]


def test_single_messages_can_be_left_out() -> None:
    messages = talk("hi", "hello", "bye", "so long")
    messages[1]["step_loss_mask"] = 0
    text, parts = trained(CHATML, messages)
    assert parts == ["so long</>"] and "step_loss_mask" not in text


def test_mask_of_tokens_equals_one_made_by_hand() -> None:
    tokenizer = make_tokenizer(PLAIN)
    tokens, mask = tokens_and_mask(talk("ab", "cd", "e", "f"), tokenizer)
    # one token a character:        user:ab.     assistant: cd.    user:e.     assistant: f.
    assert mask == [0] * 8 + [0] * 10 + [1] * 3 + [0] * 7 + [0] * 10 + [1] * 2
    assert tokenizer.decode(tokens) == "user:ab.assistant:cd.user:e.assistant:f."


# As GLM's: a turn ends where the next message's role begins, and nothing stands after the last one.
ROLES = (
    "<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_without_an_end_mark_the_next_messages_first_token_ends_a_turn() -> None:
    tokenizer = make_tokenizer(ROLES)
    roles = ["<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})
    user, tool = tokenizer.convert_tokens_to_ids(["<|user|>", "<|tool|>"])
    tokens, mask = tokens_and_mask(talk("hi", "ab", "4", "cd", "e", "f", roles="uataua"), tokenizer)
    parts = [token for token, trained in zip(tokens, mask, strict=True) if trained]
    text = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in ("ab", "cd", "f")}
    assert parts == [*text["ab"], tool, *text["cd"], user, *text["f"], user]
    assert tokens[-1] == user

    plain = make_tokenizer("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
                           "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    tokens, mask = tokens_and_mask(talk("hi", "ab"), plain)
    assert tokens[-1] == plain.eos_token_id and mask[-3:] == [
        1,
        1,
        1,
    ]  # no special tokens: the tokenizer's own


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(UserError, match="no chat template"):
        tokens_and_mask(talk("a", "b"), make_tokenizer(None))
    counting = "{{ messages | length }}" + CHATML  # the prompt of a turn is not how it is shown afterwards
    with pytest.raises(UserError, match=r"message 1 of a conversation"):
        trained(counting, talk("a", "b", "c", "d"))


def test_fine_tuning_takes_conversations_and_labels(tmp_path: Path, make_args: Any) -> None:
    from rltrain.data.source import RolloutDataSource
    from rltrain.rollout.sft_rollout import generate_rollout

    file = tmp_path / "talks.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": talk("ab", "cd", "e", f"f{i}")}) + "\n" for i in range(4))
    )
    flags = ["--loss-type", "sft_loss", "--prompt-data", str(file), "--input-key", "messages"]
    config = make_args(*flags, "--n-samples-per-prompt", "1", "--loss-mask-type", "qwen")
    assert config.functions.rollout_function_path == "rltrain.rollout.sft_rollout.generate_rollout"
    assert config.debug.debug_train_only
    config = config.replace(label_key=None)
    sample = generate_rollout(config.namespace, 0, RolloutDataSource(config.namespace)).samples[0][0]
    assert sample.response == "cd.user:e.assistant:f0."
    assert sample.loss_mask == [1] * 3 + [0] * 17 + [1] * 3
    assert sample.response_length == 23 and sample.prompt_length == 18

    file.write_text(json.dumps({"messages": talk("ab")}) + "\n")
    config = make_args(*flags, "--n-samples-per-prompt", "1", "--rollout-batch-size", "1")
    config = config.replace(label_key=None)
    with pytest.raises(UserError, match=r"prompt 0: it has no assistant message .* come from user"):
        generate_rollout(config.namespace, 0, RolloutDataSource(config.namespace))
