"""Slots: the modules in a model that hold a mixer in the place of attention, and how they are put there."""
