"""remetal as a person runs it on this host, with a repository and a state of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lab.recovery import PASSPHRASE, REMETAL


class Program:
    """The program with a fresh repository in `work`; what stands in `tools` comes before other programs."""

    def __init__(self, work: Path, tools: Path | None = None) -> None:
        phrase = work / "phrase"
        phrase.write_text(PASSPHRASE + "\n")
        path = os.environ["PATH"] if tools is None else f"{tools}:{os.environ['PATH']}"
        places = {"REMETAL_REPO": str(work / "repository"), "REMETAL_STATE": str(work / "state")}
        self.environment = {**os.environ, **places, "PATH": path}
        self.run("init", "--passphrase-file", phrase)

    def run(self, *words: str | Path) -> str:
        """Run it and return its output. Raises CalledProcessError."""
        done = subprocess.run([REMETAL, *words], env=self.environment, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start it and return its process; it says nothing."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen([REMETAL, *words], env=self.environment, stdin=quiet, stdout=quiet, stderr=quiet)
