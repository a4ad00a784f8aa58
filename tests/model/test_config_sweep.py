"""Every entry that the installed transformers knows of a supported model's config.json, changed and left out.

Each time the log-probs equal transformers', or the configuration is refused; nothing else may happen. The entries are
those of the configuration class, and those that the code of the model reads, so that a new transformers brings its own.
"""

from __future__ import annotations

import gc
import inspect
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import megatron
from helpers.megatron import (
    LATENT,
    as_transformers_knows,
    init_single_process,
    make_config,
    tiny_config,
    write_config,
)

from rltrain.arguments.hf_config import ModelShape
from rltrain.models.families import FAMILIES
from rltrain.models.families.family import Family
from rltrain.models.lengths import check_sequences
from rltrain.run.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

pytestmark = pytest.mark.slow

# Rounding of either side is 2e-5 at most, of linear attention, and differs between processors. An entry that is read
# wrongly shows over a hundred times as much. In float64 the two sides differ by 2e-14.
TOLERANCE = 5e-5
LENGTHS = [23, 40]
# With values that show in log-probs when they are multiplied.
EXPERTS = megatron.EXPERTS | {"mlp_only_layers": []}
GROUPED_EXPERTS = megatron.GROUPED_EXPERTS | {"first_k_dense_replace": 0}
INDEXER = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 8}
LINEAR = megatron.LINEAR | {"layer_types": ["linear_attention"]}
WINDOW = {"sliding_window": 9}
SLIDING = {"use_sliding_window": True} | WINDOW
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": WINDOW,
    "Qwen2ForCausalLM": SLIDING | {"max_window_layers": 0},
    "Qwen3ForCausalLM": SLIDING | {"layer_types": ["sliding_attention"]},
    "GraniteForCausalLM": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "MiMoForCausalLM": SLIDING | {"max_window_layers": 0},
    "Phi3ForCausalLM": WINDOW | {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64},
    "Gemma2ForCausalLM": {
        "query_pre_attn_scalar": 2,
        "sliding_window": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3ForCausalLM": WINDOW | {"query_pre_attn_scalar": 20, "layer_types": ["sliding_attention"]},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1]},
    "GptOssForCausalLM": LOCAL_EXPERTS | WINDOW | {"swiglu_limit": 0.5},
    "Qwen2MoeForCausalLM": EXPERTS | {"shared_expert_intermediate_size": 24},
    "Qwen3MoeForCausalLM": EXPERTS,
    "Qwen3NextForCausalLM": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 24},
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5MoeForCausalLM": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 24},
    "MiniMaxM2ForCausalLM": LOCAL_EXPERTS,
    "DeepseekV3ForCausalLM": LATENT | GROUPED_EXPERTS,
    "DeepseekV32ForCausalLM": LATENT | GROUPED_EXPERTS | INDEXER,
    "GlmMoeDsaForCausalLM": LATENT | GROUPED_EXPERTS | INDEXER | {"mlp_layer_types": ["sparse"]},
    "Glm4MoeLiteForCausalLM": LATENT | GROUPED_EXPERTS | {"mlp_layer_types": ["sparse"]},
    "Glm4MoeForCausalLM": GROUPED_EXPERTS | {"use_qk_norm": True, "attention_bias": True},
}
COMMON = {"num_hidden_layers": 1, "rms_norm_eps": 0.05, "rope_theta": 100.0, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 2.0,
        "beta_slow": 0.5,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 5.0],
        "original_max_position_embeddings": 64,
    },
}
Entries = dict[str, Any]


