"""The recovery medium: a Debian system in memory with remetal on it, and the ISO that boots it everywhere."""
