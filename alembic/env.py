"""Runs the migrations on the connection `app.db.migrations` hands over, in its transaction.

There is no metadata to compare with: revisions are SQL written by hand. There is no way in without a
connection either, because two starters would race; `leadscore db upgrade` holds the lock that prevents it.
"""

from alembic import context

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("Apply migrations with `leadscore db upgrade`.")

# A migration that waits for a lock makes every later reader of that table wait behind it, so it gives up.
connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
context.configure(connection=connection, target_metadata=None)
with context.begin_transaction():
    context.run_migrations()
