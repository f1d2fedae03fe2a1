"""Step 5 of the demo: both adapters on one server with one base in memory, asked through the OpenAI SDK and scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI

from examples.agent_routing.console import StepFailed
from examples.agent_routing.data import Row
from examples.agent_routing.learn import ANSWER_TOKENS, Results, in_words
from examples.agent_routing.prompts import Message, base_prompt, prompt
from examples.agent_routing.workshop import Workshop
from training.evaluate import generate_http, latency
from training.scores import Scores, score

BARS = {"label_accuracy": 0.88, "exact_match": 0.50, "field_f1": 0.75}  # English, over HTTP, on the whole test set
BAR_NAMES = {"label_accuracy": "intent accuracy", "exact_match": "exact match", "field_f1": "slot F1"}
LATENCY_ROWS = 8
LATENCY_TOKENS = 16
BASE_ROWS_EVERY = 2  # of the test set; the base is far from any bar
CONCURRENCY = 64  # on two cores a base prompt takes 0.31 s at 64, 0.58 s at 16


def push(shop: Workshop, results: Results, folder: Path, name: str) -> str:
    """`hotshoe push`; waits until the version may answer, returns its id."""
    pushed = shop.hotshoe_json("push", folder, "--name", name)
    if pushed.get("status") != "ready":
        raise StepFailed(f"{pushed.get('id', name)} is {pushed.get('status')} after the push: {pushed.get('reasons')}")
    results.adapters.append(pushed)
    shop.console.lines(f"{pushed['id']}: {pushed['status']}, rank {pushed['rank']}, {pushed['size_bytes']:,} bytes")
    return str(pushed["id"])


def serve_both(shop: Workshop, results: Results) -> None:
    """Push, ask each of the three models, score the test sets; fails below the bars."""
    push(shop, results, shop.folder / "router-en", "router-en")
    push(shop, results, shop.folder / "router-vi", "router-vi")
    client = sdk(shop)
    models = [model.id for model in client.models.list()]
    shop.console.lines(f"GET /v1/models: {', '.join(models)}")
    if models != [results.base_id, "router-en", "router-vi"]:
        raise StepFailed(f"/v1/models lists {models}; expected the base first, then router-en and router-vi.")
    english, vietnamese = results.data("english"), results.data("vietnamese")
    for model, row in (("router-en", english.splits["test"][0]), ("router-vi", vietnamese.splits["test"][0])):
        show_stream(shop, client, model, prompt(row.sentence))
    show_stream(shop, client, results.base_id, [{"role": "user", "content": "Say hello in five words."}])
    tuned = evaluate(shop, "router-en", english.splits["test"], results, "router-en@1, test")
    evaluate(shop, "router-vi", vietnamese.splits["test"], results, "router-vi@1, test")
    rows = english.splits["test"][::BASE_ROWS_EVERY]
    asked = [base_prompt(row.sentence, english.labels, results.examples) for row in rows]
    evaluate(shop, results.base_id, rows, results, "base, test", asked)
    measure_latency(shop, results, english.splits["test"])
    check_bars(tuned)


def sdk(shop: Workshop) -> OpenAI:
    """The official client; retries are off, so that a failed request is seen."""
    return OpenAI(base_url=f"{shop.url}/v1", api_key="none", max_retries=0, timeout=120)


def show_stream(shop: Workshop, client: OpenAI, model: str, messages: list[Any]) -> None:
    """One streamed answer, put together and printed; fails when the response names no concrete version."""
    pieces, named = [], ""
    stream = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64, stream=True)
    for chunk in stream:
        named = chunk.model
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    shop.console.lines(f"{model} -> {named}: {messages[-1]['content']!r} -> {''.join(pieces).strip()!r}")
    if "router" in model and not named.startswith(f"{model}@"):
        raise StepFailed(f"The response of {model} names {named!r}, not a version of it.")


def evaluate(
    shop: Workshop,
    model: str,
    rows: Sequence[Row],
    results: Results,
    what: str,
    prompts: Sequence[list[Message]] | None = None,
) -> Scores:
    """Greedy answers over HTTP for all rows, scored under the name `what`; the texts stay in `results.facts`."""
    answers = generate_http(
        shop.url,
        model,
        prompts or [prompt(row.sentence) for row in rows],
        max_tokens=ANSWER_TOKENS,
        concurrency=CONCURRENCY,
        progress=lambda done, total: shop.console.progress(what, done, total),
    )
    found = score([row.answer for row in rows], [answer.text for answer in answers])
    results.scores[what] = found
    results.facts[f"answers: {what}"] = [answer.text for answer in answers]
    shop.console.lines(f"{what}: {in_words(found)}")
    return found


def measure_latency(shop: Workshop, results: Results, rows: Sequence[Row]) -> None:
    """TTFT and TPOT of each model, one request at a time, all with the same short prompts."""
    for model in (results.base_id, "router-en", "router-vi"):
        asked = [prompt(row.sentence) for row in rows[:LATENCY_ROWS]]
        answers = generate_http(shop.url, model, asked, max_tokens=LATENCY_TOKENS, concurrency=1)
        results.latencies[model] = latency(answers)


def check_bars(scores: Scores) -> None:
    """Raises StepFailed with every bar that was missed."""
    missed = [
        f"{BAR_NAMES[name]} is {getattr(scores, name):.3f}, at least {bar:.2f} is expected"
        for name, bar in BARS.items()
        if getattr(scores, name) < bar
    ]
    if missed:
        raise StepFailed(f"router-en misses its bar on the English test set: {'; '.join(missed)}.")
