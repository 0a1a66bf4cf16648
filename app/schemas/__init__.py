"""The wire format; nothing but the HTTP edge imports it."""
