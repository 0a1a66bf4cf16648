"""The page `/docs`: Swagger UI over the OpenAPI document, to read and to send requests from.

Its script runs beside the leads and is typed keys into. So it is one exact version, of which the browser
checks every byte (Subresource Integrity, https://www.w3.org/TR/SRI/), and a policy keeps it from talking to
anybody but this service. Another version is another `_VERSION` and other digests, of each file:

    curl -s URL | openssl dgst -sha384 -binary | base64 -w0

Called by `main`.
"""

import base64
import hashlib
from html import escape

_VERSION = "5.35.0"
_FILES = f"https://cdn.jsdelivr.net/npm/swagger-ui-dist@{_VERSION}"
_SCRIPT, _STYLE = f"{_FILES}/swagger-ui-bundle.js", f"{_FILES}/swagger-ui.css"
_SCRIPT_DIGEST = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
_STYLE_DIGEST = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui"})'

_START_DIGEST = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()

HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline' {_STYLE}; "
        f"script-src {_SCRIPT} 'sha256-{_START_DIGEST}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
"""What the page is sent with."""


def build_page(title: str) -> str:
    """Returns the page. Without the internet it says where to read instead."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<link rel="stylesheet" href="{_STYLE}" integrity="{_STYLE_DIGEST}" crossorigin="anonymous"></head>
<body><div id="swagger-ui"><p>This page loads Swagger UI from the internet. Where there is none, read
<a href="openapi.json">openapi.json</a>.</p></div>
<script src="{_SCRIPT}" integrity="{_SCRIPT_DIGEST}" crossorigin="anonymous"></script>
<script>{_START}</script></body></html>
"""
