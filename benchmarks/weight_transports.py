"""Weight transports: bytes per second of a whole push to a real engine, against what the medium does bare.

python benchmarks/weight_transports.py [MILLIONS_OF_PARAMETERS ...]

Sender and receiver have a core each, where there are two, in the baselines too, which move the same bytes once: memcpy
for `tensor`, a gloo broadcast between two processes for `distributed`, and a plain file write with fsync for `disk`.
The most that a receiver with one core can do by `distributed` is that broadcast and, after it, a memcpy into its model.
A push ends when the engine generates again, so it includes pause, load and flush; the ratio is that of the medians.
Then how long an engine with requests under way stands still; and, in bf16, what `--update-weight-mode delta` sends
after one step of AdamW with a learning rate of 1e-6, against everything.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rltrain.arguments.config import Config

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.distributed as dist
from helpers.engine import GivenWeights
from helpers.tiny_model import make_tokenizer

from rltrain.megatron.push import Sender, make_sender
from rltrain.run.http import call
from rltrain.run.role import RoleContext
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.weights.delta import Sent

TOKEN = "benchmark"
ROUNDS = 5
BUCKET_BYTES = 512 * 1024**2  # the default of --update-weight-buffer-size
WIDTHS = {10: (256, 12), 135: (896, 14), 500: (1536, 18)}  # hidden size and layers, by millions of parameters
TRANSPORTS = ("tensor", "distributed", "disk")
IN_FLIGHT = 8
NEW_TOKENS = {
    10: 400,
    135: 60,
    500: 30,
}  # of each request, enough to be under way during a push, by millions of parameters
CORES = sorted(os.sched_getaffinity(0))
SENDER, RECEIVER = 0, 1  # of them


def make_model(directory: Path, width: int, layers: int) -> dict[str, torch.Tensor]:
    """A random Qwen3 in `directory`; returns its weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=512, torch_dtype="float32", eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    make_tokenizer().save_pretrained(directory)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """What this thread starts meanwhile runs on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CORES[number % len(CORES)]})
    yield
    os.sched_setaffinity(0, before)


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


_PEER = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2)
buffer = torch.empty(int(sys.argv[2]), dtype=torch.uint8)
for _ in range(int(sys.argv[3])):
    dist.broadcast(buffer, src=0)
    dist.barrier()
dist.destroy_process_group()
"""


