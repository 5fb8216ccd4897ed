"""Files, the Hub and messages: what every other room stands on."""
