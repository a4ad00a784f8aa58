"""Divide the nodes of a Slurm job among trainer and engines: a pure function of the request.

The cluster flags have slime's meaning. Missing ones follow from the others: of `--nodes N` half train and half
generate; one node, or `--colocate`, does both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rltrain.arguments.flags import Flags
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class ClusterFlags:
    """The training flags that say which nodes a job needs, as they were given; None where one was not.

    Attributes:
        rollout_num_gpus: 0 if the job has no engines of its own.
        has_external_engines: whether any are named.
        hf_checkpoint: "" where it was not given.
    """

    actor_num_nodes: int | None
    actor_num_gpus_per_node: int | None
    num_gpus_per_node: int | None
    rollout_num_gpus: int | None
    rollout_num_gpus_per_engine: int | None
    colocate: bool
    debug_rollout_only: bool
    debug_train_only: bool
    load_debug_rollout_data: bool
    has_external_engines: bool
    sglang_config: str | None
    hf_checkpoint: str

    @property
    def has_engines(self) -> bool:
        """False if the job starts none."""
        if self.rollout_num_gpus is None and self.has_external_engines:
            return False
        return not (self.debug_train_only or self.load_debug_rollout_data or self.rollout_num_gpus == 0)


def read_cluster_flags(flags: Flags) -> ClusterFlags:
    """From all flags of training.

    Raises:
        UserError: a value is not a number, or too small.
    """
    given = {name: values for name, values in flags.items() if values is not None}
    return ClusterFlags(
        actor_num_nodes=_number(flags, "actor-num-nodes"),
        actor_num_gpus_per_node=_number(flags, "actor-num-gpus-per-node"),
        num_gpus_per_node=_number(flags, "num-gpus-per-node", at_least=0),
        rollout_num_gpus=_number(flags, "rollout-num-gpus", at_least=0),
        rollout_num_gpus_per_engine=_number(flags, "rollout-num-gpus-per-engine"),
        colocate="colocate" in given,
        debug_rollout_only="debug-rollout-only" in given,
        debug_train_only="debug-train-only" in given,
        load_debug_rollout_data="load-debug-rollout-data" in given,
        has_external_engines=any(
            f"rollout-external-{kind}" in given for kind in ("engine-addrs", "engines-file")
        ),
        sglang_config=next(iter(given.get("sglang-config", [])), None),
        hf_checkpoint=next(iter(given.get("hf-checkpoint", [])), ""),
    )


@dataclass(frozen=True)
class Ask:
    """The part of a request that decides how nodes are divided; None where nothing was asked for.

    Attributes:
        engine_size: GPUs of one engine.
        has_engines: False if the job only trains.
    """

    nodes: int | None
    placement: str | None
    colocate: bool
    actor_nodes: int | None
    actor_gpus: int | None
    rollout_gpus: int | None
    engine_size: int
    has_engines: bool


def make_ask(given: ClusterFlags, nodes: int | None, placement: str | None) -> Ask:
    """The ask from training flags; `nodes` and `placement` are flags of `submit`."""
    return Ask(
        nodes=nodes,
        placement=placement,
        # Without a trainer the engines have every node, as if they shared all with it.
        colocate=given.colocate or given.debug_rollout_only,
        actor_nodes=given.actor_num_nodes,
        actor_gpus=given.actor_num_gpus_per_node,
        rollout_gpus=given.rollout_num_gpus if given.has_engines else None,
        engine_size=given.rollout_num_gpus_per_engine or 1,
        has_engines=given.has_engines,
    )


@dataclass(frozen=True)
class Split:
    """The division of the nodes. On nodes without GPUs a "GPU" is a process.

    Attributes:
        layout: `het` (component 0 trains, component 1 generates), `plain` (the first nodes train), or `colocated`.
        trainer_gpus: ranks on each trainer node.
        rollout_nodes: nodes with engines, also if they are the trainer's.
        rollout_gpus: GPUs for engines on each of them.
        rollout_num_gpus: for engines in all.
        engines_per_node: the last node may have fewer; 1 if an engine spans nodes.
        nodes_per_engine: more than 1 if a node has not enough GPUs for an engine.
        first_rollout_gpu: where the engines' GPUs begin, on nodes that they share with the trainer.
    """

    layout: str
    trainer_nodes: int
    trainer_gpus: int
    rollout_nodes: int = 0
    rollout_gpus: int = 0
    rollout_num_gpus: int = 0
    engines_per_node: int = 0
    first_rollout_gpu: int = 0
    nodes_per_engine: int = 1

    @property
    def first_rollout_node(self) -> int:
        """Position of the engines' first node in a job of one component."""
        return self.trainer_nodes if self.layout == "plain" and self.rollout_nodes else 0

    @property
    def nodes(self) -> int:
        """Nodes in all."""
        return self.trainer_nodes + (0 if self.layout == "colocated" else self.rollout_nodes)

    def flags(self) -> Flags:
        """The split as training flags."""
        flags: Flags = {
            "actor-num-nodes": [str(self.trainer_nodes)],
            "actor-num-gpus-per-node": [str(self.trainer_gpus)],
        }
        if self.rollout_nodes:
            flags["rollout-num-gpus"] = [str(self.rollout_num_gpus)]
        return flags

    def explain(self) -> str:
        """One line for people."""
        ranks = f"{self.trainer_gpus} rank{'s' * (self.trainer_gpus > 1)} each"
        if not self.rollout_nodes:
            return f"{_nodes(self.nodes)}, all for training, {ranks}; the run needs no engines"
        engines = f"{self.engines_per_node} engine{'s' * (self.engines_per_node > 1)} each"
        if self.nodes_per_engine > 1:
            engines = f"an engine on every {self.nodes_per_engine}"
        if self.layout == "colocated":
            return f"{_nodes(self.nodes)}, each for training ({ranks}) and rollout ({engines})"
        return (
            f"{_nodes(self.nodes)}: {self.trainer_nodes} for training ({ranks}), {self.rollout_nodes} for rollout"
            f" ({engines}). --actor-num-nodes, --rollout-num-gpus and --colocate change that"
        )


