"""The wire forms of the scripted engine's answers: what all have in common, and OpenAI's chat and completions."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from server.engine.scripted_models import Asked, Call, EngineError, RequestRefused, ScriptedModels, Tool
from server.receiving import ClientGone, while_there

DONE = "data: [DONE]\n\n"


async def _joined(models: ScriptedModels, call: Call) -> str:
    return "".join([word async for _, word in models.speak(call)])


class Form:
    """One wire form: how a request is read, and how whole answers, streams and errors look."""

    @classmethod
    async def answer(cls, request: Request) -> Response:
        models: ScriptedModels = request.app.state.models
        form = cls()
        try:
            body = await _json_object(request)
            call = models.read(body, form.asked(body))
        except RequestRefused as refusal:
            return JSONResponse(form.refused(refusal), status_code=refusal.status)
        if call.is_stream:
            return StreamingResponse(form.stream(models, call), media_type="text/event-stream")
        try:
            text = await while_there(_joined(models, call), request.receive)
        except EngineError as error:
            return JSONResponse(form.failed(error), status_code=500)
        except ClientGone:  # as vLLM aborts a request that nobody waits for
            return Response(status_code=499)
        return JSONResponse(form.whole(call, text))

    def asked(self, body: dict[str, Any]) -> Asked:
        """Raises RequestRefused."""
        raise NotImplementedError

    def whole(self, call: Call, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def stream(self, models: ScriptedModels, call: Call) -> AsyncIterator[str]:
        raise NotImplementedError

    def refused(self, refusal: RequestRefused) -> dict[str, Any]:
        return _error(refusal.message, refusal.kind, refusal.param, refusal.status)

    def failed(self, error: EngineError) -> dict[str, Any]:
        return _error(str(error), "InternalServerError", None, 500)


class ChoicesForm(Form):
    """OpenAI's two older forms: choices, chunks of choices, one `[DONE]`."""

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]

    def whole(self, call: Call, text: str) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": call.finish_reason, **self.choice(call, text)}
        return {**self._head(call), "object": self.object_name, "choices": [choice], "usage": call.usage}

    async def stream(self, models: ScriptedModels, call: Call) -> AsyncIterator[str]:
        head = {**self._head(call), "object": self.chunk_name}
        try:
            for opening in self.opening(call):
                yield data_event({**head, "choices": [{"index": 0, "finish_reason": None, **opening}]})
            async for i, word in models.speak(call):
                reason = call.finish_reason if i == len(call.words) - 1 else None
                choice = {"index": 0, "finish_reason": reason, **self.delta(call, word)}
                yield data_event({**head, "choices": [choice]})
            if call.has_usage_chunk:
                yield data_event({**head, "choices": [], "usage": call.usage})
        except EngineError as error:
            yield data_event(self.failed(error))
        yield DONE

    def opening(self, call: Call) -> list[dict[str, Any]]:
        return []

    def choice(self, call: Call, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, call: Call, word: str) -> dict[str, Any]:
        raise NotImplementedError

    def _head(self, call: Call) -> dict[str, Any]:
        return {"id": f"{self.id_prefix}-{call.number:08d}", "created": int(time.time()), "model": call.model}


