"""The lab's cache: built once, whole or not at all, by one process at a time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lab.cache import KEPT, cached


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMETAL_CACHE", str(tmp_path / "cache"))


def test_built_once_for_the_same_inputs() -> None:
    built: list[Path] = []

    def build(path: Path) -> None:
        built.append(path)
        path.write_text(f"{len(built)}")

    first = cached("thing", ["a", "b"], build)
    assert cached("thing", ["a", "b"], build) == first
    assert first.read_text() == "1"
    other = cached("thing", ["ab", ""], build)
    assert other != first
    assert len(built) == 2


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        cached("thing", ["a"], fail)
    assert [each.name for each in (tmp_path / "cache").iterdir() if not each.name.endswith(".lock")] == []
    assert cached("thing", ["a"], Path.mkdir).is_dir()


def test_whoever_wants_the_same_waits() -> None:
    built: list[str] = []

    def slow(path: Path) -> None:
        time.sleep(0.3)
        built.append("x")
        path.touch()

    threads = [threading.Thread(target=cached, args=("thing", ["a"], slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == ["x"]


def test_only_the_latest_stay() -> None:
    other = cached("thing-else", ["a"], Path.touch)
    entries = []
    for number in range(KEPT + 2):
        entries.append(cached("thing", [str(number)], Path.touch))
        time.sleep(0.01)
    assert [entry.exists() for entry in entries] == [False, False] + [True] * KEPT
    assert other.exists()
