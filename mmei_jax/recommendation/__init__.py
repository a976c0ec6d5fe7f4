"""Recommendation: which items of a catalogue suit the state that MMEI read."""
