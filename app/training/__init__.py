"""Training and publishing; never imported by serving."""
