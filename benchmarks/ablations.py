"""What the trainer's choices are worth, each measured: the paper's ablations, and gap closed against time.

    make quickstart                                              # leaves conversations and questions behind
    python benchmarks/ablations.py --run=runs/document-… [--seeds=3] [--only=starts-4,objectives-4] [--shares=4,10,20]
    python benchmarks/ablations.py --run=runs/document-… --second=runs/story-…  # also composition, of two documents
    python benchmarks/ablations.py --run=… --five=A/dataset.parquet --generic=B/dataset.parquet  # also seed prompts
    python benchmarks/ablations.py --run=… --server=http://127.0.0.1:8000/v1  # also a summary, asked of that server
    python benchmarks/ablations.py --document=D.txt --dataset=S.parquet --questions=Q.jsonl      # any other document

Every run is a training run of the library in OUTPUT/runs/, and its result a file there: the command, given again, goes
on where it ended, and report.md shows what is there so far. Another text, or other questions, need another OUTPUT. A
dataset of other seed prompts comes from `python -m synth --config=configs/quickstart.py:synth --config.seed_prompts=…`
with a server running.

Measured is the gap closed on the reference answers (no text is generated), before the first step and every few steps.
Time is that of the initial state, compilation included, plus steps times the time of a step. An initial state of one
kind and size costs the same in every run, and so does a step of one size; other work on the machine does not: of both,
each run counts the fastest run's (of steps, the median). Evaluation does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.composition import compose
from cartridges_jax.command_line import files
from cartridges_jax.initial.chunks import MatchingConfig
from cartridges_jax.initial.initializers import InitConfig, initial_cartridge
from cartridges_jax.initial.texts import SummaryConfig
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.data import read_corpus, read_examples
from cartridges_jax.training.evals.during import EvalsConfig, LossEval, general_nll
from cartridges_jax.training.evals.loss import answer_loss
from cartridges_jax.training.evals.questions import answer_examples, questions_of
from cartridges_jax.training.metrics import METRICS, history
from cartridges_jax.training.optim import OptimConfig
from cartridges_jax.training.run import INITIAL, train

MODEL = "smollm2-135m"
INSTRUCTION = "{question} Answer with a short phrase only."
KEY = "eval_questions/loss"
CARTRIDGE = "cartridge.safetensors"  # of a training run
STARTS = ("attention_matching", "text", "sampled_chunks", "random_text", "random_vectors")
SIZES = (40, 20, 10, 4, 2)  # p is the document's tokens over this
BUDGETS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "profile": {"budget": "profile"},
    "profile, queries of conversations too": {"budget": "profile", "matching": MatchingConfig("both")},
    "the document's own attention": {"budget": "attention"},
    "profile, at most 4 times the average": {"budget": "profile", "max_share": 4.0},
    "profile, at most 8 times the average": {"budget": "profile", "max_share": 8.0},
    "profile, at most 16 times the average": {"budget": "profile", "max_share": 16.0},
}
MATCHED = OptimConfig(lr=4e-3, warmup_steps=4)  # behind attention matching with as many slots for every head
PLAIN = OptimConfig(lr=2e-2, warmup_steps=4)  # behind any other start
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine, 4 steps of warm-up": {},
    "no warm-up": {"warmup_steps": 0},
    "linear": {"schedule": "linear"},
    "constant": {"schedule": "constant"},
    "gradients clipped at 0.05": {"clip_norm": 0.05},
}
ON_BUDGETS: dict[str, dict[str, Any]] = {  # training on top of a start with slots for each head
    "conversations": {"optim": OptimConfig(lr=5e-4, warmup_steps=4)},  # as in configs/quickstart.py
    "the document 8 times": {"dataset": None, "repeats": 8, "optim": OptimConfig(lr=1e-3, warmup_steps=4)},
    "the document 16 times": {"dataset": None, "repeats": 16, "optim": OptimConfig(lr=2e-3, warmup_steps=4)},
}
RECIPE = "upstream's recipe"  # its start, loss, reduction, learning rate and schedule, in our batches
UPSTREAM = OptimConfig(lr=2e-2, schedule="constant")


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: Path
    dataset: Path
    questions: Path

    @classmethod
    def of_run(cls, folder: Path, questions: Path | None) -> Document:
        """The document of a quickstart's run directory, as its report names it."""
        config = json.loads((folder / "report.json").read_text(encoding="utf-8"))["config"]
        asked = questions or Path(config["questions"] or folder / "held_out.parquet")
        return cls(folder.name, Path(config["corpus"]), folder / "synth" / "dataset.parquet", asked)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One line of a table and one curve: what differs from the quickstart's training."""

    study: str
    label: str
    document: Document
    share: int
    kind: str = "attention_matching"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_frozen: int = 1
    init: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings of the initial state

    def run_name(self, seed: int) -> str:
        """Of what is trained, whatever study asks for it."""
        init = [sorted(self.init.items())] if self.init else []
        changes = repr((str(self.document.dataset), sorted(self.changes.items()), *init)).encode()
        digest = hashlib.sha256(changes).hexdigest()[:8]
        return f"{self.document.name}-{self.kind}-{self.share}-{self.num_frozen}-{digest}-seed{seed}"

    def start_name(self, seed: int) -> str:
        """Of the initial state, which trials share."""
        return dataclasses.replace(self, changes={}, num_frozen=1).run_name(seed)


