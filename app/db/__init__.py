"""PostgreSQL: the embedded server, leads, events. Implements the protocols of `app.ai.domain`."""
