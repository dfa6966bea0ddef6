"""Addresses of clusters: which URLs may be a dashboard, and which hosts are this machine."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from dbtrain.errors import UserError

EXAMPLE = "give the dashboard's URL, such as http://HEAD:8265"
"""How to mend an address."""


def checked_url(address: str) -> str:
    """The URL of a dashboard, without a trailing slash. Raises UserError where it is none."""
    scheme, mark, rest = address.partition("://")
    problem, mend = None, EXAMPLE
    if not mark:
        problem = "is not a URL"
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():
            mend = f"write http://{address}; the dashboard's port is 8265 where nobody chose another"
    elif scheme == "ray":
        problem = "is the address of a Ray Client server, and jobs go to the dashboard"
    elif scheme not in ("http", "https"):
        problem = f"has the scheme {scheme}, and a dashboard has http or https"
    else:
        try:
            parts = urlsplit(address)
            if not parts.hostname or parts.port == 0 or rest != rest.strip():
                problem = "names no host"
            else:
                parts.hostname.encode("idna")  # as what resolves it will, which fails with an error of its own
        except ValueError as error:
            problem = f"is not a URL: {error}"
    if problem is not None:
        raise UserError(problem, field="--address", value=address, mend=mend)
    return address.rstrip("/")


def is_this_machine(host: str) -> bool:
    """Whether a host's address is one of this machine."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return any(_can_bind(str(ip)) for ip in found)


def _can_bind(ip: str) -> bool:
    family = socket.AF_INET6 if ipaddress.ip_address(ip.partition("%")[0]).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True
