"""Acceleration of other libraries' models in place: `accelerate`, `restore`, `explain`."""
