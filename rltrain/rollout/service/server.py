"""The rollout role: an HTTP server that hands out batches to the trainer.

POST /load, /generate, /weights and /eval, each with `{"rollout_id": k}` and the job's token. /generate answers with
an Arrow IPC stream, and errors are answered as 500 with `{"error": message}`. A repeated request (the trainer
lost the connection) gets what the first one made. With `--max-staleness`, rollouts begin before they are asked for.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import signal
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from aiohttp import web

from rltrain import arguments
from rltrain.agents.gateway.server import Gateway, set_gateway
from rltrain.arguments.config import Config
from rltrain.functions import explain
from rltrain.rewards import pool as rewards
from rltrain.rewards.rules import asks_for_reward
from rltrain.rollout.generate.http import HttpClient, set_client
from rltrain.rollout.generate.look_ahead import LookAhead
from rltrain.rollout.service.fleet_watch import FleetWatch
from rltrain.rollout.service.manager import RolloutManager
from rltrain.run.errors import UserError
from rltrain.run.files import read_object
from rltrain.run.http import make_url
from rltrain.run.layout import RunLayout
from rltrain.run.role import Registry, RoleContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(manager: RolloutManager, token: str) -> web.Application:
    """The application; `token` is what every request must carry."""
    rollouts = LookAhead(manager.generate, ahead=manager.max_staleness, end=manager.num_rollout)
    evaluations: dict[int, asyncio.Task[dict[str, float]]] = {}

    async def load(request: web.Request) -> web.Response:
        rollout_id = await _rollout_id(request)
        await rollouts.restart(rollout_id)
        manager.load(rollout_id)
        return web.json_response({})

    async def weights(request: web.Request) -> web.Response:
        await rollouts.weights(await _rollout_id(request))
        return web.json_response({})

    async def generate(request: web.Request) -> web.Response:
        table = await rollouts.get(await _rollout_id(request))
        return web.Response(body=ipc_stream(table), content_type="application/vnd.apache.arrow.stream")

    async def evaluate(request: web.Request) -> web.Response:
        """Join the evaluation that is already under way for this step, and outlive the request that began it."""
        rollout_id = await _rollout_id(request)
        if rollout_id not in evaluations:
            evaluations[rollout_id] = asyncio.ensure_future(manager.evaluate(rollout_id))
            evaluations[rollout_id].add_done_callback(lambda _: evaluations.pop(rollout_id, None))
        return web.json_response(await asyncio.shield(evaluations[rollout_id]))

    async def close(_: web.Application) -> None:
        await rollouts.close()

    app = web.Application(middlewares=[_require_token(token), _errors_as_json])
    handlers = {"/load": load, "/weights": weights, "/generate": generate, "/eval": evaluate}
    app.add_routes([web.post(path, handler) for path, handler in handlers.items()])
    app.on_shutdown.append(close)
    return app


def _require_token(token: str) -> Any:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            return web.json_response({"error": "the job's token is missing or wrong"}, status=401)
        return await handler(request)

    return middleware


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException:
        raise
    except UserError as error:
        return web.json_response({"error": str(error)}, status=500)
    except Exception as error:
        traceback.print_exc()
        return web.json_response({"error": explain(error)}, status=500)


async def _rollout_id(request: web.Request) -> int:
    try:
        return int((await request.json())["rollout_id"])
    except (ValueError, KeyError, TypeError):
        raise web.HTTPBadRequest(text='the body must be {"rollout_id": number}') from None


def ipc_stream(table: pa.Table) -> bytes:
    """The table as the trainer reads it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


async def serve(context: RoleContext) -> None:
    """Prepare everything, announce the role, and serve until SIGTERM.

    Raises:
        UserError: the prompts, the tokenizer or a custom function is wrong.
    """
    config = prepare(arguments.load(context.run_dir), context.layout)
    registry = Registry(context)
    manager = RolloutManager(config, context.layout, context.attempt)
    # Its first conversion imports pandas, which the first batch would wait for: now the engines are waited for anyway.
    pa.array([0])
    collect_garbage_rarely()
    client = HttpClient(context.token)
    set_client(client)
    watching = None
    if not config.debug.debug_train_only:
        if asks_for_reward(config):
            rewards.check(config.functions, config.rewards)
        watch = await asyncio.to_thread(FleetWatch, config, registry, context, client)
        if asks_for_reward(config):
            await rewards.start(config)
        watching = asyncio.create_task(watch.run())
    gateway = await start_gateway(config, context.host)
    runner = web.AppRunner(make_app(manager, context.token), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, context.host, 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await asyncio.to_thread(registry.register, make_url(host, port))
    await stopped.wait()
    if watching:
        watching.cancel()
    await runner.cleanup()
    if gateway is not None:
        await gateway.close()
    await rewards.close()
    await client.close()


async def start_gateway(config: Config, host: str) -> Gateway | None:
    """What agents speak to, if the flags ask for it; its sessions are opened by generation functions.

    Raises:
        UserError: the model's tokenizer has no chat template, or its parsers can't be loaded.
    """
    if not config.agents.agent_gateway or config.debug.debug_train_only:
        return None
    gateway = Gateway(config, host)
    await gateway.start()
    set_gateway(gateway)
    return gateway


_UNLIMITED = 1 << 30


def prepare(config: Config, layout: RunLayout) -> Config:
    """Add `rollout_state_dir` and `vocab_size`, and give `rollout_max_context_len` the engines' limit."""
    hf_config = read_object(Path(config.model.hf_checkpoint) / "config.json")
    limit = context_length(hf_config, config.engines.sglang)
    rollout = replace(
        config.rollout,
        rollout_state_dir=str(layout.rollout_state),
        rollout_max_context_len=min(config.rollout.rollout_max_context_len or _UNLIMITED, limit),
    )
    return replace(config, rollout=rollout, shape=replace(config.shape, vocab_size=hf_config["vocab_size"]))


def collect_garbage_rarely() -> None:
    """Have Python look for reference cycles less often: answers are made of many small lists without any, and looking
    through the lists of all samples again and again would take a quarter of what this process does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    gc.enable()


def context_length(config: dict[str, Any], sglang: dict[str, Any]) -> int:
    """Tokens, prompt and response together, that the engines take: as asked for, else what the model has."""
    return sglang.get("context_length") or config.get("max_position_embeddings") or _UNLIMITED