class ChatForm(ChoicesForm):
    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def asked(self, body: dict[str, Any]) -> Asked:
        choice = body.get("tool_choice")
        named = objects([choice.get("function")], "tool_choice")[0].get("name") if isinstance(choice, dict) else None
        tools = objects([tool.get("function") for tool in objects(body.get("tools"), "tools")], "tools")
        tool = forced(named, choice == "required", [(one.get("name"), one.get("parameters")) for one in tools])
        return Asked(last_text(body.get("messages"), "messages"), tool)

    def opening(self, call: Call) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if call.tool is None:
            return [{"delta": delta, "logprobs": None}]
        begun = {"id": _tool_id(call), "type": "function", "index": 0}
        function = {"name": call.tool.name, "arguments": ""}
        return [{"delta": delta}, {"delta": {"tool_calls": [{**begun, "function": function}]}}]

    def choice(self, call: Call, text: str) -> dict[str, Any]:
        logprobs = None
        if call.top_logprobs is not None:
            logprobs = {"content": [self._token(call, word) for word in call.words]}
        message: dict[str, Any] = {"role": "assistant", "content": text, "tool_calls": []}
        if call.tool is not None:
            function = {"name": call.tool.name, "arguments": text}
            tool_calls = [{"id": _tool_id(call), "type": "function", "function": function}]
            message |= {"content": "", "tool_calls": tool_calls}
        return {"message": message, "logprobs": logprobs}

    def delta(self, call: Call, word: str) -> dict[str, Any]:
        if call.tool is not None:
            return {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": word}}]}, "logprobs": None}
        logprobs = None if call.top_logprobs is None else {"content": [self._token(call, word.strip())]}
        return {"delta": {"content": word}, "logprobs": logprobs}

    def _token(self, call: Call, word: str) -> dict[str, Any]:
        rows = [
            {"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in call.logprobs_of(word)
        ]
        return {**rows[0], "top_logprobs": rows[: call.top_logprobs]}


class CompletionForm(ChoicesForm):
    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl"

    def asked(self, body: dict[str, Any]) -> Asked:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt):
            return Asked(" ".join(map(str, prompt)))
        if not isinstance(prompt, str) or not prompt:
            raise RequestRefused(400, "prompt must be a string that is not empty, or a list of token ids.", "prompt")
        return Asked(prompt)

    def choice(self, call: Call, text: str) -> dict[str, Any]:
        shown = " ".join((*call.echoed, text))
        return {"text": shown, "logprobs": self._logprobs(call, [*call.echoed, *call.words])}

    def delta(self, call: Call, word: str) -> dict[str, Any]:
        return {"text": word, "logprobs": self._logprobs(call, [word.strip()])}

    def _logprobs(self, call: Call, words: list[str]) -> dict[str, Any] | None:
        if call.top_logprobs is None:
            return None
        rows = [call.logprobs_of(word) for word in words]
        values: list[float | None] = [row[0][1] for row in rows]
        if call.echoed and len(words) > 1:
            values[0] = None  # nothing comes before the first word
        offsets = itertools.accumulate((len(word) + 1 for word in words[:-1]), initial=0)
        return {
            "tokens": words,
            "token_logprobs": values,
            "top_logprobs": [dict(row) for row in rows],
            "text_offset": list(offsets),
        }


def last_text(messages: Any, param: str) -> str:
    """The text of the last message, its text parts joined; raises RequestRefused."""
    found = objects(messages, param)
    if not found:
        raise RequestRefused(400, f"{param} must be a list of messages that is not empty.", param)
    content = found[-1].get("content") or found[-1].get("output") or ""
    if isinstance(content, list):
        parts = objects(content, param)
        content = " ".join(str(part.get("text") or part.get("content") or "") for part in parts)
    return str(content)


def objects(value: Any, param: str) -> list[dict[str, Any]]:
    """A list of JSON objects, empty for null; raises RequestRefused for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise RequestRefused(400, f"{param} must be a list of objects.", param)
    return value


def forced(named: Any, is_any: bool, tools: Iterable[tuple[Any, Any]]) -> Tool | None:
    """The tool of (name, schema) that must be called: the named one, or the first where any will do."""
    for name, schema in tools:
        if is_any or (named is not None and name == named):
            return Tool(str(name), schema if isinstance(schema, dict) else {}, is_named=not is_any)
    if named is not None:
        raise RequestRefused(400, f"Tool {named!r} has not been passed in tools.", "tool_choice")
    return None


def arguments_of(text: str) -> Any:
    """A tool call's arguments as JSON; empty where a limit cut them short."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def data_event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def named_event(value: dict[str, Any]) -> str:
    """An event whose name is its data's type."""
    return f"event: {value['type']}\n{data_event(value)}"


def _tool_id(call: Call) -> str:
    return f"chatcmpl-tool-{call.number:08d}"


async def _json_object(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise RequestRefused(400, f"The body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestRefused(400, "The body must be a JSON object.")
    return body


def _error(message: str, kind: str, param: str | None, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