def split_nodes(ask: Ask, trainer_gpus: int, rollout_gpus: int) -> Split:
    """Share out the nodes.

    Args:
        ask: what was asked for.
        trainer_gpus: GPUs of a node for trainers, 0 for none.
        rollout_gpus: the same for engines.

    Raises:
        UserError: the request can't be met; the message says why, and the nearest that can.
    """
    ranks = ask.actor_gpus or trainer_gpus or 1
    _check_gpus("--actor-num-gpus-per-node", ranks, trainer_gpus)
    if not ask.has_engines:
        return Split("plain", _agree(ask.nodes, ask.actor_nodes, "--actor-num-nodes") or 1, ranks)
    if _is_colocated(ask, trainer_gpus):
        return _colocated(ask, ranks, trainer_gpus)
    return _separate(ask, ranks, rollout_gpus)


def _is_colocated(ask: Ask, node_gpus: int) -> bool:
    if ask.placement:
        if ask.colocate and ask.placement != "colocated":
            raise UserError(f"--colocate contradicts --placement {ask.placement}: leave one of them out.")
        return ask.placement == "colocated"
    if ask.colocate or ask.nodes is not None:
        return ask.colocate or ask.nodes == 1
    fits = not node_gpus or (ask.actor_gpus or 0) + (ask.rollout_gpus or 0) <= node_gpus
    return fits and (ask.actor_nodes or 1) == 1


def _colocated(ask: Ask, ranks: int, node_gpus: int) -> Split:
    nodes = _agree(ask.nodes, ask.actor_nodes, "--actor-num-nodes") or 1
    # Without --colocate the engines get GPUs of their own where the node has enough for both.
    apart = not ask.colocate and ask.actor_gpus is not None and node_gpus - ranks >= ask.engine_size
    available = node_gpus - ranks if apart else ranks
    if not node_gpus:  # processes: as many as are wanted
        available = max(ranks, ask.engine_size, math.ceil((ask.rollout_gpus or 0) / nodes))
    fit = _fit(ask.engine_size, available)
    if nodes < fit.nodes:
        raise UserError(
            f"--rollout-num-gpus-per-engine {ask.engine_size} takes {_nodes(fit.nodes)}, because each node has"
            f" {available} GPUs for engines: --nodes {fit.nodes}, or at most --rollout-num-gpus-per-engine"
            f" {nodes * available}."
        )
    room = nodes // fit.nodes * fit.engines
    wanted = ask.rollout_gpus or room * ask.engine_size
    engines = _count_engines(wanted, ask.engine_size)
    if engines > room:
        raise UserError(
            f"--rollout-num-gpus {wanted} on {_nodes(nodes)} is more than the {available} GPUs that each has for"
            f" engines. At most --rollout-num-gpus {room * ask.engine_size}."
        )
    return _with_engines(Split("colocated", nodes, ranks, first_rollout_gpu=ranks if apart else 0), ask, engines,
                         nodes, fit)  # fmt: skip


