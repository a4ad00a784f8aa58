"""The process of one SGLang server: `python -m rltrain.sglang.server`, `ServerArgs` as JSON on stdin.

Started by `rltrain.sglang.adapter`. The arguments come over stdin because the API key is one of them and a
command line can be read by everybody on the machine. With a GPU this is SGLang's stock server; without one
it is the same server with the defaults that make it small and quick on a CPU.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import logging
import multiprocessing
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

if __name__ == "__main__":
    gc.disable()  # what is imported stays, torch to begin with, see `run_cpu_server`

from rltrain.run.http import HttpError, call
from rltrain.run.processes import family_of
from rltrain.sglang import cpu, own_model

# Without the two memory limits the scheduler takes all the memory there is; "auto" would turn fp32 weights
# into fp16; an idle scheduler that polls would take a core from the trainer.
CPU_DEFAULTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    # Room for other processes that start meanwhile and take memory; the number of tokens below is the limit.
    "mem_fraction_static": 0.3,
    "max_total_tokens": 65536,
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,
}
# A prompt of several requests that come together is computed once: what shares most with the cache goes first, and
# a batch is so small that others with a prompt in it come after it.
PROMPTS_ONCE: dict[str, Any] = {"schedule_policy": "lpm", "chunked_prefill_size": 512}
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # `cpu_threads` says where there are more
    "TORCHDYNAMO_DISABLE": "1",  # compiled code would be built for minutes
}
_WARM_UP_SECONDS = 600.0
_LOOK_AGAIN_SECONDS = 0.02
_SECRET = re.compile(r"""(api_key['"]?\s*[=:]\s*)(['"])[^'"]+\2""")


def main() -> None:
    """Read the arguments, start the server, and serve until told to stop."""
    server_args = json.load(sys.stdin)
    threads = server_args.pop("cpu_threads", None)
    # Asked to generate, an engine without its memory would fail, and a paused one be taken for dead by the router:
    # whether it makes progress is asked in another way (`rltrain/sglang/health.py`).
    os.environ.setdefault("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "0")
    os.environ.update(allocator_settings(os.environ, uses_memory_saver="enable_memory_saver" in server_args))
    os.environ.update(own_model.settings(os.environ, server_args))
    if cpu.has_accelerator():
        gc.enable()
        run_server(server_args)
    else:
        run_cpu_server({**cpu_defaults(server_args), **server_args}, threads)


def cpu_defaults(server_args: Mapping[str, Any]) -> dict[str, Any]:
    """What holds on a CPU where `server_args` say nothing else."""
    # Where a prompt is cut depends on what else is asked then; priorities are an order of their own.
    others = (
        "enable_deterministic_inference",
        "disable_radix_cache",
        "enable_priority_scheduling",
        "enable_pdmux",
    )
    fits = PROMPTS_ONCE["chunked_prefill_size"] % int(server_args.get("page_size") or 1) == 0
    shares = fits and not any(server_args.get(name) for name in others)
    return {**CPU_DEFAULTS, **(PROMPTS_ONCE if shares else {})}


def allocator_settings(env: Mapping[str, str], *, uses_memory_saver: bool) -> dict[str, str]:
    """torch's settings of its allocator, without what SGLang's memory saver refuses: expandable segments.

    One environment serves all roles, and to the trainer they are of use.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if uses_memory_saver else ()
    kept = {}
    for name in names:
        if "expandable_segments" in env.get(name, ""):
            parts = env[name].split(",")
            kept[name] = ",".join(
                part for part in parts if part.split(":")[0].strip() != "expandable_segments"
            )
    return kept


def run_cpu_server(server_args: dict[str, Any], threads: int | None = None) -> None:
    """Serve on the CPU: with stand-ins for missing GPU packages, and forked rather than spawned children.

    SGLang's three processes spend nearly all of their start-up importing the same modules. Imported once,
    before any thread exists, and then forked, they are up in a third of the time and share the memory. What is imported
    stays, so that looking for garbage in it, a fifth of the time, is left out, and would later give each its own copy.
    """
    gc.disable()
    server_args.pop("enable_memory_saver", None)  # there is no memory of a GPU to give back
    set_cpu_environment(server_args, threads)
    cpu.install()
    # SGLang's dumper imports it where it is installed, for tensors of a trainer: a fourth of this process's start.
    sys.modules.setdefault("megatron", None)  # type: ignore[arg-type]
    if server_args.get("enable_deterministic_inference"):
        from rltrain.sglang.cpu import allow_deterministic_sampling

        allow_deterministic_sampling()
    else:
        from rltrain.sglang.attention import use_batched_decoding

        use_batched_decoding()
    if server_args.get("enable_return_routed_experts"):
        cpu.allow_returned_routes()
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401
    from sglang.srt.entrypoints import engine, http_server

    cpu.sleep_while_paused()
    engine.mp = _ForkContext()
    if server_args.get("disaggregation_mode", "null") == "null":
        http_server.launch_server = functools.partial(http_server.launch_server, execute_warmup_func=warm_up)
    gc.freeze()
    gc.enable()
    run_server(server_args)


def set_cpu_environment(server_args: dict[str, Any], threads: int | None = None) -> None:
    """Set what is not set; in this process too, where OpenMP is loaded and no longer reads its variable.

    Args:
        threads: Of each rank.
    """
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    for name, value in {**CPU_ENVIRONMENT, **own, **_thread_binding(server_args)}.items():
        os.environ.setdefault(name, value)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _thread_binding(server_args: dict[str, Any]) -> dict[str, str]:
    """Let every rank use every core we have: SGLang's own rule is one rank a NUMA node, and no more ranks."""
    ranks = server_args.get("tp_size", 1) * server_args.get("dp_size", 1)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([cores] * ranks)} if ranks > 1 else {}


