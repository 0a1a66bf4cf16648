# The steps are those of the Makefile: hash-pinned install, then the checkout itself. The running user owns neither
# code nor models; everything the service writes goes to /data.
# The first stage has a C compiler, for the loops of scoring; the image that serves has none.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
WORKDIR /app
RUN python -m venv .venv
COPY requirements.lock pyproject.toml setup.py README.md LICENSE ./
RUN .venv/bin/python -m pip install --no-cache-dir --require-hashes -r requirements.lock
COPY app app
RUN .venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable .
COPY alembic.ini ./
COPY alembic alembic
COPY models models
# Whatever the modes of the checkout are, only the owner may write, who is root.
RUN chmod -R go-w .

FROM python:3.11-slim
WORKDIR /app
RUN useradd --system --uid 10001 --no-create-home leadscore && install -d -o leadscore /data
COPY --from=build /app/.venv .venv
COPY --from=build /app/pyproject.toml /app/alembic.ini ./
COPY --from=build /app/alembic alembic
COPY --from=build /app/app app
COPY --from=build /app/models models
ENV PATH="/app/.venv/bin:$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 PORT=8000 VAR_DIR=/data APP_ENV=production
# By its number: Kubernetes (runAsNonRoot) looks up no names.
USER 10001
# Name a volume for it (-v leadscore:/data): an anonymous one is left behind with the events in it.
VOLUME /data
EXPOSE 8000
# Whether the process lives, because what is unhealthy is started anew. Who sends it requests asks /readyz.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD \
    ["python", "-m", "app.probe"]
# APP_ENV=production asks for DATABASE_URL, CORS_ORIGINS, AUTH_MODE and ML_TRUSTED_KEYS, and serves signed models only:
# mount yours and name them in ML_MODEL_DIR. Apply migrations with `leadscore db upgrade`.
CMD ["leadscore", "serve"]
