"""Fetches the files of Fashion-MNIST from HTTP mirrors, each within a bounded time.

Nothing here is trusted: the caller verifies what it is given.
"""

import http.client
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence

from tqdm import tqdm

MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
)
ATTEMPTS = 2  # for each file, at each source
TIMEOUT = 30.0  # seconds
MIN_SPEED = 10_000  # bytes per second: if a source is slower than this, the next one is the better choice
log = logging.getLogger(__name__)


class DownloadError(Exception):
    """A source failed; the message says how, without naming the source."""


def fetch(
    limits: dict[str, int],
    accept: Callable[[str, bytes], None],
    *,
    mirrors: Sequence[str] = MIRRORS,
    timeout: float = TIMEOUT,
) -> dict[str, str]:
    """Fetches files, each from the first source whose copy is accepted.

    Args:
        limits: Name of each wanted file, and the most bytes that it may have.
        accept: Takes a file's name and content; raises ValueError if the content is wrong.
        mirrors: Addresses to which a file's name is appended.
        timeout: Seconds without progress after which a mirror is given up.

    Returns:
        What was wrong with each source, if one of the files could not be fetched; otherwise nothing.
    """
    sources = deque(mirrors)
    for name, limit in limits.items():
        tried: dict[str, str] = {}
        for attempt in range(ATTEMPTS * len(sources)):
            if attempt == len(sources):
                time.sleep(timeout / 15)  # the network may need a moment
            source = sources[0] + name
            try:
                accept(name, download(source, limit=limit, timeout=timeout))
                break
            except (DownloadError, ValueError) as error:
                if tried.get(source) != str(error):  # a retry that fails in the same way is no news
                    log.warning("%s: %s", source, error)
                tried[source] = str(error)
                sources.rotate(-1)  # the next file too starts at a source that works
        else:
            return tried
    return {}


def download(url: str, *, limit: int, timeout: float) -> bytes:
    """Fetches `url` into memory, with a progress bar if stderr is a terminal.

    Args:
        url: An http or https address; redirects and proxies (`https_proxy`) are followed.
        limit: The most bytes to accept.
        timeout: Seconds within which each next `MIN_SPEED * timeout` bytes, or the end, have to arrive. They include
            name look-up, connection and headers.

    Raises:
        DownloadError: No connection, an HTTP error, too slow, or more than `limit` bytes.
    """
    chunks: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    cancelled = threading.Event()

    def receive() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                bar.total = response.length
                while not cancelled.is_set():
                    chunk = response.read1(1 << 16)  # read() would wait for the whole 64 KiB and hide a slow server
                    chunks.put(chunk)
                    if not chunk:
                        break
        except urllib.error.HTTPError as error:
            with error:  # it holds the open connection
                chunks.put(OSError(f"HTTP {error.code} {error.reason}"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            chunks.put(error)

    # A socket's time-out restarts with every byte, so a server that sends a byte now and then could hold us forever,
    # even in the headers, where no loop of ours runs. Hence the thread: this side can always give up.
    step = int(MIN_SPEED * timeout)
    data = bytearray()
    with tqdm(desc=url.rpartition("/")[2], unit="B", unit_scale=True, disable=None) as bar:
        threading.Thread(target=receive, daemon=True).start()
        try:
            mark, deadline = 0, time.monotonic() + timeout
            while True:
                try:
                    chunk = chunks.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    chunk = TimeoutError()
                if isinstance(chunk, Exception):
                    reason = getattr(chunk, "reason", chunk)  # urllib wraps the actual error in a URLError
                    stalled = f"stalled: less than {step:,} bytes in {timeout:g} s"
                    raise DownloadError(stalled if isinstance(reason, TimeoutError) else str(reason)) from chunk
                if not chunk:
                    return bytes(data)
                data += chunk
                bar.update(len(chunk))
                if len(data) > limit:
                    raise DownloadError(f"sends more than the {limit:,} bytes expected")
                if len(data) - mark >= step:
                    mark, deadline = len(data), time.monotonic() + timeout
        finally:
            cancelled.set()
