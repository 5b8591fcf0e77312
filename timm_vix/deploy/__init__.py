"""What brings a trained model to people and devices."""
