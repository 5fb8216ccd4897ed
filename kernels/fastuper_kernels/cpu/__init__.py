"""The operations' CPU ways, and what these share: bands, packs, linear layers, Winograd's transforms."""
