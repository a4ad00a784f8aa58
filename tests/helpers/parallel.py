"""How `pytest -n N` shares out the tests: a plugin.

Files that need the same slow thing (an engine, a Slurm cluster) run one after the other in one process, and the longest
begin first. Half of the tests wait, for Slurm or for a supervisor, so there may be more processes than cores. A file
that is not named here is a group of its own, and comes after those, the ones without a slow test last: so that at the
end no process has minutes to go while the others have nothing to do.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path, PurePath

import pytest
from xdist.remote import Producer
from xdist.scheduler import EachScheduling, LoadScopeScheduling

# The longest first, of those that wait and those that compute in turn, so that two of four processes compute from the
# beginning. Each may hold engines or ranks of its own (2 to 5 GB), and each process has one at a time. Ranks are forked
# from a process that has imported Megatron-core (helpers/rank.py): two have one, and not all four.
GROUPS = (
    ("test_slurm_job",),  # a cluster; they wait
    ("test_end_to_end",),
    ("test_slurm_real", "test_slurm_sandbox", "test_slurm_cli_verbs", "test_slurm_executor",
     "test_slurm_template", "test_analysis_slurm"),  # another cluster
    ("test_megatron_layouts", "test_megatron_parallel", "test_megatron_reshard", "test_megatron_policies",
     "test_megatron_vocab_padding", "test_mtp", "test_megatron_distributed", "test_megatron_rank_death"),  # ranks
    ("test_config_sweep",),
    ("test_families", "test_weights_of_ranks", "test_megatron_ppo_layouts", "test_lora", "test_routing_replay",
     "test_megatron_shared_prompts", "test_gpu_trainer"),  # more of them
    ("test_slurm_cli", "test_slurm_container", "test_hpc_recorded_run"),  # a third one
    ("test_examples",),
    ("test_example_ppo",),
    ("test_fleet_faults",),
    ("test_sglang_engine", "test_weights_in_flight", "test_fleet_external", "test_rollout_partial",
     "test_tools_replay"),  # `engine`
    ("test_slurm_chaos",),  # a fourth one; it waits, too
    ("test_submit_local",),
    ("test_analysis_live", "test_analysis_report"),
    ("test_rollout_roles",),
    ("test_example_smollm2",),
    ("test_example_asynchronous",),
    ("test_slime_examples",),
    ("test_example_coding_agent",),
    ("test_gateway_engine", "test_gateway_clients", "test_gateway_bad_input",
     "test_gateway_fields", "test_ipv6"),  # they import SGLang
    ("test_light_install",),
    ("test_routed_experts",),
    ("test_megatron_ppo",),
    ("test_environments",),
    ("test_megatron_algorithms",),
    ("test_agent_rollout",),
    ("test_tracking",),
    ("test_gpu_engines",),
    ("test_gpu_machine",),
    ("test_threads",),
    ("test_analysis_notebook",),
    ("test_megatron_train",),
    ("test_sglang_experts",),
    ("test_sandbox",),
    ("test_hpc_cancel",),
    ("test_hpc_resubmit",),
    ("test_gateway_newest",),
    ("test_rewards_pool",),
)  # fmt: skip
_ORDER = {name: index for index, group in enumerate(GROUPS) for name in group}

# Where only quick tests run, every process imports what its own share of the files needs, and no more: importing torch,
# SGLang and megatron-core, or what draws, takes longer than most of these tests. Folders, and files of other folders;
# the first two compute for the same time, and two processors have room for the third, which waits.
QUICK_SHARES = (
    ("agents", "algorithms", "data", "engines", "gpu", "model", "rollout", "training", "weights",
     "test_arguments_fleet", "test_demo_task", "test_doctor_command", "test_functions", "test_hpc_doctor",
     "test_hpc_doctor_memory", "test_hpc_recorded_run", "test_tracking", "test_train_stop"),
    ("analysis", "arguments", "checkpoint", "commands", "examples", "hpc", "pages", "run", "slurm"),
    ("test_agent_rollout", "test_agent_sessions", "test_lifeline", "test_rewards_hub", "test_sandbox"),  # they wait
)  # fmt: skip
_QUICK_SHARE = {name: index for index, share in enumerate(QUICK_SHARES) for name in share}


_OF_MODULE = re.compile(r"^pytestmark = .*", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of which `-m` would leave out every test are not imported: that takes longer than many quick tests."""
    wanted = config.option.markexpr
    if not collection_path.match("test_*.py") or not re.fullmatch(r"(not )?\w+( and (not )?\w+)*", wanted):
        return None
    text = collection_path.read_text()
    of_module = {name for line in _OF_MODULE.findall(text) for name in re.findall(r"mark\.(\w+)", line)}
    words = wanted.split(" and ")
    unwanted = {word.removeprefix("not ") for word in words if word.startswith("not ")}
    # Other marks than this one come from helpers, too, as `needs_gpu` does.
    no_slow_ones = "slow" in words and "mark.slow" not in text
    others = _only_quick(config) and not _is_ours(collection_path, config)
    return True if others or no_slow_ones or unwanted & of_module else None


def pytest_collection(session: pytest.Session) -> None:
    """Until all is collected nothing is garbage: looking for it takes a fifth of the time."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What has been imported stays, so that no later search needs to look at it."""
    gc.freeze()
    gc.enable()


def _only_quick(config: pytest.Config) -> bool:
    return "not slow" in config.option.markexpr


def _is_ours(file: PurePath, config: pytest.Config) -> bool:
    """Whether this process runs the quick tests of a file: where there is one process, it runs all."""
    if (ours := getattr(config, "workerinput", None)) is None:
        return True
    share = _QUICK_SHARE.get(file.stem, _QUICK_SHARE.get(file.parent.name, 0))
    return share % ours["workercount"] == int(ours["workerid"].removeprefix("gw"))


class ByGroup(LoadScopeScheduling):
    """A process that is free takes the next group, in the order in which the tests were collected."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePath(nodeid.partition("::")[0])
        index = _ORDER.get(file.stem)
        return str(file) if index is None else GROUPS[index][0]


class ByShare(EachScheduling):
    """Every process runs what it has collected, which is its share."""

    def schedule(self) -> None:
        session = self.config.pluginmanager.get_plugin("session")
        assert session is not None
        session.testscollected = sum(map(len, self.node2collection.values()))  # xdist knows of one process's
        super().schedule()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every group together, the longest first."""
    if _only_quick(config):
        items[:] = [
            item for item in items if _is_ours(item.path, config)
        ]  # files that were named are not ignored
        return
    slow = {
        item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("slurm")
    }
    items.sort(key=lambda item: _ORDER.get(item.path.stem, len(GROUPS) + (item.path not in slow)))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A process in another's place would have another share."""
    if _only_quick(config) and config.pluginmanager.has_plugin("xdist"):
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGroup | ByShare:
    """Called with `-n` only."""
    if _only_quick(config):
        return ByShare(config, log)
    config.option.loadscopereorder = False
    return ByGroup(config, log)
