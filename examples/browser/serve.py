"""Serves the page and one export to this machine alone, with the headers that confine the page. Needs only Python.

python examples/browser/serve.py EXPORT [--port 8000]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
NPM: Final = HERE / "node_modules"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
POLICY: Final = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    # Both let WebAssembly use several threads; neither loosens the policy above.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def pages(export: Path) -> dict[str, Path]:
    """Every address that is served, and nothing else is."""
    ort = NPM / "onnxruntime-web" / "dist"
    found = {
        "/": HERE / "index.html",
        "/npm/papaparse.js": NPM / "papaparse" / "papaparse.min.js",
        "/npm/tokenizers.mjs": NPM / "@huggingface" / "tokenizers" / "dist" / "tokenizers.min.mjs",
        "/export/manifest.json": export / "manifest.json",
    }
    found |= {f"/{name}": HERE / name for name in ("page.mjs", "style.css")}
    found |= {f"/javascript/{path.name}": path for path in (HERE.parent / "javascript").glob("*.mjs")}
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        found[f"/npm/onnxruntime-web/{name}"] = ort / name
    for name in json.loads((export / "manifest.json").read_text())["files"]:
        found[f"/export/{name}"] = export / Path(name).name
    return found


def server(export: Path, port: int) -> ThreadingHTTPServer:
    """Listening on 127.0.0.1; port 0 takes a free one."""
    served = pages(export)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = served.get(self.path.split("?")[0])
            if path is None or not path.is_file():
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(path.stat().st_size))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    self.wfile.write(block)

        def log_message(self, *_: object) -> None:
            """Nothing: an address is no business of a log."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of `dpbitfit export --format onnx`, with its budget.json")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    with server(given.export, given.port) as running:
        print(f"Open http://127.0.0.1:{running.server_port}/ in a browser on this machine. Ctrl-C ends.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            running.serve_forever()


if __name__ == "__main__":
    main()