def main() -> None:
    args = _arguments()
    model = load_model(MODEL, "auto")
    first = args.own or Document.of_run(args.run, args.questions)
    trials = list(_trials(first, args))
    pair: list[Trial] = []
    if args.second:
        second = Document.of_run(args.second, args.second_questions)
        pair = [Trial("composition", document.name, document, args.shares[0]) for document in (first, second)]
    chosen = [trial for trial in [*trials, *pair] if args.only is None or trial.study in args.only]
    bench = Bench(model, args.output, args.server)
    for seed in range(args.seeds):
        for trial in chosen:
            bench.run(trial, seed)
            bench.report(trials, pair, args.seeds)
        if pair and pair[0] in chosen:
            bench.compose(pair, seed)
            bench.report(trials, pair, args.seeds)
    print(f"report: {args.output / 'report.md'}")


def _trials(document: Document, args: argparse.Namespace) -> Iterator[Trial]:
    upstream = {"tail": "drop", "reduction": "row", "optim": UPSTREAM, "num_epochs": args.upstream_epochs}
    tokens = {"targets": "tokens", "tail": "drop"}

    starts = STARTS if args.server is None else (*STARTS, "summary")
    for share in args.shares:
        yield Trial(f"claim-{share}", "attention_matching", document, share)
        yield Trial(f"claim-{share}", RECIPE, document, share, "text", upstream)
    for share, kind in itertools.product(args.shares, ("attention_matching", "text")):
        for label, changes in (("bucket", {}), ("next token", tokens), ("drop", {"tail": "drop"})):
            yield Trial(f"objectives-{share}", f"{label} after {kind}", document, share, kind, changes)
    for kind, num_frozen in itertools.product(("attention_matching", "text"), (1, 0)):
        label = f"{'frozen' if num_frozen else 'trained'} first slot, {kind}"
        yield Trial("sink", label, document, args.shares[0], kind, num_frozen=num_frozen)
    yield Trial("int8", "as loaded", document, args.shares[0])
    yield Trial("int8", "int8 base", document, args.shares[0], changes={"quantization": "int8"})
    for label, changes in SCHEDULES.items():
        optim = {"optim": dataclasses.replace(MATCHED, **changes)} if changes else {}
        yield Trial("optim", label, document, args.shares[0], changes=optim)
    for share, kind in itertools.product(args.shares, starts):
        yield Trial(f"starts-{share}", kind, document, share, kind)
    for share in SIZES:
        yield Trial("sizes", f"1 of {share}", document, share)
    for share, (label, init) in itertools.product(args.shares, BUDGETS.items()):
        yield Trial(f"budgets-{share}", label, document, share, init=init)
    for share, (label, changes) in itertools.product(args.shares, ON_BUDGETS.items()):
        yield Trial(f"on-budgets-{share}", label, document, share, changes=changes, init={"budget": "profile"})
    if args.five and args.generic:
        for label, dataset in (("five", args.five), ("generic", args.generic)):
            other = dataclasses.replace(document, dataset=dataset)
            for kind in ("attention_matching", "text"):
                yield Trial("seed-prompts", f"{label} after {kind}", other, args.shares[0], kind)


