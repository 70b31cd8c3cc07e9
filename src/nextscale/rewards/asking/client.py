"""A server that scores images: JSON there, JSON back, asked again where that may help."""

import base64
import os
import time
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import Any

import httpx2
from PIL import Image

from nextscale.base.errors import ConfigError, RewardError

FIRST_WAIT = 0.5  # seconds before the second try; each further wait is twice the one before
LONGEST_WAIT = 60.0  # seconds; a server that asks for more is given up
COMPRESS_LEVEL = 1  # of PNG: lossless as any, on photographs 3 times as fast as PIL's 6 and 9 % larger
LONGEST_EXCERPT = 200  # characters of an answer in an error's sentence


class Server:
    """Where images are sent to be scored. May be used by several threads at once.

    Args:
        url: of the service, http:// or https://.
        request_timeout: seconds that a request waits for a word from the server.
        retries: further tries after a lost connection, a timeout, or an answer 429 or 5xx.
        api_key_env: the environment variable that holds the key, sent as a bearer token and told nowhere.

    Raises:
        ConfigError: the URL is none, or there is no such variable.
    """

    def __init__(self, url: str, request_timeout: float, retries: int, api_key_env: str | None) -> None:
        try:
            self.url = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"'{url}' is no URL: {error}") from None
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise ConfigError(
                f"'{url}' is no URL of a server: expected one such as http://localhost:8000/score"
            )
        self.name = str(self.url.copy_with(username=None, password=None, query=None, fragment=None))
        self.retries = retries
        self._key = _read_key(api_key_env) if api_key_env else None
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=None)  # as many as there are threads that ask
        self._client = httpx2.Client(headers=headers, timeout=request_timeout, limits=limits)

    def post(self, content: dict[str, Any]) -> bytes:
        """The body of the answer to some JSON.

        Raises:
            RewardError: there is no answer after all tries, or one that another try would not change.
        """
        wait, found = FIRST_WAIT, ""
        for tries in range(self.retries + 1):
            if tries:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            try:
                response = self._client.post(self.url, json=content)
            except httpx2.RequestError as error:
                found = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return response.content
            found = f"{response.status_code} {response.reason_phrase} {self.excerpt(response.content)}"
            if response.status_code != 429 and response.status_code < 500:
                raise RewardError(f"{self.name} answered {found}")
            wait = max(wait, _retry_after(response))
            if wait > LONGEST_WAIT:
                asked = f"asks to wait {wait:.0f} s, more than {LONGEST_WAIT:.0f} s"
                raise RewardError(f"{self.name} answered {found} and {asked}")
        raise RewardError(f"{self.name} gave no scores in {self.retries + 1} tries; the last time: {found}")

    def excerpt(self, answer: bytes | str) -> str:
        """The beginning of an answer on one line, in quotes, without the key."""
        text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return repr(text if len(text) <= LONGEST_EXCERPT else text[:LONGEST_EXCERPT] + "...")


def png_base64(image: Image.Image) -> str:
    """The image as a PNG file, in base64."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=COMPRESS_LEVEL)
    return base64.b64encode(buffer.getvalue()).decode()


def _read_key(variable: str) -> str:
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"no API key: the environment variable {variable} is not set; export it first")
    return key


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait, given as such or as a date; 0 where it does not say.

    Source: RFC 9110, section 10.2.3.
    """
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0.0
