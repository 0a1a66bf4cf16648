"""PostgreSQL: the embedded server, the leads, the audit table. Implements the protocols of `app.ai.domain`."""
