"""Taking the pieces to real weights: loading, fast layers, measuring."""
