"""The heads: from a backbone's feature maps to logits."""
