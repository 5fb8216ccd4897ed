"""Files, the Hub and messages: the lowest room of the package."""
