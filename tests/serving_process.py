"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from child_environment import child_environment
from prepared import start_python

ROOT = Path(__file__).parents[1]


class Server:
    """`python -m mlx_lora serve`, or the studio, on a free port, until the block ends."""

    def __init__(
        self,
        *arguments: object,
        log: Path,
        environment: dict[str, str] | None = None,
        cwd: Path = ROOT,
        command: str = "serve",
        port: int = 0,
    ):
        self.log = log
        words = ["-m", "mlx_lora", command, *map(str, arguments), "--port", str(port)]
        self.process = start_python(words, child_environment(ROOT / "tests", **(environment or {})), log, log, cwd)

    def __enter__(self) -> Server:
        for _ in range(1200):
            ready = [line.split() for line in self.text.splitlines() if line.startswith("ready")]
            if ready:
                self.url = ready[0][1]
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"the server did not start: {self.text}")

    def __exit__(self, failed: object, *_: object) -> None:
        """End it, in order unless the test has failed, if it still runs."""
        if self.process.poll() is None and failed is None:
            assert self.stop() == 0, self.text
            assert "Traceback" not in self.text, self.text
        elif self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """End it as a user does, and return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(timeout=60)
