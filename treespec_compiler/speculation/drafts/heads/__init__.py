"""Draft heads: small networks that guess from the target's hidden states, which verification computes anyway."""
