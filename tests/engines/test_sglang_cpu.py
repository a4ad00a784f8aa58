"""What makes SGLang run without a GPU, and the plumbing around it, without starting SGLang."""

from __future__ import annotations

import http.server
import importlib.util
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
from helpers.local_job import wait_until

from rltrain.models.families import FAMILIES
from rltrain.run.errors import UserError
from rltrain.run.http import HttpError
from rltrain.run.processes import reserve_port
from rltrain.sglang import own_model
from rltrain.sglang.engine import engine_server_args, refuse_soft_caps
from rltrain.sglang.process import ServerDiedError, ServerProcess
from rltrain.sglang.routers import add_worker, find_worker, remove_worker
from rltrain.sglang.server import PROMPTS_ONCE, allocator_settings, cpu_defaults, hide_secrets_in_logs


def murmur3(data: bytes) -> int:
    """MurmurHash3 x86 32 of whole words, seed 0, after Austin Appleby's description: the reference."""
    state = 0
    for (word,) in struct.iter_unpack("<I", data):
        word = word * 0xCC9E2D51 % 2**32
        word = (word << 15 | word >> 17) % 2**32
        state ^= word * 0x1B873593 % 2**32
        state = (state << 13 | state >> 19) % 2**32
        state = (state * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return state ^ state >> 16


def test_the_reference_gives_the_published_value() -> None:
    assert murmur3(b"test") == 0xBA6BD213


def test_the_samplers_hash_is_murmur3() -> None:
    import torch

    from rltrain.sglang.cpu import murmur_hash32

    seeds, positions, columns = [0, 1, 2**40 + 17, -3], [0, 5, 6, 2**20], [0, 1, 31, 151_935]
    hashes = murmur_hash32(torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns))
    expected = [
        [murmur3(struct.pack("<qII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert hashes.dtype == torch.uint32
    assert hashes.to(torch.int64).tolist() == expected


STAND_INS = """
import importlib.util
from rltrain.sglang import cpu
missing = [name for name in ("triton", "torchvision", "sgl_kernel") if importlib.util.find_spec(name) is None]
cpu.install(); cpu.install()
import os, sys, torch
# also where everything is installed, and torch is a build for CUDA
assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1" and torch.get_device_module() is torch.cpu
import sgl_kernel
assert sum(type(finder).__name__ == "_StandInFinder" for finder in sys.meta_path) <= 1
from transformers.utils import import_utils
for name in missing:
    module = importlib.import_module(name + ".some.part")
    class Mine(module.SomeClass): pass
    Mine(1, a=2)
if "triton" in missing:
    import triton, triton.language as tl
    @triton.jit
    def kernel(x: tl.constexpr): return x
    assert kernel(3) == 3 and triton.cdiv(7, 2) == 4 and triton.next_power_of_2(5) == 8
    import torch.utils._triton
    assert not torch.utils._triton.has_triton()
if "torchvision" in missing:
    assert not import_utils.is_torchvision_available()
if "sgl_kernel" in missing:
    import sgl_kernel
    try:
        sgl_kernel.anything()
    except RuntimeError as error:
        assert "stand-in" in str(error)
    else:
        raise AssertionError("a stand-in was called and nobody noticed")
print("fine")
"""


# Of an engine's start, too: SGLang's registry of models, told of one of them.
REGISTRY = """
from sglang.srt.models.registry import ModelRegistry
assert set(ModelRegistry.models) == {"Qwen3ForCausalLM"}, ModelRegistry.models
assert ModelRegistry.resolve_model_cls(["Qwen3ForCausalLM"])[0].__module__ == "sglang.srt.models.qwen3"
assert "sglang.srt.models.olmo" not in sys.modules
try:
    ModelRegistry.resolve_model_cls(["NoSuchModel"])
except ValueError as error:
    assert "are not supported" in str(error) and "OlmoForCausalLM" in str(error), error
else:
    raise AssertionError("there is no such model")
print("fine, too")
"""


@pytest.mark.slow
def test_stand_ins_can_be_imported_and_not_called_and_sglang_imports_the_models_that_it_needs(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    # Those that it imports for another architecture: all of them would take seconds.
    others = {file.stem for file in models_of_sglang().glob("*.py")} - {"qwen3", "olmo"}
    environment = {
        **os.environ,
        **own_model.settings({}, {"model_path": str(tmp_path)}),
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(others),
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", STAND_INS + REGISTRY], capture_output=True, text=True, env=environment
    )
    assert run.stdout.splitlines() == ["fine", "fine, too"], run.stdout + run.stderr


def models_of_sglang() -> Path:
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "srt" / "models"


def test_an_engine_is_told_of_its_own_architecture_unless_the_user_says_what_to_import(
    tmp_path: Path,
) -> None:
    args = {"model_path": str(tmp_path)}
    assert own_model.settings({}, args) == {}
    for content in (
        "{",
        "[]",
        "{}",
        '{"architectures": null}',
        '{"architectures": []}',
        '{"architectures": [1]}',
    ):
        (tmp_path / "config.json").write_text(content)
        assert own_model.settings({}, args) == {}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM", "Other"]}))
    assert own_model.settings({}, args)[own_model.ARCHITECTURES] == "Qwen3ForCausalLM"
    for name in ("SGLANG_EXTERNAL_MODEL_PACKAGE", "SGLANG_DISABLED_MODEL_ARCHS"):
        assert own_model.settings({name: "mine"}, args) == {}


def test_an_engine_that_drafts_is_told_of_the_layers_that_do(tmp_path: Path) -> None:
    heads = {name for name, family in FAMILIES.items() if family.head is not None}
    for name in heads - {"DeepseekV32ForCausalLM"}:  # SGLang takes V3's
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        told = own_model.settings({}, {"model_path": str(tmp_path), "speculative_algorithm": "EAGLE"})
        _, *drafts = told[own_model.ARCHITECTURES].split()
        assert any(own_model.module_of(draft, models_of_sglang()) for draft in drafts), name


def test_every_family_that_sglang_has_is_found_without_importing_it() -> None:
    directory = models_of_sglang()
    files = {name: own_model.module_of(name, directory) for name in FAMILIES}
    assert [name for name, file in files.items() if file is None] == [
        "SmolLM3ForCausalLM"
    ]  # transformers' there
    for name, file in files.items():
        assert file is None or f"\nclass {name}(" in (directory / f"{file}.py").read_text()
    assert own_model.module_of("Qwen", directory) is None


def test_secrets_are_blanked_in_every_log_record(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    hide_secrets_in_logs()
    try:
        logging.getLogger("x").warning("args: %s", {"api_key": "hush-hush", "port": 1})
        logging.getLogger("x").warning("Args(admin_api_key='hush-hush', api_key=None)")
    finally:
        logging.setLogRecordFactory(before)
    assert "hush-hush" not in caplog.text
    assert "'port': 1" in caplog.text and "api_key=None" in caplog.text


def test_engines_get_what_the_job_decides_and_what_the_user_says(make_args) -> None:
    args = make_args(
        "--sglang-dtype", "bfloat16", "--rollout-num-gpus-per-engine", "2", "--rollout-num-gpus", "4"
    )
    server_args = engine_server_args(args, index=1)
    assert server_args["tp_size"] == 2 and server_args["dtype"] == "bfloat16"
    assert server_args["model_path"] == args.model.hf_checkpoint and "load_format" not in server_args
    assert server_args["random_seed"] != engine_server_args(args, index=0)["random_seed"]
    assert engine_server_args(make_args("--random-init"), 0)["load_format"] == "dummy"


def test_prompts_are_shared_where_nothing_else_is_said_of_their_order() -> None:
    assert cpu_defaults({})["schedule_policy"] == "lpm"
    for other in ("enable_deterministic_inference", "disable_radix_cache", "enable_priority_scheduling"):
        assert cpu_defaults({other: False}) == cpu_defaults({})
        assert cpu_defaults({other: True}).keys().isdisjoint(PROMPTS_ONCE)


def test_the_router_starts_without_sglang_torch_and_a_web_framework() -> None:
    code = "import sys; from rltrain.sglang.router_server import load; load('sglang-router');"
    code += "print([name for name in ('torch', 'sglang.srt', 'fastapi', 'aiohttp') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_a_reserved_port_can_still_be_served_on_but_not_taken_by_chance() -> None:
    with reserve_port("127.0.0.1") as reserved:
        address = reserved.getsockname()
        with socket.socket() as stranger, pytest.raises(OSError):
            stranger.bind(address)
        # create_server sets SO_REUSEADDR, as servers do.
        with socket.create_server(address) as server, socket.create_connection(address):
            server.accept()[0].close()


def test_a_server_that_ends_while_it_starts_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_server.py").write_text(
        "import sys, json\nassert json.load(sys.stdin) == {'a': 1}\nsys.exit(7)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    expected = pytest.raises(ServerDiedError, match=r"broken_server \(pid \d+\) ended with exit code 7")
    with ServerProcess("broken_server", {"a": 1}, "http://127.0.0.1:9") as process, expected:
        process.wait_until_ready(timeout=60)


def test_a_server_that_never_answers_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent_server.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ServerProcess("silent_server", {}, "http://127.0.0.1:9") as process, pytest.raises(TimeoutError):
        process.wait_until_ready(timeout=0.3)
    assert not Path(f"/proc/{process.pid}").exists()


@pytest.mark.parametrize("home", ["/proc/nobody", "here"])
def test_a_server_has_a_home_directory_that_can_be_written(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "homely_server.py").write_text(
        "import pathlib\n(pathlib.Path.home() / '.cache').mkdir()\nraise SystemExit(7)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path) if home == "here" else home)
    ended = pytest.raises(ServerDiedError, match="exit code 7")
    with ServerProcess("homely_server", {}, "http://127.0.0.1:9") as process, ended:
        process.wait_until_ready(timeout=60)
    assert (tmp_path / ".cache").exists() == (home == "here")


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_of_a_server_leave_the_cores_while_they_wait(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os\nraise SystemExit({'PASSIVE': 7, 'ACTIVE': 8}[os.environ['OMP_WAIT_POLICY']])"
    (tmp_path / "waiting_server.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    ended = pytest.raises(ServerDiedError, match=f"exit code {8 if own else 7}")
    with ServerProcess("waiting_server", {}, "http://127.0.0.1:9") as process, ended:
        process.wait_until_ready(timeout=60)


def has_ended(process: psutil.Process) -> bool:
    """Also as a zombie: pid 1 of a container may not reap orphans."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_server_dies_with_its_role_before_its_own_program_has_begun(tmp_path: Path) -> None:
    (tmp_path / "silent_server.py").write_text("import time\ntime.sleep(600)")
    role = (
        "from rltrain.sglang.process import ServerProcess\n"
        "process = ServerProcess('silent_server', {}, 'http://127.0.0.1:9')\n"
        "print(process.pid, flush=True)\n"
        "process.wait()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", role]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        server = psutil.Process(int(started.stdout.readline()))
        started.kill()
    wait_until(lambda: has_ended(server))


class OldRouter(http.server.BaseHTTPRequestHandler):
    """Knows /add_worker and /remove_worker only, as routers before 0.3 did."""

    urls: set[str] = set()  # noqa: RUF012 (one router a test)

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        worker = parse_qs(url.query).get("url", [""])[0]
        if url.path == "/add_worker":
            self.urls.add(worker)
        elif url.path == "/remove_worker":
            self.urls.discard(worker)
        self.send_response(200 if url.path in ("/add_worker", "/remove_worker") else 404)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def old_router() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OldRouter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_older_routers_are_spoken_to_in_their_way(old_router: str) -> None:
    add_worker(old_router, "token", {"url": "http://127.0.0.1:1/?a=b&c"})
    assert OldRouter.urls == {"http://127.0.0.1:1/?a=b&c"}
    remove_worker(old_router, "token", "http://127.0.0.1:1/?a=b&c")
    assert OldRouter.urls == set()


def test_a_refusal_comes_with_the_servers_words(old_router: str) -> None:
    with pytest.raises(HttpError, match="404") as caught:
        find_worker(old_router, "token", "x")
    assert caught.value.status == 404


def test_an_engine_with_the_memory_saver_has_no_expandable_segments() -> None:
    """The saver refuses them; the trainer, in the same environment, is better off with them."""
    env = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,garbage_collection_threshold:0.8",
        "HOME": "/",
    }
    assert allocator_settings(env, uses_memory_saver=True) == {
        "PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.8"
    }
    assert allocator_settings({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, uses_memory_saver=True) == {
        "PYTORCH_ALLOC_CONF": ""
    }
    assert allocator_settings(env, uses_memory_saver=False) == {}


def test_soft_caps_of_scores_need_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's attention for CPUs takes a cap and passes over it."""
    config, server_args = tmp_path / "config.json", {"model_path": str(tmp_path)}
    config.write_text('{"model_type": "gemma2"}')  # the usual cap
    with pytest.raises(UserError, match="attn_logit_softcapping"):
        refuse_soft_caps(server_args)
    monkeypatch.setattr("rltrain.sglang.cpu.has_accelerator", lambda: True)
    refuse_soft_caps(server_args)
    monkeypatch.undo()
    config.write_text('{"model_type": "gemma2", "attn_logit_softcapping": null}')
    refuse_soft_caps(server_args)
