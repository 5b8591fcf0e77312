"""What several models cost and score, beside each other."""
