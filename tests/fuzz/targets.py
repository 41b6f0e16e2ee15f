"""All targets, by name."""

from __future__ import annotations

from tests.fuzz import disks, repository, texts

TARGETS = {each.name: each for each in (*disks.TARGETS, *repository.TARGETS, *texts.TARGETS)}
