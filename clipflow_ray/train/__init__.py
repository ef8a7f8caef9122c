"""Training: natural images in, one checkpoint directory out."""
