"""A push of weights by 1 to 4096 trainer ranks to as many machines of engines, over a simulated network.

`python benchmarks/cluster/weight_push.py`

The ranks' shares of an 8 B model in bf16, the order of sends and the messages to engines are made by the code of a push
(`rltrain.megatron.model.export`, `rltrain.weights`), on tensors without memory. A trainer machine has 8 ranks that hold
a replica, and its first sends; an engine is a machine with 8 ranks; there are as many of both, and each has a link of
50 GB/s, on which it does one thing after the other, as with NCCL. Against what sending every byte to every engine takes
if all links are always busy; and what the messages take of trainer rank 0, which sends all of them.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from scale import RANKS, judge, timed

from rltrain.arguments.hf_config import ModelShape, read_model_shape
from rltrain.megatron.model import export
from rltrain.megatron.model.load import LocalParameter
from rltrain.megatron.model.names import parameter
from rltrain.weights.buckets import Bucket, Part, lay_out, message, taken, to_json
from rltrain.weights.rounds import in_order
from rltrain.weights.sources import Group as Source
from rltrain.weights.sources import describe

ON_MACHINE, LINK = 8, 50e9  # ranks; bytes a second
BUCKET = 512 * 1024**2


@dataclass(frozen=True)
class Group:
    """Stands in for a process group."""

    number: int
    count: int

    def rank(self) -> int:
        """This rank's place."""
        return self.number

    def size(self) -> int:
        """Of the group."""
        return self.count


class Cluster:
    """Stands in for torch.distributed and megatron-core's groups: the ranks of a trainer, of which one is looked at."""

    def __init__(self, ranks: int) -> None:
        """Data parallel machines."""
        self.ranks, self.tensor_parallel, self.rank = ranks, min(ranks, ON_MACHINE), 0
        self.said: dict[int, Any] = {}
        self.listens = True

    def get_tensor_model_parallel_group(self) -> Group:
        """The ranks of a machine."""
        return Group(self.rank % self.tensor_parallel, self.tensor_parallel)

    def get_data_parallel_rank(self, **_: Any) -> int:
        """Number of the machine."""
        return self.rank // self.tensor_parallel

    def get_pipeline_model_parallel_rank(self) -> int:
        """There is one stage."""
        return 0

    def get_world_size(self) -> int:
        """All ranks."""
        return self.ranks

    def all_gather_object(self, everyone: list[Any], own: Any, **_: Any) -> None:
        """What all ranks have said; while it `listens`, only to this one."""
        self.said[self.rank] = own
        if self.listens:
            raise StopIteration
        everyone[:] = [self.said[rank] for rank in range(self.ranks)]

    def all_gather_into_tensor(self, *_: Any, **__: Any) -> None:
        """Nothing: the tensors have no memory."""


def shares_of(ranks: int) -> Iterator[list[list[Part]]]:
    """Of each machine's first rank, round by round, what it sends, by `rltrain.megatron.model.export`."""
    cluster = Cluster(ranks)
    shape, parameters = model(cluster.tensor_parallel)
    senders = range(0, ranks, cluster.tensor_parallel)

    def share() -> Iterator[list[Part]]:
        for windows in export.export_even_share([], shape, BUCKET, senders):
            found = [Part.cut(*each, window) for window, named in windows for each in named]
            yield [part for part in found if part is not None]

    with (
        patch.object(export, "dist", cluster),
        patch.object(export, "parallel_state", cluster),
        patch.object(export, "control_group", lambda: None),
        patch.object(export, "local_parameters", lambda *_: iter(parameters)),
    ):
        for cluster.rank in range(ranks):
            try:
                next(share(), None)
            except RuntimeError:  # it is a generator's StopIteration
                continue
        cluster.listens = False
        for cluster.rank in senders:
            yield list(share())


