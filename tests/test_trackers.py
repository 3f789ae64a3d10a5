"""Dashboards, read back from the files that they write."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
from tensorboardX.proto import event_pb2
from tiny_runs import config_of, metrics_of, settings_in
from wandb.proto.wandb_internal_pb2 import RunRecord

from cartridges_jax.training.evals.during import EvalsConfig, GenerationEval, LossEval
from cartridges_jax.training.run import train
from cartridges_jax.training.trackers import TensorBoard, TrackConfig, answers_table


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    tiny.write_dataset(tmp_path / "dataset.parquet", tiny.model())
    (tmp_path / "corpus.txt").write_text(tiny.TEXT, encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text('{"question": "Who sleeps?", "answer": "the owl"}\n', encoding="utf-8")
    evals = EvalsConfig(
        loss=(LossEval("held_out", str(tmp_path / "dataset.parquet")),),
        generation=(GenerationEval("facts", str(tmp_path / "questions.jsonl"), max_tokens=3),),
    )
    return settings_in(tmp_path, tmp_path) | {"num_steps": 3, "evals": evals}


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows: a session hides what earlier ones wrote from its first step on."""
    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, content, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return found


def test_tensorboard_gets_upstreams_names(settings: dict[str, Any]):
    config = config_of(settings, track=TrackConfig(tensorboard=True))
    train(config, tiny.model())
    found, lines = scalars(Path(config.output_dir) / "tensorboard"), metrics_of(config.output_dir)
    for line in lines:
        names = {"loss": "train/loss", "lr": "optimizer/lr_group0", "eval_held_out/loss": "eval_held_out/loss"}
        for ours, theirs in names.items():
            if ours in line:
                assert found[theirs, line["step"] + 1] == pytest.approx(line[ours], rel=1e-6)
    assert found["train/num_input_tokens", 3] == lines[-2]["tokens"]
    assert ("generate_facts/table/text_summary", 0) in found
    train(config, tiny.model())  # nothing is left to do, and nothing is lost
    assert scalars(Path(config.output_dir) / "tensorboard") == found


def test_sessions_of_the_same_second_keep_what_each_wrote(tmp_path: Path):
    for first_step in (0, 1):
        session = TensorBoard(tmp_path, first_step)
        session.step(first_step + 1, {"loss": 1.0})
        session.close()
    assert {("train/loss", 1), ("train/loss", 2)} <= scalars(tmp_path / "tensorboard").keys()


def test_dashboards_may_change_when_a_run_goes_on(settings: dict[str, Any]):
    train(config_of(settings), tiny.model())
    train(config_of(settings, track=TrackConfig(tensorboard=True)), tiny.model())


def test_weights_and_biases_gets_them_offline(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(settings, track=TrackConfig(wandb="offline", project="owls", name="first night"))
    train(config, tiny.model())
    (log,) = (Path(config.output_dir) / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    names = b"train/loss", b"optimizer/lr_group0", b"train/num_target_tokens", b"eval_held_out/loss"
    for name in (*names, b"generate_facts/table"):
        assert (name in content) == (name != b"train/num_target_tokens"), name
    for field in ({"project": "owls"}, {"display_name": "first night"}):
        written = RunRecord(**field).SerializeToString() in content  # the settings hold them too, in other fields
        assert written, field


def test_answers_stay_in_their_cells():
    row = dict.fromkeys(("eval", "index", "sample_idx", "prompt", "answer", "score"), 1) | {"pred": "a | b\nc"}
    assert answers_table([row]).splitlines()[2] == "| 1 | 1 | 1 | 1 | 1 | a \\| b c | 1 |"
