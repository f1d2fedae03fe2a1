"""Anthropic's messages as vLLM 0.32 answers them, streams too; the shapes are those of its anthropic/serving.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from server.engine.scripted_forms import Form, arguments_of, forced, last_text, named_event, objects
from server.engine.scripted_models import Asked, Call, EngineError, RequestRefused, ScriptedModels


class MessagesForm(Form):
    def asked(self, body: dict[str, Any]) -> Asked:
        if not isinstance(body.get("max_tokens"), int):
            raise RequestRefused(400, "max_tokens: Field required", "max_tokens")
        (choice,) = objects([body.get("tool_choice") or {}], "tool_choice")
        named = choice.get("name") if choice.get("type") == "tool" else None
        tools = [(tool.get("name"), tool.get("input_schema")) for tool in objects(body.get("tools"), "tools")]
        return Asked(last_text(body.get("messages"), "messages"), forced(named, choice.get("type") == "any", tools))

    def whole(self, call: Call, text: str) -> dict[str, Any]:
        filling = {"text": text} if call.tool is None else {"input": arguments_of(text)}
        content = {**self._block(call), **filling}
        reason = self._stop_reason(call)
        return {**self._head(call), "content": [content], "stop_reason": reason, "usage": self._usage(call)}

    async def stream(self, models: ScriptedModels, call: Call) -> AsyncIterator[str]:
        usage = {"input_tokens": call.prompt_tokens, "output_tokens": 0}
        head = {**self._head(call), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        try:
            yield named_event({"type": "message_start", "message": head})
            yield named_event({"type": "content_block_start", "index": 0, "content_block": self._block(call)})
            async for _, word in models.speak(call):
                yield named_event({"type": "content_block_delta", "index": 0, "delta": self._delta(call, word)})
            yield named_event({"type": "content_block_stop", "index": 0})
            ending = {"stop_reason": self._stop_reason(call), "stop_sequence": None}
            yield named_event({"type": "message_delta", "delta": ending, "usage": self._usage(call)})
            yield named_event({"type": "message_stop"})
        except EngineError as error:
            yield named_event({"type": "error", "error": {"type": "internal_error", "message": str(error)}})

    def refused(self, refusal: RequestRefused) -> dict[str, Any]:
        return {"type": "error", "error": {"type": refusal.kind, "message": refusal.message}}

    def failed(self, error: EngineError) -> dict[str, Any]:
        return {"type": "error", "error": {"type": "InternalServerError", "message": str(error)}}

    @staticmethod
    def _head(call: Call) -> dict[str, Any]:
        return {"id": f"chatcmpl-{call.number:08d}", "type": "message", "role": "assistant", "model": call.model}

    @staticmethod
    def _block(call: Call) -> dict[str, Any]:
        """The answer's one content block, still empty."""
        if call.tool is None:
            return {"type": "text", "text": ""}
        return {"type": "tool_use", "id": f"chatcmpl-tool-{call.number:08d}", "name": call.tool.name, "input": {}}

    @staticmethod
    def _delta(call: Call, word: str) -> dict[str, Any]:
        if call.tool is not None:
            return {"type": "input_json_delta", "partial_json": word}
        return {"type": "text_delta", "text": word}

    @staticmethod
    def _stop_reason(call: Call) -> str:
        if call.is_cut:
            return "max_tokens"
        return "end_turn" if call.tool is None else "tool_use"

    @staticmethod
    def _usage(call: Call) -> dict[str, Any]:
        """Anthropic counts what came from the cache beside the input, not in it."""
        counts = {"input_tokens": call.prompt_tokens, "output_tokens": len(call.words)}
        if call.cached_tokens is None:
            return counts
        counts["input_tokens"] -= call.cached_tokens
        return {**counts, "cache_read_input_tokens": call.cached_tokens}
