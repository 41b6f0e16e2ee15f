"""Where this host gets its Debian packages from: the recovery system is built from the same places.

`apt-get indextargets` (apt-get(8)) tells what apt itself has understood of sources.list(5) in all its forms.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from remetal.errors import RefusedError
from remetal.system.run import run

_FORMAT = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
_ORIGINS = {"debian": "Debian", "ubuntu": "Ubuntu"}


@dataclass(frozen=True, slots=True)
class AptSources:
    """A distribution (`debian` or `ubuntu`), one of its suites by code name, and sources.list lines that carry it.

    `options` are apt's own settings for reaching them, such as a proxy, as `Name "value";`.
    """

    distribution: str
    suite: str
    lines: tuple[str, ...]
    options: tuple[str, ...] = ()


def probe_apt_sources(suite: str | None = None) -> AptSources:
    """Return the places that carry `suite` (default: this host's own) according to the host's apt configuration.

    Raises RefusedError if this host is neither Debian nor Ubuntu, or its apt names no place for its own suite.
    """
    release = platform.freedesktop_os_release()
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    distribution = next((name for name in names if name in _ORIGINS), None)
    host_suite = release.get("VERSION_CODENAME", "")
    if distribution is None or not host_suite:
        raise RefusedError(
            f"a recovery medium is built on Debian or Ubuntu, and this is {release.get('PRETTY_NAME', 'neither')}",
            hint="Build it on a Debian or Ubuntu machine, or in a container of one; it boots everywhere.",
        )
    targets = run(["apt-get", "indextargets", "Created-By: Packages", "--format", _FORMAT]).text
    lines = parse_index_targets(targets, host_suite, suite or host_suite, _ORIGINS[distribution])
    if not lines:
        raise RefusedError(
            f"this host's apt configuration names no place that carries {host_suite}",
            hint="Look at /etc/apt/sources.list and /etc/apt/sources.list.d, then run `apt-get update`.",
        )
    options = run(["apt-config", "dump", "Acquire"]).text.splitlines()
    return AptSources(
        distribution=distribution,
        suite=suite or host_suite,
        lines=lines,
        options=tuple(line for line in options if "::Proxy" in line and not line.endswith(' "";')),
    )


def parse_index_targets(text: str, host_suite: str, suite: str, origin: str) -> tuple[str, ...]:
    """Return sources.list lines for `suite` from lines of `URI|release|component|origin`.

    Only the distribution's own places count: those of `origin`, or, where the package lists were never fetched
    and apt knows no origin, those that have a component `main`. `host_suite` is the suite that the lines are about.
    """
    rows = [tuple(line.split("|")) for line in text.splitlines() if line.count("|") == 3]
    known = any(row[3] == origin for row in rows)
    lines: dict[str, None] = {}
    for uri, release, component, owner in rows:
        own = owner == origin if known else component == "main"
        if own and (release == host_suite or release.startswith(f"{host_suite}-")):
            lines[f"deb {uri} {suite}{release.removeprefix(host_suite)} {component}"] = None
    return tuple(lines)
