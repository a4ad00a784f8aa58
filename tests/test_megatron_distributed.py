"""Which network interface ranks use."""

from __future__ import annotations

import socket

import psutil

from rltrain.megatron.distributed import interface_of


def test_interface_of_an_address() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET:
                assert interface_of(each.address) == name
    assert interface_of("127.0.0.1") is not None
    assert interface_of("203.0.113.7") is None
