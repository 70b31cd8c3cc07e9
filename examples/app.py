"""The studio as a Hugging Face Space: put this file in a Space of the SDK "gradio", with `nextscale[ui]` in
its requirements.txt. It shows the miniature; name models of your own in MODELS.
"""

from pathlib import Path

import torch

from nextscale.studio.app import LOOK, build
from nextscale.studio.models import Models

MODELS: list[str] = []  # such as "you/your-model"

device = "cuda" if torch.cuda.is_available() else "cpu"
demo = build(Models(Path("runs").resolve(), MODELS, device))

if __name__ == "__main__":
    demo.queue(default_concurrency_limit=4).launch(**LOOK)
