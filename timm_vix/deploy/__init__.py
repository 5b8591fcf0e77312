"""From a model to a file that a device runs, and the check that the file computes what the model does."""
