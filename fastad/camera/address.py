"""Addresses of network cameras, as names and messages may show them."""

from __future__ import annotations

import re

# A password as a parameter, up to the next one: "&password=secret&", "_password=secret_channel=".
_PARAMETER = re.compile(
    r"((?:^|[/?&;_])(?:password|passwd|pass|pwd|token)=).*?(?=[&;#]|_[a-z]+=|$)", re.IGNORECASE
)
# What is surely no "user:password": a name or number with a dot, or a name alone; then a port.
_HOST = re.compile(r"(\[[^\]]*\]|[^:@\[\]]+(\.[^:@\[\]]+)+)(:\d{1,5})?|[^:@\[\]]+")


def without_password(address: str) -> str:
    """The address without user and password, for names and messages.

    Those in front of the host go up to the last ``@``: passwords may hold a ``/`` or another ``@``.
    Recorders also take them as parameters, anywhere behind the host.

    >>> without_password("rtsp://line:sec/ret@10.0.0.5/1")
    'rtsp://10.0.0.5/1'
    >>> without_password("rtsp://10.0.0.5:554/user=line&password=secret&channel=1")
    'rtsp://10.0.0.5:554/user=line&password=***&channel=1'
    """
    address = _PARAMETER.sub(r"\1***", address)
    scheme, separator, rest = address.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if not _HOST.fullmatch(authority):
        rest = rest.rpartition("@")[2]
    return scheme + separator + rest
