"""The network: which card of this machine takes the place of which, and a configuration that finds it there."""

from remetal.adapt.network.adapt import Network, adapt_network
from remetal.adapt.network.matching import Choice, Match, match_nics, parse_choices

__all__ = ["Choice", "Match", "Network", "adapt_network", "match_nics", "parse_choices"]
