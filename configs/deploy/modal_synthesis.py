"""A synthesis server on Modal: vLLM, with token ids and 20 log-probabilities.

    modal deploy configs/deploy/modal_synthesis.py

Then `python -m synth --config=… --config.client.base_url=https://…modal.run/v1 --config.client.model=$MODEL`.

Hardware: one GPU (`GPU`) a replica, up to `MAX_CONTAINERS`. A key is required of clients, from the Modal secret
`cartridges-api-key` (variable API_KEY); a gated model needs the secret `huggingface` (variable HF_TOKEN).
"""

import os
import subprocess

import modal

MODEL = os.environ.get("MODEL", "Qwen/Qwen3-4B")
GPU = os.environ.get("GPU", "H100")
MAX_CONTAINERS = int(os.environ.get("MAX_CONTAINERS", "4"))
PORT = 8000

image = (
    modal.Image.debian_slim(python_version="3.12").pip_install("vllm>=0.32").env({"MODEL": MODEL, "HF_HOME": "/cache"})
)
app = modal.App("cartridges-synthesis", image=image)


@app.function(
    gpu=GPU,
    volumes={"/cache": modal.Volume.from_name("huggingface-cache", create_if_missing=True)},
    secrets=[modal.Secret.from_name("cartridges-api-key"), modal.Secret.from_name("huggingface")],
    max_containers=MAX_CONTAINERS,
    scaledown_window=120,
    timeout=3600,
)
@modal.concurrent(max_inputs=256)
@modal.web_server(PORT, startup_timeout=900)
def serve() -> None:
    command = ["vllm", "serve", MODEL, "--host=0.0.0.0", f"--port={PORT}", "--max-logprobs=20"]
    subprocess.Popen([*command, "--enable-prefix-caching", f"--api-key={os.environ['API_KEY']}"])
