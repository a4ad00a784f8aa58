"""Write the tasks: a file with a hole, and the test that it must pass.

python -m examples.coding_agent.make_prompts [FILE]     (default: data/small_model/coding_agent.jsonl)
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

TASKS = 128


def task(rng: random.Random) -> dict[str, Any]:
    """`4 - 1 =`: the file has to define `value`, about right. The small model often writes `3??`: no Python."""
    expression = f"{rng.randint(0, 9)} {rng.choice('+-')} {rng.randint(0, 9)}"
    test = f"from solution import value\nassert abs(value - ({expression})) <= 3\n"
    return {
        "input": f"{expression} =",
        "label": test,  # which agents don't get to see
        "metadata": {"files": {"solution.py": f"value = TODO  # {expression}\n"}},
    }


def write(path: Path) -> None:
    """The same tasks each time."""
    rng = random.Random(0)
    path.write_text("".join(json.dumps(task(rng)) + "\n" for _ in range(TASKS)))


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "data/small_model/coding_agent.jsonl"))
