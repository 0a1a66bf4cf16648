"""The prediction: HTTP edge, predictor and its leaves, from top to bottom."""
