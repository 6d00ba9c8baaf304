"""What lies at an http address, read from front to back; a connection that drops is not the end of it."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
from typing import Any

PATIENCE = 60
"""Seconds without a byte after which a server counts as gone."""
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before each further try; after the last of them the failure stands."""
FOR_NOW = (408, 429, 500, 502, 503, 504)
"""Statuses by which a server says to come back."""


class WebFile(io.RawIOBase):
    """The bytes at an address. Where they end too early the rest is asked for (RFC 9110, Range with If-Range), so that none is read twice
    and none of another file that has taken its place.

    Raises:
        OSError, http.client.HTTPException: also when it is read: the server does not answer, has no such file, breaks off again and again,
            gives no parts of files, or names no version of this one, without which the rest could be another's.
    """

    def __init__(self, address: str):
        self.address, self.at = address, 0
        self.answer = self._asked()
        self.length = self.answer.length
        """Bytes in all; None where the server does not tell, and where it ends is the end."""
        tag = self.answer.headers.get("ETag") or ""
        self.version = tag if tag and not tag.startswith("W/") else self.answer.headers.get("Last-Modified")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        for pause in PAUSES:
            try:
                return self._read(buffer)
            except (OSError, http.client.HTTPException):
                if self.version is None:
                    raise
            time.sleep(pause)
            self.answer.close()
            self.answer = self._asked()
        return self._read(buffer)

    def _read(self, buffer: Any) -> int:
        count = self.answer.readinto(buffer)
        if not count and len(buffer) and self.length is not None and self.at < self.length:
            raise OSError(f"the connection ended after {self.at:,} of {self.length:,} bytes")
        self.at += count
        return count

    def close(self) -> None:
        if hasattr(self, "answer"):
            self.answer.close()
        super().close()

    def _asked(self) -> http.client.HTTPResponse:
        """The server's answer to a request for what is not read yet."""
        request = urllib.request.Request(self.address)
        if self.at:
            request.add_header("Range", f"bytes={self.at}-")
            request.add_header("If-Range", self.version or "")
        answer = _opened(request)
        if self.at and answer.status != http.client.PARTIAL_CONTENT:
            answer.close()
            raise OSError(
                f"the connection ended after {self.at:,} bytes, and the server gives the rest of no file or has another one there now"
            )
        return answer


def _opened(request: urllib.request.Request) -> http.client.HTTPResponse:
    """The answer to a request, made again where the server is not there or busy."""
    for pause in PAUSES:
        try:
            return urllib.request.urlopen(request, timeout=PATIENCE)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in FOR_NOW:
                raise
        time.sleep(pause)
    return urllib.request.urlopen(request, timeout=PATIENCE)