def base(architecture: str, rope: str = "default", *, new_style: bool) -> Entries:
    """A model of one layer, in the style of transformers 4 or 5."""
    config = tiny_config(architecture, **COMMON, **OF_FAMILY.get(architecture, {}))
    if not new_style:
        return (
            config
            | {"torch_dtype": config.pop("dtype")}
            | ({"rope_scaling": ROPES[rope]} if rope != "default" else {})
        )
    parameters = {"rope_theta": config.pop("rope_theta"), **ROPES[rope]}
    if FAMILIES[architecture].partial_rotary:
        parameters["partial_rotary_factor"] = 0.5
    if FAMILIES[architecture].local_rope:
        return config | {
            "rope_parameters": {"full_attention": parameters, "sliding_attention": {"rope_theta": 30.0}}
        }
    return config | {"rope_parameters": parameters}


def known_entries(family: Family) -> dict[str, Any]:
    """Entries of a model's configuration → their usual values; None for those that only its code knows."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, masking_utils, modeling_rope_utils

    kind = CONFIG_MAPPING[family.same_as or family.model_type]
    default = kind()
    code = [inspect.getmodule(MODEL_FOR_CAUSAL_LM_MAPPING[kind]), masking_utils, modeling_rope_utils]
    text = "".join(inspect.getsource(module) for module in code if module)
    read = re.findall(r"\bconfig\.([a-z]\w+)|getattr\((?:self\.)?config, [\"']([a-z]\w+)", text)
    names = {name for pair in read for name in pair if name and not callable(getattr(default, name, None))}
    return {name: getattr(default, name, None) for name in names | default.to_dict().keys()} | {
        "rope_theta": 1e4
    }


def changed(value: Any) -> list[Any]:
    """Other values of the same type, and null."""
    match value:
        case bool():
            return [not value, None]
        case int():
            return [value + 1, 2 * value, max(1, value // 2), 1, None]
        case float():
            return [value * 3 + 0.01, None]
        case str():
            return ["gelu", "other", None]
        case list() | tuple():
            return [[], [0], None]
        case dict():
            return [{}, None]
        case _:
            return [True, False, 1, 3, 0.25, [0], ["sliding_attention"], {"chunk_size": 4}]


def one_changed(config: Entries, known: dict[str, Any]) -> Iterator[tuple[str, Entries]]:
    """`config` with one entry left out or changed."""
    for name, usual in sorted(known.items()):
        present = config.get(name)
        if name in config:
            yield f"without {name}", {key: value for key, value in config.items() if key != name}
        for value in changed(usual if present is None else present):
            yield f"{name} {value!r}", config | {name: value}


def one_rope_changed(config: Entries, style: str) -> Iterator[tuple[str, Entries]]:
    """`config` with one entry of its rotary embedding left out or changed, there and beside it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    rope = config.get(style, {})
    for name, value in rope.items():
        yield f"{style} without {name}", config | {style: {k: v for k, v in rope.items() if k != name}}
        for other in changed(value):
            yield f"{style} {name} {other!r}", config | {style: rope | {name: other}}
    own = {"mscale", "mscale_all_dim", "truncate", "type"}  # beside them
    for name in (RopeParameters.__annotations__.keys() | own) - rope.keys():
        for other in (0.5, 3.0, 48, False, [1.0, 2.0, 3.0, 4.0], "yarn"):
            yield f"{style} {name} {other!r}", config | {style: rope | {name: other}}
            yield f"{name} {other!r} beside {style}", config | {name: other}
    for kind in ROPE_INIT_FUNCTIONS:
        yield f"{style} rope_type {kind}", config | {style: rope | {"rope_type": kind}}
        yield f"{style} of {kind} alone", config | {style: {"rope_type": kind, "factor": 4.0}}
    other_style = ({"rope_scaling", "rope_parameters"} - {style}).pop()
    for kind in ("linear", "yarn"):
        yield f"{kind} in both styles", config | {other_style: ROPES[kind]}


