"""What CUDA's runtime promises of devices and streams, without a GPU: both belong to the host thread."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch


class FakeStream:
    """A stream that only notes what it is told."""

    numbers = itertools.count(1)

    def __init__(self, device: int, log: list[tuple[str, Any]], number: int | None = None) -> None:
        self.device, self.number, self._log = device, next(self.numbers) if number is None else number, log

    def wait_event(self, event: FakeEvent) -> None:
        self._log.append(("wait", (self.number, event.stream)))

    def synchronize(self) -> None:
        self._log.append(("synchronize", self.number))


class FakeEvent:
    """An event that knows on which stream it was recorded."""

    stream: int

    def record(self) -> None:
        self.stream = torch.cuda.current_stream().number


class FakeCuda:
    """Stands in for `torch.cuda`.

    Attributes:
        log: what streams were told, and what a test adds.
    """

    def __init__(self, patch: pytest.MonkeyPatch, devices: int) -> None:
        self.log: list[tuple[str, Any]] = []
        here = threading.local()

        def set_device(number: int) -> None:
            assert number < devices, f"invalid device ordinal {number} of {devices}"
            here.device = number

        def current_stream() -> FakeStream:
            return getattr(here, "stream", None) or FakeStream(torch.cuda.current_device(), self.log, 0)

        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: devices)
        patch.setattr(torch.cuda, "set_device", set_device)
        patch.setattr(torch.cuda, "current_device", lambda: getattr(here, "device", 0))
        patch.setattr(torch.cuda, "current_stream", current_stream)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(here, "stream", stream))
        patch.setattr(torch.cuda, "Stream", lambda device: FakeStream(device, self.log))
        patch.setattr(torch.cuda, "Event", FakeEvent)
