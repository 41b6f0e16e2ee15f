"""Databases under load while their machine is backed up, and what was committed, written down outside of them."""

PAIRS = (("ext4", "xfs"), ("xfs", "btrfs"), ("btrfs", "ext4"))
ROUNDS = 100
"""The file systems that tests/unit/test_image_live.py backs up together under random writes, and how often."""
