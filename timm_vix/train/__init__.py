"""Fine-tuning and attention transfer, with the images that they need."""
