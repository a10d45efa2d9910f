"""A headless Chromium for tests: what a page looks like, and what its document is once its scripts have run."""

import shutil
import subprocess
import tempfile
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def browser() -> str | None:
    """Path of a Chromium, or None where none is installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def why_not() -> str | None:
    """What keeps pages from being opened here, or None."""
    return None if browser() else "no Chromium: apt-get install --no-install-recommends chromium"


def screenshot(page: str | Path, png: Path, width: int, height: int, wait_ms: int = 2000) -> None:
    """Open a URL or a file in a window of width x height pixels and write what is seen. wait_ms: of the page's own
    clock, for its scripts and what they load."""
    _open(page, f"--screenshot={png}", f"--window-size={width},{height}", f"--virtual-time-budget={wait_ms}")


def document(page: str | Path, wait_ms: int = 2000) -> str:
    """The HTML of a URL or a file after its scripts have run."""
    return _open(page, "--dump-dom", f"--virtual-time-budget={wait_ms}")


def _open(page: str | Path, *options: str) -> str:
    url = page.resolve().as_uri() if isinstance(page, Path) else page
    path = browser()
    assert path is not None, why_not()
    # A profile of its own: two at once would otherwise share one, and the second hand its page to the first.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [path, *_OPTIONS, f"--user-data-dir={profile}", *options, url], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, f"{url}: {done.stderr[-2000:]}"
    return done.stdout
