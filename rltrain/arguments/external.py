"""Engines and a router that the job uses and does not start: where they are, and with which token they are spoken to.

Their lifecycle is somebody else's. `--rollout-external-engines-file` is read again whenever it is asked for, so that
engines can join and leave while the run goes on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import urlsplit

from rltrain.arguments.errors import UserError

TOKEN_VARIABLE = "SLURMLIME_EXTERNAL_TOKEN"


def uses_external_engines(args: argparse.Namespace) -> bool:
    """Whether the flags name engines, or a file of engines, that the job does not start."""
    return bool(args.rollout_external_engine_addrs or args.rollout_external_engines_file)


def external_urls(args: argparse.Namespace) -> list[str]:
    """URLs of the external engines that there are now: of the flag, then of the file, each once.

    Raises:
        UserError: an address that is none, with the line of the file.
        OSError: the file can't be read.
    """
    urls = [
        parse_address(each, "--rollout-external-engine-addrs")
        for each in args.rollout_external_engine_addrs or []
    ]
    if args.rollout_external_engines_file:
        path = Path(args.rollout_external_engines_file)
        urls += parse_engines_file(path.read_text() if path.exists() else "", str(path))
    return list(dict.fromkeys(urls))


def count_external(args: argparse.Namespace) -> int:
    """How many external engines are named now; 0 while the file can't be read."""
    try:
        return len(external_urls(args))
    except (OSError, UserError):
        return 0


def parse_engines_file(text: str, name: str) -> list[str]:
    """One address a line; empty lines and what follows a # are left out.

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
            f"{where}: {text!r} is no address of an engine. HOST:PORT is wanted, as in node3:30000."
        )
    return f"{url.scheme}://{url.netloc}"


def external_token() -> str:
    """The key that external servers were started with.

    Raises:
        UserError: nobody has told it.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(
            "the run uses engines or a router that it does not start: put the key that they were started with (their"
            f" --api-key) into the environment variable {TOKEN_VARIABLE}."
        )
    return token


def check_external(args: argparse.Namespace) -> None:
    """Check the flags against each other; sets nothing.

    Raises:
        UserError: names the flags.
    """
    for address in args.rollout_external_engine_addrs or []:
        parse_address(address, "--rollout-external-engine-addrs")
    if (args.sglang_router_ip is None) != (args.sglang_router_port is None):
        raise UserError("--sglang-router-ip and --sglang-router-port belong together: give both or none.")
    for_ours = [name for name in args.router if name != "policy"]  # which it has, we may be told
    if args.sglang_router_ip is not None and for_ours:
        flag = for_ours[0].replace("_", "-")
        raise UserError(
            f"--router-{flag}: the job starts no router where --sglang-router-ip names one. Leave it out."
        )
    if args.sglang_config and (uses_external_engines(args) or args.sglang_router_ip):
        raise UserError(
            "--sglang-config describes engines and routers that the job starts itself: it goes together neither with"
            " --rollout-external-engine-addrs (or -engines-file) nor with --sglang-router-ip."
        )
    if uses_external_engines(args) and args.update_weight_transport != "disk":
        raise UserError(
            "external engines take their weights from the shared filesystem: --update-weight-transport disk is needed"
            f" and not {args.update_weight_transport}."
        )
    if uses_external_engines(args) and args.update_weight_mode == "delta":
        raise UserError(
            "external engines can't be sent changes only, as they lack our loader: leave --update-weight-mode delta"
            " out."
        )
