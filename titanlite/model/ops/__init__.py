"""What computes and knows no config."""
