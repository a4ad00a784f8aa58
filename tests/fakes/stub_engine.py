"""A stub of an engine that takes no time: answers every POST with the same prepared response.

`python tests/fakes/stub_engine.py TOKENS` prints its port, and serves until its standard input is closed. It reads no
more of HTTP than it must, so that what is measured is who asks.
"""

from __future__ import annotations

import asyncio
import json
import sys


def make_answer(tokens: int) -> bytes:
    """What SGLang would answer with this many tokens."""
    ids = [5 + i % 40 for i in range(tokens)]
    body = json.dumps(
        {
            "text": "x" * tokens,
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": "stop"},
                "weight_version": "0",
                "e2e_latency": 0.0,
                "completion_tokens": tokens,
                "output_token_logprobs": [[-0.123456789, token, None] for token in ids],
            },
        }
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class StubEngine(asyncio.Protocol):
    """One connection."""

    def __init__(self, answer: bytes) -> None:
        self._answer, self._data = answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            self._data = self._data[end + 4 + length :]
            self._transport.write(self._answer)


async def main(tokens: int) -> None:
    """Serve until standard input ends."""
    answer = make_answer(tokens)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: StubEngine(answer), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
