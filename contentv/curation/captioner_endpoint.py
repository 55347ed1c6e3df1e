"""Captions from any server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, or a paid one.

Frames travel as JPEG in data URIs. The key is read from the environment, goes into one header, and nowhere else:
redirects are not followed, and what a server says is shown with the key cut out.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from jaxtyping import UInt8

from contentv.base.errors import UserError
from contentv.curation.captioner import CaptionerConfig, CaptionRequest, answered, fit_side, question, spread_frames
from contentv.curation.captions import CaptionError
from contentv.curation.video_io import encode_jpg_bytes

MAX_ANSWER_BYTES = 1 << 20
MAX_PAUSE_S = 60.0  # between two tries, whatever the server asks for
MAX_FAILED_IN_A_ROW = 20  # clips; more say that the server is at fault, not the clips
SHOWN_CHARS = 200  # of a server's message


class _RetryableError(Exception):
    """A try that may go better the next time."""

    def __init__(self, reason: str, pause_s: float | None = None, *, unreachable: bool = False) -> None:
        self.pause_s, self.unreachable = pause_s, unreachable
        super().__init__(reason)


class EndpointCaptioner:
    """Asks a server for captions, several at a time.

    Args:
        config: the server, the model and what to ask.
        sleep: waits for some seconds; tests hand in their own.

    Attributes:
        fingerprint: of the server's address, the model and the settings; not of the key.

    Raises:
        UserError: the address is none, or the key's variable is not set.
    """

    def __init__(self, config: CaptionerConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        self._config, self._sleep = config, sleep
        self._url = f"{_checked_url(config.url)}/chat/completions"
        self._key = _read_key(config.api_key_env)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._client = httpx.Client(
            headers=headers, timeout=config.timeout_s, follow_redirects=False,
            limits=httpx.Limits(max_connections=config.concurrency),
        )  # fmt: skip
        self._failed_in_a_row = 0
        self._is_stopped = False
        asked = [config.url, config.model, config.prompt, config.image_prompt, config.frames, config.max_side_px]
        asked += [config.max_tokens, config.extra]
        self.fingerprint = hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()

    def caption(self, clips: Sequence[CaptionRequest]) -> list[str | CaptionError]:
        """Returns a caption for every clip, or why there is none; see `Captioner`."""
        self._is_stopped = False
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            futures = [threads.submit(self._caption, clip) for clip in clips]
            try:
                results = [future.result() for future in futures]
            except BaseException:
                self._is_stopped = True  # those that wait for another try give up
                for future in futures:
                    future.cancel()
                raise
        for result in results:
            self._note(result)
        return results

    def _note(self, result: str | CaptionError) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if isinstance(result, CaptionError) else 0
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise UserError(
                f"no caption for {self._failed_in_a_row} clips in a row; the last: {result}", where="captioner.url",
                remedy="mend the server or the model, and run the same command again: it goes on",
            )  # fmt: skip

    def _caption(self, clip: CaptionRequest) -> str | CaptionError:
        body = json.dumps(self._body(clip)).encode()
        for tried in range(self._config.retries + 1):
            try:
                return self._read(self._post(body))
            except CaptionError as error:
                return error
            except _RetryableError as error:
                last = error
                if self._is_stopped:
                    break
                if tried < self._config.retries:
                    pause = min(MAX_PAUSE_S, 2.0**tried) * random.uniform(0.75, 1.25)
                    self._sleep(pause if error.pause_s is None else min(error.pause_s, MAX_PAUSE_S))
        if last.unreachable:
            raise UserError(
                f"the server cannot be reached ({last})", where=f"captioner.url={self._config.url}",
                remedy="start it, or correct the address; the same command goes on",
            )  # fmt: skip
        return CaptionError(f"no caption after {self._config.retries + 1} tries: {last}", "captioner")

    def _body(self, clip: CaptionRequest) -> dict[str, Any]:
        pictures = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_jpeg(frame, self._config)}"}}
            for frame in spread_frames(clip, self._config.frames)
        ]
        content = [*pictures, {"type": "text", "text": question(clip, self._config)}]
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens,
            "temperature": 0,
        } | self._config.extra
        return {name: value for name, value in body.items() if value is not None}

    def _post(self, body: bytes) -> bytes:
        """Returns the answer's body; within `timeout_s` as a whole, however slowly it trickles."""
        deadline = time.monotonic() + self._config.timeout_s
        data = bytearray()
        try:
            headers = {"Content-Type": "application/json"}
            with self._client.stream("POST", self._url, content=body, headers=headers) as answer:
                for part in answer.iter_bytes():
                    data += part
                    if len(data) > MAX_ANSWER_BYTES:
                        raise CaptionError(f"the answer has more than {MAX_ANSWER_BYTES} bytes", "captioner")
                    if time.monotonic() > deadline:
                        raise _RetryableError(f"no whole answer within {self._config.timeout_s:g} s")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _RetryableError(self._shown(str(error)), unreachable=True) from error
        except httpx.TimeoutException as error:
            raise _RetryableError(f"no answer within {self._config.timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise _RetryableError(f"the connection was lost ({self._shown(str(error))})") from error
        self._check(answer, bytes(data))
        return bytes(data)

    def _check(self, answer: httpx.Response, data: bytes) -> None:
        code = answer.status_code
        if code == 200:
            return
        told = self._shown(data.decode("utf-8", "replace"))
        if code in (408, 425, 429) or code >= 500:
            raise _RetryableError(f"HTTP {code}: {told}", _retry_after(answer.headers.get("retry-after")))
        if code in (401, 403):
            remedy = f"set {self._config.api_key_env} to a valid key" if self._key else "name captioner.api_key_env"
            raise UserError(f"the server refuses the key (HTTP {code}: {told})", where="captioner", remedy=remedy)
        if code == 404 or 300 <= code < 400:
            raise UserError(
                f"the server has no such address or model (HTTP {code}: {told})",
                where=f"captioner.url={self._config.url}, captioner.model={self._config.model}",
                remedy="give the address up to /v1, and a model that the server lists under /v1/models",
            )
        raise CaptionError(f"HTTP {code}: {told}", "captioner")

    def _read(self, data: bytes) -> str:
        try:
            choice = json.loads(data)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            shown = self._shown(data.decode("utf-8", "replace"))
            raise CaptionError(f"the answer is no chat completion: {shown}", "captioner") from error
        if choice.get("finish_reason") == "content_filter":
            raise CaptionError("the server's content filter stopped the answer", "captioner")
        if not isinstance(text, str):
            raise CaptionError("the answer has no text", "captioner")
        return answered(text)

    def _shown(self, text: str) -> str:
        """Returns the start of a message on one line, without the key."""
        clean = text.replace(self._key, "[key]") if self._key else text
        return " ".join(clean.split())[:SHOWN_CHARS]


def _jpeg(frame: UInt8[np.ndarray, "H W 3"], config: CaptionerConfig) -> str:
    return base64.b64encode(encode_jpg_bytes(fit_side(frame, config.max_side_px))).decode()


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{url!r} is no http(s) address", where="captioner.url", remedy="such as http://localhost:8000/v1"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            "the address holds a name, a key or a query", where="captioner.url",
            remedy="leave them out; put the key into a variable and name it: captioner.api_key_env=NAME",
        )  # fmt: skip
    return url.rstrip("/").removesuffix("/chat/completions")


def _read_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        told = "is not set" if not key else "holds no key: it has other than printable ASCII characters"
        raise UserError(f"the environment variable {variable} {told}", where="captioner.api_key_env",
                        remedy=f"export {variable}=...")  # fmt: skip
    return key


def _retry_after(value: str | None) -> float | None:
    """Returns the seconds that a Retry-After header asks for, as a number or a date."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
