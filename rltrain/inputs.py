"""Check the files that the flags name before anything is started: prompts, model, custom functions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rltrain.agents.environments import prompts
from rltrain.agents.program import readable, search_path
from rltrain.agents.sandbox import kinds
from rltrain.arguments.config import Config, groups
from rltrain.arguments.declare import declared
from rltrain.arguments.external import external_token
from rltrain.arguments.groups.agents import Agents, command_words
from rltrain.arguments.groups.checkpoint import starts_elsewhere
from rltrain.arguments.groups.debug import check_recorded
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.functions import (
    DEFAULT_DATA_SOURCE,
    DEFAULT_ROLLOUT_FUNCTION,
    absent_of,
    check_functions,
)
from rltrain.arguments.hf_config import check_hf_config, read_model_shape
from rltrain.arguments.model_flags import check_lora, check_model_flags, check_mtp, check_quantised
from rltrain.models import linear
from rltrain.models.directory import read_hf_config
from rltrain.models.heads import check_weights
from rltrain.models.lengths import check_engines_limit
from rltrain.models.windows import check_engines
from rltrain.run.errors import UserError
from rltrain.run.files import read_object


def check_inputs(config: Config, to_come: Mapping[str, str] | None = None) -> Config:
    """Check every input file of a run.

    Args:
        config: resolved flags.
        to_come: model directories that an earlier job will write, each with one that has the same shape.

    Returns:
        The configuration with `num_rollout`, where `--num-epoch` was given.

    Raises:
        UserError: one paragraph with the file, the line where there is one, and what to do.
    """
    if config.engines.are_external or config.engines.sglang_router_ip:
        external_token()
    check_places(config)
    check_agents(config.agents)
    _check_served_models(config.engines, config.model.hf_checkpoint)
    model = _check_model(config, to_come or {})
    if config.data.apply_chat_template:
        _check_chat_template(model)
    if config.debug.load_debug_rollout_data:
        check_recorded(config.debug, config.rollout.num_rollout)
        check_functions(config.functions)
        return config
    if config.agents.environment:
        prompts.prepare(config)
    config = _check_prompts(config)
    _check_functions(config)
    return config


def check_places(config: Config) -> None:
    """Check that no flag names a file where a directory is needed, or a directory where a file is.

    Each flag's own check verifies the contents.

    Raises:
        UserError: names the flag, the place and what it is.
    """
    for name in groups():
        group = getattr(config, name)
        for each in declared(type(group)):
            given = getattr(group, each.name)
            if each.flag.metavar not in ("DIR", "FILE") or not isinstance(given, str) or name == "agents":
                continue  # an agent's own are looked at by `check_agents`
            path = Path(given)
            if each.flag.metavar == "FILE" and os.path.isdir(path):  # noqa: PTH112 (see below)
                raise UserError(f"{each.option} {given}: it is a directory; give the file in it.")
            if each.flag.metavar == "DIR" and (file := _file_on_the_way(path)):
                what = "it is a file" if file == path else f"{file} is a file"
                raise UserError(f"{each.option} {given}: {what} where a directory is needed.")


def _file_on_the_way(path: Path) -> Path | None:
    """The file that stands where a directory has to be, for `path` to be one."""

    # `Path.exists()` raises below a directory that is closed to us; on the job's nodes the place may be right.
    def stands_in_the_way(each: Path) -> bool:
        return os.path.exists(each) and not os.path.isdir(each)  # noqa: PTH110, PTH112

    return next(filter(stands_in_the_way, (path, *path.parents)), None)


def absent_imports(config: Config) -> list[str]:
    """What the modules of the flags' functions import and this Python has not: one line each, with flag and place.

    For a job on other machines that is a hint only: they may have it.
    """
    sets = [config.of_eval_set(each) for each in config.evaluation.eval_datasets]
    return list(dict.fromkeys(line for each in (config, *sets) for line in absent_of(each.functions)))


def check_imports(config: Config) -> None:
    """Check that what the flags' functions import is here, for a job on this machine.

    Raises:
        UserError: names the flag, the file, its line and the package.
    """
    if absent := absent_imports(config):
        raise UserError(f"{'; '.join(absent)}. Install it there, or import it where it is used.")


def check_agents(agents: Agents) -> None:
    """Check that an agent's program, its files and its sandbox are here.

    Raises:
        UserError: what is missing.
    """
    if not agents.agent_command:
        return
    kinds.check(agents.agent_sandbox)
    if agents.agent_python and not os.access(agents.agent_python, os.X_OK):
        raise UserError(f"--agent-python {agents.agent_python} is not a program.")
    for path in [*agents.agent_files, *(word for word in command_words(agents)[1:] if word.endswith(".py"))]:
        if not Path(path).exists():
            raise UserError(f"--agent-command: there is no {path}.")
    if agents.agent_sandbox in ("bubblewrap", "none"):  # else it is looked for in the image
        program = command_words(agents)[0]
        if shutil.which(program, path=search_path(agents)) is None:
            raise UserError(
                f"--agent-command: there is no program {program} in {search_path(agents)}. Give its full path."
            )
        for path in readable(agents):
            if not Path(path).exists():
                raise UserError(f"--agent-files: there is no {path}.")
    elif (
        agents.agent_image
        and agents.agent_image.startswith(("/", "."))
        and not Path(agents.agent_image).exists()
    ):
        raise UserError(f"--agent-image: there is no {agents.agent_image}.")


def _check_served_models(engines: Engines, hf_checkpoint: str) -> None:
    for served in engines.sglang_models:
        path = served["model_path"]
        if path != hf_checkpoint and not (Path(path) / "config.json").is_file():
            raise UserError(f"--sglang-config: model {served['name']}: {path} is not a model directory.")


def _check_model(config: Config, to_come: Mapping[str, str]) -> Path:
    hf_checkpoint = config.model.hf_checkpoint
    model = Path(to_come.get(hf_checkpoint, hf_checkpoint))
    without_weights = config.model.random_init or hf_checkpoint in to_come
    hf_config = read_hf_config(model, without_weights)
    check_hf_config(hf_config, config.parallel, hf_checkpoint)
    check_model_flags(config.shape, hf_config, hf_checkpoint)
    check_quantised(hf_config, config)
    check_lora(hf_config, config.lora)
    check_mtp(hf_config, config.mtp, hf_checkpoint)
    shape = read_model_shape(hf_config)
    if config.mtp.enable_mtp_training and not without_weights and not starts_elsewhere(config.checkpoint):
        assert shape.family.head is not None
        check_weights(shape.family.head, shape.num_layers, model)
    if config.training.share_prompts and shape.linear:
        raise UserError(
            f"--share-prompts: {hf_checkpoint} has linear attention, and its state after a prompt can't be shared by"
            " several samples. Leave the flag out."
        )
    if not config.debug.debug_train_only:
        longest = config.rollout.rollout_max_context_len
        own = not config.engines.are_external
        if shape.family.same_as and own and not config.engines.sglang.get("trust_remote_code"):
            raise UserError(
                f"{hf_checkpoint}/config.json has the model_type {shape.family.model_type}, which SGLang reads with"
                " the model's own code. The trainer does not need that code; allow it for engines with"
                " --sglang-trust-remote-code."
            )
        beside = hf_config.get("partial_rotary_factor", 1.0)
        if shape.family.partial_beside and beside != shape.rope.percent:
            raise UserError(
                f"{hf_checkpoint}/config.json has partial_rotary_factor {shape.rope.percent} in rope_parameters, and"
                f" {beside} beside it, which SGLang reads: engines and trainer would be different models. Write"
                f' "partial_rotary_factor": {shape.rope.percent} beside rope_parameters too.'
            )
        linear.check_engines(shape.linear, hf_config, hf_checkpoint)
        check_engines(shape.window, shape.family.windows, longest, hf_checkpoint)
        check_engines_limit(shape.limit, longest, hf_checkpoint)
    algorithm = config.algorithm
    replays = algorithm.use_routing_replay or algorithm.use_rollout_routing_replay
    if replays and shape.experts is None:
        raise UserError(
            f"--use-routing-replay and --use-rollout-routing-replay: {hf_checkpoint} has no experts to route tokens to."
        )
    return model


def _check_prompts(config: Config) -> Config:
    """Look at every prompt file; `--num-epoch` becomes a number of rollouts."""
    from rltrain.data.prompt_file import check_prompt_file
    from rltrain.data.source import Epochs, prompt_files

    data, rollout = config.data, config.rollout
    files = prompt_files(data)
    sizes = [check_prompt_file(path, data.input_key, data.label_key, data.metadata_key) for path, _ in files]
    prompts = len(Epochs(tuple(sizes), tuple(weight for _, weight in files)))
    if (
        files
        and prompts < rollout.rollout_batch_size
        and config.functions.data_source_path == DEFAULT_DATA_SOURCE
    ):
        raise UserError(
            f"{' and '.join(path for path, _ in files)}: an epoch has {prompts} prompts, fewer than"
            f" --rollout-batch-size {rollout.rollout_batch_size}: one batch would hold the same prompt twice."
        )
    for each in config.evaluation.eval_datasets:
        check_prompt_file(each["path"], each["input_key"], each.get("label_key"), each["metadata_key"])
    if rollout.num_rollout is None:
        num_rollout = max(1, (rollout.num_epoch or 0) * prompts // rollout.rollout_batch_size)
        return replace(config, rollout=replace(rollout, num_rollout=num_rollout))
    return config


def _check_functions(config: Config) -> None:
    from rltrain.rewards.rules import asks_for_reward, reward_function_path

    sets = [config.of_eval_set(each) for each in config.evaluation.eval_datasets]
    if (
        config.algorithm.loss_type != "sft_loss"
        and config.functions.rollout_function_path == DEFAULT_ROLLOUT_FUNCTION
    ):
        for each in (config, *sets):
            if asks_for_reward(each):
                reward_function_path(each.functions, each.rewards)
    for each in (config, *sets):
        check_functions(each.functions)


def _check_chat_template(directory: Path) -> None:
    config = directory / "tokenizer_config.json"
    if any(directory.glob("chat_template.*")) or (directory / "additional_chat_templates").is_dir():
        return
    if config.is_file() and read_object(config).get("chat_template"):
        return
    raise UserError(
        f"--apply-chat-template: the tokenizer in {directory} has no chat template. Give a model whose"
        " tokenizer has one, or write prompts as plain text and leave the flag out."
    )
