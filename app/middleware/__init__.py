"""Plain ASGI middleware; each class wraps the next application and knows nothing of scoring."""
