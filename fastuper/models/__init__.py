"""The networks: configurations, backbones, heads, and the models made of them."""
