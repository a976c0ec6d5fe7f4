"""Exported programs: a trained run as StableHLO with its parameters beside it, for servers without the model's code."""