class _ForkContext(multiprocessing.context.ForkContext):
    """`multiprocessing` for SGLang's engine module: forks, whatever start method it asks for."""

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Ignored: SGLang asks for "spawn" because of CUDA, which is not used here."""


def warm_up(server_args: Any) -> bool:
    """As SGLang's, which sleeps a second before it looks: wait until the server listens, and have it generate once.

    Returns:
        Whether it is ready; it ends itself where it is not.
    """
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus
    from sglang.srt.utils import kill_process_tree

    url, key = server_args.url(), server_args.api_key or ""
    try:
        if _model_info(url, key)["is_generation"]:
            settings = {"temperature": 0, "max_new_tokens": 8}
            call(
                "POST",
                f"{url}/generate",
                key,
                {"input_ids": [0], "sampling_params": settings},
                _WARM_UP_SECONDS,
            )
    except (OSError, HttpError):
        traceback.print_exc()
        kill_process_tree(os.getpid())
        return False
    get_global_state().tokenizer_manager.server_status = ServerStatus.Up
    return True


def _model_info(url: str, key: str) -> Any:
    deadline = time.monotonic() + _WARM_UP_SECONDS
    while True:
        try:
            return call("GET", f"{url}/model_info", key)
        except (OSError, HttpError):  # it does not listen yet
            if time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_AGAIN_SECONDS)


def run_server(server_args: dict[str, Any]) -> None:
    """Serve with exactly these `ServerArgs`."""
    hide_secrets_in_logs()
    bind_stores()
    from rltrain.packages import quick_distributions

    with quick_distributions():
        from sglang.launch_server import run_server as serve
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    from rltrain.sglang.push_routes import add_push_routes

    add_push_routes()
    try:
        serve(ServerArgs(**server_args))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def bind_stores() -> None:
    """Have torch's stores that this process opens listen at the address that they are known by.

    By itself a store listens on every interface, and takes what anybody writes into it; SGLang opens one for the ranks
    of an engine.
    """
    from torch.distributed import TCPStore

    def open_store(host_name: str, port: int, **kwargs: Any) -> TCPStore:
        if kwargs.get("is_master"):
            listener = socket.create_server((host_name, port), family=family_of(host_name))
            kwargs["master_listen_fd"] = listener.detach()
        return TCPStore(host_name, port, **kwargs)

    # Not as an attribute of torch.distributed: there it is a function of the same name.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    rendezvous.TCPStore = open_store


def hide_secrets_in_logs() -> None:
    """SGLang logs its arguments, the API key among them: blank it in every record of this process."""
    make_record = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        message = record.getMessage()
        if "api_key" in message:
            record.msg, record.args = _SECRET.sub(r"\1\2***\2", message), ()
        return record

    logging.setLogRecordFactory(factory)


if __name__ == "__main__":
    main()
elif multiprocessing.current_process().name != "MainProcess":  # a spawned child re-imports the main module
    hide_secrets_in_logs()
    bind_stores()
