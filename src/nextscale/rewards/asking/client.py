"""HTTP client of a server that scores images: posts JSON, reads the answer, retries where that may help."""

import base64
import os
import time
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import Any

import httpx2
import tenacity
from PIL import Image
from pydantic import Field

from nextscale.base.errors import ConfigError, RewardError
from nextscale.base.records import FREE_ON_RESUME
from nextscale.rewards.protocol import RewardConfig

REQUEST_TIMEOUT = 60.0
RETRIES = 3
FIRST_WAIT = 0.5  # seconds before the first retry; each later wait is twice the one before
LONGEST_WAIT = 60.0  # seconds; a server that asks for more is given up
COMPRESS_LEVEL = 1  # of PNG: lossless as any, on photographs 3 times as fast as PIL's 6 and 9 % larger
LARGEST_ANSWER = 16_000_000  # bytes; a number an image is far less
LONGEST_EXCERPT = 200  # characters of an answer in an error's sentence


class ScoringClient:
    """Posts images to a server that scores them. Safe to use from several threads.

    Args:
        url: URL of the service, http:// or https://.
        request_timeout: seconds that a request waits for the server to respond, and at most takes as a whole.
        retries: number of retries after a lost connection, a timeout, or a status of 429 or 5xx.
        api_key_env: environment variable that holds the API key, which is sent as a bearer token and never
            logged or stored.

    Raises:
        ConfigError: the URL is malformed, or the environment variable is not set or holds no key.
    """

    def __init__(
        self,
        url: str,
        request_timeout: float = REQUEST_TIMEOUT,
        retries: int = RETRIES,
        api_key_env: str | None = None,
    ) -> None:
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
        # Compressed, a small answer could fill the memory.
        headers["Accept-Encoding"] = "identity"
        self.request_timeout = request_timeout
        self._client = httpx2.Client(headers=headers, timeout=request_timeout, limits=limits)

    def post(self, content: dict[str, Any]) -> bytes:
        """Post JSON and return the body of the answer.

        Raises:
            RewardError: all tries failed, or the server refuses in a way that a retry would not change.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgain),
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=_next_wait,
        )
        try:
            return retrying(self._post_once, content)
        except tenacity.RetryError as error:
            found = error.last_attempt.exception()
        raise RewardError(f"{self.name} gave no scores in {self.retries + 1} tries; the last time: {found}")

    def _post_once(self, content: dict[str, Any]) -> bytes:
        try:
            with self._client.stream("POST", self.url, json=content) as response:
                answer = self._read(response)
        except httpx2.RequestError as error:
            raise _TryAgain(self._without_key(f"{type(error).__name__}: {error}")) from None
        if response.is_success:
            return answer
        found = f"{response.status_code} {response.reason_phrase} {self.excerpt(answer)}"
        if response.status_code != 429 and response.status_code < 500:
            raise RewardError(f"{self.name} answered {found}")
        if (wait := _retry_after(response)) > LONGEST_WAIT:
            asked = f"asks to wait {wait:.0f} s, more than {LONGEST_WAIT:.0f} s"
            raise RewardError(f"{self.name} answered {found} and {asked}")
        raise _TryAgain(found, wait)

    def _read(self, response: httpx2.Response) -> bytes:
        """The body of an answer, which neither its size nor its slowness may make endless.

        Raises:
            RewardError: it is too large, or compressed.
            _TryAgain: it takes too long.
        """
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise RewardError(
                f"{self.name} answered in the encoding '{encoding[:40]}', which was not asked for"
            )
        parts, size, begin = [], 0, time.monotonic()
        for part in response.iter_raw():
            parts.append(part)
            size += len(part)
            if size > LARGEST_ANSWER:
                most = f"{LARGEST_ANSWER // 10**6} MB"
                raise RewardError(f"{self.name} answered with more than {most}, expected a number an image")
            if time.monotonic() - begin > self.request_timeout:
                raise _TryAgain(f"the answer was not whole after {self.request_timeout:g} s")
        return b"".join(parts)

    def excerpt(self, answer: bytes | str) -> str:
        """The beginning of an answer on one line, in quotes, without the key."""
        text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
        text = " ".join(self._without_key(text).split())
        return repr(text if len(text) <= LONGEST_EXCERPT else text[:LONGEST_EXCERPT] + "...")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _TryAgain(Exception):
    """A failure that a retry may mend; `retry_after` is how many seconds the server asks to wait."""

    def __init__(self, found: str, retry_after: float = 0.0) -> None:
        super().__init__(found)
        self.retry_after = retry_after


def _next_wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: twice the wait before, or what the server asks for if that is more."""
    failure = state.outcome and state.outcome.exception()
    asked = failure.retry_after if isinstance(failure, _TryAgain) else 0.0
    doubled = min(2 * state.upcoming_sleep, LONGEST_WAIT)  # still holds the wait before
    return max(FIRST_WAIT, doubled, asked)


def png_base64(image: Image.Image) -> str:
    """The image as a PNG, base64-encoded."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=COMPRESS_LEVEL)
    return base64.b64encode(buffer.getvalue()).decode()


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()  # a file that it came from ends in a new line
    if not key:
        raise ConfigError(f"no API key: the environment variable {variable} is not set; export it first")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {variable} is no API key: it has more than plain characters"
        )
    return key


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait, given as a number or a date; 0 if it does not say.

    Source: RFC 9110, section 10.2.3.
    """
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0.0


class RequestConfig(RewardConfig):
    """Options of every reward that is served over HTTP."""

    request_timeout: float = Field(default=REQUEST_TIMEOUT, gt=0, json_schema_extra=FREE_ON_RESUME)
    """Seconds that a request waits for the server to respond, and at most takes as a whole."""
    retries: int = Field(default=RETRIES, ge=0, json_schema_extra=FREE_ON_RESUME)
    """Retries after a lost connection, a timeout, or a status of 429 or 5xx."""
    api_key_env: str | None = Field(default=None, json_schema_extra=FREE_ON_RESUME)
    """Environment variable that holds the API key."""
