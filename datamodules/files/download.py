"""Fetches the files of Fashion-MNIST from HTTP mirrors and through apt, each within a bounded time.

Nothing here is trusted: the caller verifies what it is given.
"""

import http.client
import logging
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
ATTEMPTS = 2  # for each file, at each source
TIMEOUT = 30.0  # seconds
MIN_SPEED = 10_000  # bytes per second: at a slower source than this, the next one is the better choice
APT_TIMEOUT = 300.0  # seconds for each command; the package has 31 MB
log = logging.getLogger(__name__)


class DownloadError(Exception):
    """A source failed; the message says how, without naming the source."""


def fetch(
    limits: dict[str, int],
    accept: Callable[[str, bytes], None],
    *,
    mirrors: Sequence[str] = MIRRORS,
    timeout: float = TIMEOUT,
    use_apt: bool = True,
) -> dict[str, str]:
    """Fetches files, each from the first source whose copy is accepted.

    Args:
        limits: Name of each wanted file, and the most bytes that it may have.
        accept: Takes a file's name and content; raises ValueError if the content is wrong.
        mirrors: Addresses to which a file's name is appended.
        timeout: Seconds without progress after which a mirror is given up.
        use_apt: Whether apt's copy is the last source.

    Returns:
        What was wrong with each source, if one of the files could not be had; otherwise nothing.
    """
    apt = f"apt-get download {DEBIAN_PACKAGE}"
    sources = deque([*mirrors, apt] if use_apt else mirrors)
    package: dict[str, bytes] = {}
    for name, limit in limits.items():
        tried: dict[str, str] = {}
        for attempt in range(ATTEMPTS * len(sources)):
            if attempt == len(sources):
                time.sleep(timeout / 15)  # the network may need a moment
            source = sources[0] if sources[0] == apt else sources[0] + name
            try:
                if source == apt:
                    package = package or debian_package_files(limits)
                accept(name, package[name] if source == apt else download(source, limit=limit, timeout=timeout))
                break
            except (DownloadError, ValueError) as error:
                if tried.get(source) != str(error):  # a retry that fails alike is no news
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

    # A socket's time-out starts anew with every byte, so a server that sends a byte now and then could hold us for
    # ever, in the headers too, where no loop of ours runs. Hence the thread: this side can always walk away.
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
                    reason = getattr(chunk, "reason", chunk)  # urllib wraps the telling error in a URLError
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


def debian_package_files(names: Iterable[str]) -> dict[str, bytes]:
    """Reads files out of Debian's package of the data set, without installing it; needs no root.

    Raises:
        DownloadError: There is no apt here, or it failed, or the package lacks one of the files.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DownloadError("there is no apt on this system")
    try:
        # apt's helper processes may outlive a killed apt-get for a moment and still write into the folder.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            folder = Path(scratch)
            apt = ("apt-get", "-q", "-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=1")
            own_lists = ("-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache")
            try:
                _run(folder, *apt, "download", DEBIAN_PACKAGE)
            except DownloadError:  # container images come without package lists: fetch them into our folder
                (folder / "lists" / "partial").mkdir(parents=True)
                _run(folder, *apt, *own_lists, "update")
                _run(folder, *apt, *own_lists, "download", DEBIAN_PACKAGE)
            _run(folder, "dpkg-deb", "-x", *map(str, folder.glob("*.deb")), "unpacked")
            return {name: (folder / "unpacked/usr/share/datasets/fashion-mnist" / name).read_bytes() for name in names}
    except OSError as error:
        raise DownloadError(str(error)) from error


def _run(folder: Path, *command: str) -> None:
    log_file = folder / "log"
    with log_file.open("wb") as output:  # not a pipe: apt's helpers would keep it open after a time-out
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=os.environ | {"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=APT_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise DownloadError(f"took longer than {APT_TIMEOUT:g} s") from None
    if done.returncode:
        lines = log_file.read_text(errors="replace").splitlines() or [f"exit code {done.returncode}"]
        raise DownloadError(next((line for line in lines if line.startswith("E:")), lines[-1]))
