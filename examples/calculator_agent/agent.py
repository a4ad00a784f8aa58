"""A program of its own: the model and a calculator take turns. It knows OpenAI's client, and nothing of training."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import openai

MOST_CALLS = 2


def main() -> None:
    """Asks until the model ends without a call, and prints what it said last."""
    given = json.loads(sys.stdin.readline())
    client = openai.OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY are set
    messages: list[Any] = [{"role": "user", "content": given["prompt"]}]
    said = ""
    for _ in range(MOST_CALLS + 1):
        response = client.chat.completions.create(model=given["model"], messages=messages, stop=["]"])
        said = response.choices[0].message.content or ""
        call = re.search(r"\[(\d{1,4})\*(\d{1,4})$", said)  # without the stop word
        if call is None or response.choices[0].finish_reason != "stop":
            break
        result = f"{int(call[1]) * int(call[2])};"
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": result}]
    print(said)


if __name__ == "__main__":
    main()