def _separate(ask: Ask, ranks: int, node_gpus: int) -> Split:
    available = node_gpus or ask.engine_size
    if ask.rollout_gpus and not node_gpus:  # processes: as many on a node as it takes
        available = max(available, math.ceil(ask.rollout_gpus / max(1, (ask.nodes or 2) // 2)))
    fit = _fit(ask.engine_size, available)
    if ask.rollout_gpus:
        engines = _count_engines(ask.rollout_gpus, ask.engine_size)
        rollout = math.ceil(engines / fit.engines) * fit.nodes
        trainer = ask.actor_nodes or (ask.nodes - rollout if ask.nodes else 1)
    else:
        trainer, rollout = _halves(ask, fit.nodes)
        engines = rollout // fit.nodes * fit.engines
    _check_sum(ask, trainer, rollout)
    return _with_engines(Split(ask.placement or "het", trainer, ranks), ask, engines, rollout, fit)


@dataclass(frozen=True)
class _Fit:
    """Engines per node, and nodes per engine; one of the two is 1."""

    engines: int
    nodes: int


def _fit(size: int, available: int) -> _Fit:
    """An engine larger than a node takes the fewest nodes on which it has equally many GPUs."""
    if size <= available:
        return _Fit(available // size, 1)
    return _Fit(1, next(n for n in range(2, size + 1) if size % n == 0 and size // n <= available))


def _with_engines(split: Split, ask: Ask, engines: int, nodes: int, fit: _Fit) -> Split:
    """The split with engines shared out evenly among `nodes`."""
    per_node = math.ceil(engines / nodes) if fit.nodes == 1 else 1
    return replace(
        split,
        rollout_nodes=math.ceil(engines / per_node) if fit.nodes == 1 else engines * fit.nodes,
        rollout_gpus=per_node * ask.engine_size // fit.nodes,
        rollout_num_gpus=engines * ask.engine_size,
        engines_per_node=per_node,
        nodes_per_engine=fit.nodes,
    )


def _halves(ask: Ask, nodes_per_engine: int) -> tuple[int, int]:
    """Nodes for the trainer and for whole engines, if no flag gives the number of the engines' GPUs."""
    half = ask.actor_nodes or max(1, (ask.nodes or 2) // 2)
    rest = ask.nodes - half if ask.nodes else half
    rollout = max(1, rest // nodes_per_engine) * nodes_per_engine
    return ask.actor_nodes or (ask.nodes - rollout if ask.nodes else half), rollout


def _check_sum(ask: Ask, trainer: int, rollout: int) -> None:
    if trainer >= 1 and rollout >= 1 and ask.nodes in (None, trainer + rollout):
        return
    parts = [f"--actor-num-nodes {ask.actor_nodes}"] if ask.actor_nodes else []
    parts += (
        [f"--rollout-num-gpus {ask.rollout_gpus}, which is {_nodes(rollout)},"] if ask.rollout_gpus else []
    )
    if not ask.rollout_gpus and ask.engine_size > 1:
        parts += [f"--rollout-num-gpus-per-engine {ask.engine_size}, which takes {_nodes(rollout)},"]
    nearest = max(trainer, 1) + max(rollout, 1)
    raise UserError(
        f"--nodes {ask.nodes} contradicts {' and '.join(parts)} because trainer and engines need nodes of their own:"
        f" give --nodes {nearest}, or --colocate to share the nodes."
    )


def _count_engines(gpus: int, size: int) -> int:
    if gpus % size:
        below = gpus // size * size
        raise UserError(
            f"--rollout-num-gpus {gpus} is not a multiple of --rollout-num-gpus-per-engine {size}: {below or size}"
            f" or {below + size} would be."
        )
    return gpus // size


def _check_gpus(flag: str, wanted: int, available: int) -> None:
    if available and wanted > available:
        raise UserError(f"{flag} {wanted}: no node there has more than {available} GPUs.")


def _agree(nodes: int | None, other: int | None, flag: str) -> int | None:
    if nodes and other and nodes != other:
        raise UserError(
            f"--nodes {nodes} contradicts {flag} {other}, because every node trains. Give one of them: --nodes {other}."
        )
    return nodes or other


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"


def _number(flags: Flags, name: str, at_least: int = 1) -> int | None:
    values = flags.get(name)
    if values is None:
        return None
    try:
        number = int(*values)
    except (ValueError, TypeError):
        raise UserError(f"--{name} {' '.join(values)}: a whole number is needed.") from None
    if number < at_least:
        raise UserError(f"--{name} is {number}: it must be at least {at_least}.")
    return number
