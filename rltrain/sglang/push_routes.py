"""Two requests to an engine for a push of weights, in place of SGLang's six; the engine's server adds them to its own.

Each request takes an engine some milliseconds, as long as a push of a small model takes to load. They call what SGLang
has for each step, in the same order, and stop at the first that refuses. SGLang has to be importable here.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Body, Request
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqInput,
    ContinueGenerationReqInput,
    EndWeightUpdateReqInput,
    PauseGenerationReqInput,
    UpdateWeightsFromTensorReqInput,
    UpdateWeightVersionReqInput,
)
from sglang.srt.utils.auth import AuthLevel, auth_level

from rltrain.sglang.adapter import BEGIN_PUSH, END_PUSH


def add_push_routes() -> None:
    """Have the server of this process, which starts after that, answer them."""
    for path, answer in ((BEGIN_PUSH, _begin_push), (END_PUSH, _end_push)):
        http_server.app.post(path)(auth_level(AuthLevel.ADMIN_OPTIONAL)(answer))


async def _begin_push(obj: Annotated[UpdateWeightsFromTensorReqInput, Body()], request: Request) -> Any:
    """Pause with requests retracted, make ready, and load."""
    await http_server.pause_generation(PauseGenerationReqInput(mode="retract"), request)
    begin = BeginWeightUpdateReqInput(selector=obj.selector)
    answer = await http_server.begin_weight_update(begin, request)
    if answer.status_code != HTTPStatus.OK:  # a push that broke off in the middle has left its own open
        await http_server.end_weight_update(EndWeightUpdateReqInput(), request)
        answer = await http_server.begin_weight_update(begin, request)
    if answer.status_code != HTTPStatus.OK:
        return answer
    return await http_server.update_weights_from_tensor(obj, request)


async def _end_push(obj: Annotated[UpdateWeightVersionReqInput, Body()], request: Request) -> Any:
    """Put the weights into use, name them, and go on.

    Not before, as SGLang would with a request that loads: a push may need several of them.
    """
    answer = await http_server.end_weight_update(EndWeightUpdateReqInput(), request)
    if answer.status_code != HTTPStatus.OK:
        return answer
    answer = await http_server.update_weight_version(obj, request)
    if answer.status_code != HTTPStatus.OK:
        return answer
    return await http_server.continue_generation(ContinueGenerationReqInput(), request)
