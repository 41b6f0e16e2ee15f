"""Adaptation: what is changed in the restored system so that it boots on this hardware."""

from remetal.adapt.change import Adaptation, Change
from remetal.adapt.system import adapt_system

__all__ = ["Adaptation", "Change", "adapt_system"]
