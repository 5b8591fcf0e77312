"""Plans: which layers of a trained model to convert, to which mixer, and how many tokens to merge, by measured time."""
