"""The operations' CPU ways and their shared parts: bands, packs, linear layers, Winograd's transforms."""
