"""Another attention for a trained model, and training only a part of one."""
