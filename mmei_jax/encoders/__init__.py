"""Encoders: what turns one modality into token states, and the Transformer blocks that they share."""
