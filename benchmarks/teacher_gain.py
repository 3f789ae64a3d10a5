"""How much a dataset has to teach: what the teacher's answers owe to the text, by type of seed prompt.

    python benchmarks/teacher_gain.py runs/…/synth/dataset.parquet [--limit=256]

For every answer: its log-likelihood with the chunk in the system prompt, minus that without, per token. An answer that
owes nothing to the text (small talk, a repeated question, a made-up story) gains nothing and teaches nothing.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import cartridges_jax as cj
from cartridges_jax.training.evals.loss import answer_nll
from synth.conversation import Conversation, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=256, help="conversations, spread over the dataset")
    args = parser.parse_args()
    model = cj.load_model(args.model)
    conversations = read(args.dataset)
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for conversation in conversations[:: max(1, len(conversations) // args.limit)]:
        if conversation.messages[1].token_ids:
            groups[conversation.metadata["seed_prompt_type"]].append(conversation)
    print("| seed prompt | conversations | tokens of an answer | gain, nats per token |\n|---|---|---|---|")
    for kind, members in sorted(groups.items()):
        with_text, without, tokens = measure(model, members)
        print(f"| {kind} | {len(members)} | {tokens / len(members):.0f} | {without - with_text:.2f} |", flush=True)


def measure(model: cj.LanguageModel, conversations: list[Conversation]) -> tuple[float, float, int]:
    """NLL per answer token with and without the chunk, and the number of tokens."""
    answers = [list(c.messages[1].token_ids or ()) for c in conversations]
    asked = [{"role": "user", "content": c.messages[0].content} for c in conversations]
    systems = [{"role": "system", "content": c.system_prompt} for c in conversations]
    chat = model.tokenizer.chat_ids
    with_text = [chat([s, m], add_generation_prompt=True) for s, m in zip(systems, asked, strict=True)]
    without = [chat([m], add_generation_prompt=True) for m in asked]
    counts = sum(map(len, answers))
    return answer_nll(model, None, with_text, answers), answer_nll(model, None, without, answers), counts


if __name__ == "__main__":
    main()
