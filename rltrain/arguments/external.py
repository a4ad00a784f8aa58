"""Engines and a router that the job uses but does not start: their addresses and their token.

Their lifecycle is somebody else's. `--rollout-external-engines-file` is read again whenever it is asked for, so that
engines can join and leave while the run goes on.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.weights import Weights
from rltrain.run.errors import UserError

TOKEN_VARIABLE = "SLURMLIME_EXTERNAL_TOKEN"


def external_urls(engines: Engines) -> list[str]:
    """URLs of the present external engines: first the flag's, then the file's, without repetitions.

    Raises:
        UserError: an address can't be read; the message has the line of the file.
        OSError: the file can't be read.
    """
    urls = [
        parse_address(each, "--rollout-external-engine-addrs")
        for each in engines.rollout_external_engine_addrs or []
    ]
    if engines.rollout_external_engines_file:
        path = Path(engines.rollout_external_engines_file)
        urls += parse_engines_file(path.read_text() if path.exists() else "", str(path))
    return list(dict.fromkeys(urls))


def count_external(engines: Engines) -> int:
    """The number of external engines that are named now; 0 while the file can't be read."""
    try:
        return len(external_urls(engines))
    except (OSError, UserError):
        return 0


def parse_engines_file(text: str, name: str) -> list[str]:
    """Read one address per line. Empty lines and text after a # are ignored.

    Raises:
        UserError: names the line.
    """
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [parse_address(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line]


def parse_address(text: str, where: str) -> str:
    """`HOST:PORT` or `http://HOST:PORT` as a URL without a slash at the end.

    Raises:
        UserError: it is neither.
    """
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        valid = url.scheme in ("http", "https") and url.hostname and url.port and url.path in ("", "/")
    except ValueError:
        valid = False
    if not valid:
        raise UserError(
            f"{where}: {text!r} is not the address of an engine. Give HOST:PORT, for example node3:30000, or"
            " [fd00::3]:30000."
        )
    return f"{url.scheme}://{url.netloc}"


def external_token() -> str:
    """The key that external servers were started with.

    Raises:
        UserError: the variable is not set.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(
            "the run uses engines or a router that it does not start: put the key that they were started with (their"
            f" --api-key) into the environment variable {TOKEN_VARIABLE}."
        )
    return token


def check_external(engines: Engines, weights: Weights) -> None:
    """Check the flags against each other; sets nothing.

    Raises:
        UserError: names the flags.
    """
    for address in engines.rollout_external_engine_addrs or []:
        parse_address(address, "--rollout-external-engine-addrs")
    if (engines.sglang_router_ip is None) != (engines.sglang_router_port is None):
        raise UserError("--sglang-router-ip and --sglang-router-port belong together: give both or none.")
    for_ours = [name for name in engines.router if name != "policy"]  # which it has, we may be told
    if engines.sglang_router_ip is not None and for_ours:
        flag = for_ours[0].replace("_", "-")
        raise UserError(
            f"--router-{flag}: the job starts no router where --sglang-router-ip names one. Leave it out."
        )
    if engines.sglang_config and (engines.are_external or engines.sglang_router_ip):
        raise UserError(
            "--sglang-config describes engines and routers that the job starts itself: it can't be combined with"
            " --rollout-external-engine-addrs (or -engines-file) or --sglang-router-ip."
        )
    if engines.are_external and weights.update_weight_transport != "disk":
        raise UserError(
            "external engines take their weights from the shared filesystem: --update-weight-transport disk is"
            f" needed, not {weights.update_weight_transport}."
        )
    if engines.are_external and weights.update_weight_mode == "delta":
        raise UserError(
            "external engines lack our loader, so they can't load changes only: leave out --update-weight-mode delta."
        )
