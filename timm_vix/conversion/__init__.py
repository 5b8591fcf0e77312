"""Conversion of trained models: other attention mechanisms, token merging, batch norms, training of a part only."""
