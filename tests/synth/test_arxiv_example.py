"""configs/arxiv.py from end to end, without a network: a folder of LaTeX, and a stub of the inference server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stub_server import MODEL, StubServer

from synth import conversation

PAPER = {
    "main.tex": r"""\documentclass{article} % for a journal
\title{The Caches of Lighthouse Island}
\begin{document}
\maketitle
\input{sections/method} % the heart of it
\section{Results}
Fifty-one cartridges were lit in the winter of 1907, one for each keeper. % TODO: check with Ada
\end{document}
""",
    "sections/method.tex": r"\section{Method}" + "\n" + "Every lamp was filled with oil of the same barrel. \n" * 120,
}


def test_a_folder_of_latex_becomes_a_dataset_offline(server: StubServer, tmp_path: Path):
    paper, output = tmp_path / "paper", tmp_path / "out"
    for name, text in PAPER.items():
        (paper / name).parent.mkdir(parents=True, exist_ok=True)
        (paper / name).write_text(text)
    command = [sys.executable, "-m", "synth", "--config=configs/arxiv.py:synth", f"--config.output_dir={output}"]
    command += [f"--config.resource.path={paper}", f"--config.client.base_url={server.url}"]
    command += [f"--config.client.model={MODEL}", "--config.num_conversations=40"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    corpus = (output / "corpus.txt").read_text()
    assert "Every lamp" in corpus and "Fifty-one cartridges" in corpus
    assert "TODO" not in corpus and "\\input" not in corpus
    made = conversation.read(output / "dataset.parquet")
    assert len(made) == 40
    assert {one.metadata["seed_prompt_type"] for one in made} == {
        "structuring",
        "summarization",
        "question",
        "use_case",
        "creative",
    }
    for one in made:
        assert one.metadata["resource"] == "paper"
        start, end = one.metadata["chunk_span"]
        assert 512 <= end - start <= 1024
        chunk = corpus.encode()[start:end].decode()
        assert chunk.strip() in one.system_prompt, "a window of the corpus, in the stub's tokens of a byte"
    lines = [line for line in corpus.splitlines() if len(line) > 20]
    assert not any(line in message.content for one in made for message in one.messages for line in lines)