class Sweep:
    """Both sides, each computed once for what is the same to it."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._config = make_config(write_config(work / "base", tiny_config())).replace(
            hf_checkpoint=str(work / "asked")
        )
        self._theirs: dict[str, tuple[Path, torch.Tensor]] = {}
        self._ours: dict[tuple[ModelShape, Path], torch.Tensor] = {}
        self._read: PreTrainedConfig | None = None  # of the case, by transformers, for the trainer
        self.equal, self.refused = 0, 0

    def look(self, entries: Entries) -> str | None:
        """What is wrong with our treatment of a config.json; None if it is refused, or right."""
        from rltrain.megatron.model.build import read_shape

        self._written("asked", entries)
        try:
            shape = read_shape(self._config)
        except UserError:
            self.refused += 1
            return None
        try:
            saved, theirs = self._transformers(entries)
        except Exception as error:
            return f"accepted, but transformers says {type(error).__name__}: {error}"
        try:
            check_sequences(shape.limit, LENGTHS)
            ours = self._log_probs(shape, saved)
        except UserError:
            self.refused += 1
            return None
        self.equal += 1
        largest = float((ours - theirs).abs().max())
        return None if largest <= TOLERANCE else f"log-probs differ by {largest:.2g}"

    def _written(self, name: str, entries: Entries) -> Path:
        """A directory with this `config.json` alone, in a new file: to write one anew makes the disk wait."""
        self._read = None
        (self._work / name / "config.json").unlink(missing_ok=True)
        return write_config(self._work / name, entries)

    def keep_what_is_read(self, patch: pytest.MonkeyPatch) -> None:
        """A case's `config.json`, which transformers has read for the trainer, is not read once more for itself."""
        from transformers import AutoConfig

        read = AutoConfig.from_pretrained

        def reading(directory: Any, **options: Any) -> PreTrainedConfig:
            self._read = deepcopy(found := read(directory, **options))  # the trainer may change its own
            return found

        patch.setattr(AutoConfig, "from_pretrained", reading)

    def _transformers(self, entries: Entries) -> tuple[Path, torch.Tensor]:
        """A directory with weights of the model, and its log-probs."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if (config := self._read) is None:
            config = AutoConfig.from_pretrained(self._written("known", as_transformers_knows(entries)))
        # Some are read again when the model is made.
        beside = {
            name: entries.get(name) for name in ("original_max_position_embeddings", "partial_rotary_factor")
        }
        key = json.dumps([config.to_dict(), beside], sort_keys=True, default=str)
        if key not in self._theirs:
            # Its other kinds have kernels for some sizes only.
            family = FAMILIES[entries["architectures"][0]]
            experts = {"experts_implementation": "eager"} if family.experts else {}
            caps = {"attn_implementation": "eager"} if family.soft_caps else {}
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **experts, **caps).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, weight in model.state_dict().items():
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.copy_(noise * 0.2 + (1 if "norm" in name else 0))
                ids = tokens(config.vocab_size)
                outputs = [
                    model(part[None], use_cache=False, return_dict=True).logits[0]
                    for part in ids.split(LENGTHS)
                ]
            weights = f"weights-{hash_of(model.state_dict())}"
            if not (self._work / weights).exists():
                model.save_pretrained(self._work / weights)
            self._theirs[key] = self._work / weights, log_probs(torch.cat(outputs), ids)
        return self._theirs[key]

    def _log_probs(self, shape: ModelShape, saved: Path) -> torch.Tensor:
        from rltrain.megatron.device import megatron_scope
        from rltrain.megatron.model.attention import PackedSequences
        from rltrain.megatron.model.build import build_model
        from rltrain.megatron.model.load import load_hf_weights

        if (shape, saved) not in self._ours:
            with megatron_scope(), torch.no_grad():
                models = build_model(shape, self._config)
                load_hf_weights(models, shape, saved)
                ids = tokens(shape.vocab_size)
                packed = PackedSequences.from_lengths(LENGTHS, torch.device("cpu"))
                logits = models[0].eval()(ids[None], None, None, packed_seq_params=packed)[0]
            self._ours[shape, saved] = log_probs(logits, ids)
        return self._ours[shape, saved]

    def theirs(self, entries: Entries) -> torch.Tensor:
        """transformers' log-probs."""
        self._read = None
        return self._transformers(entries)[1]


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token at each place; across the two sequences too, for both sides alike."""
    return logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def hash_of(weights: dict[str, torch.Tensor]) -> int:
    """The same for the same names and shapes: the numbers follow from these."""
    return hash(tuple((name, tuple(weight.shape)) for name, weight in weights.items()))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    init_single_process()
    made = Sweep(tmp_path_factory.mktemp("sweep"))
    with pytest.MonkeyPatch.context() as patch:
        made.keep_what_is_read(patch)
        # All weights are written over.
        patch.setattr(PreTrainedModel, "initialize_weights", lambda model: None, raising=False)
        # It compares itself with its defaults for a message of each reading that nobody sees: a fifth of the time.
        patch.setattr(PreTrainedConfig, "__repr__", lambda config: str(config.to_dict()))
        gc.collect()
        gc.freeze()  # what torch and transformers consist of is not searched for garbage thousands of times
        yield made
        gc.unfreeze()


def check(sweep: Sweep, cases: Iterator[tuple[str, Entries]]) -> tuple[int, int]:
    """How many were equal and how many refused."""
    before = sweep.equal, sweep.refused
    wrong = {name: problem for name, entries in cases if (problem := sweep.look(entries))}
    assert not wrong, "\n".join(f"{name}: {problem}" for name, problem in wrong.items())
    return sweep.equal - before[0], sweep.refused - before[1]


# Read by one function, and published in one style each.
IN_ONE_STYLE = {"DeepseekV32ForCausalLM": False, "GlmMoeDsaForCausalLM": True}
STYLES = [
    pytest.param(name, style, id=f"{name}-{'rope_parameters' if style else 'rope_scaling'}")
    for name in FAMILIES
    for style in (False, True)
    if IN_ONE_STYLE.get(name, style) == style
]


@pytest.mark.parametrize(("architecture", "new_style"), STYLES)
def test_every_entry(architecture: str, new_style: bool, sweep: Sweep) -> None:
    config = base(architecture, new_style=new_style)
    equal, refused = check(sweep, one_changed(config, known_entries(FAMILIES[architecture])))
    assert equal > 40 and refused > 20


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_every_rotary_embedding(rope: str, style: str, sweep: Sweep) -> None:
    llama = "LlamaForCausalLM"
    having = {
        "default": [llama, "Glm4ForCausalLM"],
        "yarn": [llama, "DeepseekV3ForCausalLM"],
        "longrope": ["Phi3ForCausalLM"],
    }
    for architecture in having.get(rope, [llama]):
        config = base(architecture, rope, new_style=style == "rope_parameters")
        equal, refused = check(sweep, one_rope_changed(config, style))
        assert equal and refused


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (
            "LlamaForCausalLM",
            [
                {"rope_parameters": {name: value}}
                for name, value in {"rope_theta": 300.0, "beta_fast": 8.0, "attention_factor": 1.5}.items()
            ],
        ),
        # Of those with the most rounding, what shows least.
        ("Qwen3NextForCausalLM", [{"norm_topk_prob": False}, {"num_experts_per_tok": 3}]),
        ("Qwen3_5ForCausalLM", []),
        ("Gemma3ForCausalLM", [{"query_pre_attn_scalar": 21}, {"sliding_window": 10}]),
    ],
)
def test_what_is_ignored_would_show(architecture: str, changes: list[Entries], sweep: Sweep) -> None:
    config = base(architecture, "yarn" if architecture == "LlamaForCausalLM" else "default", new_style=True)
    plain = sweep.theirs(config)
    for change in [{"rms_norm_eps": 0.16}, *changes]:
        inside = {k: config[k] | value for k, value in change.items() if isinstance(value, dict)}
        other = config | change | inside
        assert float((sweep.theirs(other) - plain).abs().max()) > 100 * TOLERANCE, change
