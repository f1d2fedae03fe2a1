"""Prints, as JSON, which fields vLLM's own request models name, by the route that takes them. Its own process: slow."""

from __future__ import annotations

import dataclasses
import json

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from vllm.sampling_params import StructuredOutputsParams

MODELS = {
    "/v1/chat/completions": (ChatCompletionRequest,),
    "/v1/completions": (CompletionRequest,),
    "/v1/responses": (ResponsesRequest,),
    "/v1/messages": (AnthropicMessagesRequest,),
    "/tokenize": (TokenizeCompletionRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
    "stream_options": (StreamOptions,),
}

if __name__ == "__main__":
    found = {
        name: sorted({field for model in models for field in model.model_fields}) for name, models in MODELS.items()
    }
    found["structured_outputs"] = sorted(field.name for field in dataclasses.fields(StructuredOutputsParams))
    print(json.dumps(found))
