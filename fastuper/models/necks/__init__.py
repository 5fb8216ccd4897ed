"""Necks: modules between a backbone and the heads."""