def model(split: int) -> tuple[ModelShape, list[LocalParameter]]:
    """An 8 B Qwen3, and a rank's part of it, split over so many, without memory."""
    hidden, mlp, layers, vocabulary = 4096, 12288, 36, 151936
    shape = read_model_shape(
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": layers,
            "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": vocabulary,
        }
    )  # fmt: skip
    sizes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocabulary // split, hidden)}
    for layer in range(layers):
        place = f"decoder.layers.{layer}"
        sizes |= {
            f"{place}.self_attention.linear_qkv.layer_norm_weight": (hidden,),
            f"{place}.self_attention.linear_qkv.weight": (48 * 128 // split, hidden),
            f"{place}.self_attention.q_layernorm.weight": (128,),
            f"{place}.self_attention.k_layernorm.weight": (128,),
            f"{place}.self_attention.linear_proj.weight": (hidden, hidden // split),
            f"{place}.mlp.linear_fc1.layer_norm_weight": (hidden,),
            f"{place}.mlp.linear_fc1.weight": (2 * mlp // split, hidden),
            f"{place}.mlp.linear_fc2.weight": (hidden, mlp // split),
        }
    sizes |= {
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocabulary // split, hidden),
    }
    return shape, [
        LocalParameter(
            torch.empty(size, dtype=torch.bfloat16, device="meta"), parameter(name, shape.family), False
        )
        for name, size in sizes.items()
    ]


def round_seconds(sent: list[float], engines: int) -> float:
    """Of a round in which each sender has so many bytes for every engine, and both do one thing after the other."""
    sizes = [each for each in sent if each]
    places = {str(e): e for e in range(engines)}
    sends = [[int(url) for url in in_order(places, s, len(sizes))] for s in range(len(sizes))]
    takes = [taken(e, len(sizes)) for e in range(engines)]
    next_send, next_take = [0] * len(sizes), [0] * engines
    sender_free, engine_free = [0.0] * len(sizes), [0.0] * engines
    waiting = list(range(len(sizes)))
    while waiting:
        s = waiting.pop()
        while next_send[s] < engines:
            e = sends[s][next_send[s]]
            if takes[e][next_take[e]] != s:
                break
            end = max(sender_free[s], engine_free[e]) + sizes[s] / LINK
            sender_free[s] = engine_free[e] = end
            next_send[s], next_take[e] = next_send[s] + 1, next_take[e] + 1
            if next_take[e] < len(sizes):
                waiting.append(takes[e][next_take[e]])
    assert all(done == engines for done in next_send)
    return max(engine_free)


def message_seconds(rounds: list[list[str]], engines: int) -> float:
    """Processor seconds of rank 0 to tell all ranks of all engines of the buckets of each round."""
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL):
        theirs.close()

        def tell() -> None:
            for buckets in rounds:
                text = ", ".join(buckets)
                for place in range(engines):
                    data = message(text, place).encode()
                    for _ in range(ON_MACHINE):
                        ours.sendall(data)

        seconds, _ = timed(tell)
        ours.shutdown(socket.SHUT_WR)
    return seconds


def main() -> None:
    """Shares, order and messages of a push, and what it takes on the network."""
    planning, simulated, messages = {}, {}, {}
    for ranks in RANKS:
        machines = max(1, ranks // ON_MACHINE)
        begun = time.process_time()
        shares = list(shares_of(ranks))
        planning[ranks] = (time.process_time() - begun) / machines
        rounds = [
            [sum(part.data.nbytes for part in parts) for parts in each]
            for each in itertools.zip_longest(*shares, fillvalue=[])
        ]
        total = sum(map(sum, rounds))
        ideal = total / LINK  # of an engine; as many machines send as many times the share of one
        simulated[ranks] = sum(round_seconds(sent, machines) for sent in rounds)
        source = describe(Source("10.0.0.1", 12345, "weights-0123456789abcdef", "nccl", 4095, [(0, 10**8)]))
        texts = [
            [
                to_json(Bucket(pieces, [2**31] * len(pieces)), source)
                for parts in each
                if parts and (pieces := lay_out(parts))
            ]
            for each in itertools.zip_longest(*shares, fillvalue=[])
        ]
        messages[ranks] = message_seconds(texts, machines)
        print(f"weights, {ranks:4} ranks on {machines:3} machines to {machines:3} engines, {len(rounds):2} rounds:"
              f" {planning[ranks] * 1e3:.0f} ms of planning a machine; simulated {simulated[ranks]:.2f} s,"
              f" {simulated[ranks] / ideal:.2f} × the ideal; messages are {messages[ranks] * 1e3:.1f} ms")  # fmt: skip
    judge("planning of a machine", "ranks", planning)
    judge("time on the network", "ranks", simulated, ideal=0)
    judge("messages of rank 0", "ranks", messages)


if __name__ == "__main__":
    main()
