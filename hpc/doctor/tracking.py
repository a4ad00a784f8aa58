"""Weights & Biases: is there a key where one is needed, and does nobody else read it?"""

from __future__ import annotations

import argparse
import stat
from collections.abc import Mapping
from pathlib import Path

from hpc.doctor.check import Check, fail, ok, warn

_HOST = "api.wandb.ai"


def check_tracking(args: argparse.Namespace, env: Mapping[str, str], netrc: Path) -> Check:
    """Check what `--use-wandb` and its like need; `netrc` is where `wandb login` leaves the key."""
    # As rltrain/tracking.py chooses it
    mode = args.wandb_mode or env.get("WANDB_MODE") or ("online" if args.use_wandb else "offline")
    if mode != "online":
        return ok("W&B", f"mode {mode}: no key is needed")
    if env.get("WANDB_API_KEY"):
        return ok("W&B", "online, with the key of WANDB_API_KEY")
    host = env.get("WANDB_BASE_URL", f"https://{_HOST}").partition("://")[2].partition("/")[0]
    try:
        known = f"machine {host}" in netrc.read_text()
    except OSError:
        known = False
    if not known:
        return fail("W&B", f"online, but there is no key for {host}", "wandb login, or --wandb-mode offline")
    if stat.S_IMODE(netrc.stat().st_mode) & 0o077:
        return warn("W&B", f"online, but others can read the key in {netrc}", f"chmod 600 {netrc}")
    return ok("W&B", f"online, with the key in {netrc}")
