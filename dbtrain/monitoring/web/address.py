"""Where the web monitor listens, under which names it answers, and with which token."""

from __future__ import annotations

import errno
import ipaddress
import platform
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dbtrain.errors import UserError

TOKEN_VARIABLE = "DBTRAIN_TOKEN"
"""Environment variable of the token, which other users of the machine do not see, as they see a command line."""
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")
_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Address:
    """A socket's address and the token of whoever may ask there."""

    host: str
    """As the user wrote it."""
    ip: str
    port: int
    """0 leaves it to the system."""
    family: socket.AddressFamily
    token: str

    @property
    def loopback(self) -> bool:
        """Whether this machine alone can reach it."""
        return ipaddress.ip_address(self.ip).is_loopback

    def url(self, port: int) -> str:
        """Of the page, token included, when it is served at `port`."""
        host = platform.node() if self.ip in _EVERYWHERE else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={self.token}"

    def answers_to(self, host: str) -> bool:
        """Whether a request with this Host header is meant for us: on loopback, names of other machines are not.

        The port may be another one, that of a tunnel.
        """
        if not self.loopback:
            return True
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower() in ("localhost", self.host.lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Turns the system's refusal to listen here into a UserError."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                mend = "choose another --port, or 0 for any that is free"
                raise UserError("is in use", field="--port", value=self.port, mend=mend) from None
            if error.errno == errno.EADDRNOTAVAIL:
                mend = "leave it out to serve this machine alone"
                raise UserError("is no address of this machine", field="--bind", value=self.host, mend=mend) from None
            if error.errno == errno.EACCES:
                mend = "choose one above 1023"
                raise UserError("may not be used", field="--port", value=self.port, mend=mend) from None
            raise


def address_of(host: str, port: int, token: str | None) -> Address:
    """Where to listen, checked; the token is made up on loopback if there is none.

    Raises:
        UserError: there is no such host, the token is too simple, or it is missing where other machines may ask.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        mend = "leave it out to serve this machine alone"
        raise UserError("is no address", field="--bind", value=host, mend=mend) from None
    if token is not None and not _TOKEN.fullmatch(token):
        # Not shown: whoever reads over the shoulder shall not learn how it begins.
        raise UserError(
            "has to be 16 to 200 letters, digits, - and _",
            field=f"--token or {TOKEN_VARIABLE}",
            mend="`openssl rand -hex 16` makes one",
        )
    address = Address(host, str(where[0]), port, family, token or secrets.token_urlsafe(24))
    if token is None and not address.loopback:
        raise UserError(
            "can be reached from other machines and needs a token of your own",
            field="--bind",
            value=host,
            mend=f"set {TOKEN_VARIABLE} or --token, or leave out --bind and use `ssh -L`",
        )
    return address