class Bench:
    def __init__(self, model: LanguageModel, output: Path, server: str | None):
        self._model, self._output = model, output
        self._summary = SummaryConfig(server, MODEL)
        self._off_topic = functools.cache(lambda: general_nll(model, None))

    def run(self, trial: Trial, seed: int) -> dict[str, Any]:
        """The result of a trial: from its file, or else by training."""
        folder = self._output / "runs" / trial.run_name(seed)
        path = folder / "result.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        nothing, full, tokens = self._bounds(trial.document)
        init = InitConfig(
            trial.kind,  # type: ignore[arg-type]
            num_slots=tokens // trial.share,
            num_frozen=trial.num_frozen,
            summary=self._summary if trial.kind == "summary" else SummaryConfig(),
            **trial.init,
        )
        settings: dict[str, Any] = {"tail": "bucket", "optim": MATCHED if "matching" in trial.kind else PLAIN}
        settings |= {"dataset": str(trial.document.dataset)} | trial.changes
        every = 5 * settings.get("num_epochs", 1)
        evaluation = LossEval("questions", None, str(trial.document.questions), INSTRUCTION)
        config = TrainConfig(
            corpus=str(trial.document.text),
            output_dir=str(folder),
            model=MODEL,
            seed=seed,
            seq_len=256,
            batch_size=4,
            checkpoint_every=10,
            init=init,
            evals=EvalsConfig(every, (evaluation,)),
            **settings,
        )
        init_seconds = self._start(trial, config, folder)
        cartridge = Cartridge.load(train(config, self._model))
        lines = history(folder / METRICS)
        taken = [line["seconds"] for line in lines if "loss" in line]
        each = [b - a for a, b in itertools.pairwise(taken)]
        curve = [(line["step"] + 1, (nothing - line[KEY]) / (nothing - full)) for line in lines if KEY in line]
        result = {
            "slots": cartridge.average_slots,
            "steps": len(taken),
            "init_seconds": init_seconds,
            "step_seconds": statistics.median(each) if each else None,
            "curve": curve,
            "off_topic": general_nll(self._model, cartridge) - self._off_topic(),
        }
        files.write_text(path, json.dumps(result, indent=1) + "\n")
        return result

    def compose(self, pair: list[Trial], seed: int) -> None:
        """Of either document, the gap that each cartridge closes alone, and both in either order."""
        path = self._composed(pair, seed)
        if path.is_file():
            return
        a, b = (Cartridge.load(self._output / "runs" / trial.run_name(seed) / CARTRIDGE) for trial in pair)
        prefixes = (a, b, compose([a, b]), compose([b, a]))
        gaps = {trial.label: [self.gap(trial.document, prefix) for prefix in prefixes] for trial in pair}
        files.write_text(path, json.dumps(gaps, indent=1) + "\n")

    def gap(self, document: Document, cartridge: Cartridge) -> float:
        """How far from knowing nothing to knowing the document the cartridge goes."""
        nothing, full, _ = self._bounds(document)
        return (nothing - self._nll(document, cartridge)) / (nothing - full)

    def report(self, trials: list[Trial], pair: list[Trial], seeds: int) -> None:
        """Writes report.md and a plot for each study, of the results that are there."""
        studies: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for trial, seed in itertools.product(trials, range(seeds)):
            path = self._output / "runs" / trial.run_name(seed) / "result.json"
            if path.is_file():
                result = json.loads(path.read_text(encoding="utf-8"))
                result["seed"] = seed
                result["start"] = trial.start_name(0)
                result["step"] = trial.changes.get("quantization"), result["slots"]
                studies[trial.study][trial.label].append(result)
        _put_on_one_clock([r for results in studies.values() for of_label in results.values() for r in of_label])
        text = ["# Ablations", str(__doc__).split("\n\n")[-1].strip()]
        for study, results in studies.items():
            _plot(self._output / f"{study}.png", results)
            text += [f"## {study}", _table(results), *_against_upstream(results)]
            text.append(f"![gap closed against seconds]({study}.png)")
        done = [path for seed in range(seeds) if (path := self._composed(pair, seed)).is_file()]
        if done:
            composed = [json.loads(path.read_text(encoding="utf-8")) for path in done]
            _plot_composition(self._output / "composition.png", pair, composed)
            text += ["## composition", _composition(pair, composed), "![gap closed by each](composition.png)"]
        files.write_text(self._output / "report.md", "\n\n".join(text) + "\n")

    def _composed(self, pair: list[Trial], seed: int) -> Path:
        return self._output / "runs" / f"composition-{'-and-'.join(trial.run_name(seed) for trial in pair)}.json"

    def _start(self, trial: Trial, config: TrainConfig, folder: Path) -> float:
        """Puts the initial state where training finds it; the seconds that it took, when it was made."""
        made = self._output / "starts" / f"{trial.start_name(config.seed)}.safetensors"
        timed = made.with_suffix(".json")
        if not timed.is_file():
            examples = read_examples(trial.document.dataset, self._model.tokenizer)
            jax.clear_caches()  # compilation counts, also behind another run's
            begun = time.monotonic()
            start = initial_cartridge(config.init, self._model, read_corpus(config.corpus), examples, config.seed)
            jax.block_until_ready(start)
            seconds = time.monotonic() - begun
            start.save(made)
            files.write_text(timed, json.dumps(seconds))
        start: Cartridge = Cartridge.load(made).replace(num_frozen=trial.num_frozen)  # type: ignore[attr-defined]
        start.save(folder / INITIAL)
        return json.loads(timed.read_text(encoding="utf-8"))

    def _bounds(self, document: Document) -> tuple[float, float, int]:
        """NLL of the answers knowing nothing and with the full document before the question; the document's tokens."""
        path = self._output / f"bounds-{document.name}.json"
        if not path.is_file():
            corpus, tokenizer = read_corpus(document.text), self._model.tokenizer
            message = tokenizer.chat_ids([{"role": "system", "content": corpus}], add_generation_prompt=False)
            full = self._nll(document, Cartridge.from_tokens(self._model, message))
            files.write_text(path, json.dumps([self._nll(document, None), full, len(tokenizer.encode(corpus))]))
        return tuple(json.loads(path.read_text(encoding="utf-8")))

    def _nll(self, document: Document, prefix: Cartridge | None) -> float:
        tokenizer = self._model.tokenizer
        lay_out = tokenizer.chat_ids if prefix is None else tokenizer.turn_ids
        questions = questions_of(document.questions)
        asked = [[{"role": "user", "content": question.asked(INSTRUCTION)}] for question in questions]
        prompts = [lay_out(messages, add_generation_prompt=True) for messages in asked]
        answers = [tokenizer.encode(question.answer) for question in questions]
        total, count = answer_loss(self._model, prefix, answer_examples(prompts, answers))
        return total / count


