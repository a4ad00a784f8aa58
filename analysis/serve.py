"""`python -m analysis.serve [RUNS_DIR]`: a page that shows runs while they train, on loopback, behind a token."""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import socket
import sys
from pathlib import Path

from rltrain.run.errors import UserError, run_main


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C; 2 if the directory or the port can't be used."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.serve", description="Show runs in a browser, those that train now too."
    )
    parser.add_argument(
        "runs_dir", nargs="?", type=Path, default=Path("runs"), help="directory of runs (default: runs)"
    )
    parser.add_argument("--port", type=int, default=0, help="port on loopback (default: any that is free)")
    args = parser.parse_args(argv)
    return run_main(lambda: serve(args.runs_dir, args.port))


def serve(runs_dir: Path, port: int = 0) -> None:
    """Serve the live page of a directory of runs until Ctrl-C.

    Args:
        runs_dir: may be empty still.
        port: on 127.0.0.1; 0 for any free one.

    Raises:
        UserError: the directory or port can't be used, or plotly is not installed.
    """
    from analysis.live.server import LiveServer

    if importlib.util.find_spec("plotly") is None:
        raise UserError("the live page draws with plotly, which is not installed: pip install plotly")
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not a directory. Give the directory that your runs are in.")
    try:
        server = LiveServer(runs_dir, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} can't be used: {error}. Without it a free port is taken.") from None
    with server:
        try:
            print(f"the runs in {runs_dir}: {server.url}", flush=True)
            number, user = server.server_port, f"{getpass.getuser()}@{socket.gethostname()}"
            print(f"from your own computer, first: ssh -L {number}:127.0.0.1:{number} {user}", flush=True)
            print("Ctrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    sys.exit(main())
