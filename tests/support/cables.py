"""Pulling a cable that is not there: for clients on this machine, without being root."""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Final

_SO_ATTACH_FILTER: Final = 26  # linux/include/uapi/asm-generic/socket.h


def cut(sock: socket.socket) -> None:
    """From now on nothing that the peer sends arrives at *sock*, and nothing is acknowledged: the kernel drops each
    segment before TCP sees it, by a filter of the socket. The peer cannot tell it from a cable that was pulled,
    if nothing is sent by *sock* any more."""
    keep_nothing = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0
    program = struct.pack("@HL", 1, ctypes.addressof(keep_nothing))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
