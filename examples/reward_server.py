"""A minimal reward server: it scores how red an image is.

    python examples/reward_server.py 8000
    nextscale train toy-painting --rewards.red.remote http://localhost:8000/score

Replace `score` with your own. docs/rewards.md describes the protocol.
"""

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

from PIL import Image, ImageStat


def score(image: Image.Image, condition: dict) -> float | None:
    """The score of an image, higher being better; None means "not scored".

    Args:
        image: RGB.
        condition: "label", the class index, and "text", the class name.
    """
    red, green, blue = ImageStat.Stat(image).mean
    return (red - (green + blue) / 2) / 255


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(BytesIO(base64.b64decode(each))) for each in request["images"]]
        scores = [score(image, each) for image, each in zip(images, request["conditions"], strict=True)]
        body = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Log nothing per request."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("localhost", int(sys.argv[1])), Handler)
    print(f"http://localhost:{server.server_port}/score", flush=True)
    server.serve_forever()
