"""Training: images, fine-tuning, attention transfer and plans."""
