"""OpenAI's responses as vLLM 0.32 answers them, streams too; the shapes are those of its openai/responses/."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from server.engine.scripted_forms import Form, forced, last_text, named_event, objects
from server.engine.scripted_models import Asked, Call, RequestRefused, ScriptedModels

# What a response repeats of a request that left it out.
DEFAULTS: dict[str, Any] = {
    "background": False,
    "error": None,
    "instructions": None,
    "metadata": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "service_tier": "auto",
    "temperature": 1.0,
    "text": None,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


class ResponsesForm(Form):
    def asked(self, body: dict[str, Any]) -> Asked:
        given = body.get("input")
        if not given:
            raise RequestRefused(400, "input: Field required", "input")
        choice = body.get("tool_choice")
        named = choice.get("name") if isinstance(choice, dict) else None
        tools = [(tool.get("name"), tool.get("parameters")) for tool in objects(body.get("tools"), "tools")]
        prompt = given if isinstance(given, str) else last_text(given, "input")
        return Asked(prompt, forced(named, choice == "required", tools))

    def whole(self, call: Call, text: str) -> dict[str, Any]:
        return self._response(call, [self._item(call, text)])

    async def stream(self, models: ScriptedModels, call: Call) -> AsyncIterator[str]:
        """As vLLM's: an engine that fails ends it without a last event, and the connection with it."""
        begun = {**self._response(call, []), "status": "in_progress", "incomplete_details": None, "usage": None}
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
            *self._opening(call),
        ]
        number = 0
        for event in events:
            yield named_event({**event, "sequence_number": number})
            number += 1
        text = ""
        async for _, word in models.speak(call):
            text += word
            yield named_event({**self._delta(call, word), "sequence_number": number})
            number += 1
        for event in [*self._closing(call, text), {"type": "response.completed", "response": self.whole(call, text)}]:
            yield named_event({**event, "sequence_number": number})
            number += 1

    def _response(self, call: Call, output: list[dict[str, Any]]) -> dict[str, Any]:
        count = len(call.words)
        usage = {
            "input_tokens": call.prompt_tokens,
            "input_tokens_details": {"cached_tokens": call.cached_tokens or 0, "cache_write_tokens": 0},
            "output_tokens": count,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": call.prompt_tokens + count,
        }
        return {
            **DEFAULTS,
            "id": f"resp_{call.number:08d}",
            "object": "response",
            "created_at": int(time.time()),
            "model": call.model,
            "status": "incomplete" if call.is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if call.is_cut else None,
            "max_output_tokens": count,
            "output": output,
            "usage": usage,
        }

    @staticmethod
    def _item(call: Call, text: str, status: str = "completed") -> dict[str, Any]:
        if call.tool is not None:
            named = {"call_id": f"call_{call.number:08d}", "name": call.tool.name, "arguments": text}
            return {"type": "function_call", "id": f"fc_{call.number:08d}", **named, "status": status}
        content = [_part(text)] if status == "completed" else []
        message = {"type": "message", "id": f"msg_{call.number:08d}", "role": "assistant"}
        return {**message, "content": content, "status": status}

    def _place(self, call: Call) -> dict[str, Any]:
        """Where in the output the answer's one item is."""
        place = {"item_id": self._item(call, "")["id"], "output_index": 0}
        return place if call.tool is not None else {**place, "content_index": 0}

    def _opening(self, call: Call) -> list[dict[str, Any]]:
        added = {"type": "response.output_item.added", "output_index": 0, "item": self._item(call, "", "in_progress")}
        if call.tool is not None:
            return [added]
        return [added, {"type": "response.content_part.added", **self._place(call), "part": _part("")}]

    def _delta(self, call: Call, word: str) -> dict[str, Any]:
        if call.tool is not None:
            return {"type": "response.function_call_arguments.delta", **self._place(call), "delta": word}
        return {"type": "response.output_text.delta", **self._place(call), "delta": word, "logprobs": []}

    def _closing(self, call: Call, text: str) -> list[dict[str, Any]]:
        place = self._place(call)
        done = {"type": "response.output_item.done", "output_index": 0, "item": self._item(call, text)}
        if call.tool is not None:
            kind = "response.function_call_arguments.done"
            return [{"type": kind, **place, "name": call.tool.name, "arguments": text}, done]
        return [
            {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **place, "part": _part(text)},
            done,
        ]


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
