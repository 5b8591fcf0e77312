"""Fine-tuning and attention transfer: settings, loops, checkpoints, and folders for the Hub."""