def _put_on_one_clock(results: list[dict[str, Any]]) -> None:
    """Adds to each result the seconds of its curve, by the fastest start and the fastest step of its kind."""

    def fastest(kind: str, seconds: str, result: dict[str, Any]) -> float:
        alike = [other[seconds] for other in results if other[kind] == result[kind] and other[seconds] is not None]
        return min(alike, default=0.0)

    for result in results:
        start, step = (fastest(*of, result) for of in (("start", "init_seconds"), ("step", "step_seconds")))
        result["seconds"] = [start + steps * step for steps, _ in result["curve"]]


def _table(trials: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| | slots | steps | seconds | gap closed at the start | at the end | best | off the topic, nats | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, results in trials.items():
        start, end, best = (
            [read([gap for _, gap in result["curve"]]) for result in results]
            for read in (lambda gaps: gaps[0], lambda gaps: gaps[-1], max)
        )
        one = results[0]
        seconds = statistics.mean(result["seconds"][-1] for result in results)
        cells = [label, one["slots"], one["steps"], f"{seconds:.0f}", _spread(start), _spread(end), _spread(best)]
        cells += [_spread([result["off_topic"] for result in results]), len(results)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _composition(pair: list[Trial], composed: list[dict[str, list[float]]]) -> str:
    title = f"| gap of the questions about | {' | '.join(_columns(pair))} | seeds |"
    lines = [title, "| --- | --- | --- | --- | --- | --- |"]
    for trial in pair:
        gaps = zip(*(of_seed[trial.label] for of_seed in composed), strict=True)
        lines.append(f"| {trial.label} | {' | '.join(_spread(list(of)) for of in gaps)} | {len(composed)} |")
    return "\n".join(lines)


def _columns(pair: list[Trial]) -> list[str]:
    first, second = (trial.label for trial in pair)
    return [first, second, f"{first} + {second}", f"{second} + {first}"]


def _against_upstream(trials: dict[str, list[dict[str, Any]]]) -> list[str]:
    """When attention matching and distillation come to what upstream's recipe ends with."""
    sentences = []
    for ours, theirs in itertools.product(trials.get("attention_matching", []), trials.get(RECIPE, [])):
        if ours["seed"] != theirs["seed"]:
            continue
        seconds, (_, aim) = theirs["seconds"][-1], theirs["curve"][-1]
        timed = zip(ours["seconds"], ours["curve"], strict=True)
        reached = next((when for when, (_, gap) in timed if gap >= aim), None)
        found = "never" if reached is None else f"after {reached:.0f} s, {reached / seconds:.2f} of the time"
        sentences.append(f"{RECIPE} ends at {aim:.3f} after {seconds:.0f} s; attention matching reaches that {found}.")
    return sentences


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def _plot(path: Path, trials: dict[str, list[dict[str, Any]]]) -> None:
    with _axis(path) as axis:
        for color, (label, results) in enumerate(trials.items()):
            for i, result in enumerate(results):
                gaps = [gap for _, gap in result["curve"]]
                axis.plot(result["seconds"], gaps, marker=".", color=f"C{color % 10}", label=None if i else label)
        axis.set_xlabel("seconds")


def _plot_composition(path: Path, pair: list[Trial], composed: list[dict[str, list[float]]]) -> None:
    with _axis(path) as axis:
        for i, trial in enumerate(pair):
            gaps = [statistics.mean(of) for of in zip(*(of_seed[trial.label] for of_seed in composed), strict=True)]
            places = [place + 0.4 * i - 0.2 for place in range(len(gaps))]
            axis.bar_label(axis.bar(places, gaps, 0.38, label=f"questions about {trial.label}"), fmt="%.2f", padding=2)
        axis.set_xticks(range(len(gaps)), [name.replace(" + ", "\n+ ") for name in _columns(pair)], fontsize=8)


@contextlib.contextmanager
def _axis(path: Path) -> Iterator[Any]:
    """To draw gaps on, which become a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    yield axis
    axis.set_ylabel("gap closed")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a quickstart's run directory")
    parser.add_argument("--document", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--second", type=Path, help="the run directory of another document, for composition")
    parser.add_argument("--second-questions", type=Path)
    parser.add_argument("--five", type=Path, help="conversations from the paper's five seed prompts")
    parser.add_argument("--generic", type=Path, help="as many from one generic prompt")
    parser.add_argument("--server", help="http://…/v1, which writes a summary to start from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--upstream-epochs", type=int, default=4, help="of upstream's recipe (default: 4)")
    parser.add_argument("--shares", type=_numbers, default=[4, 10, 20], help="default: 4,10,20")
    parser.add_argument("--only", type=lambda text: text.split(","), help="studies, such as starts-4,objectives-4,sink")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    args.own = None
    if args.document is not None:
        if args.dataset is None or args.questions is None:
            parser.error("--document needs --dataset and --questions")
        args.own = Document(args.document.stem, args.document, args.dataset, args.questions)
    elif args.run is None:
        parser.error("give --run, or --document with --dataset and --questions")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
