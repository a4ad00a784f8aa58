"""Replay one sample of a run on an engine, and show where tokens and log-probs part.

    python -m rltrain.tools.replay RUN --step S --index I --engine URL     an engine that runs
    python -m rltrain.tools.replay RUN --step S --index I --frozen [DIR]   one of our own, with the weights in DIR

Two questions: what log-probs does the engine give the recorded tokens? And what does it write after the recorded
prompt, with the same sampling parameters and seed? Tokens of a tool are scored; only the first turn is written again.
The key of a running engine is read from the variable SLURMLIME_TOKEN.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain import arguments
from rltrain.arguments.config import Config
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.model import Model
from rltrain.arguments.groups.rollout import Rollout
from rltrain.data.tokenizer import load_tokenizer
from rltrain.rollout.generate.single_turn import sampling_params, with_seed
from rltrain.rollout.service.server import prepare
from rltrain.run.errors import UserError
from rltrain.run.http import HttpError, call
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import read_table, table_to_samples
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.engine import engine_server_args
from rltrain.tools.compare import Comparison, Scored, compare, first_turn
from rltrain.tools.replay_weights import find_weights, hf_directory

_AROUND = 4  # tokens shown before and after the place
_TIMEOUT = 600.0


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `_parser` says what each is."""

    run: Path
    step: int
    index: int
    engine: str | None
    frozen: Path | None
    trust_load: bool


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if all agrees, 1 if something parts, 2 if it can't be told."""
    options = Options(**vars(_parser().parse_args(argv)))
    try:
        return replay(options)
    except (UserError, HttpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def replay(options: Options) -> int:
    """See `main`.

    Raises:
        UserError: there is no such sample, or no weights for it.
    """
    layout = RunLayout(options.run.absolute())
    config = load_args(layout)
    sample = find_sample(layout, options.step, options.index)
    params = replay_params(config.engines, config.rollout, sample, options.step)
    print(
        f"{layout.name}, step {options.step}, sample {sample.index}: {sample.prompt_length} prompt and"
        f" {sample.response_length} response tokens, weights {' '.join(sample.weight_versions) or 'unknown'}"
    )
    with engine(options, layout, config, sample) as (url, token):
        parted = False
        if params["temperature"] == 1.0:
            recorded, scored = as_recorded(sample), score(url, token, sample)
            parted |= report(
                "log-probs of the recorded tokens", recorded, scored, config.engines, config.model
            )
        else:
            print("the recorded log-probs are at temperature"
                  f" {params['temperature']:g}, and log-probs of given tokens at 1: not compared")  # fmt: skip
        recorded = first_turn(
            as_recorded(sample).tokens, sample.rollout_log_probs or [], sample.loss_mask or []
        )
        if "sampling_seed" not in params and params["temperature"]:
            print(
                "the sampling had no seed (--sglang-enable-deterministic-inference), so expect other tokens"
            )
        again = generate(url, token, sample, params, len(recorded.tokens))
        parted |= report("sampled again", recorded, again, config.engines, config.model)
    return int(parted)


def load_args(layout: RunLayout) -> Config:
    """The run's flags, as the rollout process had them.

    Raises:
        UserError: it is not a run directory.
    """
    if not layout.config.is_file():
        raise UserError(f"{layout.root} is not a run directory: it has no {layout.config.name}.")
    config = arguments.load(layout.root)
    return prepare(config, layout)


def find_sample(layout: RunLayout, step: int, index: int) -> Sample:
    """The sample as it was recorded.

    Raises:
        UserError: there is no such step or sample, or it has nothing to compare.
    """
    directory = layout.find_step(step)
    if directory is None:
        raise UserError(
            f"{layout.root} has no finished rollout of step {step}; it has {layout.steps() or 'none'}."
        )
    samples = {sample.index: sample for sample in table_to_samples(read_table(directory))}
    if index not in samples:
        raise UserError(
            f"step {step} has no sample {index}; it has {', '.join(map(str, list(samples)[:8]))} …"
        )
    sample = samples[index]
    if not sample.response_length or sample.rollout_log_probs is None:
        raise UserError(
            f"sample {index} has no response with log-probs: {sample.failure or sample.status.value}."
        )
    return sample


def replay_params(engines: Engines, rollout: Rollout, sample: Sample, step: int) -> dict[str, Any]:
    """The sampling parameters that the sample had."""
    first = sample if sample.rollout_id is None else Sample(index=sample.rollout_id)
    return {
        **with_seed(engines, rollout, sampling_params(rollout), step, first),
        **sample.metadata.get("sampling_params", {}),
    }


@contextmanager
def engine(options: Options, layout: RunLayout, config: Config, sample: Sample) -> Iterator[tuple[str, str]]:
    """The address and the key of the engine that was asked for."""
    if options.engine:
        yield options.engine.rstrip("/"), os.environ.get("SLURMLIME_TOKEN", "")
        return
    weights = options.frozen or find_weights(layout, config.checkpoint, config.model, sample)
    token = secrets.token_urlsafe(16)
    with hf_directory(weights, Path(config.model.hf_checkpoint), trust=options.trust_load) as model:
        own = {"model_path": str(model), "load_format": "auto", "log_level": "error"}
        print(f"starting an engine with {weights}")
        with HttpServerEngineAdapter.launch(engine_server_args(config, 0) | own, token) as started:
            yield started.url, token


def as_recorded(sample: Sample) -> Scored:
    """The response; tokens of tools have no log-prob."""
    log_probs = sample.rollout_log_probs or []
    mask = sample.loss_mask or [1] * sample.response_length
    known = [value if trained else None for value, trained in zip(log_probs, mask, strict=True)]
    return Scored(sample.tokens[sample.prompt_length :], known)


def score(url: str, token: str, sample: Sample) -> Scored:
    """The log-probs that the engine gives the recorded tokens."""
    body = {
        "input_ids": sample.tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": sample.prompt_length - 1,
    }
    entries = call("POST", f"{url}/generate", token, body, _TIMEOUT)["meta_info"]["input_token_logprobs"]
    ours = entries[len(entries) - sample.response_length :]  # (log-prob, token id, text) each
    return Scored([entry[1] for entry in ours], [entry[0] for entry in ours])


def generate(url: str, token: str, sample: Sample, params: dict[str, Any], length: int) -> Scored:
    """What the engine writes after the recorded prompt, at most as many tokens as were recorded."""
    body = {
        "input_ids": sample.tokens[: sample.prompt_length],
        "sampling_params": {**params, "max_new_tokens": max(1, length)},
        "return_logprob": True,
    }
    entries = call("POST", f"{url}/generate", token, body, _TIMEOUT)["meta_info"]["output_token_logprobs"]
    return Scored([entry[1] for entry in entries], [entry[0] for entry in entries])


def report(title: str, recorded: Scored, replayed: Scored, engines: Engines, model: Model) -> bool:
    """Print how far they agree; returns whether they part."""
    result = compare(recorded, replayed)
    tolerance = 1e-4 if engines.sglang.get("dtype") == "float32" or not model.bf16 else 5e-2
    print(f"{title}: {result.same} of {len(recorded.tokens)} tokens are the same; of {result.compared} log-probs the"
          f" mean |difference| is {result.mean:.2e}, the largest {result.largest:.2e}")  # fmt: skip
    parted = result.parts_at is not None or result.largest > tolerance
    if parted:
        print(table(recorded, replayed, result, load_tokenizer(model.hf_checkpoint)))
    return parted


def table(recorded: Scored, replayed: Scored, result: Comparison, tokenizer: Any) -> str:
    """The tokens around the place where they part, or where the log-probs are furthest apart."""
    place = result.parts_at if result.parts_at is not None else result.at or 0
    lines = [f"{'token':>7}  {'recorded':24}  {'replayed':24}"]
    for i in range(
        max(0, place - _AROUND), min(max(len(recorded.tokens), len(replayed.tokens)), place + _AROUND + 1)
    ):
        mark = "→" if i == place else " "
        lines.append(f"{mark} {i:>5}  {_cell(recorded, i, tokenizer):24}  {_cell(replayed, i, tokenizer):24}")
    return "\n".join(lines)


def _cell(scored: Scored, i: int, tokenizer: Any) -> str:
    if i >= len(scored.tokens):
        return "–"
    log_prob = scored.log_probs[i]
    value = "" if log_prob is None else f"{log_prob:9.5f}"
    return f"{tokenizer.decode([scored.tokens[i]])!r:12} {value}"


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m rltrain.tools.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the rollout")
    parser.add_argument("--index", type=int, required=True, metavar="I", help="the sample's index")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--engine", metavar="URL", help="a running engine, or a router")
    where.add_argument(
        "--frozen", type=Path, nargs="?", metavar="DIR",
        help="weights for an engine that this command starts: a Hugging Face directory or a checkpoint (default:"
        " the weights that generated the sample, if they still exist)",
    )  # fmt: skip
    parser.add_argument(
        "--trust-load",
        action="store_true",
        help="accept a checkpoint that other users may have written: that runs the code in it",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
