"""Another user of the machine, who tries what a run should not let him: its files, memory, environments and sockets.

It stands alone and is given to the system's Python as text: the repository may lie where that user can't look.
Reads what to try from stdin, and prints what it got.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.error
import urllib.request


def opens(path: str) -> bool:
    """Whether the file can be read, or the directory listed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    os.close(descriptor)
    return True


def connects(name: str) -> bool:
    """Whether a Unix socket takes a connection; a name with @ is an abstract one, which no mode of a file guards."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        try:
            client.connect("\0" + name[1:] if name.startswith("@") else name)
        except OSError:
            return False
    return True


def answers(url: str) -> bool:
    """Whether a server does what it is asked without a token."""
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    got = {
        "user": os.getuid(),
        "files": [path for path in asked["files"] if opens(path)],
        "sockets": [name for name in asked["sockets"] if connects(name)],
        "urls": [url for url in asked["urls"] if answers(url)],
    }
    print(json.dumps(got))
