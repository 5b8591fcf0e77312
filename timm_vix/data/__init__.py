"""Images: folders and data sets that hold them, and their decoding, augmentation and order."""