def broadcast_seconds(size: int) -> list[float]:
    """Of a bare gloo broadcast to another process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    url = f"tcp://127.0.0.1:{store.port}"
    with on_core(RECEIVER):
        peer = subprocess.Popen([sys.executable, "-c", _PEER, url, str(size), str(ROUNDS + 1)])
    dist.init_process_group("gloo", store=dist.PrefixStore("default_pg", store), rank=0, world_size=2)
    buffer = torch.zeros(size, dtype=torch.uint8)

    def once() -> None:
        dist.broadcast(buffer, src=0)
        dist.barrier()

    times = [seconds(once) for _ in range(ROUNDS + 1)]
    peer.wait()
    dist.destroy_process_group()
    return times


def bare_seconds(size: int, directory: Path) -> dict[str, list[float]]:
    """Of each medium, moving `size` bytes."""
    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    data = memoryview(source.numpy())

    def write() -> None:
        with (directory / "bare").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return {
        "tensor": [seconds(lambda: target.copy_(source)) for _ in range(ROUNDS + 1)],
        "distributed": broadcast_seconds(size),
        "disk": [seconds(write) for _ in range(ROUNDS + 1)],
    }


def measure(millions: int, root: Path) -> None:
    """One model size, all transports."""
    weights = make_model(root / "model", *WIDTHS[millions])
    size = sum(tensor.nbytes for tensor in weights.values())
    bare = bare_seconds(size, root)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    context = RoleContext(root, 0, "trainer", 0, "http://127.0.0.1:9", TOKEN)
    server_args = {
        "model_path": str(root / "model"),
        "log_level": "error",
        "max_total_tokens": 8192,
        "mem_fraction_static": 0.3,
    }
    with on_core(RECEIVER):
        launched = HttpServerEngineAdapter.launch(server_args, TOKEN)
    with launched as engine:
        for name in TRANSPORTS:
            args = Config().replace(
                update_weight_mode="full", update_weight_buffer_size=BUCKET_BYTES, distributed_backend="gloo"
            )
            sender = make_sender(name, args, context)

            def push(version: int, sender: Sender = sender) -> None:
                given = GivenWeights(weights.items, root / "model")
                failures = sender.send(version, given, lambda: [engine])  # type: ignore[list-item]
                assert not failures, failures

            times = [seconds(lambda: push(1)) for _ in range(ROUNDS + 1)][1:]
            ours, baseline = statistics.median(times), statistics.median(bare[name][1:])
            print(
                f"{name} {size / 4e6:.0f} M parameters: {baseline / ours:.2f} of bare;"
                f" {size / ours / 1e9:.2f} GB/s ({size / max(times) / 1e9:.2f} to {size / min(times) / 1e9:.2f}),"
                f" bare {size / baseline / 1e9:.2f} GB/s; a push {1000 * ours:.0f} ms,"
                f" in flight {1000 * in_flight(engine, push, NEW_TOKENS[millions]):.0f} ms",
                flush=True,
            )
            if name == "distributed":  # a receiver with one core copies what it has received into its model
                least = baseline + statistics.median(bare["tensor"][1:])
                print(f"distributed: {least / ours:.2f} of a bare broadcast and a memcpy in turn", flush=True)
        measure_delta(weights, context, engine)
    dist.destroy_process_group()


def measure_delta(
    weights: dict[str, torch.Tensor], context: RoleContext, engine: HttpServerEngineAdapter
) -> None:
    """Changes after a step, against everything, in bf16."""
    before = {name: tensor.bfloat16() for name, tensor in weights.items()}
    after = {name: tensor.bfloat16() for name, tensor in stepped(weights).items()}
    sent = Sent()
    everything = sum(part.data.nbytes for part in sent.whole(before.items()))
    few = sum(part.data.nbytes for part in sent.changes(after.items()))
    for name in ("distributed", "disk"):
        times = {}
        for mode in ("full", "delta"):
            args = Config().replace(
                update_weight_mode=mode, update_weight_buffer_size=BUCKET_BYTES, distributed_backend="gloo"
            )
            sender = make_sender(name, args, context)
            rounds = []
            for version in range(ROUNDS + 2):
                given = GivenWeights((after if version % 2 else before).items, context.run_dir / "model")
                rounds.append(seconds(lambda: sender.send(version, given, lambda: [engine])))  # type: ignore[arg-type,list-item,return-value]  # noqa: B023
            times[mode] = statistics.median(rounds[2:])
        print(
            f"delta by {name}, {everything / 2e6:.0f} M parameters in bf16: {few / everything:.3f} of the bytes,"
            f" {times['delta'] / times['full']:.2f} of the time ({1000 * times['delta']:.0f} ms)",
            flush=True,
        )


def stepped(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """After one step of AdamW, whatever the gradients: its first has the length of the learning rate."""
    torch.manual_seed(1)
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters.values(), lr=1e-6, weight_decay=0.0).step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def in_flight(engine: HttpServerEngineAdapter, push: Callable[[int], None], new_tokens: int) -> float:
    """Seconds of a push while requests run, which go on after it."""
    body = {
        "input_ids": [4, 5, 6],
        "sampling_params": {"max_new_tokens": new_tokens, "ignore_eos": True},
    }
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = [
            pool.submit(call, "POST", f"{engine.url}/generate", TOKEN, body, 300) for _ in range(IN_FLIGHT)
        ]
        while True:
            loads = call("GET", f"{engine.url}/v1/loads", TOKEN)["loads"]
            if sum(load["num_running_reqs"] for load in loads) == IN_FLIGHT:
                break
        result = seconds(lambda: push(2))
        for answer in answers:
            meta = answer.result()["meta_info"]
            assert meta["completion_tokens"] == new_tokens, "an update lost tokens"
    return result


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    for millions in [int(word) for word in sys.argv[1:]] or [10]:
        with tempfile.TemporaryDirectory() as directory, on_core(SENDER):
            measure(millions, Path(directory))


if __name__ == "__main__":
    main()
