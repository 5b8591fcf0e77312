"""Conversion of trained models: other mixers, token merging, batch norms, training of a part only."""
