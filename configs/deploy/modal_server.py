"""Our server on Modal, with cartridges of the Hub: `modal deploy configs/deploy/modal_server.py`.

MODEL=meta-llama/Llama-3.2-3B-Instruct CARTRIDGES="manual=hf:org/manual" modal deploy configs/deploy/modal_server.py

Hardware: one GPU (`GPU`). A key is required of clients, from the Modal secret `cartridges-api-key` (variable API_KEY);
a gated model needs the secret `huggingface` (variable HF_TOKEN). An idle server scales down to nothing.
"""

import os
import subprocess

import modal

MODEL = os.environ.get("MODEL", "Qwen/Qwen3-4B")
CARTRIDGES = os.environ.get("CARTRIDGES", "").split()
GPU = os.environ.get("GPU", "L40S")
PORT = 8000

image = (
    modal.Image.debian_slim(python_version="3.12")
    .add_local_dir(".", "/app", copy=True, ignore=[".venv*", "runs", ".git"])
    .run_commands("pip install '/app[cuda]'")
    .env({"MODEL": MODEL, "CARTRIDGES": " ".join(CARTRIDGES), "HF_HOME": "/cache"})
)
app = modal.App("cartridges-server", image=image)


@app.function(
    gpu=GPU,
    volumes={"/cache": modal.Volume.from_name("huggingface-cache", create_if_missing=True)},
    secrets=[modal.Secret.from_name("cartridges-api-key"), modal.Secret.from_name("huggingface")],
    scaledown_window=300,
    timeout=3600,
)
@modal.concurrent(max_inputs=64)
@modal.web_server(PORT, startup_timeout=900)
def serve() -> None:
    with open("/tmp/key", "w", encoding="utf-8") as file:
        file.write(os.environ["API_KEY"])
    command = ["python", "-m", "cartridges_jax.serve", f"--model={MODEL}", "--dtype=bfloat16"]
    command += ["--host=0.0.0.0", f"--port={PORT}", "--api-key-file=/tmp/key"]
    subprocess.Popen([*command, *(f"--cartridge={cartridge}" for cartridge in CARTRIDGES)])
