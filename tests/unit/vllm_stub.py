# SPDX-License-Identifier: Apache-2.0
"""In place of the `vllm` script: `vllm serve MODEL ...` as a child process sees it, without an engine.

It listens, answers /health, and a completion where name and key are right; a worker of its group runs beside it.
"""

import argparse
import http.server
import json
import os
import signal
import ssl
import subprocess
import sys

parser = argparse.ArgumentParser()
parser.add_argument("command")
parser.add_argument("model")
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--served-model-name", "--served_model_name", nargs="+")
parser.add_argument("--api-key", nargs="*")
parser.add_argument("--ssl-certfile")
parser.add_argument("--ssl-keyfile")
parser.add_argument("--dies", action="store_true")
given = parser.parse_known_args()[0]
names = given.served_model_name or [given.model]
keys = given.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
subprocess.Popen(["sleep", "300"])
print("mxfp4_sm120: MXFP4 experts on a stub", flush=True)
if given.dies:
    sys.exit("ValueError: it dies")


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if keys and self.headers["Authorization"] not in [f"Bearer {key}" for key in keys]:
            return self.answer(401, {"error": "Unauthorized"})
        if body["model"] not in names:
            return self.answer(404, {"error": f"no model {body['model']}"})
        self.answer(200, {"choices": [{"text": "stub"}]})


class Listener(http.server.ThreadingHTTPServer):
    address_family = http.server.socket.AF_INET6 if ":" in given.host else http.server.socket.AF_INET


server = Listener((given.host, given.port), Handler)
if given.ssl_certfile:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given.ssl_certfile, given.ssl_keyfile)
    server.socket = context.wrap_socket(server.socket, server_side=True)


def end(number, frame):
    print("ended cleanly by", signal.Signals(number).name, flush=True)
    raise SystemExit


for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, end)
server.serve_forever()
